"""Parts of a fast training pass over stock models: the same parameters and the same maths, fewer passes over memory.

The stock forward is written for clarity. Here the rows are sorted by expert and multiplied expert by expert in one
autograd function, the loss never holds all logits, and the element-wise parts can be fused by `torch.compile`. The
passes themselves are in families/, one module a model.

Shape suffixes: B batch, S sequence, T = B * S tokens, K top_k, R = T * K routed rows, E experts, D hidden width,
F expert width, G = 2 * F (gate and up), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb  # rotates a part of a head, or all

SORTED = "sorted"


def gated(gate_up_RG: Tensor, weight_R: Tensor) -> Tensor:
    """SwiGLU times the routing weight, in float32 inside.

    Returns: [R, F], in the dtype of `gate_up_RG`.
    """
    gate_RF, up_RF = gate_up_RG.float().chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF * weight_R.float()[:, None]).to(gate_up_RG.dtype)


def gated_backward(gate_up_RG: Tensor, weight_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` for `gate_up_RG` and `weight_R`."""
    gate_RF, up_RF = gate_up_RG.float().chunk(2, dim=-1)
    grad_RF = grad_RF.float()
    sigmoid_RF = torch.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    grad_weight_R = (grad_RF * silu_RF * up_RF).sum(-1)
    grad_RF = grad_RF * weight_R.float()[:, None]
    grad_gate_RF = grad_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    grad_gate_up_RG = torch.cat((grad_gate_RF, grad_RF * silu_RF), dim=-1)
    return grad_gate_up_RG.to(gate_up_RG.dtype), grad_weight_R.to(weight_R.dtype)


def combine(rows_RD: Tensor, position_TK: Tensor) -> Tensor:
    """Sum of the K rows of each token: [T, D]."""
    num_tokens, top_k = position_TK.shape
    picked_TKD = rows_RD[position_TK.reshape(-1)].view(num_tokens, top_k, -1)
    return picked_TKD.sum(1, dtype=torch.float32).to(rows_RD.dtype)


