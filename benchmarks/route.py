"""How many experts a token needs: the damage of policies, at equal experts a token.

    python benchmarks/route.py [--models reference/model ...] [--shares 0.375 0.5 0.625 0.75] [--seeds 0 1 2]
                               [--tokens 32768] [--test-tokens 10240] [--markdown FILE]

A profile of the calibration text says where the rules of `coterie.route.budget` draw the line; the test text says what
it costs. "fewer" gives every token the same number, "fewer, renormalised" is what a smaller K in the config does in a
model that normalises weights. Where a rule has a draw of its own, its numbers are means over the seeds; "experts" is
what the test text was given.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from coterie.evaluate.evaluation import Evaluation
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.route.budget import RuleName
from coterie.route.run import route

HERE = Path(__file__).resolve().parent.parent / "reference"
MODELS = (HERE / "model", HERE / "glm4_moe", HERE / "qwen3_moe")
#: Rule, whether weights are scaled up again, whether it is measured how many experts each layer needs, and what the
#: table says.
RULES: tuple[tuple[RuleName, bool, bool, str], ...] = (
    ("fewer", True, False, "fewer, renormalised"), ("fewer", False, False, "fewer"), ("share", False, False, "share"),
    ("output", False, False, "output"), ("threshold", False, False, "threshold"),
    ("threshold", False, True, "threshold, by layer"),
)  # fmt: skip


def rows(model: Path, options: argparse.Namespace, work: Path) -> list[tuple[str, ...]]:
    """Return a model's rows of the table."""
    profiles: list[Profile] = [
        profile(
            model, work / f"{model.name} {seed}", text=options.text, tokens=options.tokens, seed=seed,
            statistics=("usage", "output_norm"),
        )
        for seed in options.seeds
    ]  # fmt: skip
    lines = []
    top_k = profiles[0].layers[0].top_k
    for experts in (share * top_k for share in options.shares if share * top_k >= 1):
        for rule, renormalise, by_layer, name in RULES:
            if rule == "fewer" and experts != int(experts):
                continue
            draws = profiles[:1] if rule == "fewer" else profiles
            scores: list[dict[str, Any]] = []
            for seed, each in zip(options.seeds, draws, strict=False):
                policy = route(
                    model, work / "policy.json", experts_per_token=experts, profile=each, rule=rule,
                    renormalise=renormalise, text=options.text if by_layer else None, seed=seed,
                )  # fmt: skip
                with Evaluation(
                    against=model, text=options.test, tokens=options.test_tokens, questions=options.questions,
                    cache=work / "cache", route=policy, ask_base=False, batch_size=4,
                ) as evaluation:  # fmt: skip
                    card = evaluation.score(model)
                scores.append({**card.overall, "experts": card.experts_per_token})
            mean = {key: fmean(score[key] for score in scores) for key in ("kl", "kl_error", "agreement", "experts")}
            answers = fmean(score["accuracy"] for score in scores) if options.questions else None
            lines.append((
                model.name, f"{experts:g} of {top_k}", name, f"{mean['experts']:.2f}",
                f"{mean['kl']:.4f} ± {mean['kl_error']:.4f}", f"{mean['agreement']:.1%}",
                "-" if answers is None else f"{answers:.1%}",
            ))  # fmt: skip
            print(" | ".join(lines[-1]), flush=True)
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=MODELS)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=(0.375, 0.5, 0.625, 0.75), help="of the experts that a token chooses"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="draws of calibration text")
    parser.add_argument("--text", type=Path, default=HERE / "text" / "calibration")
    parser.add_argument("--test", type=Path, default=HERE / "text" / "test")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--test-tokens", type=int, default=10_240)
    parser.add_argument("--questions", type=int, default=100, help="questions with exact answers")
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    headers = ("model", "experts a token", "rule", "experts", "KL", "top-1", "exact answers")
    with tempfile.TemporaryDirectory() as folder:
        body = [line for model in options.models for line in rows(model, options, Path(folder))]
    table = [headers, ("---", "---", "---", *("---:",) * 4), *body]
    draws = ", ".join(map(str, options.seeds))
    told = f"{options.tokens:,} calibration tokens (draw {draws}), {options.test_tokens:,} test tokens.\n\n"
    shown = told + "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"
    print(shown, end="")
    if options.markdown is not None:
        options.markdown.write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
