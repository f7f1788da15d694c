"""Super experts: the rule against slow loops, and that they really stay, through the whole of `compress`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coterie.compress.methods.protect as module
from coterie.compress.apply import compress
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.protect import decide, protect, super_experts
from coterie.compress.state import LayerState, Measured
from coterie.errors import Infeasible, InputError
from coterie.profile.profile import Profile


def slow_super_experts(peaks: list[list[float]]) -> set[tuple[int, int]]:
    flat = [peak for row in peaks for peak in row]
    limit = max(float(np.percentile(flat, 99.5)), max(flat) / 10)
    early = int(0.75 * len(peaks))
    return {(layer, e) for layer in range(early) for e, peak in enumerate(peaks[layer]) if peak > limit}


@given(
    layers=st.integers(1, 9), experts=st.integers(1, 70), spread=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_rule(layers: int, experts: int, spread: float, seed: int) -> None:
    noise_LE = torch.randn(layers, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    peaks_LE = (spread * noise_LE).exp()
    expected = slow_super_experts(peaks_LE.tolist())
    assert {(layer, e) for layer, e in super_experts(peaks_LE).nonzero().tolist()} == expected


def test_both_limits_and_the_last_quarter_count() -> None:
    peaks_LE = torch.ones(8, 100, dtype=torch.float64)
    peaks_LE[1, 7], peaks_LE[5, 3], peaks_LE[6, 2] = 100, 50, 90  # the third is in the last quarter
    peaks_LE[2, 4] = 9.5  # above the percentile, but below a tenth of the largest
    assert super_experts(peaks_LE).nonzero().tolist() == [[1, 7], [5, 3]]
    even_LE = torch.arange(800, dtype=torch.float64).view(8, 100) + 1000  # all above a tenth
    assert not super_experts(even_LE).any(), "the largest are in the last quarter"
    assert super_experts(even_LE.flip(0, 1)).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert not super_experts(torch.zeros(4, 8)).any()


def peaks_of(state: LayerState, *experts: int) -> torch.Tensor:
    peaks_LE = torch.ones(400, state.layer.num_experts, dtype=torch.float64)
    peaks_LE[state.layer.index, list(experts)] = 100.0
    return peaks_LE


def measured(state: LayerState, *experts: int) -> Measured:
    return Measured(statistics={}, by_domain={}, peaks_LE=peaks_of(state, *experts))


def test_the_pass_names_this_layers_and_changes_no_tensor(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=6)
    plan = decide(before.layer, LayerPlan(num_experts=3), measured(before, 1, 4))
    assert plan.protected == (1, 4)
    after = protect(before, plan)
    assert after.protected_E is not None
    assert after.protected_E.tolist() == [False, True, False, False, True, False]
    assert after.notes["protect"] == {"super_experts": [1, 4]}
    assert after.experts is before.experts
    assert after.router is before.router


def test_more_super_experts_than_places_are_refused(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=6, groups=2)
    with pytest.raises(Infeasible, match=r"2 experts of one router group .* only 1 may stay; keep at least 4 experts"):
        decide(before.layer, LayerPlan(num_experts=2), measured(before, 0, 2))
    assert decide(before.layer, LayerPlan(num_experts=2), measured(before, 0, 5)).protected == (0, 5)


def test_what_was_not_measured_in_all_layers_is_refused(state: Callable[..., LayerState]) -> None:
    with pytest.raises(InputError, match="block: super experts are known when every layer of the model was measured"):
        decide(state().layer, LayerPlan(num_experts=4), Measured(statistics={}, by_domain={}))


def test_super_experts_survive_a_whole_compression(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile is changed so that the expert that would go first is a super expert of its layer."""
    seen: list[LayerState] = []

    def watched(state: LayerState, size: LayerPlan) -> LayerState:
        seen.append(state)
        return protect(state, size)

    monkeypatch.setattr(module, "protect", watched)
    plain = compress(olmoe, tmp_path / "plain", experts=4, recipe="reap", profile=olmoe_profile)
    dropped = [layer.expert_map.index(-1) for layer in plain.manifest.layers]
    statistics = [dict(held) for held in olmoe_profile.statistics]
    statistics[0]["output_peak"] = statistics[0]["output_peak"].clone()
    statistics[0]["output_peak"][:, dropped[0]] = torch.tensor([1e6, 5.0])  # of two domains the larger counts
    held = replace(olmoe_profile, statistics=tuple(statistics))
    result = compress(olmoe, tmp_path / "protected", experts=4, recipe="reap+protect", profile=held)
    layers = result.manifest.layers
    assert float(seen[0].statistics["output_peak"].max()) == 1e6
    assert [each.protected for each in result.plan.layers] == [(dropped[0],), ()]
    assert layers[0].expert_map[dropped[0]] >= 0
    assert layers[0].notes["protect"] == {"super_experts": [dropped[0]]}
    assert layers[1].expert_map == plain.manifest.layers[1].expert_map
    assert result.manifest.recipe == "reap+protect"


def test_compressed_inputs_know_no_maximum_of_the_model_and_are_refused_before_any_compute(
    olmoe: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.compress.apply.open_run", lambda *_, **__: pytest.fail("a run began"))
    with pytest.raises(InputError, match="super experts, which are known when every layer of the model was measured"):
        compress(
            olmoe, tmp_path / "out", experts=4, recipe="reap+protect", text=text_folder, tokens=256, seq_len=32,
            inputs="compressed",
        )  # fmt: skip
    assert not list(tmp_path.glob("*out*"))
