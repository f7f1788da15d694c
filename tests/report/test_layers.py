from typing import Any

import pytest

from coterie.compress.layer_plan import LayerPlan, ragged_plan
from coterie.model.disk.manifest import LayerEntry
from coterie.report.layers import (
    before_after,
    dropped_experts,
    expert_groups,
    expert_shares,
    experts_left,
    kept_text,
    layer_kind,
    parts_left,
    plan_text,
    share_left,
    short_size,
    size_mark,
    size_text,
)

NOTE = {"segment": {"score": "energy"}}


def layer(**changes: Any) -> LayerEntry:
    """Return a layer of 4 experts of width 12, two for a token, of which nothing changed."""
    fields: dict[str, Any] = {
        "index": 0, "block": "layers.0.mlp", "num_experts_before": 4, "num_experts_after": 4,
        "expert_map": (0, 1, 2, 3), "centres": None, "notes": {}, "width_before": 12, "width_after": 12,
        "widths_after": None, "parts": 1, "top_k_before": 2, "top_k_after": 2,
    }  # fmt: skip
    return LayerEntry(**fields | changes)


def cut_layer(**changes: Any) -> LayerEntry:
    """Return a layer of 5 parts: all 3 of expert 0, none of expert 1, one each of the others."""
    fields: dict[str, Any] = {
        "num_experts_after": 5, "width_after": 4, "parts": 3, "top_k_after": 3,
        "centres": (0, 0, 0, 2, 3), "expert_map": (0, -1, 3, 4),
    }  # fmt: skip
    return layer(**fields | changes)


MERGED = layer(num_experts_after=2, expert_map=(0, 1, 1, 1), centres=(0, 2))
PRUNED = layer(num_experts_after=2, expert_map=(-1, 0, -1, 1), centres=(1, 3))
NARROWER = layer(width_after=8)
FEWER_AND_NARROWER = layer(width_after=6, num_experts_after=2, expert_map=(-1, 0, -1, 1), centres=(1, 3))
RAGGED = layer(widths_after=(12, 0, 3, 9))
CUT = cut_layer()


@pytest.mark.parametrize(
    ("change", "kind", "share", "shares", "left", "dropped"),
    [
        (MERGED, "whole", 0.5, (1, 1, 1, 1), 2, ()),
        (PRUNED, "whole", 0.5, (0, 1, 0, 1), 2, (0, 2)),
        (NARROWER, "narrower", 8 / 12, (8 / 12,) * 4, 4, ()),
        (FEWER_AND_NARROWER, "narrower", 0.25, (0, 0.5, 0, 0.5), 2, (0, 2)),
        (RAGGED, "ragged", 0.5, (1, 0, 0.25, 0.75), 4, ()),
        (CUT, "cut", 20 / 48, (1, 0, 1 / 3, 1 / 3), 3, (1,)),
    ],
)
def test_a_layer_says_how_it_got_smaller(
    change: LayerEntry, kind: str, share: float, shares: tuple[float, ...], left: int, dropped: tuple[int, ...]
) -> None:
    assert layer_kind(change) == kind
    assert share_left([change]) == pytest.approx(share)
    assert expert_shares(change) == pytest.approx(shares)
    assert (experts_left(change), dropped_experts(change)) == (left, dropped)
    # Merging apart, all that is left of the experts is what is in the result.
    if change is not MERGED:
        assert sum(expert_shares(change)) / 4 == pytest.approx(share)


def test_parts_of_an_expert_are_no_group() -> None:
    assert expert_groups(MERGED) == [(0, (0,)), (2, (1, 2, 3))]
    assert expert_groups(CUT) == []
    assert parts_left(CUT) == (3, 0, 1, 1)
    assert (CUT.parts, NARROWER.parts, RAGGED.parts) == (3, 1, 1)


def test_experts_may_be_cut_while_a_token_chooses_as_many() -> None:
    one_each = cut_layer(num_experts_after=4, centres=(0, 1, 2, 3), expert_map=(0, 1, 2, 3), top_k_after=2)
    assert layer_kind(one_each) == "cut"
    # Where a family's experts cannot be cut, the same pass makes them narrower or fewer, whatever it notes.
    assert layer_kind(layer(width_after=4, notes=NOTE)) == "narrower"
    fewer = layer(num_experts_after=2, expert_map=(0, -1, 1, -1), centres=(0, 2), notes=NOTE)
    assert layer_kind(fewer) == "whole"


