"""``coterie.imatrix``: an importance matrix for llama.cpp's quantiser, measured one layer in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.amounts import format_bytes, parse_bytes
from coterie.artifact import atomic_path
from coterie.export.run import BYTES_PER_INFO, announce, begin_file, check_file, check_gguf, check_space
from coterie.model.device import check_device
from coterie.outputs import check_output
from coterie.profile.data_sets import local_place
from coterie.profile.sources import On, check_on
from coterie.progress import StageTime, waiting

if TYPE_CHECKING:
    import gguf

    from coterie.export.importance import Measurement

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Imatrix:
    """A file that was written, or would be.

    Attributes:
        path: the file.
        architecture: what llama.cpp calls the family.
        matrices: tensors of the model's GGUF file that it has something to say of; a stack of experts is one.
        num_tokens: tokens that counted.
        chunks: sequences that were read.
        unseen_experts: how many experts, of all layers together, no token chose; llama.cpp weighs all their inputs
            alike. None in a dry run.
        num_bytes: of the tensors in the file.
        memory_bytes: bytes in memory at most.
    """

    path: str
    architecture: str
    matrices: int
    num_tokens: int
    chunks: int
    unseen_experts: int | None
    num_bytes: int
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self)


def imatrix(
    model: str | Path,
    file: str | Path,
    *,
    text: str | Path,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    device: str = "cpu",
    on: On = "all",
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    dry_run: bool = False,
) -> Imatrix:
    """Write what ``llama-quantize --imatrix`` reads: for each matrix the sums of squares of its inputs on text.

    It is what ``llama-imatrix`` measures, for a model of any size: one layer is in memory at a time. Routers are left
    out, which are never rounded, and so is the head, as there. The file appears when it is whole and was read back; a
    run that is ended early begins anew.

    Args:
        model: a model folder or hub id.
        file: the file to write, new.
        text: folder with calibration text, see `coterie.profile`.
        tokens: tokens in all.
        seq_len: tokens in a sequence, a chunk in llama.cpp's words.
        seed: seed of the draw of text.
        weights: share of the text by domain.
        device: where layers are computed.
        on: which tokens count: "all", or those of answers and completions, "assistant".
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.
        dry_run: check everything and write nothing.

    Raises:
        InputError: a family or a config that llama.cpp would compute otherwise, or is not known to compute rightly; the
            package gguf is not installed; the text is not usable, see `coterie.profile`.
        NotACheckpoint, NotAMoE, CorruptCheckpoint: the model cannot be used.
        ArchitectureMismatch: a layer does not compute what its canonical experts compute.
        OutputExists: there is a file already.
        OutOfSpace: the disk cannot hold it.
        NotEnoughMemory: `max_memory` is too little.
        ReloadMismatch: what was written reads back as something else.
    """
    check_gguf()
    check_device(device)
    check_on(on)
    from coterie.export.importance import BATCH, MEASURING, Measurement, files_tensors
    from coterie.export.layout import layout_of
    from coterie.model.arch.layers import Architecture
    from coterie.model.disk.open import open_checkpoint
    from coterie.model.stream.memory import Forecast
    from coterie.model.stream.stream import Stream
    from coterie.profile.text import CalibrationText, TextSettings, UnwrittenText

    reads = {"model folder": [model], "text folder": [local_place(text)]}
    target = check_output(file, kind="importance matrix", reads=reads, accepts=lambda path: False)
    limit = None if max_memory is None else parse_bytes(max_memory)
    checkpoint = open_checkpoint(model, output_dtype="float32", allow_pickle=allow_pickle)
    layout = layout_of(checkpoint, number_type="F32")
    layers = Architecture.of(checkpoint).layers
    settings = TextSettings(source=text, weights=weights, tokens=tokens, seq_len=seq_len, seed=seed, on=on)
    kind = UnwrittenText if dry_run and settings.own else CalibrationText
    token_set = kind(checkpoint, settings, device=device, limit=limit, scratch=target.parent).draw()
    stream = Stream(checkpoint, device=device, scratch=target.parent)
    measurement = Measurement.of(stream, layers, layout, token_set)
    forecast = Forecast(stages=(measurement.memory(BATCH),))
    forecast.check(limit)
    tensors = files_tensors(measurement.entries)
    num_bytes, unseen = sum(tensor.num_bytes for tensor in tensors), None
    if not dry_run:
        check_space(target, num_bytes + BYTES_PER_INFO * len(tensors))
        work = measurement.work
        time = StageTime(name=MEASURING, seconds=work.total, tokens=measurement.num_tokens, reading=work.reading)
        with waiting([time]), atomic_path(target) as temporary:
            unseen = _write(temporary, measurement, layout.family.architecture)
            check_file(temporary, tensors)
        log.info("%s: %s for %d matrices, read back", target, format_bytes(num_bytes), len(measurement.entries))
    if unseen:
        log.warning(
            "%d experts were chosen by no token; llama.cpp weighs all their inputs alike: more text helps (--tokens)",
            unseen,
        )
    return Imatrix(
        path=str(target), architecture=layout.family.architecture, matrices=len(measurement.entries),
        num_tokens=sum(token_set.num_counted.values()), chunks=measurement.chunks, unseen_experts=unseen,
        num_bytes=num_bytes, memory_bytes=forecast.num_bytes,
    )  # fmt: skip


def _write(path: Path, measurement: Measurement, architecture: str) -> int:
    """Measure and write layer by layer; return how many experts no token chose."""
    import gguf
    import torch

    from coterie.export.importance import files_tensors

    unseen = 0
    with ExitStack() as stack:
        writer = gguf.GGUFWriter(None, architecture)
        stack.callback(writer.close)
        out = _begin(writer, path, files_tensors(measurement.entries), measurement)
        with measurement.stream:
            for entry, (measured, sums_NC, count_N) in zip(measurement.entries, measurement.run(), strict=True):
                assert measured is entry, measured.name  # the order of the file is that of the layers
                for content in (sums_NC, count_N):
                    written = out.write(content.to(torch.float32).contiguous().numpy().tobytes())
                    writer.write_padding(out, written)
                unseen += int((count_N == 0).sum()) if entry.inputs == "between" else 0
    return unseen


def _begin(writer: gguf.GGUFWriter, path: Path, tensors: Sequence[Any], measurement: Measurement) -> BufferedWriter:
    """Write all that comes before the numbers: names as in llama.cpp's tools/imatrix."""
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(measurement.token_set.domains))
    writer.add_uint32("imatrix.chunk_count", measurement.chunks)
    writer.add_uint32("imatrix.chunk_size", measurement.token_set.seq_len)
    for tensor in tensors:
        announce(writer, tensor)
    return begin_file(writer, path)
