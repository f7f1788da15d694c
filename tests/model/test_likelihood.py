import math

import pytest
import torch

from coterie.model.stream import likelihood
from coterie.model.stream.likelihood import perplexity, position_slices, row_slices, token_nll


def slow_nll(logits_BSV, ids_BS):
    found = []
    for logits_SV, ids_S in zip(logits_BSV.double().tolist(), ids_BS.tolist(), strict=True):
        for position in range(len(ids_S) - 1):
            total = math.fsum(math.exp(value) for value in logits_SV[position])
            found.append(math.log(total) - logits_SV[position][ids_S[position + 1]])
    return found


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    logits_BSV = 4 * torch.randn(3, 6, 11, generator=generator)
    return logits_BSV, torch.randint(0, 11, (3, 6), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_nll_is_the_float64_loop(batch, dtype):
    logits_BSV, ids_BS = batch[0].to(dtype), batch[1]
    found = token_nll(logits_BSV, ids_BS)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(slow_nll(logits_BSV, ids_BS), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("elements", [1, 11, 22, 40, 10**6])
def test_chunks_do_not_change_the_result(batch, elements, monkeypatch):
    whole = token_nll(*batch)
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", elements)
    assert torch.equal(token_nll(*batch), whole)


def test_no_temporary_exceeds_the_bound(batch, monkeypatch):
    sizes = []
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 25)
    monkeypatch.setattr(likelihood, "widened", lambda logits: sizes.append(logits.numel()) or logits.float())
    token_nll(*batch)
    assert max(sizes) == 22
    assert sum(sizes) == 3 * 5 * 11


@pytest.mark.parametrize(("rows", "columns", "bound"), [(0, 5, 9), (1, 5, 1), (7, 5, 10), (8, 5, 10), (3, 1, 100)])
def test_row_slices_cover_every_row_once(rows, columns, bound, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", bound)
    covered = [row for piece in row_slices(rows, columns) for row in range(rows)[piece]]
    assert covered == list(range(rows))


def test_perplexity_of_uniform_predictions_is_the_vocabulary():
    ids_BS = torch.zeros(2, 4, dtype=torch.int64)
    nll_T = token_nll(torch.zeros(2, 4, 37), ids_BS)
    assert perplexity(float(nll_T.double().sum()), len(nll_T)) == pytest.approx(37, rel=1e-6)


def test_perplexity_beyond_a_float_is_infinite():
    assert perplexity(1e6, 10) == math.inf
    assert perplexity(math.inf, 10) == math.inf


@pytest.mark.parametrize(("positions", "bound"), [(1, 1), (7, 1), (7, 60), (7, 90), (7, 10**6), (0, 60), (31, 100)])
def test_position_slices_cover_every_position_once_within_the_bound(positions, bound, monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_ELEMENTS", bound)
    pieces = list(position_slices(positions, 3, 10))
    assert [place for piece in pieces for place in range(positions)[piece]] == list(range(positions))
    # One more position than the piece has must fit too, unless not even two do.
    assert all(3 * 10 * (piece.stop - piece.start + 1) <= max(bound, 60) for piece in pieces)


def test_a_small_batch_is_one_piece():
    assert list(position_slices(511, 8, 4096)) == [slice(0, 511)]
    assert len(list(position_slices(511, 8, 4097))) == 2
