"""What llama.cpp computes of each family that is known here: its architecture, what is fixed in it, where tensors lie.

This is the one file of the library, beside `coterie.testing.families`, that names families: GGUF does, and a graph
of llama.cpp has constants in it that no file can change. Facts are from llama.cpp's ``src/models/*.cpp`` (what is
computed, which tensors are read), its ``conversion`` folder (what keys mean, how weights are laid out) and the
modelling files of transformers; each family here was run in llama.cpp beside transformers (``tests/export``).
llama.cpp may well know a family that is not in the table, but nobody has compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coterie.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A tensor on disk, or a part of it, and its place in a GGUF file.

    Attributes:
        disk: its name, with {layer}, {expert} and {kind} (weight or bias) in place of what changes.
        gguf: its name there.
        cut: which part of it, a key of `coterie.model.disk.gguf.names.CUTS`.
    """

    disk: str
    gguf: str
    cut: str = "whole"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family in llama.cpp.

    Attributes:
        architecture: its name there.
        model_class: its class in transformers.
        rows: where its tensors lie.
        experts: what config.json calls the number of experts.
        expert_width: what it calls their width.
        scores: what a router's scores are: a softmax or a sigmoid; None where the graph alone knows.
        normalised: whether weights of chosen experts are divided by their sum: always, never, or as the file says;
            "inherent" where they are in transformers, too, whatever the config.
        can_tie: whether the head may be the embedding; else it has to be a tensor of its own.
        equal_heads: there are as many heads of keys as of queries.
        latent: keys and values come from a latent vector (MLA).
        grouped: groups of experts may be chosen first, by the sum of the two best scores in each.
        dense_first: leading layers may be dense.
        multipliers: embedding, attention, residual and logits are scaled.
        full_heads: heads together are as wide as the model.
        slides: every other layer, from the first one on, attends to a window.
        partial_positions: rotary positions may turn a part of each head.
        scaling: kinds of rotary positions that were compared, beside the plain one.
        fixed: config entries that only one value is right of.
        shared_width: what config.json calls the width of a shared expert, where that is said.
    """

    architecture: str
    model_class: str
    rows: tuple[Row, ...]
    experts: str = "num_experts"
    expert_width: str = "moe_intermediate_size"
    scores: Literal["softmax", "sigmoid"] | None = "softmax"
    normalised: bool | Literal["written", "inherent"] = True
    can_tie: bool = True
    equal_heads: bool = False
    latent: bool = False
    grouped: bool = False
    dense_first: bool = False
    multipliers: bool = False
    full_heads: bool = False
    slides: bool = False
    partial_positions: bool = False
    scaling: tuple[str, ...] = ("linear", "yarn")
    fixed: Mapping[str, Any] | None = None
    shared_width: str | None = None


def _rows(entries: Iterable[tuple[str, ...]]) -> tuple[Row, ...]:
    """Return rows of a layer: names within it, and the cut."""
    return tuple(
        Row(disk=f"model.layers.{{layer}}.{disk}", gguf=f"blk.{{layer}}.{gguf}", cut=cut[0] if cut else "whole")
        for disk, gguf, *cut in entries
    )


def _gated(
    disk: str, gguf: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Row, ...]:
    """Return rows of gate, up and down."""
    return _rows(
        (f"{disk}.{name}.weight", gguf % projection)
        for name, projection in zip(names, ("gate", "up", "down"), strict=True)
    )


_ENDS = (
    Row(disk="model.embed_tokens.weight", gguf="token_embd.weight"),
    Row(disk="model.norm.weight", gguf="output_norm.weight"),
    Row(disk="lm_head.weight", gguf="output.weight"),
)
_NORMS = _rows((("input_layernorm.weight", "attn_norm.weight"), ("post_attention_layernorm.weight", "ffn_norm.weight")))
_NORMS_BEHIND = _rows(
    (("input_layernorm.weight", "attn_norm.weight"), ("post_attention_layernorm.weight", "post_attention_norm.weight"))
)
_OUTPUT = _rows((("self_attn.v_proj.{kind}", "attn_v.{kind}"), ("self_attn.o_proj.{kind}", "attn_output.{kind}")))
_ATTENTION = (
    *_rows((("self_attn.q_proj.{kind}", "attn_q.{kind}"), ("self_attn.k_proj.{kind}", "attn_k.{kind}"))),
    *_OUTPUT,
)
#: Rotary positions turn neighbours there, and halves of a head in transformers.
_INTERLEAVED = (
    *_rows(
        (
            ("self_attn.q_proj.{kind}", "attn_q.{kind}", "heads of queries"),
            ("self_attn.k_proj.{kind}", "attn_k.{kind}", "heads of keys"),
        )
    ),
    *_OUTPUT,
)
_HEAD_NORMS = _rows(
    (("self_attn.q_norm.weight", "attn_q_norm.weight"), ("self_attn.k_norm.weight", "attn_k_norm.weight"))
)
_LATENT = (
    *_rows(
        (
            ("self_attn.q_proj.weight", "attn_q.weight"),
            ("self_attn.q_a_proj.weight", "attn_q_a.weight"),
            ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
            ("self_attn.q_b_proj.weight", "attn_q_b.weight"),
            ("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
            ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
            ("self_attn.kv_b_proj.weight", "attn_k_b.weight", "latent keys"),
            ("self_attn.kv_b_proj.weight", "attn_v_b.weight", "latent values"),
            ("self_attn.o_proj.weight", "attn_output.weight"),
        )
    ),
)
_ROUTER = _rows((("mlp.gate.weight", "ffn_gate_inp.weight"),))
_CORRECTION = _rows((("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),))
_EXPERTS = _gated("mlp.experts.{expert}", "ffn_%s_exps.weight")
_DENSE = _gated("mlp", "ffn_%s.weight")
_SHARED = _gated("mlp.shared_experts", "ffn_%s_shexp.weight")
_DEEPSEEK = (*_ENDS, *_NORMS, *_LATENT, *_ROUTER, *_EXPERTS, *_DENSE, *_SHARED)

_GRANITE_ROWS = (
    *_ENDS, *_NORMS, *_INTERLEAVED,
    *_rows(
        (
            ("block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight"),
            ("block_sparse_moe.input_linear.weight", "ffn_gate_exps.weight", "first half"),
            ("block_sparse_moe.input_linear.weight", "ffn_up_exps.weight", "second half"),
            ("block_sparse_moe.output_linear.weight", "ffn_down_exps.weight"),
        )
    ),
)  # fmt: skip
_GRANITE_SHARED = _rows(
    (
        ("shared_mlp.input_linear.weight", "ffn_gate_shexp.weight", "first half"),
        ("shared_mlp.input_linear.weight", "ffn_up_shexp.weight", "second half"),
        ("shared_mlp.output_linear.weight", "ffn_down_shexp.weight"),
    )
)


def _granite(model_class: str, rows: tuple[Row, ...], shared_width: str | None) -> Family:
    return Family(
        architecture="granitemoe", model_class=model_class, rows=rows, experts="num_local_experts",
        expert_width="intermediate_size", normalised="inherent", multipliers=True, full_heads=True, scaling=(),
        fixed={"attention_bias": False}, shared_width=shared_width,
    )  # fmt: skip


#: The families that are known, by the model type in config.json.
FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        architecture="qwen2moe", model_class="Qwen2MoeForCausalLM", normalised=False, can_tie=False, full_heads=True,
        shared_width="shared_expert_intermediate_size",
        rows=(
            *_ENDS, *_NORMS, *_ATTENTION, *_ROUTER, *_EXPERTS, *_gated("mlp.shared_expert", "ffn_%s_shexp.weight"),
            *_rows((("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),)),
        ),
    ),
    "qwen3_moe": Family(
        architecture="qwen3moe", model_class="Qwen3MoeForCausalLM", fixed={"attention_bias": False},
        rows=(*_ENDS, *_NORMS, *_ATTENTION, *_HEAD_NORMS, *_ROUTER, *_EXPERTS),
    ),
    "glm4_moe": Family(
        architecture="glm4moe", model_class="Glm4MoeForCausalLM", experts="n_routed_experts", scores="sigmoid",
        normalised="written", dense_first=True, grouped=True, partial_positions=True, scaling=(),
        rows=(
            *_ENDS, *_NORMS_BEHIND, *_ATTENTION, *_HEAD_NORMS, *_ROUTER, *_CORRECTION, *_EXPERTS, *_DENSE, *_SHARED,
        ),
    ),
    "deepseek_v2": Family(
        architecture="deepseek2", model_class="DeepseekV2ForCausalLM", experts="n_routed_experts", normalised=False,
        latent=True, dense_first=True, scaling=("yarn",), fixed={"attention_bias": False, "mlp_bias": False},
        rows=_DEEPSEEK,
    ),
    "deepseek_v3": Family(
        architecture="deepseek2", model_class="DeepseekV3ForCausalLM", experts="n_routed_experts", scores="sigmoid",
        normalised="written", grouped=True, latent=True, dense_first=True, scaling=("yarn",),
        fixed={"attention_bias": False, "rope_interleave": True}, rows=(*_DEEPSEEK, *_CORRECTION),
    ),
    "gpt_oss": Family(
        architecture="gpt-oss", model_class="GptOssForCausalLM", experts="num_local_experts",
        expert_width="intermediate_size", scores=None, normalised="inherent", can_tie=False, slides=True,
        scaling=("yarn",),
        fixed={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        rows=(
            *_ENDS, *_NORMS_BEHIND, *_ATTENTION,
            *_rows(
                (
                    ("self_attn.sinks", "attn_sinks.weight"),
                    ("mlp.router.{kind}", "ffn_gate_inp.{kind}"),
                    ("mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "even, input first"),
                    ("mlp.experts.gate_up_proj", "ffn_up_exps.weight", "odd, input first"),
                    ("mlp.experts.down_proj", "ffn_down_exps.weight", "input first"),
                    ("mlp.experts.gate_up_proj_bias", "ffn_gate_exps.bias", "even"),
                    ("mlp.experts.gate_up_proj_bias", "ffn_up_exps.bias", "odd"),
                    ("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
                )
            ),
        ),
    ),
    "mixtral": Family(
        architecture="llama", model_class="MixtralForCausalLM", experts="num_local_experts",
        expert_width="intermediate_size", normalised="inherent",
        rows=(
            *_ENDS, *_NORMS, *_INTERLEAVED, *_rows((("block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),)),
            *_gated("block_sparse_moe.experts.{expert}", "ffn_%s_exps.weight", ("w1", "w3", "w2")),
        ),
    ),
    "granitemoe": _granite("GraniteMoeForCausalLM", _GRANITE_ROWS, None),
    "granitemoeshared": _granite(
        "GraniteMoeSharedForCausalLM", (*_GRANITE_ROWS, *_GRANITE_SHARED), "shared_intermediate_size"
    ),
    "olmoe": Family(
        architecture="olmoe", model_class="OlmoeForCausalLM", expert_width="intermediate_size", normalised=False,
        can_tie=False, equal_heads=True, full_heads=True, fixed={"attention_bias": False, "clip_qkv": None},
        rows=(*_ENDS, *_NORMS, *_ATTENTION, *_HEAD_NORMS, *_ROUTER, *_EXPERTS),
    ),
}  # fmt: skip


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json.

    Raises:
        InputError: it is not known.
    """
    name = str(config["model_type"])
    if name not in FAMILIES:
        raise InputError(
            f"{where} is a {name}, and whether llama.cpp computes that rightly is not known; known are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
