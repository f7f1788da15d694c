"""Results that were damaged after they were written: an error of ours, or the model that was meant; never a traceback.

Headers of weights, configs and manifests are changed, one place at a time. What nobody sees, here or elsewhere: a
number in the data of a tensor that became another number, and a setting of config.json that another model could have.
Files of weights carry no digest; coterie.json carries its own.
"""

import functools
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import coterie
from coterie.errors import CorruptArtifact, CoterieError, OutOfSpace
from coterie.model.disk.manifest import MANIFEST
from hostile import changed, places, values, write_digested

#: How a result of each form is made, of experts whose rows are two blocks of 32, or one group of 64.
FORMS = {
    "packed": {"recipe": "nearest", "type": "IQ4_NL", "target": "packed"},
    "shared-base": {"recipe": "shared-base", "bits": 6, "target": "packed"},
    "mapped": {"recipe": "hc-smoe", "keep": 0.5, "router": "map"},
    "ragged": {"recipe": "heapr-ragged", "keep": 0.5},
    "compressed-tensors": {"recipe": "nearest", "type": "INT4_G64", "target": "compressed-tensors"},
}
FEW = ("packed", "compressed-tensors")
EACH = [*FEW, *(pytest.param(form, marks=pytest.mark.long) for form in FORMS if form not in FEW)]
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "vocab_size": 272}
TEXT = {"tokens": 64, "seq_len": 32}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def results(tiny, text, tmp_path_factory):
    """Return a function that returns the folder of a result, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("results")

    @functools.cache
    def make(form):
        model = tiny("qwen3_moe", **SIZES)
        return coterie.compress(model, folder / form, text=text, sample_tokens=64, **TEXT, **FORMS[form]).out

    return make


@pytest.fixture(scope="module")
def meant(results):
    """Return a function that returns the weights that a result has when it is whole."""
    return functools.cache(lambda form: coterie.load_model(results(form)).state_dict())


@pytest.fixture
def copy(results, tmp_path):
    """Return a function that copies a result, to be damaged."""
    return lambda form: shutil.copytree(results(form), tmp_path / form)


def uses(folder, text, out):
    """Yield (name, function) of each way to use a result; only the first returns a model."""
    yield "load_model", lambda: coterie.load_model(folder)
    yield "inspect", lambda: coterie.inspect(folder)
    yield "export", lambda: coterie.export(folder, out, type="f32")
    yield "evaluate", lambda: coterie.evaluate(folder, text=text, **TEXT)


def used(folder, text, out):
    """Use a damaged result in every way; return the errors of ours by name, and the model if one was loaded."""
    errors, model = {}, None
    for name, use in uses(folder, text, out):
        out.unlink(missing_ok=True)
        try:
            made = use()
            model = made if name == "load_model" else model
        except OutOfSpace:
            raise
        except CoterieError as error:
            errors[name] = error
    out.unlink(missing_ok=True)
    assert not [error for error in errors.values() if "\n" in str(error)]
    return errors, model


def is_meant(model, weights):
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def header_end(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


def weights_of(folder):
    """Return the file that holds the experts of the first layer."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return folder / next(file for name, file in index.items() if "layers.0.mlp.experts" in name)


@pytest.mark.parametrize("form", EACH)
@pytest.mark.parametrize("where", ["header", "last byte", pytest.param("data", marks=pytest.mark.long),
                                   pytest.param("length", marks=pytest.mark.long)])  # fmt: skip
def test_a_file_that_is_cut_off_is_refused_by_all(form, where, copy, text, tmp_path):
    folder = copy(form)
    file = weights_of(folder)
    content = file.read_bytes()
    end = header_end(content)
    place = {"length": 5, "header": end // 2, "data": (end + len(content)) // 2, "last byte": -1}[where]
    file.write_bytes(content[:place])
    errors, _ = used(folder, text, tmp_path / "out.gguf")
    assert errors.keys() == {"load_model", "inspect", "export", "evaluate"}
    assert {file.name in str(error) for error in errors.values()} == {True}


def refused(folder, text, tmp_path, *, inspects=False):
    """Check that a result that was damaged is used in no way, or only looked into; return the errors."""
    errors, model = used(folder, text, tmp_path / "out.gguf")
    assert model is None
    assert errors.keys() >= {"load_model", "export", "evaluate"}
    assert inspects or "inspect" in errors
    return errors


@pytest.mark.parametrize("form", EACH)
@pytest.mark.parametrize("what", ["missing", "shape", "type", "rows"])
def test_a_tensor_that_is_missing_or_another_one_is_refused(form, what, copy, text, tmp_path):
    folder = copy(form)
    file = weights_of(folder)
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "experts" in name and tensors[name].ndim == 2)
    tensor = tensors.pop(name)
    if what == "missing":
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    else:
        tensors[name] = {
            "shape": lambda: tensor.reshape(-1, tensor.shape[1] // 2).contiguous(),
            "type": lambda: torch.zeros(tensor.shape, dtype=torch.int16),
            "rows": lambda: tensor[:-1].contiguous(),
        }[what]()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, text, tmp_path, inspects=True)


