"""Take the picture of a report that the README shows, in a headless Chromium (pip install -e '.[browser]').

    python benchmarks/demo.py
    python benchmarks/picture.py [--report demo/report.html] [--out docs/report.png]

It is the top of the page as a screen of this width shows it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent.parent

#: Pixels of the picture.
WIDTH, HEIGHT = 1280, 1240

_TIMEOUT = 300_000  # milliseconds: a machine may be busy


def take_picture(browser: Any, report: Path, out: Path) -> None:
    """Write the top of a page, as an open browser shows it, as a PNG."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    page.set_default_timeout(_TIMEOUT)
    page.goto(report.resolve().as_uri())
    page.screenshot(path=out)
    page.close()


def main() -> None:
    """Take the picture that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=HERE / "demo" / "report.html", help="the page")
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "report.png", help="where the picture goes")
    options = parser.parse_args()
    if not options.report.is_file():
        sys.exit(f"{options.report} is not there: make it first, with benchmarks/demo.py")
    done = subprocess.run([HERE / "tests" / "report" / "chromium.sh"], capture_output=True, text=True, check=False)
    said = (done.stdout.strip().splitlines() or ["no Chromium"])[-1]
    if done.returncode:
        sys.exit(said)
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=said, args=["--disable-gpu"], timeout=_TIMEOUT)
        take_picture(chromium, options.report, options.out)
        chromium.close()


if __name__ == "__main__":
    main()
