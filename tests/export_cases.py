"""Tiny models that llama.cpp computes as transformers does, plain and in blocks: what tests of GGUF files share."""

import json

import gguf
import torch
from safetensors.torch import load_file, save_file

from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.gguf.families import FAMILIES
from coterie.testing import tiny_checkpoint

#: Positions in a model whose text is longer than what it was trained on.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LATENT_YARN = YARN | {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 150000.0}
SINKS_YARN = YARN | {"rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": True}

#: What a tiny config has to say so that llama.cpp computes it.
RIGHT = {
    "qwen2_moe": {"norm_topk_prob": False},
    "deepseek_v2": {"norm_topk_prob": False, "topk_method": "greedy", "routed_scaling_factor": 2.0},
    "gpt_oss": {"rope_parameters": PLAIN},
    "mixtral": {"sliding_window": None},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 2},
}

CASES = [(family, RIGHT.get(family, {})) for family in sorted(FAMILIES)] + [
    ("qwen3_moe", {"rope_parameters": YARN}),
    ("qwen3_moe", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    ("qwen2_moe", RIGHT["qwen2_moe"] | {"rope_parameters": YARN}),
    ("mixtral", RIGHT["mixtral"] | {"rope_parameters": YARN}),
    ("mixtral", RIGHT["mixtral"] | {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    ("olmoe", RIGHT["olmoe"] | {"rope_parameters": YARN}),
    ("gpt_oss", {"rope_parameters": SINKS_YARN}),
    ("deepseek_v2", RIGHT["deepseek_v2"] | {"rope_parameters": LATENT_YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    ("deepseek_v2", RIGHT["deepseek_v2"] | {"q_lora_rank": None, "num_hidden_layers": 27}),
    ("deepseek_v3", {"rope_parameters": LATENT_YARN, "tie_word_embeddings": True}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5, "norm_topk_prob": False}),
    ("glm4_moe", {"tie_word_embeddings": True, "first_k_dense_replace": 2, "n_shared_experts": 2}),
    ("granitemoe", {"tie_word_embeddings": True}),
    ("mixtral", RIGHT["mixtral"] | {"head_dim": 24}),
    ("gpt_oss", RIGHT["gpt_oss"] | {"head_dim": 32}),
]

#: Widths that hold whole blocks of every type.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}


def packed(folder, family, types, *, columns=None, **changes):
    """Write a tiny model, some tensors of which are stored in blocks: type and axis by the end of their names.

    With `columns`, the numbers of a row, blocks run on from row to row.

    Rows are packed by themselves, so what was packed once serves all tensors of a kind, turned by some rows.
    """
    model = tiny_checkpoint(folder, family, **changes)
    groups = []
    # Smaller numbers than in narrow models: a router should not turn on the last bit.
    content = {name: t / 4 if t.ndim > 1 else t for name, t in load_file(model / "model.safetensors").items()}
    for ending, (kind, axis) in types.items():
        encoding = GgmlBlocks(type=kind, axis=axis, dtype="F32", columns=columns)
        names = [name for name in content if name.endswith(ending)]
        [once] = encoding.pack(content[names[0]][:1] if content[names[0]].ndim == 3 else content[names[0]]).values()
        for turn, name in enumerate(names):
            stack = content[name].shape[0] if content[name].ndim == 3 else 0
            turned = [once.roll(17 * (turn + each), -3 - axis) for each in range(stack or 1)]
            content[name] = torch.cat(turned).contiguous() if stack else turned[0].contiguous()
        groups.append(encoding.config() | {"tensors": names})
    save_file(content, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "coterie", "groups": groups}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


#: Types by the ends of names: experts and attention in different ones.
MIXED = {
    "gate_proj.weight": ("Q4_K", -1), "up_proj.weight": ("Q4_0", -1), "down_proj.weight": ("Q6_K", -1),
    "q_proj.weight": ("Q4_K", -1), "embed_tokens.weight": ("Q6_K", -1),
}  # fmt: skip
#: Family, types and sizes.
STORED_IN_BLOCKS = {
    "qwen3_moe": ("qwen3_moe", MIXED, WIDE),
    # The smallest types that there are.
    "two bits and fewer": (
        "qwen3_moe",
        {
            "gate_proj.weight": ("TQ2_0", -1), "up_proj.weight": ("TQ1_0", -1), "down_proj.weight": ("IQ1_S", -1),
            "q_proj.weight": ("IQ1_M", -1),
        },
        WIDE,
    ),
    # Rows of queries and keys change places there.
    "mixtral": (
        "mixtral",
        {"q_proj.weight": ("Q4_K", -1), "k_proj.weight": ("Q4_0", -1), "w1.weight": ("Q4_K", -1)},
        {"hidden_size": 256, "head_dim": 32, "num_key_value_heads": 2, "sliding_window": None},
    ),
    # Blocks along the axis that is the input one, where matrices lie transposed; gate and up in turn.
    "gpt_oss": (
        "gpt_oss",
        {"gate_up_proj": ("Q4_K", -2), "down_proj": ("Q6_K", -2)},
        {"hidden_size": 256, "intermediate_size": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}  # fmt: skip


def rewritten(file, target, change=lambda fields: None, tensor_of=None, **options):
    """Write a file again, with other fields or tensors, or in parts, with the package gguf."""
    reader = gguf.GGUFReader(file)
    fields = {
        name: (field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    change(fields)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture")[0], **options)
    for name, entry in fields.items():
        writer.add_key_value(name, *entry)
    for tensor in reader.tensors:
        data, kind = (tensor.data, tensor.tensor_type) if tensor_of is None else tensor_of(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
