"""What all tests share: tiny checkpoints and text made once a session, one thread, no network, repeatable draws."""

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before anything imports the hub's client: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tables are as wide as what they say, whatever the terminal that the tests run in.
os.environ.pop("COLUMNS", None)

# The same examples on every machine, no time limit for a busy one, and no database on the disk.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("repeatable"), max_examples=400)
hypothesis.settings.load_profile("repeatable")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on many threads, and sums come in the same order on one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A machine that goes down takes its tests with it. What is flushed, and when, is seen by tests of that alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is made of GGUF files is kept with the tests' other files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test with the same random numbers."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Return a factory of tiny checkpoints, each made once; they are shared: copy one before you change it.

    ``tiny()`` is an olmoe; ``tiny("mixtral", dtype=torch.bfloat16, num_hidden_layers=3)`` passes all on to
    `coterie.testing.tiny_checkpoint`. That nobody wrote into them is checked at the end of the session.
    """
    from coterie.testing import tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}
    before: dict[str, dict[str, str]] = {}

    def make(model_type: str = "olmoe", **changes: Any) -> Path:
        key = repr((model_type, sorted(changes.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = tiny_checkpoint(folder / f"{len(made):02d}-{model_type}", model_type, **changes)
            before[key] = digests(made[key])
        return made[key]

    yield make
    for key, path in made.items():
        assert digests(path) == before[key], f"a test wrote into the shared checkpoint {key}"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with two domains of text and a file of questions; shared: copy it before you change it."""
    from coterie.testing import tiny_text

    folder = tiny_text(tmp_path_factory.mktemp("text"))
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a test wrote into the shared text"


@pytest.fixture(scope="session")
def bundled() -> Path:
    """Return the folder of the bundled models and their text, which the repository has."""
    reference = Path(__file__).parents[1] / "reference"
    if not (reference / "model" / "model.safetensors").exists():
        pytest.skip("the bundled models are not part of the source distribution")
    return reference


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    """The program makes the library talk (its messages are what a user sees); no test inherits that from another."""
    yield
    logging.getLogger("coterie").setLevel(logging.NOTSET)
