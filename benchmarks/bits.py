"""Weights in fewer bits at equal bytes: llama.cpp's own quantiser with an importance matrix, and Coterie's recipes.

    python benchmarks/bits.py [--models reference/model ...] [--formats Q8_0 Q4_K_M ...] [--shares 0.16 ...]
                              [--expert-shares 0.1 ...] [--recipes coterie-bits ...] [--tokens 65536]
                              [--test-tokens 16384] [--seeds 0 ...] [--again RECIPE ...] [--kept]
                              [--markdown FILE] [--json FILE]

A recipe may be followed by an effort, such as coterie-bits:balanced: its result is trained as long; else it is not. And
by a target, such as coterie-bits@packed, for the form that Coterie alone reads. Before both may stand for how many
generations types are searched for, such as coterie-bits+search=40.

Every format of `llama-quantize` is made with the types that it gives to each tensor and the code that it rounds numbers
with, see `llama_quantiser.py`; its importance matrix comes from the same calibration text as our recipes have. Each of
these gets the bytes of that file, and no more; and as many as `--shares` names, where llama.cpp has no format. With
`--expert-shares` recipes are compared at equal bytes of the routed experts alone, all else staying as it is. Bytes
are those of all tensors as a GGUF file stores them, norms, biases and routers in 32 bits on both sides; shares are of a
file whose matrices are bfloat16. All are evaluated by the same function, in float32, on the same held-out text, equally
much of each domain. KL is KL(original || result) in nats, with its standard error over sequences; with several draws
of calibration text, the mean of both. "expected" is the rise of the loss that a recipe foretold.

Rows are kept in the JSON file as they are made, and those that are there already are not made again, unless `--again`
names their recipe ("llama.cpp" for the formats themselves). With --kept no row is made: what is there is printed.
Models that are not there are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from coterie.artifact import write_json
from coterie.compress.apply import compress
from coterie.compress.recipes import get_recipe
from coterie.compress.source import Source
from coterie.errors import Infeasible
from coterie.evaluate.evaluation import Evaluation
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.text import CalibrationText, TextSettings
from llama_quantiser import (
    FORMATS,
    GgufTensor,
    Library,
    Shape,
    check_library,
    gguf_tensors,
    importance,
    plain_bytes,
    types_of,
)

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
#: Models that are compared, those that are there.
MODELS = ("model", "glm4_moe", "qwen3_moe")
#: Ours; each chooses its codes in types that llama.cpp reads.
RECIPES = ("nearest", "gptq", "gptaq", "coterie-bits")
#: What a row says of a size that cannot be had.
NOTHING = dict.fromkeys(("expected", "bytes", "share", "kl", "kl_error", "agreement"))
#: The recipe of rows that are a format of `llama-quantize` itself.
RIVAL = "llama.cpp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all rows have in common.

    Attributes:
        text: calibration text.
        test: text that results are evaluated on.
        tokens: calibration tokens.
        test_tokens: tokens of the test text.
        seq_len: tokens of a sequence.
    """

    text: Path
    test: Path
    tokens: int
    test_tokens: int
    seq_len: int

    def content(self) -> dict[str, int]:
        """Return what rows must agree in."""
        return {"tokens": self.tokens, "test_tokens": self.test_tokens, "seq_len": self.seq_len}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large a result may be.

    Attributes:
        most: bytes that are counted, at most.
        beside: what is added to the bytes of a result's tensors for those that are counted.
        plain: what shares are of.
    """

    most: int
    beside: int
    plain: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """A recipe with what may follow it.

    Attributes:
        name: of the recipe.
        search: generations that types are searched for.
        effort: how long the result is trained.
        reader: who is to read it; empty for llama.cpp.
    """

    name: str
    search: int
    effort: str
    reader: str

    @classmethod
    def of(cls, recipe: str) -> Spelling:
        """Read name+search=N:effort@reader, of which all but the name may be left out."""
        spelled, _, reader = recipe.partition("@")
        spelled, _, effort = spelled.partition(":")
        name, _, search = spelled.partition("+search=")
        return cls(name=name, search=int(search or 0), effort=effort or "fast", reader=reader)


class Rows:
    """The rows, in a file; whoever makes one puts it there at once."""

    def __init__(self, file: Path | None) -> None:
        """Read those that are there."""
        self._file = file
        self.all: list[dict[str, Any]] = []
        self._read()

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row with these entries."""
        return next((row for row in self.all if all(row.get(name) == value for name, value in key.items())), None)

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, beside those that another run may have added in the meantime."""
        self._read()
        self.all.append(row)
        self._write()
        kl = "cannot be that small" if row["kl"] is None else f"{number(row['kl'])} nats"
        print(
            f"{row['model']} {row['format']} {row['recipe']} draw {row['seed']}: {kl}, {row['seconds']:.0f} s",
            flush=True,
        )

    def forget(self, recipes: Sequence[str]) -> None:
        """Drop the rows of recipes."""
        self.all = [row for row in self.all if row["recipe"] not in recipes]
        self._write()

    def _read(self) -> None:
        if self._file is not None and self._file.exists():
            self.all = json.loads(self._file.read_text(encoding="utf-8"))["rows"]

    def _write(self) -> None:
        if self._file is not None:
            write_json(self._file, {"rows": self.all})


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model, and what is made of it.

    Attributes:
        model: its folder.
        checkpoint: the same, open.
        settings: on which text.
        evaluation: what evaluates all results.
        rows: where results go.
        work: a folder for what is evaluated.
    """

    model: Path
    checkpoint: Checkpoint
    settings: Settings
    evaluation: Evaluation
    rows: Rows
    work: Path

    def run(
        self,
        formats: Sequence[str],
        shares: Sequence[float],
        expert_shares: Sequence[float],
        recipes: Sequence[str],
        seeds: Sequence[int],
    ) -> None:
        """Make the rows that are not there: those of llama.cpp first."""
        tensors, shape = gguf_tensors(self.checkpoint), Shape.of(self.checkpoint.config)
        types = {name: types_of(tensors, shape, name) for name in formats}
        sizes = {name: sum(tensor.num_bytes(types[name][tensor.name]) for tensor in tensors) for name in formats}
        plain = plain_bytes(tensors)
        ours = sizes | {share_name(share): int(share * plain) for share in shares}
        for seed in seeds:
            wanted = [name for name in formats if self.rows.find(self._key(name, RIVAL, seed)) is None]
            if wanted:
                weighing = self._importance(seed)
                for name in wanted:
                    begun = time.perf_counter()
                    folder = self.work / "rival"
                    write_rival(self.checkpoint, tensors, types[name], weighing, open_library(), folder)
                    self._score(self._key(name, RIVAL, seed), folder, sizes[name], plain, begun)
        extra = sum(
            tensor.num_bytes("F32") - sum(self.checkpoint.tensors[name].num_bytes for name in tensor.names)
            for tensor in tensors if not tensor.rounded
        )  # fmt: skip
        wanted_of: dict[str, tuple[Size, dict[str, Any]]] = {
            name: (Size(most=most, beside=extra, plain=plain), {"budget": most - extra}) for name, most in ours.items()
        }
        if expert_shares:
            whole, beside = self._experts()
            for share in expert_shares:
                size = Size(most=int(share * whole), beside=beside, plain=whole)
                wanted_of[experts_name(share)] = size, {"bits": 16 * share, "experts_only": True}
        for recipe in recipes:
            for seed in seeds:
                for name, (size, target) in wanted_of.items():
                    if self.rows.find(self._key(name, recipe, seed)) is None:
                        self._ours(name, recipe, seed, size, **target)

    def _key(self, file_format: str, recipe: str, seed: int) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "format": file_format,
            "recipe": recipe,
            "seed": seed,
        } | self.settings.content()

    def _importance(self, seed: int) -> dict[str, torch.Tensor]:
        settings = self.settings
        text = TextSettings(source=settings.text, tokens=settings.tokens, seq_len=settings.seq_len, seed=seed)
        drawn = CalibrationText(self.checkpoint, text).draw()
        return importance(self.model, (ids_BS for _, ids_BS in drawn.batches(8)))

    def _ours(self, file_format: str, recipe: str, seed: int, size: Size, **target: Any) -> None:
        """Compress to what is asked for, and evaluate; a row of nothing where a recipe cannot be that small."""
        begun, key = time.perf_counter(), self._key(file_format, recipe, seed)
        spelling, settings = Spelling.of(recipe), self.settings
        try:
            result = compress(
                self.model, self.work / "ours", recipe=spelling.name, text=settings.text, tokens=settings.tokens,
                seq_len=settings.seq_len, seed=seed, prices=self._prices(spelling.name, seed, spelling.reader),
                effort=spelling.effort, search=spelling.search, target=spelling.reader or None, **target,
            )  # fmt: skip
        except Infeasible:
            self.rows.put(key | NOTHING | {"seconds": time.perf_counter() - begun})
            return
        num_bytes = Checkpoint.open(result.out).num_bytes + size.beside
        assert num_bytes <= size.most, f"{recipe} takes {num_bytes} bytes, and should take {size.most} at most"
        made = {"types": dict(Counter(result.plan.types.values()).most_common()), "expected": result.plan.damage}
        self._score(key | made, result.out, num_bytes, size.plain, begun)

    def _experts(self) -> tuple[int, int]:
        """Return the bytes of routed experts in bfloat16, and what to add to those of a result for theirs."""
        weights = [weight for weight in Source.open(self.model, mtp="keep").weights if weight.kind == "expert"]
        plain = 2 * sum(weight.num_elements for weight in weights)
        return plain, sum(weight.plain_bytes for weight in weights) - self.checkpoint.num_bytes

    def _prices(self, recipe: str, seed: int, target: str) -> Path | None:
        """Return the folder of what types cost, for a recipe that takes it; whoever asks first measures it."""
        return self.work / f"prices {seed} {target}" if get_recipe(recipe).takes_prices else None

    def _score(self, key: dict[str, Any], folder: Path, num_bytes: int, plain: int, begun: float) -> None:
        scores = self.evaluation.score(folder).overall
        shutil.rmtree(folder)
        self.rows.put(
            key
            | {"bytes": num_bytes, "share": num_bytes / plain}
            | {name: scores[name] for name in ("kl", "kl_error", "agreement")}
            | {"seconds": time.perf_counter() - begun}
        )


