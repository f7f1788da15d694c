"""The study behind the recipe `coterie`: every idea that was tried for it, measured in the same way.

    OMP_NUM_THREADS=1 python benchmarks/research.py [--only GROUP[,GROUP]] [--variants NAME ...] [--list]
                                                    [--model reference/model] [--keep 0.5] [--out research]
                                                    [--tokens 65536] [--sample-tokens 8192]
                                                    [--test-tokens 10240] [--scale 1] [--markdown FILE]

Makes the bundled reference model smaller in each of the ways that --list names, by groups: which neurons to drop, what
form is left, how it is re-fitted, how it is trained, what it still answers. Each result is held in memory with the
numbers rounded as they would be on disk, and compared with the original on text that nothing was measured on. Prints
tables in Markdown.

It takes hours and may be ended at any time: OUT/results.jsonl has one line for each variant that is finished, by its
name and all that it depends on, and the same command goes on. OUT also holds the profile and the models that training
begins from; once they are there, several commands may share it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from coterie.artifact import atomic_path, digest_of, file_digest
from coterie.compress.decide import allocate
from coterie.compress.layer import compress_layer
from coterie.compress.layer_plan import LayerPlan, ragged_plan
from coterie.compress.methods import segment
from coterie.compress.methods.slim import RANKINGS, needs
from coterie.compress.recipes import Recipe
from coterie.compress.request import Request
from coterie.compress.source import Source
from coterie.compress.target import Target
from coterie.errors import CoterieError, Infeasible
from coterie.evaluate.divergence import token_divergence
from coterie.evaluate.generation import count_correct, read_questions
from coterie.model.arch.conversion import TORCH_DTYPES, put
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.load import load_model, result_meta_model
from coterie.model.arch.reroute import Reroute
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibration import tokenize
from coterie.profile.documents import text_files
from coterie.profile.profile import FILE, Profile
from coterie.profile.run import profile
from coterie.profile.self_text import SELF
from coterie.profile.statistics import STATISTICS
from coterie.profile.text import CalibrationText, TextSettings
from coterie.train.model import experts_apart
from research_training import (
    ADDED,
    MICRO_TOKENS,
    Training,
    added_scores,
    router_gap,
    study_statistics,
    train,
)

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
RESULTS = "results.jsonl"

#: What each group of variants is about.
GROUPS = {
    "score": "Which neurons to drop; nothing is re-fitted",
    "form": "What form is left; neurons by their energy, nothing is re-fitted",
    "refit": "How the layers are re-fitted",
    "rate": "How large the steps of the training are",
    "distil": "How the result is trained",
    "answers": "How many questions are answered exactly",
}

#: A gap with which a token chooses the lesser parts of an expert before the better ones.
LESSER_FIRST = -0.01

Pass = tuple[str, Mapping[str, Any]]
Shrinks = Literal["experts", "width", "parts", "ragged", "ragged-layers"]
JOINT: tuple[Pass, ...] = (("refit-joint", {}),)


# The variants.


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What the experts of a model become.

    Attributes:
        shrinks: their number, their width (all to the same one), the number of the parts that they are cut into, or the
            width of each by itself: as one ranking of the neurons of all layers has it ("ragged"), or one in each layer
            with as many neurons as in every other ("ragged-layers").
        score: name of the score that ranks neurons or experts.
        parts: parts of each expert.
        chosen: parts that a token chooses, as a multiple of the usual number.
        gap: how far parts of one expert are apart in the router, see `coterie.compress.methods.segment.GAP`.
    """

    shrinks: Shrinks = "parts"
    score: str = "energy"
    parts: int = 4
    chosen: float = 1.0
    gap: float = segment.GAP

    @property
    def recipe(self) -> Recipe:
        """The one pass that makes this form, as a recipe of the package."""
        step: Pass
        if self.shrinks == "experts":
            whole = ("segment", {"score": self.score, "parts": 1})
            step = ("select", {"score": self.score}) if self.score in ("reap", "msan") else whole
        elif self.shrinks == "parts":
            step = ("segment", {"score": self.score, "parts": self.parts})
        else:
            step = ("slim", {"score": self.score})
        allocators = {"experts": "fewer", "parts": "parts", "ragged": "ragged"}
        return Recipe(name="study", passes=(step,), allocator=allocators.get(self.shrinks, "narrower"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One idea: how a result is made.

    Attributes:
        name: what the user types; no two are alike.
        group: one of `GROUPS`.
        says: what it is, in one sentence.
        form: what the experts become.
        refit: passes after that, with their options.
        training: how the result is trained at last; None for not at all.
    """

    name: str
    group: str
    says: str
    form: Form
    refit: tuple[Pass, ...] = ()
    training: Training | None = None


def variants(scale: float = 1.0) -> list[Variant]:
    """Return all variants, by groups; training sees `scale` times as much text."""
    generators = (rate_variants, distil_variants, answer_variants)
    trained = [variant for generator in generators for variant in generator(scale)]
    return [*score_variants(), *form_variants(), *refit_variants(), *trained]


def score_variants() -> Iterator[Variant]:
    """Yield one with equal widths and one with free ones for each score."""
    scores = {
        "activation": ("study-activation", "the sum of h^2 w'w over the expert's tokens"),
        "heapr": ("heapr", "HEAPr: the mean of h^2 over the expert's tokens, times w'Gw with a G of its own"),
        "energy": ("energy", "the sum of (g h)^2 over the expert's tokens, times w'Gw with one G for the layer"),
        "fisher": ("study-fisher", "the sum of (g h d'w)^2 over the expert's tokens: diagonal Fisher information"),
        "mean": ("study-mean", "the geometric mean of fisher and energy"),
    }
    widths: list[tuple[str, Shrinks, str]] = [
        ("uniform", "width", "all experts equally wide"),
        ("ragged", "ragged", "every expert with its own width"),
    ]
    for name, (score, says) in scores.items():
        for ending, shrinks, how in widths:
            form = Form(shrinks=shrinks, score=score)
            yield Variant(name=f"{name}-{ending}", group="score", says=f"{says}; {how}", form=form)
    form = Form(shrinks="experts", score="reap")
    yield Variant(name="reap", group="score", says="whole experts are dropped, those of least REAP score", form=form)


def form_variants() -> Iterator[Variant]:
    """Yield the forms that half of a model can have, all by the same score."""
    forms: dict[str, tuple[Form, str]] = {
        "whole-experts": (Form(shrinks="experts"), "fewer experts, each as it was"),
        "narrower": (Form(shrinks="width"), "all experts, all equally narrow"),
    }
    for parts in (2, 3, 4, 6):
        forms[f"parts-{parts}"] = (Form(parts=parts), f"experts are cut into {parts} parts, the best parts stay")
    for gap in (0.0, 0.1, 0.3):
        says = f"4 parts, in the router {gap:g} standard deviations apart instead of {segment.GAP:g}"
        forms[f"gap-{gap:g}"] = (Form(gap=gap), says)
    says = f"4 parts, in the router {-LESSER_FIRST:g} standard deviations apart, the lesser ones first"
    forms["lesser-first"] = (Form(gap=LESSER_FIRST), says)
    for chosen, few in ((0.75, "three quarters as many"), (1.25, "a quarter more"), (1.5, "half as many again")):
        says = f"4 parts, {few} chosen for each token ({round(10 * chosen)} instead of 10 where half is kept)"
        forms[f"chosen-{chosen:g}"] = (Form(chosen=chosen), says)
    says = "every expert with its own width, each layer with as many neurons (no plain checkpoint)"
    forms["ragged-layers"] = (Form(shrinks="ragged-layers"), says)
    says = "every expert with its own width, by one ranking of all layers (no plain checkpoint)"
    forms["ragged-everywhere"] = (Form(shrinks="ragged"), says)
    for name, (form, says) in forms.items():
        yield Variant(name=name, group="form", says=says, form=form)


def refit_variants() -> Iterator[Variant]:
    """Yield what may be done to a layer by itself once neurons are gone."""
    parts, removal, prior = Form(), Form(score="study-removal"), ("refit-joint", {"prior": 256.0})
    entries: dict[str, tuple[Form, tuple[Pass, ...], str]] = {
        "no-refit": (parts, (), "4 parts as they were cut"),
        "joint": (parts, JOINT, "4 parts, all down projections of a layer solved for together, ridge of 16 tokens"),
        "joint-256": (parts, (prior,), "the same with a ridge of 256 tokens"),
        "joint-lesser-first": (Form(gap=LESSER_FIRST), JOINT, "joint, from lesser-first"),
        "joint-reconstruct": (parts, (*JOINT, ("reconstruct", {})), "joint, then all projections trained by layers"),
        "removal": (removal, (), "4 parts, neurons ranked by greedy removal with the others made up for"),
        "removal-joint": (removal, JOINT, "the same, then joint"),
        "narrower-joint": (Form(shrinks="width"), JOINT, "all experts equally narrow, joint"),
        "ragged-joint": (Form(shrinks="ragged"), JOINT, "every expert with its own width, joint (no plain checkpoint)"),
    }
    for name, (form, refit, says) in entries.items():
        yield Variant(name=name, group="refit", says=says, form=form, refit=refit)


def rate_variants(scale: float) -> Iterator[Variant]:
    """Yield rates of the training from 4 parts, jointly re-fitted."""
    for rate in (0.0025, 0.005, 0.01, 0.02):
        training = replace(Training().scaled(scale), rate=rate)
        says = f"{training.tokens:,} tokens, {training.step_tokens:,} of them a step, rate {rate:g}"
        yield Variant(name=f"rate-{rate:g}", group="rate", says=says, form=Form(), refit=JOINT, training=training)


def distil_variants(scale: float) -> Iterator[Variant]:
    """Yield ways to train, most of them from 4 parts, jointly re-fitted."""
    plain = Training().scaled(scale)
    tried: dict[str, tuple[Training | None, str]] = {"untrained": (None, "4 parts, joint: where training begins")}
    for tokens in (512, 1_024, 2_048, 4_096):
        says = f"{plain.tokens:,} tokens, {tokens:,} of them a step, rate {plain.rate:g}"
        tried[f"step-{tokens}"] = (replace(plain, step_tokens=tokens), says)
    for classes in (64, 128, 256):
        says = f"as step-2048, the loss sees the {classes} most probable tokens and one class for the rest"
        tried[f"classes-{classes}"] = (replace(plain, classes=classes), says)
    says = "as step-2048, attention and norms too at a fifth of the rate"
    tried["attention-too"] = (replace(plain, others=0.2), says)
    for weight in (0.1, 1.0):
        says = f"as step-2048, plus {weight:g} times the relative error of the hidden states behind each layer"
        tried[f"hidden-{weight:g}"] = (replace(plain, hidden=weight), says)
    says = "as step-2048, experts by Muon at a rate of 0.003, routers by Adam"
    tried["muon"] = (replace(plain, optimizer="muon", rate=0.003), says)
    says = "as step-2048, Adam in the eigenbasis of what each matrix receives"
    tried["eigenbasis"] = (replace(plain, optimizer="eigenbasis"), says)
    says = "as step-2048, the rate stays and falls in the last half of the steps, instead of from the first on"
    tried["fall-0.5"] = (replace(plain, falls_late=True), says)
    for share, says in ((0.25, "quarter"), (0.5, "half")):
        says = f"as step-2048, the rate does not fall, the result is the mean of what the last {says} of the steps made"
        tried[f"average-{share:g}"] = (replace(plain, average=share), says)
    tried["own-text"] = (replace(plain, own_text=True), "as step-2048, on text that the original wrote")
    tried["from-narrower"] = (plain, "as step-2048, from equally narrow experts, joint")
    for times in (2, 4, 8):
        longer = Training().scaled(times * scale)
        tried[f"text-{times}x"] = (longer, f"as step-2048, {longer.tokens:,} tokens, each seen once")
    longer = replace(Training().scaled(4 * scale), falls_late=True)
    tried["text-4x-fall"] = (longer, "as text-4x, the rate as in fall-0.5")
    longer = replace(Training().scaled(4 * scale), pool=plain.tokens)
    tried["four-times"] = (longer, f"as text-4x, but {plain.tokens:,} tokens, each seen four times")
    says = "as text-4x, from experts with their own widths, joint (no plain checkpoint)"
    tried["from-ragged"] = (Training().scaled(4 * scale), says)
    forms = {"from-narrower": Form(shrinks="width"), "from-ragged": Form(shrinks="ragged")}
    for name, (how, says) in tried.items():
        yield Variant(
            name=name, group="distil", says=says, form=forms.get(name, Form()), refit=JOINT, training=how
        )  # fmt: skip


def answer_variants(scale: float) -> Iterator[Variant]:
    """Yield results that are asked questions: whole experts and narrower ones, and ways to train towards answers."""
    whole, narrow = Form(shrinks="experts", score="msan"), Form(shrinks="width", score="heapr")
    parts, plain = Form(), replace(Training().scaled(scale), falls_late=True)
    often = "as fall-0.5, what the questions are about has five times its share of the text"
    sure = "as fall-0.5, tokens of which the original is sure (more than 90 %) count five times"
    trainings: dict[str, tuple[Training, str]] = {
        "trained": (plain, "fall-0.5"),
        "trained-again": (replace(plain, order=1), "the same, the text in another order"),
        "slow": (replace(plain, rate=0.0025), "as fall-0.5 with a rate of 0.0025"),
        "sure": (replace(plain, sure=4.0), sure),
        "asked": (replace(plain, asked=5.0), often),
    }
    tried: dict[str, tuple[Form, tuple[Pass, ...], Training | None, str]] = {
        "msan": (whole, (), None, "whole experts are dropped, those of least mean square output"),
        "heapr": (narrow, (), None, "heapr-uniform"),
        "untrained": (parts, JOINT, None, "4 parts, joint: where training begins"),
        **{name: (parts, JOINT, training, says) for name, (training, says) in trainings.items()},
    }
    for name, (form, refit, how, says) in tried.items():
        yield Variant(name=f"answers-{name}", group="answers", says=says, form=form, refit=refit, training=how)


# Making and measuring.


class Study:
    """The original model, its profile and its test text, and what becomes of them.

    Attributes:
        settings: all that every result depends on.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the model and read it, and see to it that its profile is there."""
        self._options = options
        self._source = Source.open(options.model)
        self._checkpoint = self._source.checkpoint
        self._architecture = self._source.architecture
        self._conversion = self._source.conversion
        self._tokenizer = load_tokenizer(options.model)
        self._original = load_model(options.model, dtype=torch.float32).requires_grad_(False)
        self._questions = read_questions(options.test)
        self._test = tokenize(
            self._tokenizer, options.test, seq_len=options.seq_len, tokens=options.test_tokens, seed=options.seed
        )
        measured = {
            "model": self._checkpoint.digest,
            "calibration": {domain: file_digest(file) for domain, file in text_files(options.text).items()},
            "tokens": [options.tokens, options.sample_tokens], "seq_len": options.seq_len, "seed": options.seed,
        }  # fmt: skip
        self.settings = {"measured": digest_of(measured)[:16], "test": self._test.digest[:16], "keep": options.keep}
        folder: Path = options.out / f"profile-{self.settings['measured']}"
        if not (folder / FILE).exists():
            print("profile ...", file=sys.stderr, flush=True)
            profile(
                options.model, folder, text=options.text, tokens=options.tokens, seq_len=options.seq_len,
                seed=options.seed, sample_tokens=options.sample_tokens, statistics=STATISTICS,
            )  # fmt: skip
        self._profile = Profile.load(folder, model_digest=self._checkpoint.digest)

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Make a variant and return what the results say of it.

        `seconds` are those of making it, without the profile; where it is trained, those of training alone.

        Raises:
            CoterieError: it cannot be made of this model.
        """
        begin = time.perf_counter()
        model = self.make(variant.form, variant.refit, keep_tensors=variant.training is not None)
        trained: dict[str, Any] = {}
        if variant.training is not None:
            begin = time.perf_counter()
            losses = train(
                model, self._original, self._architecture.layers, self._text(variant.training), variant.training,
                seed=self._options.seed + variant.training.order,
            )  # fmt: skip
            for name, tensor in model.state_dict().items():
                tensor.copy_(self._rounded(name, tensor))
            last = losses[-max(1, len(losses) // 8) :]
            trained = {"steps": len(losses), "last_losses": sum(last) / len(last)}
        seconds = time.perf_counter() - begin
        scores = self.compare(model) | {"seconds": round(seconds, 1)} | trained
        if variant.group == "answers":
            scores |= {"exact": self.answered(model), "exact_original": self._answered_by_original}
        return scores

    @cached_property
    def _answered_by_original(self) -> float:
        return self.answered(self._original)

    def answered(self, model: PreTrainedModel) -> float:
        """Return the share of all questions of the test text that a model answers exactly, by greedy search."""
        all_questions = [question for questions in self._questions.values() for question in questions]
        with experts_apart(model):
            return count_correct(model, self._tokenizer, all_questions) / max(1, len(all_questions))

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> dict[str, Any]:
        """Compare a model with the original on the test text.

        Returns:
            The mean divergence in nats per token, the share of tokens with the same likeliest one, and the divergence
            by domain; domains count alike.
        """
        sums = {domain: [0.0, 0.0, 0] for domain in self._test.domains}  # of divergences, agreements, tokens
        with experts_apart(self._original), experts_apart(model):
            for domain, ids_BS in self._test.batches(max(1, MICRO_TOKENS // self._test.seq_len)):
                original_logits, logits = (
                    each(input_ids=ids_BS, use_cache=False).logits for each in (self._original, model)
                )
                divergence_T, same_T = token_divergence(original_logits, logits)
                domain_sums = sums[self._test.domains[domain]]
                domain_sums[0] += float(divergence_T.double().sum())
                domain_sums[1] += float(same_T.sum())
                domain_sums[2] += len(same_T)
        kl = {domain: total / count for domain, (total, _, count) in sums.items()}
        agreement = [same / count for _, same, count in sums.values()]
        worst = max(kl, key=lambda domain: kl[domain])
        return {
            "kl": sum(kl.values()) / len(kl),
            "agreement": sum(agreement) / len(agreement),
            "worst_kl": kl[worst],
            "worst_domain": worst,
            "kl_by_domain": kl,
        }

    @torch.no_grad()
    def make(self, form: Form, refit: Sequence[Pass] = (), *, keep_tensors: bool = False) -> PreTrainedModel:
        """Make the model of a form, float32, with the numbers that it would have on disk.

        Args:
            form: what its experts become.
            refit: passes after that.
            keep_tensors: whether its tensors are kept in OUT, and read from there when they are there.

        Raises:
            CoterieError: it cannot be made of this model.
        """
        name = digest_of([self.settings, asdict(form), refit])[:16]
        file: Path = self._options.out / "starts" / f"{name}.safetensors"
        with added_scores():
            measured = self._measured(form.score)
            sizes = self.sizes(form, measured)
            if keep_tensors and file.exists():
                return self._filled(sizes[0], load_file(file))
            tensors = self._compressed(form, refit, sizes, measured)
        if keep_tensors:
            file.parent.mkdir(exist_ok=True)
            with atomic_path(file) as temporary:
                save_file(tensors, temporary)
        return self._filled(sizes[0], tensors)

    def _measured(self, score: str) -> Profile:
        """Return the profile, with statistics that only this study has where a score reads them."""
        names = ADDED[score][1] if score in ADDED else ()
        if not any(name.startswith("study") for name in names):
            return self._profile
        statistics = []
        for layer, layer_statistics in zip(self._architecture.layers, self._profile.statistics, strict=True):
            experts = canonical_experts(self._original.get_submodule(layer.experts))
            statistics.append(
                {**layer_statistics, **study_statistics(experts, self._profile.samples[layer.index], names)}
            )
        return replace(self._profile, statistics=statistics)

    def sizes(self, form: Form, measured: Profile) -> tuple[LayerPlan, ...]:
        """Return what every layer gets.

        Raises:
            Infeasible: this model cannot have that form.
        """
        layers, architecture = self._architecture.layers, self._architecture
        request = Request(recipe=form.recipe, target=Target(keep=self._options.keep))
        plans = allocate(self._source, request, measured).layers
        if form.shrinks == "ragged-layers":
            return tuple(
                self._ragged(form.score, measured, layer, size) for layer, size in zip(layers, plans, strict=True)
            )
        if form.shrinks != "parts":
            return plans
        width, top_k = plans[0].width, plans[0].top_k
        if width is None or top_k is None or width * form.parts != layers[0].width:
            raise Infeasible(f"experts of width {layers[0].width} cannot be cut into {form.parts} parts here")
        top_k = max(1, round(form.chosen * top_k))
        architecture.check_feasible(plans[0].num_experts, top_k)
        return tuple(replace(size, top_k=top_k) for size in plans)

    def _ragged(self, score: str, measured: Profile, layer: MoELayer, plan: LayerPlan) -> LayerPlan:
        """Keep as many neurons of a layer as that size has, the best ones whichever experts they are of."""
        scores_EF = RANKINGS[score]({name: measured.sum(layer.index, name) for name in needs(score)})
        best = scores_EF.flatten().argsort(descending=True, stable=True)[
            : plan.num_experts * (plan.width or layer.width)
        ]
        widths_E = torch.bincount(best // layer.width, minlength=layer.num_experts)
        return ragged_plan(widths_E.tolist())

    def _compressed(
        self, form: Form, refit: Sequence[Pass], sizes: Sequence[LayerPlan], measured: Profile
    ) -> dict[str, Tensor]:
        """Send every layer through the passes; return experts and routers by name in memory, as they are on disk."""
        reroute = Reroute(self._architecture, self._original, sizes[0].top_k)
        passes = (*form.recipe.passes, *refit)
        tensors: dict[str, Tensor] = {}
        with router_gap(form.gap):
            for layer, size in zip(self._architecture.layers, sizes, strict=True):
                layer_tensors, _ = compress_layer(
                    self._original, layer, size, passes, measured.statistics[layer.index],
                    measured.samples[layer.index], reroute, self._options.seed,
                )  # fmt: skip
                tensors |= {name: self._rounded(name, tensor).contiguous() for name, tensor in layer_tensors.items()}
        return tensors

    def _filled(self, plan: LayerPlan, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """Return a model of the original's weights with some replaced; it shares none with the original."""
        model = result_meta_model(
            self._architecture, plan.num_experts, maps=None, dtype=torch.float32, width=plan.width, top_k=plan.top_k
        )
        for name, tensor in {**self._original.state_dict(), **tensors}.items():
            put(model, name, tensor.to(torch.float32, copy=True))
        return model

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the number format that it has on disk, by its name in memory."""
        sources = self._conversion.sources.get(name)
        return tensor if sources is None else tensor.to(TORCH_DTYPES[self._checkpoint.tensors[sources[0]].dtype])

    def _text(self, training: Training) -> Tensor:
        """Return the text that a result is trained on, (B, S)."""
        options, tokens = self._options, training.pool or training.tokens
        if training.own_text:
            settings = TextSettings(source=SELF, tokens=tokens, seq_len=options.seq_len, seed=options.seed)
            return torch.cat(list(CalibrationText(self._checkpoint, settings).draw().sequences.values()))
        draw: dict[str, Any] = {"seq_len": options.seq_len, "tokens": tokens, "seed": options.seed, "up_to": True}
        if training.asked != 1:
            draw["weights"] = dict.fromkeys(self._questions, training.asked)
        drawn = tokenize(self._tokenizer, options.text, **draw)
        return torch.cat(list(drawn.sequences.values()))


# What is finished, and what is shown of it.


class Results:
    """The file of finished variants: one JSON object a line, which is all that is ever written."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Point to the file in a folder; `settings` are part of what a result is known by."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / RESULTS
        self._settings = settings

    def find(self, variant: Variant) -> dict[str, Any] | None:
        """Return the line of a variant, or None while it is not finished."""
        key = self._key(variant)
        return next((line for line in self._lines() if line.get("key") == key), None)

    def add(self, variant: Variant, scores: Mapping[str, Any]) -> None:
        """Append the line of a variant."""
        line = {"name": variant.name, "group": variant.group, "key": self._key(variant), **self._settings, **scores}
        # A line that was cut off stays by itself.
        begin = "\n" if self._file.exists() and not self._file.read_bytes().endswith(b"\n") else ""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(begin + json.dumps(line) + "\n")

    def _key(self, variant: Variant) -> str:
        about = {key: value for key, value in asdict(variant).items() if key not in ("group", "says")}
        if variant.training is not None:
            # Choices that were added later, and that a variant does not make, leave its line what it is.
            usual = asdict(Training())
            about["training"] = {key: value for key, value in about["training"].items() if value != usual[key]}
        return digest_of([self._settings, about])[:16]

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []:
            with suppress(json.JSONDecodeError):  # cut off when a run was ended
                yield json.loads(line)


def render(chosen: Sequence[Variant], results: Results, options: argparse.Namespace) -> str:
    """Return the tables in Markdown, one for each group; dashes for what is not finished or not possible."""
    lines = [
        f"{'/'.join(options.model.resolve().parts[-2:])}, {options.keep:.0%} of the experts' bytes kept. Calibration: "
        f"{options.tokens:,} tokens, a sample of {options.sample_tokens:,}; test: {options.test_tokens:,} tokens of "
        "other text. KL: mean divergence from the original's predictions, nats per token; same token: how often the "
        "likeliest one is the original's; worst: KL of the domain where it is largest; seconds: to make it from the "
        "profile or, where it is trained, to train it, on one thread."
    ]
    for group, title in GROUPS.items():
        rows = [variant for variant in chosen if variant.group == group]
        if not rows:
            continue
        heads = ["KL", "same token", "worst", "seconds", *(["exact"] if group == "answers" else [])]
        lines += ["", f"## {title}", ""]
        line_by_name = {variant.name: results.find(variant) for variant in rows}
        if original := next(
            (line["exact_original"] for line in line_by_name.values() if line and "exact" in line), None
        ):
            lines += [f"exact: share of all questions of the test text; the original answers {original:.1%}.", ""]
        lines.append(f"| variant | what it is | {' | '.join(heads)} |")
        lines.append(f"| --- | --- |{' ---: |' * len(heads)}")
        for variant in rows:
            line = line_by_name[variant.name]
            cells = ["-"] * len(heads)
            if line is not None:
                cells = [f"{line['kl']:.4f}", f"{line['agreement']:.1%}", f"{line['worst_kl']:.3f}"]
                cells.append(f"{line['seconds']:.1f}")
                cells += [f"{line['exact']:.1%}"] if group == "answers" else []
            lines.append(f"| {variant.name} | {variant.says} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is wanted and not there yet, print the tables."""
    names = [variant.name for variant in variants()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "model")
    parser.add_argument("--text", type=Path, default=REFERENCE / "text" / "calibration")
    parser.add_argument("--test", type=Path, default=REFERENCE / "text" / "test")
    parser.add_argument(
        "--out", type=Path, default=REFERENCE.parent / "research", help="folder of results, profile and starts"
    )
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, separated by commas; of {', '.join(GROUPS)}")
    parser.add_argument("--variants", nargs="+", choices=names, metavar="NAME", help="all of the groups by default")
    parser.add_argument("--list", action="store_true", help="say which variants there are, and end")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts' bytes to keep")
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--sample-tokens", type=int, default=8_192, help="of these, what layers are re-fitted on")
    parser.add_argument("--test-tokens", type=int, default=10_240, help="test tokens, shared by the domains")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the tokens that results are trained on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="where the tables go as well")
    options = parser.parse_args()

    groups = options.only.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        parser.error(f"unknown group {unknown[0]}; choose from {', '.join(GROUPS)}")
    chosen_names = options.variants or names
    chosen = [each for each in variants(options.scale) if each.group in groups and each.name in chosen_names]
    if options.list:
        for variant in chosen:
            print(f"{variant.group:7} {variant.name:18} {variant.says}")
        return
    study = Study(options)
    results = Results(options.out, study.settings)
    for variant in chosen:
        if results.find(variant) is not None:
            continue
        try:
            scores = study.measure(variant)
        except CoterieError as error:
            print(f"{variant.name} is left out: {error}", file=sys.stderr, flush=True)
            continue
        results.add(variant, scores)
        print(f"{variant.name}: KL {scores['kl']:.4f}, {scores['seconds']:.0f} s", file=sys.stderr, flush=True)
    tables = render(chosen, results, options)
    print(tables, end="")
    if options.markdown is not None:
        options.markdown.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    main()
