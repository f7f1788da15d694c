"""What removing experts costs beside plain rounding of their weights, at the same bytes: when not to use Coterie.

    python benchmarks/plain_quantisation.py [--model reference/model] [--recipes coterie reap] [--tokens 40960]
                                            [--train-tokens 65536] [--test-tokens 20480] [--questions 200]
                                            [--markdown FILE]

Experts' matrices are rounded to the nearest of evenly spaced values, with one 16-bit scale for `GROUP` weights in a
row, as llama.cpp's Q8_0 and Q4_0 do; nothing is calibrated. The same is done to what recipes leave at half of the
experts' bytes. Bytes are those of the experts alone, as a share of the original's in 16 bits. Rounded weights are
evaluated in float32, so nothing else than the rounding changes. Prints KL divergence to the original, perplexity and
exact answers on the test text, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from decimal import Decimal
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from coterie.compress.apply import compress
from coterie.compress.recipes import get_recipe
from coterie.evaluate.run import evaluate
from coterie.profile.run import profile

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
#: Weights of a row that share a scale of `SCALE_BITS`; fewer where a row ends.
GROUP = 32
SCALE_BITS = 16
#: Bits of the original's weights, and of what the recipes leave.
STORED_BITS = 16
ROUNDED = (8, 4, 3, 2)
#: What is removed and then rounded.
ROUNDED_RESULTS = (8, 4)
_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def round_to_bits(weight_RC: Tensor, bits: int) -> Tensor:  # R rows, C columns
    """Return a matrix whose groups of `GROUP` weights are whole multiples of their scale; float32.

    The scale takes the largest weight of a group to the largest code, 2^(bits - 1) - 1, and is kept in float16.
    """
    columns = weight_RC.shape[1]
    groups = functional.pad(weight_RC.float(), (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    largest = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / largest).half().float()
    codes = torch.where(scale > 0, groups / scale, 0).round().clamp(-largest, largest)
    return (codes * scale).flatten(1)[:, :columns]


def expert_bits(model: Path, bits: int = STORED_BITS) -> int:
    """Return what a checkpoint's experts take when they are stored in so many bits, scales included."""
    tensors = (item for file in sorted(model.glob("*.safetensors")) for item in load_file(file).items())
    matrices = [tensor for name, tensor in tensors if _EXPERT.search(name)]
    scales = [0 if bits == STORED_BITS else len(matrix) * -(-matrix.shape[1] // GROUP) for matrix in matrices]
    return sum(matrix.numel() * bits for matrix in matrices) + SCALE_BITS * sum(scales)


def write_rounded(model: Path, out: Path, bits: int) -> None:
    """Copy a plain checkpoint in float32 with its experts rounded."""
    out.mkdir()
    for file in sorted(model.iterdir()):
        if file.suffix == ".safetensors":
            tensors = {
                name: round_to_bits(tensor, bits) if _EXPERT.search(name) else tensor.float()
                for name, tensor in load_file(file).items()
            }
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                out / file.name,
                metadata={"format": "pt"},
            )
        elif file.name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(file, out / file.name)
    for index in model.glob("*.safetensors.index.json"):
        shutil.copyfile(index, out / index.name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")


def short(number: float) -> str:
    """Return a number with two digits that say something, and no exponent."""
    return f"{Decimal(f'{number:.2g}'):f}"


def main() -> None:
    """Compress, round, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "model")
    parser.add_argument("--recipes", nargs="+", default=["coterie", "reap"])
    parser.add_argument("--tokens", type=int, default=40_960, help="calibration tokens")
    parser.add_argument("--train-tokens", type=int, default=65_536, help="tokens that recipes which distil train on")
    parser.add_argument("--test-tokens", type=int, default=20_480)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    calibration = REFERENCE / "text" / "calibration"
    total = expert_bits(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        share = {"the original": 1.0}
        models = {"the original": options.model}
        for bits in ROUNDED:
            name = f"{bits}-bit rounding"
            models[name] = work / f"{bits}-bit"
            share[name] = expert_bits(options.model, bits) / total
            write_rounded(options.model, models[name], bits)
        measured = profile(
            options.model, work / "profile", text=calibration, tokens=options.tokens, seed=options.seed, gradients=True
        )
        for recipe in options.recipes:
            result = compress(
                options.model, work / recipe, keep=0.5, recipe=recipe, profile=measured, text=calibration,
                tokens=options.tokens, seed=options.seed,
                train_tokens=options.train_tokens if get_recipe(recipe).trains else None,
            ).out  # fmt: skip
            trains = get_recipe(recipe).trains
            name = f"half removed, {recipe}" + (" untrained" if trains and not options.train_tokens else "")
            models[name], share[name] = result, expert_bits(result) / total
            for bits in ROUNDED_RESULTS:
                rounded = work / f"{recipe}-{bits}"
                write_rounded(result, rounded, bits)
                models[f"{name}, then {bits}-bit rounding"] = rounded
                share[f"{name}, then {bits}-bit rounding"] = expert_bits(result, bits) / total
        cards = evaluate(
            list(models.values()), against=options.model, text=REFERENCE / "text" / "test", tokens=options.test_tokens,
            questions=options.questions, seed=options.seed,
        )  # fmt: skip
    lines = [
        "| experts | bytes of the experts | KL | perplexity | exact answers |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, card in sorted(zip(models, cards, strict=True), key=lambda entry: -share[entry[0]]):
        scores = card.overall
        assert scores["kl"] is not None
        assert scores["accuracy"] is not None
        lines.append(
            f"| {name} | {share[name]:.0%} | {short(scores['kl'])} | {scores['perplexity']:.2f} |"
            f" {scores['accuracy']:.1%} |"
        )
    table = "\n".join(lines)
    print(table)  # the result
    if options.markdown is not None:
        options.markdown.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
