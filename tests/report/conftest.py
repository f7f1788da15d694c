"""Run folders made up from seeded random numbers, written by the real save functions; and a strict reader of pages."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.artifact import write_artifact, write_json
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.plan import Plan
from coterie.evaluate.scorecard import Scorecard
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.manifest import VERSION
from coterie.profile.profile import Profile, Sample

NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH, HIDDEN, TOKENS = 2, 8, 2, 16, 12, 400
BASE = "0ba5e" * 8
VOID = {"meta", "col", "img", "br", "wbr", "hr", "line", "link", "input"}
ORIGINAL_BYTES = 1_000_000


def shape_of(**changes: Any) -> dict[str, Any]:
    """Return the fields of a layer in a manifest that say widths, parts and top_k, unchanged but for `changes`."""
    same = {"width_before": WIDTH, "width_after": WIDTH, "widths_after": None, "parts": 1}
    return same | {"top_k_before": TOP_K, "top_k_after": TOP_K} | changes


class RunMaker:
    """Writes artefacts into one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.random = np.random.default_rng(0)
        self.text_digest = "7e87" * 10

    def profile(
        self,
        domains: Sequence[str] = ("code", "prose"),
        *,
        drop: Sequence[str] = (),
        usage: Sequence[np.ndarray] | None = None,
        place: str = "profile",
    ) -> Profile:
        """Save a profile; `usage` replaces the drawn counts ((G, E) by layer), `drop` leaves statistics out."""
        count = len(domains)
        layers, statistics, samples = [], [], []
        for index in range(NUM_LAYERS):
            share_GE = self.random.dirichlet(np.ones(NUM_EXPERTS), size=count)
            drawn = np.stack([self.random.multinomial(TOKENS * TOP_K, share_E) for share_E in share_GE])
            counts_GE = drawn if usage is None else usage[index]
            logits_TE = self.random.normal(size=(TOKENS, NUM_EXPERTS))
            held = {
                "tokens": np.full(count, TOKENS),
                "usage": counts_GE,
                "mean_output": self.random.normal(size=(count, counts_GE.shape[1], HIDDEN)) * TOKENS,
                "logit_sum": np.stack([logits_TE.sum(0) / count] * count),
                "logit_product": np.stack([logits_TE.T @ logits_TE / count] * count),
            }
            statistics.append({name: torch.tensor(value).double() for name, value in held.items() if name not in drop})
            samples.append(
                Sample(
                    inputs_TD=torch.zeros(3, HIDDEN),
                    index_TK=torch.zeros(3, TOP_K, dtype=torch.int64),
                    weight_TK=torch.ones(3, TOP_K),
                    logits_TE=None,
                    output_TD=torch.zeros(3, HIDDEN),
                    domain_T=torch.zeros(3, dtype=torch.int64),
                )
            )
            block = f"model.layers.{index}.mlp"
            layers.append(
                MoELayer(
                    index=index, block=block, experts=f"{block}.experts", router=f"{block}.gate",
                    router_tensors=((f"{block}.gate.weight", 0),), num_experts=counts_GE.shape[1], top_k=TOP_K,
                    width=WIDTH, hidden_size=HIDDEN,
                )
            )  # fmt: skip
        profile = Profile(
            model_digest=BASE, text_digest=self.text_digest, domains=tuple(domains), num_tokens=(TOKENS,) * count,
            seq_len=64, seed=0, layers=tuple(layers), statistics=tuple(statistics), samples=tuple(samples),
        )  # fmt: skip
        profile.save(self.folder / place)
        return profile

    def plan(
        self, recipe: str = "mergemoe", router: Any = "plain", kept: int = 4, *, size: LayerPlan | None = None
    ) -> Plan:
        """Return a plan; it is not saved."""
        return Plan(
            recipe=recipe, router=router, passes=(), result_steps=(),
            layers=(size or LayerPlan(num_experts=kept),) * NUM_LAYERS, untouched=(),
            original_bytes=ORIGINAL_BYTES, predicted_bytes=ORIGINAL_BYTES * (kept + 8) // 16,
            original_parameters=500, predicted_parameters=300, seed=3, inputs={"model": BASE, "text": self.text_digest},
        )  # fmt: skip

    def manifest(
        self,
        name: str,
        recipe: str = "mergemoe",
        router: str = "plain",
        kept: int = 4,
        *,
        expert_map: Sequence[int] | None = None,
        centres: Sequence[int] | None = None,
        notes: Mapping[str, Any] | None = None,
        took: Mapping[str, Any] | None = None,
        shapes: Sequence[Mapping[str, Any]] = ({},) * NUM_LAYERS,
        **changes: Any,
    ) -> Path:
        """Save a manifest, and what the run took beside it.

        Experts from `kept` on join expert 0, or are dropped by recipes that do not merge. `shapes` are fields by layer.
        """
        plan = self.plan(recipe, router, kept)
        rest = -1 if recipe in ("reap", "frequency") else 0
        expert_map = expert_map or [expert if expert < kept else rest for expert in range(NUM_EXPERTS)]
        layers = [
            {
                "index": index,
                "block": f"model.layers.{index}.mlp",
                "num_experts_before": NUM_EXPERTS,
                "num_experts_after": kept,
                "expert_map": list(expert_map),
                "centres": list(centres or range(kept)),
                "notes": dict(notes or {}),
                **shape_of(),
                **shapes[index],
            }
            for index in range(NUM_LAYERS)
        ]
        body: dict[str, Any] = {
            "version": VERSION,
            "form": "mapped" if router == "map" else "plain",
            "recipe": recipe,
            "passes": [["cluster", {"rule": recipe}], ["average", {}]],
            "router": router,
            "plan": plan.body(),
            "model": "grandmother",
            "domains": ["code", "prose"],
            "calibration_tokens": 800,
            "calibration_inputs": "original",
            "seq_len": 64,
            "seed": 3,
            "logits_error": 2e-7,
            "ragged": None,
            "distilled": None,
            "layers": layers,
            "bytes_before": plan.original_bytes,
            "bytes_after": plan.predicted_bytes,
        }
        path = self.folder / name / "coterie.json"
        write_artifact(path, kind="manifest", body=body | changes, inputs=plan.inputs)
        taken = {"seconds": {"plan": 0.5, "compress": 2.0}, "forecast_bytes": 2**31, "peak_bytes": 3 * 2**29}
        write_json(path.with_name("coterie-run.json"), taken if took is None else took)
        return path

    def narrower(self, name: str, width: int = 8, recipe: str = "heapr", **changes: Any) -> Path:
        """Save the manifest of a result whose experts all have `width` of `WIDTH` neurons."""
        return self.manifest(
            name, recipe, kept=NUM_EXPERTS, shapes=[shape_of(width_after=width)] * NUM_LAYERS, **changes
        )

    def ragged(self, name: str, *widths: Sequence[int], recipe: str = "heapr-ragged", **changes: Any) -> Path:
        """Save the manifest of a result with these widths of the experts of each layer."""
        shapes = [shape_of(widths_after=list(each), centres=None) for each in widths]
        axes = {"width": WIDTH, "axes": {"model.layers.0.mlp.experts.*.up_proj.weight": 0}}
        return self.manifest(name, recipe, kept=NUM_EXPERTS, shapes=shapes, form="ragged", ragged=axes, **changes)

    def cut(self, name: str, *parts: Sequence[int], recipe: str = "coterie", top_k: int = 4, **changes: Any) -> Path:
        """Save the manifest of a result with these numbers of parts of each expert, of 4 in all, by layer."""
        shapes = []
        for counts in parts:
            centres = [expert for expert, count in enumerate(counts) for _ in range(count)]
            note = {"score": "energy", "share_of_score": 0.9, "parts_by_expert": list(counts), "gap": 0.1}
            shape = shape_of(
                width_after=WIDTH // 4, top_k_after=top_k, num_experts_after=len(centres), centres=centres, parts=4
            )
            first = [centres.index(expert) if count else -1 for expert, count in enumerate(counts)]
            shapes.append(shape | {"expert_map": first, "notes": {"segment": note}})
        return self.manifest(name, recipe, shapes=shapes, **changes)

    def card(
        self,
        name: str,
        kl: float | None = 0.25,
        *,
        base: str | None = "grandmother",
        domains: Sequence[str] = ("code", "prose"),
        digest: str | None = None,
        text: str = "5c0e" * 10,
        num_bytes: int = 750_000,
        factor: float = 1.5,
        place: str | None = None,
        accuracy: float | None = 0.5,
        timed: bool = True,
        spread: float | None = None,
        original: float | None = None,
    ) -> Path:
        """Save a scorecard; perplexity is 10 times `factor`, and 20 times it in the last domain.

        Every standard error is `spread`, and the original's own exact answers, where they are kept, `original`.
        """

        def scores(scale: float) -> dict[str, Any]:
            return {
                "perplexity": 10 * scale * factor,
                "perplexity_error": spread,
                "perplexity_rise": None if kl is None else 10 * scale * (factor - 1),
                "perplexity_rise_error": None if kl is None else spread,
                "perplexity_ratio": None if kl is None else factor,
                "perplexity_ratio_error": None if kl is None else spread,
                "kl": None if kl is None else kl * scale,
                "kl_error": None if kl is None else spread,
                "agreement": None if kl is None else max(0.0, 1 - kl / 2),
                "accuracy": accuracy,
                "tokens": 504,
                "sequences": 8,
                "questions": 0 if accuracy is None else 20,
            }

        held = {domain: scores(2.0 if domain == domains[-1] else 1.0) for domain in domains}
        own = {
            domain: entry | {"perplexity": entry["perplexity"] / factor, "kl": None, "agreement": None,
                             "perplexity_rise": None, "perplexity_ratio": None, "accuracy": original}
            for domain, entry in {**held, "all": scores(1.0)}.items()
        }  # fmt: skip
        card = Scorecard(
            model=name, model_digest=digest or sha256(name.encode()).hexdigest(), base=base,
            base_digest=None if base is None else BASE, text_digest=text, seq_len=64, seed=0,
            domains=held, overall=scores(1.0),  # type: ignore[arg-type]
            num_bytes=num_bytes, bytes_ratio=None if base is None else num_bytes / ORIGINAL_BYTES,
            memory_bytes=1 if timed else None, peak_memory_bytes=2 if timed else None,
            tokens_per_second=100.0 if timed else None, speed_ratio=1.25 if timed and base is not None else None,
            environment={"coterie": "0.1.0", "device": "cpu", "threads": 1},
            base_overall=None if original is None else own.pop("all"),  # type: ignore[arg-type]
            base_domains={} if original is None else own,  # type: ignore[arg-type]
        )  # fmt: skip
        return card.save(self.folder / (place or f"scorecards/{len(list(self.folder.rglob('*.json'))):02d}.json"))

    def base_card(self, **changes: Any) -> Path:
        """Save the scorecard of the original."""
        options: dict[str, Any] = {"kl": 0.0, "digest": BASE, "factor": 1.0, "num_bytes": ORIGINAL_BYTES}
        return self.card("grandmother", **(options | changes))


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; keeps sections, table rows, texts and links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.sections: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self._cell: list[str] | None = None
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        held = dict(attrs)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        assert not any(name.startswith("on") for name in held)
        if tag == "section":
            self.sections.append(str(held["id"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            return
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def row(self, first: str) -> list[str]:
        """Return the first row of the page whose first cell is `first`."""
        return next(row for row in self.rows if row and row[0] == first)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunMaker]:
    """Return a function that makes an empty run folder of a name."""
    return lambda name="run": RunMaker(tmp_path / name)


@pytest.fixture
def full_run(make_run: Callable[..., RunMaker]) -> RunMaker:
    """Return a run with everything in it: a profile, three results with scores, and a plan that was not carried out."""
    run = make_run()
    run.profile()
    run.base_card()
    notes = {
        "refit-down": {
            "ridge": [0.01, None, None, None],
            "merged": 1,
            "kept_average": 0,
            "heldout_error_average": 0.5,
            "heldout_error_refit": 0.25,
        }
    }
    for name, recipe, router, kl, kept in (
        ("merged", "mergemoe", "map", 0.125, 4),
        ("merged-plain", "mergemoe", "plain", 0.25, 4),
        ("pruned", "reap", "plain", 0.5, 6),
    ):
        run.manifest(name, recipe, router, kept, notes=notes if recipe == "mergemoe" else None)
        run.card(name, kl, num_bytes=ORIGINAL_BYTES * (kept + 8) // 16)
    run.plan("hc-smoe", kept=2).save(run.folder / "plans" / "small.json")
    return run
