"""The questions of the tasks in this folder, from the file beside this one."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(**_: Any) -> dict[str, Dataset]:
    """Return the questions, as the harness wants them."""
    lines = (Path(__file__).parent / "sums.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
