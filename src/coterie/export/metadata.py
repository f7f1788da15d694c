"""What a GGUF file says of a model, from its config: sizes, attention, positions, routing, and where it comes from."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from coterie.export.checks import head_width
from coterie.export.tensors import Output
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.gguf.families import Family
from coterie.model.disk.gguf.metadata import BETA_FAST, BETA_SLOW, LOG_FACTOR, SCORES, entries_of
from coterie.model.disk.manifest import Manifest
from coterie.publish.original import card_of, hub_id

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

#: Name that a file's type has among llama.cpp's kinds of files, where matrices are of one of these.
_FILE_TYPES = {
    "F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1", "Q5_0": "MOSTLY_Q5_0", "Q5_1": "MOSTLY_Q5_1", "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M", "Q6_K": "MOSTLY_Q6_K", "IQ2_XXS": "MOSTLY_IQ2_XXS",
    "IQ2_XS": "MOSTLY_IQ2_XS", "IQ2_S": "MOSTLY_IQ2_S", "IQ3_XXS": "MOSTLY_IQ3_XXS", "IQ3_S": "MOSTLY_IQ3_S",
    "IQ4_NL": "MOSTLY_IQ4_NL", "IQ4_XS": "MOSTLY_IQ4_XS", "MXFP4": "MOSTLY_MXFP4_MOE",
    "TQ2_0": "MOSTLY_TQ2_0", "TQ1_0": "MOSTLY_TQ1_0", "IQ1_M": "MOSTLY_IQ1_M", "IQ1_S": "MOSTLY_IQ1_S",
}  # fmt: skip


def describe(writer: gguf.GGUFWriter, family: Family, config: PreTrainedConfig, outputs: Iterable[Output]) -> None:
    """Write what the graph needs to know of a model."""
    import gguf

    shapes = {output.name.rpartition(".")[0].rpartition(".")[2]: output.shape for output in outputs}
    num_experts, expert_width, _ = shapes["ffn_gate_exps"]
    for entry in entries_of(family):
        value = getattr(config, entry.config, None)
        if value is not None:
            getattr(writer, f"add_{entry.kind}")(f"{family.architecture}.{entry.key}", value)
    writer.add_vocab_size(config.vocab_size)
    if family.latent:
        _describe_latent(writer, config)
    else:
        width = head_width(config)
        share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(int(width * share))
    _describe_positions(writer, family, config)

    writer.add_expert_count(num_experts)
    writer.add_expert_feed_forward_length(expert_width)
    if family.scores is not None:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType(SCORES[family.scores]))
    if family.grouped and 1 <= (config.topk_group or 1) < (config.n_group or 1):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if "ffn_up_shexp" in shapes and not family.dense_first:
        writer.add_expert_shared_feed_forward_length(shapes["ffn_up_shexp"][0])


def _describe_latent(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Attention on latent vectors: one head of keys there, the latent vector and the rotary part beside it."""
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)


def _describe_positions(writer: gguf.GGUFWriter, family: Family, config: PreTrainedConfig) -> None:
    import gguf

    positions: dict[str, Any] = dict(config.rope_parameters or {})
    writer.add_rope_freq_base(float(positions.get("rope_theta", 10000.0)))
    kind = positions.get("rope_type", "default")
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(positions["factor"]))
    if kind != "yarn":
        return
    length = positions.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(int(length))
    writer.add_rope_scaling_yarn_beta_fast(float(positions.get("beta_fast") or BETA_FAST))
    writer.add_rope_scaling_yarn_beta_slow(float(positions.get("beta_slow") or BETA_SLOW))
    if family.latent and positions.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(LOG_FACTOR * float(positions["mscale_all_dim"]))
    if not positions.get("truncate", True):
        log.warning(
            "its YaRN positions change over between frequencies that are not rounded (truncate is false); llama.cpp "
            "rounds them, for every such model, so positions differ a little from those in transformers"
        )


def introduce(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, manifest: Manifest | None, outputs: Iterable[Output]
) -> None:
    """Write what the model is called, where it comes from, under which licence, and what was done to it."""
    import gguf

    sizes: dict[str, int] = {}
    for output in outputs:
        if len(output.shape) > 1:
            sizes[output.type] = sizes.get(output.type, 0) + output.num_bytes
    most = max(sizes, key=lambda type_: sizes[type_])
    writer.add_type("model")
    writer.add_name(checkpoint.path.resolve().name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES.get(most, "GUESSED")))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    card = card_of(checkpoint.path)
    for key, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if isinstance(card.get(key), str):
            add(card[key])
    original = None if manifest is None else manifest.provenance.model_id
    original = original or hub_id(checkpoint.path, checkpoint.path, checkpoint.config)
    if original is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, original.partition("/")[2])
        writer.add_base_model_organization(0, original.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{original}")
    if manifest is None:
        return
    writer.add_string("coterie.recipe", manifest.recipe)
    writer.add_string("coterie.original", original or manifest.model)
    writer.add_string("coterie.recipe_summary", manifest.provenance.recipe_summary or "")
    writer.add_string("coterie.recipe_paper", manifest.provenance.recipe_paper or "")
    writer.add_array("coterie.commands", list(manifest.provenance.commands))
    writer.add_array("coterie.calibration.domains", list(manifest.domains))
    writer.add_uint64("coterie.calibration.tokens", manifest.calibration_tokens)
    writer.add_uint64("coterie.bytes_before", manifest.bytes_before)
    writer.add_uint64("coterie.bytes_after", manifest.bytes_after)
