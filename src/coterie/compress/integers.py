"""Results in integers as compressed-tensors stores them: which matrices, under which names, and what config.json says.

What loads them limits what they can be. transformers (5.23, ``integrations/compressed_tensors``) takes all experts of
all layers to be stored alike, and where they are not it may make other numbers of them, with an empty load report;
linear modules may be stored another way. vLLM lets layers differ, but not the projections of one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from coterie.compress.source import Source
from coterie.compress.weights import Weight, typed
from coterie.errors import Infeasible
from coterie.model.disk.encodings.integer_types import INTEGER_BITS, INTEGERS, integers_of_bits

#: What stands for the plain numbers of a matrix that has no type.
_PLAIN = "plain numbers"

#: A way out where matrices cannot be stored in integers.
_INSTEAD = "take a type of GGML, such as {}, which Coterie and llama.cpp load"


def choose_integers(weights: Sequence[Weight], name: str) -> dict[str, str]:
    """Return the type of each matrix that is stored in integers, by its pattern; all others stay plain numbers.

    Linear modules whose columns are no whole groups are among those: as experts, they have one type for all.

    Args:
        weights: the matrices that there are.
        name: the type, or INT4 or INT8 for that with the largest groups that divide the columns of all matrices, else
            of all experts.

    Raises:
        Infeasible: experts that compressed-tensors has no form for, or whose columns no group divides.
    """
    experts = [weight for weight in weights if weight.kind == "expert"]
    linear = [weight for weight in weights if weight.kind != "expert" and weight.takes_integers]
    candidates = integers_of_bits(INTEGER_BITS[name]) if name in INTEGER_BITS else [name]
    for among in ([*experts, *linear], experts):
        for kind in candidates:
            if all(weight.fitting(kind) for weight in among):
                return {weight.pattern: kind for weight in (*experts, *linear) if weight.fitting(kind)}
    for weight in experts:
        _check_takes_integers(weight)
    bits, group = INTEGERS[candidates[-1]]
    weight = next(weight for weight in experts if weight.fitting(candidates[-1]) is None)
    others = [kind for kind in integers_of_bits(bits) if all(each.fitting(kind) for each in experts)]
    raise Infeasible(
        f"rows of {weight.pattern} have {weight.columns} numbers, which are no whole groups of {group}: "
        + (f"take {others[0]}" if others else _INSTEAD.format("Q4_0 or Q8_0"))
    )


def fitting_integers(weights: Sequence[Weight]) -> list[str]:
    """Return the types that all experts can have, from most bits to fewest; raises as `choose_integers`."""
    experts = [weight for weight in weights if weight.kind == "expert"]
    fitting = [name for name in INTEGERS if all(weight.fitting(name) for weight in experts)]
    if not fitting:
        choose_integers(weights, "INT4")
    return fitting


def check_integers(weights: Sequence[Weight], types: Mapping[str, str]) -> None:
    """Check what a plan stores in integers, beside what `coterie.compress.weights.check_types` does.

    Raises:
        Infeasible: types that do not go together, or that nothing loads; says which.
    """
    if strange := [f"{pattern} as {kind}" for pattern, kind in types.items() if kind not in INTEGERS]:
        other = next(f"{pattern} as {kind}" for pattern, kind in types.items() if kind in INTEGERS)
        raise Infeasible(
            f"the plan stores {strange[0]} and {other}: integers are for compressed-tensors, which knows no types of "
            "GGML; give all matrices the one or the other, or leave them out"
        )
    for weight in typed(weights, types):
        _check_takes_integers(weight)
    by_layer: dict[int, dict[str, list[str]]] = {}
    for weight, kind in _experts_with_types(weights, types):
        assert weight.layer is not None
        by_layer.setdefault(weight.layer, {}).setdefault(kind, []).append(weight.pattern)
    for layer, by_type in by_layer.items():
        if len(by_type) > 1:
            said = " and ".join(f"{patterns[0]} as {kind}" for kind, patterns in by_type.items())
            raise Infeasible(
                f"layer {layer}: the plan stores {said}; all projections of all experts of a layer have the same type: "
                "vLLM takes no other, and transformers would load wrong numbers without a word"
            )
    if all(by_type.keys() == {_PLAIN} for by_type in by_layer.values()):
        raise Infeasible("the plan leaves all experts plain numbers; give those of a layer a type, or leave types out")
    others = {types[weight.pattern]: weight.pattern for weight in typed(weights, types) if weight.kind != "expert"}
    if len(others) > 1:
        said = " and ".join(f"{pattern} as {kind}" for kind, pattern in others.items())
        raise Infeasible(
            f"the plan stores {said}; linear modules that are no experts have one type, or stay plain numbers"
        )


def check_joined(source: Source) -> None:
    """Check that no tensor beside experts is put together from several, which transformers then looks for in vain.

    Raises:
        Infeasible: one is; names it.
    """
    experts = tuple(f"{layer.experts}." for layer in source.architecture.layers)
    for name, parts in source.conversion.sources.items():
        if len(parts) > 1 and not name.startswith(experts):
            raise Infeasible(
                f"{source.checkpoint.path}: {name} is put together from {len(parts)} tensors, such as {parts[0]}; in a "
                "checkpoint of compressed-tensors transformers (5.23) does that for experts alone, and fails: "
                f"{_INSTEAD.format('Q4_0 or Q8_0')}"
            )


def loader_of(weights: Sequence[Weight], types: Mapping[str, str]) -> Literal["transformers", "vllm"]:
    """Return who loads such a result: both, said as "transformers", or vLLM alone, where layers' experts differ."""
    kinds = {kind for _, kind in _experts_with_types(weights, types)}
    return "transformers" if len(kinds) == 1 else "vllm"


