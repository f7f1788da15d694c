"""``coterie export``: a checkpoint as one GGUF file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


def export(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="Model folder or GGUF file, or a hub id; a result of `coterie compress` too."
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, like model.gguf; it must be new.")],
    number_type: Annotated[
        Literal["bf16", "f16", "f32", "q8_0"],
        typer.Option("--type", help="How matrices of plain numbers are written; blocks of GGML go over as they are."),
    ] = "bf16",
    allow_pickle: options.AllowPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be written, and write nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Write a model as one GGUF file, for llama.cpp.

    What llama.cpp would compute otherwise than transformers does is refused, with the reason, before it is written.
    """
    from coterie.amounts import format_bytes
    from coterie.export.run import export as write

    exported = write(folder, file, type=number_type, allow_pickle=allow_pickle, dry_run=dry_run)
    if json:
        print_json(exported.to_json())
        return
    kinds = ", ".join(f"{format_bytes(size)} {name}" for name, size in exported.types.items())
    done = "would be written to" if dry_run else "written to"
    print_text(f"{exported.tensors} tensors ({kinds}) {done} {exported.path}")
