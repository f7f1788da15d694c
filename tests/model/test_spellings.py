"""One number under several names in config.json: all of them change, or the one that is not clear is named."""

import json
from typing import Any

import pytest

from coterie.compress.decide import plan
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.layers import Architecture
from coterie.model.arch.resize import resized_config
from coterie.testing import tiny_checkpoint
from coterie.testing.families import model_class, tiny_config


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    config = json.loads(tiny_config(model_type).to_json_string())
    return config | {"architectures": [model_class(model_type).__name__]} | changes


def resized(config: dict[str, Any], *sizes: int) -> dict[str, Any]:
    return resized_config(Architecture.from_config(config), *sizes)


@pytest.mark.parametrize("name", ["experts_per_token", "moe_topk", "top_k", "num_selected_experts", "moeTopK"])
def test_the_number_of_chosen_experts_under_a_name_that_nothing_reads(name):
    config = resized(config_of("gpt_oss", **{name: 2}), 8, 24, 1)
    assert (config["num_experts_per_tok"], config[name]) == (1, 1)


@pytest.mark.parametrize("name", ["n_routed_experts", "moe_num_experts", "num_moe_experts", "numExperts"])
def test_the_number_of_experts_under_a_name_that_nothing_reads(name):
    config = resized(config_of("olmoe", **{name: 8}), 4)
    assert (config["num_experts"], config[name], config["num_experts_per_tok"]) == (4, 4, 2)


@pytest.mark.parametrize("name", ["expert_intermediate_size", "moe_ffn_hidden_size"])
def test_the_width_under_a_name_that_nothing_reads(name):
    config = resized(config_of("qwen3_moe", **{name: 24}), 8, 16)
    assert (config["moe_intermediate_size"], config[name]) == (16, 16)


def test_a_number_for_each_layer_stays_one_for_each_layer():
    assert resized(config_of("olmoe", moe_num_experts=[8, 8]), 4)["moe_num_experts"] == [4, 4]


def test_a_name_outside_the_part_that_computes_text():
    config = config_of("glm4v_moe", num_experts=8) | {"draft": {"n_layers": 8}}
    small = resized(config, 4)
    assert (small["text_config"]["n_routed_experts"], small["num_experts"], small["draft"]) == (4, 4, {"n_layers": 8})


@pytest.mark.parametrize(
    "other",
    [
        {"num_shared_experts": 8, "expert_layer_period": 8, "moe_layer_freq": 8},  # other things, by chance as many
        {"n_group": 8, "number_of_anything": 8, "max_window_layers": 8, "quantization": {"bits": 8}},
        {"n_routed_experts": 16},  # not the number that changes
        {"num_attention_heads": 8, "max_position_embeddings": 8},  # the class reads it
    ],
)
def test_what_counts_something_else_stays(other):
    assert resized(config_of("olmoe", **other), 4) == config_of("olmoe", **other) | {"num_experts": 4}


def test_what_does_not_change_is_not_asked_about():
    config = config_of("olmoe", num_experts_of_something=8)
    assert resized(config, 8, 16) == config | {"intermediate_size": 16}


@pytest.mark.parametrize(
    ("other", "name"),
    [({"num_experts_in_another_tool": 8}, "num_experts_in_another_tool"), ({"tool": {"experts": 8}}, "tool.experts")],
)
def test_what_could_be_the_same_number_is_refused_by_name_before_anything_is_computed(tmp_path, other, name):
    with pytest.raises(ArchitectureMismatch, match=rf"num_experts = 8, which becomes 4, and {name} = 8, .*remove"):
        resized(config_of("olmoe", **other), 4)
    folder = tiny_checkpoint(tmp_path / "model", "olmoe")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    with pytest.raises(ArchitectureMismatch, match=name):
        plan(folder, keep=0.5, recipe="reap")
    assert plan(folder, keep=0.5, recipe="hc-smoe", router="map").mapped, "whose config stays as it is"