def _experts_with_types(weights: Sequence[Weight], types: Mapping[str, str]) -> list[tuple[Weight, str]]:
    """Return the matrices of experts, each with its type, or with what says that it has none."""
    pairs = [(weight, types[weight.pattern]) for weight in typed(weights, types) if weight.kind == "expert"]
    named = {name for weight, _ in pairs for name in weight.names}
    for weight in weights:
        rest = [name for name in weight.names if name not in named]
        if weight.kind == "expert" and rest:
            pairs.append((weight.only(rest), _PLAIN))
    return pairs


def _check_takes_integers(weight: Weight) -> None:
    if weight.takes_integers:
        return
    if weight.kind == "expert":
        how = "transposed" if len(weight.shape) == 2 else "together in one tensor"
        raise Infeasible(
            f"experts of this model lie {how}, {weight.pattern} {list(weight.shape)}: what loads compressed-tensors "
            f"wants a matrix (outputs, inputs) for each projection of each; {_INSTEAD.format('Q4_0 or Q8_0')}"
        )
    raise Infeasible(
        f"the plan stores {weight.pattern}, an embedding or a head, in integers: what loads compressed-tensors takes "
        "it to be plain numbers; leave it out"
    )


def stored_name(name: str, suffix: str) -> str:
    """Return the name on disk of what is stored of a weight, by the suffix that its encoding has for it."""
    return f"{name}{suffix or '_packed'}"


def compressed_config(source: Source, types: Mapping[str, str]) -> dict[str, Any]:
    """Return what config.json says of a result in integers, the ``quantization_config``.

    Facts: compressed-tensors 0.20, ``quantization/quant_config``, ``quant_scheme`` and ``utils/match``.
    """
    weights = typed(source.weights, types)
    targets: dict[str, list[str]] = {}
    linear = {types[weight.pattern] for weight in weights if weight.kind != "expert"}
    of_experts = {types[weight.pattern] for weight in weights if weight.kind == "expert"}
    whole = loader_of(source.weights, types) == "transformers"
    if whole and linear <= of_experts:
        targets[next(iter(of_experts))] = ["Linear"]
    else:
        for weight in source.weights:
            kind = next((types[each.pattern] for each in weights if each.layer == weight.layer), None)
            if weight.kind == "expert" and kind is not None:
                listed = targets.setdefault(kind, [])
                if (target := rf"re:{re.escape(weight.pattern.partition('.*.')[0])}\..*") not in listed:
                    listed.append(target)
        for kind in linear:
            targets.setdefault(kind, []).append("Linear")
    groups = {}
    for number, (kind, listed) in enumerate(sorted(targets.items())):
        bits, group = INTEGERS[kind]
        described = {
            "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
            "actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip
        groups[f"group_{number}"] = {
            "targets": listed, "weights": described, "input_activations": None, "output_activations": None,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": _ignored(source, weights), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _ignored(source: Source, weights: Iterable[Weight]) -> list[str]:
    """Return names and patterns of all modules with a matrix that stays plain numbers.

    By their names on disk, which vLLM looks for and which call routers linear, and by those in memory, as transformers
    has them.
    """
    names, model = source.conversion.memory_names, source.architecture.model
    packed = {name for weight in weights for name in weight.names}
    embeddings = {name for weight in source.weights if weight.kind == "embedding" for name in weight.names}
    on_disk = {
        name.removesuffix(".weight")
        for name, info in source.checkpoint.tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight") and name not in packed | embeddings
    }
    taken = {name.removesuffix(".weight") for name in packed}
    in_memory = {names[name].removesuffix(".weight") for name in packed}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(_patterns(on_disk | (linear - in_memory), taken | in_memory))


def _patterns(modules: Iterable[str], others: Collection[str]) -> set[str]:
    """Return few names and patterns that match some modules and none of others.

    For each the shortest that does: how its name ends behind the last number in it; with any numbers in it; with its
    first number, which is that of a layer; or its name.
    """
    chosen: set[str] = set()
    known: dict[str, bool] = {}
    for module in sorted(modules):
        components = module.split(".")
        numbers = [place for place, component in enumerate(components) if component.isdigit()]
        if not numbers:
            chosen.add(module)
            continue
        exact = list(map(re.escape, components))
        any_number = [r"\d+" if component.isdigit() else component for component in exact]
        first, last = numbers[0] + 1, numbers[-1] + 1
        possible = [[".*", *exact[last:]]] if last < len(exact) else []
        possible += [any_number, exact[:first] + any_number[first:]]
        for pattern in (r"\.".join(parts) + "$" for parts in possible):
            if pattern not in known:
                known[pattern] = not any(re.match(pattern, other) for other in others)
            if known[pattern]:
                chosen.add(f"re:{pattern}")
                break
        else:
            chosen.add(module)
    return chosen
