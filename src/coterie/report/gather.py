"""Find what a run folder holds: profiles, plans, compressed checkpoints and scorecards, and which belongs to which."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coterie.artifact import read_header
from coterie.compress.plan import Plan
from coterie.errors import CorruptArtifact, CoterieError, InputError
from coterie.evaluate.scorecard import Scorecard
from coterie.fields import Fields, shown
from coterie.model.arch.inspect import Inspection, inspect
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import MANIFEST, LayerEntry, Manifest, ResultForm
from coterie.paths import user_path
from coterie.profile.profile import FILE as PROFILE_FILE
from coterie.profile.profile import Profile
from coterie.publish.hub import RUN_FILE
from coterie.report.layers import share_left, size_mark, size_text
from coterie.report.words import percent_text

log = logging.getLogger(__name__)

#: How deep below the run folder artefacts are looked for: RUN/a/b/file.json is found.
DEPTH = 3

#: Results are of one size when the shares of neurons that they keep differ by less.
SAME_SIZE = 0.01

_OUR_NAMES = (PROFILE_FILE, MANIFEST)
_HEAD = 4096  # bytes; our JSON names itself in its first line


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedResult:
    """One compressed checkpoint: its manifest, and what lies beside that.

    Attributes:
        path: the manifest's file, relative to the run folder.
        folder: name of the checkpoint's folder.
        manifest: how it was made and what became of every layer.
        seconds: seconds spent in each stage, from ``coterie-run.json`` beside it; empty where that is not there.
        peak_bytes: largest resident memory of the compression, from the same file, or None.
        inputs: digests of what it was made from.
        digest: digest of the checkpoint, or None when its weights are not there.
        expert_bytes: bytes of its routed experts, or None when its weights are not there.
        fixed_bytes: bytes of everything but routed experts in the original, or None when the weights are not there.
    """

    path: str
    folder: str
    manifest: Manifest
    seconds: Mapping[str, float]
    peak_bytes: int | None
    inputs: Mapping[str, str]
    digest: str | None
    expert_bytes: int | None
    fixed_bytes: int | None


@dataclass(slots=True)
class ReportedRun:
    """All artefacts of a run folder, sorted by path; paths are relative to it.

    Attributes:
        name: name of the run folder.
        profiles, scorecards, plans: (relative path, artefact).
        results: compressed checkpoints.
        versions: version of Coterie that wrote each artefact, by relative path.
        left_out: sentences about what was found and is not shown.
    """

    name: str
    profiles: list[tuple[str, Profile]] = field(default_factory=list)
    results: list[ReportedResult] = field(default_factory=list)
    scorecards: list[tuple[str, Scorecard]] = field(default_factory=list)
    plans: list[tuple[str, Plan]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One model of the report: the base, or a compressed one; scored, found as a result, or both.

    Attributes:
        label: short name, unique on the page.
        name: name of its folder.
        is_base: whether it is what others were compared with.
        result: the compressed checkpoint that it is, or None when unknown.
        card: what evaluation measured, or None when it was not evaluated.
        base_card: the scorecard of its base on the same text, or None.
        num_bytes: bytes of all tensors.
        size: what is left, in words that results of one size share; empty when unknown.
    """

    label: str
    name: str
    is_base: bool
    result: ReportedResult | None
    card: Scorecard | None
    base_card: Scorecard | None
    num_bytes: int
    size: str = ""

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes divided by the original's, or None when the original's are not known."""
        if self.card is not None and self.card.bytes_ratio is not None:
            return self.card.bytes_ratio
        return self.num_bytes / self.result.manifest.bytes_before if self.result is not None else None

    @property
    def neuron_share(self) -> float | None:
        """Share of the experts' hidden neurons that are left, over all layers."""
        return None if self.result is None else share_left(self.result.manifest.layers)

    def score(self, key: str, domain: str | None = None) -> float | None:
        """Return one score of `coterie.evaluate.scorecard.Scores`, or "perplexity_ratio", over all or in one domain."""
        if self.card is None:
            return None
        if key == "perplexity_ratio" and _score(self.card, key, domain) is None:
            mine = self.score("perplexity", domain)
            base = _score(self.base_card, "perplexity", domain)
            return mine / base if mine is not None and base else None
        return _score(self.card, key, domain)

    def error(self, key: str, domain: str | None = None) -> float | None:
        """Return the standard error of "perplexity", "perplexity_ratio" or "kl" over sequences, where it is known."""
        return _score(self.card, f"{key}_error", domain)