class SortedExperts(torch.autograd.Function):
    """All experts of a layer: sort the routed rows by expert, then one matrix product per expert and weight."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        """Weighted sum of the chosen experts' outputs [T, D]."""
        num_tokens, top_k = index_TK.shape
        num_experts = gate_up_EGD.shape[0]
        order_R = torch.argsort(index_TK.reshape(-1).to(torch.int16), stable=True)
        ends = torch.bincount(index_TK.reshape(-1), minlength=num_experts).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        spans = [(e, starts[e], ends[e]) for e in range(num_experts) if ends[e] > starts[e]]
        token_R = order_R // top_k
        weight_R = weight_TK.reshape(-1)[order_R]
        position_TK = torch.empty_like(order_R)
        position_TK[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        position_TK = position_TK.view(num_tokens, top_k)

        x_RD = x_TD[token_R]
        gate_up_RG = x_TD.new_empty(len(order_R), gate_up_EGD.shape[1])
        for e, start, end in spans:
            torch.mm(x_RD[start:end], gate_up_EGD[e].t(), out=gate_up_RG[start:end])
        hidden_RF = KERNELS["gated"](gate_up_RG, weight_R)
        out_RD = torch.empty_like(x_RD)
        for e, start, end in spans:
            torch.mm(hidden_RF[start:end], down_EDF[e].t(), out=out_RD[start:end])
        ctx.spans = spans
        ctx.save_for_backward(x_RD, gate_up_RG, hidden_RF, weight_R, token_R, position_TK, gate_up_EGD, down_EDF)
        return KERNELS["combine"](out_RD, position_TK)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the routing weights and both expert weights."""
        x_RD, gate_up_RG, hidden_RF, weight_R, token_R, position_TK, gate_up_EGD, down_EDF = ctx.saved_tensors
        grad_out_RD = grad_TD[token_R]
        grad_hidden_RF = torch.empty_like(hidden_RF)
        grad_down_EDF = torch.zeros_like(down_EDF)
        for e, start, end in ctx.spans:
            torch.mm(grad_out_RD[start:end], down_EDF[e], out=grad_hidden_RF[start:end])
            torch.mm(grad_out_RD[start:end].t(), hidden_RF[start:end], out=grad_down_EDF[e])
        grad_gate_up_RG, grad_weight_R = KERNELS["gated_backward"](gate_up_RG, weight_R, grad_hidden_RF)
        grad_x_RD = torch.empty_like(x_RD)
        grad_gate_up_EGD = torch.zeros_like(gate_up_EGD)
        for e, start, end in ctx.spans:
            torch.mm(grad_gate_up_RG[start:end], gate_up_EGD[e], out=grad_x_RD[start:end])
            torch.mm(grad_gate_up_RG[start:end].t(), x_RD[start:end], out=grad_gate_up_EGD[e])
        grad_weight_TK = grad_weight_R[position_TK.reshape(-1)].view(position_TK.shape)
        grad_x_TD = KERNELS["combine"](grad_x_RD, position_TK)
        return grad_x_TD, None, grad_weight_TK, grad_gate_up_EGD, grad_down_EDF


def sorted_experts_forward(
    experts: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`SortedExperts` with the signature of transformers' experts functions."""
    return SortedExperts.apply(hidden_states, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj)


ALL_EXPERTS_FUNCTIONS.register(SORTED, sorted_experts_forward)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden_TD @ weight_VD.T`, a chunk of rows at a time; the gradient is made in forward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        label_T: Tensor,
        chunk: int,
        with_gradient: bool,
    ) -> Tensor:
        """Mean loss in nats; `chunk` is in rows."""
        num_tokens = hidden_TD.shape[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        for start in range(0, num_tokens, chunk):
            hidden_CD, label_C1 = hidden_TD[start : start + chunk], label_T[start : start + chunk, None]
            prob_CV = torch.softmax(hidden_CD @ weight_VD.t(), dim=-1, dtype=torch.float32)
            label_prob_C1 = prob_CV.gather(1, label_C1)
            loss -= label_prob_C1.clamp_min(1e-30).log().sum()
            if not with_gradient:
                continue
            prob_CV.scatter_(1, label_C1, label_prob_C1 - 1)
            grad_CV = prob_CV.to(hidden_TD.dtype)
            grad_hidden_TD[start : start + chunk] = grad_CV @ weight_VD
            grad_weight_VD += grad_CV.t() @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.num_tokens = num_tokens
        ctx.dtype = weight_VD.dtype
        return loss / num_tokens

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and weight."""
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        scale = grad / ctx.num_tokens
        grad_hidden_TD = (grad_hidden_TD * scale).to(grad_hidden_TD.dtype)
        return grad_hidden_TD, (grad_weight_VD * scale).to(ctx.dtype), None, None, None


def attend(score_NSS: Tensor, mask_SS: Tensor, scale: float) -> Tensor:
    """Attention probabilities from raw scores; `mask_SS` is added."""
    return torch.softmax(score_NSS.float() * scale + mask_SS, dim=-1).to(score_NSS.dtype)


def attend_backward(grad_NSS: Tensor, prob_NSS: Tensor, scale: float) -> Tensor:
    """Gradient of `attend` for the scores."""
    wide_NSS = prob_NSS.float()
    product_NSS = grad_NSS.float() * wide_NSS
    return ((product_NSS - wide_NSS * product_NSS.sum(-1, keepdim=True)) * scale).to(prob_NSS.dtype)


class CausalAttention(torch.autograd.Function):
    """Causal attention with plain matrix products, N = B * heads, H head width.

    On a CPU and up to 512 positions this takes half the time of `scaled_dot_product_attention` there, forward and
    backward, although it computes the masked half too.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query_NSH: Tensor, key_NSH: Tensor, value_NSH: Tensor
    ) -> Tensor:
        """Attention output [N, S, H]."""
        length, width = query_NSH.shape[1:]
        mask_SS = torch.full((length, length), -torch.inf, device=query_NSH.device).triu(1)
        prob_NSS = KERNELS["attend"](query_NSH @ key_NSH.mT, mask_SS, width**-0.5)
        ctx.save_for_backward(query_NSH, key_NSH, value_NSH, prob_NSS)
        return prob_NSS @ value_NSH

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_NSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        query_NSH, key_NSH, value_NSH, prob_NSS = ctx.saved_tensors
        grad_NSH = grad_NSH.contiguous()
        grad_NSS = KERNELS["attend_backward"](grad_NSH @ value_NSH.mT, prob_NSS, query_NSH.shape[-1] ** -0.5)
        return grad_NSS @ key_NSH, grad_NSS.mT @ query_NSH, prob_NSS.mT @ grad_NSH


def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [B, heads, S, head width], by the faster of two ways for the device."""
    if query.device.type != "cpu" or query.shape[2] > 512:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    flat = [part.reshape(-1, *part.shape[2:]) for part in (query, key, value)]
    return CausalAttention.apply(*flat).view(query.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of all three models: float32 inside, the weight applied in the dtype of `x`."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


KERNELS: dict[str, Callable] = {
    kernel.__name__: kernel for kernel in (gated, gated_backward, combine, attend, attend_backward, rms_norm)
}


def compile_kernels(*tables: dict[str, Callable]) -> None:
    """Fuse the element-wise parts in `tables` with `torch.compile` (needs a C++ compiler); they agree to rounding."""
    for table in tables:
        for name, kernel in table.items():
            table[name] = torch.compile(kernel, dynamic=False)


def balance_loss(load_LE: Tensor, prob_LE: Tensor) -> Tensor:
    """Load-balancing loss (Switch Transformer, arXiv:2101.03961): E * sum(load * probability), the mean over layers.

    It is transformers' `load_balancing_loss_func`, but taken layer by layer: over all layers at once an expert that
    is idle in one layer would hide behind its namesake in another. top_k is the value of an even load.

    Args:
        load_LE: chosen slots per token, by layer and expert; a row sums to top_k.
        prob_LE: mean router probability.
    """
    return load_LE.shape[1] * (load_LE * prob_LE).sum(1).mean()


def moe_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The MoE blocks of a model, each with a router `gate` and `experts`; dense layers have none."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def measure_load(index_TK: Tensor, num_experts: int) -> Tensor:
    """Chosen slots per token of each expert, [E], float32; the sum is top_k."""
    return torch.bincount(index_TK.reshape(-1), minlength=num_experts).float() / index_TK.shape[0]


@torch.no_grad()
def shrink_outputs(model: PreTrainedModel) -> None:
    """Make the output projections of a model whose every layer has experts small, so that depth does not add up."""
    share = (2 * model.config.num_hidden_layers) ** -0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(share)
        layer.mlp.experts.down_proj.mul_(share)


def head_loss(model: PreTrainedModel, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy in nats, from the hidden states after the last layer."""
    trunk = model.model
    hidden_BSD = KERNELS["rms_norm"](hidden_BSD, trunk.norm.weight, model.config.rms_norm_eps)
    hidden_TD, label_T = hidden_BSD.flatten(0, 1), labels_BS.reshape(-1)
    return ChunkedCrossEntropy.apply(hidden_TD, model.lm_head.weight, label_T, 512, torch.is_grad_enabled())


def qkv(
    hidden_BSD: Tensor,
    norm: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normed head by head and rotated, and values: each [B, heads, S, head width].

    Keys and values are repeated for the queries that share them.
    """
    batch, length, _ = hidden_BSD.shape
    head_width = len(norm_q)
    x_BSD = rms_norm(hidden_BSD, norm, eps)
    query, key, value = (
        F.linear(x_BSD, weight).view(batch, length, -1, head_width) for weight in (weight_q, weight_k, weight_v)
    )
    query, key = rms_norm(query, norm_q, eps), rms_norm(key, norm_k, eps)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.transpose(1, 2).repeat_interleave(groups, 1)
    return query, key, value


def route(
    residual_BSD: Tensor, mixed_BSD: Tensor, weight_o: Tensor, norm: Tensor, router_ED: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output projection, residual, norm and softmax router, whose chosen weights sum to one.

    Returns:
        New residual [B, S, D], the experts' input [T, D], weights [T, K], index [T, K], mean probability [E].
    """
    residual_BSD = residual_BSD + F.linear(mixed_BSD, weight_o)
    x_TD = rms_norm(residual_BSD, norm, eps).flatten(0, 1)
    prob_TE = torch.softmax(F.linear(x_TD, router_ED), dim=-1, dtype=torch.float32)
    weight_TK, index_TK = torch.topk(prob_TE, top_k, dim=-1)
    weight_TK = (weight_TK / weight_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
    return residual_BSD, x_TD, weight_TK, index_TK, prob_TE.mean(0)


def attend(layer: torch.nn.Module, hidden_BSD: Tensor, cos: Tensor, sin: Tensor, eps: float, qkv: Callable) -> Tensor:
    """What attention mixes for every token, before the output projection: [B, S, D]; with a layer's own weights."""
    attention = layer.self_attn
    query, key, value = qkv(
        hidden_BSD,
        layer.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.q_norm.weight,
        attention.k_norm.weight,
        cos,
        sin,
        eps,
    )
    return mix(query, key, value).transpose(1, 2).flatten(2)


def softmax_pass(
    model: PreTrainedModel, tokens_BS: Tensor, labels_BS: Tensor, kernels: dict[str, Callable]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass over a model whose every layer is attention, then `route`, then experts; "qkv" and "route" in `kernels`.

    Returns:
        Mean cross-entropy in nats, mean router probability [layers, E], load [layers, E] (see `balance_loss`).
    """
    config, trunk = model.config, model.model
    eps, num_experts = config.rms_norm_eps, config.num_experts
    hidden_BSD = trunk.embed_tokens(tokens_BS)
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
    cos, sin = trunk.rotary_emb(hidden_BSD, positions)
    probs, loads = [], []
    for layer in trunk.layers:
        moe = layer.mlp
        mixed_BSD = attend(layer, hidden_BSD, cos, sin, eps, kernels["qkv"])
        hidden_BSD, x_TD, weight_TK, index_TK, prob_E = kernels["route"](
            hidden_BSD,
            mixed_BSD,
            layer.self_attn.o_proj.weight,
            layer.post_attention_layernorm.weight,
            moe.gate.weight,
            config.num_experts_per_tok,
            eps,
        )
        probs.append(prob_E)
        loads.append(measure_load(index_TK, num_experts))
        out_TD = SortedExperts.apply(x_TD, index_TK, weight_TK, moe.experts.gate_up_proj, moe.experts.down_proj)
        hidden_BSD = hidden_BSD + out_TD.view(hidden_BSD.shape)
    return head_loss(model, hidden_BSD, labels_BS), torch.stack(probs), torch.stack(loads)
