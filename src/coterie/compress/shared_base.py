"""Factor the experts of a layer: a base that all of them share, and for each a difference of low rank.

With H_e = X_e^T X_e over what comes into expert e (routing weights in it, so an expert that is chosen often counts
for more), W_e (R, C) is to become B + U_e V_e such that the error of the outputs is small:

    sum over e of  tr( (W_e - B - U_e V_e) H_e (W_e - B - U_e V_e)^T )

For a given base, with L_e L_e^T = H_e, the best factors are those of the truncated SVD of (W_e - B) L_e (Eckart and
Young): with its left singular vectors Q they are U_e = Q and V_e = Q^T (W_e - B). For given factors the best base is

    B = ( sum over e of (W_e - U_e V_e) H_e ) ( sum over e of H_e )^-1

Both take turns, `ROUNDS` times, from factors that are zero; no turn makes the error larger. Then each is rounded, and
the next one found anew for what it became, so that it makes good what rounding did: the base, U_e, and V_e at last,
whose codes are chosen with H_e, as those of any matrix are.

The form is that of D2-MoE (arXiv:2502.17298), which takes the average of the experts weighted by Fisher information for
the base, and a truncated SVD of whitened differences.

Legend: E experts, R rows (outputs), C columns (inputs), S the smaller of both, r rank, N matrices, K bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from coterie.compress.moments import Inputs
from coterie.compress.projections import DOWN, Projections, projections_of
from coterie.compress.quantisers.corrected import RIDGE, wanted
from coterie.compress.quantisers.gptq import DAMPING
from coterie.compress.weights import Weight
from coterie.errors import ArchitectureMismatch
from coterie.model.disk.encodings.shared_base import BASE, LEFT, PLAIN, RIGHT, SharedBaseType, base_name
from coterie.model.threads import each_computed

if TYPE_CHECKING:
    from torch import Tensor

#: How often base and factors take turns.
ROUNDS = 3

#: Chooses codes: bytes (N, R, K), and values (N, R, C), of matrices (N, R, C), what comes into them, and their type.
Rounded = Callable[["Tensor", Inputs, str], "tuple[Tensor, Tensor]"]


def best_factors(difference_RC: Tensor, hessian_CC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (R, r) and V (r, C) with the least tr((D - U V) H (D - U V)^T), float64.

    The sum of the smallest S - r squared singular values of D L is what remains.

    Args:
        difference_RC: D.
        hessian_CC: H, positive definite.
        rank: r, up to the smaller of R and C.
    """
    difference_RC, hessian_CC = difference_RC.double(), hessian_CC.double()
    rows, columns = difference_RC.shape
    if rows <= columns:  # singular vectors on the side with fewer of them
        _, vector_RR = torch.linalg.eigh(difference_RC @ hessian_CC @ difference_RC.T)
        left_Rr = vector_RR[:, rows - rank :]
        return _balanced(left_Rr, left_Rr.T @ difference_RC)
    lower_CC = torch.linalg.cholesky(hessian_CC)
    whitened_RC = difference_RC @ lower_CC
    _, vector_CC = torch.linalg.eigh(whitened_RC.T @ whitened_RC)
    right_Cr = vector_CC[:, columns - rank :]
    back_Cr = torch.linalg.solve_triangular(lower_CC.T, right_Cr, upper=True)
    return _balanced(whitened_RC @ right_Cr, back_Cr.T)


