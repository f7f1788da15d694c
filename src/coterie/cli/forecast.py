"""How the forecast of a run is printed, by ``coterie inspect --run``."""

from typing import TYPE_CHECKING

from coterie.cli.output import number, percent, print_table, print_text

if TYPE_CHECKING:
    from coterie.run.forecast import Band, Forecast

#: Columns of what stands before a fact.
_LABEL = 17

#: From how much slower on it is said that other programs run besides.
_BUSY = 1.2


def print_forecast(said: "Forecast") -> None:
    """Print whether it fits, how fast it is about to be, and why."""
    from coterie.amounts import format_bytes

    smallest = f"{format_bytes(said.smallest)} is the smallest that works"
    if not said.fits:
        print_text(f"{said.model} does not fit into {format_bytes(said.memory)}: {smallest}")
        return
    print_text(f"{said.model} fits into {format_bytes(said.memory)}; {smallest}")
    print_text()
    print_table(
        (f"in {format_bytes(said.memory)}", "experts in memory", "hits", "read a token", "tokens a second", "expected"),
        [
            (
                each.name,
                f"{each.num_slots} of {each.most}",
                percent(each.hit_rate),
                format_bytes(each.token_bytes),
                _band(each.tokens_per_second),
                number(each.tokens_per_second.expected, 1),
            )
            for each in said.outlooks
        ],
    )
    print_text()
    for label, fact in _facts(said):
        print_text(f"{label:{_LABEL}}{fact}", indent=_LABEL)


def _facts(said: "Forecast") -> list[tuple[str, str]]:
    from coterie.amounts import format_bytes

    assert said.hits is not None
    assert said.disk is not None
    assert said.compute is not None
    assert said.seconds is not None
    assert said.first_token is not None
    hits, disk, compute = said.hits, said.disk, said.compute
    whose = "its own routing" if hits.is_own else f"the routing of {', '.join(hits.traces)}, at the same share"
    single = "" if hits.rate.low == hits.rate.high else f" ({percent(hits.rate.low)} to {percent(hits.rate.high)})"
    reading, experts, rest, at_once = (1000 * said.seconds[name] for name in ("reading", "experts", "rest", "at once"))
    parts = (
        f"{reading:.1f} ms for reading, {experts:.1f} for experts, {rest:.1f} for the rest; {at_once:.1f} of them at "
        "the same time"
    )
    way = "past the page cache" if disk.is_direct else "through the page cache"
    place = f"{disk.file_system}, which is memory and no disk" if disk.in_memory else disk.file_system or "disk"
    busy = f"; other programs make it {compute.load:.1f} times as slow" if compute.load > _BUSY else ""
    return [
        ("first token", f"{_band(said.first_token)} s, behind a prompt of {said.prompt_tokens} tokens"),
        ("a token takes", parts),
        ("hits", f"{percent(hits.rate.expected)}{single}, from {whose}"),
        ("beside that", f"lru {percent(hits.lru)}, with the future known {percent(hits.belady)} (belady)"),
        ("tokens alike", f"srp {hits.srp:.2f}, sch {hits.sch:.2f} (16 tokens, twice the active experts)"),
        (
            "disk",
            f"{disk.bytes_per_second / 1e9:.2f} GB/s, {1000 * disk.latency:.2f} ms for an expert of "
            f"{format_bytes(disk.record_bytes)} ({place}, {way})",
        ),
        (
            "memory",
            f"{compute.expert_bytes_per_second / 1e9:.2f} GB/s of experts, "
            f"{compute.dense_bytes_per_second / 1e9:.2f} GB/s of what every token passes{busy}",
        ),
    ]


def _band(band: "Band") -> str:
    digits = 1 if band.high < 100 else 0
    low, high = number(band.low, digits), number(band.high, digits)
    return low if low == high else f"{low} to {high}"
