import json
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from coterie.bench import pool
from coterie.errors import CoterieError, Infeasible

WORKER = """
import json, os, sys
for line in sys.stdin:
    task = json.loads(line)
    if task["do"] == "die":
        os.kill(os.getpid(), 9)
    if task["do"] == "end":
        sys.exit(3)
    if task["do"] == "raise":
        print(json.dumps({"error": task["kind"], "message": "too small"}), flush=True)
    else:
        print(json.dumps({"answer": {"was": task["do"], "pid": os.getpid()}}), flush=True)
"""


@pytest.fixture
def light(monkeypatch):
    """Workers that start at once."""

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    monkeypatch.setattr(pool, "_start", start)


def test_every_task_is_answered_once(light):
    with pool.open_pool(3) as workers:
        answers = dict(workers.run([{"do": number} for number in range(10)]))
        assert {number: answer["was"] for number, answer in answers.items()} == {n: n for n in range(10)}
        assert len({answer["pid"] for answer in answers.values()}) <= 3
        more = dict(workers.run([{"do": "x"}]))
        assert more[0]["pid"] in {answer["pid"] for answer in answers.values()}


@pytest.mark.parametrize(("how", "reason"), [("die", "by signal 9; out of memory"), ("end", "with code 3")])
def test_a_worker_that_dies_takes_one_task_with_it(light, how, reason):
    with pool.open_pool(1) as workers:
        answers = dict(workers.run([{"do": "a"}, {"do": how}, {"do": "b"}]))
    assert answers[0]["was"] == "a"
    assert isinstance(answers[1], pool.Died)
    assert reason in answers[1].reason
    assert answers[2]["was"] == "b"
    assert answers[2]["pid"] != answers[0]["pid"]


@pytest.mark.parametrize(("kind", "error"), [("Infeasible", Infeasible), ("ZeroDivisionError", CoterieError)])
def test_an_error_of_a_worker_is_raised_here(light, kind, error):
    with pool.open_pool(2) as workers, pytest.raises(error, match="too small"):
        list(workers.run([{"do": "raise", "kind": kind}]))


def test_workers_end_with_the_pool(light):
    with pool.open_pool(2) as workers:
        list(workers.run([{"do": 1}, {"do": 2}, {"do": 3}]))
        processes = [process for process in workers._processes if process is not None]
    assert processes
    assert all(process.returncode == -signal.SIGKILL for process in processes)


REAL = """
import sys, types
tasks = types.ModuleType("coterie.bench.tasks")
class Worker:
    def do(self, task):
        print("said aside")
        return {"done": 1 / task["number"]}
    def close(self): print("closed")
tasks.Worker, tasks.set_threads = Worker, lambda: None
sys.modules["coterie.bench.tasks"] = tasks
from coterie.bench.worker import main
main()
"""


def test_a_worker_keeps_its_answers_apart_from_what_is_printed():
    lines = '{"number": 2}\n{"number": 0}\n{"number": 4}\n'
    done = subprocess.run(
        [sys.executable, "-c", REAL], input=lines, capture_output=True, text=True, timeout=60, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [
        {"answer": {"done": 0.5}},
        {"error": "ZeroDivisionError", "message": "division by zero"},
        {"answer": {"done": 0.25}},
    ]
    assert done.stderr.splitlines() == ["said aside"] * 3 + ["closed"]


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdin.write(b'{"number": 1}\\n')
child.stdin.flush()
child.stdout.readline()
child.stdin.write(b'{"number": 60}\\n')
child.stdin.flush()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="processes there do not learn that their parent ended")
def test_a_worker_ends_with_its_parent():
    busy = REAL.replace('return {"done": 1 / task["number"]}', "import time; time.sleep(task['number'] - 1); return {}")
    with subprocess.Popen([sys.executable, "-c", PARENT, busy], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_without_workers_one_thread_computes_here():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pool.open_pool(0) as here:
            assert torch.get_num_threads() == 1
            with pytest.raises(AttributeError, match="_nonsense"):
                list(here.run([{"name": "nonsense"}]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
