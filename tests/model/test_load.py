"""Loading whole models: as stock transformers loads them, and with an error where stock transformers goes on."""

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coterie.compress.apply import compress
from coterie.errors import CorruptArtifact, CorruptCheckpoint, InputError, NotACheckpoint
from coterie.model.arch.load import load_model
from coterie.model.disk.manifest import MANIFEST, ResultForm
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.quiet import quiet
from coterie.testing import CORE_FAMILIES, END_OF_TEXT_ID, tiny_checkpoint
from manifests import manifest_of
from some import first

IDS = torch.arange(40).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def copy(tiny, tmp_path):
    """Return a function that copies a tiny checkpoint to a place where it may be changed."""

    def make(model_type="olmoe"):
        shutil.copytree(tiny(model_type), tmp_path / "copy")
        return tmp_path / "copy"

    return make


def change(path, *, drop=(), **tensors):
    held = load_file(path / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in held.items() if name not in drop}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", CORE_FAMILIES)
def test_it_loads_what_stock_transformers_loads(tiny, model_type):
    path = tiny(model_type)
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded = load_model(path)
    assert type(loaded) is type(stock)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(stock))


def test_number_formats(tiny):
    path = tiny("olmoe", dtype=torch.bfloat16)
    assert load_model(path).dtype == torch.float32, "a CPU is slow and coarse in anything narrower"
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(str(path), dtype=torch.float64, device=torch.device("cpu")).dtype == torch.float64


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_an_error(copy, name):
    path = copy()
    change(path, drop=[name])
    with pytest.raises(CorruptCheckpoint, match=rf"{path.name} does not"):
        load_model(path)


def test_a_missing_tensor_is_named(copy):
    path = copy()
    change(path, drop=["model.norm.weight"])
    with pytest.raises(CorruptCheckpoint, match=r"missing keys: \['model\.norm\.weight'\]"):
        load_model(path)


def test_a_tensor_that_the_model_has_no_place_for_is_told(copy, tiny, caplog):
    path = copy()
    change(path, **{"model.layers.0.mlp.extra.weight": torch.ones(3)})
    loaded = load_model(path)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path}: not part of the model class" in record.message
    assert "model.layers.0.mlp.extra.weight" in record.message
    assert torch.equal(logits(loaded), logits(load_model(tiny())))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_experts"])
def test_a_config_that_contradicts_the_weights_is_an_error(copy, key):
    path = copy()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: config[key] + 8}))
    with pytest.raises(CorruptCheckpoint, match=path.name):
        load_model(path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(NotACheckpoint):
        load_model(tmp_path / "nowhere")
    with pytest.raises(NotACheckpoint):
        load_tokenizer(tmp_path)


def test_the_tokenizer_is_the_one_of_the_folder(tiny):
    tokenizer = load_tokenizer(tiny("mixtral"))
    assert tokenizer.eos_token_id == END_OF_TEXT_ID
    assert tokenizer.decode(tokenizer("naïve ☃")["input_ids"]) == "naïve ☃"


@pytest.mark.parametrize("model_type", CORE_FAMILIES)
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)], ids=["nothing", "only its config"])
def test_no_tokenizer_is_an_error(copy, model_type, left):
    # Some families have a tokenizer class that is content with no files: it would turn all text into nothing.
    path = copy(model_type)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if name not in left:
            (path / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"has no tokenizer.*beside the weights"):
        load_tokenizer(path)


def test_loading_says_nothing_and_writes_nothing(tiny, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        load_model(tiny())
        load_tokenizer(tiny())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_the_manifest_is_read_where_there_is_one(copy):
    path = copy()
    manifest_of().write(path, {})
    assert torch.isfinite(logits(load_model(path))).all()
    (path / MANIFEST).write_text("{")
    with pytest.raises(CorruptArtifact):
        load_model(path)


def test_a_mapped_result_must_be_of_the_layers_that_its_config_says(copy):
    path = copy()
    manifest_of(form=ResultForm.MAPPED, router="map").write(path, {})
    with pytest.raises(CorruptArtifact, match=r"layers with \[4, 4\] experts, config\.json of layers with \[8, 8\]"):
        load_model(path)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_loading_takes_the_model_and_one_layer(tmp_path, stored, dtype):
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 512, "num_experts": 16}
    big = tiny_checkpoint(tmp_path / "big", dtype=getattr(torch, stored), **sizes)
    small = tiny_checkpoint(tmp_path / "small")
    code = f"""
import torch
import coterie
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
coterie.load_model({str(small)!r})
before = status("VmRSS")
model = coterie.load_model({str(big)!r}, dtype=torch.{dtype})
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
print(size, status("VmHWM") - before, {str(big)!r} in open("/proc/self/maps").read())
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    size, peak, mapped = result.stdout.split()
    assert mapped == "False"
    # Of a layer, a number in the file, one as it is wanted, and one in the fused tensor.
    assert float(peak) < float(size) * (1 + 3 / 8) + 64


def made_headless(path, *, bare, **tensors):
    """Let a checkpoint name its base class, whose own names lack the first part (bare)."""
    held = load_file(path / "model.safetensors") | tensors
    renamed = {name.removeprefix("model.") if bare else name: tensor for name, tensor in held.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    base = config["architectures"][0].replace("ForCausalLM", "Model")
    (path / "config.json").write_text(json.dumps(config | {"architectures": [base]}))
    return path


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("tied", first(1, [False, True]))
def test_a_base_class_is_read_as_the_one_with_a_head_where_all_tensors_are_there(tiny, text, tmp_path, tied, bare):
    whole = tiny("glm4_moe", tie_word_embeddings=tied)
    copy = made_headless(shutil.copytree(whole, tmp_path / "copy"), bare=bare)
    assert torch.equal(logits(load_model(copy)), logits(load_model(whole)))
    settings = {"recipe": "reap", "keep": 0.5, "text": text, "tokens": 512, "seq_len": 64}
    result, expected = compress(copy, tmp_path / "out", **settings), compress(whole, tmp_path / "whole", **settings)
    assert json.loads((result.out / "config.json").read_text())["architectures"] == ["Glm4MoeForCausalLM"]
    for file in expected.out.glob("*.safetensors"):
        assert file.read_bytes() == (result.out / file.name).read_bytes()


def test_a_base_class_without_a_head_or_with_another_one_is_refused(tiny, tmp_path):
    whole = tiny("glm4_moe", tie_word_embeddings=True)
    other = {"score.weight": torch.zeros(1, 32)}
    for number, (source, bare, more) in enumerate(
        [(tiny("glm4_moe"), True, {}), (whole, True, other), (whole, False, other)]
    ):
        copy = made_headless(shutil.copytree(source, tmp_path / str(number)), bare=bare, **more)
        if not more:
            change(copy, drop=["lm_head.weight"])
        with pytest.raises(InputError, match="names Glm4MoeModel, a class without a head"):
            load_model(copy)
