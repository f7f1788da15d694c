"""The plan is executed: as it was made, as it was edited, or it is refused with layer, number and way out."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import tensors_of, weight_digests
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.compress.plan import Plan
from coterie.compress.recipes import Recipe
from coterie.errors import CoterieError, Infeasible, InputError, StaleArtifact, UnknownName
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.testing import tiny_checkpoint
from coterie.testing.conformance import check_result
from some import first


@pytest.fixture(scope="module")
def gradient_profile(olmoe: Path, text_folder: Path) -> Profile:
    return profile(olmoe, text=text_folder, tokens=512, seq_len=64, sample_tokens=256, gradients=True)


def edited(path: Path, change: Any) -> Path:
    """Change the body of a plan's file as somebody with an editor would."""
    document = json.loads(path.read_text())
    change(document["body"])
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("recipe", "router"),
    first(3, [("coterie", "plain"), ("hc-smoe", "map"), ("heapr-ragged", "plain"), ("reap", "plain"),
              ("reap+protect", "plain"), ("heapr", "plain"), ("naee", "refit")]),
)  # fmt: skip
def test_a_saved_plan_gives_the_bytes_of_the_direct_way(
    olmoe: Path, gradient_profile: Profile, tmp_path: Path, recipe: str, router: Any
) -> None:
    options: dict[str, Any] = {"profile": gradient_profile, "effort": "fast"}
    direct = compress(olmoe, tmp_path / "direct", keep=0.5, recipe=recipe, router=router, **options)
    file = plan(olmoe, gradient_profile, keep=0.5, recipe=recipe, router=router).save(tmp_path / "plan.json")
    planned = compress(olmoe, tmp_path / "planned", plan=file, **options)
    assert weight_digests(planned.out) == weight_digests(direct.out)
    assert planned.plan == direct.plan
    assert (planned.out / "config.json").read_bytes() == (direct.out / "config.json").read_bytes()


def test_a_plan_that_names_no_experts_is_completed_when_text_was_measured(
    olmoe: Path, text_folder: Path, tmp_path: Path
) -> None:
    text: dict[str, Any] = {"text": text_folder, "tokens": 512, "seq_len": 64}
    direct = compress(olmoe, tmp_path / "direct", keep=0.5, recipe="reap", **text)
    made = plan(olmoe, keep=0.5, recipe="reap")
    assert [layer.experts for layer in made.layers] == [None, None]
    planned = compress(olmoe, tmp_path / "planned", plan=made.save(tmp_path / "plan.json"), **text)
    assert weight_digests(planned.out) == weight_digests(direct.out)
    assert all(layer.experts is not None for layer in planned.plan.layers)


def test_a_plan_names_what_statistics_are_enough_to_choose(olmoe: Path, gradient_profile: Profile) -> None:
    for recipe in ("reap", "tcess", "coterie", "coterie-ragged"):
        for layer in plan(olmoe, gradient_profile, keep=0.5, recipe=recipe).layers:
            assert layer.experts is not None
            assert len(layer.experts) == layer.num_experts
    for recipe in ("naee", "mergemoe", "heapr"):  # these look at the sample, at weights, or keep all experts
        assert all(layer.experts is None for layer in plan(olmoe, gradient_profile, keep=0.5, recipe=recipe).layers)


