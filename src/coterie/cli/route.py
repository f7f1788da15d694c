"""``coterie route``: how many experts a token gets."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_table, print_text


def route(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="FILE.json", help="Where the policy goes.")],
    experts_per_token: Annotated[
        float, typer.Option(help="Experts of a layer that are computed for a token, in the mean; 2.5, for example.")
    ],
    profile: Annotated[Path, typer.Option(metavar="PROFILE", help="What `coterie profile` measured of the model.")],
    rule: Annotated[
        Literal["threshold", "output", "share", "fewer"],
        typer.Option(
            help="What decides: an expert's weight, its weight times the size of its output, a share of the token's "
            "weight, or the same number for every token."
        ),
    ] = "threshold",
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Scale the weights that are left to the sum that they had.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Measure on this text how many experts each layer needs, in place of the same number in all, and "
            "what the policy costs.",
        ),
    ] = None,
    tokens: options.Tokens = 4096,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Decide how many experts a token gets.

    Writes a policy, which run, serve and evaluate take with --route. Less experts are read and computed for a token;
    the model stays as it is.
    """
    from coterie.route.run import route as run

    policy = run(
        model, out, experts_per_token=experts_per_token, profile=profile, rule=rule, renormalise=renormalise,
        text=text, tokens=tokens, seq_len=seq_len, seed=seed, device=device,
    )  # fmt: skip
    if json:
        print_json({"out": str(out), "experts_per_token": policy.experts_per_token, "origin": policy.origin,
                    "divergence": policy.divergence})  # fmt: skip
        return
    rows = []
    for number, (layer, chosen) in enumerate(zip(policy.rules, policy.top_k, strict=True)):
        told = f"at most {layer.most}" if layer.most is not None else f"share {layer.share:.3f}"
        rows.append((str(number), str(chosen), told if not layer.threshold else f"worth {layer.threshold:.4g} or more"))
    print_table(("layer", "chosen", "computed"), rows)
    print_text(f"{policy}; policy written to {out}")
