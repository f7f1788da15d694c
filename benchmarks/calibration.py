"""What calibration text does: one recipe, calibrated on many sources, and what each result keeps of each domain.

    python benchmarks/calibration.py [--recipe reap] [--keep 0.5] [--tokens 16384] [--test-tokens 10240]
                                     [--questions 100] [--sources SOURCE ...] [--markdown FILE] [--json FILE]

Compresses the bundled reference model once for each source of calibration text: every domain by itself, all domains
equally, the mix that `coterie calibrate` chooses, text that the model writes itself, and all of them with that text.
Every result gets the same number of calibration tokens. Prints, in Markdown, how far each is from the original on every
domain of the test text: KL divergence, and perplexity as a multiple of the original's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.compress.apply import compress
from coterie.compress.recipes import RECIPES, get_recipe
from coterie.evaluate.run import evaluate
from coterie.evaluate.scorecard import Scorecard
from coterie.profile.calibrate import calibrate, generate
from coterie.profile.documents import text_files
from coterie.profile.run import profile
from coterie.profile.statistics import needs_gradients

REFERENCE = Path(__file__).resolve().parent.parent / "reference"

#: Sources beside the single domains.
MIXES = ("all", "auto", "self", "all+self")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Calibration text under a name: a folder and the weights of its domains, equal when None."""

    name: str
    text: Path
    weights: Mapping[str, float] | None


def main() -> None:
    """Calibrate, compress, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "model")
    parser.add_argument("--text", type=Path, default=REFERENCE / "text" / "calibration")
    parser.add_argument("--test", type=Path, default=REFERENCE / "text" / "test")
    parser.add_argument("--recipe", default="reap", choices=list(RECIPES), help="how experts are chosen or merged")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts to keep")
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens of each result")
    parser.add_argument("--test-tokens", type=int, default=10_240, help="test tokens, shared by the domains")
    parser.add_argument("--questions", type=int, default=100, help="test questions with exact answers")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--sources", nargs="+", help=f"domains of the text, and of {', '.join(MIXES)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="where the tables go as well")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    options = parser.parse_args()

    domains = tuple(text_files(options.text))
    names = options.sources or [*domains, *MIXES]
    unknown = sorted(set(names) - {*domains, *MIXES})
    if unknown:
        parser.error(f"unknown source {unknown[0]}; choose from {', '.join((*domains, *MIXES))}")
    with tempfile.TemporaryDirectory() as work:
        tokens: dict[str, Mapping[str, int]] = {}
        results: dict[str, Path] = {}
        for source in sources(names, domains, options, Path(work)):
            print(f"{source.name} ...", file=sys.stderr, flush=True)
            measured = profile(
                options.model, text=source.text, weights=source.weights, tokens=options.tokens,
                seq_len=options.seq_len, seed=options.seed, gradients=needs_gradients(get_recipe(options.recipe).needs),
            )  # fmt: skip
            results[source.name] = Path(work) / f"result-{len(results)}"
            tokens[source.name] = dict(zip(measured.domains, measured.num_tokens, strict=True))
            compress(
                options.model, results[source.name], keep=options.keep, recipe=options.recipe, profile=measured,
                seed=options.seed,
            )  # fmt: skip
        base, *scored = evaluate(
            [options.model, *results.values()], against=options.model, text=options.test, tokens=options.test_tokens,
            seq_len=options.seq_len, seed=options.seed, questions=options.questions,
        )  # fmt: skip
        cards = dict(zip(results, scored, strict=True))
    tables = render(base, cards)
    setting = (
        f"Recipe {options.recipe}, {options.keep:.0%} of the experts kept, {options.tokens:,} calibration tokens a "
        f"result, {options.test_tokens:,} test tokens, seed {options.seed}.\n"
    )
    print(setting + "\n" + tables, end="")
    if options.markdown is not None:
        options.markdown.write_text(setting + "\n" + tables)
    if options.json is not None:
        options.json.write_text(json.dumps(numbers(base, cards, tokens), indent=2) + "\n")


def sources(names: Sequence[str], domains: Sequence[str], options: argparse.Namespace, work: Path) -> Iterator[Source]:
    """Yield the sources that are wanted, each made when its turn comes."""
    settings = {"tokens": options.tokens, "seq_len": options.seq_len, "seed": options.seed}
    if {"self", "all+self"} & set(names):
        # As much text as the largest share needs, beside the other domains.
        shutil.copytree(options.text, work / "text", ignore=shutil.ignore_patterns("*.qa.jsonl"))
        generate(options.model, work / "text", **settings)
    for name in names:
        if name == "auto":
            chosen = calibrate(options.model, text=options.text, **settings)
            yield Source(name=name, text=options.text, weights=chosen.weights)
        elif name == "self":
            yield Source(name=name, text=work / "text", weights={"self": 1})
        elif name == "all+self":
            yield Source(name=name, text=work / "text", weights=None)
        else:
            yield Source(name=name, text=options.text, weights=None if name == "all" else {name: 1})


def ratio(card: Scorecard, base: Scorecard, domain: str) -> float:
    """Return a result's perplexity on a domain as a multiple of the original's."""
    perplexity, original = card.domains[domain]["perplexity"], base.domains[domain]["perplexity"]
    assert perplexity is not None
    assert original is not None
    return perplexity / original


def divergence(card: Scorecard, domain: str) -> float:
    """Return a result's KL divergence from the original on a domain, in nats."""
    kl = card.domains[domain]["kl"]
    assert kl is not None
    return kl


def render(base: Scorecard, cards: Mapping[str, Scorecard]) -> str:
    """Return the tables: a row for each source, a column for each domain of the test, the best of each in bold."""
    domains = [domain for domain, scores in base.domains.items() if scores["perplexity"] is not None]
    by_domain = {name: [divergence(card, domain) for domain in domains] for name, card in cards.items()}
    ratios = {name: [ratio(card, base, domain) for domain in domains] for name, card in cards.items()}
    answers = {name: card.overall["accuracy"] for name, card in cards.items()}
    extra = {name: "-" if share is None else f"{share:.1%}" for name, share in answers.items()}
    return (
        "KL divergence from the original, in nats:\n\n"
        + table(domains, by_domain, 3, lambda values: sum(values) / len(values), {"exact answers": extra})
        + "\nPerplexity as a multiple of the original's:\n\n"
        + table(domains, ratios, 2, statistics.geometric_mean, {})
    )


def table(
    domains: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    digits: int,
    mean: Callable[[Sequence[float]], float],
    extra: Mapping[str, Mapping[str, str]],
) -> str:
    """Return one table in Markdown; `extra` holds further columns, by heading and row."""
    columns = (*domains, "mean", "worst", *extra)
    lines = [f"| calibrated on | {' | '.join(columns)} |", f"| --- | {' | '.join(['---:'] * len(columns))} |"]
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = [
            f"**{value:.{digits}f}**" if value == least else f"{value:.{digits}f}"
            for value, least in zip(values, best, strict=True)
        ]
        cells += [f"{mean(values):.{digits}f}", f"{max(values):.{digits}f}", *(extra[key][name] for key in extra)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def numbers(
    base: Scorecard, cards: Mapping[str, Scorecard], tokens: Mapping[str, Mapping[str, int]]
) -> dict[str, object]:
    """Return all numbers for a program: by source, the tokens of each domain and what was measured by test domain."""
    return {
        "original": base.domains,
        "results": {
            name: {"calibration_tokens": tokens[name], "domains": card.domains, "overall": card.overall}
            for name, card in cards.items()
        },
    }


if __name__ == "__main__":
    main()
