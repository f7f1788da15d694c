"""Distil: train a compressed model, as a rule its experts and routers, towards what the original model predicts.

The original streams by one layer at a time while its predictions are made; only the compressed model is in memory as a
whole. Steps are those of Adam on float32 weights, relative to the size of each tensor. Sequences are seen once an
epoch, in a seeded order; some are held out, and the trained weights are taken where those gained.

What a run keeps in its private folder: the predictions, and the state of the loop every `SAVE_SECONDS`, so that
training goes on where it was killed.

Legend: B sequences, S tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from coterie.artifact import atomic_path, digest_of
from coterie.errors import CorruptArtifact
from coterie.journal import Run
from coterie.model.stream.likelihood import position_slices
from coterie.model.stream.loss import LOSS_ELEMENTS
from coterie.model.stream.reading import logits_at, read
from coterie.model.stream.stream import Stream
from coterie.model.threads import workers_on
from coterie.progress import track
from coterie.train.loop import Look, Loop, Loss, mean_loss
from coterie.train.optimiser import load_optimiser
from coterie.train.predictions import PredictionFile, Predictions, writing_predictions
from coterie.train.schedule import Schedule, rate_at, shuffled
from coterie.train.split import split

log = logging.getLogger(__name__)

#: Seconds of training between two saved states.
SAVE_SECONDS = 60.0

#: Tokens kept of each prediction.
KEPT = 128

#: Every so many-th sequence is held out, where nobody says otherwise.
HELD_OUT = 16

#: Sequences of a step, and those that are computed at once.
SEQUENCES, MICRO = 4, 2

#: How often a sequence is seen at most.
EPOCHS = 4

#: Largest step of an entry of a tensor, relative to the root mean square of its entries, for each root of a nat that
#: the held-out divergence has at first. Divergence is quadratic in the error of the weights: its root is how far to go.
RATE = 0.02

#: What is waited for, as the stages of a run are called.
PREDICTING, PREDICTING_HEAD, TRAINING = "predicting", "predicting: head", "training"

_PREDICTIONS = "distill-predictions.safetensors"
_STEP = "distilled to step "


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What training came to.

    Attributes:
        weights: the trained tensors by name in memory, as they will be on disk; None where the held-out sequences did
            not gain.
        notes: what the manifest says of it.
    """

    weights: Mapping[str, Tensor] | None
    notes: Mapping[str, object]


def make_predictions(
    run: Run, stream: Stream, batches: Sequence[Tensor], *, cache: Path | None = None
) -> PredictionFile:
    """Run the original over all sequences, layer by layer, and write down what it predicts; a step of the run.

    Args:
        run: where the predictions go.
        stream: the original.
        batches: token ids (B, S) of the sequences, some at a time.
        cache: folder where predictions are kept for other runs, under a digest of the model and the sequences; None to
            keep them in the run.
    """
    if cache is None:
        path = run.private / _PREDICTIONS
        if _PREDICTIONS not in run.finished:
            _predict(stream, batches, path)
            run.finish(_PREDICTIONS, private=[_PREDICTIONS])
        return PredictionFile(path)
    cache.mkdir(parents=True, exist_ok=True)
    ids = hashlib.sha256(torch.cat(list(batches)).numpy().tobytes()).hexdigest()
    about = {"model": stream.checkpoint.digest, "ids": ids, "kept": KEPT, "device": stream.device.type}
    path = cache / f"most-probable-{digest_of(about)[:32]}.safetensors"
    if path.exists():
        try:
            return PredictionFile(path)
        except CorruptArtifact as error:
            log.warning("%s; they are made again", error)
    _predict(stream, batches, path)
    return PredictionFile(path)


def _predict(stream: Stream, batches: Sequence[Tensor], path: Path) -> None:
    outputs = read(stream, batches, description=PREDICTING)
    vocab_size = int(stream.model.config.get_text_config().vocab_size)
    first = 0
    with writing_predictions(path, sum(map(len, batches))) as writer, stream.head() as head:
        for ids_BS, output in track(zip(batches, outputs, strict=True), PREDICTING_HEAD, total=len(batches)):
            last = ids_BS.shape[1] - 1
            parts = [
                Predictions.of(
                    logits_at(head, ids_BS, output, slice(piece.start, piece.stop + (piece.stop == last))), KEPT
                )
                for piece in position_slices(last, len(ids_BS), vocab_size, elements=LOSS_ELEMENTS)
            ]
            writer.put(first, Predictions.joined(parts))
            first += len(ids_BS)
            stream.release()


