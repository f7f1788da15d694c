"""Allocators of papers against all that could be chosen: what each says is least, in the bytes that it may take."""

import itertools
import math
import random
import statistics
from types import SimpleNamespace

import pytest

from coterie.compress.allocators import ALLOCATORS, alphaq, bitsmoe, edgemoe, mxmoe, pmq
from coterie.compress.allocators.expert_types import by_expert, by_matrix, code_bits
from coterie.compress.allocators.problem import Problem, load_allocator, load_meter
from coterie.compress.recipes import RECIPES
from coterie.compress.target import Target
from coterie.compress.weights import Weight, typed
from coterie.errors import Infeasible
from coterie.model.disk.encodings.ggml import SIZES

LAYERS, EXPERTS, ROWS, COLUMNS = 2, 3, 8, 256
ALL = {"alphaq": alphaq, "bitsmoe-bits": bitsmoe, "edgemoe": edgemoe, "mxmoe": mxmoe, "pmq": pmq}


def experts_of(layer, projection, *, stacked=False, columns=COLUMNS, experts=EXPERTS):
    names = [f"layers.{layer}.experts.{e}.{projection}.weight" for e in range(experts)]
    pattern, shape = f"layers.{layer}.experts.*.{projection}.weight", (ROWS, columns)
    if stacked:
        pattern = f"layers.{layer}.experts.{projection}"
        names, shape = [pattern], (experts, ROWS, columns)
    return Weight(
        pattern=pattern, names=tuple(names), shape=shape, axis=-1, layer=layer, kind="expert",
        plain_bytes=2 * experts * ROWS * columns,
    )  # fmt: skip


def other(name, kind="linear", *, head=False):
    return Weight(
        pattern=name, names=(name,), shape=(ROWS, COLUMNS), axis=-1, layer=None, kind=kind, head=head,
        plain_bytes=2 * ROWS * COLUMNS,
    )  # fmt: skip


REST = (other("attention.weight"), other("embedding.weight", "embedding"), other("head.weight", head=True))


def problem_of(weights, measured, **target):
    """Return a problem in which 1000 bytes are of no matrix."""
    layers = [SimpleNamespace(num_experts=EXPERTS) for _ in range(LAYERS)]
    total = 1000 + sum(weight.plain_bytes for weight in weights)
    return Problem(
        architecture=SimpleNamespace(layers=layers), sizing=SimpleNamespace(num_bytes=lambda layers: total),
        target=Target(**target), passes=(), find_weights=lambda: tuple(weights), damages=measured,
    )  # fmt: skip


def model(projections=("up", "down"), experts=EXPERTS):
    return [experts_of(layer, each, experts=experts) for layer in range(LAYERS) for each in projections] + list(REST)


def size_of(kind, count=ROWS * COLUMNS):
    block, size = SIZES[kind]
    return count // block * size


def kinds(problem, allocation):
    """Return the type of each matrix by its own name."""
    return {
        name: allocation.types[weight.pattern]
        for weight in typed(problem.weights, allocation.types)
        for name in weight.names
    }


def expert_kinds(problem, allocation, layer):
    """Return the types of the experts of a layer, whose projections must be alike."""
    named = kinds(problem, allocation)
    chosen = []
    for e in range(EXPERTS):
        own = {kind for name, kind in named.items() if name.startswith(f"layers.{layer}.experts.{e}.")}
        assert len(own) == 1
        chosen.append(own.pop())
    return tuple(chosen)


