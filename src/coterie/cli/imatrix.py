"""``coterie imatrix``: an importance matrix for llama.cpp's quantiser."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


def imatrix(
    model: options.Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, like imatrix.gguf; it must be new.")],
    text: Annotated[str, typer.Option(metavar="TEXT", help=options.TEXT_HELP)],
    tokens: options.Tokens = 131_072,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    domains: options.Domains = None,
    device: options.Device = "cpu",
    on: options.On = "all",
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be written, and write nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Measure what llama-quantize --imatrix reads.

    As llama-imatrix does, but with one layer of the model in memory at a time: squares of what comes into each matrix
    are summed up over the text, for each expert over the tokens that chose it.
    """
    from coterie.amounts import format_bytes
    from coterie.profile.shares import parse_domains

    weights = None if domains is None else parse_domains(domains)
    from coterie.export.imatrix import imatrix as write

    done = write(
        model, file, text=text, tokens=tokens, seq_len=seq_len, seed=seed, weights=weights, device=device, on=on,
        max_memory=max_memory, allow_pickle=allow_pickle, dry_run=dry_run,
    )  # fmt: skip
    if json:
        print_json(done.to_json())
        return
    what = f"importance of {done.matrices} tensors ({format_bytes(done.num_bytes)}) on {done.num_tokens:,} tokens"
    print_text(f"{what} {'would be written' if dry_run else 'written'} to {done.path}")