def divergence_loss(
    model: PreTrainedModel,
    ids_BS: Tensor,
    predictions: Predictions | PredictionFile,
    counts_BS: Tensor | None = None,
) -> Loss:
    """Return a model's mean divergence from predictions on some of the sequences, nats per token, by their numbers.

    Args:
        model: the model.
        ids_BS: token ids of all sequences.
        predictions: what the original predicts there.
        counts_BS: the predictions of which tokens count, bool; None for all. Sums over those of some sequences are then
            divided by as many as so many sequences have on average, so that every token has the same weight.
    """
    weights_BS, mean_count = None, 1.0
    if counts_BS is not None:
        # What is predicted behind a token is the next one; behind the last one it is not known.
        weights_BS = torch.cat((counts_BS[:, 1:], torch.zeros_like(counts_BS[:, :1])), dim=1)
        mean_count = float(weights_BS.sum()) / len(weights_BS)

    def loss(rows_N: Tensor) -> Tensor:
        logits_BSV: Tensor = model(input_ids=ids_BS[rows_N].to(model.device), use_cache=False).logits
        some = predictions.select(rows_N)
        if weights_BS is None:
            return some.divergence(logits_BSV)
        divergence_BS = some.divergences(logits_BSV)
        counted_T = divergence_BS[weights_BS[rows_N].to(divergence_BS.device)]
        return counted_T.sum() / (len(rows_N) * mean_count)

    return loss


def distill(
    run: Run,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    ids_BS: Tensor,
    predictions: Predictions | PredictionFile,
    *,
    computing: AbstractContextManager[None],
    tokens: int,
    seed: int,
    rounded: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    rate: float | None = None,
    looks: int = 0,
    optimiser: str = "adam",
    held_out: int = HELD_OUT,
    counts_BS: Tensor | None = None,
) -> Outcome:
    """Train a model that is in memory as a whole; steps of the run.

    Args:
        run: where states go.
        model: the compressed model, float32; all that is not trained needs no gradients.
        weights: what is trained of it, by name; see `coterie.train.model.trainable`.
        ids_BS: token ids.
        predictions: what the original predicts there.
        computing: within it the model computes so that gradients reach the weights.
        tokens: tokens to train on; with less text, each sequence is seen up to `EPOCHS` times.
        seed: of the order of the sequences.
        rounded: gives tensors as they will be on disk.
        rate: in place of `RATE`, where all that is trained stands for many weights.
        looks: how often the held-out sequences are looked at on the way, so that the weights that were best there are
            taken; 0 for those of the last step.
        optimiser: which one, see `coterie.train.optimiser.load_optimiser`.
        held_out: every so many-th sequence is held out, and one at least.
        counts_BS: the predictions of which tokens count, bool; None for all.

    Returns:
        The outcome; the model holds the trained weights, rounded, or where they are not taken, the last ones.

    Raises:
        UnknownName: no such optimiser.
    """
    fit_N, heldout_N = split(len(ids_BS), min(held_out, len(ids_BS)))
    sequences = min(tokens // ids_BS.shape[1], EPOCHS * len(fit_N))
    steps, batch = max(1, round(sequences / SEQUENCES)), min(SEQUENCES, len(fit_N))
    order = shuffled(len(fit_N), batch, seed)
    workers = workers_on(model.device)
    loss = divergence_loss(model, ids_BS, predictions, counts_BS)
    with computing:

        def heldout_divergence() -> float:
            return mean_loss(loss, heldout_N, micro=MICRO, workers=workers)

        saved = [name for name in run.finished if name.startswith(_STEP)]
        before = float(run.finished[saved[0]].content["before"]) if saved else heldout_divergence()
        # Rounding can make it a hair less than 0.
        largest = (RATE if rate is None else rate) * min(1.0, max(0.0, before) ** 0.5)
        schedule = Schedule(
            steps=steps, rows=lambda step: fit_N[order(step)], rate=lambda step: rate_at(step, steps, largest)
        )
        look = None
        if looks:
            look = Look(every=max(1, -(-steps // looks)), measure=heldout_divergence, least=before)
        loop = Loop(
            weights, loss, optimiser=load_optimiser(optimiser)(weights), schedule=schedule, micro=MICRO,
            workers=workers, look=look,
        )  # fmt: skip
        if saved:
            loop.restore(load_file(run.private / _state_file(saved[-1])))

        def save(step: int, state: Mapping[str, Tensor]) -> None:
            name = f"{_STEP}{step}"
            with atomic_path(run.private / _state_file(name)) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in state.items()}, temporary)
            dropped = [_state_file(last) for last in saved[-1:]]
            run.finish(name, private=[_state_file(name)], drop=dropped, content={"before": before})
            saved.append(name)

        loop.run(says=TRAINING, save=save, save_seconds=SAVE_SECONDS)
        with torch.no_grad():
            for name, tensor in rounded(loop.best or weights).items():
                weights[name].copy_(tensor)
        after = heldout_divergence()
    notes: dict[str, object] = {
        "steps": steps,
        "tokens": steps * batch * ids_BS.shape[1],
        "rate": largest,
        "heldout_divergence_before": before,
        "heldout_divergence_after": after,
        "taken": after < before,
    }
    trained = {name: tensor.detach() for name, tensor in weights.items()} if after < before else None
    return Outcome(weights=trained, notes=notes)


def _state_file(step: str) -> str:
    return f"distill-state-{step.removeprefix(_STEP)}.safetensors"
