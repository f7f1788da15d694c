from pathlib import Path

import pytest
import torch

from coterie.testing import tiny_checkpoint, tiny_text


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "original")


@pytest.fixture(scope="session")
def small_path(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "small", num_experts=4)


@pytest.fixture(scope="session")
def text_path(tmp_path_factory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text", documents=2)
