"""``coterie families``: the model families that Coterie knows to work, and those that it knows not to."""

from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli import options
from coterie.cli.complete import complete_family
from coterie.cli.output import print_json, print_table, print_text

if TYPE_CHECKING:
    from coterie.testing.facts import FamilyTable


def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FAMILY]...", help="Only these; all if none.", autocompletion=complete_family),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read them off the installed transformers anew, and say what differs.")
    ] = False,
    json: options.Json = False,
) -> None:
    """List the model families that are tested."""
    from coterie.testing.facts import FamilyTable, known_families

    shipped = known_families()
    table = FamilyTable(transformers=shipped.transformers, families=shipped.select(names or ()))
    differences: tuple[str, ...] = ()
    if check:
        from coterie.testing.describe import compare, describe_families

        table = describe_families(family.model_type for family in table.families)
        differences = compare(shipped, table)
    if json:
        print_json(table.content()["families"])
    else:
        _print(table)
    for sentence in differences:
        typer.echo(f"with transformers {table.transformers}: {sentence}", err=True)
    if differences:
        raise typer.Exit(1)


def _print(table: "FamilyTable") -> None:
    listed = table.families
    print_table(
        ("family", "class:", "MoE layers:", "token mixing:", "router:", "experts:", "status:"),
        [
            (
                family.model_type,
                family.model_class,
                f"{family.layers.count('moe')} of {len(family.layers)}" if family.layers else "-",
                ", ".join(family.token_mixing) or "-",
                ", ".join(family.router) or "-",
                ", ".join((*family.experts, *(("with shared",) if family.shared_experts else ()))) or "-",
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
    print_text(
        f"{works} of {len(listed)} families work with transformers {table.transformers}; a family that is not listed "
        "may work too: try it"
    )
