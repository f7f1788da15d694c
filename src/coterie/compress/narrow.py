"""Which hidden neurons an expert keeps, and how the down projection makes good what goes.

Optimal brain surgery (Hassibi and Stork, NIPS 1992) on the columns of a down projection W: with H the mean product of
what comes into it, taking column j out costs |w_j|^2 / [H^-1]_jj once the others are set as is best; they are then the
least-squares fit W_S + W_R H_RS H_SS^-1, S those that stay and R those that go.

Legend: E experts, D model width, F expert width, S neurons that stay, R those that go at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.compress.quantisers.gptq import DAMPING

#: Neurons that go before costs are computed anew: what one could make good of another that goes with it is missed.
AT_ONCE = 8


@torch.no_grad()
def narrowed(down_DF: Tensor, hessian_FF: Tensor, width: int, *, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Take the neurons out that cost least.

    Args:
        down_DF: the down projection.
        hessian_FF: sum or mean of products of what comes into it; not all zeros.
        width: how many stay.
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal.

    Returns:
        The neurons that stay, ascending, and their columns (D, S), float32. Computed in float64.
    """
    hessian_FF = hessian_FF.to(torch.float64)
    eye_FF = torch.eye(len(hessian_FF), dtype=torch.float64, device=hessian_FF.device)
    lower_FF = torch.linalg.cholesky(hessian_FF + damping * hessian_FF.diagonal().mean() * eye_FF)
    inverse_SS, weight_DS = torch.cholesky_inverse(lower_FF), down_DF.to(torch.float64)
    neuron_S = torch.arange(len(hessian_FF), device=hessian_FF.device)
    while len(neuron_S) > width:
        cost_S = weight_DS.square().sum(dim=0) / inverse_SS.diagonal()
        go_R = cost_S.argsort(stable=True)[: min(AT_ONCE, len(neuron_S) - width)]
        stays = torch.ones_like(neuron_S, dtype=torch.bool).index_fill(0, go_R, False)
        # H_RS H_SS^-1 is -[H^-1]_RR^-1 [H^-1]_RS, and the inverse of H_SS a Schur complement of the inverse.
        made_good_RS = torch.linalg.solve(inverse_SS[go_R][:, go_R], inverse_SS[go_R][:, stays])
        weight_DS = weight_DS[:, stays] - weight_DS[:, go_R] @ made_good_RS
        inverse_SS = inverse_SS[stays][:, stays] - inverse_SS[stays][:, go_R] @ made_good_RS
        neuron_S = neuron_S[stays]
    return neuron_S, weight_DS.float()


def largest(down_DF: Tensor, up_FD: Tensor, width: int) -> Tensor:
    """Return the neurons of largest |w_down| |w_up|, ascending: those that stay of an expert that no token chose."""
    size_F = down_DF.double().norm(dim=0) * up_FD.double().norm(dim=1)
    order_F: Tensor = size_F.argsort(descending=True, stable=True)
    return order_F[:width].sort().values
