"""Run folders under kills, damage and full disks: a step stands exactly when all of its files do."""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coterie import artifact, journal
from coterie.errors import CorruptArtifact, OutOfSpace
from coterie.journal import JOURNAL, open_run
from run_folders import HEADER, Crash, add, finished, interrupted, partial, posix_only, tree


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out"


# Damage.


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove", "link", "folder"])
@pytest.mark.parametrize("place", ["result/two.bin", "private/two.state"])
def test_a_damaged_file_costs_its_step_alone(target, damage, place, caplog):
    interrupted(target, "one", "two", "three", private=True)
    file = partial(target) / place
    copy = target.parent / "copy"
    shutil.copy(file, copy)
    if damage == "flip":
        flip(file, 7)
    elif damage == "truncate":
        os.truncate(file, 20)
    elif damage == "grow":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        file.unlink()
        if damage == "link":
            file.symlink_to(copy)
        elif damage == "folder":
            file.mkdir()
    caplog.clear()
    with open_run(target, HEADER, what="compression") as run:
        assert "a file of two is missing or was changed; that step is done again" in caplog.text
        assert list(run.finished) == ["one", "three"]
        assert not [name for name in tree(run.root) if "two" in name], "the rest of its files is removed"
        add(run, "two", private=True)
        run.publish()
    assert tree(target)["two.bin"] == b"weights of two" * 10


def test_a_line_that_was_cut_off_anywhere_is_no_step(target):
    interrupted(target, "one", "two")
    before = (partial(target) / JOURNAL).read_bytes()
    ends = list(itertools.accumulate(len(line) for line in before.splitlines(keepends=True)))
    saved = target.parent / "saved"
    partial(target).rename(saved)
    near_ends = {end + offset for end in (0, *ends) for offset in (-2, -1, 0, 1)} & set(range(len(before)))
    for length in sorted(near_ends | set(range(0, len(before), 23))):
        shutil.copytree(saved, partial(target))
        os.truncate(partial(target) / JOURNAL, length)
        if length < ends[0]:
            with pytest.raises(CorruptArtifact, match=r"first line is damaged.*remove .*partial to start anew"):
                finished(target)
            assert (partial(target) / "result" / "one.bin").exists(), "nothing is deleted"
        else:
            with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
                assert list(run.finished) == ["one"][: length >= ends[1]]
                add(run, "later")
                raise Crash
            assert finished(target)[-1] == "later", "a line after one that was cut off is whole"
        shutil.rmtree(partial(target))


def test_a_changed_byte_of_the_journal_never_passes(target, caplog):
    interrupted(target, "one", "two", private=True)
    before = (partial(target) / JOURNAL).read_bytes()
    first = before.index(b"\n")
    saved = target.parent / "saved"
    partial(target).rename(saved)
    for place in range(0, len(before), 13):
        shutil.copytree(saved, partial(target))
        flip(partial(target) / JOURNAL, place)
        if place <= first:
            with pytest.raises(CorruptArtifact):
                finished(target)
        else:
            caplog.clear()
            # A line break that is none any more joins two lines, and both are damaged.
            assert set(finished(target)) < {"one", "two"}
            assert "is damaged; its step is done again" in caplog.text or place == len(before) - 1
        shutil.rmtree(partial(target), ignore_errors=True)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../precious": {"bytes": 1, "sha256": "0"}}},
        {"files": {"result/../../../precious": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/precious": {"bytes": 1, "sha256": "0"}}},
        {"files": {"journal.jsonl": {"bytes": 1, "sha256": "0"}}},
        {"files": {"result": {"bytes": 1, "sha256": "0"}}},
        {"files": {"result/x": {}}},
        {"files": {"result/x": 3}},
        {"files": []},
        {"drop": ["../../precious"]},
        {"drop": 3},
        {"content": 3},
        {"step": 3},
    ],
)
def test_a_forged_line_reaches_nothing_outside(target, change, caplog):
    precious = target.parent / "precious"
    precious.write_text("x")
    interrupted(target, "one")
    line = {"step": "two", "files": {}, "drop": [], "content": {}} | change
    with (partial(target) / JOURNAL).open("ab") as file:
        file.write(journal.line_text(line))
    assert finished(target) == ["one"]
    assert "line 3 is damaged" in caplog.text
    assert precious.read_text() == "x"


def test_a_file_that_goes_missing_before_the_end_is_noticed(target):
    with open_run(target, HEADER, what="compression") as run:
        add(run, "zero")
        add(run, "one")
        (run.folder / "one.bin").unlink()
        with pytest.raises(CorruptArtifact, match=r"one\.bin is missing or was changed"):
            run.publish()
    assert not target.exists()
    assert finished(target) == ["zero"]


# A full disk.


