"""Second moments of what the experts' matrices receive, against loops in float64, and how well they add up.

Legend: E experts, D model width, F expert width, T tokens, K chosen experts.
"""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import InputError, UnknownName
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.calibration import TokenSet
from coterie.profile.collect import Collector, statistics_bytes
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.profile.statistics import (
    MATRICES,
    STATISTICS,
    hessian,
    load_matrix,
    load_statistic,
    over_domains,
    shape_of,
    wanted_statistics,
)
from coterie.profile.sums import BinnedSum
from observations import draw, rows

NAMES = ("hessian_input", "hessian_hidden")


def measured(name, *observations):
    total = torch.zeros(shape_of(name, observations[0].layer), dtype=torch.float32)
    for observation in observations:
        load_matrix(name)(observation, total)
    return total


def in_single_precision(observation):
    """Return the observation as a float32 model would give it, so that an oracle starts from the same numbers."""
    return replace(
        observation, experts=observation.experts.map(lambda tensor: tensor.float()),
        hidden_TD=observation.hidden_TD.float(), weight_TK=observation.weight_TK.float(),
    )  # fmt: skip


def loops(name, observation):
    """Return the matrices in float64, token by token and entry by entry."""
    expected = torch.zeros(shape_of(name, observation.layer), dtype=torch.float64)
    for x_D, index_K, weight_K in zip(
        observation.hidden_TD, observation.index_TK.tolist(), observation.weight_TK.tolist(), strict=True
    ):
        for expert, weight in zip(index_K, weight_K, strict=True):
            if expert >= observation.layer.num_experts:
                continue
            if name == "hessian_input":
                values = x_D.tolist()
            else:
                values = [weight * value for value in observation.experts.hidden(expert, x_D[None])[0].tolist()]
            for row, one in enumerate(values):
                for column, other in enumerate(values):
                    expected[expert, row, column] += one * other
    return expected


def error(found, expected):
    """Return the largest error of an entry in units of 2**-24 sqrt(m_ii m_jj)."""
    scale_EN = expected.diagonal(dim1=1, dim2=2).sqrt()
    scale = scale_EN[:, :, None] * scale_EN[:, None, :]
    assert not (found.double() - expected)[scale == 0].any()
    return float(((found.double() - expected).abs() / scale.clamp(min=1e-300)).max()) * 2**24


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(0, 40), nobody=st.sampled_from([0, 0.4, 1]))
def test_matrices_equal_the_slow_loops(name, seed, num_tokens, nobody):
    observation = in_single_precision(draw(seed, num_tokens=num_tokens, nobody=nobody))
    found = measured(name, observation)
    assert found.dtype == torch.float32
    # Sums of at most 80 products of rounded factors.
    assert error(found, loops(name, observation)) < 80 + 4


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_many_batches_stay_within_what_is_promised(name):
    whole = in_single_precision(draw(0, num_tokens=3000, num_experts=2, nobody=0))
    parts = [rows(whole, slice(start, start + 100)) for start in range(0, 3000, 100)]
    expected = loops(name, whole)
    for chunk in (1, 64, 1024):
        with patch.object(hessian, "_CHUNK", chunk):
            found = measured(name, *parts)
        blocks = 30 * math.ceil(100 / chunk)
        assert error(found, expected) < blocks + min(chunk, 100) + 4, chunk


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 30))
def test_halves_add_up_to_rounding(name, seed, cut):
    whole = in_single_precision(draw(seed, num_tokens=30))
    halves = rows(whole, slice(0, cut)), rows(whole, slice(cut, None))
    apart = sum(measured(name, half) for half in halves)
    together = measured(name, *halves)
    expected = loops(name, whole)
    assert error(apart, expected) < 64
    assert error(together, expected) < 64
    assert torch.equal(apart, apart.transpose(1, 2)), "symmetric to the last bit"


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_counts_only_for_what_the_down_projection_receives(name):
    observation = in_single_precision(draw(1))
    doubled = replace(observation, weight_TK=observation.weight_TK * 2)
    factor = 1 if name == "hessian_input" else 4
    torch.testing.assert_close(measured(name, doubled), factor * measured(name, observation))


