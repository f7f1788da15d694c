"""GPTQ against the paper's own words in float64 loops: eliminate one column, then take it out of the inverse."""

import importlib
import threading

import pytest
import torch

from coterie.compress.moments import Inputs
from coterie.compress.quantisers.gptq import gptq, upper_factor
from coterie.model.disk.encodings.block_types import get_layout
from coterie.model.disk.encodings.ggml import SIZES, get_type, rounding
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest

gptq_module = importlib.import_module("coterie.compress.quantisers.gptq")


def problem(columns, rows=5, matrices=1, tokens=None, seed=0):
    """Return weights and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(matrices, columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(matrices, tokens or 2 * columns, columns, generator=generator) @ mix
    return torch.randn(matrices, rows, columns, generator=generator), inputs.mT @ inputs


def inputs(hessian):
    return Inputs(hessian_NCC=hessian, missed_NCC=None, num_tokens=(1,) * len(hessian))


@pytest.fixture
def threads():
    """Return what sets torch's threads; those that were are set again behind the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def loss(weight, value, hessian):
    wrong = (value - weight).double()
    return torch.einsum("nrc,ncd,nrd->n", wrong, hessian.double(), wrong)


def slow_gptq(weight_RC, hessian_CC, kind, damping):
    """Optimal brain surgery (arXiv:2208.11580, eq. 3), column by column, without a Cholesky factor."""
    weight = weight_RC.double().clone()
    columns = weight.shape[1]
    damped = hessian_CC.double() + damping * hessian_CC.double().diagonal().mean() * torch.eye(columns).double()
    pivots, inverse = [], torch.linalg.inv(damped)
    for column in range(columns):  # what is on the diagonal when a column's turn comes
        pivots.append(inverse[column, column].item())
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    inverse = torch.linalg.inv(damped)
    value = torch.zeros_like(weight)
    for column in range(columns):
        if column % kind.block == 0:
            importance = 1 / torch.tensor(pivots[column : column + kind.block])
            block = weight[None, :, column : column + kind.block].float()
            scales = kind.fit(block, importance[None, None].float())
        one = weight[None, :, column : column + 1].float()
        _, chosen = kind.choose(one, scales, column % kind.block, torch.ones(1, 1, 1))
        value[:, column] = chosen[0, :, 0].double()
        wrong = (weight[:, column] - value[:, column]) / inverse[column, column]
        weight = weight - torch.outer(wrong, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return value


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "MXFP4"])
def test_it_is_the_papers_elimination(name):
    weight, hessian = problem(96)
    kind = get_type(name)
    _, value = gptq(weight, inputs(hessian), kind, damping=0.01)
    expected = slow_gptq(weight[0], hessian[0], kind, 0.01)
    different = (value[0].double() - expected).abs() > 1e-5
    # A weight in the middle between two numbers may go either way, and a scale between two of float16's.
    assert not different[:, : kind.block].any()
    assert different.float().mean() < 0.1
    mine, theirs = (loss(weight, values, hessian).item() for values in (value, expected[None]))
    assert mine == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("name", SIZES)
def test_its_bytes_are_its_values_and_its_error_is_smaller(name):
    kind = get_type(name)
    weight, hessian = problem(kind.block if kind.block > 64 else 64, rows=3, matrices=2)
    packed, value = gptq(weight, inputs(hessian), kind)
    blocks = packed.unflatten(-1, (-1, SIZES[name][1]))
    torch.testing.assert_close(kind.unpack(blocks.flatten(1, 2)).view(value.shape), value, rtol=1e-6, atol=0)
    plain_packed, plain = round_to_nearest(weight, hessian.diagonal(dim1=-2, dim2=-1), kind)
    assert plain_packed.shape == packed.shape
    assert (loss(weight, value, hessian) < 0.9 * loss(weight, plain, hessian)).all()


def test_matrices_side_by_side_are_what_they_are_alone():
    kind = get_type("Q4_0")
    weight, hessian = problem(64, matrices=3)
    packed, value = gptq(weight, inputs(hessian), kind)
    for number in range(3):
        alone = gptq(weight[number : number + 1], inputs(hessian[number : number + 1]), kind)
        torch.testing.assert_close(alone[1][0], value[number], rtol=1e-4, atol=1e-5)
        assert (alone[0][0] != packed[number]).float().mean() < 0.02


def test_an_expert_without_tokens_is_rounded_to_the_nearest():
    kind = get_type("Q4_0")
    weight, _ = problem(64)
    packed, value = gptq(weight, inputs(torch.zeros(1, 64, 64)), kind)
    plain_packed, plain = round_to_nearest(weight, torch.ones(1, 64), kind)
    assert torch.equal(packed, plain_packed)
    assert torch.equal(value, plain)


def test_fewer_tokens_than_columns_are_enough():
    kind = get_type("Q4_0")
    weight, hessian = problem(96, tokens=10)
    _, value = gptq(weight, inputs(hessian), kind)
    _, plain = round_to_nearest(weight, hessian.diagonal(dim1=-2, dim2=-1), kind)
    assert torch.isfinite(value).all()
    assert loss(weight, value, hessian)[0] < loss(weight, plain, hessian)[0]


def test_the_factor_is_that_of_the_inverse():
    _, hessian = problem(24)
    upper = upper_factor(hessian, 0.05)[0].double()
    damped = hessian[0].double() + 0.05 * hessian[0].double().diagonal().mean() * torch.eye(24).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(24).double(), rtol=0, atol=1e-4)


def test_columns_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="100 columns are no whole blocks of 256"):
        gptq(torch.zeros(1, 2, 100), inputs(torch.zeros(1, 100, 100)), get_type("Q4_K"))


@pytest.mark.parametrize(("name", "rows"), [("Q4_K", 1200), ("IQ2_XXS", 600), ("Q4_K.W", 1200)])
def test_threads_share_matrices_and_rows_and_change_no_byte(name, rows, threads):
    columns = 192 if name.endswith(".W") else 256
    weight, hessian = problem(columns, rows=rows, matrices=4)
    names, results = set(), []
    choose = rounding.round_columns

    def watched(*args):
        names.add(threading.current_thread().name)
        return choose(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_module, "round_columns", watched)
        for count in (1, 3):
            threads(count)
            results.append(gptq(weight, inputs(hessian), get_layout(name)))
            assert torch.get_num_threads() == count
    assert len(names) >= 2  # this one, and others
    (one, value), (three, other) = results
    assert torch.equal(one, three)
    assert torch.equal(value, other)


def test_an_error_in_a_thread_comes_out_and_threads_are_set_again(threads):
    threads(2)
    weight, hessian = problem(64, rows=4096, matrices=2)
    with pytest.raises(ValueError, match="no whole blocks"):
        gptq(weight, inputs(hessian), get_type("Q4_K"))
    assert torch.get_num_threads() == 2
