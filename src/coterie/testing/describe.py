"""What each family is like, read off its tiny model: the rows of ``coterie families``.

Nothing is loaded and nothing is computed: the models are built empty from their tiny configs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from coterie.errors import CoterieError
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.quiet import quiet
from coterie.testing.families import UNSUPPORTED, model_class, tiny_config


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """What is known of one family.

    Attributes:
        model_type: its name in transformers.
        model_class: the stock class that loads it.
        layers: kind of each layer of the tiny model: "moe" or "dense".
        token_mixing: kinds of attention and what stands in for it, as its config names them; empty when all are alike.
        router: what its router has beside a matrix: "vectors" (biases or scales with an entry an expert), "groups",
            "spare rows" (for shared experts or for "no expert").
        experts: how its experts differ from two halves of gate and up: "no gate", "transposed", "interleaved", "bias",
            "norm" (of each expert's output).
        shared_experts: whether every token also passes experts that are not chosen.
        problem: why it cannot be compressed, None when it can.
        refusal: what Coterie says when it is tried; None when the family works.
    """

    model_type: str
    model_class: str
    layers: tuple[str, ...] = ()
    token_mixing: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    shared_experts: bool = False
    problem: str | None = None
    refusal: str | None = None


def describe_family(model_type: str) -> FamilyFacts:
    """Return the facts of one family.

    Args:
        model_type: a key of `coterie.testing.families.TINY`.

    Raises:
        UnknownName: no such family.
        CoterieError: the family is not listed as unsupported, and yet Coterie cannot derive it.
    """
    stock = model_class(model_type)
    # As a file would give it: through JSON, with the class that it names.
    with quiet():
        config = json.loads(tiny_config(model_type).to_json_string(use_diff=False)) | {
            "architectures": [stock.__name__]
        }
    try:
        architecture = Architecture.from_config(config, where=f"the tiny {model_type}")
    except CoterieError as error:
        if model_type not in UNSUPPORTED:
            raise
        return FamilyFacts(
            model_type=model_type,
            model_class=stock.__name__,
            problem=UNSUPPORTED[model_type],
            refusal=str(error),
        )
    text_config: Any = architecture.model.config.get_text_config()
    kinds = getattr(text_config, "layer_types", None) or ()
    first = architecture.layers[0]
    moe = {layer.block.split(".layers.")[1].split(".")[0] for layer in architecture.layers}
    return FamilyFacts(
        model_type=model_type,
        model_class=stock.__name__,
        layers=tuple("moe" if str(index) in moe else "dense" for index in range(text_config.num_hidden_layers)),
        token_mixing=tuple(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else (),
        router=_router_features(architecture, first),
        experts=_experts_features(architecture.model.get_submodule(first.experts)),
        shared_experts=_has_shared(architecture, first),
    )


def _router_features(architecture: Architecture, layer: MoELayer) -> tuple[str, ...]:
    state = architecture.model.state_dict()
    shapes = [(state[name].ndim, state[name].shape[axis]) for name, axis in layer.router_tensors]
    features = {
        "vectors": any(state[name].squeeze().ndim == 1 for name, _ in layer.router_tensors),
        "groups": hasattr(architecture.model.config.get_text_config(), "n_group"),
        "spare rows": any(extent > layer.num_experts for _, extent in shapes),
    }
    return tuple(name for name, present in features.items() if present)


def _experts_features(module: nn.Module) -> tuple[str, ...]:
    features = {
        "no gate": not module.has_gate,
        "transposed": module.is_transposed,
        "interleaved": not module.is_concatenated,
        "bias": module.has_bias,
        "norm": getattr(module, "has_post_expert_norm", False),
    }
    return tuple(name for name, present in features.items() if present)


def _has_shared(architecture: Architecture, layer: MoELayer) -> bool:
    """Tell whether there are shared experts in the block or beside it."""
    parent = layer.block.rpartition(".")[0] if not layer.block.split(".")[-1].isdecimal() else layer.block
    return any("shared" in name for name, _ in architecture.model.get_submodule(parent).named_parameters())