def test_the_diagonal_is_the_statistic_by_neuron():
    observation = in_single_precision(draw(2))
    found_EF = measured("hessian_hidden", observation).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found_EF.double(), observation.gated_hidden_square_EF, rtol=1e-5, atol=1e-6)


# --- in a profile -------------------------------------------------------------------------------------------------

SETTINGS = {"tokens": 128, "seq_len": 16, "sample_tokens": 32}


@pytest.fixture(scope="module")
def held(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("matrices") / "profile"
    profile(tiny(), out, text=text, statistics=[*NAMES, "gated_hidden_square", "usage"], **SETTINGS)
    return Profile.load(out)


def test_they_are_measured_only_when_they_are_named(held):
    assert not set(MATRICES) & set(wanted_statistics(gradients=True))
    assert held.asked == ("usage", "gated_hidden_square", "hessian_input", "hessian_hidden")
    assert wanted_statistics(NAMES) == NAMES


def test_a_profile_holds_one_sum_over_all_text(held):
    for layer in held.layers:
        for name in NAMES:
            found = held.sum(layer.index, name)
            assert found.dtype == torch.float32
            assert found.shape == shape_of(name, layer)
            assert torch.equal(found, found.transpose(1, 2))
            assert torch.equal(over_domains(name, found), found)
        diagonal_EF = held.sum(layer.index, "hessian_hidden").diagonal(dim1=1, dim2=2)
        squares_EF = held.sum(layer.index, "gated_hidden_square")
        torch.testing.assert_close(diagonal_EF.double(), squares_EF, rtol=1e-4, atol=1e-7)
        used_E = held.sum(layer.index, "hessian_input").diagonal(dim1=1, dim2=2).sum(1) > 0
        assert torch.equal(used_E, held.sum(layer.index, "usage") > 0)


def test_there_is_no_such_thing_by_domain(held):
    for name in NAMES:
        with pytest.raises(InputError, match=f"{name} is one sum over all text.*ask for its sum"):
            held.by_domain(0, name)
    with pytest.raises(UnknownName, match="hessian_inputs"):
        held.by_domain(0, "hessian_inputs")


def test_profiles_of_two_texts_add_up(held):
    both = held.merge(held)
    for name in NAMES:
        assert torch.equal(both.sum(1, name), 2 * held.sum(1, name))


def test_they_go_through_a_backward_pass_as_well(tiny, text, held):
    found = profile(tiny(), text=text, statistics=[*NAMES, "gradient_energy"], **SETTINGS)
    for name in NAMES:
        torch.testing.assert_close(found.sum(0, name), held.sum(0, name), rtol=1e-4, atol=1e-6)


# --- shapes and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_shapes_are_what_is_measured(tiny, text, model_type):
    folder = tiny(model_type)
    layers = Architecture.of(Checkpoint.open(folder)).layers
    found = profile(folder, text=text, statistics=[*STATISTICS, *MATRICES], **SETTINGS)
    for layer, values in zip(layers, found.statistics, strict=True):
        assert len(values) > len(STATISTICS) - 3
        for name, value in values.items():
            assert value.shape == ((2,) if name in STATISTICS else ()) + shape_of(name, layer), name


def test_the_bytes_that_are_said_are_those_that_are_held():
    seen = draw(0)
    ids_NS = torch.zeros(1, 9, dtype=torch.int64)
    token_set = TokenSet(sequences={"a": ids_NS, "b": ids_NS}, seq_len=9, digest="d")
    names = (*STATISTICS, *MATRICES)
    collector = Collector(token_set, names, seed=0, sample_tokens=4)
    collector.add(1, seen)
    bytes_held = 0
    for name in names:
        value = collector.statistics.exact(name)
        tensors = (value.digits_K, value.place) if isinstance(value, BinnedSum) else (value,)
        bytes_held += sum(tensor.nbytes for tensor in tensors)
    said = statistics_bytes(seen.layer, names, 2)
    adding = 128 * max(load_statistic(name)(seen).numel() for name in STATISTICS)
    assert said == bytes_held + adding
    assert statistics_bytes(seen.layer, NAMES, 2) == 4 * 5 * (4 * 4 + 3 * 3) == statistics_bytes(seen.layer, NAMES, 9)
    assert statistics_bytes(seen.layer, (), 2) == 0
