"""The Scorecard: what a model scores on a text and what it costs to run. An artefact that reports read."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast, get_args

import torch

from coterie import __version__
from coterie.artifact import open_artifact, write_artifact
from coterie.evaluate.sums import Scores
from coterie.fields import Fields
from coterie.outputs import claim_output
from coterie.profile.sources import On

#: Scores that came later than the others; what was written before has none of them.
_LATER = (
    "perplexity_error", "perplexity_rise", "perplexity_rise_error", "perplexity_ratio", "perplexity_ratio_error",
    "kl_error",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorecard:
    """What evaluation measured of one model, and where.

    Attributes:
        model: name of the model: its folder's name, or its hub id.
        model_digest: digest of its checkpoint.
        base: name of the base that it was compared with, or None.
        base_digest: digest of the base's checkpoint, or None.
        text_digest: digest of the tokens and questions; scores can be compared only where it is equal.
        seq_len: tokens in a sequence.
        seed: seed of the draw of sequences and questions.
        domains: scores by domain.
        overall: scores over all tokens and all questions (not the mean of the domains).
        num_bytes: bytes of all tensors in the checkpoint's weight files.
        bytes_ratio: `num_bytes` divided by the base's, or None without a base.
        memory_bytes: bytes of parameters and buffers of the whole model in memory, in the number format that it ran in;
            None, like the next three, unless speed was asked for.
        peak_memory_bytes: highest memory while the whole model read one batch, itself included, above what was in use
            before it was loaded. (Loading can need more for a moment.)
        tokens_per_second: tokens that the whole model read per second in forward passes over one batch.
        speed_ratio: that divided by the base's, measured in turns with it; None without a base.
        environment: versions, device and number format that all of this was measured with.
        on: which tokens' predictions were scored: "all", or those of answers, "assistant".
        base_domains: the base's own scores by domain, on the same tokens and questions; empty without a base, and in
            scorecards from before they were kept.
        base_overall: the base's own scores over all; None where there are none.
        tasks: metrics by task of the lm-evaluation-harness, see `coterie.evaluate.harness`; empty when none was run.
        route: how the policy was made that said which experts are computed; empty where all were that routers chose.
        experts_per_token: experts that a layer computed for a token, in the mean; None without a policy.
    """

    model: str
    model_digest: str
    base: str | None
    base_digest: str | None
    text_digest: str
    seq_len: int
    seed: int
    domains: Mapping[str, Scores]
    overall: Scores
    num_bytes: int
    bytes_ratio: float | None
    memory_bytes: int | None
    peak_memory_bytes: int | None
    tokens_per_second: float | None
    speed_ratio: float | None
    environment: Mapping[str, str | int]
    on: On = "all"
    base_domains: Mapping[str, Scores] = field(default_factory=dict)
    base_overall: Scores | None = None
    tasks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    route: str = ""
    experts_per_token: float | None = None

    def save(self, path: str | Path) -> Path:
        """Write the scorecard as one JSON file and return its path; anything but a scorecard there is refused."""
        target = claim_output(path, kind="scorecard")
        body = asdict(self)
        inputs = {"model": body.pop("model_digest"), "text": body.pop("text_digest")}
        base_digest = body.pop("base_digest")
        if base_digest is not None:
            inputs["base"] = base_digest
        write_artifact(target, kind="scorecard", body=body, inputs=inputs)
        return target

    @classmethod
    def load(cls, path: str | Path, *, inputs: Mapping[str, str] | None = None) -> Scorecard:
        """Read a scorecard.

        Args:
            path: the JSON file that `save` wrote.
            inputs: digests ("model", "base", "text") that it must carry; names that are not given are not checked.

        Raises:
            CorruptArtifact: missing, damaged or of another kind, or a field is missing, unknown or of another type.
            StaleArtifact: made from other inputs.
        """
        source = Path(path)
        artifact = open_artifact(source, kind="scorecard", inputs=inputs)
        digests = Fields(dict(artifact.inputs), where=str(source), path="inputs")
        # Scorecards from before there were tasks, answers, scores of the base, or policies, say nothing of them.
        later: dict[str, object] = {"tasks": {}, "on": "all", "base_domains": {}, "base_overall": None}
        later |= {"route": "", "experts_per_token": None}
        body = Fields(later | artifact.body, where=str(source))
        with digests.all_read(), body.all_read():
            base = None if body.null("base") else body.text("base")
            if base is None and digests.said("base"):
                raise body.wrong("base", base, "it has a digest, but no name")
            return cls(
                model=body.text("model"),
                model_digest=digests.text("model"),
                base=base,
                base_digest=None if base is None else digests.text("base"),
                text_digest=digests.text("text"),
                seq_len=body.whole("seq_len"),
                seed=body.whole("seed", least=None),
                on=cast(On, body.text("on", get_args(On))),
                domains={name: _scores_of(entry) for name, entry in body.each_by_name("domains").items()},
                overall=_scores_of(body.nested("overall")),
                num_bytes=body.whole("num_bytes"),
                bytes_ratio=_number_or_none(body, "bytes_ratio"),
                memory_bytes=None if body.null("memory_bytes") else body.whole("memory_bytes"),
                peak_memory_bytes=None if body.null("peak_memory_bytes") else body.whole("peak_memory_bytes"),
                tokens_per_second=_number_or_none(body, "tokens_per_second"),
                speed_ratio=_number_or_none(body, "speed_ratio"),
                environment=body.texts_or_wholes_by_name("environment"),
                base_domains={name: _scores_of(entry) for name, entry in body.each_by_name("base_domains").items()},
                base_overall=None if body.null("base_overall") else _scores_of(body.nested("base_overall")),
                tasks={
                    task: {name: _number_or_none(metrics, name, least=None) for name in metrics.names()}
                    for task, metrics in body.each_by_name("tasks").items()
                },
                route=body.text("route"),
                experts_per_token=_number_or_none(body, "experts_per_token"),
            )


def _scores_of(entry: Fields) -> Scores:
    with entry.all_read():
        return read_scores(entry)


def read_scores(entry: Fields) -> Scores:
    """Read scores from an object that may say more; raises CorruptArtifact with the path of the field.

    Errors, and what was compared with the base's perplexity, are None where scores were written before there were any.
    """
    later = {name: _later_number(entry, name) for name in _LATER}
    scores = Scores(
        # These two are infinite where a model rules out what the text or the base says.
        perplexity=_number_or_none(entry, "perplexity", infinite=True),
        perplexity_error=later["perplexity_error"],
        perplexity_rise=later["perplexity_rise"],
        perplexity_rise_error=later["perplexity_rise_error"],
        perplexity_ratio=later["perplexity_ratio"],
        perplexity_ratio_error=later["perplexity_ratio_error"],
        # A sum of tiny differences is below zero by rounding.
        kl=_number_or_none(entry, "kl", least=None, infinite=True),
        kl_error=later["kl_error"],
        agreement=_number_or_none(entry, "agreement"),
        accuracy=_number_or_none(entry, "accuracy"),
        tokens=entry.whole("tokens"),
        sequences=entry.whole("sequences") if entry.said("sequences") else 0,
        questions=entry.whole("questions"),
    )
    for name in ("agreement", "accuracy"):
        if (scores[name] or 0) > 1:
            raise entry.wrong(name, scores[name], "is a share, 1 at most")
    return scores


def _number_or_none(entry: Fields, name: str, *, least: float | None = 0.0, infinite: bool = False) -> float | None:
    return None if entry.null(name) else entry.number(name, least=least, infinite=infinite)


def _later_number(entry: Fields, name: str) -> float | None:
    if not entry.said(name):
        return None
    signed = name == "perplexity_rise"
    return entry.number(name, least=None if signed else 0.0, infinite=not name.endswith("_error"))


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """Describe what a measurement ran on: versions, device, number format, threads and platform."""
    return {
        "coterie": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
