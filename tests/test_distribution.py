"""What is published: metadata, what is in the wheel and the source distribution, and that the latter tests itself."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**20  # bytes of a file in either
NEEDED = ("build", "hatchling", "hatch_fancy_pypi_readme", "trove_classifiers")

pytestmark = pytest.mark.skipif(
    not all(find_spec(name) for name in NEEDED), reason="building takes pip install 'coterie[dev]'"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is built from it, as they are published."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    with zipfile.ZipFile(built[1]) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(wheel.read(name))


def test_the_wheel_has_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        files = {entry.filename: entry.file_size for entry in wheel.infolist()}
    package = {name for name in files if name.startswith("coterie/")}
    assert package == {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "coterie").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in package} == {".py", ".typed", ".css", ".html", ".j2", ".json", ".safetensors"}
    [folder] = {name.split("/")[0] for name in files.keys() - package}
    assert {name.removeprefix(f"{folder}/") for name in files.keys() - package} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"
    }  # fmt: skip
    assert max(files.values()) <= LARGEST


def test_the_source_distribution_has_what_its_tests_need_and_no_large_files(built):
    with tarfile.open(built[0]) as sdist:
        files = {member.name.partition("/")[2]: member.size for member in sdist.getmembers() if member.isfile()}
    top = {name.split("/")[0] for name in files}
    assert top == {
        ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "PKG-INFO", "README.md",
        "benchmarks", "constraints.txt", "docs", "mkdocs.yml", "pyproject.toml", "reference", "src", "tests",
    }  # fmt: skip
    # The bundled models and their text stay in the repository: 95 MB for a test of a package.
    assert {Path(name).suffix for name in files if name.startswith("reference/")} <= {".py", ".md"}
    assert {name: size for name, size in files.items() if size > LARGEST} == {}
    assert sum(files.values()) < 9 * LARGEST
    for folder in ("src", "tests", "docs", "benchmarks"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert here - files.keys() == set()


def test_metadata_is_whole(metadata):
    import trove_classifiers

    assert metadata["Name"] == "coterie"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Author"]
    classifiers = set(metadata.get_all("Classifier"))
    assert classifiers <= trove_classifiers.classifiers
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= classifiers
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert {"moe", "mixture-of-experts", "pruning"} <= set(metadata["Keywords"].split(","))
    assert set(metadata.get_all("Provides-Extra")) >= {"dev", "docs", "eval"}


def test_links_of_the_readme_work_where_it_is_published(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown = metadata.get_payload()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", shown)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for _, link in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", readme) if "://" not in link]
    assert len(relative) > 10
    assert [link for _, link in links if not link.startswith("https://")] == []
    pictures = [link for picture, link in links if picture]
    assert pictures == ["https://raw.githubusercontent.com/coterie-moe/coterie/main/docs/report.png"]
    assert "https://github.com/coterie-moe/coterie/blob/main/docs/plan.md#a-method-of-your-own" in [b for _, b in links]


@pytest.mark.slow
def test_the_source_distribution_tests_itself(built, tmp_path):
    with tarfile.open(built[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}

    def run_tests(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
        return done.stdout

    assert re.search(r"^\d{3,}/\d+ tests collected|^\d{4} tests collected", run_tests("--collect-only"), re.MULTILINE)
    small = ("test_public", "test_docs", "test_errors", "test_outputs", "test_artifact", "evaluate/test_answers")
    printed = run_tests("-rs", *(f"tests/{name}.py" for name in small))
    assert " passed" in printed
    assert "the bundled models are not part of the source distribution" in printed
