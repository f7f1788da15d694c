"""Width as a size: what a target gives, and what it weighs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.slim import heapr_scores
from coterie.compress.plan import Plan
from coterie.compress.source import Source
from coterie.errors import ArchitectureMismatch, Infeasible, InputError
from coterie.model.arch.inspect import inspect
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.profile import Profile
from coterie.testing import tiny_checkpoint

LAYERS, EXPERTS, WIDTH = 2, 8, 24


def expected_bytes(model: Path, neurons: int) -> int:
    """By this one family's names: the rest, and the share of the experts' bytes that so many neurons have."""
    held = Checkpoint.open(model).tensors
    experts = sum(info.num_bytes for name, info in held.items() if ".experts." in name)
    rest = sum(info.num_bytes for name, info in held.items() if ".experts." not in name)
    return rest + experts * neurons // (LAYERS * EXPERTS * WIDTH)


def with_gradients(profile: Profile, scale: float = 1.0) -> Profile:
    """Return a profile with drawn gradients; those of the second layer are `scale` times as large."""
    generator = torch.Generator().manual_seed(3)
    statistics = [
        {
            **held,
            "channel_gradient": torch.rand(held["hidden_square"].shape, generator=generator).double() * scale**layer,
        }
        for layer, held in enumerate(profile.statistics)
    ]
    return replace(profile, statistics=tuple(statistics))


@pytest.mark.parametrize(
    ("target", "width"),
    [({"keep": 1.0}, 24), ({"keep": 0.7}, 16), ({"keep": 0.5}, 8), ({"keep": 0.01}, 8), ({"width": 16}, 16)],
)
def test_a_share_is_of_the_width_of_each_expert(olmoe: Path, target: dict[str, Any], width: int) -> None:
    made = plan(olmoe, recipe="easy-slim", **target)
    assert [(size.num_experts, size.width, size.widths) for size in made.layers] == [(8, width, None)] * 2
    assert made.predicted_bytes == expected_bytes(olmoe, LAYERS * EXPERTS * width)
    assert made.predicted_parameters * 2 == made.predicted_bytes
    assert not made.ragged


def test_biases_of_the_down_projection_stay(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "gpt-oss", "gpt_oss")
    lost = 0
    for name, info in Checkpoint.open(model).tensors.items():
        if ".experts." in name and not name.endswith("down_proj_bias"):
            lost += info.num_bytes * 2 // 3
    made = plan(model, recipe="easy-slim", width=8)
    assert made.predicted_bytes == made.original_bytes - lost


def test_a_budget_gets_the_widest_experts_that_fit(olmoe: Path) -> None:
    for width in (8, 16, 24):
        exact = expected_bytes(olmoe, LAYERS * EXPERTS * width)
        assert plan(olmoe, recipe="easy-slim", budget=exact).layers[0].width == width
        if width > 8:
            assert plan(olmoe, recipe="easy-slim", budget=exact - 1).layers[0].width == width - 8
    with pytest.raises(Infeasible, match=r"by slimming experts: the least that can be written, width 8, takes"):
        plan(olmoe, recipe="easy-slim", budget="1KiB")


def test_widths_that_cannot_be_are_refused_with_the_nearest(olmoe: Path, deepseek: Path) -> None:
    for width in (0, -1, 25):
        with pytest.raises(Infeasible, match=f"--width {width} is out of range: experts are 24 wide; choose 1 to 24"):
            plan(olmoe, recipe="easy-slim", width=width)
    with pytest.raises(Infeasible, match=r"a multiple of 8; nearest widths that are: 8, 16"):
        plan(olmoe, recipe="easy-slim", width=12)
    with pytest.raises(Infeasible, match=r"n_shared_experts = 1 x 24, which 16 does not divide"):
        plan(deepseek, recipe="easy-slim", keep=0.7)


def test_a_wish_for_the_other_kind_of_recipe_names_the_way_out(olmoe: Path) -> None:
    with pytest.raises(InputError, match=r"slims experts and leaves their number alone; .*--width, --budget, --params"):
        plan(olmoe, recipe="heapr", experts=4)
    with pytest.raises(InputError, match=r"leaves their width alone; .*--keep, --experts, --budget, --params.*heapr"):
        plan(olmoe, recipe="reap", width=8)
    with pytest.raises(InputError, match=r"got \['keep', 'width'\]"):
        plan(olmoe, recipe="heapr", keep=0.5, width=8)
    with pytest.raises(Infeasible, match="heapr keeps all experts, so there is nothing to map"):
        plan(olmoe, recipe="heapr", keep=0.5, router="map")


def slow_widths(profile: Profile, count: int) -> list[list[int]]:
    """Count, in each expert, how many of the `count` neurons of highest score in the whole model it has."""
    ranked = []
    for layer in range(LAYERS):
        scores_EF = heapr_scores({name: profile.sum(layer, name) for name in profile.statistics[layer]})
        ranked += [(-float(scores_EF[e, f]), layer, e) for e in range(EXPERTS) for f in range(WIDTH)]
    widths = [[0] * EXPERTS for _ in range(LAYERS)]
    for _, layer, expert in sorted(ranked)[:count]:
        widths[layer][expert] += 1
    return widths


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("target", [{"keep": 0.5}, {"width": 5}, {"keep": 1.0}])
def test_one_ranking_over_all_layers_gives_every_expert_its_width(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, scale: float, target: dict[str, Any]
) -> None:
    profile = with_gradients(olmoe_profile, scale)
    made = plan(olmoe, profile, recipe="heapr-ragged", **target)
    mean = target.get("width") or round(target["keep"] * WIDTH)
    count = LAYERS * EXPERTS * mean
    if scale:
        assert [list(size.widths or ()) for size in made.layers] == slow_widths(profile, count)
    assert sum(sum(size.widths or ()) for size in made.layers) == count
    assert made.ragged
    assert made.predicted_bytes == expected_bytes(olmoe, count)
    assert Plan.load(made.save(tmp_path / "plan.json")) == made


def test_a_ragged_result_uses_a_budget_to_the_last_neuron(olmoe: Path, olmoe_profile: Profile) -> None:
    profile = with_gradients(olmoe_profile)
    neuron = 3 * 32 * 2  # gate, up and down, hidden size 32, bfloat16
    exact = expected_bytes(olmoe, 100)
    for budget, count in ((exact, 100), (exact + neuron - 1, 100), (exact - 1, 99)):
        made = plan(olmoe, profile, recipe="heapr-ragged", budget=budget)
        assert sum(sum(size.widths or ()) for size in made.layers) == count
        assert made.predicted_bytes == expected_bytes(olmoe, count) <= budget
    with pytest.raises(Infeasible, match=r"without any expert the model takes"):
        plan(olmoe, profile, recipe="heapr-ragged", budget=expected_bytes(olmoe, 0) - 1)


def test_a_ragged_plan_needs_a_profile_with_gradients(olmoe: Path, olmoe_profile: Profile) -> None:
    with pytest.raises(InputError, match="give a profile that was made with --gradients"):
        plan(olmoe, recipe="heapr-ragged", keep=0.5)
    with pytest.raises(InputError, match=r"needs channel_gradient.*--gradients"):
        plan(olmoe, olmoe_profile, recipe="heapr-ragged", keep=0.5)


def test_a_family_that_stores_all_experts_in_one_tensor_cannot_be_ragged(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "gpt-oss", "gpt_oss")
    with pytest.raises(Infeasible, match=r"stores all experts of a layer in one tensor.*use the uniform form"):
        plan(model, recipe="heapr-ragged", keep=0.5)


def test_a_model_that_predicts_no_token_has_no_gradient(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "labels", "openai_privacy_filter")
    with pytest.raises(ArchitectureMismatch, match=r"TokenClassification predicts no next token, .* such as easy-slim"):
        plan(model, recipe="heapr", width=8)
    assert plan(model, recipe="easy-slim", width=8).layers[0].width == 8


def part_bytes(model: Path) -> tuple[int, int, int]:
    """By this one family's names: bytes of all but experts and routers, of one neuron, of one router row; per layer."""
    held = Checkpoint.open(model).tensors
    experts = sum(info.num_bytes for name, info in held.items() if ".experts." in name)
    rows = sum(info.num_bytes for name, info in held.items() if name.endswith(".gate.weight"))
    total = sum(info.num_bytes for info in held.values())
    return total - experts - rows, experts // (LAYERS * EXPERTS * WIDTH), rows // (LAYERS * EXPERTS)


