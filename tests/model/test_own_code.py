"""Code that comes with a checkpoint is never run, whoever answers what: of a tokenizer, a model, or generation."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import transformers.modeling_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from typer.testing import CliRunner

import coterie
from coterie.cli.main import app
from coterie.errors import CoterieError, InputError
from coterie.model.arch.layers import Architecture
from coterie.model.arch.meta import OWN_IMPLEMENTATIONS, without_named_code
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibrate import generate
from some import first

SMALL = ("--tokens", "512", "--seq-len", "64")


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):
    """Return a checkpoint whose files of Python leave a mark when they are run; whoever is asked says yes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda *_: (tmp_path / "asked").touch() or "y")
    folder = shutil.copytree(tiny("deepseek_v3"), tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    classes = (
        "from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "class OwnConfig(DeepseekV3Config):\n    model_type = 'own'\n"
        "class OwnModel(DeepseekV3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code + classes, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    generate_code = code + "def generate(model, **options):\n    raise AssertionError\n"
    (folder / "custom_generate" / "generate.py").write_text(generate_code, encoding="utf-8")
    yield folder
    assert not (tmp_path / "asked").exists(), "transformers asked on the terminal"
    assert not (tmp_path / "ran").exists(), "the checkpoint's code ran"


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")


def give_own_tokenizer(folder: Path, auto_map: object) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


def give_own_model(folder: Path, **entries: object) -> None:
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder / "config.json", auto_map=names, **entries)


@pytest.mark.parametrize(
    ("auto_map", "named"),
    [
        ({"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}, "OwnTokenizer in own.py"),
        ({"AutoTokenizer": ["own.OwnTokenizer", None]}, "OwnTokenizer in own.py"),
        ({"AutoTokenizer": [None, "own.OwnTokenizer"]}, "OwnTokenizer in own.py"),
        (["own.OwnTokenizer", None], "OwnTokenizer in own.py"),
        ({"AutoTokenizer": ["someone/else--own.OwnTokenizer", None]}, "OwnTokenizer in own.py of someone/else"),
    ],
)
def test_a_tokenizer_that_needs_code_of_its_own_is_refused_by_name(model, auto_map, named):
    give_own_tokenizer(model, auto_map)
    message = rf"its tokenizer is {named}, and code that comes with a checkpoint is never run: .* remove auto_map from"
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"never run: make a tokenizer\.json of it"):
        load_tokenizer(model)


def test_the_way_out_of_the_message_works(model):
    before = load_tokenizer(model)("Some text.")["input_ids"]
    give_own_tokenizer(model, {"AutoTokenizer": ["own.OwnTokenizer", None]})
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["auto_map"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(model)("Some text.")["input_ids"] == before


@pytest.mark.parametrize("command", ["profile", "compress", "evaluate", "calibrate", "bench"])
def test_no_command_runs_it_for_whoever_answers_yes(model, text, tmp_path, command):
    give_own_tokenizer(model, {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]})
    place = [] if command in ("evaluate", "calibrate") else [str(tmp_path / "out")]
    more = {
        "compress": ["--keep", "0.5"],
        "bench": ["--test", str(text), "--recipes", "reap", "--removed", "0.5", "--seeds", "1", "--jobs", "0"],
    }.get(command, [])
    line = [command, str(model), *place, "--text", str(text), *more, *SMALL]
    result = CliRunner().invoke(app, line, input="y\n" * 20)
    assert result.exit_code == 1, result.output
    assert "OwnTokenizer in own.py" in result.stderr
    assert "wish to run" not in result.output


def test_a_model_of_a_known_family_is_read_as_that_family(model, text):
    give_own_model(model)
    assert type(coterie.load_model(model)).__module__.startswith("transformers.models.deepseek_v3.")
    [card] = coterie.evaluate(model, text=text, tokens=512, seq_len=64, questions=0, speed_seconds=0)
    assert card.overall["tokens"] == 504


@pytest.mark.long
def test_a_compressed_copy_of_it_is_read_as_that_family_too(model, text, tmp_path):
    give_own_model(model)
    settings = {"keep": 0.5, "recipe": "reap", "text": text, "tokens": 512, "seq_len": 64, "sample_tokens": 64}
    coterie.compress(model, tmp_path / "half", **settings)
    coterie.compress(model, tmp_path / "mapped", router="map", **settings | {"recipe": "hc-smoe"})
    for name in ("half", "mapped"):
        loaded = coterie.load_model(tmp_path / name)
        assert type(loaded).__module__.startswith("transformers.models.deepseek_v3.") or name == "mapped"
        [card] = coterie.evaluate(tmp_path / name, text=text, tokens=512, seq_len=64, questions=0)
        assert card.overall["tokens"] == 504


def test_text_is_written_with_the_generation_of_transformers(model, tmp_path):
    give_own_model(model)
    assert generate(model, tmp_path / "text", tokens=64, seq_len=16).is_file()


@pytest.mark.parametrize("own", [{"model_type": "own"}, {"model_type": "own", "architectures": ["OwnModel"]}])
def test_a_model_of_an_unknown_family_is_refused(model, text, own):
    give_own_model(model, **own)
    for read in (
        lambda: coterie.load_model(model),
        lambda: coterie.evaluate(model, text=text, tokens=512, seq_len=64),
        lambda: coterie.profile(model, text=text, tokens=512, seq_len=64),
        lambda: coterie.plan(model, keep=0.5),
    ):
        with pytest.raises(CoterieError, match="code that comes with a checkpoint is not run"):
            read()


def test_a_class_of_its_own_for_a_config_without_one_is_refused(model):
    # A config that transformers knows, but no language model for it: the class is looked up by its config.
    names = {"AutoModelForCausalLM": "own.OwnModel", "AutoModelForImageTextToText": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "vit", "auto_map": names}), encoding="utf-8")
    with pytest.raises(CoterieError, match="no vit model can be built"):
        Architecture.of(Checkpoint.open(model))


