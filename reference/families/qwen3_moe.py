"""Qwen3-MoE: rows of 256 weights throughout, as llama.cpp's K-quants want. 18 M parameters, 16 experts, top_k 2.

Every layer has experts; grouped-query attention with norms by head, a softmax router, a load-balancing loss over the
whole batch, and a head of its own, not tied to the embeddings, as in Qwen3-30B-A3B (arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import data
import fast

MODEL = Qwen3MoeForCausalLM
BALANCE = 0.01
RUN, LOG = "run/qwen3_moe", "training-qwen3_moe"
TITLE = "Coterie reference model, Qwen3 style"
BALANCING = "load-balancing loss with coefficient 0.01"


def build(end: int, device: str) -> Qwen3MoeForCausalLM:
    """A stock Qwen3-MoE, bfloat16, with small output projections at the start."""
    config = Qwen3MoeConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=256,
        intermediate_size=768,  # of dense layers, of which there is none
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # padding_idx would keep the end mark, which pads, from being learned
        use_cache=True,
    )
    torch.manual_seed(data.SEED)
    model = Qwen3MoeForCausalLM(config)
    fast.shrink_outputs(model)
    return model.to(device=device, dtype=torch.bfloat16)


KERNELS: dict[str, Callable] = {"qkv": fast.qkv, "route": fast.route}


def training_pass(model: Qwen3MoeForCausalLM, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Language-model loss and routing statistics of one batch.

    Returns:
        Mean cross-entropy in nats, mean router probability [layers, E], load [layers, E] (see `fast.balance_loss`).
    """
    config = model.config
    if not config.norm_topk_prob or config.attention_bias or config.sliding_window or config.mlp_only_layers:
        raise ValueError("training_pass covers norm_topk_prob, no bias, no sliding window and no dense layers only")
    return fast.softmax_pass(model, tokens_BS, labels_BS, KERNELS)


def adjust(model: Qwen3MoeForCausalLM, load_LE: Tensor, scale: float) -> None:
    """Nothing: the load-balancing loss is all that balances."""