@pytest.mark.parametrize("bits", [1.6, 1.8, 2.5, 2.7, 3.1, 3.6, 4.3])
@pytest.mark.parametrize("seed", range(3))
def test_pmq_takes_the_least_of_all_choices_in_every_layer(bits, seed):
    drawn, types = random.Random(seed), pmq.TYPES.of(small=bits < 2.625)
    measured = {
        f"layers.{layer}.experts.{e}": {
            "usage": drawn.randrange(1, 90), "gate_mass": drawn.uniform(1, 30),
            **{kind: drawn.uniform(0.5, 1.5) * 2.0 ** -code_bits(kind) for kind in types},
        }
        for layer in range(LAYERS) for e in range(EXPERTS)
    }  # fmt: skip
    problem = problem_of(model(), measured, bits=bits)
    allocation = pmq.allocate(problem)
    for layer in range(LAYERS):
        values = [measured[f"layers.{layer}.experts.{e}"] for e in range(EXPERTS)]
        users, mass = sum(v["usage"] for v in values), sum(v["gate_mass"] for v in values)

        def loss(chosen, values=values, users=users, mass=mass):
            each = zip(values, chosen, strict=True)
            return math.fsum(v["usage"] / users * v["gate_mass"] / mass * v[kind] ** 2 for v, kind in each)

        within = [
            chosen
            for chosen in itertools.product(types, repeat=EXPERTS)
            if sum(2 * size_of(kind) for kind in chosen) <= bits / 8 * EXPERTS * 2 * ROWS * COLUMNS
        ]
        varied = [chosen for chosen in within if set(types[1:]) <= set(chosen)]
        best = min(varied or within, key=loss)
        assert expert_kinds(problem, allocation, layer) == best
        if bits in (2.5, 3.6, 4.3):  # one of each larger type fits
            assert varied
    assert allocation.damage is None


@pytest.mark.parametrize("bits", [1.6, 2.1, 2.7, 3.3, 4.1, 6.0])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("module", [bitsmoe, mxmoe])
def test_by_projection_the_least_of_all_choices_is_taken_in_every_layer(module, bits, seed):
    drawn, types = random.Random(seed), module.TYPES.of(small=bits < 2.625)
    weights = model(experts=2)
    names = [name for weight in weights if weight.kind == "expert" for name in weight.names]
    measured = {name: {kind: drawn.uniform(0.5, 1.5) * 2.0 ** -code_bits(kind) for kind in types} for name in names}
    problem = problem_of(weights, measured, bits=bits)
    named = kinds(problem, module.allocate(problem))
    for layer in range(LAYERS):
        own = [name for name in names if name.startswith(f"layers.{layer}.")]
        least = min(
            math.fsum(measured[name][kind] for name, kind in zip(own, chosen, strict=True))
            for chosen in itertools.product(types, repeat=len(own))
            if sum(map(size_of, chosen)) <= bits / 8 * len(own) * ROWS * COLUMNS
        )
        assert sum(size_of(named[name]) for name in own) <= bits / 8 * len(own) * ROWS * COLUMNS
        assert math.fsum(measured[name][named[name]] for name in own) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("bits", [1.7, 2.2, 2.8, 3.4, 4.2])
@pytest.mark.parametrize("seed", range(2))
def test_alphaq_takes_the_least_of_all_choices_over_all_layers(bits, seed):
    drawn, types = random.Random(seed), alphaq.TYPES.of(small=bits < 2.625)
    weights = model(experts=2)
    names = [name for weight in weights if weight.kind == "expert" for name in weight.names]
    measured = {name: {"alpha": drawn.uniform(2, 6), "variance": drawn.uniform(0.5, 2) * 1e-4} for name in names}
    middle = statistics.median(each["alpha"] for each in measured.values())

    def noise(name, kind):
        each = measured[name]
        return (middle / each["alpha"]) ** alphaq.GAMMA * each["variance"] * 4.0 ** -code_bits(kind)

    problem = problem_of(weights, measured, bits=bits)
    named = kinds(problem, alphaq.allocate(problem))
    least = min(
        math.fsum(noise(name, kind) for name, kind in zip(names, chosen, strict=True))
        for chosen in itertools.product(types, repeat=len(names))
        if sum(map(size_of, chosen)) <= bits / 8 * len(names) * ROWS * COLUMNS
    )
    assert math.fsum(noise(name, named[name]) for name in names) <= least * (1 + alphaq.GAP)


