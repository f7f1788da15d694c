"""The entry of config.json that says how many experts a token chooses."""

import json
from typing import Any

import pytest

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.choice import choice_key
from coterie.model.arch.layers import Architecture, runs_alone
from coterie.model.arch.resize import resized_config
from coterie.testing.families import UNROUTABLE, model_class, tiny_config


def architecture(model_type: str, **changes: Any) -> Architecture:
    config = json.loads(tiny_config(model_type, **changes).to_json_string())
    return Architecture.from_config(config | {"architectures": [model_class(model_type).__name__]})


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("olmoe", ("num_experts_per_tok",)),
        ("gpt_oss", ("num_experts_per_tok",)),
        ("ernie4_5_moe", ("moe_k",)),
        ("aria_text", ("moe_topk",)),
        ("gemma4_text", ("top_k_experts",)),
        ("glm4v_moe", ("text_config", "num_experts_per_tok")),
    ],
)
def test_the_key_is_found_by_asking_empty_models(model_type, key):
    assert choice_key(architecture(model_type)) == key


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize(("count", "top_k"), [(24, 6), (12, 3), (10, 2)])
def test_a_resized_model_chooses_that_many_and_nothing_else_changes(model_type, count, top_k):
    original = architecture(model_type)
    made = Architecture.from_config(resized_config(original, count, 8, top_k))
    assert [(each.num_experts, each.width, each.top_k) for each in made.layers] == [(count, 8, top_k)] * len(
        original.layers
    )
    touched = tuple(name for layer in original.layers for name in (f"{layer.experts}.", *dict(layer.router_tensors)))
    shapes = [
        {name: tensor.shape for name, tensor in each.model.state_dict().items() if not name.startswith(touched)}
        for each in (original, made)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("model_type", ["phimoe", "zaya"])
def test_a_family_whose_router_chooses_a_fixed_number_is_told(model_type):
    with pytest.raises(Infeasible, match=r"no entry of config.json lets a token choose more than \d experts"):
        choice_key(architecture(model_type))


def test_an_entry_that_means_nothing_does_not_disturb():
    config = architecture("olmoe").config | {"top_k_of_something_else": 2}
    assert choice_key(Architecture.from_config(config)) == ("num_experts_per_tok",)


def test_two_entries_that_both_work_are_refused(monkeypatch):
    monkeypatch.setattr("coterie.model.arch.choice._chooses_twice", lambda architecture, path: True)
    config = architecture("olmoe").config | {"num_tokens_of_something": 2}
    with pytest.raises(ArchitectureMismatch, match=r"several config keys .*num_experts_per_tok"):
        choice_key(Architecture.from_config(config))


def test_blocks_that_need_more_than_hidden_states_are_known():
    for model_type in ("olmoe", "deepseek_v3", *UNROUTABLE):
        one = architecture(model_type)
        assert runs_alone(one.model, one.layers[0]) == (model_type not in UNROUTABLE)