def gather(run: str | Path) -> ReportedRun:
    """Read every artefact of a run folder, down to `DEPTH` levels; hidden folders are not looked into.

    Raises:
        InputError: `run` is not a folder, or holds no artefact.
        CorruptArtifact: an artefact is damaged.
        StaleArtifact: an artefact is newer than this version reads.
    """
    root = user_path(run)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; a report is made from the folder that holds a run's results")
    artefacts = ReportedRun(name=root.resolve().name)
    for path in _json_files(root, DEPTH):
        if path.name in _OUR_NAMES or _names_itself(path):
            _read(artefacts, path, path.relative_to(root).as_posix())
    if not (artefacts.profiles or artefacts.results or artefacts.scorecards or artefacts.plans):
        raise InputError(
            f"{root} holds nothing to report on: looked {DEPTH} levels deep for {PROFILE_FILE} (coterie profile), "
            f"{MANIFEST} inside a compressed checkpoint (coterie compress), plans and scorecards as *.json "
            f"(coterie plan, coterie evaluate); run one of these into {root} first"
        )
    return artefacts


def entries_of(run: ReportedRun) -> list[Entry]:
    """Join results and scorecards to the models of the report: bases first, then the largest, the least damage."""
    cards = _latest(run)
    base_digests = {card.base_digest for _, card in cards if card.base_digest is not None}
    by_digest = {(card.model_digest, card.text_digest): card for _, card in cards}
    unmatched = list(run.results)
    drafts: list[tuple[ReportedResult | None, Scorecard | None, str, bool]] = []
    for path, scored in cards:
        is_base = scored.model_digest in base_digests
        matched = None if is_base else _result_for(scored, run.results)
        if matched in unmatched:
            unmatched.remove(matched)
        drafts.append((matched, scored, path, is_base))
    drafts += [(result, None, result.path, False) for result in unmatched]
    labels = _labels(drafts)
    entries = []
    for (result, card, _, is_base), label in zip(drafts, labels, strict=True):
        num_bytes = card.num_bytes if card is not None else result.manifest.bytes_after if result is not None else 0
        digest = None if card is None else card.model_digest if is_base else card.base_digest
        base_card = None if card is None or digest is None else by_digest.get((digest, card.text_digest))
        name = result.folder if result is not None else card.model if card is not None else ""
        entries.append(
            Entry(
                label=label,
                name=name,
                is_base=is_base,
                result=result,
                card=card,
                base_card=base_card,
                num_bytes=num_bytes,
            )
        )
    ranked = []
    for place, group in enumerate(_by_size(entries)):
        name = _size_name(group)
        ranked += [(place, replace(entry, size=name)) for entry in group]
    ranked.sort(key=lambda pair: (not pair[1].is_base, pair[0], *_costs(pair[1]), pair[1].label))
    return [entry for _, entry in ranked]


def _by_size(entries: list[Entry]) -> list[list[Entry]]:
    """Return the models in groups of one size, those of unknown size first, then the largest."""
    groups: list[list[Entry]] = [[entry for entry in entries if entry.neuron_share is None]]
    start = 2.0
    for entry in sorted(entries, key=lambda entry: (-(entry.neuron_share or 0.0), entry.label)):
        if entry.neuron_share is None:
            continue
        if start - entry.neuron_share >= SAME_SIZE:
            groups.append([])
            start = entry.neuron_share
        groups[-1].append(entry)
    return groups


def _size_name(group: list[Entry]) -> str:
    """Return what is left, in words for a whole group: in full where it is the same for all, else as a share."""
    all_layers = [entry.result.manifest.layers for entry in group if entry.result is not None]
    names = {size_text(layers) for layers in all_layers if layers}
    if len(names) <= 1:
        return "".join(names)
    ends = [percent_text(pick(entry.neuron_share or 0.0 for entry in group)) for pick in (min, max)]
    return f"{'–'.join(dict.fromkeys(ends))} of the experts' neurons"


