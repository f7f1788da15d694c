"""What models are called: hub ids, folders, and folders in a cache of the hub."""

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from coterie.model.disk.files import HubId, id_in_cache, is_hub_id, name_of_model

NO_IDS = (
    "name", "org/", "/name", "org/na--me", "org/a..b", "org/x.git", "o/n\n", "./b", "../b", "a/b/c", "a b/c", "~/b",
    "-a/b", "a/b-", ".a/b", "a/b.", f"a/{'b' * 97}", "",
)  # fmt: skip


def test_a_hub_id_is_what_the_hub_takes():
    for text in ("org/name.1_2-3", "a/b", "_o/_n", f"a/{'b' * 94}"):
        assert is_hub_id(text)
        validate_repo_id(text)
    for text in NO_IDS:
        assert not is_hub_id(text), text
        if text.count("/") == 1 and "~" not in text:
            with pytest.raises(HFValidationError):
                validate_repo_id(text)
    assert not is_hub_id("örg/name")
    assert is_hub_id("name", owner=False)
    assert not is_hub_id("na--me", owner=False)


def test_a_model_of_the_hub_may_be_one_of_a_revision():
    assert HubId.of("a/b-c.d") == HubId(name="a/b-c.d", revision=None)
    assert HubId.of("a/b@refs/pr/1") == HubId(name="a/b", revision="refs/pr/1")
    assert str(HubId.of("a/b@v1.0")) == "a/b@v1.0"
    for other in (*NO_IDS, "örg/name", "a/b@", "a/b@x y", "@v1"):
        assert HubId.of(other) is None, other


def test_what_is_in_a_cache_of_the_hub_has_its_id(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name-1.5" / "snapshots" / "abc"
    inner, own = snapshot / "inner", tmp_path / "org" / "name"
    for folder in (inner, own):
        folder.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    for folder in (snapshot, inner, link):
        assert id_in_cache(folder) == "org/name-1.5"
        assert name_of_model(folder) == "org/name-1.5"
    for folder in (own, tmp_path, snapshot.parent):
        assert id_in_cache(folder) is None
        assert name_of_model(folder) == folder.name
    old = tmp_path / "models--gpt2" / "snapshots" / "abc"
    old.mkdir(parents=True)
    assert name_of_model(old) == "abc"
    monkeypatch.chdir(tmp_path)
    assert name_of_model("org/name") == "name"
    assert name_of_model("org/other@v1") == "org/other@v1"
