"""Write a synthetic checkpoint of any size, one decoder layer at a time: what the memory benchmark compresses.

    python benchmarks/make_large.py OUT --size 16GB [--layers N] [--seed 0]

It is a Qwen3-MoE with random weights in bfloat16, in the layout of the hub: a weight file for each decoder layer, one
tensor for each matrix of an expert, a tokenizer whose tokens are bytes. All layers are alike (some 260 MB), so a larger
model has more of them. Beside OUT stands OUT-text, a folder with text for it. The weights are scaled so that logits are
finite and routing varies from token to token; what the model says means nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from coterie.amounts import format_bytes, parse_bytes
from coterie.artifact import atomic_path, write_json
from coterie.errors import CoterieError, InputError, OutputExists
from coterie.testing import END_OF_TEXT_ID, tiny_text, tiny_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The shape of a layer and of the vocabulary; by default 131 million parameters a layer, 525 MB in float32."""

    hidden_size: int = 1024
    num_experts: int = 64
    top_k: int = 8
    expert_width: int = 640
    num_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 32_768

    def layer(self, index: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Return the tensors of a decoder layer: name on disk -> (shape, standard deviation); 0 means all ones."""
        width, heads = self.hidden_size, self.num_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        in_deviation, start = 1 / math.sqrt(width), f"model.layers.{index}"
        tensors: dict[str, tuple[tuple[int, ...], float]] = {
            f"{start}.input_layernorm.weight": ((width,), 0),
            f"{start}.self_attn.q_proj.weight": ((heads, width), in_deviation),
            f"{start}.self_attn.k_proj.weight": ((keys, width), in_deviation),
            f"{start}.self_attn.v_proj.weight": ((keys, width), in_deviation),
            f"{start}.self_attn.o_proj.weight": ((width, heads), 0.5 / math.sqrt(heads)),
            f"{start}.self_attn.q_norm.weight": ((self.head_dim,), 0),
            f"{start}.self_attn.k_norm.weight": ((self.head_dim,), 0),
            f"{start}.post_attention_layernorm.weight": ((width,), 0),
            # Scores with a standard deviation of 1.5: neither one expert for all, nor all alike.
            f"{start}.mlp.gate.weight": ((self.num_experts, width), 1.5 * in_deviation),
        }
        for expert in range(self.num_experts):
            place = f"{start}.mlp.experts.{expert}"
            tensors[f"{place}.gate_proj.weight"] = ((self.expert_width, width), in_deviation)
            tensors[f"{place}.up_proj.weight"] = ((self.expert_width, width), in_deviation)
            tensors[f"{place}.down_proj.weight"] = ((width, self.expert_width), 1 / math.sqrt(self.expert_width))
        return tensors

    def outside(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """Return the tensors outside of the decoder layers, in the same form."""
        vocabulary = (self.vocab_size, self.hidden_size)
        return {
            "model.embed_tokens.weight": (vocabulary, 1.0),
            "model.norm.weight": ((self.hidden_size,), 0),
            "lm_head.weight": (vocabulary, 2 / math.sqrt(self.hidden_size)),
        }

    def num_bytes(self, layers: int) -> int:
        """Return the bytes of a model with so many decoder layers."""
        parts = [*self.outside().values(), *(list(self.layer(0).values()) * layers)]
        return 2 * sum(math.prod(shape) for shape, _ in parts)

    def layers_in(self, num_bytes: int) -> int:
        """Return the number of decoder layers whose model comes nearest to so many bytes.

        Raises:
            InputError: not even one layer fits.
        """
        base = self.num_bytes(0)
        layers = round((num_bytes - base) / (self.num_bytes(1) - base))
        if layers < 1:
            raise InputError(
                f"{format_bytes(num_bytes)} is too little: a model of one layer has {format_bytes(self.num_bytes(1))}"
            )
        return layers

    def config(self, layers: int) -> Qwen3MoeConfig:
        """Return the config of a model with so many decoder layers."""
        config = Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_width,
            norm_topk_prob=True,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
            dtype="bfloat16",
        )
        config.architectures = ["Qwen3MoeForCausalLM"]
        return config


class Noise:
    """Normal numbers in bfloat16, fast: one block is drawn, and each tensor is a stretch of it from another place."""

    def __init__(self, seed: int, length: int = 2**24) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(length, generator=self._generator).to(torch.bfloat16)

    def draw(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        """Return a tensor of a shape with a standard deviation; 0 means all ones."""
        if not deviation:
            return torch.ones(shape, dtype=torch.bfloat16)
        length = math.prod(shape)
        start = int(torch.randint(len(self._block), (), generator=self._generator))
        tensor = torch.empty(length, dtype=torch.bfloat16)
        filled = 0
        while filled < length:
            part = self._block[start : start + length - filled]
            torch.mul(part, deviation, out=tensor[filled : filled + len(part)])
            filled += len(part)
            # From a new place each time: whole rows must not come again in a tensor that is longer than the block.
            start = int(torch.randint(len(self._block), (), generator=self._generator))
        return tensor.view(shape)


def make_large(out: Path, *, layers: int, seed: int = 0, shape: Shape | None = None) -> Path:
    """Write a checkpoint and, beside it, the folder OUT-text; return the folder of the text.

    Raises:
        OutputExists: `out` or the folder of the text exists.
        OutOfSpace: the disk filled up.
    """
    text = out.with_name(f"{out.name}-text")
    for path in (out, text):
        if path.exists():
            raise OutputExists(f"{path} exists; choose another place or remove it")
    shape = shape or Shape()
    noise = Noise(seed)
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file, tensors in _files(shape, layers):
        with atomic_path(out / file) as temporary:
            drawn = {name: noise.draw(*description) for name, description in tensors.items()}
            save_file(drawn, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": shape.num_bytes(layers)}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)
    tiny_tokenizer().save_pretrained(out)
    shape.config(layers).save_pretrained(out)
    return tiny_text(text, documents=24, seed=seed)


def _files(shape: Shape, layers: int) -> Iterator[tuple[str, dict[str, tuple[tuple[int, ...], float]]]]:
    parts = [shape.layer(index) for index in range(layers)]
    parts.append(shape.outside())
    for number, tensors in enumerate(parts, start=1):
        yield f"model-{number:05d}-of-{len(parts):05d}.safetensors", tensors


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the checkpoint; must not exist")
    parser.add_argument("--size", default="4GB", help="bytes of the weights, like 16GB")
    parser.add_argument("--layers", type=int, help="number of decoder layers, instead of --size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        started = time.perf_counter()
        layers = options.layers or Shape().layers_in(parse_bytes(options.size))
        text = make_large(options.out, layers=layers, seed=options.seed)
    except CoterieError as error:
        sys.exit(f"error: {error}")
    size, seconds = format_bytes(Shape().num_bytes(layers)), time.perf_counter() - started
    print(f"{options.out}: {layers} layers, {size}, in {seconds:.0f} seconds; text for it: {text}")


if __name__ == "__main__":
    main()