def test_the_result_says_what_every_expert_was_made_from(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    result = compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    for layer, entry in zip(result.plan.layers, result.manifest.layers, strict=True):
        assert layer.experts is not None
        for number, expert in enumerate(layer.experts):
            assert list(expert.sources) == [e for e, made in enumerate(entry.expert_map) if made == number]
    check_result(olmoe, result)


def test_experts_that_were_chosen_by_hand_stay(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    kept = {0: [1, 2, 5, 7], 1: [0, 3, 4, 6]}

    def choose(body: dict[str, Any]) -> None:
        for number, experts in kept.items():
            body["layers"][number]["experts"] = [{"sources": [expert]} for expert in experts]

    for recipe in ("reap", "naee", "leave-one-out"):
        made = plan(olmoe, olmoe_profile, experts=4, recipe=recipe).save(tmp_path / f"{recipe}.json")
        result = compress(olmoe, tmp_path / recipe, plan=edited(made, choose), profile=olmoe_profile)
        old, new = tensors_of(olmoe), tensors_of(result.out)
        for layer, experts in kept.items():
            for number, expert in enumerate(experts):
                for part in ("gate", "up", "down"):
                    name = f"model.layers.{layer}.mlp.experts.{{}}.{part}_proj.weight"
                    assert torch.equal(new[name.format(number)], old[name.format(expert)])
            rows = f"model.layers.{layer}.mlp.gate.weight"
            assert torch.equal(new[rows], old[rows][experts])


def test_clusters_that_were_drawn_by_hand_are_merged(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    groups = [(0, 7), (1, 2, 3), (4,), (5, 6)]

    def group(body: dict[str, Any]) -> None:
        body["layers"][1]["experts"] = [{"sources": list(sources)} for sources in groups]

    made = edited(plan(olmoe, olmoe_profile, experts=4, recipe="hc-smoe").save(tmp_path / "plan.json"), group)
    result = compress(olmoe, tmp_path / "out", plan=made, profile=olmoe_profile)
    map_of = result.manifest.layers[1].expert_map
    assert {tuple(e for e in range(8) if map_of[e] == number) for number in range(4)} == set(groups)


def test_widths_that_were_set_by_hand_are_written(olmoe: Path, gradient_profile: Profile, tmp_path: Path) -> None:
    def widen(body: dict[str, Any]) -> None:
        for number, expert in enumerate(body["layers"][0]["experts"]):
            expert["width"] = 3 * number  # 0 to 21

    made = edited(plan(olmoe, gradient_profile, keep=0.5, recipe="heapr-ragged").save(tmp_path / "p.json"), widen)
    result = compress(olmoe, tmp_path / "out", plan=made, profile=gradient_profile)
    new = tensors_of(result.out)
    widths = [len(new[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]) for e in range(8)]
    assert widths == [3 * e for e in range(8)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in new.values()) == result.plan.predicted_bytes


def layers_to(**changes: Any) -> Any:
    return lambda body: body["layers"][1].update(changes)


def one_to(number: int, **changes: Any) -> Any:
    return lambda body: body["layers"][1]["experts"][number].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (layers_to(num_experts=1, experts=[{"sources": [0]}]),
         r"layer 1 .*1 experts a layer cannot be routed.*nearest"),
        (layers_to(num_experts=9, experts=None), r"layer 1 .*9 experts of 8; choose 1 to 8"),
        (layers_to(num_experts=3), r"layer 1 .*num_experts is 3, 4 are named; set it to 4"),
        (layers_to(num_experts=5, experts=[{"sources": [e]} for e in range(5)]),
         r"layer 1 has 5 experts, layer 0 has 4: config.json holds one number .* both 4 or both 5"),
        (layers_to(width=12), r"layer 1 .*width 12 instead of 24 .*nearest widths that are: 8, 16"),
        (layers_to(width=16), r"layer 1 has 16 width, layer 0 has unchanged"),
        (layers_to(protected=[8]), r"layer 1 .*expert 8 is protected, the experts are 0 to 7"),
        (one_to(1, sources=[9]), r"layer 1 .*experts\[1\] is made from 9, the experts are 0 to 7"),
        (one_to(1, sources=[1, 2]), r"layer 1 .*experts\[1\] is made from \[1, 2\]; this recipe makes it from one"),
        (one_to(3, sources=[0]), r"layer 1 .*expert 0 .* comes after expert .* in rising order"),
        (one_to(0, part=1), r"layer 1 .*experts\[0\] is part 1"),
        (one_to(0, width=8), r"layer 1 gives every expert a width of its own, layer 0 does not"),
        (one_to(0, rank=4), r"layer 1 .*experts\[0\] has rank 4; only full rank"),
        (one_to(0, encodings=["F8_E4M3"] * 3), r"layer 1 .*experts\[0\] is to be stored as F8_E4M3; .* stored as BF16"),
        (lambda body: body["layers"].pop(), "the plan has 1 layers, the model 2"),
        (lambda body: body.update(passes=[["selekt", {}]]), "unknown pass 'selekt'; did you mean select"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_layer_and_the_number(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, change: Any, says: str
) -> None:
    made = edited(plan(olmoe, olmoe_profile, experts=4, recipe="reap").save(tmp_path / "plan.json"), change)
    with pytest.raises((Infeasible, InputError, UnknownName), match=says):
        compress(olmoe, tmp_path / "out", plan=made, profile=olmoe_profile)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@given(
    num_experts=st.integers(0, 12), width=st.none() | st.integers(0, 30), top_k=st.none() | st.integers(0, 9),
    sources=st.none() | st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=9),
    part=st.none() | st.integers(0, 3),
)  # fmt: skip
def test_any_layer_is_checked_or_can_be_written(
    plan_of_olmoe: Any, num_experts: int, width: int | None, top_k: int | None, sources: Any, part: int | None
) -> None:
    """Whatever numbers stand in a plan: a foreseen error, or bytes that can be predicted."""
    from coterie.compress.decide import checked

    source, made = plan_of_olmoe
    experts = None if sources is None else tuple(ExpertPlan(sources=tuple(each), part=part) for each in sources)
    layer = LayerPlan(num_experts=num_experts, width=width, top_k=top_k, experts=experts)
    with contextlib.suppress(CoterieError):
        weighed = checked(source, replace(made, layers=(layer, layer)))
        assert weighed.predicted_bytes > 0
        assert source.architecture.routing_problem(num_experts, top_k) is None
        assert experts is None or len(experts) == num_experts


@pytest.fixture(scope="module")
def plan_of_olmoe(olmoe: Path) -> Any:
    from coterie.compress.source import Source

    return Source.open(olmoe), plan(olmoe, keep=0.5, recipe="reap")


def test_a_plan_of_another_model_is_refused(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", "olmoe", seed=1)
    made = plan(other, keep=0.5, recipe="reap")
    with pytest.raises(StaleArtifact, match="the plan was made from another model"):
        compress(olmoe, tmp_path / "out", plan=made, profile=olmoe_profile)


def test_a_plan_leaves_nothing_to_say_beside_it(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    made = plan(olmoe, keep=0.5, recipe="reap")
    for option in ({"keep": 0.5}, {"recipe": "reap"}, {"router": "plain"}, {"budget": "1GiB"}):
        with pytest.raises(InputError, match=rf"the plan says how small and how; leave --{next(iter(option))} out"):
            compress(olmoe, tmp_path / "out", plan=made, profile=olmoe_profile, **option)  # type: ignore[arg-type]


# --- recipes and passes of one's own ------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of somebody else's: a pass that keeps the first experts, and a recipe of it."""
    from coterie.compress.methods.select import keep_experts

    module: Any = ModuleType("somebodys_method")
    module.needs = lambda: ()
    module.keep_first = lambda state, plan: keep_experts(state, torch.arange(plan.num_experts), "keep-first", {})
    module.RECIPE = Recipe(name="first", passes=(("somebodys_method:keep_first", {}),))
    module.NUMBER = 3
    monkeypatch.setitem(sys.modules, "somebodys_method", module)
    return module


def test_a_recipe_of_ones_own_needs_no_fork(olmoe: Path, olmoe_profile: Profile, tmp_path: Path, own: Any) -> None:
    by_name = compress(olmoe, tmp_path / "a", keep=0.5, recipe="somebodys_method:RECIPE", profile=olmoe_profile)
    itself = compress(olmoe, tmp_path / "b", keep=0.5, recipe=own.RECIPE, profile=olmoe_profile)
    made = plan(olmoe, keep=0.5, recipe="somebodys_method:RECIPE").save(tmp_path / "plan.json")
    planned = compress(olmoe, tmp_path / "c", plan=made, profile=olmoe_profile)
    old, new = tensors_of(olmoe), tensors_of(by_name.out)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(new[name], old[name])
    assert weight_digests(by_name.out) == weight_digests(itself.out) == weight_digests(planned.out)
    assert (by_name.manifest.recipe, itself.manifest.recipe) == ("somebodys_method:RECIPE", "first")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("no_such_module:RECIPE", "recipe no_such_module:RECIPE cannot be imported .*No module named 'no_such_module'"),
        ("somebodys_method:NONE", "cannot be imported .*has no attribute 'NONE'"),
        ("somebodys_method:NUMBER", "somebodys_method:NUMBER is a int, not a coterie.compress.recipes.Recipe"),
    ],
)
def test_what_is_no_recipe_is_said(olmoe: Path, own: Any, recipe: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(olmoe, keep=0.5, recipe=recipe)


def test_a_pass_that_does_not_do_what_the_plan_says_is_noticed(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, own: Any
) -> None:
    own.keep_first = lambda state, plan: state
    with pytest.raises(CoterieError, match=r"the passes made 8 experts of width 24, the plan says 4 of width 24"):
        compress(olmoe, tmp_path / "out", keep=0.5, recipe="somebodys_method:RECIPE", profile=olmoe_profile)
    assert not list(tmp_path.iterdir())


def test_plans_survive_json(olmoe: Path, gradient_profile: Profile, tmp_path: Path) -> None:
    for recipe in ("reap+protect", "coterie", "coterie-ragged", "mergemoe"):
        made = plan(olmoe, gradient_profile, keep=0.5, recipe=recipe)
        assert Plan.load(made.save(tmp_path / f"{recipe}.json")) == made