def _costs(entry: Entry) -> list[tuple[bool, float]]:
    return [(cost is None, cost or 0.0) for cost in (entry.score("kl"), entry.score("perplexity"))]


def _score(card: Scorecard | None, key: str, domain: str | None) -> float | None:
    if card is None:
        return None
    scores: Mapping[str, Any] = card.overall if domain is None else card.domains.get(domain, {})
    value = scores.get(key)
    return None if value is None else float(value)


def folders_read(root: Path) -> dict[str, list[Path]]:
    """Return the folders of a run that `gather` reads as a whole, by what they are: nothing is written into them."""
    nouns = {MANIFEST: "model folder", PROFILE_FILE: "profile"}
    folders: dict[str, list[Path]] = {}
    for path in _json_files(root, DEPTH):
        if path.name in nouns:
            folders.setdefault(nouns[path.name], []).append(path.parent)
    return folders


def _json_files(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the JSON files of a folder, then those of its folders, sorted."""
    inside = sorted(folder.iterdir())
    yield from (path for path in inside if path.suffix == ".json" and path.is_file())
    if depth > 1:
        for path in inside:
            if path.is_dir() and not path.name.startswith("."):
                yield from _json_files(path, depth - 1)


def _names_itself(path: Path) -> bool:
    """Tell whether a JSON file is one of ours, from its first bytes; tokenizers and indices can be very large."""
    with path.open("rb") as file:
        return b'"coterie":' in file.read(_HEAD)  # the key; a config may name us as its method


def _read(run: ReportedRun, path: Path, relative: str) -> None:
    header = read_header(path)
    kind = header["kind"]
    run.versions[relative] = str(header.get("coterie", "unknown"))
    if kind == "profile" and path.name == PROFILE_FILE:
        run.profiles.append((relative, Profile.load(path.parent)))
    elif kind == "manifest":
        run.results.append(_read_result(path, relative, header["inputs"]))
    elif kind == "scorecard":
        run.scorecards.append((relative, Scorecard.load(path)))
    elif kind == "plan":
        run.plans.append((relative, Plan.load(path)))
    else:
        log.warning("%s is of the kind %s, which the report does not show", path, shown(kind))
        run.left_out.append(f"{relative} is of the kind {shown(kind)}, which the report does not show.")


def _read_result(path: Path, relative: str, inputs: Mapping[str, str]) -> ReportedResult:
    manifest = Manifest.read_file(path)
    digest, inside = _weights(path.parent)
    seconds, peak_bytes = _took(path.with_name(RUN_FILE))
    return ReportedResult(
        path=relative,
        folder=path.resolve().parent.name,
        manifest=manifest,
        seconds=seconds,
        peak_bytes=peak_bytes,
        inputs=inputs,
        digest=digest,
        expert_bytes=None if inside is None else inside.parts["experts"].bytes,
        fixed_bytes=None if inside is None else _fixed_bytes(inside, manifest.layers),
    )


def _fixed_bytes(inside: Inspection, layers: Sequence[LayerEntry]) -> int:
    """Return the bytes of all but routed experts that the original had: as here, but with its rows of the router."""
    fixed_after = inside.total.bytes - inside.parts["experts"].bytes
    # A mapped result keeps the rows; one that was cut into parts has more.
    pairs = zip(inside.moe_layers, layers, strict=False)
    return fixed_after + sum(block.row_bytes * (layer.num_experts_before - block.router_rows) for block, layer in pairs)


def _took(path: Path) -> tuple[dict[str, float], int | None]:
    """Return what a compression took, seconds by stage and peak memory, as far as it is known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, None
    except (ValueError, RecursionError) as error:
        raise _says_nothing(path, f"it is not JSON: {error}") from None
    try:
        took = Fields(content, where=path.name)
        seconds = took.nested("seconds")
        by_stage = {stage: seconds.number(stage, least=0) for stage in seconds.names()}
        return by_stage, took.whole("peak_bytes")
    except CorruptArtifact as error:
        raise _says_nothing(path, str(error)) from None


def _says_nothing(path: Path, why: str) -> CorruptArtifact:
    return CorruptArtifact(f"{path} does not say what the compression took ({why}); remove it, the report does without")


def _weights(folder: Path) -> tuple[str | None, Inspection | None]:
    """Return digest and content of a checkpoint; None for what cannot be found out."""
    try:
        digest = Checkpoint.open(folder).digest
    except (CoterieError, OSError) as error:
        log.info("%s: the weights cannot be read, so the report does without them: %s", folder, error)
        return None, None
    try:
        return digest, inspect(folder)
    except CoterieError as error:
        log.info("%s: cannot tell expert bytes from others: %s", folder, error)
        return digest, None


def _latest(run: ReportedRun) -> list[tuple[str, Scorecard]]:
    """Return one scorecard a model and text (the last by path, better with a base); say which are left out."""
    latest: dict[tuple[str, str], tuple[str, Scorecard]] = {}
    for path, card in run.scorecards:
        key = (card.model_digest, card.text_digest)
        if key not in latest:
            latest[key] = (path, card)
            continue
        shown, hidden = (path, card), latest[key]
        if card.base_digest is None and hidden[1].base_digest is not None:
            shown, hidden = hidden, shown
        latest[key] = shown
        run.left_out.append(f"{hidden[0]} scores the same model on the same text as {shown[0]} and is not shown.")
    return [*latest.values(), *_bases_of(latest)]


def _bases_of(cards: Mapping[tuple[str, str], tuple[str, Scorecard]]) -> Iterator[tuple[str, Scorecard]]:
    """Yield what scorecards of others say of a base that has none of its own on their text."""
    known = set(cards)
    for path, card in cards.values():
        if card.base is None or card.base_digest is None or card.base_overall is None or not card.bytes_ratio:
            continue
        if (card.base_digest, card.text_digest) in known:
            continue
        known.add((card.base_digest, card.text_digest))
        base = replace(
            card, model=card.base, model_digest=card.base_digest, base=None, base_digest=None,
            domains=card.base_domains, overall=card.base_overall, num_bytes=round(card.num_bytes / card.bytes_ratio),
            bytes_ratio=None, memory_bytes=None, peak_memory_bytes=None, tokens_per_second=None, speed_ratio=None,
            base_domains={}, base_overall=None, tasks={},
        )  # fmt: skip
        yield path, base


def _result_for(card: Scorecard, results: list[ReportedResult]) -> ReportedResult | None:
    """Return the result that a scored model is: by digest, else by the name of a folder whose weights are gone."""
    for result in results:
        if result.digest == card.model_digest:
            return result
    name = card.model.rstrip("/").rpartition("/")[2]
    same_name = [result for result in results if result.digest is None and result.folder == name]
    return same_name[0] if len(same_name) == 1 else None


def recipe_name(result: ReportedResult) -> str:
    """Return the recipe, and the router's form where it is not the plain one."""
    return result.manifest.recipe + (" · map" if result.manifest.form is ResultForm.MAPPED else "")


def _labels(drafts: list[tuple[ReportedResult | None, Scorecard | None, str, bool]]) -> list[str]:
    """Return a short unique label for each model: its recipe, with as much more as it takes.

    Sizes are added to all or to none, so that labels look alike; folders only where they must be.
    """
    choices: list[list[str]] = []
    for result, card, path, _ in drafts:
        if result is None:
            name = card.model if card is not None else path
            choices.append([name, name, f"{name} ({path})"])
            continue
        short, layers = recipe_name(result), result.manifest.layers
        sized = f"{short} · {size_mark(layers)}" if layers else short
        choices.append([short, sized, f"{sized} ({result.folder})", f"{sized} ({result.path}, {path})"])
    labels = [options[0] for options in choices]
    if len(set(labels)) < len(labels):
        labels = [options[1] for options in choices]
    for level in (2, 3):
        counted = Counter(labels)
        labels = [
            options[min(level, len(options) - 1)] if counted[label] > 1 else label
            for label, options in zip(labels, choices, strict=True)
        ]
    return labels
