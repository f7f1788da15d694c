"""``coterie families``: the model families that Coterie knows to work, and those that it knows not to."""

from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_table, print_text


def families(
    names: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Only these; all if none.")] = None,
    json: options.Json = False,
) -> None:
    """List the model families that are tested."""
    import dataclasses

    from coterie.progress import track
    from coterie.testing.describe import describe_family
    from coterie.testing.families import TINY, check_known

    chosen = sorted(names or TINY)
    check_known(chosen)
    listed = [describe_family(name) for name in track(chosen, "reading families", total=len(chosen))]
    if json:
        print_json([dataclasses.asdict(family) for family in listed])
        return
    print_table(
        ("family", "class:", "MoE layers:", "token mixing:", "router:", "experts:", "shared:", "status:"),
        [
            (
                family.model_type,
                family.model_class,
                f"{family.layers.count('moe')} of {len(family.layers)}" if family.layers else "-",
                ", ".join(family.token_mixing) or "-",
                ", ".join(family.router) or "-",
                ", ".join(family.experts) or "-",
                "yes" if family.shared_experts else "-",
                "works" if family.problem is None else "does not work",
            )
            for family in listed
        ],
    )
    print_text()
    for family in listed:
        if family.problem is not None:
            print_text(f"{family.model_type} does not work: {family.problem}")
    works = sum(family.problem is None for family in listed)
    print_text(f"{works} of {len(listed)} families work; a family that is not listed may work too: try it")
