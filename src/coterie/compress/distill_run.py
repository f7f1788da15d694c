"""Distillation as steps of a run: targets from the streamed original, training that goes on where it was killed.

What a run keeps in its private folder: the targets, and the optimizer's state every `SAVE_SECONDS`. The weight files of
the result are written anew at the end, when the held-out sequences gained.

Legend: B sequences, S tokens of a sequence, K tokens kept for each target.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path, digest_of
from coterie.compress.cost import training_cost
from coterie.compress.distill import Distillation, Schedule, Targets, trainable
from coterie.compress.plan import Shape
from coterie.journal import Run
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.load import result_meta_model
from coterie.model.stream.memory import free_bytes
from coterie.model.stream.stream import Stream
from coterie.profile.calibration import TokenSet
from coterie.progress import track

log = logging.getLogger(__name__)

#: Seconds of training between two saved states.
SAVE_SECONDS = 60.0

#: Tokens kept for each target.
KEPT = 128

#: Every so many-th sequence is held out.
HELD_OUT = 16

#: Sequences of a step, and those that are computed at once.
SEQUENCES, MICRO = 4, 2

#: How often a sequence is seen at most.
EPOCHS = 4

#: Largest step of an entry of a tensor, relative to the root mean square of its entries, for each root of a nat that
#: the held-out divergence has at first. Divergence is quadratic in the error of the weights: its root is how far to go.
RATE = 0.02

_TARGETS = "distill-targets.safetensors"
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


def needed_bytes(model: PreTrainedModel, layers: Sequence[MoELayer], *, seq_len: int, workers: int) -> int:
    """Say how much memory distilling a model takes at most; a meta model will do."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trainable(model, layers).values())
    config: Any = model.config.get_text_config()
    tokens = workers * MICRO * seq_len
    # Logits, their softmax and both gradients; the activations of all layers; weights, gradients and two moments.
    logits = 5 * tokens * int(config.vocab_size)
    activations = 24 * tokens * int(config.hidden_size) * int(config.num_hidden_layers)
    return 4 * (weights + (2 + 2 * workers) * trained + logits + activations)


def may_distill(
    architecture: Architecture, shape: Shape, seq_len: int, limit: int | None, device: torch.device
) -> bool:
    """Tell whether a result can be trained in the memory that is allowed or, without a limit, free; log which."""
    model = _meta_model(architecture, shape)
    needed = needed_bytes(model, architecture.layers, seq_len=seq_len, workers=torch.get_num_threads())
    allowed = free_bytes(device) if limit is None else limit
    says = f"training the result as a whole takes {format_bytes(needed)} of memory"
    if needed > allowed:
        log.warning("%s, %s may be used: it is left out", says, format_bytes(allowed))
        return False
    log.info("memory: %s", says)
    return True


def say_cost(architecture: Architecture, shape: Shape, token_set: TokenSet, tokens: int, device: torch.device) -> int:
    """Log what training on `tokens` takes, or on as many as the text has, seen `EPOCHS` times; return how many."""
    there = sum(map(len, token_set.sequences.values())) * token_set.seq_len
    tokens = min(tokens, EPOCHS * there)
    cost = training_cost(
        architecture.model, _meta_model(architecture, shape), architecture.layers,
        tokens=tokens, top_k=shape.top_k or architecture.layers[0].top_k, device=device,
    )  # fmt: skip
    log.info("cost: %s", cost)
    return tokens


def _meta_model(architecture: Architecture, shape: Shape) -> PreTrainedModel:
    return result_meta_model(
        architecture, shape.num_experts, maps=None, dtype=torch.float32, width=shape.width, top_k=shape.top_k
    )


