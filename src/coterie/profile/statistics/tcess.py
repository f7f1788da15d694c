"""How high the router scores each expert where it is one of a token's candidates: TCESS of PreMoe (2505.17639)."""

import torch
from torch import Tensor

from coterie.profile.observation import Observation


def tcess(observation: Observation, *, candidates: int | None = None, threshold: float = 0.0) -> Tensor | None:
    """Return the sum of the router score l_te over the tokens where e is a candidate, (E,).

    None when the model records no router scores. Candidates are looked for among the experts that the model really
    chose, so correction biases and group limits are respected; for a router without them the K chosen experts are the
    K with the highest score.

    Args:
        observation: a batch.
        candidates: the paper's k_a: so many of the chosen experts, those with the highest score; all K when None.
        threshold: the paper's r: only where the softmax over the candidates' scores is at least this.
    """
    if observation.logits_TE is None:
        return None
    index_TK, score_TK = _candidates(observation, observation.logits_TE, candidates, threshold)
    return _total(observation, index_TK, score_TK)


def tcess_tokens(observation: Observation, *, candidates: int | None = None, threshold: float = 0.0) -> Tensor | None:
    """Return the number of tokens where e is a candidate, see `tcess`, (E,)."""
    if observation.logits_TE is None:
        return None
    index_TK, score_TK = _candidates(observation, observation.logits_TE, candidates, threshold)
    return _total(observation, index_TK, torch.ones_like(score_TK))


def _candidates(
    observation: Observation, logits_TE: Tensor, candidates: int | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return the candidates of each token, E where there is none, and their scores, 0 where there is none."""
    num_experts = observation.layer.num_experts
    padded_TE = torch.nn.functional.pad(logits_TE.double(), (0, 1), value=-torch.inf)
    index_TK = observation.index_TK.clamp(max=num_experts)
    score_TK, order_TK = padded_TE.gather(1, index_TK).sort(dim=1, descending=True, stable=True)
    index_TK = index_TK.gather(1, order_TK)[:, :candidates]
    score_TK = score_TK[:, :candidates]
    counts_TK = (index_TK < num_experts) & (score_TK.softmax(1).nan_to_num() >= threshold)
    return index_TK.masked_fill(~counts_TK, num_experts), score_TK.masked_fill(~counts_TK, 0.0)


def _total(observation: Observation, index_TK: Tensor, value_TK: Tensor) -> Tensor:
    num_experts = observation.layer.num_experts
    total = torch.zeros(num_experts + 1, dtype=torch.float64, device=value_TK.device)
    return total.index_add_(0, index_TK.reshape(-1), value_TK.reshape(-1))[:num_experts]
