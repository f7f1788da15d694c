"""``coterie pack``: a model as records that a run reads in one go and multiplies with as they lie."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


def pack(
    model: options.Model,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write; it must be new. Left out with --verify.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Bits of experts' numbers: 8, with a scale a row, or 4, with scale and offset a group."),
    ] = None,
    dense: Annotated[
        int | None,
        typer.Option(
            help="Bits of linear layers that every token passes, 8 or 4: attention, shared experts, the head.",
            show_default="as they are",
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale with 4 bits: 32, 64, 128 or 256.", show_default="the model's, else 64"
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="MODEL was packed: read all of it, and compare it with its checksums.")
    ] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Pack a model, for runs that compute in few bits.

    Each expert becomes one record, read in one go and multiplied with as it lies; with 4 bits it lies as the processor
    of this machine wants it. `run` and `serve` take the result like any model. It is a copy: the model stays.
    """
    from coterie.run import pack as packing

    if verify:
        if out is not None:
            raise typer.BadParameter("with --verify nothing is written", param_hint="OUT")
        verified = packing.verify(model)
        if json:
            print_json(verified.to_json())
            return
        from coterie.amounts import format_bytes

        print_text(f"{verified.tensors} tensors, {format_bytes(verified.num_bytes)}, all as they were written")
        return
    if out is None:
        raise typer.BadParameter("say where the packed model goes", param_hint="OUT")
    if bits is None:
        raise typer.BadParameter("say in how many bits: 8 or 4", param_hint="--bits")
    packed = packing.pack(model, out, bits=bits, dense=dense, group=group, dry_run=dry_run)
    if json:
        print_json(packed.to_json())
        return
    print_text(f"{packed.path}: {packed}")
