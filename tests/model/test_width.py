import json
import math
from typing import Any

import pytest

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.layers import Architecture
from coterie.model.arch.resize import resized_config
from coterie.model.arch.width import WidthRule, width_rule
from coterie.testing.families import model_class, tiny_config


def architecture(model_type: str, **changes: Any) -> Architecture:
    config = json.loads(tiny_config(model_type, **changes).to_json_string())
    return Architecture.from_config(config | {"architectures": [model_class(model_type).__name__]})


def shapes(model: Any, layers: Any) -> dict[str, tuple[int, ...]]:
    inside = tuple(f"{layer.experts}." for layer in layers)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith(inside)}


@pytest.mark.parametrize(
    ("model_type", "key", "multipliers", "fixed"),
    [
        ("olmoe", ("intermediate_size",), (), ()),
        ("qwen3_moe", ("moe_intermediate_size",), (), ()),
        ("gpt_oss", ("intermediate_size",), (), ()),
        ("deepseek_v3", ("moe_intermediate_size",), ((("n_shared_experts",), 1),), ()),
        ("glm4v_moe", ("text_config", "moe_intermediate_size"), ((("text_config", "n_shared_experts"), 1),), ()),
        (
            "cohere2_moe",
            ("intermediate_size",),
            ((("num_shared_experts",), 1),),
            ((("prefix_dense_intermediate_size",), 24),),
        ),
    ],
)
def test_the_keys_are_found_by_comparing_empty_models(model_type, key, multipliers, fixed):
    assert width_rule(architecture(model_type)) == WidthRule(key=key, width=24, multipliers=multipliers, fixed=fixed)


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "glm4_moe", "cohere2_moe", "nemotron_h", "aria_text"])
def test_experts_become_narrower_and_nothing_else_changes(model_type):
    original = architecture(model_type)
    small = Architecture.from_config(resized_config(original, 4, 8))
    assert [(layer.num_experts, layer.width) for layer in small.layers] == [(4, 8)] * len(original.layers)
    expected = shapes(Architecture.from_config(resized_config(original, 4)).model, original.layers)
    assert shapes(small.model, small.layers) == expected


def test_two_shared_experts_become_four_of_half_the_width():
    original = architecture("deepseek_v3", n_shared_experts=2, moe_intermediate_size=32)
    config = resized_config(original, 8, 16)
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (16, 4)
    rule = width_rule(original)
    assert rule.feasible_widths() == [8, 16, 32]
    with pytest.raises(Infeasible, match=r"n_shared_experts = 2 x 32, which 24 does not divide; nearest .* 16, 32"):
        rule.check_feasible(24)


def test_the_full_width_asks_for_no_rule():
    jamba = architecture("jamba")
    assert resized_config(jamba, 8, 24) == resized_config(jamba, 8) == jamba.config
    with pytest.raises(Infeasible, match=r"intermediate_size = 24 .* 6 other tensors .*feed_forward"):
        resized_config(jamba, 8, 16)


def test_a_width_changes_under_all_its_names():
    config = dict(architecture("gpt_oss").config)
    found = resized_config(Architecture.from_config(config), 8, 16)
    assert {key for key in config if config[key] != found[key]} == {"intermediate_size"}


@pytest.mark.parametrize("width", [24, 20, 7, 1])
def test_widths_are_what_fast_matrix_products_take(width):
    rule = WidthRule(key=("width",), width=width)
    step = math.gcd(width, 8)
    assert rule.feasible_widths() == list(range(step, width + 1, step))
    for other in range(-1, width + 3):
        if other in rule.feasible_widths():
            assert rule.values(other) == {("width",): other}
        else:
            with pytest.raises(Infeasible, match=f"experts of width {other} instead of {width} are not possible"):
                rule.values(other)


def test_experts_one_neuron_wide_cannot_be_narrower():
    with pytest.raises(Infeasible, match="width 1 cannot be narrower"):
        width_rule(architecture("olmoe", intermediate_size=1))


def test_two_keys_that_could_be_meant_are_named(monkeypatch):
    """A class that reads either of two entries as the width: the smaller one counts."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    real = OlmoeExperts.__init__

    def either(self: Any, config: OlmoeConfig) -> None:
        kept = config.intermediate_size
        config.intermediate_size = min(kept, getattr(config, "other_width", kept))
        real(self, config)
        config.intermediate_size = kept

    monkeypatch.setattr(OlmoeExperts, "__init__", either)
    config = dict(architecture("olmoe").config) | {"other_width": 24}
    with pytest.raises(
        ArchitectureMismatch, match=r"\(24\) is not clear; found: \['intermediate_size', 'other_width'\]"
    ):
        width_rule(Architecture.from_config(config))
