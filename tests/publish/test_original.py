"""What a card takes over from the original, and what it makes of cards and names that are not what they should be."""

import pytest

from coterie.publish.original import card_of, hub_id


def test_a_hub_id_is_what_was_asked_for_or_where_the_cache_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--org--name-1.5" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert hub_id("org/name", snapshot, {}) == "org/name"
    assert hub_id("org/name@v1.0", snapshot, {}) == "org/name"
    assert hub_id(snapshot, snapshot, {}) == "org/name-1.5"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name", tmp_path / "org" / "name", {}) is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("org/name", "org/name"), ("gpt2", None), ("/home/me/org/name", None), ("./org/name", None), ("../name", None),
        ("output/checkpoint-500", None), ("models/mine", None), ("C:\\models\\mine", None), ("a/b/c", None), ("", None),
        (None, None), (3, None), (["org/name"], None), ("org/na me", None), ("org/name\n", None), ("here/name", None),
    ],
)  # fmt: skip
def test_a_config_names_the_original_only_where_that_is_no_path(tmp_path, monkeypatch, said, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "name").mkdir(parents=True)
    assert hub_id(tmp_path, tmp_path, {"_name_or_path": said}) == expected


def test_licence_languages_and_task_are_taken_over_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\nlanguage:\n- en\n- no\n"
        "pipeline_tag: text-generation\nbase_model: a/b\nmodel-index:\n- 3\n---\n# Scores\n",
        encoding="utf-8",
    )
    assert card_of(tmp_path) == {
        "license": "other", "license_name": "qwen", "license_link": "LICENSE", "languages": ("en", "no"),
        "pipeline_tag": "text-generation",
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    "content",
    [
        b"", b"# no head", b"---\n", b"---\n- a list\n---\n", b"---\nlicense: [\n---\n", b"---\n3: x\n---\n",
        b"---\nlicense: {a: b}\nlanguage: 3\n---\n", b"---\nlicense: " + b"x" * 400 + b"\n---\n",
        b'---\nlicense: "a\\nb"\n---\n', b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        b"---\n" + b"[" * 3000 + b"\n---\n", b"\xff\xfe---\nlicense: mit\n---\n", b"---\nself: 1\n---\n",
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    assert card_of(tmp_path) == {}


def test_no_card_says_nothing(tmp_path):
    assert card_of(tmp_path) == {}
