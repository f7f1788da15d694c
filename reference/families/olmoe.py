"""OLMoE: every layer with experts, softmax router, a load-balancing loss. 18 M parameters, 32 experts, top_k 4.

Shape suffixes: B batch, S sequence, T = B * S tokens, K top_k, E experts, D hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import apply_rotary_pos_emb

import data
import fast

MODEL = OlmoeForCausalLM
BALANCE = 0.01
RUN, LOG = "run", "training"
TITLE = "Coterie reference model"
BALANCING = "load-balancing loss with coefficient 0.01"


def build(end: int, device: str) -> OlmoeForCausalLM:
    """A stock OLMoE, bfloat16, with small output projections at the start."""
    config = OlmoeConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # padding_idx would keep the end mark, which pads, from being learned
        use_cache=True,
    )
    torch.manual_seed(data.SEED)
    model = OlmoeForCausalLM(config)
    fast.shrink_outputs(model)
    return model.to(device=device, dtype=torch.bfloat16)


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
    """Normed, rotated queries and keys, and values: each [B, heads, S, head width]."""
    batch, length, _ = hidden_BSD.shape
    head_width = cos.shape[-1]
    x_BSD = fast.rms_norm(hidden_BSD, norm, eps)
    query = fast.rms_norm(F.linear(x_BSD, weight_q), norm_q, eps).view(batch, length, -1, head_width).transpose(1, 2)
    key = fast.rms_norm(F.linear(x_BSD, weight_k), norm_k, eps).view(batch, length, -1, head_width).transpose(1, 2)
    value = F.linear(x_BSD, weight_v).view(batch, length, -1, head_width).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query, key, value


KERNELS: dict[str, Callable] = {"qkv": qkv, "route": fast.route}


def training_pass(model: OlmoeForCausalLM, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Language-model loss and routing statistics of one batch.

    Returns:
        Mean cross-entropy in nats, mean router probability [layers, E], load [layers, E] (see `balance_loss`).
    """
    config = model.config
    if not config.norm_topk_prob or config.clip_qkv is not None or config.attention_bias:
        raise ValueError("training_pass covers norm_topk_prob=True, no clip_qkv and no attention_bias only")
    return fast.softmax_pass(model, tokens_BS, labels_BS, KERNELS)


def adjust(model: OlmoeForCausalLM, load_LE: Tensor, scale: float) -> None:
    """Nothing: the load-balancing loss is all that balances."""
