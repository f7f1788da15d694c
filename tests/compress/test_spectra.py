"""The exponent of a spectrum's tail against Hill's formula in float64, and against tails that are known."""

import math

import numpy as np
import pytest
import torch

import coterie.compress.spectra as spectra
from coterie.compress.allocators.alphaq import stacked_keys
from coterie.compress.allocators.expert_types import by_matrix
from coterie.compress.source import Source
from coterie.compress.spectra import Spectra, tail_exponent
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint


def slow(matrix, window):
    """Hill's estimate from eigenvalues of W^T W, window by window."""
    rows, columns = matrix.shape
    blocks = [matrix]
    if rows >= window and columns >= window:
        blocks = [
            matrix[r : r + window, c : c + window]
            for r in range(0, rows - window + 1, window)
            for c in range(0, columns - window + 1, window)
        ]
    values = []
    for block in blocks:
        gram = block.T @ block if block.shape[0] >= block.shape[1] else block @ block.T
        values += list(np.linalg.eigvalsh(gram))
    values = sorted(values, reverse=True)
    k = max(1, min(max(10, int(0.1 * len(values))), len(values) - 1))
    return 1 + k / sum(math.log(value / values[k]) for value in values[:k])


@pytest.mark.parametrize("shape", [(40, 30), (64, 64), (70, 200), (130, 65), (20, 500), (5, 9)])
def test_it_is_hills_estimate_of_the_eigenvalues_of_all_windows(shape, monkeypatch):
    monkeypatch.setattr(spectra, "WINDOW", 32)
    matrix = np.random.default_rng(sum(shape)).standard_t(4, shape)
    assert tail_exponent(torch.tensor(matrix)) == pytest.approx(slow(matrix, 32), rel=1e-6)


def test_of_many_windows_as_many_are_looked_at_as_may_be(monkeypatch):
    monkeypatch.setattr(spectra, "WINDOW", 8)
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    every = tail_exponent(matrix)
    monkeypatch.setattr(spectra, "WINDOWS", 16)
    few = tail_exponent(matrix)
    assert few != every
    assert few == pytest.approx(every, rel=0.3)


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_a_spectrum_with_a_power_law_has_its_exponent(exponent):
    """Eigenvalues at the quantiles of a density that falls like their power."""
    count = 1000
    values = ((np.arange(count) + 0.5) / count) ** (-1 / (exponent - 1))
    matrix = torch.diag(torch.tensor(np.sqrt(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "WINDOW", count + 1)
        assert tail_exponent(matrix) == pytest.approx(exponent, rel=0.03)


def test_scale_does_not_matter_and_heavier_tails_have_smaller_exponents():
    generator = np.random.default_rng(0)
    light, heavy = generator.normal(size=(128, 128)), generator.standard_t(2, (128, 128))
    assert tail_exponent(torch.tensor(7 * light)) == pytest.approx(tail_exponent(torch.tensor(light)))
    assert tail_exponent(torch.tensor(heavy)) < tail_exponent(torch.tensor(light))
    assert tail_exponent(torch.zeros(4, 4)) > 1


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_every_matrix_of_experts_is_measured_as_it_is_stored(family, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", family, intermediate_size=32)
    source = Source.open(folder)
    groups = by_matrix(source.weights)
    with Stream(source.checkpoint) as stream:
        measured = {
            key: values for _, some in Spectra(stream=stream, groups=groups).measure() for key, values in some.items()
        }
        expected = {}
        for group in groups:
            tensor = stream.read(group.key).double()
            keys = stacked_keys(group.key, tensor.shape) or [group.key]
            matrices = tensor if tensor.dim() == 3 else tensor[None]
            expected |= dict(zip(keys, matrices, strict=True))
    assert measured.keys() == expected.keys()
    for key, matrix in expected.items():
        assert measured[key]["alpha"] == pytest.approx(slow(matrix.numpy(), 128), rel=1e-3)
        assert measured[key]["variance"] == pytest.approx(float(matrix.var(correction=0)), rel=1e-5)
