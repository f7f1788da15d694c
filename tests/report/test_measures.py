import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from coterie.report import measures

COUNTS_GE = np.array([[8.0, 4.0, 0.0, 4.0], [0.0, 5.0, 10.0, 5.0], [1.0, 1.0, 1.0, 1.0]])


def test_shares_sum_to_one_and_an_empty_domain_has_none() -> None:
    counts_GE = np.array([[3.0, 1.0], [0.0, 0.0]])

    assert measures.shares(counts_GE).tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert measures.even_share(counts_GE).tolist() == [0.75, 0.25]


def test_even_share_ignores_how_many_tokens_a_domain_has() -> None:
    assert measures.even_share(np.array([[100.0, 0.0], [0.0, 1.0]])).tolist() == [0.5, 0.5]


def test_entropy_is_one_for_an_even_and_zero_for_a_single_choice() -> None:
    assert measures.normalised_entropy(np.full(5, 0.2)) == pytest.approx(1.0)
    assert measures.normalised_entropy(np.array([0.0, 1.0, 0.0])) == 0.0
    assert measures.normalised_entropy(np.array([1.0])) == 0.0


def test_mutual_information_equals_the_sum_over_pairs() -> None:
    joint_GE = COUNTS_GE / COUNTS_GE.sum(axis=1, keepdims=True) / len(COUNTS_GE)
    expected = 0.0
    for g, e in itertools.product(range(3), range(4)):
        both, expert, domain = joint_GE[g, e], joint_GE[:, e].sum(), joint_GE[g].sum()
        if both > 0:
            expected += both * math.log2(both / (expert * domain))

    assert measures.mutual_information(COUNTS_GE) == pytest.approx(expected)


def test_mutual_information_reaches_its_limits() -> None:
    assert measures.mutual_information(np.eye(4) * 9) == pytest.approx(2.0)
    assert measures.mutual_information(np.ones((4, 6))) == 0.0
    assert measures.mutual_information(np.ones((1, 6))) == 0.0


def test_chance_information_is_what_independent_counts_show() -> None:
    random = np.random.default_rng(0)
    share_E = random.dirichlet(np.ones(8) * 5)
    drawn = [np.stack([random.multinomial(500, share_E) for _ in range(4)]).astype(float) for _ in range(300)]

    mean = np.mean([measures.mutual_information(counts_GE) for counts_GE in drawn])

    assert measures.chance_information(drawn[0]) == pytest.approx(float(mean), rel=0.1)
    assert measures.chance_information(np.zeros((3, 4))) == 0.0


def test_specialists_are_found_and_rare_experts_do_not_win() -> None:
    counts_GE = np.array([[50.0, 300.0, 1.0, 100.0], [50.0, 0.0, 0.0, 100.0]])

    found = measures.specialists([np.full((2, 4), 10.0), counts_GE], limit=2)

    assert (found[0].layer, found[0].expert, found[0].domain) == (1, 1, 0)
    assert found[0].domain_share == pytest.approx(1.0)
    assert found[0].lift == pytest.approx(2.0)
    assert found[0].share == pytest.approx(300 / 451 / 2)
    assert found[1].expert != 2


def test_no_specialists_where_all_domains_choose_alike() -> None:
    assert measures.specialists([np.full((3, 4), 5.0)], limit=5) == []


def test_similarities_equal_slow_ones(make_run: Callable[..., Any]) -> None:
    profile = make_run().profile()
    mean_ED = profile.sum(1, "mean_output")
    slow = [[float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for b in mean_ED] for a in mean_ED]

    assert np.allclose(measures.output_cosine(profile, 1), slow)


def test_logit_correlation_equals_that_of_the_scores(make_run: Callable[..., Any]) -> None:
    run = make_run()
    logits_TE = np.random.default_rng(5).normal(size=(300, 8)) @ np.random.default_rng(6).normal(size=(8, 8)) + 3.0
    profile = run.profile()
    profile.statistics[0].update(  # type: ignore[attr-defined]
        tokens=torch.tensor([100.0, 200.0]),
        logit_sum=torch.tensor(np.stack([logits_TE[:100].sum(0), logits_TE[100:].sum(0)])),
        logit_product=torch.tensor(np.stack([part.T @ part for part in (logits_TE[:100], logits_TE[100:])])),
    )

    assert np.allclose(measures.logit_correlation(profile, 0), np.corrcoef(logits_TE.T))


def test_an_expert_without_output_is_like_no_other(make_run: Callable[..., Any]) -> None:
    profile = make_run().profile()
    profile.statistics[0]["mean_output"][:, 3] = 0.0

    cosine_EE = measures.output_cosine(profile, 0)

    assert cosine_EE[3].tolist() == [0.0] * 8
    assert np.isfinite(cosine_EE).all()


def test_alike_experts_stand_together() -> None:
    cluster_E = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    similarity_EE = np.where(cluster_E[:, None] == cluster_E[None, :], 0.9, 0.1)
    np.fill_diagonal(similarity_EE, 1.0)

    order = measures.cluster_order(similarity_EE)

    assert sorted(order.tolist()) == list(range(9))
    assert [len(list(group)) for _, group in itertools.groupby(cluster_E[order])] == [3, 3, 3]
    assert measures.cluster_order(np.ones((2, 2))).tolist() == [0, 1]


def test_closest_pair() -> None:
    similarity_EE = np.array([[1.0, 0.2, -0.5], [0.2, 1.0, 0.7], [-0.5, 0.7, 1.0]])

    assert measures.closest_pair(similarity_EE) == (1, 2, 0.7)