@pytest.mark.parametrize("keep", [0.2, 0.375, 0.5, 0.75, 0.9])
def test_as_many_parts_stay_as_take_no_more_bytes_than_whole_experts(olmoe: Path, keep: float) -> None:
    made = plan(olmoe, recipe="coterie-local", keep=keep)
    rest, neuron, row = part_bytes(olmoe)
    whole = round(keep * EXPERTS) * (WIDTH * neuron + row)
    count = whole // (8 * neuron + row)
    assert [(size.num_experts, size.width) for size in made.layers] == [(count, 8)] * LAYERS
    assert [size.top_k for size in made.layers] == [min(count, 6, max(1, round(1.25 * 2 * count / EXPERTS)))] * LAYERS
    assert made.predicted_bytes == rest + LAYERS * count * (8 * neuron + row)
    assert made.predicted_bytes <= plan(olmoe, recipe="reap", experts=max(2, round(keep * EXPERTS))).predicted_bytes


def test_a_budget_gets_the_most_parts_that_fit(olmoe: Path) -> None:
    rest, neuron, row = part_bytes(olmoe)
    for count in (1, 5, 17):
        budget = rest + LAYERS * count * (8 * neuron + row)
        assert plan(olmoe, recipe="coterie-local", budget=budget).layers[0].num_experts == count
        assert plan(olmoe, recipe="coterie-local", budget=budget + 1).predicted_bytes == budget
    with pytest.raises(Infeasible, match="the least that can be routed, 1 of width 8, takes"):
        plan(olmoe, recipe="coterie-local", budget=rest)

    for name, target in (("coterie-bits", {}), ("coterie-bits-width", {"target": "packed"})):
        made = plan(olmoe, recipe="coterie", budget=rest * 2, **target)
        assert (made.recipe, made.types) == (name, plan(olmoe, budget=rest * 2, **target).types)


