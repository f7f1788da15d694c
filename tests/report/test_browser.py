"""The report in a real browser, at three widths, in both colour schemes and on paper; run by make test-browser.

Screenshots are kept in the folder that COTERIE_SCREENSHOTS names.
"""

import functools
import importlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coterie.compress.layer_plan import LayerPlan
from coterie.report.page import report

from . import conftest
from .conftest import RunMaker

playwright = pytest.importorskip("playwright.sync_api", reason="the extra [browser] is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra [browser] is not installed")

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
WIDTHS = (1280, 768, 500)
TALLEST = 12_000  # pixels of a screenshot
A4 = 703  # pixels of the text on a sheet: 210 mm without two margins of 12 mm, at 96 pixels an inch
LONG = "Some-Organisation/An-Extraordinarily-Long-Model-Name-30B-A3B-Instruct-2507-with-a-suffix-that-never-ends"
UNBROKEN = "x" * 90
HOSTILE = "<script>alert('x')</script>\"&"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    done = subprocess.run([HERE / "chromium.sh"], capture_output=True, text=True, check=False)
    said = (done.stdout.strip().splitlines() or ["no Chromium"])[-1]
    if done.returncode:
        pytest.skip(said)
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=said, args=["--disable-gpu"], timeout=300_000)
        yield chromium
        chromium.close()


def plain(folder: Path) -> None:
    run = RunMaker(folder)
    run.profile()
    run.base_card()
    for name, recipe, router, kl, kept in (
        ("merged", "mergemoe", "map", 0.125, 4),
        ("merged-plain", "mergemoe", "plain", 0.25, 4),
        ("pruned", "reap", "plain", 0.5, 6),
    ):
        run.manifest(name, recipe, router, kept)
        run.card(name, kl, num_bytes=conftest.ORIGINAL_BYTES * (kept + 8) // 16)
    run.plan("hc-smoe", kept=2).save(run.folder / "plans" / "small.json")


def profile_alone(folder: Path) -> None:
    RunMaker(folder).profile()


def nothing_compressed(folder: Path) -> None:
    RunMaker(folder).base_card()


def slim(folder: Path) -> None:
    """Results that shrank in every way there is."""
    run = RunMaker(folder)
    run.base_card()
    run.narrower("narrower", 8, notes={"slim": {"score": "heapr", "share_of_score": 0.9}})
    run.ragged("ragged", (16, 8, 8, 8, 0, 12, 12, 16), (1, 1, 2, 2, 3, 3, 2, 2))
    run.cut("cut", (4, 3, 2, 1, 0, 2, 2, 1), (2, 2, 2, 2, 2, 2, 1, 2))
    for name, kl in (("narrower", 0.3), ("ragged", 0.2), ("cut", 0.1)):
        run.card(name, kl)
    run.plan(size=LayerPlan(num_experts=15, width=4, top_k=4)).save(run.folder / "plan.json")


def hostile(folder: Path, *, layers: int = 24, experts: int = 64, domains: int = 24, sizes: int = 3) -> None:
    """Many layers, experts, domains and results, with long and unfriendly names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "NUM_LAYERS", layers)
        patch.setattr(conftest, "NUM_EXPERTS", experts)
        run = RunMaker(folder)
        plain_names = [f"domain_of_text_number_{n}" for n in range(domains - 3)]
        names = [HOSTILE, UNBROKEN, LONG.replace("/", "-"), *plain_names]
        run.profile(names)
        run.card(LONG, 0.0, digest=conftest.BASE, factor=1.0, num_bytes=10**6, domains=names)
        notes = {
            "refit-down": {
                "ridge": list(np.linspace(1e-9, 1e9, experts)),
                "merged": 12345,
                "kept_average": 0,
                "heldout_error_average": 123456.789,
                "heldout_error_refit": 1e-12,
            },
            "a-pass-with-a-long-name": {f"a_number_with_a_long_name_{n}": 1234567.891 for n in range(8)},
        }
        for number, recipe in enumerate(("reap", "mergemoe", "sub-moe", "my_own_module:RECIPE")):
            for kept in (experts * 3 // 4, experts // 2, experts // 4)[:sizes]:
                name = f"{(HOSTILE, UNBROKEN, LONG)[number % 3]}-{number}-{kept}".replace("/", "-")
                run.manifest(name, recipe, kept=kept, notes=notes, shapes=[{}] * layers, domains=names)
                run.card(name, 48 * 10.0 ** (number - 4) / kept, domains=names, num_bytes=12_000 * kept)
                run.plan(recipe, kept=kept + 1).save(run.folder / "plans" / f"{name}.json")


def few_hostile(folder: Path) -> None:
    """The same names, and fewer of all else, for what looks at every element in turn."""
    hostile(folder, layers=3, experts=16, domains=9, sizes=2)


USUAL_RUNS = (plain, profile_alone, nothing_compressed, slim)
RUNS = {make.__name__: make for make in (*USUAL_RUNS, hostile, few_hostile)}
MANY = [make.__name__ for make in (*USUAL_RUNS, hostile)]
FEW = [make.__name__ for make in (*USUAL_RUNS, few_hostile)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the report of a run, which is made once."""

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "run"
        RUNS[name](folder)
        return report(folder)

    return made


@pytest.fixture
def page_file(request: pytest.FixtureRequest, reports: Callable[[str], Path]) -> Path:
    return reports(request.param)


@pytest.fixture
def show(browser: Any, page_file: Path) -> Iterator[Any]:
    """Return a function that shows the page with everything unfolded, and fails where it loads or runs anything."""
    pages = []

    def open_page(width: int, *, scheme: str = "light", media: str = "screen") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(300_000)  # of milliseconds: a machine may be busy
        said: list[str] = []
        page.on("request", lambda asked: said.append(asked.url))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("console", lambda message: said.append(message.text))
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert [url for url in said if not url.startswith("data:")] == [page_file.as_uri()]
        kept = os.environ.get("COTERIE_SCREENSHOTS")
        if kept:
            file = Path(kept) / f"{page_file.parents[1].name.rstrip('0123456789')}-{width}-{scheme}-{media}.png"
            height = min(page.evaluate("document.documentElement.scrollHeight"), TALLEST)
            page.screenshot(path=file, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
        return page

    yield open_page
    for page in pages:
        page.close()


@pytest.mark.parametrize("page_file", MANY, indirect=True)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cropped_and_what_scrolls_says_so(show: Any, width: int) -> None:
    problems = show(width).evaluate((HERE / "browser_checks.js").read_text(encoding="utf-8"))
    assert problems == []


@pytest.mark.parametrize("page_file", MANY, indirect=True)
def test_nothing_is_cropped_on_a_sheet_of_a4(show: Any) -> None:
    page = show(A4, media="print")
    assert page.evaluate((HERE / "browser_checks.js").read_text(encoding="utf-8")) == []
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = false; })")
    sheets = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", page.pdf(prefer_css_page_size=True))
    assert sheets
    assert {(round(float(width)), round(float(height))) for width, height in sheets} <= {(595, 842), (594, 842)}


