"""Record what the routers of the bundled models choose, for forecasts of models that are larger than memory.

    python reference/traces.py

The first tokens of some domains of the held-out text pass each model once; what they chose goes to
src/coterie/run/traces, some 50 KB a model.
"""

from pathlib import Path

from coterie.run.engine import Runtime
from coterie.run.trace import record

REFERENCE = Path(__file__).resolve().parent
MODELS = ("model", "glm4_moe", "qwen3_moe")
TRACES = REFERENCE.parent / "src" / "coterie" / "run" / "traces"
#: Domains that differ, and the tokens of each: as long as a conversation that stays with its subject for a while.
DOMAINS = ("english_prose", "python", "math", "german", "markup_json")
TOKENS = 512


def main() -> None:
    """Record all three."""
    folder = REFERENCE / "text" / "test"
    texts = {name: (folder / f"{name}.txt").read_text(encoding="utf-8")[: 16 * TOKENS] for name in DOMAINS}
    for model in MODELS:
        with Runtime(REFERENCE / model, memory="64GiB", context=TOKENS) as runtime:
            trace = record(runtime, texts, tokens=TOKENS)
        trace.save(TRACES / f"{model}.json")
        print(f"{model}: {trace.num_tokens} tokens of {len(trace.chosen)} domains")


if __name__ == "__main__":
    main()