def make_targets(run: Run, stream: Stream, batches: Sequence[tuple[int, Tensor]], cache: Path | None = None) -> Targets:
    """Run the original over all sequences, layer by layer, and keep what it predicts; a step of the run.

    With a `cache`, the predictions are kept there under a digest of the model and the sequences.
    """
    file = run.private / _TARGETS
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        ids = hashlib.sha256(torch.cat([ids_BS for _, ids_BS in batches]).numpy().tobytes()).hexdigest()
        about = {"model": stream.checkpoint.digest, "ids": ids, "kept": KEPT, "device": stream.device.type}
        file = cache / f"targets-{digest_of(about)[:32]}.safetensors"
    if not (file.exists() if cache is not None else _TARGETS in run.finished):

        def predict(ids_BS: Tensor) -> Targets:
            return Targets.of(stream.model(input_ids=ids_BS, use_cache=False).logits, KEPT)

        passes = stream.run([functools.partial(predict, ids_BS) for _, ids_BS in batches], heads_apart=True)
        for _ in track(passes, "predicting", total=len(stream.units)):
            stream.release()
        targets = Targets.joined(passes.results)
        with atomic_path(file) as temporary:
            save_file({"token": targets.token_BSK, "log_probability": targets.log_probability_BSK}, temporary)
        if cache is None:
            run.finish(_TARGETS, private=[_TARGETS])
    held = load_file(file)
    return Targets(token_BSK=held["token"], log_probability_BSK=held["log_probability"])


def train(
    run: Run,
    model: PreTrainedModel,
    architecture: Architecture,
    ids_BS: Tensor,
    targets: Targets,
    *,
    tokens: int,
    seed: int,
    rounded: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> Outcome:
    """Train a model that is in memory as a whole; steps of the run.

    Args:
        run: where states go.
        model: the compressed model, float32.
        architecture: the original's, whose names it shares.
        ids_BS: token ids.
        targets: what the original predicts there.
        tokens: tokens to train on; with less text, each sequence is seen up to `EPOCHS` times.
        seed: of the order of the sequences.
        rounded: gives tensors as they will be on disk.

    Returns:
        The outcome; the model holds the trained weights, rounded.
    """
    step = min(HELD_OUT, len(ids_BS))
    held_B = torch.arange(len(ids_BS)) % step == step - 1
    fit, held = ((ids_BS[rows], targets.select(rows)) for rows in (~held_B, held_B))
    seen = min(tokens // ids_BS.shape[1], EPOCHS * len(fit[0]))
    steps = max(1, round(seen / SEQUENCES))
    schedule = Schedule(steps=steps, sequences=min(SEQUENCES, len(fit[0])), micro=MICRO, seed=seed)
    workers = 1 if model.device.type != "cpu" else torch.get_num_threads()
    work = Distillation(model, architecture.layers, schedule, workers=workers)
    saved = [name for name in run.finished if name.startswith(_STEP)]
    if saved:
        before = float(run.finished[saved[0]].content["before"])
        work.adam.restore(load_file(run.private / _state_file(saved[-1])))
    else:
        before = work.measure(*held)
    work.rate = RATE * min(1.0, max(0.0, before) ** 0.5)  # rounding can make it a hair less than 0
    at = time.monotonic()
    for _ in track(range(work.step, steps), "distilling", total=steps - work.step):
        work.advance(*fit)
        if time.monotonic() - at >= SAVE_SECONDS or work.step == steps:
            saved.append(_save(run, work, before, saved[-1:]))
            at = time.monotonic()
    with torch.no_grad():
        for name, tensor in rounded(work.weights).items():
            work.weights[name].copy_(tensor)
    after = work.measure(*held)
    notes: dict[str, object] = {
        "steps": steps,
        "tokens": steps * schedule.sequences * ids_BS.shape[1],
        "rate": work.rate,
        "heldout_divergence_before": before,
        "heldout_divergence_after": after,
        "taken": after < before,
    }
    return Outcome(
        weights={name: tensor.detach() for name, tensor in work.weights.items()} if after < before else None,
        notes=notes,
    )


def _state_file(step: str) -> str:
    return f"distill-state-{step.removeprefix(_STEP)}.safetensors"


def _save(run: Run, work: Distillation, before: float, last: Sequence[str]) -> str:
    name = f"{_STEP}{work.step}"
    with atomic_path(run.private / _state_file(name)) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in work.adam.state().items()}, temporary)
    run.finish(name, private=[_state_file(name)], drop=[_state_file(step) for step in last], content={"before": before})
    return name
