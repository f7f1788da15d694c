"""Expert patterns: what each domain by itself would keep, saved and read again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coterie.compress.apply import compress
from coterie.compress.patterns import Patterns, patterns
from coterie.compress.recipes import RECIPES
from coterie.errors import ArchitectureMismatch, Infeasible, StaleArtifact, UnknownName
from coterie.profile.profile import Profile
from coterie.profile.run import profile


def test_a_pattern_is_what_tcess_keeps_of_that_domain_alone(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path
) -> None:
    found = patterns(olmoe_profile, 4)
    assert tuple(found.kept) == olmoe_profile.domains
    for domain_index, domain in enumerate(olmoe_profile.domains):
        for layer, kept in enumerate(found.kept[domain]):
            sums = olmoe_profile.by_domain(layer, "tcess")[domain_index].tolist()
            chosen = olmoe_profile.by_domain(layer, "tcess_tokens")[domain_index].tolist()
            order = sorted(range(8), key=lambda e: (chosen[e] == 0, -sums[e]))
            assert list(kept) == sorted(order[:4])
    assert len(set(found.kept.values())) == 2, "the test shows little when the domains agree"


def test_patterns_are_an_artefact(olmoe_profile: Profile, tmp_path: Path) -> None:
    found = patterns(olmoe_profile, 3, score="reap")
    path = found.save(tmp_path / "patterns.json")
    again = Patterns.load(path, inputs={"model": olmoe_profile.model_digest})
    assert again == found
    assert (again.score, again.num_experts) == ("reap", 3)
    with pytest.raises(StaleArtifact):
        Patterns.load(path, inputs={"model": "another"})


def test_the_manifest_of_the_recipe_holds_them(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    result = compress(olmoe, tmp_path / "out", experts=4, recipe="tcess", profile=olmoe_profile)
    assert RECIPES["tcess"].paper == "2505.17639"
    found = patterns(olmoe_profile, 4)
    for index, layer in enumerate(result.manifest.layers):
        kept = layer.notes["select"]["kept_by_domain"]
        assert kept == [list(found.kept[domain][index]) for domain in result.manifest.domains]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_number_that_no_layer_can_keep_is_refused(olmoe_profile: Profile, count: int) -> None:
    with pytest.raises(Infeasible, match=f"{count} experts cannot be kept of 8 where every token chooses 2"):
        patterns(olmoe_profile, count)


def test_groups_share_equally(deepseek: Path, text_folder: Path) -> None:
    measured = profile(deepseek, text=text_folder, tokens=256, seq_len=32, sample_tokens=16)
    groups = measured.layers[0].num_groups
    assert groups > 1
    for layers in patterns(measured, 4).kept.values():
        for kept in layers:
            assert torch.tensor(kept).floor_divide(8 // groups).bincount().tolist() == [4 // groups] * groups
    with pytest.raises(Infeasible, match=f"5 experts cannot be kept of 8 in {groups} groups of equal size"):
        patterns(measured, 5)


def test_what_was_not_measured_or_does_not_exist_is_refused(olmoe_profile: Profile) -> None:
    lean = [{name: value for name, value in held.items() if name != "tcess"} for held in olmoe_profile.statistics]
    with pytest.raises(ArchitectureMismatch, match="tcess"):
        patterns(replace(olmoe_profile, statistics=tuple(lean)), 4)
    with pytest.raises(UnknownName, match="score 'tces'; did you mean tcess"):
        patterns(olmoe_profile, 4, score="tces")