@pytest.mark.parametrize("page_file", FEW, indirect=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDTHS[0], WIDTHS[-1]])
def test_axe_has_nothing_to_say(show: Any, width: int, scheme: str) -> None:
    # Most of its time goes into a report on every element that passes, of which the many of a page have thousands.
    options = {"resultTypes": ["violations"]}
    violations = axe.Axe().run(show(width, scheme=scheme), options=options).response["violations"]
    assert [
        f"{each['id']} ({each['impact']}): {node['html'][:120]}" for each in violations for node in each["nodes"][:3]
    ] == []


def test_axe_sees_what_is_wrong_with_a_page(browser: Any) -> None:
    page = browser.new_page()
    page.set_content("<main><p style='color: #aaa; background: white'>pale</p><img src='data:,'></main>")
    violations = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    page.close()
    assert {"color-contrast", "image-alt", "html-has-lang"} <= {each["id"] for each in violations}


def test_few_hostile_texts_make_every_kind_of_element_that_many_make(reports: Callable[[str], Path]) -> None:
    class Kinds(HTMLParser):
        def __init__(self, page: Path) -> None:
            super().__init__()
            self.seen: set[tuple[str, ...]] = set()
            self.feed(page.read_text(encoding="utf-8"))

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            told = {"class", "role", "scope", "tabindex"}
            listed = sorted(f"{name}={text}" if name in told else name for name, text in attributes)
            # Numbers are those of colours of lines and marks, of which a page has as many as it has results.
            self.seen.add((tag, *(re.sub(r"\b([a-z])\d+\b", r"\1", name) for name in listed)))

    assert Kinds(reports("hostile")).seen <= Kinds(reports("few_hostile")).seen


def test_the_readme_s_picture_is_one_that_the_script_takes(
    browser: Any, reports: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE.parents[1] / "benchmarks")
    picture: Any = importlib.import_module("picture")
    sizes = []
    picture.take_picture(browser, reports("plain"), tmp_path / "report.png")
    for file in (tmp_path / "report.png", picture.HERE / "docs" / "report.png"):
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append([int.from_bytes(content[place : place + 4], "big") for place in (16, 20)])
    assert sizes == [[picture.WIDTH, picture.HEIGHT]] * 2


@pytest.mark.parametrize("page_file", MANY, indirect=True)
def test_keys_scroll_a_table(show: Any) -> None:
    page = show(500)
    wide = page.evaluate_handle(
        "[...document.querySelectorAll('.wide')].find((each) => each.scrollWidth > each.clientWidth + 40)"
    ).as_element()
    if wide is None:
        pytest.skip("nothing is wide in this run")
    wide.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(element) => element.scrollLeft > 0", arg=wide)