@pytest.mark.parametrize(
    ("layers", "full", "short", "mark"),
    [
        ([PRUNED], "2 experts a layer", "2 experts", "2"),
        ([PRUNED, layer(num_experts_after=1, expert_map=(0, -1, -1, -1))], "1–2 experts a layer", "1–2 experts", "1–2"),
        ([layer(num_experts_after=1, expert_map=(0, 0, 0, 0))], "1 expert a layer", "1 expert", "1"),
        ([NARROWER], "4 experts a layer, width 8 of 12", "4 experts, width 8", "width 8"),
        ([FEWER_AND_NARROWER], "2 experts a layer, width 6 of 12", "2 experts, width 6", "width 6"),
        (
            [RAGGED, layer(widths_after=(1, 1, 1, 1))],
            "4 experts a layer, width 0–12 of 12, 3.50 on average",
            "4 experts, mean width 3.50",
            "mean width 3.50",
        ),
        (
            [CUT, cut_layer(centres=(0, 0, 0, 2, 2), expert_map=(0, -1, 3, -1))],
            "5 parts of width 4 a layer, from 2–3 of 4 experts, 3 a token",
            "5 parts of width 4",
            "5 parts",
        ),
        ([NARROWER, PRUNED], "58\u202f% of the neurons a layer", "58\u202f% of the neurons", "58\u202f%"),
        ([], "– experts a layer", "– experts", "–"),
    ],
)
def test_sizes_are_named(layers: list[LayerEntry], full: str, short: str, mark: str) -> None:
    assert (size_text(layers), short_size(layers), size_mark(layers)) == (full, short, mark)


@pytest.mark.parametrize(
    ("change", "counts", "also", "kept"),
    [
        (PRUNED, "4 → 2", [], ("2 of 4", "experts in each of 1 layer")),
        (NARROWER, "4 → 4", ["width 12 → 8"], ("8 of 12", "neurons of each of 4 experts in each of 1 layer")),
        (
            FEWER_AND_NARROWER,
            "4 → 2",
            ["width 12 → 6"],
            ("6 of 12", "neurons of each of 2 of 4 experts in each of 1 layer"),
        ),
        (
            RAGGED,
            "4 → 4",
            ["width 12 → 0–12", "mean 6.00"],
            ("50\u202f%", "of the experts' neurons: 0–12 of 12 in each of 4 experts, in 1 layer"),
        ),
        (
            CUT,
            "4 → 5 parts",
            ["width 12 → 4", "2 → 3 a token"],
            ("5 of 12", "parts of width 4, from 3 of 4 experts in each of 1 layer; 3 a token, 2 experts before"),
        ),
    ],
)
def test_what_changed_is_named(change: LayerEntry, counts: str, also: list[str], kept: tuple[str, str]) -> None:
    assert before_after([change]) == (counts, also)
    assert kept_text([change]) == kept


def test_layers_that_shrank_in_different_ways_share_what_they_have_in_common() -> None:
    assert before_after([NARROWER, PRUNED]) == ("4 → 2–4", ["width 12 → 8–12"])
    assert kept_text([NARROWER, PRUNED]) == ("58\u202f%", "of the experts' neurons, in 2 layers")
    assert share_left([]) is None


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([LayerPlan(num_experts=2)] * 2, "2"),
        ([LayerPlan(num_experts=4, width=8)] * 2, "4, width 8"),
        ([ragged_plan((12, 0, 3, 9)), ragged_plan((4,) * 4)],
         "4, width 0–12, mean 5.00"),
        ([LayerPlan(num_experts=5, width=4, top_k=3)] * 2, "5 parts of width 4, 3 a token"),
    ],
)  # fmt: skip
def test_plans_name_width_and_parts(sizes: list[LayerPlan], text: str) -> None:
    assert plan_text(sizes) == text
