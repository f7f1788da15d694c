"""Start a compression, kill it after a random time, start it again ... until it was killed so many times.

    python tests/e2e/killer.py MODEL TEXT WORK KILLS SEED [OPTION=VALUE ...]

Every run is a child of a process that has all imports done already, so kills fall into the work and not into its
start. Whenever a run comes to its end before it is killed, its result is compared, file by file, with that of a run
that nobody disturbed, and the next one starts anew. Prints JSON: kills, finished runs, kills by the number of steps
that had been finished, and the names of files that differed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from coterie.artifact import file_digest
from coterie.compress.apply import compress
from coterie.publish.hub import RUN_FILE


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of a result's files, without the one that says how long it took."""
    return {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.name != RUN_FILE}


def run(model: Path, out: Path, text: Path, options: dict[str, str]) -> None:
    """Do the work that is killed."""
    compress(model, out, experts=4, recipe="mergemoe", text=text, tokens=2048, seq_len=64, **options)


def child(*arguments: object) -> int:
    """Do the work in a child process; return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            run(*arguments)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return pid


def main() -> None:
    """Kill as often as was asked for."""
    model, text, work = map(Path, sys.argv[1:4])
    kills, seed = map(int, sys.argv[4:6])
    options = dict(entry.split("=") for entry in sys.argv[6:])
    torch.set_num_threads(1)
    source = random.Random(seed)
    started = time.perf_counter()
    _, status = os.waitpid(child(model, work / "undisturbed", text, options), 0)
    seconds = time.perf_counter() - started
    assert status == 0, "the undisturbed run failed"
    expected = digests(work / "undisturbed")
    out, journal = work / "out", work / ".out.partial" / "journal.jsonl"
    report: dict[str, object] = {"kills": 0, "finished": 0, "failed": 0, "differing": []}
    steps_at_kill: dict[int, int] = {}
    while sum(steps_at_kill.values()) < kills:
        pid = child(model, out, text, options)
        time.sleep(source.uniform(0, 0.8 * seconds))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            steps = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
            steps_at_kill[steps] = steps_at_kill.get(steps, 0) + 1
            if not out.exists():
                continue  # the same again goes on from there
        elif os.WEXITSTATUS(status) != 0:
            report["failed"] += 1  # type: ignore[operator]
            break
        report["finished"] += 1  # type: ignore[operator]
        found = digests(out)
        report["differing"] += [name for name in expected | found if expected.get(name) != found.get(name)]  # type: ignore[operator]
        shutil.rmtree(out)
    os.waitpid(child(model, out, text, options), 0)
    found = digests(out)
    report["differing"] += [name for name in expected | found if expected.get(name) != found.get(name)]  # type: ignore[operator]
    report |= {"kills": sum(steps_at_kill.values()), "steps": steps_at_kill}
    report["left"] = sorted(path.name for path in work.iterdir())
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
