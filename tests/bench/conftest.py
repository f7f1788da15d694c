import pytest

from coterie.bench import run
from coterie.bench.run import Bench, bench


@pytest.fixture(scope="package", autouse=True)
def _no_png():
    """Drawing with matplotlib takes longer than all else that a tiny bench does; it has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_png", lambda *arguments: False)
        yield


@pytest.fixture(scope="session")
def small(text):
    """Return the arguments of a bench of six cells that takes seconds."""
    return {
        "text": text, "test": text, "tokens": 512, "test_tokens": 256, "seq_len": 64, "sample_tokens": 256,
        "questions": 2, "jobs": 0, "recipes": "reap,hc-smoe", "removed": (0.5,), "seeds": 2,
    }  # fmt: skip


@pytest.fixture(scope="package")
def made(_no_png, tiny, small, tmp_path_factory) -> Bench:
    """Return a finished bench; shared: copy its folder before you change it."""
    return bench(tiny(), tmp_path_factory.mktemp("bench") / "out", **small)
