"""The matrices of a model that can be stored in fewer bits, and what they take in which type. No torch here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.plan import Plan
from coterie.errors import Infeasible
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.encodings.block_types import SIZES, bits_of
from coterie.model.disk.encodings.ggml import GRAIN, OWN_TYPES, WRAPPED, rows_together, unwrapped
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.integer_types import INTEGERS, integer_encoding
from coterie.model.disk.encodings.packed_integers import PackedIntegers
from coterie.model.disk.encodings.plane_types import PLANES, planes_fitting
from coterie.model.disk.encodings.shared_base import SharedBase, SharedBaseType

#: How a matrix that has a type is stored.
WeightEncoding = BitPlanes | GgmlBlocks | PackedIntegers | SharedBase

#: Steps on the whole result that leave codes as they are.
BLOCK_STEPS = ("distill-blocks",)

#: The types that are priced. Left to who names them: IQ3_S, IQ2_S and IQ2_XS, whose codes take longest to choose; TQ2_0
#: and TQ1_0, which cost more than IQ2_XXS and IQ1_S and are no smaller; and what no GGUF file can hold.
PRICED_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q4_0", "Q5_0",
    "IQ4_NL",
)  # fmt: skip

#: The least that a head gets where all matrices are to have one type.
HEAD = "Q6_K"

#: What stands in for a type whose blocks are wider than a row, as in llama.cpp: about as many bits, blocks of 32.
_NARROW = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "IQ4_XS": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "Q2_K": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_XXS": "IQ4_NL",
    "TQ2_0": "IQ4_NL", "IQ1_M": "IQ4_NL", "TQ1_0": "IQ4_NL", "IQ1_S": "IQ4_NL",
    "TURBO4": "IQ4_NL", "TURBO3": "IQ4_NL", "TURBO2": "IQ4_NL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One matrix, or those of all experts of a layer that are alike.

    Attributes:
        pattern: its name on disk; with a star for the expert's number where each expert has one.
        names: the names on disk that are meant.
        shape: of one of them.
        axis: the axis that is summed over, -1 or -2.
        layer: index of the MoE layer whose experts it is of, or None.
        kind: "expert", "linear" or "embedding".
        plain_bytes: what all of them take as plain numbers.
        head: what logits are computed with; of a tied model its embedding.
        expert: the number of the expert whose it alone is; None for those of all experts of a layer, and for any other.
        can_wrap: whether its blocks can run on from row to row: not where rows take turns with those of another matrix.
        wraps: whether they do where a row is no whole blocks, and not a type with smaller blocks stands in.
        width_axis: the axis that the expert's width runs along, -1 or -2; None where experts have no tensors of their
            own, and of any other matrix.
        widths: hidden neurons of the expert of each name, where these are to have widths of their own; `shape` is that
            of the full width then, `by_width` has the shapes that are stored.
    """

    pattern: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    layer: int | None
    kind: str
    plain_bytes: int
    head: bool = False
    expert: int | None = None
    can_wrap: bool = False
    wraps: bool = False
    width_axis: int | None = None
    widths: tuple[int, ...] | None = None

    @property
    def columns(self) -> int:
        """Numbers of a row, which are summed over."""
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        """Numbers of a column: outputs."""
        return self.shape[-3 - self.axis]

    @property
    def num_matrices(self) -> int:
        """How many matrices they are: one for each name, or those of a stack."""
        return self.shape[0] if len(self.shape) == 3 else len(self.names)

    @property
    def num_elements(self) -> int:
        """Numbers in all of them."""
        return sum(len(each.names) * math.prod(each.shape) for each in self.by_width())

    @property
    def takes_integers(self) -> bool:
        """Whether compressed-tensors stores it: the weight of a linear module by itself, and no head."""
        alone = len(self.shape) == 2 and self.axis == -1 and self.pattern.endswith(".weight")
        return alone and self.kind in ("expert", "linear") and not self.head

    def fitting(self, kind: str) -> str | None:
        """Return a type, or what stands in for it where its blocks are wider than a row; None where nothing fits."""
        if kind in INTEGERS:
            return kind if self.takes_integers and self.columns % SIZES[kind][0] == 0 else None
        if kind in PLANES:
            return planes_fitting(kind, self.columns)
        if self.columns % SIZES[kind][0] == 0:
            return kind
        if self.wraps and self.holds(kind + WRAPPED):
            return kind + WRAPPED
        return _NARROW.get(kind) if self.columns % 32 == 0 else None

    def fittings(self, kind: str) -> tuple[str, ...]:
        """Return what `fitting` returns where every row has blocks of its own, and where they may run on."""
        both = (replace(self, wraps=False).fitting(kind), self.fitting(kind))
        return tuple(dict.fromkeys(each for each in both if each is not None))

    def by_width(self) -> tuple[Weight, ...]:
        """Return those of each width, narrow first, in the shape that is stored; itself where none are given."""
        if self.widths is None:
            return (self,)
        assert self.width_axis is not None
        names: dict[int, list[str]] = {}
        for name, width in zip(self.names, self.widths, strict=True):
            names.setdefault(width, []).append(name)
        each = []
        for width in sorted(names):
            shape = list(self.shape)
            shape[self.width_axis] = width
            each.append(replace(self.only(names[width]), shape=tuple(shape), widths=None))
        return tuple(each)

    def holds(self, kind: str) -> bool:
        """Tell whether it can be stored in a type as that is."""
        if (shared := SharedBaseType.parse(kind)) is not None:
            return self.can_share and shared.fits(self.rows, self.columns)
        if self.widths is not None:
            return all(each.holds(kind) for each in self.by_width())
        if not kind.endswith(WRAPPED):
            return self.columns % SIZES[kind][0] == 0
        if unwrapped(kind) in (*OWN_TYPES, *PLANES):  # whose blocks lie within a row
            return False
        if not self.columns:  # of an expert without neurons
            return self.can_wrap
        return self.can_wrap and self.columns % GRAIN == 0 and self.rows % rows_together(kind, self.columns) == 0

    @property
    def can_share(self) -> bool:
        """Whether they are those of all experts of a layer, which can have a base in common."""
        alone, stacked = len(self.shape) == 2 and self._place is not None, len(self.shape) == 3
        return self.kind == "expert" and self.widths is None and (alone or stacked)

    def encoding(self, kind: str) -> WeightEncoding:
        """Return the encoding of one of them in a type; of those of one width, where they have several."""
        assert self.widths is None
        if (shared := SharedBaseType.parse(kind)) is not None:
            return shared.encoding(self.columns, self.axis)
        if kind in INTEGERS:
            return integer_encoding(kind)
        if kind in PLANES:
            bits, group = PLANES[kind]
            return BitPlanes(bits=bits, group=group, axis=self.axis, dtype="F32")
        columns = self.columns if kind.endswith(WRAPPED) and self.columns else None
        return GgmlBlocks(type=unwrapped(kind), axis=self.axis, dtype="F32", columns=columns)

    def num_bytes(self, kind: str) -> int:
        """Return the bytes of all of them in a type; a base that they share is there once."""
        if SharedBaseType.parse(kind) is not None:
            encoding = self.encoding(kind)
            assert isinstance(encoding, SharedBase)
            again = (len(self.names) - 1) * encoding.base_bytes(self.shape)
            return len(self.names) * encoding.num_bytes(self.shape) - again
        return sum(len(each.names) * each.encoding(kind).num_bytes(each.shape) for each in self.by_width())

    def only(self, names: Sequence[str]) -> Weight:
        """Return those of some of its names."""
        if self.widths is None:
            return replace(self, names=tuple(names), plain_bytes=self.plain_bytes // len(self.names) * len(names))
        width_of = dict(zip(self.names, self.widths, strict=True))
        widths = tuple(width_of[name] for name in names)
        plain_bytes = self.plain_bytes * sum(widths) // max(sum(self.widths), 1)
        return replace(self, names=tuple(names), plain_bytes=plain_bytes, widths=widths)

    def at_widths(self, widths: Sequence[int]) -> Weight:
        """Return the matrices of experts that have these widths, by the number of the expert."""
        assert self.width_axis is not None
        own = tuple(widths[expert] for expert in self.experts)
        each = self.plain_bytes // len(self.names) // self.shape[self.width_axis]
        return replace(self, widths=own, plain_bytes=each * sum(own))

    @property
    def experts(self) -> tuple[int, ...]:
        """The number of the expert of each name, where experts have tensors of their own."""
        if self.expert is not None:
            return (self.expert,)
        place = self._place
        return () if place is None else tuple(int(name.split(".")[place]) for name in self.names)

    @property
    def _place(self) -> int | None:
        return next((place for place, each in enumerate(self.pattern.split(".")) if each == "*"), None)

    def apart(self) -> tuple[Weight, ...]:
        """Return the matrices of each expert, by their own names; itself where they are stored as one tensor."""
        if self._place is None:
            return (self,)
        return tuple(
            replace(self.only((name,)), pattern=name, expert=expert)
            for name, expert in zip(self.names, self.experts, strict=True)
        )


def typed(weights: Iterable[Weight], types: Container[str]) -> list[Weight]:
    """Return the matrices that are given types, each with the pattern that it is given one by.

    One that is named itself has its own, the others of its layer have that of the pattern with a star, if any.
    """
    chosen: list[Weight] = []
    for weight in weights:
        singled = {name for name in weight.names if name in types} - {weight.pattern}
        if singled:
            chosen += [each for each in weight.apart() if each.pattern in singled]
        if weight.pattern in types and (names := [name for name in weight.names if name not in singled]):
            chosen.append(weight.only(names))
    return chosen


def by_type(weights: Iterable[Weight], types: Mapping[str, str]) -> list[tuple[Weight, str]]:
    """Return the matrices that are given types, those of a pattern that have one type together, and that type."""
    grouped: list[tuple[Weight, str]] = []
    for weight in weights:
        names: dict[str, list[str]] = {}
        for each in typed([weight], types):
            names.setdefault(types[each.pattern], []).extend(each.names)
        grouped += [(weight.only(names[kind]), kind) for kind in sorted(names)]
    return grouped


def gathered(weights: Iterable[Weight], types: Mapping[str, str]) -> dict[str, str]:
    """Return types in which a star stands for the experts of a layer whose type is the most common there.

    Args:
        weights: the matrices, by pattern.
        types: of all experts of a layer by name, or by pattern.
    """
    shorter = dict(types)
    for weight in weights:
        if weight.pattern in types or any(name not in types for name in weight.names):
            continue
        common = Counter(types[name] for name in weight.names).most_common(1)[0][0]
        shorter[weight.pattern] = common
        for name in weight.names:
            if types[name] == common:
                del shorter[name]
    return dict(sorted(shorter.items()))


def at_widths(weights: Iterable[Weight], layers: Sequence[LayerPlan]) -> list[Weight]:
    """Return matrices as narrow as the plans of layers make their experts; those of other layers stay as they are."""
    narrowed: list[Weight] = []
    for weight in weights:
        widths = None if weight.layer is None else layers[weight.layer].widths
        narrowed.append(weight if widths is None or weight.width_axis is None else weight.at_widths(widths))
    return narrowed


def planned(weights: Iterable[Weight], plan: Plan) -> list[Weight]:
    """Return the matrices that a plan gives types, see `typed`, as narrow as it makes their experts."""
    return typed(at_widths(weights, plan.layers), plan.types)


def one_type(weights: Iterable[Weight], name: str) -> dict[str, str]:
    """Return the type of each matrix where all are to have one, by pattern; one whose rows are no blocks has none.

    A head gets `HEAD` at least, and so does an embedding that is the head as well, as in llama.cpp.
    """
    types = {}
    for weight in weights:
        least = HEAD if weight.head and bits_of(name) < bits_of(HEAD) else name
        if (kind := weight.fitting(least)) is not None:
            types[weight.pattern] = kind
    return types


def read_by(target: str, weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return matrices for who is to read the result, see `coterie.compress.target.Target.reader`."""
    return tuple(replace(weight, wraps=weight.can_wrap and target == "packed") for weight in weights)


def smallest_types(weights: Iterable[Weight]) -> dict[str, str]:
    """Return the smallest priced type that each matrix can have, by pattern."""
    types = {}
    for weight in weights:
        fitting = [kind for wanted in PRICED_TYPES if (kind := weight.fitting(wanted)) is not None]
        if fitting:
            types[weight.pattern] = min(fitting, key=weight.num_bytes)
    return types


def weights_among(weights: Iterable[Weight], names: Collection[str]) -> list[Weight]:
    """Return the matrices all of whose tensors are among those of some names on disk, such as a unit's."""
    among = set(names)
    return [weight for weight in weights if among.issuperset(weight.names)]


def check_types(weights: Sequence[Weight], plan: Plan, counts: Sequence[int]) -> None:
    """Check the types that a plan gives to weights.

    Args:
        weights: the matrices that there are, as narrow as the plan makes them.
        plan: what gives them types.
        counts: experts of each MoE layer of the original.

    Raises:
        Infeasible: a name that no matrix has, a type whose blocks are wider than a row, or experts that do not stay as
            they are; says what can be.
    """
    by_pattern = {weight.pattern: weight for weight in weights}
    by_type = {weight.pattern: weight for weight in typed(weights, plan.types)}
    if plan.quantiser is None:
        raise Infeasible("the plan gives types to weights, and names no quantiser that chooses their codes")
    changed = [
        number
        for number, (layer, count) in enumerate(zip(plan.layers, counts, strict=False))
        if layer.num_experts != count
        or (layer.width, layer.top_k) != (None, None)
        or (layer.experts is not None and layer.widths is None)
    ]
    steps = [name for name, _ in plan.result_steps if name not in BLOCK_STEPS]
    if plan.mapped or plan.passes or steps or changed:
        what = f"layer {changed[0]} changes its experts" if changed else "the plan has a router form, passes or steps"
        raise Infeasible(
            f"{what}; weights in fewer bits go with experts that stay as they are: leave the passes of the plan empty, "
            f"its result_steps too, or {' and '.join(BLOCK_STEPS)} alone, its router plain and its layers whole (each "
            "expert may have a width of its own)"
        )
    for pattern, kind in plan.types.items():
        weight = by_type.get(pattern)
        if weight is None and pattern in by_pattern:
            raise Infeasible(
                f"the plan stores {pattern} as {kind}, and names every expert of that layer itself: leave it out"
            )
        if weight is None:
            raise Infeasible(
                f"the plan stores {pattern} as {kind}; matrices that can be stored so are named like "
                f"{', '.join(sorted(by_pattern)[:3])}"
            )
        if SharedBaseType.parse(kind) is not None:
            _check_shares(weight, by_pattern, kind, plan)
            continue
        if unwrapped(kind) not in SIZES or (kind.endswith(WRAPPED) and unwrapped(kind) in (*INTEGERS, *PLANES)):
            raise Infeasible(f"the plan stores {pattern} as {kind}; types that can be written are {', '.join(SIZES)}")
        _check_fits(weight, kind)
        if kind in PLANES and plan.result_steps:
            raise Infeasible(
                f"the plan stores {pattern} as {kind}, in planes of bits, and {plan.result_steps[0][0]} trains scales "
                "of blocks: leave it out"
            )


def _check_shares(weight: Weight, by_pattern: Mapping[str, Weight], kind: str, plan: Plan) -> None:
    """Raise Infeasible where matrices cannot have a base in common and factors of that rank."""
    said = f"the plan stores {weight.pattern} as {kind}, a base and factors"
    if plan.result_steps:
        raise Infeasible(f"{said}, and {plan.result_steps[0][0]} trains scales of single matrices: leave it out")
    if weight.pattern not in by_pattern or len(weight.names) < len(by_pattern[weight.pattern].names):
        raise Infeasible(f"{said}, which all experts of a layer have together: name none of them by itself")
    if not weight.can_share:
        raise Infeasible(
            f"{said}; that is for experts of one width that have a matrix each, or lie in one tensor of three axes: "
            f"take a type such as {weight.fitting('Q4_K') or 'Q8_0'}"
        )
    if not weight.holds(kind):
        raise Infeasible(
            f"{said}; its matrices have {weight.rows} rows of {weight.columns} numbers: take a rank from 1 to "
            f"{min(weight.rows, weight.columns)}, blocks that divide the {weight.columns} for the base, blocks that "
            "divide both for the factors, or BF16"
        )


def _check_fits(weight: Weight, kind: str) -> None:
    """Raise Infeasible where a matrix cannot be stored in a type, or not at a width that one of its experts has."""
    narrow = next((each for each in weight.by_width() if not each.holds(kind)), None)
    if narrow is None:
        return
    pattern = weight.pattern if weight.widths is None else narrow.names[0]
    if kind.endswith(WRAPPED):
        if not narrow.can_wrap:
            why = "its rows take turns with those of another matrix in one tensor"
        elif unwrapped(kind) in OWN_TYPES:
            why = f"blocks of {unwrapped(kind)} are coded as a whole, each within one row"
        else:
            why = (
                f"that takes rows of a multiple of {GRAIN} numbers, and as many of them as are whole blocks of "
                f"{SIZES[unwrapped(kind)][0]}; it has {narrow.rows} of {narrow.columns}"
            )
        raise Infeasible(f"the plan stores {pattern} as {kind}, in blocks that run on from row to row; {why}")
    near = replace(narrow, wraps=narrow.wraps or weight.widths is not None).fitting(kind)
    otherwise = "" if weight.widths is None else f", or an expert whose width is a multiple of {SIZES[kind][0]}"
    raise Infeasible(
        f"the plan stores {pattern} as {kind}, in blocks of {SIZES[kind][0]}; its rows have {narrow.columns} "
        f"numbers: {f'take {near}' if near else 'leave it out'}{otherwise}"
    )


def bytes_saved(weights: Sequence[Weight], types: Mapping[str, str]) -> int:
    """Return how many bytes fewer the matrices take in the types that they are given, by pattern."""
    return sum(weight.plain_bytes - weight.num_bytes(types[weight.pattern]) for weight in typed(weights, types))


def encodings_of(weights: Iterable[Weight], plan: Plan) -> dict[str, WeightEncoding]:
    """Return the encoding of each pattern that a plan gives a type; by name where it hangs on an expert's width."""
    encodings: dict[str, WeightEncoding] = {}
    for weight in planned(weights, plan):
        kind = plan.types[weight.pattern]
        by_width = [(each, each.encoding(kind)) for each in weight.by_width()]
        if all(encoding == by_width[0][1] for _, encoding in by_width):
            encodings[weight.pattern] = by_width[0][1]
        else:
            encodings |= {name: encoding for each, encoding in by_width for name in each.names}
    return encodings
