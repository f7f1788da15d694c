"""How the ways to meet a budget are printed, by ``coterie inspect`` and ``coterie plan``."""

from typing import TYPE_CHECKING

from coterie.cli.output import percent, print_table, print_text

if TYPE_CHECKING:
    from coterie.compress.way import Ways

#: What the costs are known by.
_BASES = {
    "prices": "KL, nats a token: what the prices of this model predict, before training.",
    "bundled": (
        "KL, nats a token: on the bundled models in as many bytes (benchmarks/bits.md, methods.md); one type as "
        "llama.cpp's own quantiser has it. What it is on this model, `coterie price` and `coterie plan --prices` say."
    ),
    "both": (
        "KL, nats a token: of all experts what the prices of this model predict, before training; of fewer experts (~) "
        "what it was on the bundled model (benchmarks/methods.md)."
    ),
}


def print_ways(listed: "Ways") -> None:
    """Print the ways to meet a budget, and which is best."""
    from coterie.amounts import format_bytes

    if listed.memory is not None:
        print_text(listed.memory.sentence())
        print_text()
    bases = {way.expected.basis for way in listed.ways if way.expected is not None}
    if listed.ways:
        rows = []
        for way in listed.ways:
            mark = "~ " if len(bases) > 1 and way.expected is not None and way.expected.basis == "bundled" else ""
            rows.append(
                (
                    way.name,
                    format_bytes(way.num_bytes),
                    percent(way.num_bytes / listed.original_bytes),
                    str(way.experts),
                    f"{way.bits:.2f}",
                    "-" if way.expected is None else f"{mark}{way.expected}",
                )
            )
        print_table((f"ways into {format_bytes(listed.limit)}", "bytes", "share", "experts", "bits", "KL"), rows)
        print_text()
    print_text(listed.verdict())
    if bases and any(way.options for way in listed.ways):
        print_text(_BASES["both" if len(bases) > 1 else bases.pop()])
