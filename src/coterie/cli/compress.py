"""``coterie compress``: write a smaller checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text
from coterie.cli.plan import print_plan


def compress(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result; must not exist.")],
    keep: options.Keep = None,
    experts: options.Experts = None,
    budget: options.Budget = None,
    recipe: options.Recipe = "mergemoe",
    router: options.Router = "plain",
    profile: Annotated[
        Path | None, typer.Option(help="Folder of a profile; one that holds none yet gets the profile made here.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Folder with calibration text; needed where there is no profile yet.")
    ] = None,
    tokens: options.Tokens = 131_072,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Write a smaller checkpoint.

    It is loaded again and compared with what was computed before it appears at OUT.
    """
    options.check_one_wish(keep, experts, budget)
    from coterie.compress.apply import compress as run

    made = run(
        model,
        out,
        keep=keep,
        experts=experts,
        budget=budget,
        recipe=recipe,
        router=router,
        profile=profile,
        text=text,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        device=device,
    )
    if json:
        print_json({"out": str(made.out), **made.manifest})
        return
    print_plan(made.plan)
    print_text(f"written to {made.out}; loaded again, its logits differ by {made.logits_error:.1e} of the largest")
    print_text(f"load it with {made.manifest['how_to_load'].replace('OUT', repr(str(made.out)))}")
