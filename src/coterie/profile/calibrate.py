"""Calibrate: look at sources of calibration text before a model is measured on them, or let the model write one.

from coterie.profile.calibrate import calibrate, generate

generate("model", "text/own", tokens=65536)
choice = calibrate("model", text="text/calibration")
choice.weights, choice.dropped
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.amounts import parse_bytes
from coterie.artifact import atomic_path, file_digest, write_artifact
from coterie.model.device import check_device
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream.memory import Stage, unit_lines
from coterie.model.stream.stream import Stream
from coterie.outputs import check_output
from coterie.paths import user_path
from coterie.profile.information import Information, forecast, measure_information
from coterie.profile.mixing import choose_mix
from coterie.profile.self_text import SELF, FirstToken, Writing, write_text
from coterie.profile.sources import On
from coterie.profile.text import CalibrationText, TextSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What is known of the sources of a text, and the mix that was chosen from that.

    Attributes:
        sources: one entry a domain.
        weights: share by domain of the chosen mix, in thousandths; domains that were left out are not in it.
        dropped: why a domain was left out, by domain.
        text_digest: digest of the tokens that were measured.
    """

    sources: tuple[Information, ...]
    weights: Mapping[str, float]
    dropped: Mapping[str, str]
    text_digest: str

    @property
    def domains(self) -> str:
        """The mix as ``--domains`` takes it."""
        return ",".join(f"{domain}={weight:g}" for domain, weight in self.weights.items())

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "sources": [source.to_json() for source in self.sources],
            "weights": dict(self.weights),
            "dropped": dict(self.dropped),
            "domains": self.domains,
            "text_digest": self.text_digest,
        }


def calibrate(
    model: str | Path,
    *,
    text: str | Path,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    domains: tuple[str, ...] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    on: On = "all",
) -> Calibration:
    """Measure what each source of a text is to a model and choose a mix, one decoder layer in memory at a time.

    See `coterie.profile.information` for the metrics and `coterie.profile.mixing.choose_mix` for the choice, which
    follow IGSP [arXiv 2606.03328].

    Args:
        model: a model folder or hub id.
        text: folder with one text file a domain, or ``hf:`` and the name of a data set; "self" for text that the model
            writes.
        tokens: tokens in all, shared equally by the domains.
        seq_len: tokens in a sequence, 4 or more.
        seed: seed of the draw of text, and of what the model writes.
        domains: only these domains.
        device: where the model runs.
        dtype: number format of the layers; see `coterie.model.stream.stream.working_dtype`.
        batch_size: sequences in a batch at most.
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.
        on: which tokens count: "all", or those of answers in conversations and of completions, "assistant".

    Raises:
        TextError: no text, empty or too short text, or none that is fit for calibration.
        Infeasible: `max_memory` is too little, or the model does not fit into memory to write text.
        InputError: the model cannot be used, or its predictions are not numbers.
    """
    check_device(device)
    limit = None if max_memory is None else parse_bytes(max_memory)
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    stream = Stream(checkpoint, device=device, dtype=dtype)
    unit_stage = Stage(name="reading a layer", lines=unit_lines(stream))
    unit_stage.check(limit)  # before text is read, or written
    settings = TextSettings(source=text, tokens=tokens, seq_len=seq_len, seed=seed, domains=domains, on=on)
    token_set = CalibrationText(checkpoint, settings, device=device, limit=limit).draw()
    forecast(stream, token_set, batch_size=batch_size).check(limit)
    with stream:
        sources = measure_information(stream, token_set, batch_size=batch_size)
    weights, dropped = choose_mix(sources)
    return Calibration(sources=sources, weights=weights, dropped=dropped, text_digest=token_set.digest)


def generate(
    model: str | Path,
    out: str | Path,
    *,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    temperature: float = 1.0,
    first_token: FirstToken = "sampled",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Let a model write calibration text into a folder: ``self.jsonl``, and how it was made in ``self.json``.

    A profile on the folder, with the same `tokens`, `seq_len` and `seed`, equals a profile on the text "self".

    Args:
        model: a model folder or hub id; it is loaded as a whole.
        out: the folder; it may hold text of other domains.
        tokens: tokens to write at least.
        seq_len: tokens of a document at most.
        seed: seed of everything random.
        temperature: 1 draws from the model's own distribution; below, from its likelier tokens.
        first_token: "sampled", or "likeliest": the n-th document starts with the n-th likeliest token.
        device: where the model runs.
        dtype: number format of the model; see `coterie.model.arch.load.load_model`.
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: accept a checkpoint of pickles, only to say that it cannot be loaded as a whole.

    Returns:
        The file.

    Raises:
        OutputExists: the folder has a domain "self", or is no folder.
        InputError: the folder is inside the model or cannot be written to.
        InputError, Infeasible, TextError: see `coterie.profile.self_text.write_text`.
    """
    check_device(device)
    folder = user_path(out)
    file = folder / f"{SELF}.jsonl"
    for ending in (".jsonl", ".txt", ".json"):
        check_output(
            file.with_suffix(ending), kind="text", reads={"model folder": [model]}, accepts=lambda place: False,
            makes_parents=True,
        )  # fmt: skip
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    writing = Writing(
        tokens=tokens, max_length=seq_len, seed=seed, temperature=temperature, first_token=first_token, device=device,
        dtype=dtype,
    )  # fmt: skip
    documents = write_text(checkpoint, writing, limit=None if max_memory is None else parse_bytes(max_memory))
    _write_lines(file, documents)
    settings = {
        "tokens": tokens, "seq_len": seq_len, "seed": seed, "temperature": temperature, "first_token": first_token,
        "documents": len(documents),
    }  # fmt: skip
    write_artifact(
        file.with_suffix(".json"), kind="text", body=settings, inputs={"model": checkpoint.digest},
        files={file.name: file_digest(file)},
    )  # fmt: skip
    return file


def _write_lines(file: Path, documents: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
