"""What comes with a model comes with its result: folders, licence, vocabulary, code; no second copy of weights."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from coterie.compress.output import carry_files
from coterie.model.disk.checkpoint import Checkpoint


def test_all_that_holds_no_weights_is_carried_along(tiny, tmp_path):
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "tool_use.jinja").write_text("TOOLS {{ messages }}")
    (model / "additional_chat_templates").symlink_to(tmp_path / "templates")
    carried = {"LICENSE": "mine", "words.tiktoken": "aa 0", "code/modeling_mine.py": "raise SystemExit"}
    left_out = {"original/params.json": "{}", "fp8/model.safetensors": "x", ".git/config": "x", "coterie.json": "{}"}
    about_it = ("README.md", "readme_zh.md", "README", "MODEL_CARD.md", "card.json", "all_results.json",
                "trainer_state.json")  # fmt: skip
    left_out |= dict.fromkeys(about_it, "MMLU 99.9")
    carried |= {"code/README.md": "what the code does", "NOTICE": "theirs", "card_game.json": "{}"}
    for name, content in {**carried, **left_out}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    out = tmp_path / "out"
    out.mkdir()
    carry_files(Checkpoint.open(model), out)
    assert {name: (out / name).read_text() for name in carried} == carried
    assert not any((out / name).exists() for name in left_out)
    assert not (out / "additional_chat_templates").is_symlink()
    shutil.copy(model / "config.json", out)
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert templates["tool_use"] == "TOOLS {{ messages }}"
