"""``coterie.export``: a checkpoint as one GGUF file, for llama.cpp and all that is built on it."""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path
from coterie.errors import InputError, OutOfSpace, ReloadMismatch
from coterie.outputs import check_output, free_space
from coterie.progress import track

if TYPE_CHECKING:
    import gguf

    from coterie.export.tensors import Output

log = logging.getLogger(__name__)

#: Types that numbers can be written as.
NumberType = Literal["bf16", "f16", "f32", "q8_0"]

#: Bytes that the package gguf takes for each token, type of one, and merge that it reads.
_READING_BYTES = 600

#: Bytes of names and places of one tensor in a file, more than enough.
BYTES_PER_INFO = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file that was written, or would be.

    Attributes:
        path: the file.
        architecture: what llama.cpp calls the family.
        tensors: how many it holds.
        num_bytes: bytes of all of them.
        types: bytes of tensors by their type in GGML.
        memory_bytes: bytes in memory at most, beside Python, libraries and the tokenizer: a matrix as it is read and
            written, and what the package gguf takes to read the file's vocabulary back.
        left_out: tensors of the checkpoint that are not in it.
    """

    path: str
    architecture: str
    tensors: int
    num_bytes: int
    types: Mapping[str, int]
    memory_bytes: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self)


def export(
    folder: str | Path,
    file: str | Path,
    *,
    type: NumberType = "bf16",
    allow_pickle: bool = False,
    dry_run: bool = False,
) -> Exported:
    """Write a checkpoint as one GGUF file.

    What a checkpoint stores in blocks of GGML goes over byte for byte. Vectors and routers are in float32, as llama.cpp
    wants them. One matrix is in memory at a time. The file appears when it is whole and was read back.

    Args:
        folder: a model folder or hub id: a plain checkpoint, a quantised one that is read as plain numbers, or a result
            of Coterie that stock loaders load.
        file: the file to write, new.
        type: how matrices of plain numbers are written.
        allow_pickle: read weights that are stored as pickles.
        dry_run: check everything and write nothing.

    Raises:
        InputError: a family, a config or a tokenizer that llama.cpp would compute otherwise, or is not known to compute
            rightly; the package gguf is not installed; an unknown `type`.
        NotACheckpoint, CorruptCheckpoint: no such model, or a damaged one.
        OutputExists: there is a file already.
        OutOfSpace: the disk cannot hold it.
        ReloadMismatch: what was written reads back as something else.
    """
    check_gguf()
    import gguf

    from coterie.export.blocks import encode
    from coterie.export.layout import layout_of
    from coterie.export.metadata import describe, introduce
    from coterie.export.pieces import Pieces
    from coterie.export.tensors import biggest_piece
    from coterie.export.tokens import describe_vocabulary, read_vocabulary
    from coterie.model.disk.checkpoint import Checkpoint
    from coterie.model.disk.quantized import dequantized
    from coterie.model.stream.spill import trim_memory

    if type not in ("bf16", "f16", "f32", "q8_0"):
        raise InputError(f"type is {type!r}: it should be bf16, f16, f32 or q8_0")
    target = check_output(file, kind="GGUF file", reads={"model folder": [folder]}, accepts=lambda path: False)
    stored = Checkpoint.open(folder, allow_pickle=allow_pickle)
    checkpoint = dequantized(stored, "bfloat16" if type == "bf16" else "float32")
    layout = layout_of(checkpoint, number_type=type.upper())
    family, config, outputs = layout.family, layout.config, layout.outputs
    vocabulary = read_vocabulary(checkpoint.path, config.vocab_size)
    exported = Exported(
        path=str(target),
        architecture=family.architecture,
        tensors=len(outputs),
        num_bytes=sum(output.num_bytes for output in outputs),
        types=_bytes_by_type(outputs),
        memory_bytes=biggest_piece(outputs, checkpoint.tensors)
        + _READING_BYTES * (2 * len(vocabulary.tokens) + len(vocabulary.merges)),
        left_out=layout.left_out,
    )
    _tell(exported, type.upper(), outputs)
    if dry_run:
        return exported

    check_space(target, exported.num_bytes + BYTES_PER_INFO * len(outputs) + 64 * len(vocabulary.tokens))
    with atomic_path(target) as temporary:
        writer = gguf.GGUFWriter(None, family.architecture)
        introduce(writer, checkpoint, layout.manifest, outputs)
        describe(writer, family, config, outputs)
        describe_vocabulary(writer, vocabulary)
        for output in outputs:
            announce(writer, output)
        with ExitStack() as stack:
            stack.callback(writer.close)
            try:
                out = begin_file(writer, temporary)
            except (OverflowError, struct.error) as error:
                raise InputError(
                    f"{checkpoint.path} cannot be exported: config.json has a number that no GGUF file holds ({error})"
                ) from None
            pieces = Pieces(stack.enter_context(checkpoint.reader()), stack.enter_context(stored.reader()), checkpoint)
            for output in track(outputs, "writing", total=exported.num_bytes, weight=lambda output: output.num_bytes):
                written = 0
                for piece in pieces.of(output):
                    encoded = [piece] if isinstance(piece, memoryview) else encode(piece, output.type, output.name)
                    written += sum(out.write(content) for content in encoded)
                assert written == output.num_bytes, output.name
                writer.write_padding(out, written)
                trim_memory()
        check_file(temporary, outputs)
    log.info("%s: %s in %d tensors, read back", target, format_bytes(target.stat().st_size), len(outputs))
    return exported


def check_gguf() -> None:
    """Raise InputError unless the package gguf is there."""
    if find_spec("gguf") is None:
        raise InputError("GGUF files take the package gguf: pip install 'coterie[gguf]'")


def check_file(path: Path, outputs: Sequence[Output]) -> None:
    """Read a file back and compare names, shapes, types and places of its tensors with what was meant.

    Raises:
        ReloadMismatch: they differ.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    not_asked = {tensor.name: tensor for tensor in reader.tensors}
    size = path.stat().st_size
    for output in outputs:
        tensor = not_asked.pop(output.name, None)
        if tensor is None:
            raise ReloadMismatch(f"{path}: {output.name} was written and is not there")
        said = (tuple(int(extent) for extent in reversed(tensor.shape)), tensor.tensor_type.name, int(tensor.n_bytes))
        if said != (output.shape, output.type, output.num_bytes) or int(tensor.data_offset) + said[2] > size:
            raise ReloadMismatch(
                f"{path}: {output.name} reads back as {said}; it should be {output.shape}, {output.type}, "
                f"{output.num_bytes} bytes"
            )
    if not_asked:
        raise ReloadMismatch(f"{path}: {next(iter(not_asked))} is there and was not written")