@cache
def open_library() -> Library:
    """Return llama.cpp's quantiser, checked, which takes some seconds."""
    library = Library()
    check_library(library)
    return library


def write_rival(
    checkpoint: Checkpoint, tensors: Sequence[GgufTensor], types: Mapping[str, str],
    weighing: Mapping[str, torch.Tensor], library: Library, out: Path,
) -> None:  # fmt: skip
    """Write a checkpoint in float32 whose numbers are those of a file that llama.cpp quantised."""
    written = {}
    with checkpoint.reader() as reader:
        for tensor in tensors:
            for name in tensor.names:
                value, kind = reader.read(name), types[tensor.name]
                # As a matrix of rows, whatever the shape; no other than matrices are rounded.
                rows = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
                written[name] = library.round(rows, kind, weighing.get(name)).reshape(value.shape).contiguous()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    for file in checkpoint.other_files():
        if file.name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "special_tokens_map.json",
        ):
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(dict(checkpoint.config) | {"dtype": "float32"}), encoding="utf-8")


def share_name(share: float) -> str:
    """Return what rows are called of which llama.cpp has no format."""
    return f"{share:g} of bf16"


def experts_name(share: float) -> str:
    """Return what rows are called in which experts alone are made smaller."""
    return f"{share:g} of experts"


