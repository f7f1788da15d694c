"""Sums by sequence: where only some tokens count, each sequence has those that are its own."""

import pytest
import torch

from coterie.evaluate.sums import SequenceSums, Sums, base_scores, total_of
from coterie.model.stream.likelihood import counted, counted_lengths


def test_tokens_that_count_go_to_their_sequences():
    source = torch.Generator().manual_seed(0)
    nll_BT, base_BT, kl_BT = torch.rand((3, 4, 9), generator=source, dtype=torch.float64)
    counts_BS = torch.rand((4, 10), generator=source) > 0.5
    counts_BS[2] = False
    ids_BS = torch.zeros(4, 10, dtype=torch.int64)
    sums = Sums()
    for positions in (slice(0, 4), slice(3, 10)):  # each begins with the last one of the slice before it
        taken = slice(positions.start, positions.stop - 1)
        lengths = counted_lengths(ids_BS[:, positions], counts_BS, positions)
        values = (counted(rows_BT[:, taken].flatten(), counts_BS, positions) for rows_BT in (nll_BT, base_BT, kl_BT))
        sums.add_tokens(7, lengths, *values)
    mask_BT = counts_BS[:, 1:]
    assert set(sums.sequences) == {7, 8, 10}
    for number, found in sums.sequences.items():
        mask_T = mask_BT[number - 7]
        expected = [float(rows_BT[number - 7][mask_T].sum()) for rows_BT in (nll_BT, base_BT, kl_BT)]
        assert found.tokens == int(mask_T.sum())
        assert [found.nll, found.base_nll, found.kl] == pytest.approx(expected)
    assert sums.tokens == int(mask_BT.sum()) == sum(each.tokens for each in sums.sequences.values())
    assert sums.nll == pytest.approx(float(nll_BT[mask_BT].sum()))
    assert (sums.base_nll, sums.kl) == pytest.approx((float(base_BT[mask_BT].sum()), float(kl_BT[mask_BT].sum())))


def test_all_tokens_count_where_nothing_else_is_said():
    assert counted_lengths(torch.zeros(3, 5), None, slice(0, 5)) == [4, 4, 4]


def test_the_base_has_its_own_loss_and_answers():
    sums = {"b": Sums(nll=3.0, base_nll=2.0, tokens=2, questions=2, correct=1,
                      sequences={0: SequenceSums(tokens=2, nll=3.0, base_nll=2.0)}),
            "a": Sums(questions=1)}  # fmt: skip
    by_domain = {"b": [1, 2], "a": [3]}
    domains, overall = base_scores(sums, {0, 1}, by_domain)
    assert list(domains) == ["a", "b"]
    assert [domains[name]["accuracy"] for name in ("a", "b")] == [0, 1]
    assert overall["accuracy"] == pytest.approx(2 / 3)
    assert overall["perplexity"] == pytest.approx(2.718281828)
    assert total_of(sums).questions == 3
