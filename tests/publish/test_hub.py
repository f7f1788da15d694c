"""Uploads, against a hub on this machine: asked first, nothing of others overwritten, nothing lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import coterie
from coterie.cli.main import app
from coterie.compress import apply
from coterie.errors import HubError, InputError
from coterie.publish.hub import RUN_FILE, find_destination

SMALL = {"tokens": 128, "seq_len": 32, "sample_tokens": 32}


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory):
    return coterie.compress(tiny(), tmp_path_factory.mktemp("made") / "out", keep=0.5, recipe="reap", text=text,
                            **SMALL).out  # fmt: skip


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def on_disk(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != RUN_FILE}


def on_hub(hub, repo_id):
    return {name: content for name, content in hub.repos[repo_id][1].items() if name != ".gitattributes"}


def test_compress_uploads_what_it_made(hub, tiny, text, tmp_path):
    line = ["compress", tiny(), tmp_path / "out", "--keep", 0.5, "--recipe", "reap", "--text", text]
    line += ["--tokens", 128, "--seq-len", 32, "--sample-tokens", 32, "--push-to-hub", "me/small", "--private"]
    result = CliRunner().invoke(app, list(map(str, line)))
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"uploaded to {hub.url}/me/small\n")
    assert hub.repos["me/small"][0] is True
    assert on_hub(hub, "me/small") == on_disk(tmp_path / "out")
    assert {"README.md", "coterie.json", "config.json"} <= set(on_hub(hub, "me/small"))
    assert RUN_FILE not in on_hub(hub, "me/small")


def test_nothing_is_asked_of_a_hub_unless_it_is_wanted(hub, tiny, text, tmp_path):
    result = coterie.compress(tiny(), tmp_path / "out", keep=0.5, recipe="hc-smoe", text=text, **SMALL)
    assert result.url is None
    assert hub.asked == []


def test_push_makes_the_repository_and_goes_on(hub, out):
    assert coterie.push(out, "small") == f"{hub.url}/me/small"
    assert hub.repos["me/small"][0] is False
    (out / "README.md").write_text("a better card", encoding="utf-8")
    coterie.push(out, "team/small")
    coterie.push(out, "me/small")
    assert on_hub(hub, "me/small") == on_hub(hub, "team/small") == on_disk(out)


def test_an_upload_that_broke_off_goes_on(hub, out):
    files = on_disk(out)
    hub.repos["me/small"] = (False, {".gitattributes": b"*", "coterie.json": files["coterie.json"]})
    coterie.push(out, "me/small")
    assert on_hub(hub, "me/small") == files


def test_the_manifest_is_sent_before_all_else(hub, out):
    sent = []
    commit = hub._commit

    def note(repo_id, body):
        sent.append([json.loads(line)["value"].get("path") for line in body.splitlines()][1:])
        return commit(repo_id, body)

    hub._commit = note
    coterie.push(out, "me/small")
    assert sent[0] == ["coterie.json"]
    assert "config.json" in sent[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b"x"}, r"holds 1 files \(model.safetensors \.\.\.\) that are not of this result"),
        ({"coterie.json": b"{}", "a": b"", "b": b"", "c": b""}, r"holds 4 files \(a, b, c \.\.\.\)"),
    ],
)
def test_what_others_uploaded_stays(hub, out, files, message):
    hub.repos["me/small"] = (False, dict(files))
    with pytest.raises(HubError, match=message):
        coterie.push(out, "me/small")
    assert on_hub(hub, "me/small") == files
    assert not any(method == "POST" for method, path in hub.asked if "paths-info" not in path)


def refused_early(hub, monkeypatch, tiny, text, tmp_path, repo_id="me/small", private=False):
    """Return why compress does not even begin."""
    monkeypatch.setattr(apply, "prepare", None)
    with pytest.raises((HubError, InputError)) as refused:
        coterie.compress(tiny(), tmp_path / "out", keep=0.5, text=text, push_to_hub=repo_id, private=private)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    assert not any(method == "POST" for method, _ in hub.asked)
    return str(refused.value)


def test_what_cannot_be_uploaded_is_refused_before_any_work(hub, monkeypatch, tiny, text, tmp_path):
    def why(**changes):
        return refused_early(hub, monkeypatch, tiny, text, tmp_path, **changes)

    for wrong in ("a/b/c", "", "/", "me/", "-x", "me/a--b", "me/a b", "me/x.git", "m" * 97, "me/\udcff"):
        assert "is no id of a repository on the hub; it has the form owner/name" in why(repo_id=wrong)
    assert hub.asked == []
    assert "name one with --push-to-hub" in why(repo_id=None, private=True)
    assert (
        "me cannot write to other/small: the owner is neither that user nor one of their organisations (team)"
        in why(repo_id="other/small")
    )
    hub.repos["me/small"] = (False, {"model.safetensors": b"x"})
    assert "me/small exists and holds 1 files" in why()
    hub.repos["me/small"] = (False, {})
    assert "me/small is public, and stays so" in why(private=True)
    for rights in (
        {"role": "read"},
        {"role": "fineGrained", "fineGrained": {"scoped": []}},
        {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "me"}, "permissions": ["repo.read"]}]}},
    ):
        hub.me = hub.me | {"auth": {"accessToken": rights}}
        assert "the token for the hub may not write to me" in why()
    hub.refuses = ("whoami", 401)
    assert "asking the hub about me/small failed" in why()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token for the hub, so nothing can be uploaded to me/small: run `hf auth login`" in why()


def test_a_fine_grained_token_that_may_write_is_enough(hub):
    scope = {"entity": {"name": "me"}, "permissions": ["repo.content.read", "repo.write"]}
    hub.me = hub.me | {"auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}}}
    assert find_destination("small").repo_id == "me/small"


def test_a_hub_that_cannot_be_reached_is_one_line(hub, monkeypatch, out):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["push", str(out), "me/small"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: asking the hub about me/small failed (")
    assert result.stderr.count("\n") == 1


def test_a_result_stays_where_its_upload_failed(hub, tiny, text, tmp_path):
    hub.refuses = ("/commit/", 403)
    with pytest.raises(HubError) as failed:
        coterie.compress(tiny(), tmp_path / "out", keep=0.5, recipe="reap", text=text, push_to_hub="me/small", **SMALL)
    assert f"{tmp_path / 'out'} is whole, but was not uploaded: uploading" in str(failed.value)
    assert f"give `coterie push {tmp_path / 'out'} me/small` to upload it" in str(failed.value)
    hub.refuses = None
    coterie.push(tmp_path / "out", "me/small")
    assert on_hub(hub, "me/small") == on_disk(tmp_path / "out")


def test_only_results_are_pushed(hub, tiny, tmp_path):
    for folder in (tiny(), tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no coterie\.json, so it is no result of coterie compress"):
            coterie.push(folder, "me/small")
    assert hub.asked == []


def test_push_finds_the_hub_that_the_environment_names(hub, out):
    environment = dict(os.environ) | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    line = [sys.executable, "-m", "coterie.cli.main", "push", str(out), "me/small", "--json"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"url": f"{hub.url}/me/small"}
    assert on_hub(hub, "me/small") == on_disk(out)
