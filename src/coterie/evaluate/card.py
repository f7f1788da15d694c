"""Write the card of a result anew, with what evaluation measured.

from coterie import card, evaluate

[scorecard] = evaluate("small", against="original", text="text/test")
card("small", scorecard=scorecard)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coterie.artifact import read_header
from coterie.errors import InputError, StaleArtifact
from coterie.evaluate.scorecard import Scorecard
from coterie.evaluate.sums import Scores
from coterie.model.disk.beside import files_beside
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.files import is_hub_id
from coterie.model.disk.manifest import MANIFEST, Manifest
from coterie.outputs import check_output
from coterie.publish.card import CARD, CostRow, MeasuredCost, is_own_card, write_card
from coterie.publish.original import read_head
from coterie.publish.push import result_folder


def card(
    out: str | Path,
    *,
    scorecard: Scorecard | str | Path | None = None,
    base_model: str | None = None,
    file: str | Path | None = None,
) -> Path:
    """Write the model card of a result: what it is, how it was made, what it costs.

    `coterie.compress` writes one already; this is for what is known later. A card that was edited stays as it is: name
    another file, and take over from it what is new.

    Args:
        out: the folder of a result of `coterie.compress`.
        scorecard: what was measured of it, or the file of that; None leaves the section empty.
        base_model: hub id (``owner/name``) of the original; None for the one that the manifest or the card that is
            there says.
        file: where the card goes; ``OUT/README.md`` when None.

    Returns:
        The path of the card.

    Raises:
        InputError: `out` is no result of Coterie, or `base_model` no hub id.
        OutputExists: the card was edited, or the file is something else.
        StaleArtifact: the scorecard is of another model.
        CorruptArtifact: manifest or scorecard is damaged.
    """
    folder = result_folder(out)
    if base_model is not None and not is_hub_id(base_model):
        raise InputError(f"{base_model!r:.120} is no hub id; it has the form owner/name")
    target = check_card(out, file)
    manifest = Manifest.read_file(folder / MANIFEST)
    header = read_header(folder / MANIFEST)
    measured = None if scorecard is None else _measured(scorecard, folder, str(header["inputs"].get("model")))
    there = read_head(folder / CARD).get("base_model") if is_own_card(folder / CARD) else None
    return write_card(
        target, manifest, files=[path.relative_to(folder).as_posix() for path in files_beside(folder)],
        version=str(header.get("coterie", "unknown")), cost=measured,
        base_model=base_model or (there if isinstance(there, str) else None),
    )  # fmt: skip


def check_card(out: str | Path, file: str | Path | None = None) -> Path:
    """Return where the card of a result goes, or raise as `card` where it cannot go there; nothing is written."""
    folder = result_folder(out)
    target = folder / CARD if file is None else Path(file)
    inside = {} if target.absolute() == (folder / CARD).absolute() else {"model folder": [folder]}
    return check_output(target, kind="card", reads=inside, accepts=is_own_card)


def _measured(scorecard: Scorecard | str | Path, folder: Path, original: str) -> MeasuredCost:
    scores = scorecard if isinstance(scorecard, Scorecard) else Scorecard.load(scorecard)
    if scores.model_digest != Checkpoint.open(folder).digest:
        where = "" if isinstance(scorecard, Scorecard) else f"{scorecard}: "
        raise StaleArtifact(
            f"{where}the scorecard is of another model ({scores.model}), not of {folder}; evaluate it again"
        )
    return MeasuredCost(
        base=scores.base,
        is_original=scores.base_digest == original,
        rows=tuple(_rows(scores)),
        tokens=scores.overall["tokens"],
        sequences=scores.overall["sequences"],
        questions=scores.overall["questions"],
        seq_len=scores.seq_len,
        speed_ratio=scores.speed_ratio,
        tasks=tuple(_tasks(scores)),
    )


def _rows(card: Scorecard) -> Iterator[CostRow]:
    for domain, scores in card.domains.items():
        yield _row(domain, scores, card.base_domains.get(domain))
    if card.domains:
        yield _row("all", card.overall, card.base_overall)


def _row(name: str, scores: Scores, base: Scores | None) -> CostRow:
    return CostRow(
        name=name,
        perplexity=(None if base is None else base["perplexity"], scores["perplexity"]),
        ratio=scores["perplexity_ratio"],
        ratio_error=scores["perplexity_ratio_error"],
        kl=scores["kl"],
        kl_error=scores["kl_error"],
        agreement=scores["agreement"],
        accuracy=(None if base is None else base["accuracy"], scores["accuracy"]),
    )


def _tasks(card: Scorecard) -> Iterator[tuple[str, str, float | None, float | None]]:
    for task, metrics in card.tasks.items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(" ")
            if not metric.endswith("_stderr") and name != "examples":
                yield task, name, value, metrics.get(f"{metric}_stderr {chosen}".rstrip())
