"""``coterie calibrate``: look at sources of calibration text, or let the model write one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coterie.cli import options
from coterie.cli.output import number, percent, print_json, print_table, print_text

if TYPE_CHECKING:
    from coterie.profile.calibrate import Calibration


def calibrate(
    model: options.Model,
    text: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=options.TEXT_HELP),
    ] = None,
    generate: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Let the model write text into this folder, and look at that.")
    ] = None,
    tokens: options.Tokens = 131_072,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    domains: Annotated[str | None, typer.Option(help="Only these domains, separated by commas.")] = None,
    temperature: Annotated[
        float,
        typer.Option(help="For --generate: 1 draws from the model's own distribution; lower is more likely text."),
    ] = 1.0,
    first_token: Annotated[
        Literal["sampled", "likeliest"],
        typer.Option(help="For --generate: document n starts with a drawn token, or with the n-th likeliest."),
    ] = "sampled",
    on: options.On = "all",
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Look at calibration text and choose a mix.

    Shows what each source of text is to the model (perplexity, repeated 4-grams, diversity) and the mix that keeps
    most of its abilities. With --generate the model, in memory as a whole, writes the text itself.
    """
    if (text is None) == (generate is None):
        how_many = "both" if text is not None else "neither"
        raise typer.BadParameter(f"give exactly one of them; got {how_many}", param_hint="--text, --generate")
    if generate is not None and domains is not None:
        raise typer.BadParameter("text that the model writes has no domains; leave it out", param_hint="--domains")
    if generate is not None and on != "all":
        raise typer.BadParameter("text that the model writes holds no conversations; leave it out", param_hint="--on")
    from coterie.profile.calibrate import calibrate as run
    from coterie.profile.calibrate import generate as write

    chosen = None if domains is None else tuple(options.names(domains))
    if generate is not None:
        file = write(
            model,
            generate,
            tokens=tokens,
            seq_len=seq_len,
            seed=seed,
            temperature=temperature,
            first_token=first_token,
            device=device,
            max_memory=max_memory,
            allow_pickle=allow_pickle,
        )
        text, chosen = str(file.parent), (file.stem,)
    assert text is not None
    calibration = run(
        model,
        text=text,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        domains=chosen,
        on=on,
        device=device,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
    )
    written_file = None if generate is None else str(file)
    if json:
        print_json(calibration.to_json() | {"written": written_file})
        return
    _print(calibration)
    if written_file is not None:
        print_text(f"text written to {written_file}; use it with --text {generate}")
    else:
        mix = f" --domains {calibration.domains}" if len(calibration.sources) > 1 else ""
        print_text(f"use it with --text {text}{mix}{'' if on == 'all' else f' --on {on}'}")


def _print(calibration: "Calibration") -> None:
    print_table(
        ("source", "tokens", "perplexity", "4-grams repeated", "different pairs", "entropy (nats)", "share of mix"),
        [
            (
                source.domain,
                f"{source.tokens:,}",
                number(source.perplexity, 2),
                percent(source.aggregation),
                percent(source.diversity),
                number(source.entropy, 2),
                percent(calibration.weights.get(source.domain)),
            )
            for source in calibration.sources
        ],
    )
    print_text()
    for domain, reason in calibration.dropped.items():
        print_text(f"{domain} is left out: {reason}")
