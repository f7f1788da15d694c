"""What profile, compress and evaluate take on models of growing size: memory, bytes read and written, time.

    python benchmarks/memory.py [--sizes 4GB 8GB 16GB] [--work DIR] [--keep-files] [--json FILE] [--bundled]
                                [--commands profile gradients compress gptq bits evaluate] [--limit 4GiB]

For each size a synthetic checkpoint is made (`make_large.py`), and each command runs on it in a process of its own, the
checkpoint being out of the file cache. "compress" halves the experts; "gptq" and "bits" take minutes a GB, and run when
they are named: they bring the model to a quarter of its bytes in fewer bits, with one type for all (Q3_K), and with the
type for each matrix that the loss needs (coterie-bits, not trained). With --bundled the
bundled model is measured as well: profile with and without gradients, with long text, and the recipe coterie with all
its stages. Prints tables in Markdown, and exits with status 1 when a promise is broken:

- the peak of a command's memory does not grow with the model (by at most 10 %), stays under what the command announced,
  and under --limit; what is announced is no more than 1.6 times the peak where that is above a GiB;
- profile and compress together read every byte of the model at most twice;
- compress writes the result once (at most 1.1 times its bytes).

The peak is the largest resident memory of the process as the system counts it; that of a stage is known where the
count can be set back (Linux). "Input read" counts what the process reads of the model's files (`os.preadv`, through
which Coterie reads weights); "read" and "written" are the system's counts of all that passes through read and write
calls, so also the result that is read again to check it. They are known on Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Nothing heavy: a process begins with the peak of the process that started it.
from coterie.amounts import format_bytes, parse_bytes

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent / "reference"
COMMANDS = ("profile", "gradients", "compress", "gptq", "bits", "evaluate")
#: Those that run when they are named.
SLOW = ("gptq", "bits")

#: Size and commands of the bundled model, and how much text is long.
BUNDLED = "bundled"
BUNDLED_COMMANDS = ("profile", "gradients", "long text", "coterie")
LONG_TEXT = 16 * 2**20

#: Largest ratio of what is announced to the peak, for peaks above a GiB: an announcement is not to be hollow.
MAX_ANNOUNCED = 1.6

MAX_GROWTH = 1.1
MAX_INPUT_READS = 2.01  # headers and digests are read besides
MAX_WRITTEN = 1.1

# Runs the program and counts what it reads of one folder.
_COUNTING = """
import json, os, sys
from pathlib import Path
folder, report = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
sys.argv = ["coterie", *sys.argv[3:]]
preadv, inside, counts = os.preadv, {}, []
def counting(descriptor, buffers, *rest):
    number = preadv(descriptor, buffers, *rest)
    key = (descriptor, os.fstat(descriptor).st_ino)
    if key not in inside:
        inside[key] = Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(folder)
    counts.append(number * inside[key])
    return number
if Path("/proc/self/fd").exists():
    os.preadv = counting
