"""The headers of Qwen3-30B-A3B, without its weights: names, shapes and config.json in a file that is one large hole."""

import json
from collections.abc import Iterator
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor."""
    width, experts, model = 768, 128, 2048
    yield "model.embed_tokens.weight", (151936, model)
    yield "lm_head.weight", (151936, model)
    yield "model.norm.weight", (model,)
    for layer in range(48):
        start = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}.{norm}.weight", (model,)
        for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
            yield f"{start}.self_attn.{name}_proj.weight", (rows, model)
        yield f"{start}.self_attn.o_proj.weight", (model, 4096)
        for name in ("q_norm", "k_norm"):
            yield f"{start}.self_attn.{name}.weight", (128,)
        yield f"{start}.mlp.gate.weight", (experts, model)
        for expert in range(experts):
            for name, shape in (("gate", (width, model)), ("up", (width, model)), ("down", (model, width))):
                yield f"{start}.mlp.experts.{expert}.{name}_proj.weight", shape


def write_headers(folder: Path) -> Path:
    """Write the checkpoint; its weights take 61 GB that are not there."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder
