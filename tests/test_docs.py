"""What the documents quote is what the commands printed, and what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
QUOTE = re.compile(r"<!-- printed by `[^`]+`, copied from (\S+) -->\n(.*?)<!-- end of", re.DOTALL)


def test_tables_of_the_readme_are_those_that_were_printed():
    quotes = QUOTE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(quotes) >= 4
    for file, quote in quotes:
        printed = (ROOT / file).read_text(encoding="utf-8").splitlines()
        lines = [line for line in quote.splitlines() if line.startswith("|")]
        assert lines, file
        assert [line for line in lines if line not in printed] == [], file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_numbers_of_the_study_are_those_that_were_printed():
    quoted = set(re.findall(r"\b0\.\d{4}\b", (ROOT / "docs" / "research.md").read_text(encoding="utf-8")))
    files = sorted((ROOT / "benchmarks").glob("research*.md"))
    assert len(files) == 3
    printed = "".join(file.read_text(encoding="utf-8") for file in files)
    assert len(quoted) > 30
    assert {number for number in quoted if f"| {number} |" not in printed} == set()
