"""How alike the router scores of two experts are over tokens: the similarity of M-SMoE (2310.01334) and REAM.

Cosine and correlation of the columns of the T x E matrix of router scores follow from these sums.
"""

from torch import Tensor

from coterie.profile.observation import Observation


def logit_sum(observation: Observation) -> Tensor | None:
    """Return the sum of l_te over all tokens, (E,); None when the model records no router scores."""
    return None if observation.logits_TE is None else observation.logits_TE.double().sum(0)


def logit_product(observation: Observation) -> Tensor | None:
    """Return the sum of l_te l_te' over all tokens, (E, E); None when the model records no router scores."""
    if observation.logits_TE is None:
        return None
    logits_TE = observation.logits_TE.double()
    return logits_TE.T @ logits_TE