@pytest.fixture
def no_kernels(monkeypatch):
    """Fail where transformers would fetch a kernel from the hub."""

    def fetch(*arguments: object, **options: object) -> None:
        raise AssertionError(f"fetched {arguments}")

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    for name in set(ALL_EXPERTS_FUNCTIONS.valid_keys()) - OWN_IMPLEMENTATIONS:
        if name in ("deepgemm", "sonicmoe"):
            monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, fetch)


@pytest.mark.parametrize(
    "entries",
    first(
        2,
        [
            {"_attn_implementation": "someone/kernel@v1:function"},
            {"experts_implementation": "sonicmoe"},
            {"attn_implementation": "someone/kernel"},
            {"_attn_implementation_internal": "kernels-community/flash-attn2"},
            {"attn_implementation": "flash_attention_2"},
            {"attn_implementation": {"": "someone/kernel"}},
            {"_experts_implementation": "deepgemm"},
            {"experts_implementation": "someone/kernel"},
        ],
    ),
    ids=str,
)
def test_code_that_config_names_is_neither_fetched_nor_run(model, text, no_kernels, caplog, entries):
    change(model / "config.json", **entries)
    [(key, value)] = entries.items()
    loaded = coterie.load_model(model)
    assert f"config.json names {next(iter(value.values())) if isinstance(value, dict) else value!r}"[:20] in caplog.text
    assert f"as {key}, which transformers would fetch from the hub and run" in caplog.text
    assert {loaded.config._attn_implementation, loaded.config._experts_implementation} <= OWN_IMPLEMENTATIONS
    [card] = coterie.evaluate(model, text=text, tokens=512, seq_len=64, questions=0, speed_seconds=0)
    assert card.overall["tokens"] == 504


def test_code_that_config_names_for_a_part_is_left_out_and_nothing_else():
    plain = {"model_type": "x", "text_config": {"attn_implementation": "eager", "hidden_size": 3}, "other": [1]}
    assert without_named_code(plain) == plain
    named = {"text_config": {**plain["text_config"], "attn_implementation": "someone/kernel"}, "other": [1]}
    assert without_named_code(named) == {"text_config": {"hidden_size": 3}, "other": [1]}