def number(value: float) -> str:
    """Return a number of nats; more digits where it is small."""
    return f"{value:.{5 if value < 0.01 else 4}f}"


def ran(settings: Settings, seeds: Sequence[int]) -> str:
    """Return a line that says on what text all rows of a table are."""
    draws = ", ".join(map(str, seeds))
    return (
        f"{settings.tokens:,} calibration tokens (draw {draws}), {settings.test_tokens:,} test tokens, sequences of "
        f"{settings.seq_len}."
    )


def tables(rows: Sequence[Mapping[str, Any]], formats: Sequence[str], recipes: Sequence[str]) -> Iterator[str]:
    """Yield lines in Markdown: a table for each model, formats down, recipes across."""
    for model in dict.fromkeys(row["model"] for row in rows):
        found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["model"] == model and row["kl"] is not None:
                found.setdefault((row["format"], row["recipe"]), []).append(row)
        shown = [recipe for recipe in recipes if any((name, recipe) in found for name in formats)]
        foretold = {row["recipe"] for each in found.values() for row in each if row.get("expected") is not None}
        heads = ["format", "bytes", "of bf16", f"{RIVAL} KL", "top-1"]
        for recipe in shown:
            heads += [f"{recipe} KL", "top-1", "ratio"]
            if recipe in foretold:
                heads.append("expected")
        yield f"**{model}**"
        yield ""
        yield f"| {' | '.join(heads)} |"
        yield f"| --- |{' ---: |' * (len(heads) - 1)}"
        for name in formats:
            rival = found.get((name, RIVAL))
            made = [found[name, recipe] for recipe in shown if (name, recipe) in found]
            if rival is None and not made:
                continue
            size = (rival or max(made, key=lambda rows: rows[0]["bytes"]))[0]
            scores = ["-", "-"] if rival is None else _scores(rival)
            cells = [name, f"{size['bytes']:,}", f"{size['share']:.3f}", *scores]
            for recipe in shown:
                ours = found.get((name, recipe))
                if ours is None:
                    cells += ["-", "-", "-"]
                else:
                    ratio = "-" if rival is None else f"{_mean(ours, 'kl') / _mean(rival, 'kl'):.2f}"
                    cells += [*_scores(ours), ratio]
                if recipe in foretold:
                    cells.append("-" if ours is None else number(_mean(ours, "expected")))
            yield f"| {' | '.join(cells)} |"
        yield ""


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    kl = number(_mean(rows, "kl"))
    error = "" if rows[0]["kl_error"] is None else f" ± {number(_mean(rows, 'kl_error'))}"
    return [kl + error, f"{_mean(rows, 'agreement'):.3f}"]


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def main() -> None:
    """Quantise, compress, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[REFERENCE / name for name in MODELS])
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--shares", nargs="*", type=float, default=[], help="bytes of no format, as shares of bf16")
    parser.add_argument("--expert-shares", nargs="*", type=float, default=[], help="bytes of experts alone")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="ours, of the same bytes")
    parser.add_argument("--text", type=Path, default=REFERENCE / "text" / "calibration")
    parser.add_argument("--test", type=Path, default=REFERENCE / "text" / "test")
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--test-tokens", type=int, default=16_384, help="test tokens, shared by the domains")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="draws of calibration text")
    parser.add_argument("--again", nargs="*", default=[], help=f"recipes, or {RIVAL}, whose rows are made anew")
    parser.add_argument("--kept", action="store_true", help="make nothing, print the rows that are there")
    parser.add_argument("--markdown", type=Path, help="where the tables go as well")
    parser.add_argument("--json", type=Path, help="where rows are kept as they are made")
    options = parser.parse_args()
    settings = Settings(
        text=options.text, test=options.test, tokens=options.tokens, test_tokens=options.test_tokens,
        seq_len=options.seq_len,
    )  # fmt: skip
    rows = Rows(options.json)
    if options.again:
        rows.forget(options.again)
    models = [model for model in options.models if (model / "config.json").exists()]
    for model in () if options.kept else models:
        with (
            tempfile.TemporaryDirectory() as folder,
            Evaluation(
                against=model,
                text=settings.test,
                tokens=settings.test_tokens,
                seq_len=settings.seq_len,
                questions=0,
                dtype=torch.float32,
                cache=Path(folder) / "predictions",
            ) as evaluation,
        ):
            comparison = Comparison(
                model=model, checkpoint=Checkpoint.open(model), settings=settings, evaluation=evaluation, rows=rows,
                work=Path(folder),
            )  # fmt: skip
            comparison.run(options.formats, options.shares, options.expert_shares, options.recipes, options.seeds)
    wanted = [
        row
        for row in rows.all
        if row["model"] in {model.name for model in models}
        and row["seed"] in options.seeds
        and all(row[name] == value for name, value in settings.content().items())
    ]
    names = [*options.formats, *map(share_name, options.shares), *map(experts_name, options.expert_shares)]
    lines = [ran(settings, options.seeds), "", *tables(wanted, names, options.recipes)]
    shown = "\n".join(lines).rstrip() + "\n"
    print(shown, end="")  # the result
    if options.markdown is not None:
        options.markdown.write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