def announce(writer: gguf.GGUFWriter, output: Output) -> None:
    """Tell the writer of a file of a tensor that is to come."""
    import gguf
    import numpy as np

    writer.add_tensor_info(
        output.name, output.shape, np.dtype(np.float32), output.num_bytes, gguf.GGMLQuantizationType[output.type]
    )


def begin_file(writer: gguf.GGUFWriter, path: Path) -> BufferedWriter:
    """Write all that comes before the numbers of the tensors that were announced, and return the open file."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    return out


def _bytes_by_type(outputs: Sequence[Output]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.type] = sizes.get(output.type, 0) + output.num_bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def check_space(target: Path, num_bytes: int) -> None:
    """Raise OutOfSpace unless the disk can hold a file of so many bytes."""
    existing, free = free_space(target.parent)
    needed = num_bytes + 16 * 2**20
    if free < needed:
        raise OutOfSpace(
            errno.ENOSPC, f"{target} needs {format_bytes(needed)}, {existing} has {format_bytes(free)} free"
        )


def _tell(exported: Exported, number_type: str, outputs: Sequence[Output]) -> None:
    log.info(
        "%d tensors, %s, for llama.cpp's %s; at most %s in memory at once",
        exported.tensors, format_bytes(exported.num_bytes), exported.architecture, format_bytes(exported.memory_bytes),
    )  # fmt: skip
    fallen = [output for output in outputs if not output.copied and output.type not in ("F32", number_type)]
    if fallen:
        log.info(
            "%d tensors are written as %s: rows such as the %d columns of %s are not made of whole blocks of %s",
            len(fallen), fallen[0].type, fallen[0].shape[-1], fallen[0].name, number_type,
        )  # fmt: skip
    unpacked = [output.name for output in outputs if output.unpacked]
    if unpacked:
        log.info("%d tensors lose their blocks, such as %s: llama.cpp wants rows elsewhere", len(unpacked), unpacked[0])
    if exported.left_out:
        log.info("%d tensors stay behind, such as %s", len(exported.left_out), exported.left_out[0])
