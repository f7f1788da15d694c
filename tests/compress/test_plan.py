import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.compress.decide import plan
from coterie.compress.plan import Plan
from coterie.errors import (
    ArchitectureMismatch,
    CorruptArtifact,
    Infeasible,
    InputError,
    StaleArtifact,
    UnknownName,
    UnsupportedDtype,
)
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.profile import Profile
from coterie.testing import tiny_checkpoint

mergemoe_plan = functools.partial(plan, recipe="mergemoe")


def expected_bytes(model: Path, count: int, *, router: bool = True) -> int:
    """Slow: every tensor whose name on disk says experts or the router's gate, by its own rule for this one family."""
    total = 0
    for name, info in Checkpoint.open(model).tensors.items():
        if ".experts." in name:
            total += info.num_bytes if int(name.split(".experts.")[1].split(".")[0]) < count else 0
        elif name.endswith("mlp.gate.weight") and router:
            total += info.num_bytes * count // 8
        else:
            total += info.num_bytes
    return total


@pytest.mark.parametrize(("keep", "count"), [(1.0, 8), (0.5, 4), (0.25, 2), (0.3, 2), (0.4, 3)])
def test_keep_is_a_share_of_the_experts(olmoe: Path, keep: float, count: int) -> None:
    made = mergemoe_plan(olmoe, keep=keep)
    assert [size.num_experts for size in made.layers] == [count, count]
    assert made.predicted_bytes == expected_bytes(olmoe, count)
    assert made.original_bytes == expected_bytes(olmoe, 8)
    assert made.predicted_parameters * 2 == made.predicted_bytes  # bfloat16 throughout


def test_a_mapped_router_keeps_its_rows(olmoe: Path) -> None:
    assert mergemoe_plan(olmoe, keep=0.5, router="map").predicted_bytes == expected_bytes(olmoe, 4, router=False)


def test_a_budget_gets_the_most_experts_that_fit(olmoe: Path) -> None:
    for count in (2, 5, 8):
        exact = expected_bytes(olmoe, count)
        assert mergemoe_plan(olmoe, budget=exact).layers[0].num_experts == count
        if count > 2:
            assert mergemoe_plan(olmoe, budget=exact - 1).layers[0].num_experts == count - 1


def test_a_budget_below_the_floor_says_what_the_floor_is(olmoe: Path) -> None:
    with pytest.raises(
        Infeasible, match=r"budget of 1\.00 KiB cannot be met .* the least that can be routed, 2 a layer"
    ):
        mergemoe_plan(olmoe, budget="1KiB")


@pytest.mark.parametrize("keep", [0.0, -0.5, 2.0, float("nan")])
def test_a_share_out_of_range_is_refused(olmoe: Path, keep: float) -> None:
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        mergemoe_plan(olmoe, keep=keep)


def test_fewer_experts_than_top_k_are_refused_with_the_nearest(olmoe: Path) -> None:
    with pytest.raises(Infeasible, match=r"every token chooses 2 experts; nearest that can: 2, 3"):
        mergemoe_plan(olmoe, experts=1)


@pytest.mark.parametrize("experts", [0, -1, 9])
def test_counts_out_of_range_are_refused(olmoe: Path, experts: int) -> None:
    with pytest.raises(Infeasible, match="choose 1 to 8"):
        mergemoe_plan(olmoe, experts=experts)


def test_router_groups_must_stay_equal(deepseek: Path) -> None:
    with pytest.raises(Infeasible, match=r"2 groups of equal size; nearest that can: 4, 6"):
        mergemoe_plan(deepseek, experts=5)
    assert mergemoe_plan(deepseek, experts=4).layers[0].num_experts == 4


def test_exactly_one_wish(olmoe: Path) -> None:
    with pytest.raises(InputError, match="--active-params, --bits and --type; got none"):
        mergemoe_plan(olmoe)
    with pytest.raises(InputError, match="got \\['keep', 'experts'\\]"):
        mergemoe_plan(olmoe, keep=0.5, experts=4)


def test_an_unknown_recipe_is_refused(olmoe: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean mergemoe"):
        plan(olmoe, keep=0.5, recipe="mergemo")


def test_a_profile_of_another_model_is_refused(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", "olmoe", seed=1)
    with pytest.raises(StaleArtifact, match="made from another model"):
        mergemoe_plan(other, olmoe_profile, keep=0.5)
    olmoe_profile.save(tmp_path / "profile")
    with pytest.raises(StaleArtifact, match="another model"):
        mergemoe_plan(other, tmp_path / "profile", keep=0.5)
    assert mergemoe_plan(olmoe, tmp_path / "profile", keep=0.5).inputs["text"] == olmoe_profile.text_digest


def test_a_profile_without_what_the_recipe_needs_is_refused(olmoe: Path, olmoe_profile: Profile) -> None:
    poor = replace(
        olmoe_profile,
        statistics=tuple({"usage": entry["usage"]} for entry in olmoe_profile.statistics),
    )
    with pytest.raises(ArchitectureMismatch, match="needs logit_product"):
        plan(olmoe, poor, keep=0.5, recipe="m-smoe")


def test_experts_in_an_integer_format_are_refused(olmoe: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "int8"
    shutil.copytree(olmoe, copy)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if ".experts." in name)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, copy / "model.safetensors")
    with pytest.raises(UnsupportedDtype, match=rf"{name} is stored as I8"):
        mergemoe_plan(copy, keep=0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.pop("layers"), "layers is missing"),
        (lambda body: body.update(more=1), "more is 1: no such field is known"),
        (
            lambda body: body["layers"][0].update(experts=[{"source": 1}]),
            r"layers\[0\].experts\[0\].sources is missing",
        ),
        (
            lambda body: body["layers"][0].update(experts=[{"sources": [1], "size": 2}]),
            r"experts\[0\].size is 2: no such",
        ),
        (
            lambda body: body["layers"][1].update(width=-8),
            r"layers\[1\].width is -8: should be a whole number from 0 on",
        ),
        (lambda body: body["layers"][1].update(width=True), r"layers\[1\].width is True"),
        (lambda body: body.update(router="plane"), "router is 'plane': should be plain or mean or refit or map"),
        (lambda body: body.update(passes=[["select"]]), r"passes\[0\] is \['select'\]: should be a name and an object"),
        (lambda body: body.update(layers="many"), "layers is 'many': should be a list"),
    ],
)
def test_a_plan_that_says_nonsense_is_named_by_file_and_field(
    olmoe: Path, tmp_path: Path, change: Any, says: str
) -> None:
    path = mergemoe_plan(olmoe, keep=0.5).save(tmp_path / "plan.json")
    document = json.loads(path.read_text())
    change(document["body"])
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptArtifact, match=rf"plan\.json: .*{says}"):
        Plan.load(path)


def test_a_plan_survives_a_round_trip(olmoe: Path, tmp_path: Path) -> None:
    made = mergemoe_plan(olmoe, keep=0.5)
    path = made.save(tmp_path / "plan.json")
    assert Plan.load(path) == made
    assert Plan.load(path, inputs=made.inputs) == made
    with pytest.raises(StaleArtifact):
        Plan.load(path, inputs={"model": "0" * 64})
    path.write_text(path.read_text().replace('"num_experts": 4', '"num_experts": "four"', 1))
    with pytest.raises(CorruptArtifact, match=r"layers\[0\].num_experts is 'four': should be a whole number from 0 on"):
        Plan.load(path)
