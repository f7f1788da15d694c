"""A run folder that survives being killed: what was finished is kept, and the same command goes on from there.

While a result is made, three things stand beside its place OUT:

    .OUT.lock        held by the process that makes it, so that a second one is refused
    .OUT.partial/    removed when OUT stands
        journal.jsonl    what is made, from what, and one line for every finished step
        result/          becomes OUT, by one rename
        private/         files that only the run itself needs

A step counts as finished once its line is on the disk, and the line is written after the files that it names. A line
carries the digest of every file and of itself. Whoever opens the folder again gets the steps that are still whole; the
others are forgotten, with their files, and done again. Files that no step names are rests of a killed run and removed.

    with open_run(target, {"model": digest, "recipe": "reap"}, what="compression") as run:
        for name in names:
            if name not in run.finished:
                ...  # write run.folder / f"{name}.safetensors"
                run.finish(name, files=[f"{name}.safetensors"])
        run.publish()
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from coterie.artifact import atomic_path, differences, file_digest, full_disk, sync
from coterie.errors import CorruptArtifact, CoterieError, InputError, OutputBusy, OutputExists, StaleArtifact
from coterie.journal_lines import (
    JOURNAL,
    PRIVATE,
    RESULT,
    Line,
    Step,
    is_inside,
    line_text,
    read_journal,
    run_folder,
    step_text,
)  # fmt: skip
from coterie.progress import track

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(eq=False)
class Run:
    """A run in progress; made by `open_run`.

    Attributes:
        target: where the result will stand.
        root: the hidden folder beside it that holds everything until then.
    """

    target: Path
    root: Path
    _header: Mapping[str, Any]
    _lines: dict[str, Line] = field(default_factory=dict)
    _worthless: bool = False
    _published: bool = False

    @property
    def folder(self) -> Path:
        """The folder that becomes the target."""
        return self.root / RESULT

    @property
    def private(self) -> Path:
        """A folder for what the run itself needs, such as spilled or half-way data; never part of the result."""
        return self.root / PRIVATE

    @property
    def finished(self) -> Mapping[str, Step]:
        """The finished steps by name, in the order in which they were finished; their files were checked."""
        return MappingProxyType({name: line.step() for name, line in self._lines.items()})

    def finish(
        self,
        step: str,
        *,
        files: Iterable[str] = (),
        private: Iterable[str] = (),
        drop: Iterable[str] = (),
        content: Mapping[str, Any] | None = None,
    ) -> Step:
        """Record that a step is finished: when this returns, it survives a crash of the process or the machine.

        Args:
            step: name of the step, new to this run.
            files: names of its files in `folder` (``a.safetensors`` or ``sub/a.json``), whole and in their place.
            private: the same for files in `private`.
            drop: files in `private` of earlier steps that nobody needs once this step is finished. They are removed,
                and the steps that made them stay finished.
            content: what to remember; anything that JSON can hold.

        Raises:
            ValueError: the step is finished already, or a file is missing, or belongs to another step, or is outside.
            OutOfSpace: the disk filled up; the step is not finished.
        """
        names = [*(f"{RESULT}/{name}" for name in files), *(f"{PRIVATE}/{name}" for name in private)]
        dropped = tuple(f"{PRIVATE}/{name}" for name in drop)
        self._check_new(step, names, dropped)
        with full_disk(f"the files of {step} for {self.target} were written; the steps before are kept"):
            for name in names:
                sync(self.root / name)
            for folder in sorted({(self.root / name).parent for name in names}):
                sync(folder)
            sizes = {name: ((self.root / name).stat().st_size, file_digest(self.root / name)) for name in names}
            # Through JSON, so that a step looks the same in this run and in the one that goes on from it.
            line = Line(sizes, dropped, json.loads(json.dumps(dict(content or {}))))
            self._append(step_text(step, line))
        self._lines[step] = line
        for name in dropped:
            (self.root / name).unlink(missing_ok=True)
        return line.step()

    def forget(self, *steps: str) -> None:
        """Take finished steps back, as when a step was lost that they build on; their files are removed.

        A step whose private file was dropped by a forgotten one needs that file again, so it is forgotten too.
        """
        remaining = {name: line for name, line in self._lines.items() if name not in steps}
        present = {name for name in self._recorded_files() if _is_regular(self.root, name)}
        self._lines = _standing(remaining, present)
        with full_disk(f"the journal of {self.target} was written"):
            self._write_journal()
        self._sweep()

    def publish(self) -> None:
        """Put the result in its place: `folder` becomes the target by one rename, and the rest is removed.

        Raises:
            CorruptArtifact: a file of a finished step is missing or has another size.
            OutputExists: something else took the target meanwhile; the run is kept.
            OutOfSpace: the disk filled up; the run is kept.
        """
        recorded = self._recorded_files()
        for name in sorted(self._expected()):
            if not _has_size(self.root, name, recorded[name][0]):
                raise CorruptArtifact(
                    f"{self.root / name} is missing or was changed before {self.target} could be put in its place; "
                    "give the same command again, it makes that file again"
                )
        with full_disk(f"{self.target} was put in its place; the finished steps are kept"):
            for folder, _, files in os.walk(self.folder):
                for name in files:
                    sync(Path(folder) / name)
                sync(Path(folder))
        _check_free(self.target)
        self.folder.rename(self.target)
        self._published = True
        sync(self.target.parent)

    def discard(self) -> None:
        """Say that what was made is worth nothing, as after a failed check: it is removed when the run is left."""
        self._worthless = True

    def _check_new(self, step: str, names: list[str], dropped: tuple[str, ...]) -> None:
        if step in self._lines:
            raise ValueError(f"step {step!r} is finished already")
        recorded = self._recorded_files()
        for name in names:
            if not is_inside(name):
                raise ValueError(f"step {step!r} names {name!r}, which is no file in the run's folders")
            if name in recorded or names.count(name) > 1:
                raise ValueError(f"step {step!r} names {name!r}, which is recorded already")
            if not _is_regular(self.root, name):
                raise ValueError(f"step {step!r} names {name!r}, but {self.root / name} is no file")
        if unknown := [name for name in dropped if name not in self._expected()]:
            raise ValueError(f"step {step!r} drops {unknown[0]!r}, which no finished step holds")

    def _expected(self) -> set[str]:
        """Return the names of all files that must be there: those of finished steps that were not dropped."""
        return self._recorded_files().keys() - {name for line in self._lines.values() for name in line.drop}

    def _recorded_files(self) -> dict[str, tuple[int, str]]:
        return {name: entry for line in self._lines.values() for name, entry in line.files.items()}

    def _append(self, text: bytes) -> None:
        journal = self.root / JOURNAL
        with journal.open("ab", buffering=0) as file:  # a buffer would write again what failed, when it is closed
            end = file.tell()
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except BaseException:
                # A line that was cut off would run into the next one.
                with suppress(OSError):
                    os.truncate(journal, end)
                raise

    def _start(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)  # empty folders of a run that was killed while it began
        self.folder.mkdir(parents=True)
        self.private.mkdir()
        self._write_journal()
        sync(self.root.parent)

    def _write_journal(self) -> None:
        with atomic_path(self.root / JOURNAL) as temporary, temporary.open("wb") as file:
            file.write(line_text(self._header))
            for step, line in self._lines.items():
                file.write(step_text(step, line))

    def _continue(self, what: str) -> None:
        header, lines, whole = read_journal(self.root / JOURNAL)
        _check_header(self.root, header, self._header, what)
        self._header = header
        self._lines = _whole_steps(self.root, lines)
        for place in (self.folder, self.private):
            if place.is_symlink() or not place.is_dir():
                place.unlink(missing_ok=True)
                place.mkdir()
        self._sweep()
        if not whole or len(self._lines) != len(lines):
            self._write_journal()
        if self._lines:
            log.info("%s: going on after %s of an earlier run", self.target, self._count())

    def _sweep(self) -> None:
        """Remove what no finished step holds."""
        keep = {self.root / name for name in self._expected()} | {self.root / JOURNAL, self.folder, self.private}
        for place in (self.root, self.folder, self.private):
            _remove_rest(place, keep)

    def _leave(self) -> None:
        """Tidy up: nothing stays of a published or worthless run, and only finished steps of any other."""
        if self._worthless:
            self._lines = {}
            with suppress(OSError):  # so that nobody goes on with it, should the removal be interrupted
                self._write_journal()
        if self._published or not self._lines:
            _remove_run(self.root)
            return
        with suppress(OSError):  # what stays is removed when the run goes on
            self._sweep()
        log.warning(
            "%s: what was finished (%s) is kept in %s; give the same command again to go on, or remove that folder",
            self.target, self._count(), self.root,
        )  # fmt: skip

    def _count(self) -> str:
        return f"{len(self._lines)} step{'s' * (len(self._lines) != 1)}"


@contextmanager
def open_run(
    target: Path, header: Mapping[str, Any], *, what: str, notes: Mapping[str, Any] | None = None
) -> Iterator[Run]:
    """Open the run that makes `target`: a new one, or the one that was interrupted.

    When the block is left without `Run.publish`, the finished steps are kept for the next call. Nothing is kept when no
    step was finished or after `Run.discard`.

    Args:
        target: the folder that the result becomes; must not exist. Its parent is made when missing.
        header: all that decides what the result is: digests of the inputs and the settings; anything that JSON can
            hold. An interrupted run goes on only with an equal header and the same version of Coterie.
        what: what is made, for messages ("compression", "profile").
        notes: what a new run records beside its header, see `coterie.journal_lines.begun`; one that goes on keeps its
            own.

    Raises:
        OutputExists: `target` exists, or the hidden folder beside it holds something that is no run.
        OutputBusy: another process makes it at this moment.
        StaleArtifact: an interrupted run for `target` has another header; it is left as it is.
        CorruptArtifact: the journal of an interrupted run cannot be read; it is left as it is.
        InputError: nothing can be written beside `target`.
        OutOfSpace: the disk is full.
    """
    from coterie import __version__

    if target.name in ("", ".."):
        raise InputError(f"{target} cannot be the name of a new folder; choose another place for the {what}")
    root = run_folder(target)
    if os.path.lexists(target):
        _clear_leftover(target, root, what)
    _check_free(target)
    document = {"coterie": __version__, "format": FORMAT, "what": what, "header": json.loads(json.dumps(dict(header)))}
    document["notes"] = json.loads(json.dumps(dict(notes or {})))
    with _words_for(target, what):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target, what):
        with _words_for(target, what):
            _check_free(target)  # whoever had the lock before may have put its result there
            run = Run(target, root, document)
            if _holds_run(root):
                run._continue(what)
            else:
                run._start()
        try:
            yield run
        finally:
            run._leave()


@contextmanager
def _locked(target: Path, what: str) -> Iterator[None]:
    """Hold the lock beside `target`, which names this process."""
    path = _lock_path(target)
    owner = ""
    with suppress(OSError, UnicodeDecodeError):
        owner = path.read_text("ascii").strip()  # before the attempt: some versions of filelock empty the file with it
    lock = FileLock(path)
    with _words_for(target, what):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            by = f"process {owner}" if owner.isdecimal() else "another process"
            raise OutputBusy(f"{by} is making {target} (a {what}) now; wait for it, or choose another place") from None
    try:
        with _words_for(target, what):
            path.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        # Removed while it is held: filelock refuses a lock on a file that has no name any more, so nobody shares it.
        with suppress(OSError):
            path.unlink()
        lock.release()


@contextmanager
def _words_for(target: Path, what: str) -> Iterator[None]:
    """Turn the system's errors about the place of the result into words."""
    try:
        with full_disk(f"the folder for the {what} {target} was made"):
            yield
    except OSError as error:
        place = target.parent
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                f"the {what} cannot be written to {target}: {place} is not writable ({reason}); "
                "choose another place, or change the permissions of that folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
            raise InputError(
                f"the {what} cannot be written to {target}: no folder of that name can be made in {place} ({reason}); "
                "choose another place"
            ) from error
        raise


