"""Find the MoE blocks of a checkpoint from names and shapes alone: no torch, no transformers, no table of families.

Inside a decoder layer (the first all-digit component of a name is the layer's number) the experts are either tensors
under ``<parent>.0 ... <parent>.E-1`` (one tensor an expert), or fused tensors whose first axis is E. E is an integer
that config.json itself calls a number of experts. The block is the nearest module above the experts that also holds a
router: a tensor with an axis of E, outside experts, shared experts, attention and norms.

Legend: E experts, D model width, F expert width. All names here are names on disk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint
from coterie.model.disk.tensors import TensorInfo

DottedName = tuple[str, ...]  # a name or a path in config.json, split at its dots
Place = tuple[str, int, DottedName]  # stack of layers, number of the layer, the rest of the name
Member = tuple[DottedName, TensorInfo]  # a tensor of one layer, its name without stack and layer number

_IN_A_LAYER = re.compile(r"(.+?)\.([0-9]+)\.(.+)")
_NOT_A_COUNT = re.compile(r"per_|top_?k|shared|selected|size|layer|period|offset|freq|step|interval|group|capacity|dim")
_TOP_K_RANKS = (
    re.compile(r"expert.*per_tok|per_tok.*expert|top_?k.*expert|expert.*top_?k|selected.*expert|expert.*selected"),
    re.compile(r"(moe|router).*(top_?k|per_tok)|moe_k$"),
    re.compile(r"^top_?k$|per_tok"),
)
# Names that mean nothing else, whatever the model.
_SURELY_TOP_K = re.compile(
    r"experts_per_tok(en)?$|top_?k_experts$|experts_top_?k$|moe_top_?k$|moe_k$|selected_experts$"
)
_NOT_TOP_K = re.compile(r"group|norm|method|index|scal")
_ATTENTION = re.compile(r"attn|attention|mamba|conv|ssm")
_ROUTER = re.compile(r"router|(^|_)gate$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One MoE block on disk.

    Attributes:
        stack: name of the list of layers, for example ``model.layers``.
        layer: number of the decoder layer in that list.
        name: name of the block, for example ``model.layers.3.mlp``.
        num_experts: E, counted in the tensors.
        experts: tensors of the routed experts.
        first_expert: those of them that hold expert 0 (all of them when fused).
        fused: whether one tensor holds all experts.
        router: tensors with an axis of E, or a little longer where the router also scores what is no routed expert, and
            all that stands with them in a module called router or gate.
        router_axes: the axis of each of those along which the router knows the experts, by name; of others none.
        shared: all other tensors of the block.
    """

    stack: str
    layer: int
    name: str
    num_experts: int
    experts: tuple[TensorInfo, ...]
    first_expert: tuple[TensorInfo, ...]
    fused: bool
    router: tuple[TensorInfo, ...]
    router_axes: Mapping[str, int]
    shared: tuple[TensorInfo, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of the router that belong to one expert and go with it."""
        rows = [(info, self.router_axes[info.name]) for info in self.router if info.name in self.router_axes]
        return sum(info.num_bytes // info.shape[axis] for info, axis in rows)

    def number_place(self, name: str) -> int:
        """Return which component of a name of a single expert's tensor, between dots, is the number of the expert."""
        return _number_place(self.stack, name)


def integer_entries(config: Mapping[str, Any], path: DottedName = ()) -> Iterator[tuple[DottedName, int]]:
    """Yield every integer of a config with its path; of a list of integers, every distinct one."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from integer_entries(value, (*path, str(key)))
        elif isinstance(value, list):
            yield from (
                ((*path, str(key)), item) for item in dict.fromkeys(map(_as_integer, value)) if item is not None
            )
        elif (number := _as_integer(value)) is not None:
            yield (*path, str(key)), number


def _entries(config: Mapping[str, Any], path: DottedName = ()) -> Iterator[tuple[DottedName, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _as_integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def expert_counts(config: Mapping[str, Any]) -> dict[DottedName, int]:
    """Return the entries that config.json calls a number of experts, by path."""
    return {
        path: value
        for path, value in integer_entries(config)
        if "expert" in path[-1] and value > 0 and not _NOT_A_COUNT.search(path[-1])
    }


def spare_rows(config: Mapping[str, Any]) -> set[int]:
    """Return how many rows a router may have beyond its experts: one for "no expert", or one a shared expert."""
    shared = {
        value
        for path, value in integer_entries(config)
        if "expert" in path[-1] and "shared" in path[-1] and not re.search(r"size|dim", path[-1])
    }
    return {1} | {value for value in shared if value > 0}


def nearest_entry(config: Mapping[str, Any], path: DottedName, accept: Callable[[str], bool]) -> int | None:
    """Return the integer nearest to `path` in the config whose key is accepted; None if there is none."""
    entries = [(entry, value) for entry, value in integer_entries(config) if accept(entry[-1])]
    if not entries:
        return None
    return min(entries, key=lambda entry: _distance(entry[0][:-1], path[:-1]))[1]


def _distance(a: DottedName, b: DottedName) -> int:
    return len(a) + len(b) - 2 * len(_common_prefix([a, b]))


def chosen_experts(config: Mapping[str, Any], path: DottedName, num_experts: int) -> int:
    """Return how many experts a token chooses, from the config entry that says so nearest to `path`.

    Raises:
        ArchitectureMismatch: no entry says it, or several disagree.
    """
    entries = [(entry, value) for entry, value in integer_entries(config) if not _NOT_TOP_K.search(entry[-1])]
    for rank in _TOP_K_RANKS:
        candidates = [
            (entry, value) for entry, value in entries if rank.search(entry[-1]) and 1 <= value <= num_experts
        ]
        if not candidates:
            continue
        nearest = min(_distance(entry[:-1], path[:-1]) for entry, _ in candidates)
        candidates = [(entry, value) for entry, value in candidates if _distance(entry[:-1], path[:-1]) == nearest]
        if len({value for _, value in candidates}) > 1:
            named = ", ".join(f"{'.'.join(entry)} = {value}" for entry, value in candidates)
            raise ArchitectureMismatch(f"config.json says several numbers of experts a token chooses: {named}")
        return candidates[0][1]
    raise ArchitectureMismatch(
        f"config.json does not say how many of the {num_experts} experts a token chooses; "
        "expected an entry like num_experts_per_tok or moe_topk"
    )


def check_chosen(config: Mapping[str, Any], where: str) -> None:
    """Check what config.json says of the number of experts that a token chooses, before any model is built from it.

    Raises:
        CorruptCheckpoint: it is no number of experts that can be chosen.
    """
    most = max(expert_counts(config).values(), default=0)
    for path, value in _entries(config):
        if value is None or not most or not _SURELY_TOP_K.search(path[-1]):
            continue
        values = value if isinstance(value, list) else [value]
        wrong = next((each for each in values if type(each) is not int or not 1 <= each <= most), None)
        if wrong is not None:
            raise CorruptCheckpoint(
                f"{where}: config.json says {'.'.join(path)} = {wrong!r}, but a token can choose 1 to {most} experts; "
                "fetch config.json again, or mend it in a copy of the folder"
            )


def split_name(name: str) -> Place | None:
    """Split a name into its stack of layers, the layer's number and the rest; None for a tensor outside all layers."""
    match = _IN_A_LAYER.match(name)
    return None if match is None else (match[1], int(match[2]), tuple(match[3].split(".")))


def find_blocks(
    tensors: Mapping[str, TensorInfo],
    places: Mapping[str, Place | None],
    counts: Mapping[DottedName, int],
    extents: Sequence[int] = (),
    spare: Iterable[int] = (),
) -> list[Block]:
    """Find all MoE blocks, in the order of stacks and layers.

    Args:
        tensors: the tensors of a checkpoint by name.
        places: where they are, by name, see `split_name`.
        counts: what config.json says, see `expert_counts`.
        extents: further numbers of experts that the tensors may hold (fewer experts than router rows).
        spare: rows that a router may have beyond its experts, see `spare_rows`.

    Raises:
        CorruptCheckpoint: experts are missing in a layer.
        ArchitectureMismatch: the tensors hold a number of experts that config.json does not name.
    """
    layers: dict[tuple[str, int], list[Member]] = defaultdict(list)
    for name, place in places.items():
        if place is not None:
            layers[place[:2]].append((place[2], tensors[name]))
    blocks = []
    for (stack, layer), members in sorted(layers.items()):
        block = _find_block(stack, layer, members, counts, extents, spare)
        if block is not None:
            blocks.append(block)
    return blocks


def _find_block(
    stack: str,
    layer: int,
    members: list[Member],
    counts: Mapping[DottedName, int],
    extents: Sequence[int],
    spare: Iterable[int],
) -> Block | None:
    where = f"{stack}.{layer}"
    allowed = {*counts.values(), *extents}
    arrangement = _separate_experts(where, members, allowed, counts) or _fused_experts(where, members, allowed, counts)
    if arrangement is None:
        return None
    num_experts, modules, fused = arrangement
    experts: list[Member] = []
    others: list[Member] = []
    for rest, info in members:
        (experts if _is_expert(rest, modules, fused) else others).append((rest, info))
    if fused:
        first = experts
    else:
        first = [
            (rest, info)
            for rest, info in experts
            if next(component for component in rest if component.isdecimal()) == "0"
        ]
        check_experts(((info.name, _number_place(stack, info.name)) for _, info in experts), num_experts)
    rows = _router_rows(num_experts, counts)
    prefix, router = _find_router(others, modules, rows, spare)
    scored = {info.name: (info, _router_axis(rest, info, rows, spare)) for rest, info in router}
    routed = {info.name for _, info in router}
    shared = [
        info
        for rest, info in others
        if info.name not in routed and ((prefix and rest[: len(prefix)] == prefix) or _is_shared(rest))
    ]
    return Block(
        stack=stack,
        layer=layer,
        name=".".join((where, *prefix)),
        num_experts=num_experts,
        experts=tuple(info for _, info in experts),
        first_expert=tuple(info for _, info in first),
        fused=fused,
        router=tuple(info for _, info in router),
        router_axes={name: info.shape.index(extent) for name, (info, extent) in scored.items() if extent is not None},
        shared=tuple(shared),
    )


def _number_place(stack: str, name: str) -> int:
    depth = len(stack.split(".")) + 1  # the stack and the number of the layer
    return next(place for place, component in enumerate(name.split(".")) if place >= depth and component.isdecimal())


def check_experts(placed: Iterable[tuple[str, int]], num_experts: int) -> None:
    """Check that all experts of a layer are there, each with the matrices and biases that the others have.

    Args:
        placed: names of their tensors, each with the component between dots that is the number of the expert.
        num_experts: E.

    Raises:
        CorruptCheckpoint: something is missing; names the expert.
    """
    parents: dict[DottedName, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, place in placed:
        components = name.split(".")
        rest = components[place + 1 :]
        # Storage formats give a matrix several tensors, and may give them to some experts only.
        owner = rest if len(rest) == 1 or rest[-1] == "bias" else rest[:-1]
        parents[tuple(components[:place])][int(components[place])].add(".".join(owner))
    for parent, experts in parents.items():
        where = ".".join(parent)
        absent = sorted(set(range(num_experts)) - experts.keys())
        if absent:
            raise CorruptCheckpoint(
                f"{where} holds {len(experts)} of the {num_experts} experts; expert {absent[0]} is missing: fetch the "
                "checkpoint again"
            )
        every = set().union(*experts.values())
        for expert, owners in sorted(experts.items()):
            if owners < every:
                raise CorruptCheckpoint(
                    f"{where}.{expert} has no {min(every - owners)}, which other experts beside it have: fetch the "
                    "checkpoint again"
                )


def _separate_experts(
    where: str, members: list[Member], allowed: set[int], counts: Mapping[DottedName, int]
) -> tuple[int, set[DottedName], bool] | None:
    """Find parents whose children are numbered 0..E-1; return E, the parents, and False for not fused."""
    groups: dict[DottedName, set[int]] = defaultdict(set)
    weight: dict[DottedName, int] = defaultdict(int)
    for rest, info in members:
        at = next((position for position, component in enumerate(rest) if component.isdecimal()), None)
        if at and not _is_shared(rest[:at]):
            groups[rest[:at]].add(int(rest[at]))
            weight[rest[:at]] += info.num_bytes
    named = {parent for parent in groups if "expert" in parent[-1]}
    for parent in sorted(named):
        indices = groups[parent]
        missing = sorted(set(range(max(indices) + 1)) - indices)
        if missing:
            raise CorruptCheckpoint(
                f"{where}.{'.'.join(parent)} holds {len(indices)} of the experts 0 to {max(indices)}; "
                f"expert {missing[0]} is missing: fetch the checkpoint again"
            )
        if allowed and len(indices) not in allowed:
            raise _mismatch(f"{where}.{'.'.join(parent)}", len(indices), counts)
    if named:
        extents = {len(groups[parent]) for parent in named}
        if len(extents) > 1:
            raise ArchitectureMismatch(f"{where} holds experts of different number: {sorted(extents)}")
        return extents.pop(), named, False
    matching = [
        parent for parent, indices in groups.items() if indices == set(range(len(indices))) and len(indices) in allowed
    ]
    # A list that is not called experts (heads, branches) counts only if a router stands beside it.
    for parent in sorted(matching, key=lambda parent: -weight[parent]):
        outside = [(rest, info) for rest, info in members if rest[: len(parent)] != parent]
        if _find_router(outside, {parent}, _router_rows(len(groups[parent]), counts))[1]:
            return len(groups[parent]), {parent}, False
    return None


def _fused_experts(
    where: str, members: list[Member], allowed: set[int], counts: Mapping[DottedName, int]
) -> tuple[int, set[DottedName], bool] | None:
    """Find modules whose tensors have E as their first of three axes or more; return E, the modules, and True."""
    # An axis of length 1 is the mark of a depthwise convolution, not of a matrix an expert.
    stacked = [
        (rest, info)
        for rest, info in members
        if len(info.shape) >= 3 and min(info.shape[1:]) > 1 and not _is_shared(rest) and not _ATTENTION.search(rest[0])
    ]
    named = [(rest, info) for rest, info in stacked if any("expert" in component for component in rest)]
    seeds = [(rest, info) for rest, info in named or stacked if not allowed or info.shape[0] in allowed]
    if not seeds:
        if named and allowed:
            raise _mismatch(named[0][1].name, named[0][1].shape[0], counts)
        return None
    extents = {info.shape[0] for _, info in seeds}
    if len(extents) > 1:
        listed = ", ".join(f"{info.name} {list(info.shape)}" for _, info in seeds[:4])
        raise ArchitectureMismatch(f"{where} holds stacked tensors of several numbers of experts: {listed}")
    num_experts = extents.pop()
    modules = {rest[:-1] for rest, _ in seeds}
    outside = [(rest, info) for rest, info in members if not _is_expert(rest, modules, True)]
    if not named and not _find_router(outside, modules, _router_rows(num_experts, counts))[1]:
        return None
    return num_experts, modules, True


def _find_router(
    others: list[Member], modules: set[DottedName], rows: set[int], spare: Iterable[int] = ()
) -> tuple[DottedName, list[Member]]:
    """Climb from the experts towards the layer until a tensor with an axis of E appears; return where, and which."""
    start = _common_prefix(list(modules))
    candidates = [
        (rest, info)
        for rest, info in others
        if _router_axis(rest, info, rows, spare) and not _is_shared(rest) and not _is_attention_or_norm(rest)
    ]
    for depth in range(len(start), -1, -1):
        prefix = start[:depth]
        below = [(rest, info) for rest, info in candidates if rest[:depth] == prefix]
        # The scores come from a matrix; vectors of length E (balancing biases) do not say where the block ends.
        matrices = [(rest, info) for rest, info in below if sum(extent > 1 for extent in info.shape) > 1]
        named = [(rest, info) for rest, info in matrices if _is_named_router(rest[depth:])]
        if not named and not (matrices and depth):
            continue
        modules_of = {rest[: depth + 1] for rest, _ in named or matrices}
        router = [(rest, info) for rest, info in others if rest[: depth + 1] in modules_of and not _is_shared(rest)]
        vectors = [(rest, info) for rest, info in candidates if sum(extent > 1 for extent in info.shape) == 1]
        router += [
            (rest, info) for rest, info in vectors if (depth and rest[:depth] == prefix) or _is_named_router(rest)
        ]
        return prefix, list({info.name: (rest, info) for rest, info in router}.values())
    return start[:-1] if modules == {start} else start, []


def _router_axis(rest: DottedName, info: TensorInfo, rows: set[int], spare: Iterable[int]) -> int | None:
    """Return the length of the axis along which a tensor knows the experts, None if it has none."""
    # A little more than E counts only in what is called a router.
    more = {extent + extra for extent in rows for extra in spare} if _is_named_router(rest) else set()
    exact = [extent for extent in info.shape if extent in rows]
    return next(iter(exact or [extent for extent in info.shape if extent in more]), None)


def _is_named_router(rest: DottedName) -> bool:
    return any(_ROUTER.search(component) for component in rest)


def _router_rows(num_experts: int, counts: Mapping[DottedName, int]) -> set[int]:
    """Return the lengths that a router's axis can have; a mapped checkpoint has more rows than experts."""
    return {num_experts} if num_experts in counts.values() or not counts else set(counts.values())


def _common_prefix(paths: Sequence[DottedName]) -> DottedName:
    shortest = min(paths, key=len)
    for position, component in enumerate(shortest):
        if any(path[position] != component for path in paths):
            return shortest[:position]
    return shortest


def _is_expert(rest: DottedName, modules: set[DottedName], fused: bool) -> bool:
    # What stands beside numbered experts, such as a balancing bias, belongs to the router.
    return any(rest[:depth] in modules and (fused or rest[depth].isdecimal()) for depth in range(1, len(rest)))


def _is_shared(rest: DottedName) -> bool:
    return any(component.startswith("shared") for component in rest)


def _is_attention_or_norm(rest: DottedName) -> bool:
    return bool(_ATTENTION.search(rest[0])) or any("norm" in component for component in rest)


def _mismatch(name: str, extent: int, counts: Mapping[DottedName, int]) -> ArchitectureMismatch:
    counted = ", ".join(f"{'.'.join(path)} = {value}" for path, value in counts.items())
    return ArchitectureMismatch(
        f"{name} holds {extent} experts, but config.json says {counted}; config and weights are not of one model"
    )
