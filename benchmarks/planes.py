"""Experts in planes of bits, read in four, three and two bits from one file, beside types of one precision.

    python benchmarks/planes.py [--model reference/qwen3_moe] [--planes PLANES4 ...] [--types Q4_K ...]
                                [--tokens 8192] [--test-tokens 8192] [--markdown FILE]

The matrices of routed experts are stored, all else stays as it is. Planes are made with each quantiser, and, to the
plan's option prefix_weight, so that fewer bits weigh as well where codes are chosen. Each result is then cut to what
the first bytes of its tensors are in fewer bits, and evaluated as a checkpoint of its own. KL is KL(original || result)
in nats, on held-out text. Bits are those of a number of an expert, scales counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.evaluate.evaluation import Evaluation
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.open import open_checkpoint

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
QUANTISERS = {"nearest": "nearest", "gptq": "gptq", "gptaq": "corrected-gptq"}
PLANES = ("PLANES4",)
TYPES = ("Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS")


def in_fewer_bits(result: Path, bits: int, out: Path) -> None:
    """Write a checkpoint that holds of each tensor in planes the first bytes alone."""
    tensors = open_checkpoint(result).tensors.values()
    lower: dict[str, BitPlanes] = {}
    shutil.copytree(result, out)
    for file in out.glob("*.safetensors"):
        stored = load_file(file)
        for info in tensors:
            encoding = None if info.packed is None else info.packed.encoding
            if isinstance(encoding, BitPlanes) and info.name in stored:
                lower[info.name] = encoding.fewer(bits)
                [(_, shape)] = lower[info.name].stored(info.shape).values()
                prefix = stored[info.name].flatten()[: lower[info.name].num_bytes(info.shape)]
                stored[info.name] = prefix.reshape(shape).clone()
        save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["groups"]:
        if group["encoding"] == "bit-planes":
            group["bits"] = bits
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def bits_of_experts(folder: Path) -> float:
    """Return the bits of a number of an expert that is stored in fewer, scales counted."""
    packed = [info for info in open_checkpoint(folder).tensors.values() if info.packed is not None]
    num_bytes = sum(info.packed.encoding.num_bytes(info.shape) for info in packed if info.packed is not None)
    return 8 * num_bytes / sum(info.num_elements for info in packed)


def rows(options: argparse.Namespace, evaluation: Evaluation, work: Path) -> Iterator[tuple[str, ...]]:
    """Yield type, recipe and weight of fewer bits; then for each precision bits, KL and top-1 agreement."""
    text: dict[str, Any] = {"text": options.text, "tokens": options.tokens, "seq_len": options.seq_len}

    def score(folder: Path) -> str:
        scores = evaluation.score(folder).overall
        return (
            f"{bits_of_experts(folder):.2f}: {scores['kl']:.4f} ± {scores['kl_error']:.4f}, {scores['agreement']:.3f}"
        )

    for kind in options.types:
        out = compress(options.model, work / "result", type=kind, recipe="gptq", experts_only=True, **text).out
        yield kind, "gptq", "", score(out), "", ""
        shutil.rmtree(out)
    for kind in options.planes:
        made = plan(options.model, type=kind, recipe="gptq", target="packed", experts_only=True)
        for recipe in options.recipes:
            quantiser = QUANTISERS[recipe]
            for weight in options.weights if recipe != "nearest" else (0.0,):
                each = replace(made, quantiser=(quantiser, {"prefix_weight": weight} if weight else {}))
                out = compress(options.model, work / "result", plan=each, **text).out
                cells = [score(out)]
                for bits in (3, 2):
                    in_fewer_bits(out, bits, work / "fewer")
                    cells.append(score(work / "fewer"))
                    shutil.rmtree(work / "fewer")
                yield kind, recipe, f"{weight:g}", *cells
                shutil.rmtree(out)


def main() -> None:
    """Compress, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "qwen3_moe")
    parser.add_argument("--planes", nargs="*", default=PLANES, metavar="TYPE")
    parser.add_argument("--types", nargs="*", default=TYPES, metavar="TYPE", help="of one precision, by gptq")
    parser.add_argument("--recipes", nargs="*", default=("nearest", "gptq"), choices=QUANTISERS, help="of planes")
    parser.add_argument("--weights", nargs="*", type=float, default=(0.0, 0.3, 1.0, 3.0), help="of fewer bits")
    parser.add_argument("--text", type=Path, default=REFERENCE / "text" / "calibration")
    parser.add_argument("--test", type=Path, default=REFERENCE / "text" / "test")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--test-tokens", type=int, default=8192, help="test tokens, shared by the domains")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    heads = ("type", "recipe", "prefix_weight", "all planes: bits: KL, top-1", "first three bits", "first two bits")
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    with tempfile.TemporaryDirectory() as work, Evaluation(
        against=options.model, text=options.test, tokens=options.test_tokens, seq_len=options.seq_len, questions=0,
        dtype=torch.float32, cache=Path(work) / "predictions",
    ) as evaluation:  # fmt: skip
        for row in rows(options, evaluation, Path(work)):
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    if options.markdown is not None:
        shown = f"{options.tokens:,} calibration tokens, {options.test_tokens:,} test tokens, {options.model.name}.\n\n"
        options.markdown.write_text(shown + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
