"""GGUF files as input: what was exported reads back as the checkpoint that it was made from, bit for bit."""

import json
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie import export, load_model
from coterie.errors import CorruptCheckpoint, InputError, NotACheckpoint, UnsupportedDtype
from coterie.model.arch.meta import parse_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import SIZES
from coterie.model.disk.gguf.families import FAMILIES
from coterie.model.disk.gguf.header import PLAIN, TYPES
from coterie.model.disk.open import open_checkpoint
from coterie.model.disk.quantized import dequantized
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.publish.original import card_of, hub_id
from coterie.testing import tiny_checkpoint
from export_cases import CASES, MIXED, RIGHT, STORED_IN_BLOCKS, WIDE, packed, rewritten
from llama_runtime import numbers


def same_config(first, second):
    """Compare what transformers makes of two configs; a head's width may be said or follow from others."""
    configs = [parse_config(checkpoint.config).to_dict() for checkpoint in (first, second)]
    for config in configs:
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        positions = config["rope_parameters"]
        if positions["rope_type"] == "yarn":
            config["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0, **positions, "truncate": None}
        if config.get("n_group", 1) == config.get("topk_group", 1) or config["model_type"] == "deepseek_v2":
            config["n_group"] = config["topk_group"] = None  # all of them are chosen, or none first
    assert configs[0] == configs[1]


def same_tensors(first, second, *, values_alone=False):
    """Compare names, shapes and values of all tensors, and their number formats."""
    assert first.tensors.keys() == second.tensors.keys()
    with first.reader() as one, second.reader() as other:
        for name in first.tensors:
            a, b = one.read(name), other.read(name)
            assert second.tensors[name].shape == tuple(b.shape)
            if values_alone:
                a, b = a.float(), b.float()
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([numbers(40)])).logits


def exported(checkpoint, file, **options):
    export(checkpoint, file, **{"type": "f32", **options})
    return file


FIRST = {family: (family, changes) for family, changes in reversed(CASES)}


@pytest.mark.parametrize("family", sorted(FIRST))
def test_what_was_exported_reads_back_as_the_checkpoint(family, tmp_path):
    _, changes = FIRST[family]
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **changes)
    file = exported(checkpoint, tmp_path / "model.gguf")
    same_config(Checkpoint.open(checkpoint), Checkpoint.open(file))
    same_tensors(Checkpoint.open(checkpoint), Checkpoint.open(file))


@pytest.mark.long
@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_case_reads_back_with_the_same_logits(family, changes, tmp_path):
    # Whether boundaries of positions are rounded no file says.
    if "truncate" in changes.get("rope_parameters", {}):
        changes = changes | {"rope_parameters": changes["rope_parameters"] | {"truncate": False}}
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **changes)
    file = exported(checkpoint, tmp_path / "model.gguf")
    same_config(Checkpoint.open(checkpoint), Checkpoint.open(file))
    same_tensors(Checkpoint.open(checkpoint), Checkpoint.open(file))
    assert torch.equal(logits(load_model(checkpoint)), logits(load_model(file)))


def test_the_loaded_model_and_its_tokenizer_are_those_of_the_checkpoint(tiny, tmp_path):
    checkpoint = tiny("qwen3_moe")
    file = exported(checkpoint, tmp_path / "model.gguf")
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False)
    assert torch.equal(logits(stock), logits(load_model(file)))
    theirs, ours = load_tokenizer(checkpoint), load_tokenizer(file)
    text = "Grüße, 你好 <|endoftext|> 12 + 3"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.special_tokens_map == ours.special_tokens_map
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_sixteen_bits_read_back_as_the_same_numbers(family, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, **RIGHT.get(family, {}))
    file = exported(checkpoint, tmp_path / "model.gguf", type="bf16")
    back = Checkpoint.open(file)
    same_tensors(Checkpoint.open(checkpoint), back, values_alone=True)
    assert back.config["dtype"] == "bfloat16"
    formats = {info.dtype for name, info in back.tensors.items() if "experts" in name}
    assert formats == {"BF16"}  # vectors and routers are in 32 bits there


SLOWER = ("qwen3_moe", "two bits and fewer")


