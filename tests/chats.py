"""What tests of conversations share: a chat template, a model that has it, and a folder of chats."""

import json
import shutil
from pathlib import Path
from typing import Any

#: Turns with marks, and no other rule; answers are found by rendering prefixes.
TEMPLATE = """\
{%- for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content ~ '</>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def chat_model(source: Path, place: Path) -> Path:
    """Copy a model and give it the chat template."""
    model = Path(shutil.copytree(source, place))
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return model


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Return conversations of two turns and of different lengths."""
    rows = []
    for number in range(count):
        said = [
            f"why {number} " * (number % 4 + 1),
            f"so {number}",
            "and " * (number % 3 + 1),
            f"then {number * 7} it is",
        ]
        messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(said)]
        rows.append({"messages": messages})
    return rows


def chat_text(folder: Path, *, count: int = 60, domains: tuple[str, ...] = ("chat", "talk")) -> Path:
    """Write a text folder of conversations, and of prompts with completions as its last domain."""
    folder.mkdir(parents=True)
    for domain in domains:
        rows = chat_rows(count)
        if domain == domains[-1]:
            rows = [{"prompt": f"{row['messages'][0]['content']}:", "completion": f" {number} is it"} for number, row in
                    enumerate(rows)]  # fmt: skip
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
