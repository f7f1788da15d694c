"""What sequential calibration changes: each recipe with layers measured on original and on compressed inputs.

    python benchmarks/inputs.py [--recipes reap hc-smoe mergemoe] [--tokens 65536] [--keep 0.5] [--markdown FILE]

Halves the bundled reference model with each recipe both ways, and prints the KL divergence to the original and the
exact answers on its test text, in Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from coterie.compress.apply import compress
from coterie.evaluate.run import evaluate

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
INPUTS = ("original", "compressed")


def main() -> None:
    """Compress, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["reap", "hc-smoe", "mergemoe"])
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens; as many test tokens")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    options = parser.parse_args()
    text = REFERENCE / "text"
    with tempfile.TemporaryDirectory() as work:
        results = {}
        for recipe in options.recipes:
            for inputs in INPUTS:
                results[recipe, inputs] = compress(
                    REFERENCE / "model",
                    Path(work) / f"{recipe}-{inputs}",
                    keep=options.keep,
                    recipe=recipe,
                    text=text / "calibration",
                    tokens=options.tokens,
                    inputs=inputs,
                )
        cards = evaluate(
            [result.out for result in results.values()],
            against=REFERENCE / "model",
            text=text / "test",
            tokens=options.tokens,
        )
    lines = ["| recipe | inputs | KL | exact answers | seconds to make |", "| --- | --- | ---: | ---: | ---: |"]
    for (recipe, inputs), card in zip(results, cards, strict=True):
        accuracy = card.overall["accuracy"]
        assert card.overall["kl"] is not None
        assert accuracy is not None
        seconds = sum(results[recipe, inputs].seconds.values())
        lines.append(f"| {recipe} | {inputs} | {card.overall['kl']:.3f} | {accuracy:.1%} | {seconds:.0f} |")
    table = "\n".join(lines)
    print(table)  # the result
    if options.markdown is not None:
        options.markdown.write_text(table + "\n")


if __name__ == "__main__":
    main()