@pytest.mark.parametrize(
    "which", [pytest.param(name, marks=pytest.mark.long) if name in SLOWER else name for name in STORED_IN_BLOCKS]
)
def test_blocks_read_back_as_their_values_and_are_exported_again_byte_for_byte(which, tmp_path):
    family, types, changes = STORED_IN_BLOCKS[which]
    model = packed(tmp_path / "model", family, types, **changes)
    file = exported(model, tmp_path / "model.gguf")
    groups = Checkpoint.open(file).config["quantization_config"]["groups"]
    assert {group["type"] for group in groups} == {kind for kind, _ in types.values()}
    expected = dequantized(Checkpoint.open(model), "float32")
    for dtype, format_ in (("bfloat16", "BF16"), ("float32", "F32")):
        back = open_checkpoint(file, output_dtype=dtype)
        with expected.reader() as one, back.reader() as other:
            for name, info in back.tensors.items():
                value = other.read(name)
                assert torch.equal(one.read(name).to(value.dtype), value), name
                assert info.dtype == format_ or not name.endswith(tuple(types))
    exported(file, tmp_path / "again.gguf")
    first, again = (gguf.GGUFReader(tmp_path / name) for name in ("model.gguf", "again.gguf"))
    for a, b in zip(first.tensors, again.tensors, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
        assert a.data.tobytes() == b.data.tobytes(), a.name


@pytest.mark.long
def test_a_file_in_blocks_is_compressed_as_its_values_are(text, tmp_path):
    model = packed(tmp_path / "model", "qwen3_moe", MIXED, **WIDE)
    file = exported(model, tmp_path / "model.gguf")
    # A result in blocks, exported and read back, has the values of the result.
    options = {
        "type": "Q4_0",
        "recipe": "nearest",
        "text": text,
        "tokens": 512,
        "seq_len": 64,
        "output_dtype": "float32",
    }
    coterie.compress(model, tmp_path / "one", **options)
    coterie.compress(file, tmp_path / "other", **options)
    one, other = (open_checkpoint(tmp_path / name, output_dtype="float32") for name in ("one", "other"))
    same_tensors(one, other)
    same_tensors(one, open_checkpoint(exported(tmp_path / "other", tmp_path / "result.gguf"), output_dtype="float32"))


def test_parts_in_different_types_become_numbers_as_they_are_read(tmp_path):
    changes = {"kv_lora_rank": 256, "num_hidden_layers": 2}
    model = packed(tmp_path / "model", "deepseek_v3", {"kv_b_proj.weight": ("Q4_0", -1)}, **changes)
    file = exported(model, tmp_path / "model.gguf")  # keys are turned, so they are numbers there; values stay in blocks
    expected = dequantized(Checkpoint.open(model), "float32")
    for dtype in ("float32", "bfloat16"):
        back = open_checkpoint(file, output_dtype=dtype)
        name = "model.layers.1.self_attn.kv_b_proj.weight"
        with expected.reader() as one, back.reader() as other:
            value = other.read(name)
            assert torch.equal(one.read(name).to(getattr(torch, dtype)), value)
            assert back.tensors[name].num_bytes == value.numel() * value.element_size()


def test_experts_of_a_stack_are_read_by_themselves(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "gpt_oss", **RIGHT["gpt_oss"])
    file = exported(model, tmp_path / "model.gguf")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with Checkpoint.open(model).reader() as one, Checkpoint.open(file).reader() as other:
        assert torch.equal(one.read(name)[3:5], other.read_rows(name, 3, 5))
        assert other.num_bytes_read == 2 * 32 * 48 * 4


def test_a_file_in_parts_and_a_folder_with_one_are_the_model(tiny, tmp_path):
    file = exported(tiny("qwen3_moe"), tmp_path / "model.gguf")
    (tmp_path / "parts").mkdir()
    rewritten(file, tmp_path / "parts" / "model.gguf", split_max_tensors=10)
    parts = sorted((tmp_path / "parts").iterdir())
    assert [part.name for part in parts] == [f"model-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    for place in (parts[0], parts[2], tmp_path / "parts"):
        same_tensors(Checkpoint.open(tiny("qwen3_moe")), Checkpoint.open(place))
    shutil.copy(parts[1], tmp_path / "alone.gguf")
    with pytest.raises(CorruptCheckpoint):
        Checkpoint.open(tmp_path / "alone.gguf")
    parts[1].unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model-00002-of-00003.gguf: this part of 3 is missing"):
        Checkpoint.open(parts[0])
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / "two" / name)
    with pytest.raises(NotACheckpoint, match=r"holds 2 GGUF models \(a.gguf, b.gguf\)"):
        Checkpoint.open(tmp_path / "two")


def test_files_beside_it_in_a_folder_come_first(tiny, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = exported(tiny("qwen3_moe"), folder / "model.gguf")
    (folder / "LICENSE").write_text("free", encoding="utf-8")
    content = json.loads((tiny("qwen3_moe") / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(folder)("ABC")["input_ids"] == load_tokenizer(file)("abc")["input_ids"]
    assert [path.name for path in Checkpoint.open(folder).other_files() if path.name.isupper()] == ["LICENSE"]
    # With a config.json of its own it is a model folder already.
    shutil.copy(tiny("qwen3_moe") / "config.json", folder)
    opened = Checkpoint.open(folder)
    assert opened.path == folder
    same_tensors(Checkpoint.open(tiny("qwen3_moe")), opened)
    shutil.copy(tiny("olmoe") / "config.json", folder)
    with pytest.raises(CorruptCheckpoint, match="is of a olmoe, and"):
        Checkpoint.open(folder)


def test_a_file_is_made_a_folder_of_once_and_again_when_it_was_written_to(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    file = exported(tiny("qwen3_moe"), tmp_path / "model.gguf")
    first = Checkpoint.open(file)
    assert first.path == Checkpoint.open(str(file)).path
    assert first.path.name == "model"
    assert first.digest == Checkpoint.open(file).digest
    file.unlink()
    exported(tiny_checkpoint(tmp_path / "other", "qwen3_moe", num_hidden_layers=3), file)
    second = Checkpoint.open(file)
    assert second.path != first.path
    assert second.config["num_hidden_layers"] == 3
    (tmp_path / "in the way").touch()
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "in the way"))
    with pytest.raises(InputError, match="COTERIE_CACHE"):
        Checkpoint.open(file)


def test_a_compressed_file_is_an_ordinary_result(tiny, text, tmp_path):
    file = exported(tiny("qwen3_moe"), tmp_path / "model.gguf")
    options = {"keep": 0.5, "recipe": "reap", "text": text, "tokens": 512, "seq_len": 64}
    coterie.compress(file, tmp_path / "half", **options)
    coterie.compress(tiny("qwen3_moe"), tmp_path / "expected", **options)
    same_tensors(Checkpoint.open(tmp_path / "expected"), Checkpoint.open(tmp_path / "half"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32, trust_remote_code=False)
    assert stock.config.num_experts == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "half", trust_remote_code=False)("abc")["input_ids"]
    manifest = json.loads((tmp_path / "half" / "coterie.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(manifest)
    assert not any((tmp_path / "half").glob("*.gguf"))


TEXT, WHOLE, NUMBER = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
WRONG = [
    ("general.architecture", ("mamba", TEXT, None), "architecture 'mamba', and what its tensors are .* known are deep"),
    ("qwen3moe.block_count", None, "qwen3moe.block_count is missing"),
    ("qwen3moe.block_count", (1, WHOLE, None), r"is in layer 1, and there should be 1 and 0 prediction layers"),
    ("qwen3moe.block_count", (3.0, NUMBER, None), "block_count is '3.0', which is no whole number"),
    ("qwen3moe.rope.scaling.type", ("longrope", TEXT, None), "rotary positions are 'longrope'"),
    ("qwen3moe.rope.scaling.attn_factor", (0.5, NUMBER, None), "attn_factor is set"),
    ("qwen3moe.attention.head_count", (0, WHOLE, None), "head_count is 0"),
]


@pytest.mark.parametrize(("key", "entry", "words"), WRONG, ids=[f"{k}-{e and e[0]}" for k, e, _ in WRONG])
def test_what_cannot_be_read_is_said(key, entry, words, tiny, tmp_path):
    def change(fields):
        if entry is None:
            del fields[key]
        else:
            fields[key] = entry

    file = rewritten(exported(tiny("qwen3_moe"), tmp_path / "model.gguf"), tmp_path / "changed.gguf", change)
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint.open(file)
    assert "changed.gguf" in str(caught.value)


def test_prediction_layers_are_left_out_and_it_is_said(tiny, tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")

    def change(fields):
        fields["qwen3moe.nextn_predict_layers"] = (1, WHOLE, None)

    file = rewritten(exported(tiny("qwen3_moe"), tmp_path / "model.gguf"), tmp_path / "changed.gguf", change)
    opened = Checkpoint.open(file)
    assert opened.config["num_hidden_layers"] == 1
    assert not any(name.startswith("model.layers.1.") for name in opened.tensors)
    assert "tensors of prediction layers are left out, such as blk.1." in caplog.text


def test_what_is_known_of_a_model_beside_its_weights_comes_along(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/big"}), encoding="utf-8")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Big\n", encoding="utf-8")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [256, 7]}', encoding="utf-8")
    back = Checkpoint.open(exported(checkpoint, tmp_path / "model.gguf"))
    assert load_model(tmp_path / "model.gguf").generation_config.eos_token_id == [256, 7]
    assert hub_id(tmp_path / "model.gguf", back.path, back.config) == "someone/big"
    assert card_of(back.path) == {"license": "apache-2.0"}


def test_what_other_converters_leave_out_follows_from_the_rest(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", "deepseek_v3", num_hidden_layers=2)

    def change(fields):
        for key in ("deepseek2.expert_gating_func", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token"):
            del fields[key]
        fields["tokenizer.ggml.eot_token_id"] = (2**32 - 1, WHOLE, None)  # none

    file = rewritten(exported(checkpoint, tmp_path / "model.gguf"), tmp_path / "less.gguf", change)
    same_config(Checkpoint.open(checkpoint), Checkpoint.open(file))
    assert load_tokenizer(file)("abc")["input_ids"] == load_tokenizer(checkpoint)("abc")["input_ids"]


def test_types_that_are_not_read_are_named(tiny, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    writer.add_tensor_info("x.weight", (4, 256), torch.zeros(1).numpy().dtype, 4 * 292, gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedDtype, match=r"'x\.weight' is stored as Q8_K, which is not read; read are F32"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_every_block_type_reads_as_the_package_gguf_reads_it(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", hidden_size=256, moe_intermediate_size=256,
                            num_hidden_layers=8, num_experts=2)  # fmt: skip
    base = exported(model, tmp_path / "base.gguf", type="bf16")
    names = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(8) for part in ("gate", "up", "down")]
    kinds = dict(zip(names, (kind for kind in TYPES.values() if kind not in PLAIN), strict=False))
    assert set(kinds.values()) == set(TYPES.values()) - set(PLAIN)
    # Any bytes are blocks; these hold no scales beyond two.
    numbers = np.random.default_rng(0)
    contents = {
        name: numbers.integers(0, 64, (2, 256, 256 // SIZES[kind][0] * SIZES[kind][1]), dtype=np.uint8)
        for name, kind in kinds.items()
    }

    def replaced(tensor):
        if tensor.name not in kinds:
            return tensor.data, tensor.tensor_type
        return contents[tensor.name], gguf.GGMLQuantizationType[kinds[tensor.name]]

    file = rewritten(base, tmp_path / "model.gguf", tensor_of=replaced)
    with open_checkpoint(file, output_dtype="float32").reader() as ours:
        for name, kind in kinds.items():
            expected = torch.from_numpy(gguf.dequantize(contents[name], gguf.GGMLQuantizationType[kind]))
            _, layer, part, _ = name.split(".")
            part = part.removeprefix("ffn_").removesuffix("_exps")
            for expert in (0, 1):
                value = ours.read(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight")
                torch.testing.assert_close(value, expected[expert], rtol=1e-6, atol=0, msg=kind)


@pytest.mark.long
def test_the_bundled_model_read_back_predicts_text_as_it_does(bundled, tmp_path):
    file = tmp_path / "model.gguf"
    export(bundled / "qwen3_moe", file)
    options = {"text": bundled / "text" / "test", "tokens": 8192}
    [card] = coterie.evaluate([file], against=bundled / "qwen3_moe", **options)
    assert card.overall["kl"] == 0
    assert card.overall["perplexity_rise"] == 0


def test_a_look_into_a_file_takes_headers_alone(tiny, tmp_path):
    file = exported(tiny("mixtral", **RIGHT["mixtral"]), tmp_path / "model.gguf")
    command = [sys.executable, "-X", "importtime", "-m", "coterie.cli.main", "inspect", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "numpy", "gguf"}
    told = json.loads(done.stdout)
    assert told["path"] == str(file)
    assert told["file_bytes"] == file.stat().st_size
    assert [layer["num_experts"] for layer in told["moe_layers"]] == [8, 8]


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_those_that_the_package_gguf_knows(family):
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[family].architecture)
    names = gguf.get_tensor_name_map(architecture, 3)
    numbers = {"layer": 2, "expert": 5, "kind": "weight"}
    for row in FAMILIES[family].rows:
        # Parts, stacks and single experts are names of the package's own, those of whole tensors the family's.
        if row.cut in ("whole", "heads of queries", "heads of keys") and "expert}" not in row.disk:
            disk = row.disk.format(**numbers).removesuffix(".weight").removesuffix("_bias")
            there = row.gguf.format(**numbers).removesuffix(".weight").removesuffix(".bias")
            assert names.get_name(disk) == there, row
