"""What the documents quote is what the commands printed, what they link to is there, and what they type exists."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import coterie
import coterie.testing
from coterie.cli.main import app
from coterie.compress.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
SITE_PAGES = sorted(DOCS.rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *SITE_PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))]
QUOTE = re.compile(r"<!-- printed by `[^`]+`, copied from (\S+) -->\n(.*?)<!-- end of", re.DOTALL)
MISSING = "…"  # a line of a quote that stands for lines which were left out


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def lines_not_printed(quote: str, printed: str) -> list[str]:
    """Return lines of tables and blocks of a quote that are not among those that were printed, in their order."""
    rest = iter(printed.splitlines())
    inside = False
    strange = []
    for line in quote.splitlines():
        if line.startswith("```"):
            inside = not inside
            continue
        # To look for a line in an iterator reads on to it.
        if ((inside and line.strip() != MISSING) or line.startswith("|")) and line not in rest:
            strange.append(line)
            rest = iter(())
    return strange


@pytest.mark.parametrize(
    "page", [page for page in [README, *SITE_PAGES] if "copied from" in read(page)], ids=lambda page: page.name
)
def test_what_is_quoted_is_what_was_printed(page):
    quotes = QUOTE.findall(read(page))
    assert len(quotes) == read(page).count("copied from")
    for file, quote in quotes:
        assert re.search(r"^\||^```", quote, re.MULTILINE), file
        assert lines_not_printed(quote, read(ROOT / file)) == [], file


def test_a_quote_that_was_changed_is_seen():
    printed = "```text\n$ a\nb\nc\n```\n| x |\n| 1 |\n"
    assert lines_not_printed("```text\n$ a\n…\nc\n```\n", printed) == []
    assert lines_not_printed("```text\n$ a\nd\n```\n", printed) == ["d"]
    assert lines_not_printed("```text\nc\nb\n```\n", printed) == ["b"]
    assert lines_not_printed("words\n| x |\n| 2 |\n", printed) == ["| 2 |"]


def anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    slugs = {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_links_of_the_site_to_the_source_lead_to_files_that_are_there():
    start = f"https://github.com/{repository()}/blob/main/"
    linked = {link for page in SITE_PAGES for link in re.findall(re.escape(start) + r"([^)#\s]+)", read(page))}
    assert len(linked) > 5
    assert {link for link in linked if not (ROOT / link).exists()} == set()


def repository() -> str:
    """Return owner and name of the repository, which pyproject.toml says."""
    [name] = set(
        re.findall(r'^Repository = "https://github\.com/([\w-]+/[\w-]+)"$', read(ROOT / "pyproject.toml"), re.M)
    )
    return name


def test_the_repository_is_the_same_wherever_it_is_named():
    files = [ROOT / "pyproject.toml", ROOT / "mkdocs.yml", *PAGES]
    named = {match for file in files for match in re.findall(r"[\w-]+/coterie(?=[/\")\s])", read(file))}
    assert {name for name in named if name != "src/coterie"} == {repository()}


def test_numbers_of_the_study_are_those_that_were_printed():
    quoted = set(re.findall(r"\b0\.\d{4,5}\b", read(DOCS / "research.md")))
    files = [*sorted((ROOT / "benchmarks").glob("research*.md")), *sorted((ROOT / "benchmarks").glob("bits*.md"))]
    assert len(files) > 3 + 5
    printed = "".join(read(file) for file in files)
    assert len(quoted) > 30
    assert {number for number in quoted if not re.search(rf"\| {number} [|±]", printed)} == set()


def half_removed(file: Path, recipe: str) -> tuple[str, str]:
    """Return KL and exact answers of a recipe where half is removed, from a bench's first table, without deviations."""
    rows = [line.split("|") for line in read(file).splitlines() if line.startswith(f"| {recipe} |")]
    kl, exact = (rows[0][column].replace("*", "").split("±")[0].strip().removesuffix("%").strip() for column in (3, 7))
    return kl, f"{exact} %"


def test_what_the_readme_says_of_recipes_is_what_was_printed():
    [table] = re.findall(r"## Which recipe\n\n(.*?)\n\n", read(README), re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) >= 4
    for name, _, numbers in rows:
        recipe, *options = re.findall(r"`([^`]+)`", name)[0].split(" ", 1)
        file = ROOT / "benchmarks" / ("fast.md" if options == ["--effort fast"] else "methods.md")
        assert tuple(numbers.split(", ")) == half_removed(file, recipe), name


def test_the_readme_can_be_read_in_one_go():
    size = len(README.read_bytes())
    assert 6_000 <= size <= 8_192, f"{size} bytes: tables belong into docs/"
    assert read(README).count("\n![") == 1


def test_the_picture_of_the_results_is_the_one_that_was_drawn():
    assert (DOCS / "methods.png").read_bytes() == (ROOT / "benchmarks" / "methods.png").read_bytes()


def navigation() -> list[str]:
    """Return the pages in the navigation of the site."""
    return re.findall(r"^ +- (\S+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    pages = [page.relative_to(DOCS).as_posix() for page in SITE_PAGES]
    assert sorted(navigation()) == sorted(pages)


def test_every_recipe_has_a_page_and_a_line():
    table = read(DOCS / "recipes.md")
    for recipe in RECIPES:
        assert (DOCS / "methods" / f"{recipe}.md").exists(), recipe
        assert f"](methods/{recipe}.md)" in table, recipe
        assert f"methods/{recipe}.md" in navigation(), recipe


def test_every_public_name_is_in_the_reference():
    described = {name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", read(page), re.M)}
    shown = {name.rpartition(".")[2] for name in described}
    assert set(coterie.__all__) - shown == set()
    functions = {name for name in coterie.testing.__all__ if not name.isupper()}
    assert functions - shown == set()
    assert "coterie.errors" in described


def typed_commands(page: Path) -> list[list[str]]:
    """Return the words of every `coterie` command line in a page's blocks, without those in brackets of options."""
    lines = re.findall(r"^(?:    |\$ )?coterie ([a-z].*)$", read(page), re.MULTILINE)
    return [re.sub(r"\s{2,}#.*", "", line).replace("[", " ").replace("]", " ").split() for line in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if typed_commands(page)], ids=lambda page: page.name)
def test_commands_and_options_that_are_typed_exist(page):
    commands = typer.main.get_command(app).commands
    for command, *words in typed_commands(page):
        assert command in commands, command
        known = {name for parameter in commands[command].params for name in parameter.opts} | {"-h", "--help"}
        assert {word for word in words if word.startswith("--")} <= known, (command, words)


def test_the_tree_names_what_is_there():
    source = ROOT / "src" / "coterie"
    names = {path.name for path in source.rglob("*")}
    block = read(DOCS / "tree.md").split("    reference/")[0]
    listed = re.findall(r"\b(\w+\.py)\b|\b(\w+)/(?= )", block)
    assert len(listed) > 100
    assert {file or folder for file, folder in listed} - names == set()


@pytest.mark.long
@pytest.mark.skipif(find_spec("material") is None, reason="the site takes pip install 'coterie[docs]'")
def test_the_site_is_built_strictly(tmp_path):
    # Its own process: plug-ins read warnings filters and change logging.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "site").rglob("*.html"))) > len(SITE_PAGES)
    functions = read(tmp_path / "site" / "api" / "functions" / "index.html")
    assert 'id="coterie.compress.apply.compress"' in functions
    assert "Raises" in functions
    home = read(tmp_path / "site" / "index.html")
    assert not re.findall(r'(?:src|href)="https?://(?!github\.com)[^"]*\.(?:js|css|woff2?)"', home)
