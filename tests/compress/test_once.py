"""In one compression everything is done once: the model is opened, understood, its text tokenized, the plan made."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import coterie.compress.decide as decide_module
import coterie.compress.prepare as prepare_module
from coterie.compress.apply import compress
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.text import CalibrationText
from some import first


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("recipe", "router"), first(1, [("coterie-ragged", None), ("coterie", None), ("mergemoe", "map")])
)
def test_everything_is_done_once(
    olmoe: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    router: Any,
    kept: bool,
) -> None:
    done: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)
        call = getattr(real, "__func__", real)

        def count(*arguments: Any, **options: Any) -> Any:
            # The result is opened and understood too, to be checked; what counts is how often the original is.
            about = (
                Path(getattr(arguments[-1], "path", arguments[-1])) if owner in (Checkpoint, Architecture) else olmoe
            )
            done[what] += about == olmoe
            return call(*arguments, **options)

        monkeypatch.setattr(owner, name, classmethod(count) if hasattr(real, "__func__") else count)

    counted(Checkpoint, "open", "open")
    counted(Architecture, "of", "understand")
    counted(CalibrationText, "_read", "tokenize")
    counted(decide_module, "weighed", "weigh")
    counted(prepare_module, "outline", "plan")
    result = compress(
        olmoe, tmp_path / "out", keep=0.5, recipe=recipe, router=router, text=text_folder, tokens=512, seq_len=32,
        train_tokens=512 if recipe.startswith("coterie") else None,
        profile=tmp_path / "profile" if kept else None,
    )  # fmt: skip
    again = 1 if recipe == "coterie-ragged" else 0  # widths, and so bytes, are known when something was measured
    assert done == {"open": 1, "understand": 1, "tokenize": 1, "plan": 1, "weigh": 1 + again}
    assert result.logits_error <= 1e-4