@pytest.mark.parametrize("bits", [1.6, 2.0, 2.5, 2.63, 3.0, 4.4, 4.5, 5.5, 7.9, 8.5, 16])
@pytest.mark.parametrize("seed", range(2))
def test_edgemoe_lowers_the_fewest_of_those_that_matter_least(bits, seed):
    drawn = random.Random(seed)
    measured = {
        name: {
            "IQ1_S": drawn.uniform(9, 10), "IQ2_XXS": drawn.uniform(1, 2), "Q2_K": drawn.uniform(0.1, 1),
            "Q4_K": drawn.uniform(0.01, 0.09), "Q8_0": 1e-4,
        }
        for weight in model()
        if weight.kind == "expert"
        for name in weight.names
    }  # fmt: skip
    problem = problem_of(model(), measured, bits=bits)
    allocation = edgemoe.allocate(problem)
    named = kinds(problem, allocation)
    experts = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
    matrices = {
        (layer, e): [f"layers.{layer}.experts.{e}.{each}.weight" for each in ("up", "down")] for layer, e in experts
    }

    def taken(low, high, count):
        return 2 * (count * size_of(low) + (len(experts) - count) * size_of(high))

    limit = bits / 8 * len(experts) * 2 * ROWS * COLUMNS
    if bits >= 8.5:
        assert {named[name] for names in matrices.values() for name in names} == {"Q8_0"}
        return
    pairs = {2.0625: ("IQ1_S", "IQ2_XXS"), 2.625: ("IQ2_XXS", "Q4_K"), 4.5: ("Q2_K", "Q4_K"), 9: ("Q4_K", "Q8_0")}
    low, high = next(pair for above, pair in pairs.items() if bits < above)
    by_loss = sorted(experts, key=lambda each: sum(measured[n][low] - measured[n][high] for n in matrices[each]))
    count = next(count for count in range(len(experts) + 1) if taken(low, high, count) <= limit)
    for place, each in enumerate(by_loss):
        assert {named[name] for name in matrices[each]} == {low if place < count else high}


@pytest.mark.parametrize("name", ALL)
def test_all_else_has_fixed_types_and_the_budget_is_that_of_the_whole_file(name):
    module, weights = ALL[name], model()
    least = problem_of(weights, None, bits=1.5625)
    smallest = module.allocate(least).num_bytes
    for more in (0, 1, 700, 5000):
        problem = problem_of(weights, None, budget=smallest + more)
        allocation = module.allocate(problem)
        named = kinds(problem, allocation)
        assert named["attention.weight"] == module.LINEAR
        assert named["embedding.weight"] == named["head.weight"] == "Q8_0"
        assert allocation.num_bytes == 1000 + sum(map(size_of, named.values())) <= smallest + more
    with pytest.raises(Infeasible, match=r"budget of .* cannot be met by this recipe.*IQ1_S.* is the least"):
        module.allocate(problem_of(weights, None, budget=smallest - 1))
    with pytest.raises(Infeasible, match=r"--bits 1\.5 cannot be met.*IQ1_S.* take 1\.562 bits a number"):
        module.allocate(problem_of(weights, None, bits=1.5))


@pytest.mark.parametrize("name", ALL)
def test_experts_that_are_stored_as_one_tensor_get_one_type(name):
    weights = [experts_of(layer, each, stacked=True) for layer in range(LAYERS) for each in ("up", "down")] + list(REST)
    drawn = random.Random(1)
    measured = {}
    for weight in weights[: 2 * LAYERS]:
        measured[weight.pattern] = {kind: drawn.random() for kind in bitsmoe.TYPES.types}
        measured[f"layers.{weight.layer}.experts.*"] = dict.fromkeys(("usage", "gate_mass", *pmq.TYPES.types), 1.0)
    if name == "alphaq":
        measured = {
            f"{weight.pattern}[{e}]": {"alpha": drawn.uniform(2, 5), "variance": 1e-4}
            for weight in weights[: 2 * LAYERS]
            for e in range(EXPERTS)
        }
    for damages in (None, measured):
        problem = problem_of(weights, damages, bits=3.6)
        types = ALL[name].allocate(problem).types
        assert types.keys() == {weight.pattern for weight in weights}
        assert sum(size_of(types[weight.pattern], EXPERTS * ROWS * COLUMNS) for weight in weights[: 2 * LAYERS]) <= (
            3.6 / 8 * 2 * LAYERS * EXPERTS * ROWS * COLUMNS
        )