def _remove_run(root: Path) -> None:
    """Remove a run; the journal goes last, for without it nobody knows that the rest may go."""
    for place in (RESULT, PRIVATE):
        shutil.rmtree(root / place, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


def _clear_leftover(target: Path, root: Path, what: str) -> None:
    """Remove what stays beside a result whose run was killed between the rename and the tidying up."""
    with suppress(CoterieError, OSError):
        moved = root.is_dir() and not root.is_symlink() and {file.name for file in root.iterdir()} <= {JOURNAL, PRIVATE}
        if moved or os.path.lexists(_lock_path(target)):
            with _locked(target, what):
                if moved:
                    _remove_run(root)


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise OutputExists(f"{target} exists; choose another place or remove it")


def _holds_run(root: Path) -> bool:
    """Tell whether `root` is a run to go on with; raise OutputExists when it holds something that no run left."""
    if not os.path.lexists(root):
        return False
    if _is_run(root):
        return True
    # A run that was killed while it began has empty folders and at most the rest of a journal.
    if root.is_dir() and not root.is_symlink():
        others = [path for path in root.rglob("*") if path not in (root / RESULT, root / PRIVATE)]
        if all(path.name.startswith(f".{JOURNAL}.") for path in others):
            return False
    raise OutputExists(f"{root} is in the way, and it is no run of coterie; move it away or choose another place")


def _is_run(folder: Path) -> bool:
    journal = folder / JOURNAL
    return not folder.is_symlink() and folder.is_dir() and journal.is_file() and not journal.is_symlink()


def _is_regular(root: Path, name: str) -> bool:
    place = root
    for part in PurePosixPath(name).parent.parts:
        place = place / part
        if place.is_symlink() or not place.is_dir():
            return False
    try:
        return stat.S_ISREG((root / name).lstat().st_mode)
    except OSError:
        return False


def _has_size(root: Path, name: str, size: int) -> bool:
    return _is_regular(root, name) and (root / name).stat().st_size == size


def _whole_steps(root: Path, lines: Mapping[str, Line]) -> dict[str, Line]:
    """Return the steps whose files are all there and as they were."""
    entries = [(name, *entry) for line in lines.values() for name, entry in line.files.items()]
    checked = track(entries, "checking what was finished", total=len(entries))
    whole = {n for n, size, digest in checked if _has_size(root, n, size) and file_digest(root / n) == digest}
    standing = _standing(lines, whole)
    for step in lines.keys() - standing.keys():
        log.warning("%s: a file of %s is missing or was changed; that step is done again", root, step)
    return standing


def _standing(lines: Mapping[str, Line], whole: set[str]) -> dict[str, Line]:
    """Return the steps that stand: each of their files is whole, or was dropped by another step that stands."""
    standing = dict(lines)
    while True:
        available = whole | {name for line in standing.values() for name in line.drop}
        lost = [step for step, line in standing.items() if not line.files.keys() <= available]
        if not lost:
            return standing
        for step in lost:
            del standing[step]


def _check_header(root: Path, header: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    begun_as, asked = ({name: each for name, each in one.items() if name != "notes"} for one in (header, expected))
    if changes := differences(begun_as, asked):
        changed = "; ".join(change.removeprefix("header.") for change in changes)
        raise StaleArtifact(
            f"{root} holds an unfinished {header.get('what', what)} that was begun otherwise: {changed}. "
            f"Give what was given then to go on with it, or remove {root} to start anew"
        )


def _remove_rest(folder: Path, keep: set[Path]) -> None:
    """Remove all below `folder` but the paths in `keep` and unfinished runs of other results."""
    for entry in list(folder.iterdir()):
        if entry in keep or (entry.name.endswith(".partial") and _is_run(entry)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            _remove_rest(entry, keep)
            with suppress(OSError):  # it still holds something to keep
                entry.rmdir()
        else:
            entry.unlink()