@posix_only
def test_a_full_disk_costs_only_the_step_that_met_it(target, monkeypatch):
    # A limit on file sizes is the nearest thing to a full disk that a test can have; it has a number of its own.
    import resource

    monkeypatch.setattr(artifact.errno, "ENOSPC", errno.EFBIG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open_run(target, HEADER, what="compression") as run:
            add(run, "one")
            size = (run.root / JOURNAL).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
            with pytest.raises(OutOfSpace, match=f"disk filled up .*two for {target}.*steps before are kept"):
                run.finish("two", content={"long": "x" * 100})
            assert (run.root / JOURNAL).stat().st_size == size, "no half line stays for the next one to run into"
            assert list(run.finished) == ["one"]
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            run.finish("two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert finished(target) == ["one", "two"]


def test_a_disk_that_is_full_from_the_start(target, monkeypatch):
    def no_space(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutOfSpace, match=r"disk filled up"), open_run(target, HEADER, what="profile"):
        pass


# What is on the disk before a line says so.


def test_the_line_of_a_step_is_written_after_its_files_are_on_the_disk(target, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file a descriptor is")
    with open_run(target, HEADER, what="compression") as run:
        monkeypatch.setattr(os, "fsync", recorded)
        add(run, "one", private=True)
        assert sorted(synced[:-1]) == ["one.bin", "one.state", "private", "result"]
        assert synced[-1] == JOURNAL
        synced.clear()
        (run.folder / "config.json").touch()
        run.publish()
    assert sorted(synced[:-1]) == ["config.json", "one.bin", "result"]
    assert synced[-1] == target.parent.name


# Killed anywhere. The children die at a line of the journal's own code, without any tidying up.

_KILLED = """
import json, os, random, sys
from pathlib import Path
from coterie import artifact, journal
from coterie.errors import OutputExists

os.fsync = lambda descriptor: None  # the machine goes on, only processes die
ours = {artifact.__file__, journal.__file__}
base, stride, seeds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def work(target, report):
    with journal.open_run(target, {"seed": 1}, what="compression") as run:
        for index in range(3):
            step = f"step{index}"
            report(f"found {len(run.finished)}") if not index else None
            if step in run.finished:
                continue
            with artifact.atomic_path(run.folder / f"{step}.bin") as temporary:
                temporary.write_text(step * 9)
            (run.private / f"{step}.state").write_text(step)
            drop = [f"step{index - 1}.state"] if index else []
            run.finish(step, files=[f"{step}.bin"], private=[f"{step}.state"], drop=drop, content={"index": index})
            report(f"finished {index + 1}")
        (run.folder / "config.json").write_text("{}")
        run.publish()
        report("published")

def child(target, limit):
    # Returns (exit status, what the child reported); a limit of None never kills, and the lines are counted.
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        count = 0
        def trace(frame, event, _argument):
            nonlocal count
            if frame.f_code.co_filename not in ours:
                return None
            if event == "line":
                count += 1
                if count == limit:
                    os._exit(9)
            return trace
        status = 1
        try:
            sys.settrace(trace)
            work(target, lambda text: os.write(writing, text.encode() + b"\\n"))
            sys.settrace(None)
            os.write(writing, f"lines {count}\\n".encode())
            status = 0
        except OutputExists:
            status = 17
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        reports = pipe.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), reports

def look(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}

def number(reports, word):
    return max([int(report.split()[1]) for report in reports if report.startswith(word)], default=0)

reference = base / "reference"
status, reports = child(reference, None)
assert status == 0, status
expected, lines = look(reference), number(reports, "lines")
assert len(expected) == 4, expected
kills, outcomes = 0, set()

def settle(target, promised):
    # After a kill: going on finds every step that was promised, and ends in the same result.
    status, reports = child(target, None)
    if status == 17:
        outcomes.add("it stood already")
    else:
        assert status == 0, status
        found = number(reports, "found")
        assert promised <= found <= promised + 1, (promised, found)
        outcomes.add(found)
    assert look(target) == expected
    left = [path.name for path in target.parent.iterdir() if path.name != target.name]
    assert not left, left

for limit in range(1, lines + 1, stride):
    target = base / f"at{limit}" / "out"
    status, reports = child(target, limit)
    assert status == 9, (limit, status)
    kills += 1
    settle(target, number(reports, "finished"))
for seed in range(seeds):  # killed again while it goes on, and again
    source = random.Random(seed)
    target = base / f"random{seed}" / "out"
    promised = 0
    while True:
        status, reports = child(target, source.randint(1, lines))
        if status != 9:
            break
        kills += 1
        assert number(reports, "found") >= promised or not any(r.startswith("found") for r in reports)
        promised = max(promised, number(reports, "finished"))
    assert status in (0, 17), status
    settle(target, promised)
print(json.dumps({"kills": kills, "lines": lines, "outcomes": sorted(map(str, outcomes))}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forked")
@pytest.mark.parametrize(
    ("stride", "seeds"),
    [pytest.param(7, 8, id="some", marks=pytest.mark.long), pytest.param(1, 60, id="all", marks=pytest.mark.slow)],
)
def test_killed_at_any_line_it_goes_on_to_the_same_result(tmp_path, stride, seeds):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _KILLED, str(tmp_path), str(stride), str(seeds)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["kills"] > result["lines"] // stride > 30
    assert result["outcomes"] == ["0", "1", "2", "3", "it stood already"], "every stage was met"


@pytest.mark.parametrize("count", range(1, 9))
def test_killed_while_worthless_work_is_removed(target, monkeypatch, count):
    removed = itertools.count(1)

    def stopping(remove):
        def removing(*args, **options):
            if next(removed) >= count:
                raise Crash
            return remove(*args, **options)

        return removing

    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        add(run, "one", private=True)
        run.discard()
        for name in ("unlink", "rmdir"):
            monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    monkeypatch.undo()
    assert finished(target) == []
    assert not list(target.parent.iterdir())


# Anything in any order.


class Machine(RuleBasedStateMachine):
    """Finish, damage, forget, crash and open again, beside a model that knows which steps must stand."""

    def __init__(self):
        super().__init__()
        self.base = Path(tempfile.mkdtemp())
        self.target = self.base / "out"
        self.made: dict[str, tuple[list[str], list[str]]] = {}  # step -> (files, dropped files), from the root
        self.broken: set[str] = set()
        self.number = 0
        self.scope = contextlib.ExitStack()

    def open(self):
        self.run = self.scope.enter_context(open_run(self.target, HEADER, what="compression"))

    @initialize()
    def begin(self):
        self.open()

    def present(self) -> set[str]:
        files = {file for made, _ in self.made.values() for file in made}
        return files - {file for _, dropped in self.made.values() for file in dropped}

    @precondition(lambda self: len(self.made) < 6)
    @rule(data=st.data(), files=st.integers(0, 2), private=st.integers(0, 2))
    def finish(self, data, files, private):
        step = f"step{self.number}"
        self.number += 1
        places = [f"result/{step}-{index}" for index in range(files)]
        places += [f"private/sub/{step}-{index}" for index in range(private)]
        for name in places:
            path = self.run.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(os.urandom(8))
        droppable = sorted(name for name in self.present() - self.broken if name.startswith("private/"))
        dropped = data.draw(st.lists(st.sampled_from(droppable), unique=True)) if droppable else []
        self.run.finish(
            step,
            files=[name.removeprefix("result/") for name in places[:files]],
            private=[name.removeprefix("private/") for name in places[files:]],
            drop=[name.removeprefix("private/") for name in dropped],
        )
        self.made[step] = (places, dropped)

    @rule(name=st.sampled_from(["result/rest", "private/rest", "rest", "private/sub2/rest"]))
    def leave_a_rest(self, name):
        path = self.run.root / name
        path.parent.mkdir(exist_ok=True)
        path.touch()

    @precondition(lambda self: self.present() - self.broken)
    @rule(data=st.data(), damage=st.sampled_from(["flip", "truncate", "remove"]))
    def damage(self, data, damage):
        name = data.draw(st.sampled_from(sorted(self.present() - self.broken)))
        path = self.run.root / name
        if damage == "flip":
            flip(path, 3)
        elif damage == "truncate":
            os.truncate(path, 4)
        else:
            path.unlink()
        self.broken.add(name)

    def standing(self) -> set[str]:
        """The largest set of steps that stands, by trying all of them."""
        for size in range(len(self.made), 0, -1):
            for steps in itertools.combinations(self.made, size):
                dropped = {name for step in steps for name in self.made[step][1]}
                gone = {name for step in self.made for name in self.made[step][1]} | self.broken
                if all(name in dropped or name not in gone for step in steps for name in self.made[step][0]):
                    return set(steps)
        return set()

    @rule()
    def crash_and_open_again(self):
        self.scope.close()
        stand = self.standing()
        self.open()
        assert set(self.run.finished) == stand
        assert list(self.run.finished) == [step for step in self.made if step in stand]
        self.made = {step: entry for step, entry in self.made.items() if step in stand}
        self.broken = set()
        files = {path.relative_to(self.run.root).as_posix() for path in self.run.root.rglob("*") if path.is_file()}
        assert files == self.present() | {JOURNAL}, "what stands is there, and nothing else"

    @precondition(lambda self: self.made and not self.broken)
    @rule(data=st.data())
    def forget(self, data):
        step = data.draw(st.sampled_from(sorted(self.made)))
        self.run.forget(step)
        self.broken = set(self.made.pop(step)[1])  # what it dropped is gone
        stand = self.standing()
        assert set(self.run.finished) == stand
        self.made = {name: entry for name, entry in self.made.items() if name in stand}
        self.broken = set()

    @invariant()
    def the_target_is_not_there(self):
        assert not self.target.exists()

    def teardown(self):
        self.scope.close()
        shutil.rmtree(self.base)


@pytest.mark.long
def test_anything_in_any_order():
    logging.disable(logging.WARNING)
    try:
        hypothesis.stateful.run_state_machine_as_test(
            Machine, settings=hypothesis.settings(max_examples=60, stateful_step_count=20)
        )
    finally:
        logging.disable(logging.NOTSET)
