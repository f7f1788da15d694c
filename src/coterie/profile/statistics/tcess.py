"""How high the router scores each expert where it is one of a token's candidates: TCESS of PreMoe (2505.17639)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation, *, candidates: int | None = None, threshold: float = 0.0) -> Mapping[str, Tensor]:
    """Return ``tcess`` (E,): the sum of the router score l_te over the tokens where e is a candidate.

    And ``tcess_tokens`` (E,): the number of these tokens. Nothing when the model records no router scores. Candidates
    are looked for among the experts that the model really chose, so correction biases and group limits are respected;
    for a router without them the K chosen experts are the K with the highest score.

    Args:
        observation: a batch.
        candidates: the paper's k_a: so many of the chosen experts, those with the highest score; all K when None.
        threshold: the paper's r: only where the softmax over the candidates' scores is at least this.
    """
    if observation.logits_TE is None:
        return {}
    num_experts = observation.layer.num_experts
    padded_TE = torch.nn.functional.pad(observation.logits_TE.double(), (0, 1), value=-torch.inf)
    index_TK = observation.index_TK.clamp(max=num_experts)
    score_TK, order_TK = padded_TE.gather(1, index_TK).sort(dim=1, descending=True, stable=True)
    index_TK = index_TK.gather(1, order_TK)[:, :candidates]
    score_TK = score_TK[:, :candidates]
    counts_TK = (index_TK < num_experts) & (score_TK.softmax(1).nan_to_num() >= threshold)
    index_TK = index_TK.masked_fill(~counts_TK, num_experts)

    def total(value_TK: Tensor) -> Tensor:
        sums = torch.zeros(num_experts + 1, dtype=torch.float64, device=value_TK.device)
        return sums.index_add_(0, index_TK.reshape(-1), value_TK.double().reshape(-1))[:num_experts]

    return {"tcess": total(score_TK.masked_fill(~counts_TK, 0.0)), "tcess_tokens": total(counts_TK)}
