"""What a family's router chooses among fewer experts, against the router of a model that was cut by hand."""

import pytest
import torch

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.reroute import Reroute
from coterie.model.disk.open import open_checkpoint
from coterie.profile.observation import observed
from coterie.testing import tiny_checkpoint

FAMILIES = ["olmoe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "ernie4_5_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)
    architecture = Architecture.of(open_checkpoint(folder))
    return architecture, load_model(folder, dtype=torch.float32)


def observations_of(architecture, model):
    ids_BS = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with observed(model, architecture.layers) as found, torch.no_grad():
        model(input_ids=ids_BS, use_cache=False)
    return found


def router_of(model, layer, rows=None):
    tensors = {name: model.state_dict()[name] for name, _ in layer.router_tensors}
    if rows is None:
        return tensors
    axes = dict(layer.router_tensors)
    return {name: tensor.index_select(axes[name], rows) for name, tensor in tensors.items()}


def by_expert(index_TK, weight_TK, count):
    """Routing weight of every expert for every token (T, M)."""
    found_TE = torch.zeros(len(index_TK), count + 1)
    return found_TE.scatter_add_(1, index_TK, weight_TK.float())[:, :count]


def test_the_whole_router_chooses_what_the_model_chose(opened):
    architecture, model = opened
    reroute = Reroute(architecture, model)
    for layer, observation in zip(architecture.layers, observations_of(architecture, model), strict=True):
        assert observation.block_TD is not None
        index_TK, weight_TK = reroute(layer, router_of(model, layer), observation.block_TD)
        count = layer.num_experts
        expected = by_expert(observation.index_TK.clamp(max=count), observation.weight_TK, count)
        torch.testing.assert_close(by_expert(index_TK, weight_TK, count), expected, rtol=1e-5, atol=1e-6)


def test_fewer_rows_choose_among_fewer_experts(opened):
    architecture, model = opened
    layer = architecture.layers[-1]
    observation = observations_of(architecture, model)[-1]
    # Two of each group of four, in the order of the groups.
    rows = torch.tensor([0, 3, 5, 6])
    reroute = Reroute(architecture, model)
    index_TK, weight_TK = reroute(layer, router_of(model, layer, rows), observation.block_TD)
    assert index_TK.shape == observation.index_TK.shape
    assert int(index_TK.max()) < 4
    small_TE = by_expert(index_TK, weight_TK, 4)
    whole_TE = by_expert(observation.index_TK.clamp(max=8), observation.weight_TK, 8)
    inside = (whole_TE[:, rows] > 0).sum(1) == layer.top_k
    # Tokens all of whose experts were kept choose them again.
    assert inside.any(), "the test shows little when no token kept its experts"
    assert torch.equal((small_TE > 0)[inside], (whole_TE[:, rows] > 0)[inside])
    assert ((small_TE > 0).sum(1) == layer.top_k).all()


def test_gradients_reach_the_router_rows(opened):
    architecture, model = opened
    layer = architecture.layers[-1]
    observation = observations_of(architecture, model)[-1]
    router = {name: tensor.clone() for name, tensor in router_of(model, layer).items()}
    leaf = next(name for name in router if name.endswith("weight"))
    router[leaf].requires_grad_()
    _, weight_TK = Reroute(architecture, model)(layer, router, observation.block_TD)
    (weight_TK * torch.arange(1, layer.top_k + 1)).sum().backward()
    assert float(router[leaf].grad.abs().sum()) > 0


def test_too_few_rows_are_refused(opened):
    architecture, model = opened
    layer = architecture.layers[0]
    router = router_of(model, layer, torch.tensor([0]))
    with pytest.raises(Infeasible, match="1 experts a layer cannot be routed"):
        Reroute(architecture, model)(layer, router, torch.zeros(3, layer.hidden_size))


def test_a_block_that_wants_more_than_hidden_states_is_refused(opened, monkeypatch):
    architecture, model = opened
    layer = architecture.layers[0]
    reroute = Reroute(architecture, model)
    observation = observations_of(architecture, model)[0]
    reroute(layer, router_of(model, layer), observation.block_TD)
    block = reroute._meta_models[layer.num_experts].get_submodule(layer.block)

    def forward(hidden_states, token_ids):
        return hidden_states

    monkeypatch.setattr(block, "forward", forward)
    with pytest.raises(ArchitectureMismatch, match="cannot be run by itself"):
        reroute(layer, router_of(model, layer), observation.block_TD)