def test_all_of_the_bytes_leave_experts_whole(olmoe: Path) -> None:
    for target in ({"keep": 1.0}, {"budget": "1GiB"}):
        assert plan(olmoe, recipe="coterie-local", **target).layers == (LayerPlan(num_experts=EXPERTS),) * LAYERS  # type: ignore[arg-type]


def test_groups_share_the_parts_out(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "groups", "deepseek_v3", n_group=4, topk_group=2)
    for keep in (0.5, 0.7):
        size = plan(model, recipe="coterie", keep=keep).layers[0]
        assert size.num_experts % 4 == 0
        assert size.top_k is not None
        assert size.top_k <= size.num_experts // 2


@pytest.mark.parametrize(
    ("model_type", "size"),
    [
        ("phimoe", LayerPlan(num_experts=8, width=8)),  # chooses a fixed number of experts
        ("gemma4_text", LayerPlan(num_experts=8, width=8)),  # blocks do not run by themselves
        ("jamba", LayerPlan(num_experts=4)),  # one width for experts and dense blocks
    ],
)
def test_families_whose_experts_cannot_be_cut_get_what_they_can(
    tmp_path: Path, model_type: str, size: LayerPlan
) -> None:
    model = tiny_checkpoint(tmp_path / model_type, model_type)
    assert plan(model, recipe="coterie", keep=0.5).layers[0] == size


@pytest.mark.parametrize("target", [{"experts": 4}, {"width": 8}])
def test_parts_are_not_counted_by_the_user(olmoe: Path, target: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"cuts experts into parts .*say how small with --keep, --budget, --params or"):
        plan(olmoe, recipe="coterie", **target)


@pytest.mark.parametrize("recipe", ["reap", "easy-slim", "coterie"])
def test_parameters_are_a_target_and_what_one_token_uses_too(
    recipe: str, tiny: Any, text_folder: Path, tmp_path: Path
) -> None:
    """The least of two results of which one parameter less would ask for the smaller, counted in what was written."""
    model = tiny("qwen3_moe")
    small, large = (plan(model, recipe=recipe, keep=keep).predicted_parameters for keep in (0.5, 1.0))
    assert plan(model, recipe=recipe, params=large).predicted_parameters == large
    below = plan(model, recipe=recipe, params=str(large - 1))
    assert small <= below.predicted_parameters < large
    assert plan(model, recipe=recipe, params=below.predicted_parameters).layers == below.layers
    with pytest.raises(Infeasible, match=r"--params 10 cannot be met by .*: the least .*, takes .* parameters$"):
        plan(model, recipe=recipe, params=10)
    whole = inspect(model).active_parameters
    assert plan(model, recipe=recipe, active_params=whole).predicted_parameters == large
    if recipe == "reap":  # a token chooses as many experts as before
        return
    fewer = plan(model, recipe=recipe, active_params=whole - 1)
    assert fewer.predicted_parameters < large
    out = compress(
        model, tmp_path / "out", recipe=recipe, active_params=whole - 1, text=text_folder, tokens=256, seq_len=32,
        **({"effort": "fast"} if recipe == "coterie" else {}),
    ).out  # fmt: skip
    used = inspect(out).active_parameters
    assert used < whole
    assert plan(model, recipe=recipe, active_params=used).layers == fewer.layers
    assert plan(model, recipe=recipe, active_params=used - 1).layers != fewer.layers


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "mixtral", "qwen2_moe", "olmoe"])
def test_what_a_token_uses_is_counted_as_inspect_does(family: str, tiny: Any) -> None:
    model = tiny(family)
    source = Source.open(model)
    layers = source.architecture.layers
    whole = [LayerPlan(num_experts=layer.num_experts) for layer in layers]
    counted = source.sizing(keeps_rows=False).num_active(whole, [layer.top_k for layer in layers])
    assert counted == inspect(model).active_parameters


def test_bits_have_nothing_to_do_with_the_number_of_parameters(olmoe: Path) -> None:
    with pytest.raises(InputError, match=r"coterie-bits stores weights .*; say how small with --bits or --budget"):
        plan(olmoe, recipe="coterie-bits", params="1M")
    with pytest.raises(InputError, match="'many' is no number of parameters; write a number like 15B"):
        plan(olmoe, params="many")
    with pytest.raises(InputError, match=r"exactly one of .*--active-params.*got \['params', 'active_params'\]"):
        plan(olmoe, params=1, active_params=1)
