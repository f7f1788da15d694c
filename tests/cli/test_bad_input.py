"""What goes wrong for a user: each case ends with its code and a message with the way out, and leaves nothing."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.testing import tiny_tokenizer


@pytest.fixture
def refused(tmp_path):
    """Return a function that runs a command, and checks that it is refused and that OUT and its folder stay empty."""
    place = tmp_path / "place"
    place.mkdir()

    def run(command, *arguments, out=True, code=1):
        target = [str(place / "out")] if out and command in ("profile", "compress") else []
        model, *rest = map(str, arguments)
        result = CliRunner().invoke(app, [command, model, *target, *rest])
        assert result.exit_code == code, result.stderr or result.exception
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert list(place.iterdir()) == []
        if code == 1:
            assert result.stderr.startswith("error: ")
        return result.stderr

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=272, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


WORK = ("inspect", "profile", "plan", "compress")


def options(command, text):
    target = {"plan": ["--keep", "0.5"], "compress": ["--keep", "0.5", "--text", text], "profile": ["--text", text]}
    return target.get(command, [])


@pytest.mark.parametrize("command", [*WORK, "evaluate"])
def test_no_such_model(refused, tmp_path, text, command):
    chosen = ["--text", text] if command == "evaluate" else options(command, text)
    message = refused(command, tmp_path / "nothing", *chosen)
    assert "nothing does not exist; pass a folder with config.json and *.safetensors, or a hub id" in message


@pytest.mark.parametrize("command", WORK)
def test_not_a_model(refused, tmp_path, text, command):
    (tmp_path / "folder").mkdir()
    assert "has no config.json" in refused(command, tmp_path / "folder", *options(command, text))
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "olmoe"}', encoding="utf-8")
    assert "no *.safetensors" in refused(command, tmp_path / "folder", *options(command, text))


@pytest.mark.parametrize("command", WORK)
def test_not_a_mixture_of_experts(refused, dense, text, command):
    message = refused(command, dense, *options(command, text))
    assert "(llama) has no routed experts" in message
    if command == "inspect":
        assert "tensors in 2 layers" in message


@pytest.mark.parametrize("command", WORK)
def test_truncated_shard(refused, tiny, tmp_path, text, command):
    model = shutil.copytree(tiny(), tmp_path / "model")
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    message = refused(command, model, *options(command, text))
    assert f"the file has {len(content) // 2}" in message
    assert f"describes {len(content)} bytes" in message
    assert "fetch this file again" in message


@pytest.mark.parametrize("command", ["profile", "compress"])
def test_text_that_cannot_be_used(refused, tiny, tmp_path, command):
    target = ["--keep", "0.5"] if command == "compress" else []
    folder = tmp_path / "text"
    assert "is not a folder" in refused(command, tiny(), "--text", folder, *target)
    folder.mkdir()
    assert "no *.txt and no *.jsonl" in refused(command, tiny(), "--text", folder, *target)
    (folder / "prose.txt").write_text(" \n", encoding="utf-8")
    assert "prose.txt is empty" in refused(command, tiny(), "--text", folder, *target)
    (folder / "prose.txt").write_text("too short", encoding="utf-8")
    message = refused(command, tiny(), "--text", folder, "--seq-len", "64", *target)
    assert "has 10 tokens, fewer than one sequence of 64; add text or lower --seq-len" in message
    assert "predicts nothing" in refused(command, tiny(), "--text", folder, "--seq-len", "1", *target)


def test_no_tokens_and_unknown_domain(refused, tiny, text):
    assert "0 tokens" in refused("profile", tiny(), "--text", text, "--tokens", "0")
    message = refused("profile", tiny(), "--text", text, "--domains", "prosa")
    assert "unknown domain 'prosa'; did you mean prose?" in message


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        (("--keep", "0"), ("--keep 0", "above 0 and at most 1")),
        (("--keep", "2"), ("--keep 2", "above 0 and at most 1")),
        (("--keep", "-0.5"), ("--keep -0.5",)),
        (("--keep", "nan"), ("--keep nan",)),
        (("--keep", "0.1"), ("1 experts a layer cannot be routed", "every token chooses 2", "2, 3")),
        (("--experts", "1"), ("1 experts a layer cannot be routed", "every token chooses 2", "2, 3")),
        (("--experts", "0"), ("--experts 0", "every layer has 8", "1 to 8")),
        (("--experts", "9"), ("--experts 9", "every layer has 8", "1 to 8")),
        (("--budget", "1KiB"), ("1.00 KiB", "2 a layer, takes 130 KiB")),
        (("--budget", "12G"), ("12GiB or 12GB",)),
        (("--budget", "lots"), ("'lots' is no amount of bytes", "12GiB")),
        (("--keep", "0.5", "--recipe", "mergmoe"), ("unknown recipe 'mergmoe'", "did you mean mergemoe")),
        (("--keep", "0.5", "--recipe", "reap", "--router", "map"), ("reap drops experts", "--router plain")),
        (("--keep", "0.5", "--recipe", "coterie", "--router", "map"), ("cuts experts into parts", "--router plain")),
        (("--experts", "4", "--recipe", "coterie"), ("cuts experts into parts", "--keep, --budget, --params")),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_wishes_that_cannot_be_met(refused, tiny, text, command, target, parts):
    more = ("--text", text) if command == "compress" else ()
    more += () if "--recipe" in target else ("--recipe", "mergemoe")
    message = refused(command, tiny(), *target, *more)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_not_exactly_one_wish(refused, tiny, text, command):
    more = ("--text", text) if command == "compress" else ()
    assert "got --keep and --experts" in refused(command, tiny(), "--keep", "0.5", "--experts", "4", *more, code=2)
    assert "got none" in refused(command, tiny(), *more, code=2)


def test_groups_that_do_not_divide(refused, tiny):
    message = refused("plan", tiny("deepseek_v3"), "--experts", "5", "--recipe", "reap")
    assert "2 groups of equal size" in message
    assert "4, 6" in message


def test_neither_profile_nor_text(refused, tiny):
    assert "--text, or a profile with --profile" in refused("compress", tiny(), "--keep", "0.5")


def test_profile_of_another_model(refused, tiny, text, tmp_path):
    made = CliRunner().invoke(
        app, ["profile", str(tiny()), str(tmp_path / "p"), "--text", str(text), "--tokens", "128", "--seq-len", "64"]
    )
    assert made.exit_code == 0
    other = tiny(seed=1)
    for command, profile in (("plan", [tmp_path / "p"]), ("compress", ["--profile", tmp_path / "p"])):
        message = refused(command, other, *profile, "--keep", "0.5")
        assert "made from another model" in message


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_that_is_taken_stays_as_it_is(tiny, text, tmp_path, kind):
    taken = tmp_path / "out"
    if kind == "folder":
        taken.mkdir()
        kept = taken / "precious"
    else:
        kept = taken
    kept.write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["compress", str(tiny()), str(taken), "--keep", "0.5", "--text", str(text)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"{taken} exists; choose another place or remove it" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert kept.read_text(encoding="utf-8") == "mine"


def test_a_scorecard_that_exists_is_kept(tiny, text, tmp_path):
    file = tmp_path / "card.json"
    file.write_text("mine", encoding="utf-8")
    result = CliRunner().invoke(app, ["evaluate", str(tiny()), "--text", str(text), "--out", str(file)])
    assert result.exit_code == 1
    assert f"{file} exists" in result.stderr
    assert file.read_text(encoding="utf-8") == "mine"


def test_evaluate_with_text_or_device_that_cannot_be_used(refused, tiny, text, tmp_path):
    assert "is not a folder" in refused("evaluate", tiny(), "--text", tmp_path / "none")
    assert "no device" in refused("evaluate", tiny(), "--text", text, "--device", "toaster")
    if not torch.cuda.is_available():
        assert "use cpu" in refused("evaluate", tiny(), "--text", text, "--device", "cuda")


def test_a_report_of_nothing(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("report", tmp_path / "empty")
    assert str(tmp_path / "none") in refused("report", tmp_path / "none")


def test_config_that_is_not_json(refused, tiny, tmp_path):
    model = shutil.copytree(tiny(), tmp_path / "model")
    (model / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is not JSON" in refused("inspect", model)
    (model / "config.json").write_text(json.dumps({"model_type": "unheard_of"}), encoding="utf-8")
    assert "unheard_of" in refused("plan", model, "--keep", "0.5")
