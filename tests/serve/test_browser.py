"""The status page in a real browser, while the server works; run by make test-browser."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import NAME, Gate, listening
from .test_server import Caller, chat

playwright = pytest.importorskip("playwright.sync_api", reason="the extra [browser] is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra [browser] is not installed")

pytestmark = pytest.mark.browser

#: The colours of the first layer's experts.
COLOURS = """() => {
  const canvas = document.querySelector('#layers canvas');
  const pen = canvas.getContext('2d');
  return Array.from({ length: canvas.width / 4 }, (_, n) => pen.getImageData(4 * n + 1, 4, 1, 1).data.join());
}"""


def expect(locator: Any) -> Any:
    """Return what waits for a locator, also on a busy machine; the page itself lets nobody wait in it."""
    playwright.expect.set_options(timeout=60_000)
    return playwright.expect(locator)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    script = Path(__file__).parents[1] / "report" / "chromium.sh"
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    said = (done.stdout.strip().splitlines() or ["no Chromium"])[-1]
    if done.returncode:
        pytest.skip(said)
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=said, args=["--disable-gpu"], timeout=300_000)
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, "light"), (500, "dark")], ids=str)
def page(request: Any, browser: Any) -> Iterator[Any]:
    """A page that collects what goes wrong in it, in `problems`, and where it asks, in `asked`."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.problems, page.asked, page.kind = [], [], f"{width}-{scheme}"
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    yield page
    page.close()


def test_the_page_shows_what_the_server_does_while_it_does_it(page: Any, runtime: Any, gate: Gate) -> None:
    with listening(runtime) as client:
        base = str(client.base_url)
        page.goto(base)
        expect(page.locator("#layers tr")).to_have_count(3)
        assert page.text_content("h1") == NAME
        assert page.text_content("#queue") == "0 running, 0 of 2 waiting"
        assert chat(client, max_tokens=30).is_success
        expect(page.locator("#tokens")).to_contain_text("30 made")
        assert float(page.text_content("#speed")) > 0
        assert page.text_content("#hits").endswith(" %")
        assert page.text_content("#read").endswith("B")
        gate.is_open.clear()
        callers = [Caller(client) for _ in range(2)]
        expect(page.locator("#queue")).to_have_text("1 running, 1 of 2 waiting")
        rows = [[cell.text_content() for cell in row.query_selector_all("th, td")] for row in
                page.query_selector_all("#layers tr")]  # fmt: skip
        layers = client.get("/status").json()["layers"]
        assert [row[:2] for row in rows] == [
            [str(each["layer"]), f"{len(each['in_memory'])} of {each['count']}"] for each in layers
        ]
        label = page.query_selector("#layers canvas").get_attribute("aria-label")
        assert label == f"experts {', '.join(map(str, layers[0]['in_memory'])) or 'none'}"
        assert page.problems == []
        colours = page.evaluate(COLOURS)  # the browser has to say something of that
        inside = set(layers[0]["in_memory"])
        assert len(set(colours)) == 2
        assert len({(number in inside, colour) for number, colour in enumerate(colours)}) == 2
        gate.is_open.set()
        for caller in callers:
            caller.join()
        violations = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [each["id"] for each in violations] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [each for each in page.problems if "willReadFrequently" not in each] == []
        assert {url for url in page.asked if not url.startswith("data:")} == {f"{base}/", f"{base}/status"}
        if kept := os.environ.get("COTERIE_SCREENSHOTS"):
            page.screenshot(path=Path(kept) / f"status-{page.kind}.png", full_page=True)
    expect(page.locator("#problem")).to_have_text("The server does not answer.")


def test_the_page_asks_for_the_key(page: Any, runtime: Any) -> None:
    with listening(runtime, api_key="s3cret") as client:
        page.goto(str(client.base_url))
        expect(page.locator("#key")).to_be_visible()
        page.fill("#key", "s3cret")
        page.click("button")
        expect(page.locator("h1")).to_have_text(NAME)
        expect(page.locator("#key")).to_be_hidden()
