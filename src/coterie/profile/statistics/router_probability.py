"""How probable the router finds each expert, chosen or not."""

from collections.abc import Mapping

from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``router_probability`` (E,): the sum of softmax(router scores) over all tokens.

    Nothing when the model records no router scores. The softmax is taken of the recorded scores for every family,
    also where the router itself applies a sigmoid: it ranks experts, it is not the routing weight.
    """
    if observation.logits_TE is None:
        return {}
    return {"router_probability": observation.logits_TE.double().softmax(-1).sum(0)}