from coterie.cli.main import main
peaks = {}
if sys.argv[1] == "compress":
    import functools
    from coterie.compress import apply
    from coterie.compress.result_steps import distill
    from coterie.evaluate.speed import reset_peak
    from coterie.model.stream.memory import peak_bytes
    def measured(name, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            known = reset_peak()
            try:
                return function(*arguments, **options)
            finally:
                if known:
                    peaks[name] = peak_bytes()
                    reset_peak()
        return call
    distill.make_predictions = measured("predict", distill.make_predictions)
    distill.distill = measured("train", distill.distill)
    apply.STEPS = tuple((name, step if name == "finish" else measured(name, step)) for name, step in apply.STEPS)
try:
    main()
finally:
    report.write_text(json.dumps({"input_read": sum(counts), "stages": peaks}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one command took; bytes, or None where the system does not tell.

    Attributes:
        model_bytes: of the weights of the input.
        peak: largest resident memory.
        forecast: what the command announced.
        input_read: of the files of the model.
        read: through read calls in all.
        written: through write calls in all.
        stored: that reached the disk, with what was written through mapped files.
        result_bytes: of the weights of the result, 0 where there is none.
        returncode: of the process.
        message: the end of what it printed to stderr.
        stages: the peaks of a compression's stages, where they are known.
    """

    command: str
    size: str
    model_bytes: int
    seconds: float
    peak: int
    forecast: int | None
    input_read: int | None
    read: int | None
    written: int | None
    stored: int | None
    result_bytes: int
    returncode: int
    message: str
    stages: dict[str, int] = field(default_factory=dict)


def run_measured(command: Sequence[str], folder: Path, work: Path) -> dict[str, object]:
    """Run `coterie COMMAND` in a process of its own and return what it took; reads of `folder` are counted apart."""
    report = work / "input-read"
    report.unlink(missing_ok=True)
    with (work / "stdout").open("wb") as out, (work / "stderr").open("wb") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", _COUNTING, str(folder), str(report), *command], stdout=out, stderr=err
        )
        if hasattr(os, "waitid"):  # ended, but not yet reaped: its counters can still be read
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - started
        counts = _counters(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    told = json.loads(report.read_text()) if report.exists() else {"input_read": 0, "stages": {}}
    return {
        "seconds": seconds,
        # What the system says of the whole process knows nothing of peaks before the count was set back.
        "peak": max(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), *told["stages"].values(), 0),
        "stages": told["stages"],
        "input_read": told["input_read"] if counts else None,
        "read": counts.get("rchar"),
        "written": counts.get("wchar"),
        "stored": counts.get("write_bytes"),
        "returncode": process.returncode,
        "message": (work / "stderr").read_text(errors="replace").strip()[-1500:],
    }


def _counters(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def announced(work: Path, out: Path) -> int | None:
    """Return the memory that the last command announced, from what it printed or from the run file of its result."""
    output = (work / "stdout").read_text(errors="replace") + (work / "stderr").read_text(errors="replace")
    for file in sorted(out.glob("*run*.json")) if out.is_dir() else ():
        output += file.read_text()
    if exact := re.search(r'"forecast_bytes": (\d+)', output):
        return int(exact[1])
    match = re.search(r"memory: at most ([\d.]+ ?[KMGT]?i?B)", output)
    return None if match is None else parse_bytes(match[1])


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def forget_files(folder: Path) -> None:
    """Take the files of a folder out of the system's file cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def measure_size(size: str, work: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """Make a checkpoint and run the commands on it one after another; those that need a failed one are left out."""
    model, text = work / "model", work / "model-text"
    profile_folder, result_folder = work / "profile", work / "result"
    make = [sys.executable, str(HERE / "make_large.py"), str(model)]
    subprocess.run([*make, *(("--layers", size) if size.isdecimal() else ("--size", size))], check=True)
    sample = ["--text", str(text), "--tokens", str(options.tokens), "--seq-len", "256", "--device", options.device]
    lines = {
        "profile": ["profile", str(model), str(profile_folder), *sample],
        "gradients": ["profile", str(model), str(work / "gradients"), "--gradients", *sample],
        "compress": ["compress", str(model), str(result_folder), "--keep", "0.5", "--recipe", options.recipe, *sample],
        "gptq": ["compress", str(model), str(work / "gptq"), "--type", "Q3_K", "--recipe", "gptq", *sample],
        "bits": ["compress", str(model), str(work / "bits"), "--budget", str(weight_bytes(model) // 4),
                 "--effort", "fast", *sample],
        "evaluate": ["evaluate", str(result_folder), "--against", str(model), *sample, "--questions", "0"],
    }  # fmt: skip
    for command in (name for name in COMMANDS if name in options.commands):
        line = list(lines[command])
        if command == "compress" and profile_folder.exists():
            line += ["--profile", str(profile_folder)]
        if command == "evaluate" and not result_folder.exists():
            continue
        for slow in SLOW:
            shutil.rmtree(work / slow, ignore_errors=True)
        places = {"profile": profile_folder, "compress": result_folder} | {slow: work / slow for slow in SLOW}
        yield measure_command(command, line, model, work, size=size, out=places.get(command, work / "none"))


def measure_bundled(work: Path, options: argparse.Namespace) -> Iterator[Measured]:
    """Measure the bundled model on its own text, and on long text."""
    model, text, long = REFERENCE / "model", REFERENCE / "text" / "calibration", work / "long"
    long.mkdir()
    prose = (text / "english_prose.txt").read_text(encoding="utf-8")
    prose = prose.replace("<|endoftext|>\n", "")  # one document
    (long / "prose.txt").write_text((prose * (LONG_TEXT // len(prose) + 1))[:LONG_TEXT], encoding="utf-8")
    sample = ["--device", options.device, "--text", str(text), "--tokens", str(options.bundled_tokens)]
    few = ["--device", options.device, "--text", str(long), "--tokens", "4096"]
    lines = {
        "profile": ["profile", str(model), str(work / "profile"), *sample],
        "gradients": ["profile", str(model), str(work / "gradients"), "--gradients", *sample],
        "long text": ["profile", str(model), str(work / "few"), *few],
        "coterie": ["compress", str(model), str(work / "coterie"), "--keep", "0.5", *sample,
                    "--train-tokens", str(options.bundled_tokens)],
    }  # fmt: skip
    for command in BUNDLED_COMMANDS:
        out = work / "coterie" if command == "coterie" else work / "none"
        yield measure_command(command, lines[command], model, work, size=BUNDLED, out=out)


def measure_command(command: str, line: Sequence[str], model: Path, work: Path, *, size: str, out: Path) -> Measured:
    """Run a command line in a process of its own and return what it took."""
    forget_files(model)
    print(f"{size}: coterie {command} ...", file=sys.stderr, flush=True)
    took = run_measured(line, model, work)
    result = line[0] == "compress" and out.exists()
    return Measured(
        command=command,
        size=size,
        model_bytes=weight_bytes(model),
        forecast=announced(work, out),
        result_bytes=weight_bytes(out) if result else 0,
        **took,  # type: ignore[arg-type]
    )


def broken_promises(measured: Sequence[Measured], limit: int) -> list[str]:
    """Return in words which promises the measurements break."""
    broken = []
    for row in measured:
        name = f"{row.command} of {row.size}"
        if row.returncode:
            broken.append(f"{name} failed with status {row.returncode}: {row.message[-500:]}")
            continue
        if row.peak > limit:
            broken.append(f"{name} took {format_bytes(row.peak)} of memory, more than {format_bytes(limit)}")
        if row.forecast is None:
            broken.append(f"{name} did not say how much memory it would take")
        elif row.peak > row.forecast:
            broken.append(f"{name} took {format_bytes(row.peak)}, but announced {format_bytes(row.forecast)}")
        elif row.peak > 2**30 and row.forecast > MAX_ANNOUNCED * row.peak:
            broken.append(
                f"{name} announced {format_bytes(row.forecast)}, more than {MAX_ANNOUNCED} times the "
                f"{format_bytes(row.peak)} that it took"
            )
        if row.command == "compress" and row.written is not None and row.written > MAX_WRITTEN * row.result_bytes:
            broken.append(
                f"{name} wrote {format_bytes(row.written)} for a result of {format_bytes(row.result_bytes)}: "
                f"more than {MAX_WRITTEN} times as much"
            )
    succeeded = [row for row in measured if not row.returncode and row.size != BUNDLED]
    for command in COMMANDS:
        rows = sorted((row for row in succeeded if row.command == command), key=lambda row: row.model_bytes)
        broken += [
            f"the peak of {command} grows with the model: {format_bytes(rows[0].peak)} for {rows[0].size}, "
            f"{format_bytes(row.peak)} for {row.size}"
            for row in rows[1:]
            if row.peak > MAX_GROWTH * rows[0].peak
        ]
    for size in dict.fromkeys(row.size for row in succeeded):
        rows = [row for row in succeeded if row.size == size and row.command in ("profile", "compress")]
        if any(row.input_read is None for row in rows) or "compress" not in [row.command for row in rows]:
            continue
        times = sum((row.input_read or 0) / row.model_bytes for row in rows)
        if times > MAX_INPUT_READS:
            broken.append(f"profile and compress of {size} read the model {times:.2f} times, more than twice")
        if times < 0.9:
            broken.append(f"profile and compress of {size} read the model {times:.2f} times: the count cannot be right")
    return broken


def table(measured: Sequence[Measured]) -> str:
    """Return the measurements as Markdown."""

    def size(value: int | None) -> str:
        return "-" if value is None else format_bytes(value)

    def times(value: int | None, row: Measured) -> str:
        return "-" if value is None else f"{value / row.model_bytes:.2f}"

    headers = (
        "model", "bytes", "command", "peak", "announced", "ratio", "input read", "read", "written", "s", "s/GB",
    )  # fmt: skip
    lines = [headers, ("---", "---:", "---", *("---:" for _ in headers[3:]))]
    lines += [
        (
            row.size, size(row.model_bytes), row.command + (" (failed)" if row.returncode else ""),
            size(row.peak), size(row.forecast), "-" if not row.forecast else f"{row.forecast / row.peak:.2f}",
            times(row.input_read, row), times(row.read, row),
            times(row.written, row), f"{row.seconds:.0f}", f"{row.seconds / row.model_bytes * 1e9:.1f}",
        )
        for row in measured
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def stages_table(measured: Sequence[Measured]) -> str:
    """Return the peaks of the stages of compressions as Markdown."""
    lines = [("model", "command", "stage", "peak"), ("---", "---", "---", "---:")]
    lines += [(row.size, row.command, *stage) for row in measured for stage in
              ((name, format_bytes(peak)) for name, peak in row.stages.items())]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" if len(lines) > 2 else ""


def main() -> None:
    """Measure, print the table, and say which promises are broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4GB", "8GB", "16GB"], help="sizes, or numbers of layers")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; a temporary one by default")
    parser.add_argument("--keep-files", action="store_true", help="leave checkpoints and results in place")
    parser.add_argument("--json", type=Path, help="where all figures go as JSON")
    parser.add_argument("--markdown", type=Path, help="where the table goes as well")
    parser.add_argument(
        "--commands", nargs="+", choices=COMMANDS, default=[name for name in COMMANDS if name not in SLOW]
    )
    parser.add_argument("--limit", default="4GiB", help="memory that no command may exceed")
    parser.add_argument("--recipe", default="reap")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of text for each command")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bundled", action="store_true", help="measure the bundled model, and recipe coterie, as well")
    parser.add_argument("--bundled-tokens", type=int, default=131_072, help="tokens that it is measured and trained on")
    options = parser.parse_args()
    limit = parse_bytes(options.limit)
    measured: list[Measured] = []
    work = Path(options.work or tempfile.mkdtemp(prefix="coterie-memory-"))
    try:
        for number, size in enumerate(options.sizes):
            place = work / f"{number}-{size}"
            place.mkdir(parents=True)
            try:
                for row in measure_size(size, place, options):
                    measured.append(row)  # noqa: PERF402 - the figures so far stay when a later command is interrupted
            finally:
                if not options.keep_files:
                    shutil.rmtree(place)
        if options.bundled:
            with tempfile.TemporaryDirectory(dir=work) as place:
                for row in measure_bundled(Path(place), options):
                    measured.append(row)  # noqa: PERF402
    finally:
        if options.work is None and not options.keep_files:
            shutil.rmtree(work)
    print("Bytes read and written are in multiples of the model's bytes.\n")
    tables = "\n".join(filter(None, (table(measured), stages_table(measured))))
    print(tables)
    if options.markdown:
        options.markdown.write_text(tables)
    broken = broken_promises(measured, limit)
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in measured], "broken": broken}, indent=2))
    if broken:
        sys.exit("\n".join(f"broken: {line}" for line in broken))
    print("All promises are kept.")


if __name__ == "__main__":
    main()
