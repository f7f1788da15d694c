"""GLM-4 MoE, the DeepSeek style. 9 M parameters, five layers of 32 experts, top_k 4.

The router scores by sigmoid and a correction bias balances its choice; there is a shared expert, a dense first layer
and grouped-query attention with partial rotation.

Shape suffixes: B batch, S sequence, T = B * S tokens, K top_k, E experts, D hidden width, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

import data
import fast

MODEL = Glm4MoeForCausalLM
BALANCE = 0.001
BIAS_RATE = 0.005  # at DeepSeek-V3's 0.001 a few minutes would be over before the bias has got anywhere
RUN, LOG = "run/glm4_moe", "training-glm4_moe"
TITLE = "Coterie reference model, DeepSeek style"
BALANCING = (
    "experts balanced by the router's correction bias (steps of 0.005, to zero over the last quarter) and a "
    "load-balancing loss with coefficient 0.001"
)


def build(end: int, device: str) -> Glm4MoeForCausalLM:
    """A stock GLM-4 MoE, bfloat16 but for the correction bias, with small output projections at the start.

    Four normalised weights of about a quarter halve the size of a sum of unlike outputs: routed_scaling_factor 2 sets
    it right, so that the routed experts together weigh what the shared expert does.
    """
    config = Glm4MoeConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        use_qk_norm=True,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # padding_idx would keep the end mark, which pads, from being learned
        use_cache=True,
    )
    torch.manual_seed(data.SEED)
    model = Glm4MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_((2 * config.num_hidden_layers) ** -0.5)
    model = model.to(device=device, dtype=torch.bfloat16)
    for moe in fast.moe_blocks(model):  # bfloat16 would swallow the steps of a bias near one
        moe.gate.e_score_correction_bias = moe.gate.e_score_correction_bias.float()
    return model


def swiglu(x_TD: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A dense feed-forward network, the shared expert's too: [T, D]."""
    hidden = F.silu(F.linear(x_TD, gate).float()) * F.linear(x_TD, up).float()
    return F.linear(hidden.to(x_TD.dtype), down)


def project(
    residual_BSD: Tensor, mixed_BSD: Tensor, weight_o: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Output projection, residual and norm: new residual [B, S, D], input of the feed-forward network [T, D]."""
    residual_BSD = residual_BSD + F.linear(mixed_BSD, weight_o)
    return residual_BSD, fast.rms_norm(residual_BSD, norm, eps).flatten(0, 1)


def route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Router in float32; the bias takes part in the choice only.

    Returns:
        Weights [T, K], index [T, K], mean probability [E]: the mean of each token's scores divided by their sum.
    """
    score_TE = torch.sigmoid(F.linear(x_TD.float(), router_ED.float()))
    index_TK = torch.topk(score_TE.detach() + bias_E, top_k, dim=-1, sorted=False).indices
    weight_TK = score_TE.gather(1, index_TK)
    weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20) * scaling
    return weight_TK, index_TK, (score_TE / score_TE.sum(-1, keepdim=True)).mean(0)


KERNELS: dict[str, Callable] = {"swiglu": swiglu, "qkv": fast.qkv, "project": project, "route": route}


def training_pass(model: Glm4MoeForCausalLM, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Language-model loss and routing statistics of one batch.

    Returns:
        Mean cross-entropy in nats, mean router probability [L, E], load [L, E] (see `fast.balance_loss`).
    """
    config, trunk = model.config, model.model
    if not (config.norm_topk_prob and config.use_qk_norm) or config.attention_bias or config.n_group != 1:
        raise ValueError("training_pass covers norm_topk_prob, use_qk_norm, no attention_bias and one group only")
    eps = config.rms_norm_eps
    hidden_BSD = trunk.embed_tokens(tokens_BS)
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
    cos, sin = trunk.rotary_emb(hidden_BSD, positions)
    probs, loads = [], []
    for layer in trunk.layers:
        attention, block = layer.self_attn, layer.mlp
        mixed_BSD = fast.attend(layer, hidden_BSD, cos, sin, eps, KERNELS["qkv"])
        residual_BSD, x_TD = KERNELS["project"](
            hidden_BSD, mixed_BSD, attention.o_proj.weight, layer.post_attention_layernorm.weight, eps
        )
        dense = block.shared_experts if hasattr(block, "gate") else block
        out_TD = KERNELS["swiglu"](x_TD, dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight)
        if hasattr(block, "gate"):
            router, experts = block.gate, block.experts
            weight_TK, index_TK, prob_E = KERNELS["route"](
                x_TD,
                router.weight,
                router.e_score_correction_bias,
                config.num_experts_per_tok,
                config.routed_scaling_factor,
            )
            probs.append(prob_E)
            loads.append(fast.measure_load(index_TK, config.n_routed_experts))
            routed_TD = fast.SortedExperts.apply(x_TD, index_TK, weight_TK, experts.gate_up_proj, experts.down_proj)
            out_TD = routed_TD + out_TD
        hidden_BSD = residual_BSD + out_TD.view(hidden_BSD.shape)
    return fast.head_loss(model, hidden_BSD, labels_BS), torch.stack(probs), torch.stack(loads)


@torch.no_grad()
def adjust(model: Glm4MoeForCausalLM, load_LE: Tensor, scale: float) -> None:
    """Raises the correction bias of experts below the mean load and lowers that of those above (arXiv:2412.19437)."""
    for moe, load_E in zip(fast.moe_blocks(model), load_LE, strict=True):
        moe.gate.e_score_correction_bias += BIAS_RATE * scale * torch.sign(load_E.mean() - load_E)
