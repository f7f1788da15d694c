"""One HTML page to look at, from any run folder.

    from coterie import report

    report("run")                   # writes run/report.html

The page holds everything inside: no script, no network, no other file. Equal artefacts give an equal page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from coterie import __version__
from coterie.artifact import atomic_path
from coterie.outputs import PAGE_MARK, check_output, claim_output, is_page
from coterie.paths import user_path
from coterie.report.experts import changes, experts
from coterie.report.gather import ReportedRun, entries_of, folders_read, gather
from coterie.report.sections import costs, headline, provenance, results_table, sizes

FILE = "report.html"

_TEMPLATE = "page.html.j2"


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about everything that a run folder holds.

    The folder is searched three levels deep for profiles, plans, compressed checkpoints and scorecards; the page has
    the sections for which there is data.

    Args:
        run: the folder.
        out: the page to write; ``RUN/report.html`` when None. A page that is there is replaced, and said so.

    Returns:
        The path of the page.

    Raises:
        OutputExists: `out` is a folder, or a file that is no such page.
        InputError: `run` is no folder or holds nothing to report on, or `out` lies in no folder, or in one that is
            read: a checkpoint or a profile of the run.
        CorruptArtifact: an artefact is damaged.
        StaleArtifact: an artefact was written by a newer version.
    """
    folder = user_path(run)
    target = folder / FILE if out is None else Path(out)
    if folder.is_dir():  # and else there is no run to report on
        target = check_output(target, kind="page", reads=folders_read(folder), accepts=is_page)
    text = render(gather(run))
    with atomic_path(claim_output(target, kind="page", accepts=is_page)) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # names on disk may hold what UTF-8 cannot
    return target


def render(run: ReportedRun) -> str:
    """Return the page of a run as HTML."""
    entries = entries_of(run)
    content: dict[str, Any] = {
        "run": run.name,
        "version": __version__,
        "mark": PAGE_MARK,
        "headline": headline(run, entries),
        "results": results_table(entries),
        "costs": costs(entries),
        "experts": experts(run),
        "changes": changes(entries),
        "sizes": sizes(run, entries),
        "provenance": provenance(run, entries),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(content)