PACKED_CONFIG = [
    ("packed", ("quantization_config", "groups", 0, "type"), "Q9_K"),
    ("packed", ("quantization_config", "groups", 0, "type"), "Q4_0"),
    ("packed", ("quantization_config", "groups", 0, "type"), "Q8_0"),
    ("packed", ("quantization_config", "groups", 0, "axis"), 7),
    ("packed", ("quantization_config", "groups", 0, "encoding"), "zip"),
    ("packed", ("quantization_config", "groups", 0, "tensors", 0), "model.nothing.weight"),
    ("packed", ("quantization_config", "quant_method"), "something"),
    ("compressed-tensors", ("quantization_config", "format"), "zip"),
    ("compressed-tensors", ("quantization_config", "config_groups", "group_0", "weights", "num_bits"), 8),
    ("compressed-tensors", ("quantization_config", "config_groups", "group_0", "weights", "num_bits"), 3),
    ("compressed-tensors", ("quantization_config", "config_groups", "group_0", "weights", "group_size"), 48),
    ("compressed-tensors", ("quantization_config", "config_groups", "group_0", "weights", "symmetric"), False),
    ("compressed-tensors", ("moe_intermediate_size",), 65),
    ("packed", ("hidden_size",), 63),
    ("packed", ("num_attention_heads",), 4),
]


@pytest.mark.parametrize(("form", "path", "value"), PACKED_CONFIG, ids=lambda value: str(value)[-40:])
def test_a_config_that_says_otherwise_is_refused(form, path, value, copy, text, tmp_path):
    folder = copy(form)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(changed(content, path, value)), encoding="utf-8")
    refused(folder, text, tmp_path, inspects=True)


@pytest.mark.parametrize("form", EACH)
def test_a_manifest_that_was_changed_by_hand_is_refused(form, copy, text, tmp_path):
    folder = copy(form)
    content = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(content.replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    errors = refused(folder, text, tmp_path)
    assert {type(error) for error in errors.values()} == {CorruptArtifact}


def damage(draw, folder):
    """Damage one place of a result; return which file, and how."""
    kind = draw(st.sampled_from(["byte", "cut", "config", "manifest", "index", "file"]))
    file = weights_of(folder)
    if kind in ("byte", "cut"):
        content = bytearray(file.read_bytes())
        end = header_end(content)
        if kind == "cut":
            del content[draw(st.integers(0, len(content) - 1)) :]
        else:
            content[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
        file.write_bytes(content)
    elif kind == "file":
        draw(st.sampled_from([file.unlink, (folder / INDEX).unlink, (folder / "config.json").unlink]))()
    else:
        file = folder / {"config": "config.json", "manifest": MANIFEST, "index": INDEX}[kind]
        content = json.loads(file.read_text(encoding="utf-8"))
        path = draw(st.sampled_from(list(places(content))))
        new = changed(content, path, draw(values), draw(st.sampled_from(["replace", "remove", "beside"])))
        if kind == "manifest":
            write_digested(file, new)
        else:
            file.write_text(json.dumps(new), encoding="utf-8")
    return kind


def check_any_damage(data, forms, results, meant, text, tmp_path_factory):
    form = data.draw(st.sampled_from(forms))
    parent = tmp_path_factory.mktemp("fuzz")
    folder = shutil.copytree(results(form), parent / form)
    try:
        kind = damage(data.draw, folder)
        _, model = used(folder, text, parent / "out.gguf")
        # Another setting is another model, and experts may be pointed at others; weights are what they were.
        if model is not None and kind in ("byte", "cut", "index", "file"):
            assert is_meant(model, meant(form))
    finally:
        shutil.rmtree(parent)


@settings(max_examples=6)
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_the_model_that_was_meant(data, results, meant, text, tmp_path_factory):
    check_any_damage(data, FEW, results, meant, text, tmp_path_factory)


@pytest.mark.long
@settings(max_examples=1000)
@given(data=st.data())
def test_much_damage_is_an_error_of_ours(data, results, meant, text, tmp_path_factory):
    check_any_damage(data, list(FORMS), results, meant, text, tmp_path_factory)