@pytest.mark.parametrize("name", ALL)
def test_what_does_not_matter_gets_the_smallest_type_and_narrow_rows_what_stands_in(name):
    """Experts that no token chose cost nothing; rows of 64 have no wide blocks."""
    weights = [experts_of(layer, each, columns=64) for layer in range(LAYERS) for each in ("up", "down")]
    groups = by_expert(weights) if name == "pmq" else by_matrix(weights)
    nothing = {
        "pmq": dict.fromkeys(("usage", "gate_mass", *pmq.TYPES.types), 0.0),
        "mxmoe": dict.fromkeys(mxmoe.TYPES.types, 0.0),
        "bitsmoe-bits": dict.fromkeys(bitsmoe.TYPES.types, 0.0),
        "alphaq": {"alpha": 3.0, "variance": 0.0},
        "edgemoe": {},
    }[name]
    problem = problem_of(weights, {group.key: nothing for group in groups}, bits=5.0)
    named = kinds(problem, ALL[name].allocate(problem))
    assert set(named.values()) <= {"IQ4_NL", "Q5_0", "Q8_0"}
    assert sum(size_of(kind, ROWS * 64) for kind in named.values()) <= 5.0 / 8 * len(named) * ROWS * 64


@pytest.mark.parametrize("module", [bitsmoe, mxmoe])
def test_more_bytes_never_cost_more(module):
    drawn = random.Random(3)
    names = [name for weight in model() if weight.kind == "expert" for name in weight.names]
    measured = {
        name: {kind: drawn.uniform(0.5, 1.5) * 2.0 ** -code_bits(kind) for kind in module.TYPES.types} for name in names
    }
    costs = []
    for bits in (2.7, 3.0, 3.5, 4.4, 5.2, 6.6, 8.5):
        problem = problem_of(model(), measured, bits=bits)
        named = kinds(problem, module.allocate(problem))
        assert sum(size_of(named[name]) for name in names) <= bits / 8 * len(names) * ROWS * COLUMNS
        costs.append(math.fsum(measured[name][named[name]] for name in names))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)


def test_types_of_all_experts_of_a_layer_are_said_with_a_star():
    allocation = edgemoe.allocate(problem_of(model(), None, bits=16))
    assert allocation.types.keys() == {weight.pattern for weight in model()}


def test_every_allocator_and_every_meter_of_the_table_loads():
    for name, allocator in ALLOCATORS.items():
        assert callable(load_allocator(name))
        if allocator.meter is not None:
            assert callable(load_meter(name))
    with pytest.raises(ValueError, match="fewer has no meter"):
        load_meter("fewer")
    for name in ALL:
        assert RECIPES[name].allocator == name
        assert RECIPES[name].quantiser == ("nearest" if name == "edgemoe" else "gptq", {})


def test_a_name_of_its_own_goes_before_a_star():
    [up, *_] = weights = [experts_of(0, "up"), experts_of(1, "up"), *REST]
    single = "layers.0.experts.1.up.weight"
    chosen = typed(
        weights, {up.pattern: "Q8_0", single: "Q4_0", "head.weight": "Q8_0", "layers.1.experts.2.up.weight": "Q4_0"}
    )
    assert [(each.pattern, each.names) for each in chosen] == [
        (single, (single,)),
        (up.pattern, ("layers.0.experts.0.up.weight", "layers.0.experts.2.up.weight")),
        ("layers.1.experts.2.up.weight", ("layers.1.experts.2.up.weight",)),
        ("head.weight", ("head.weight",)),
    ]
    assert [each.expert for each in chosen] == [1, None, 2, None]
    assert [each.plain_bytes for each in chosen] == [2 * ROWS * COLUMNS * count for count in (1, 2, 1, 1)]
    assert [each.pattern for each in typed(weights, {up.pattern: "Q8_0", **dict.fromkeys(up.names, "Q4_0")})] == [
        *up.names
    ]
    stacked = experts_of(0, "up", stacked=True)
    assert stacked.apart() == (stacked,)
    assert typed([stacked], {stacked.pattern: "Q8_0"}) == [stacked]
