"""How alike the router scores of two experts are over tokens: the similarity of M-SMoE (2310.01334) and REAM."""

from collections.abc import Mapping

from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``logit_sum`` (E,) and ``logit_product`` (E, E): the sums of l_te and l_te l_te' over all tokens.

    Cosine and correlation of the columns of the T x E matrix of router scores follow from these. Nothing when the
    model records no router scores.
    """
    if observation.logits_TE is None:
        return {}
    logits_TE = observation.logits_TE.double()
    return {"logit_sum": logits_TE.sum(0), "logit_product": logits_TE.T @ logits_TE}
