import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import InputError
from coterie.evaluate.divergence import compare, token_divergence
from coterie.model.stream import likelihood
from coterie.model.stream.likelihood import token_nll


def softmax(values):
    total = math.fsum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def slow_divergence(base_BSV, logits_BSV):
    divergences, agreements = [], []
    for base_SV, logits_SV in zip(base_BSV.double().tolist(), logits_BSV.double().tolist(), strict=True):
        for base_V, logits_V in list(zip(base_SV, logits_SV, strict=True))[:-1]:
            p, q = softmax(base_V), softmax(logits_V)
            divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agreements.append(p.index(max(p)) == q.index(max(q)))
    return divergences, agreements


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(5)
    base_BSV = 3 * torch.randn(3, 7, 9, generator=generator)
    return base_BSV, base_BSV + 2 * torch.randn(3, 7, 9, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergence_is_the_float64_loop(pair, dtype):
    base_BSV, logits_BSV = (logits.to(dtype) for logits in pair)
    kl_T, agreeing_T = token_divergence(base_BSV, logits_BSV)
    slow_kl, slow_agreeing = slow_divergence(base_BSV, logits_BSV)
    assert kl_T.tolist() == pytest.approx(slow_kl, rel=1e-4, abs=1e-6)
    assert agreeing_T.tolist() == slow_agreeing
    assert True in slow_agreeing
    assert False in slow_agreeing


def test_the_direction_is_from_the_base(pair):
    forward, _ = token_divergence(*pair)
    backward, _ = token_divergence(pair[1], pair[0])
    assert not torch.allclose(forward, backward, rtol=0.05)


def test_a_model_does_not_diverge_from_itself(pair):
    kl_T, agreeing_T = token_divergence(pair[0], pair[0].clone())
    assert torch.equal(kl_T, torch.zeros_like(kl_T))
    assert bool(agreeing_T.all())


def test_a_constant_added_to_all_logits_changes_nothing(pair):
    kl_T, agreeing_T = token_divergence(pair[0], pair[0] + 5)
    assert float(kl_T.max()) < 1e-5
    assert bool(agreeing_T.all())


@settings(deadline=None, max_examples=40)  # the first examples pay for start-up
@given(scale=st.floats(1e-6, 30), noise=st.floats(0, 10), seed=st.integers(0, 2**16))
def test_divergence_is_never_negative(scale, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    base_BSV = scale * torch.randn(1, 4, 33, generator=generator)
    kl_T, _ = token_divergence(base_BSV, base_BSV + noise * torch.randn(1, 4, 33, generator=generator))
    assert bool((kl_T >= 0).all())
    assert bool(kl_T.isfinite().all())


@pytest.mark.parametrize("elements", [1, 9, 20, 10**6])
def test_chunks_do_not_change_the_result(pair, elements, monkeypatch):
    kl_T, agreeing_T = token_divergence(*pair)
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", elements)
    chunked_T, chunked_agreeing_T = token_divergence(*pair)
    torch.testing.assert_close(chunked_T, kl_T, rtol=1e-6, atol=1e-7)
    assert torch.equal(chunked_agreeing_T, agreeing_T)


def test_tokens_that_the_base_masks_out_add_nothing(pair):
    base_BSV, logits_BSV = pair
    expected, _ = token_divergence(base_BSV[..., :8], logits_BSV[..., :8])
    masked_base, masked = base_BSV.clone(), logits_BSV.clone()
    masked_base[..., 8] = masked[..., 8] = -math.inf
    found, _ = token_divergence(masked_base, masked)
    torch.testing.assert_close(found, expected)
    only_base, _ = token_divergence(masked_base, logits_BSV)
    assert bool(only_base.isfinite().all())


def test_a_token_that_only_the_model_masks_out_is_infinitely_far(pair):
    masked = pair[1].clone()
    masked[..., 8] = -math.inf
    kl_T, _ = token_divergence(pair[0], masked)
    assert bool((kl_T == math.inf).all())


def test_another_vocabulary_is_refused_with_both_shapes():
    with pytest.raises(InputError, match=r"\(1, 3, 8\).*\(1, 3, 9\)"):
        token_divergence(torch.zeros(1, 3, 8), torch.zeros(1, 3, 9))


@pytest.mark.parametrize("elements", [1, 20, 10**6])
def test_predictions_that_are_there_compare_as_logits_do(pair, elements, monkeypatch):
    base_BSV, logits_BSV = pair
    ids_BS = torch.randint(9, (3, 7), generator=torch.Generator().manual_seed(1))
    nll_T, base_nll_T = token_nll(logits_BSV, ids_BS), token_nll(base_BSV, ids_BS)
    kl_T, agreeing_T = token_divergence(base_BSV, logits_BSV)
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", elements)
    log_p_BTV, likeliest_BT = base_BSV[:, :-1].log_softmax(-1), base_BSV[:, :-1].argmax(-1)
    for masked in (False, True):
        found = compare(log_p_BTV, likeliest_BT, logits_BSV, ids_BS, masked=masked)
        torch.testing.assert_close(found, (nll_T, base_nll_T, kl_T, agreeing_T), rtol=1e-6, atol=1e-7)


def test_predictions_that_are_there_may_be_masked(pair):
    base_BSV, logits_BSV = pair[0].clone(), pair[1].clone()
    base_BSV[..., 8] = -math.inf
    expected, _ = token_divergence(base_BSV, logits_BSV)
    ids_BS = torch.zeros(3, 7, dtype=torch.int64)
    log_p_BTV = base_BSV[:, :-1].log_softmax(-1)
    _, _, found, _ = compare(log_p_BTV, log_p_BTV.argmax(-1), logits_BSV, ids_BS, masked=True)
    torch.testing.assert_close(found, expected)
    assert bool(found.isfinite().all())


def test_predictions_of_another_vocabulary_are_refused(pair):
    ids_BS = torch.zeros(3, 7, dtype=torch.int64)
    with pytest.raises(InputError, match="scores 8 tokens, the model 9"):
        compare(pair[0][:, :-1, :8], ids_BS[:, :-1], pair[1], ids_BS, masked=False)
