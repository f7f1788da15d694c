"""Run folders: whatever happens, opening one again gives exactly the finished steps, and nothing is mixed in."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import coterie
from coterie.artifact import file_digest
from coterie.errors import InputError, OutOfSpace, OutputBusy, OutputExists, StaleArtifact
from coterie.journal import JOURNAL, open_run
from run_folders import HEADER, Crash, add, finished, interrupted, partial, posix_only, tree


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out"


def test_a_run_ends_in_its_target_and_nothing_else_stays(target):
    with open_run(target, HEADER, what="compression") as run:
        assert not run.finished
        assert not target.exists()
        (run.private / "spill").write_bytes(b"x")
        add(run, "one", private=True)
        (run.folder / "config.json").write_text("{}")
        run.publish()
        assert target.is_dir()
    assert tree(target) == {"one.bin": b"weights of one" * 10, "config.json": b"{}"}
    assert list(target.parent.iterdir()) == [target]


def test_the_parents_of_the_target_are_made(tmp_path):
    with open_run(tmp_path / "a" / "b" / "out", HEADER, what="profile") as run:
        run.publish()
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_an_interrupted_run_goes_on(target):
    interrupted(target, "one", "two", private=True)
    with open_run(target, HEADER, what="compression") as run:
        assert list(run.finished) == ["one", "two"]
        step = run.finished["two"]
        assert step.content == {"name": "two"}
        assert dict(step.files) == {"two.bin": file_digest(run.folder / "two.bin")}
        assert dict(step.private) == {"two.state": file_digest(run.private / "two.state")}
        add(run, "three")
        run.publish()
    assert sorted(tree(target)) == ["one.bin", "three.bin", "two.bin"]


def test_a_step_reads_the_same_now_and_after_a_restart(target):
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        now = run.finish("x", content={"pair": (1, 2.5), "none": None, "ü": {"1": "☃"}})
        assert now == run.finished["x"]
        raise Crash
    with open_run(target, HEADER, what="compression") as run:
        assert run.finished["x"] == now
        run.discard()


def test_nothing_stays_without_a_finished_step(target):
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        (run.folder / "half").write_bytes(b"x")
        raise Crash
    assert not list(target.parent.iterdir())


def test_finished_steps_stay_and_the_rest_goes(target, caplog):
    with contextlib.suppress(OutOfSpace), open_run(target, HEADER, what="compression") as run:
        add(run, "one")
        (run.folder / "half").write_bytes(b"x")
        (run.private / "spill").mkdir()
        (run.private / "spill" / "big").write_bytes(b"x")
        raise OutOfSpace(errno.ENOSPC, "full")
    assert list(target.parent.iterdir()) == [partial(target)]
    assert sorted(tree(partial(target))) == [JOURNAL, "private", "result", "result/one.bin"]
    assert (
        f"{target}: what was finished (1 step) is kept in {partial(target)}; give the same command again" in caplog.text
    )


def test_leaving_without_publishing_keeps_the_work(target):
    with open_run(target, HEADER, what="compression") as run:
        add(run, "one")
    assert finished(target) == ["one"]


def test_worthless_work_is_removed(target):
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        add(run, "one")
        run.discard()
        raise Crash
    assert not list(target.parent.iterdir())


def test_rests_of_a_killed_run_are_removed_on_opening(target):
    interrupted(target, "one")
    root = partial(target)
    (root / "result" / ".two.bin.abc").write_bytes(b"half")
    (root / "private" / "spill").mkdir()
    (root / "private" / "spill" / "0").write_bytes(b"x")
    (root / ".journal.jsonl.xyz").write_bytes(b"x")
    elsewhere = target.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (root / "result" / "link").symlink_to(elsewhere, target_is_directory=True)
    with open_run(target, HEADER, what="compression") as run:
        assert sorted(tree(root)) == [JOURNAL, "private", "result", "result/one.bin"]
        assert (elsewhere / "precious").exists(), "links are removed, not followed"
        run.discard()


def test_a_run_inside_a_run_goes_on_too(target):
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        add(run, "one")
        interrupted(run.private / "profile", "layer")
        raise Crash
    with open_run(target, HEADER, what="compression") as run:
        with open_run(run.private / "profile", HEADER, what="compression") as inner:
            assert list(inner.finished) == ["layer"]
            inner.publish()
        run.finish("profile", private=["profile/layer.bin"])
    assert finished(target) == ["one", "profile"]
    assert (partial(target) / "private" / "profile" / "layer.bin").is_file()


def test_dropped_files_go_and_their_steps_stay(target):
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        add(run, "one", private=True)
        add(run, "two", private=True, drop=["one.state"])
        assert [file.name for file in run.private.iterdir()] == ["two.state"]
        raise Crash
    assert finished(target) == ["one", "two"]
    # Without the step that dropped it, the dropped file is missing.
    (partial(target) / "result" / "two.bin").unlink()
    assert finished(target) == []


def test_forgotten_steps_are_gone_with_their_files(target):
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        for step in ("one", "two", "three"):
            add(run, step)
        run.forget("two", "unknown")
        assert list(run.finished) == ["one", "three"]
        assert sorted(file.name for file in run.folder.iterdir()) == ["one.bin", "three.bin"]
        add(run, "two")
        raise Crash
    assert finished(target) == ["one", "three", "two"]


def test_forgetting_a_step_forgets_those_whose_files_it_dropped(target):
    with open_run(target, HEADER, what="compression") as run:
        add(run, "zero")
        add(run, "one", private=True)
        add(run, "two", drop=["one.state"])
        run.forget("two")
        assert list(run.finished) == ["zero"]
        run.discard()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "one"}, "finished already"),
        ({"files": ["one.bin"]}, "recorded already"),
        ({"files": ["new.bin", "new.bin"]}, "recorded already"),
        ({"files": ["missing"]}, "is no file"),
        ({"files": ["sub"]}, "is no file"),
        ({"files": ["link"]}, "is no file"),
        ({"files": ["folderlink/inner"]}, "is no file"),
        ({"files": ["../../precious"]}, "no file in the run's folders"),
        ({"files": ["/etc/passwd"]}, "no file in the run's folders"),
        ({"files": [""]}, "no file in the run's folders"),
        ({"files": ["sub//inner"]}, "no file in the run's folders"),
        ({"drop": ["nothing"]}, "which no finished step holds"),
        ({"drop": ["../result/one.bin"]}, "which no finished step holds"),
    ],
)
def test_a_step_that_cannot_be_is_refused(target, arguments, message):
    (target.parent / "precious").touch()
    with contextlib.suppress(Crash), open_run(target, HEADER, what="compression") as run:
        add(run, "one")
        (run.folder / "new.bin").touch()
        (run.folder / "sub").mkdir()
        (run.folder / "sub" / "inner").touch()
        (run.folder / "link").symlink_to(run.folder / "new.bin")
        (run.folder / "folderlink").symlink_to(run.folder / "sub")
        with pytest.raises(ValueError, match=message):
            run.finish(**{"step": "two", **arguments})
        assert list(run.finished) == ["one"]
        raise Crash
    assert finished(target) == ["one"]


# What must not be gone on with.


def test_a_step_done_with_other_settings_is_stale_and_all_differences_are_named(target):
    interrupted(target, "one")
    before = tree(target.parent)
    header = {"model": "b" * 64, "settings": {"recipe": "reap", "keep": 0.25, "seed": 1}}
    with pytest.raises(StaleArtifact) as caught:
        finished(target, header)
    text = str(caught.value)
    assert str(partial(target)) in text
    assert "unfinished compression" in text
    assert f"model was {'a' * 12}, now it is {'b' * 12}" in text
    assert "settings.keep was 0.5, now it is 0.25" in text
    assert "settings.seed was not set, now it is 1" in text
    assert "order was [1, 2], now it is not set" in text
    assert "recipe" not in text
    assert f"remove {partial(target)} to start anew" in text
    assert len(text) < 700
    assert tree(target.parent) == before, "nothing is deleted"
    assert finished(target) == ["one"], "and the old settings still go on"


def test_long_settings_are_shortened(target):
    interrupted(target, "one", header={"domains": ["d" * 20] * 100})
    with pytest.raises(StaleArtifact) as caught:
        finished(target, {"domains": ["e" * 20] * 100})
    assert len(str(caught.value)) < 500


def test_another_version_or_purpose_is_stale(target, monkeypatch):
    interrupted(target, "one")
    with (
        pytest.raises(StaleArtifact, match='what was "compression", now it is "profile"'),
        open_run(target, HEADER, what="profile"),
    ):
        pass
    monkeypatch.setattr(coterie, "__version__", "9.9.9")
    with pytest.raises(StaleArtifact, match=r'coterie was "[^"]+", now it is "9\.9\.9"'):
        finished(target)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "broken link"])
def test_a_target_that_exists_is_refused_before_anything(target, kind):
    if kind == "file":
        target.touch()
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(target.parent if kind == "link" else target.parent / "nowhere")
    before = sorted(target.parent.iterdir())
    with pytest.raises(OutputExists, match="exists; choose another place"), open_run(target, HEADER, what="profile"):
        pass
    assert sorted(target.parent.iterdir()) == before


def test_a_target_that_appears_meanwhile_is_not_touched(target):
    with open_run(target, HEADER, what="compression") as run:
        add(run, "one")
        target.mkdir()
        with pytest.raises(OutputExists):
            run.publish()
    assert not list(target.iterdir())
    target.rmdir()
    assert finished(target) == ["one"]


@pytest.mark.parametrize(
    "kind", ["file", "foreign folder", "link to a run", "journal is a link", "journal is a folder"]
)
def test_what_is_no_run_is_not_deleted(target, kind):
    root = partial(target)
    if kind == "file":
        root.write_text("mine")
    elif kind == "link to a run":
        interrupted(target, "one")
        root.rename(target.parent / "moved")
        root.symlink_to(target.parent / "moved")
    else:
        (root / "result").mkdir(parents=True)
        (root / "precious").touch()
        if kind == "journal is a link":
            (root / JOURNAL).symlink_to(root / "precious")
        elif kind == "journal is a folder":
            (root / JOURNAL).mkdir()
    before = tree(target.parent)
    with pytest.raises(OutputExists, match=r"partial is in the way.*move it away"):
        finished(target)
    assert tree(target.parent) == before


@pytest.mark.parametrize("rest", [[], ["result"], ["result", "private"], ["result", "private", ".journal.jsonl.x1"]])
def test_a_run_that_was_killed_while_it_began_is_begun_anew(target, rest):
    partial(target).mkdir()
    for name in rest:
        if name.startswith("."):
            (partial(target) / name).write_bytes(b"ha")
        else:
            (partial(target) / name).mkdir()
    assert finished(target) == []


@pytest.mark.parametrize("name", ["", "..", "new/..", "n" * 250, "file/out"])
def test_names_that_cannot_be_are_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"choose another place"), open_run(tmp_path / name, HEADER, what="profile"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@posix_only
def test_a_folder_that_cannot_be_written_is_an_input_error():
    # The place is outside of pytest's own folder, which other users may not enter.
    place = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    place.chmod(0o555)
    try:
        if root:  # who may write anywhere
            os.seteuid(65534)
        with (
            pytest.raises(InputError, match=r"profile cannot be written to .*out: .* is not writable .*choose another"),
            open_run(place / "out", HEADER, what="profile"),
        ):
            pass
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o755)
        shutil.rmtree(place)


def test_a_read_only_file_system_is_an_input_error(target, monkeypatch):
    def read_only(*_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    with pytest.raises(InputError, match="Read-only file system"), open_run(target, HEADER, what="profile"):
        pass


# The lock.

_HOLD = """
import sys
from pathlib import Path
from coterie.journal import open_run
with open_run(Path(sys.argv[1]), {}, what="profile") as run:
    run.finish("one")
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(target):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused(target, holder):
    before = tree(partial(target))
    for _ in range(2):
        with (
            pytest.raises(OutputBusy, match=rf"process {holder.pid} is making {target} \(a profile\) now"),
            open_run(target, {}, what="profile"),
        ):
            pass
    assert tree(partial(target)) == before
    holder.communicate("")
    assert finished_of(target, {}, "profile") == ["one"]
    assert not target.with_name(".out.lock").exists()


def test_a_killed_process_holds_nothing(target, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert target.with_name(".out.lock").exists()
    assert finished_of(target, {}, "profile") == ["one"]
    assert not target.with_name(".out.lock").exists()


def test_the_same_process_is_refused_too(target):
    with open_run(target, HEADER, what="profile") as run:
        add(run, "one")
        with (
            pytest.raises(OutputBusy, match=f"process {os.getpid()} is making"),
            open_run(target, HEADER, what="profile"),
        ):
            pass
        run.publish()
    assert target.is_dir()


def test_other_targets_are_free(target):
    with open_run(target, HEADER, what="profile") as run, open_run(target.with_name("b"), HEADER, what="profile") as b:
        run.publish()
        b.publish()
    assert sorted(path.name for path in target.parent.iterdir()) == ["b", "out"]


def test_a_lock_that_is_a_link_is_not_followed(target):
    precious = target.parent / "precious"
    precious.write_text("mine")
    target.with_name(".out.lock").symlink_to(precious)
    with pytest.raises(InputError), open_run(target, HEADER, what="profile"):
        pass
    assert precious.read_text() == "mine"


def finished_of(target, header, what):
    with open_run(target, header, what=what) as run:
        found = list(run.finished)
        run.discard()
    return found
