"""Results that stock classes cannot load, by stock transformers where there is no Coterie: packed, mapped, ragged.

The reference is `coterie.load_model`, which has loaders of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import coterie
import coterie.publish.modeling_coterie as modeling
from checkpoints import IDS, logits
from coterie.compress.apply import compress
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.beside import MODELING_FILE
from coterie.model.disk.checkpoint import Checkpoint, read_config
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.manifest import MANIFEST, ResultForm
from coterie.model.quiet import quiet
from coterie.publish.modeling_coterie import CoterieModel
from coterie.publish.stock import auto_map
from coterie.testing import tiny_checkpoint, tiny_text

#: The entry that says how wide experts are; 64, so that their matrices can be stored in blocks.
FAMILIES = {
    "qwen3_moe": "moe_intermediate_size", "olmoe": "intermediate_size", "mixtral": "intermediate_size",
    "deepseek_v3": "moe_intermediate_size", "gpt_oss": "intermediate_size", "glm4_moe": "moe_intermediate_size",
}  # fmt: skip
TARGETS = {
    ResultForm.PACKED: {"recipe": "nearest", "type": "Q4_0"},
    ResultForm.MAPPED: {"recipe": "hc-smoe", "keep": 0.5, "router": "map"},
    ResultForm.RAGGED: {"recipe": "heapr-ragged", "keep": 0.5},
}
TEXT = {"tokens": 512, "seq_len": 64}

#: What somebody does who has transformers and no Coterie. Prints nothing but what goes wrong.
STOCK = """
import json, sys
sys.modules["coterie"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    packed = "quantization_config" in json.load(open(folder + "/config.json"))
    sys.modules.pop("gguf", None)
    if not packed:
        sys.modules["gguf"] = None  # nor does it take what unpacks blocks
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.generate(ids[:1, :4], max_new_tokens=2, min_new_tokens=2)
    save_file(weights | {"the logits": logits.contiguous()}, folder + "/loaded.st")
    model.save_pretrained(folder + "/saved")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a factory of results, each made once; copy one before you change it."""
    folder, done = tmp_path_factory.mktemp("results"), {}
    text = tiny_text(folder / "text")

    def make(form, family="olmoe", **sizes):
        if (form, family) not in done:
            sizes = sizes or {FAMILIES[family]: 64}
            model = tiny_checkpoint(folder / f"{form}-{family}-model", family, **{"hidden_size": 64, **sizes})
            done[form, family] = compress(model, folder / f"{form}-{family}", text=text, **TEXT, **TARGETS[form])
        return done[form, family]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """Return a function that makes a result, and copies it to a place where it may be changed."""

    def copy(*result):
        return Path(shutil.copytree(made(*result).out, tmp_path / "copy"))

    return copy


def load_without_coterie(folders, tmp_path):
    """Load copies of results in a process of their own that has no Coterie; return the copies."""
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    line = [sys.executable, "-c", STOCK, json.dumps(IDS.tolist()), *map(str, copies)]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return copies


def check_same(out, copy):
    """Compare what stock transformers loaded with what Coterie loads: weights to the bit, and logits."""
    loaded, model = load_file(copy / "loaded.st"), load_model(out)
    found = loaded.pop("the logits")
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name].float(), weight.float()), name
    assert torch.equal(found.float(), logits(model))


def check(results, tmp_path):
    copies = load_without_coterie([result.out for result in results], tmp_path)
    for result, copy in zip(results, copies, strict=True):
        check_same(result.out, copy)
        config = json.loads((copy / "saved" / "config.json").read_text())
        assert not config.keys() & {"auto_map", "quantization_config"}
        assert not (copy / "saved" / MODELING_FILE).exists()
        with quiet():
            stock = AutoModelForCausalLM.from_pretrained(copy / "saved", dtype=torch.float32)
        assert torch.equal(logits(stock), logits(load_model(result.out)))


def test_stock_transformers_loads_what_coterie_loads(made, tmp_path):
    results = [made(ResultForm.PACKED, "qwen3_moe"), made(ResultForm.MAPPED), made(ResultForm.RAGGED, "mixtral")]
    assert [result.manifest.form for result in results] == list(TARGETS)
    check(results, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_every_form_of_a_family(made, tmp_path, family):
    forms = [form for form in TARGETS if (form, family) != (ResultForm.RAGGED, "gpt_oss")]  # experts in one tensor
    check([made(form, family) for form in forms], tmp_path)


#: Other ways to lay out experts, routers and towers; see test_pack.
OTHERS = {
    "granitemoe": {"intermediate_size": 64},
    "qwen3_next": {"moe_intermediate_size": 64},
    "qwen3_vl_moe": {"moe_intermediate_size": 64},
    "gemma4_text": {"moe_intermediate_size": 64},
    "muse_spark": {"hidden_size": 32, "moe_intermediate_size": 64, "moe_hidden_size": 32},
    "zaya": {"moe_intermediate_size": 64, "router_hidden_size": 32},
}


IMAGES = """
import json, sys
sys.modules["coterie"] = None
import torch, transformers
ids = torch.tensor(json.loads(sys.argv[2]))
for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
    model = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    with torch.no_grad():
        print(model(input_ids=ids, use_cache=False).logits.double().sum().item())
"""


@pytest.mark.long
def test_a_family_with_images_loads_by_either_auto_class(made, tmp_path):
    out = made(ResultForm.PACKED, "qwen3_vl_moe", **OTHERS["qwen3_vl_moe"]).out
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", IMAGES, str(out), json.dumps(IDS.tolist())]
    run = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(map(float, run.stdout.split())) == {logits(load_model(out)).double().sum().item()}


@pytest.mark.families
@pytest.mark.parametrize("form", [ResultForm.PACKED, ResultForm.MAPPED])
@pytest.mark.parametrize("family", OTHERS)
def test_it_loads_other_families(made, family, form):
    out = made(form, family, **OTHERS[family]).out
    expected = load_model(out)
    loaded = CoterieModel.from_pretrained(out, dtype=torch.float32)
    found = loaded.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(found[name], weight), name
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize(
    ("kind", "axis", "columns"),
    [
        *((kind, axis, None) for kind in SIZES for axis in (-1, -2)),
        *((kind, axis, 96) for kind in SIZES for axis in (-1, -2) if kind not in OWN_TYPES),
    ],
)
def test_blocks_of_every_type_are_unpacked_to_the_same_bits(kind, axis, columns):
    encoding = GgmlBlocks(type=kind, axis=axis, columns=columns)
    shape = [2, 512, 512]
    shape[axis] = columns or 512
    blocks = torch.randint(256, encoding.stored(tuple(shape))[""][1], dtype=torch.uint8)  # also scales that are none
    with np.errstate(all="ignore"):
        found, expected = modeling._unpacked(blocks, encoding.config()), encoding.unpack({"": blocks})
    assert found.dtype == expected.dtype == torch.bfloat16
    assert list(found.shape) == shape
    assert expected.isfinite().float().mean() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("bits", "group", "axis"), [(2, 32, -1), (3, 64, -1), (4, 128, -1), (4, 32, -2), (3, 128, -2)])
def test_planes_of_bits_are_unpacked_to_the_same_bits(bits, group, axis):
    encoding = BitPlanes(bits=bits, group=group, axis=axis)
    stored = encoding.pack(torch.randn(2, 256, 128, generator=torch.Generator().manual_seed(0)))[""]
    found, expected = modeling._unpacked(stored, encoding.config()), encoding.unpack({"": stored})
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.long
def test_rotated_blocks_load(text, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=256, vocab_size=272)
    settings = {"recipe": "nearest", "type": "TURBO3", "target": "packed"}
    out = compress(model, tmp_path / "out", text=text, **TEXT, **settings).out
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    assert "TURBO3" in {group["type"] for group in groups}
    assert torch.equal(logits(CoterieModel.from_pretrained(out)), logits(load_model(out)))


def test_blocks_never_have_the_shape_of_numbers():
    """So stock loaders, which overlook a ``quant_method`` that they do not know, refuse every matrix in blocks."""
    assert all(block != size for block, size in SIZES.values())


@pytest.mark.parametrize("form", TARGETS)
def test_without_the_code_stock_transformers_refuses(made, form):
    with quiet(), pytest.raises(RuntimeError, match=r"mismatched_sizes|conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(made(form).out)


@pytest.mark.parametrize("form", TARGETS)
def test_the_file_is_that_of_the_package_and_named(made, form):
    out = made(form).out
    assert (out / MODELING_FILE).read_bytes() == Path(modeling.__file__).read_bytes()
    named = {"AutoModelForCausalLM": "modeling_coterie.CoterieModel"}
    assert json.loads((out / "config.json").read_text())["auto_map"] == named


def test_a_family_with_images_is_named_for_its_auto_classes(tiny):
    family = Architecture.of(Checkpoint.open(tiny("qwen3_vl_moe"))).model.config
    names = ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
    assert list(auto_map({}, type(family))) == names


def test_a_plain_result_has_none(tiny, text, tmp_path):
    out = compress(tiny(), tmp_path / "out", recipe="reap", keep=0.5, text=text, **TEXT).out
    assert not (out / MODELING_FILE).exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_coterie_does_not_run_it(copied):
    copy = copied(ResultForm.PACKED)
    expected = logits(load_model(copy))
    (copy / MODELING_FILE).write_text("raise SystemExit")
    coterie.inspect(copy)
    loaded = load_model(copy)
    assert torch.equal(logits(loaded), expected)
    assert not hasattr(loaded.config, "auto_map")
    assert "auto_map" not in read_config(copy)


def test_what_the_original_names_is_replaced_and_said(tiny, text, tmp_path, caplog):
    """DeepSeek-V3 and others name code for the versions of transformers that did not know them."""
    model = Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "model"))
    named = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Base", "AutoModelForCausalLM": "own.OwnModel"}
    others = {"AutoProcessor": "own.OwnProcessor"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": named | others}))
    (model / "own.py").write_text("raise SystemExit")
    out = compress(model, tmp_path / "out", text=text, **TEXT, **TARGETS[ResultForm.MAPPED]).out
    own = {"AutoModelForCausalLM": "modeling_coterie.CoterieModel"}
    assert json.loads((out / "config.json").read_text())["auto_map"] == others | own
    assert read_config(out)["auto_map"] == others
    [message] = [record.message for record in caplog.records if "auto_map" in record.message]
    assert "AutoConfig: own.OwnConfig, AutoModel: own.Base, AutoModelForCausalLM: own.OwnModel" in message
    assert (out / "own.py").is_file()
    assert torch.equal(logits(CoterieModel.from_pretrained(out)), logits(load_model(out)))


def test_options_reach_the_stock_class(made):
    out = made(ResultForm.PACKED).out
    model, info = CoterieModel.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]
    assert model.config.name_or_path == str(out)
    stored = GenerationConfig.from_pretrained(out)
    assert model.generation_config.to_diff_dict() == stored.to_diff_dict()


def test_a_config_that_says_no_number_format(copied):
    copy = copied(ResultForm.RAGGED)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    assert CoterieModel.from_pretrained(copy).dtype == torch.float32


def test_a_model_without_weights(made):
    config = AutoConfig.from_pretrained(made(ResultForm.PACKED).out)
    model = CoterieModel._from_config(config)
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert not hasattr(model.config, "quantization_config")


def test_files_are_fetched_from_the_hub(made, monkeypatch):
    out, asked = made(ResultForm.MAPPED).out, []

    def fetch(name, **options):
        asked.append((name, options))
        return str(out)

    monkeypatch.setattr(modeling, "snapshot_download", fetch)
    model = CoterieModel.from_pretrained("some/model", revision="abc", token="secret", proxies=None, subfolder="")
    assert torch.equal(logits(model), logits(load_model(out)))
    patterns = ["*.json", "*.safetensors"]
    assert asked == [("some/model", {"allow_patterns": patterns, "revision": "abc", "token": "secret"})]
    assert model.config.name_or_path == "some/model"


def test_what_cannot_be_is_refused_and_said(copied, monkeypatch):
    copy = copied(ResultForm.PACKED)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match="pip install gguf"):
            CoterieModel.from_pretrained(copy)
    with pytest.raises(ValueError, match=r"is an adapter: load .* first"):
        CoterieModel.from_pretrained(copy, adapter_kwargs={"_adapter_model_path": "mine"})
    with pytest.raises(ValueError, match=r"puts parts of .* on the disk"):
        CoterieModel.from_pretrained(copy, device_map={"": "cpu", "lm_head": "disk"})
    with monkeypatch.context() as patch:
        patch.setattr(modeling.transformers, "__version__", "4.57.1")
        with pytest.raises(ImportError, match=r"transformers 5 or newer, and 4\.57\.1 is installed"):
            CoterieModel.from_pretrained(copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with quiet(), pytest.raises(ValueError, match=r"no tensors for \['model.norm.weight'\]; fetch its files again"):
        CoterieModel.from_pretrained(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has no coterie\.json"):
        CoterieModel.from_pretrained(copy)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_loading_takes_the_model_its_files_and_one_layer(tmp_path):
    text, sizes = tiny_text(tmp_path / "text"), {"hidden_size": 512, "intermediate_size": 512, "num_experts": 16}
    outs = []
    for name, changes in (("small", {"num_hidden_layers": 1}), ("big", {"num_hidden_layers": 8})):
        model = tiny_checkpoint(tmp_path / f"{name}-model", dtype=torch.bfloat16, **sizes | changes)
        settings = {"text": text, "tokens": 128, "seq_len": 32, **TARGETS[ResultForm.PACKED]}
        outs.append(compress(model, tmp_path / name, **settings).out)
    code = f"""
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
AutoModelForCausalLM.from_pretrained({str(outs[0])!r}, trust_remote_code=True)
before = status("VmRSS")
model = AutoModelForCausalLM.from_pretrained({str(outs[1])!r}, trust_remote_code=True)
print(sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20, status("VmHWM") - before)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    size, peak = map(float, run.stdout.split())
    files = sum(file.stat().st_size for file in outs[1].glob("*.safetensors")) / 2**20
    # A layer as numbers, once as they are wanted and once in the fused tensor.
    assert peak < size * (1 + 2 / 8) + files + 64
