"""Scores of all experts are what the family's own code records as its router logits."""

from dataclasses import replace

import pytest
import torch

from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.router_scores import router_scores
from coterie.model.disk.checkpoint import Checkpoint
from coterie.testing import CORE_FAMILIES

IDS = torch.arange(40).view(2, 20)


def loaded(path):
    return load_model(path), Architecture.of(Checkpoint.open(path)).layers


def run(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **options)


@pytest.mark.parametrize("model_type", CORE_FAMILIES)
def test_scores_are_what_the_model_itself_records(tiny, model_type):
    model, layers = loaded(tiny(model_type))
    with router_scores(model, layers) as scores:
        own = run(model, output_router_logits=True).router_logits
    assert list(scores) == [layer.index for layer in layers]
    for layer, own_TE in zip(layers, own, strict=True):
        assert scores[layer.index].shape == (40, layer.num_experts)
        assert torch.equal(scores[layer.index], own_TE.reshape(40, -1))


def test_scores_of_the_layers_that_were_asked_for_without_columns_of_others(tiny):
    """As in a router that scores shared experts, or "no expert", behind the routed ones."""
    model, layers = loaded(tiny())
    with router_scores(model, layers) as whole:
        run(model)
    with router_scores(model, [replace(layers[1], num_experts=6)]) as scores:
        run(model)
    assert list(scores) == [1]
    assert torch.equal(scores[1], whole[1][:, :6])


def test_a_later_call_replaces_the_scores_of_an_earlier_one(tiny):
    model, layers = loaded(tiny())
    with router_scores(model, layers) as scores, torch.no_grad():
        model(input_ids=IDS[:, :5], use_cache=False)
        first = scores.pop(0)
        model(input_ids=IDS[:1], use_cache=False)
        assert first.shape == (10, 8)
        assert scores[0].shape == scores[1].shape == (20, 8)


def test_scores_are_detached_and_listening_leaves_no_trace(tiny):
    model, layers = loaded(tiny())

    def fail():
        with router_scores(model, layers) as scores:
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            assert loss.requires_grad
            assert not scores[0].requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(module._forward_hooks for module in model.modules())