def _balanced(left_Rr: Tensor, right_rC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product of vectors that are as long on both sides, so that scales of neither run out of range."""
    tiny = torch.finfo(torch.float64).tiny
    long_r = (right_rC.norm(dim=1).clamp(min=tiny) / left_Rr.norm(dim=0).clamp(min=tiny)).sqrt()
    return left_Rr * long_r, right_rC / long_r[:, None]


def best_base(weight_ERC: Tensor, hessian_ECC: Tensor, rank: int, *, rounds: int = ROUNDS) -> Tensor:
    """Return a base (R, C), float64, after some rounds in which it takes turns with the factors.

    Args:
        weight_ERC: the experts.
        hessian_ECC: H of each, positive definite.
        rank: r.
        rounds: how often; with one, factors have no say in it.
    """
    hessian_CC = hessian_ECC.double().sum(dim=0)
    base_RC = torch.zeros_like(weight_ERC[0], dtype=torch.float64)
    for number in range(rounds):
        target_RC = torch.zeros_like(base_RC)
        for weight_RC, own_CC in zip(weight_ERC, hessian_ECC, strict=True):
            rest_RC, own_CC = weight_RC.double(), own_CC.double()
            if number:
                left_Rr, right_rC = best_factors(rest_RC - base_RC, own_CC, rank)
                rest_RC = rest_RC - left_Rr @ right_rC
            target_RC += rest_RC @ own_CC
        base_RC = torch.linalg.solve(hessian_CC, target_RC.T).T
    return base_RC


def damped(hessian_ECC: Tensor, damping: float = DAMPING) -> Tensor:
    """Return Hessians (E, C, C) that are positive definite; of an expert that saw nothing, a small identity."""
    mean_E = hessian_ECC.diagonal(dim1=-2, dim2=-1).double().mean(dim=-1)
    usual = float(mean_E.mean()) or 1.0
    added_E = torch.where(mean_E > 0, damping * mean_E, DAMPING * usual)
    eye_CC = torch.eye(hessian_ECC.shape[-1], device=hessian_ECC.device)
    return hessian_ECC + added_E.float()[:, None, None] * eye_CC


def factored(
    weight_ERC: Tensor,
    inputs: Inputs,
    kind: SharedBaseType,
    rounded: Rounded,
    *,
    damping: float = DAMPING,
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    """Return what is stored of experts, by suffix: base (R, K), and factors (E, r, K).

    Args:
        weight_ERC: the experts.
        inputs: what comes into each; where it says how that differs from what came into the original's, the experts are
            corrected for it first (`coterie.compress.quantisers.corrected`).
        kind: what base and factors are to be.
        rounded: chooses the codes of base and right factors, where these are no plain numbers.
        damping: share of the mean of each Hessian's diagonal that is added to the diagonal.
        ridge: the same for the correction.
    """
    hessian_ECC, wanted_ERC = damped(inputs.hessian_NCC, damping), wanted(weight_ERC, inputs, ridge=ridge)
    into = Inputs(hessian_NCC=hessian_ECC, missed_NCC=None, num_tokens=inputs.num_tokens)
    into_all = Inputs(hessian_NCC=hessian_ECC.sum(dim=0)[None], missed_NCC=None, num_tokens=(sum(inputs.num_tokens),))
    base_RC = best_base(wanted_ERC, hessian_ECC, kind.rank).float()
    base_1RK, value_1RC = _stored(base_RC[None], into_all, kind.base, rounded)
    difference_ERC = wanted_ERC - value_1RC
    factors = kind.encoding(weight_ERC.shape[-1]).factors
    experts = range(len(difference_ERC))

    def left_of(expert: int) -> Tensor:
        return best_factors(difference_ERC[expert], hessian_ECC[expert], kind.rank)[0].T.float().cpu()

    left_ErK = factors.pack(torch.stack(each_computed(left_of, experts, difference_ERC.device)))[""]
    left_ErR = factors.unpack({"": left_ErK}).to(difference_ERC.device)
    right_ErC = torch.stack([refitted(left_ErR[expert].T, difference_ERC[expert]) for expert in experts]).float()
    right_ErK, _ = _stored(right_ErC, into, kind.factors, rounded)
    return {BASE: base_1RK[0].cpu(), LEFT: left_ErK, RIGHT: right_ErK.cpu()}


def refitted(left_Rr: Tensor, difference_RC: Tensor) -> Tensor:
    """Return V (r, C), float64, that goes best with a U that was rounded: least squares, whatever comes in."""
    left_Rr = left_Rr.double()
    gram_rr = left_Rr.T @ left_Rr
    ridge = 1e-9 * float(gram_rr.diagonal().mean()) or 1.0  # columns may be zeros
    eye_rr = torch.eye(len(gram_rr), dtype=torch.float64, device=gram_rr.device)
    right_rC: Tensor = torch.linalg.solve(gram_rr + ridge * eye_rr, left_Rr.T @ difference_RC.double())
    return right_rC


def _stored(matrix_NRC: Tensor, inputs: Inputs, name: str, rounded: Rounded) -> tuple[Tensor, Tensor]:
    """Return what is stored of matrices in a type, and their values, float32."""
    if name == PLAIN:
        plain_NRC = matrix_NRC.bfloat16()
        return plain_NRC, plain_NRC.float()
    return rounded(matrix_NRC, inputs, name)


def pack_shared(
    projections: Projections,
    weight: Weight,
    inputs: Mapping[bool, Inputs],
    kind: SharedBaseType,
    rounded: Rounded,
    **options: float,
) -> dict[str, Tensor]:
    """Return what is stored of the experts of a layer that share a base, by stored name.

    Gate and up that lie in one tensor are one matrix: they receive the same.

    Args:
        projections: the experts, and where they lie on disk.
        weight: which of them.
        inputs: what comes into gate and up (False), and into down (True).
        kind: what base and factors are to be.
        rounded: chooses the codes of base and right factors, where these are no plain numbers.
        **options: of the quantiser, see `factored`.

    Raises:
        ArchitectureMismatch: a tensor does not hold one matrix for each expert.
    """
    parts = projections.held[weight.names[0]]
    matrices = projections_of(projections.experts)
    on_disk = projections.bytes_on_disk({part: matrices[part].float() for part in parts}, weight.names)
    rows = [on_disk[name].transpose(weight.axis, -1) for name in weight.names]
    stacked = len(weight.shape) == 3
    weight_ERC = rows[0].contiguous() if stacked else torch.stack(rows)
    experts = [expert for name in weight.names for expert in sorted(projections.experts_in[name])]
    if len(experts) != len(weight_ERC) or len(set(experts)) != len(experts):
        raise ArchitectureMismatch(
            f"{weight.names[0]} {list(weight.shape)} does not hold one matrix for each of {len(set(experts))} experts, "
            "so they can have no base in common; use another recipe, such as gptaq, and please report it"
        )
    of_experts = inputs[parts == {DOWN}].select(experts)
    stored = factored(weight_ERC.to(projections.experts.up_EFD.device), of_experts, kind, rounded, **options)
    named = {base_name(weight.pattern): stored[BASE]}
    for suffix in (LEFT, RIGHT):
        if stacked:
            named[weight.names[0] + suffix] = stored[suffix]
        else:
            named |= {name + suffix: each for name, each in zip(weight.names, stored[suffix], strict=True)}
    return named


def operations(weight: Weight, rank: int) -> float:
    """Return how many multiplications and additions factoring the experts of a layer takes, about."""
    rows, columns = weight.rows, weight.columns
    small = min(rows, columns)
    each = 4 * rows * columns**2 + 2 * rows * columns * (small + 2 * rank) + 15 * small**3
    return float((ROUNDS + 1) * weight.num_matrices * each)


def extra_bytes(weights: Sequence[Weight], workers: int) -> int:
    """Return the memory that factoring takes beside the experts and the sums, for the largest of some weights."""
    most = 0
    for weight in weights:
        matrix, square = weight.rows * weight.columns, max(weight.rows, weight.columns) ** 2
        # The experts in order, as on disk and corrected, and their damped Hessians; one expert at a time in float64.
        alone = 8 * workers * (6 * matrix + 6 * square)
        most = max(most, 4 * weight.num_matrices * (4 * matrix + weight.columns**2) + alone)
    return most
