"""benchmarks/bits.py: formats have the types that llama.cpp gives them, and ours are compared at no more bytes."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coterie.model.disk.checkpoint import Checkpoint
from coterie.testing import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def rival(importable):
    return importlib.import_module("llama_quantiser")


@pytest.fixture(scope="module")
def script(importable):
    return importlib.import_module("bits")


@pytest.fixture(scope="module")
def library(rival):
    pytest.importorskip("xllamacpp", reason="llama.cpp's quantiser is in the package xllamacpp")
    return rival.Library()


def a_file(rival, *, layers=6, width=256, expert_width=512, tied=True, extra=()):
    """Return the tensors of a model with experts, in llama.cpp's order."""
    sizes = {"attn_k": (64, width), "attn_output": (width, width), "attn_q": (width, width), "attn_v": (64, width)}
    parts = {f"{part}.weight": shape for part, shape in sizes.items()} | {"attn_norm.weight": (width,)}
    parts |= {"ffn_gate_inp.weight": (4, width), "exp_probs_b.bias": (4,)}
    parts |= {f"ffn_{part}_exps.weight": (expert_width, width) for part in ("gate", "up")}
    parts |= {"ffn_down_exps.weight": (width, expert_width)} | dict.fromkeys(extra, (width, expert_width))
    named = {f"blk.{layer}.{part}": shape for layer in range(layers) for part, shape in sorted(parts.items())}
    named = {"token_embd.weight": (512, width)} | ({} if tied else {"output.weight": (512, width)}) | named
    return [rival.GgufTensor(name=name, names=(name,), shape=shape) for name, shape in named.items()]


def in_layers(types, part):
    return [
        types[f"blk.{layer}.{part}.weight"] for layer in range(sum(name.endswith(".attn_q.weight") for name in types))
    ]


#: What differs from a format's own type in a model of 6 layers, 32 experts, and as many kv heads as heads, head tied.
MIXES = {
    "Q8_0": {},
    "Q6_K": {},
    "Q5_K_M": {"head": "Q6_K", "attn_v": {2: "Q6_K", 5: "Q6_K"}, "ffn_down_exps": {2: "Q6_K", 5: "Q6_K"}},
    "Q4_K_M": {"head": "Q6_K", "attn_v": {2: "Q6_K", 5: "Q6_K"}, "ffn_down_exps": {2: "Q6_K", 5: "Q6_K"}},
    "IQ4_XS": {"head": "Q6_K"},
    "Q3_K_M": {
        "head": "Q6_K", "attn_v": dict.fromkeys(range(6), "Q4_K") | {0: "Q5_K", 1: "Q5_K"},
        "ffn_down_exps": dict.fromkeys(range(6), "Q4_K"), "attn_output": dict.fromkeys(range(6), "Q4_K"),
    },
    "IQ3_M": {
        "head": "Q6_K", "attn_v": dict.fromkeys(range(6), "Q4_K"), "attn_output": dict.fromkeys(range(6), "Q4_K"),
    },
    "IQ3_XXS": {
        "head": "Q5_K", "attn_q": dict.fromkeys(range(6), "IQ2_S"), "attn_k": dict.fromkeys(range(6), "IQ2_S"),
        "attn_output": dict.fromkeys(range(6), "IQ3_S"),
    },
    "Q2_K": {
        "head": "Q6_K", "attn_v": dict.fromkeys(range(6), "Q3_K"), "attn_output": dict.fromkeys(range(6), "Q3_K"),
        "ffn_down_exps": dict.fromkeys(range(6), "Q3_K"),
    },
    "IQ2_M": {
        "head": "Q5_K", "attn_v": dict.fromkeys(range(6), "Q4_K"), "attn_output": dict.fromkeys(range(6), "IQ3_S"),
    },
    "IQ2_XS": {"head": "Q5_K", "attn_v": dict.fromkeys(range(6), "Q4_K")},
}  # fmt: skip


def test_a_recipe_is_spelled_with_what_may_follow_it(script):
    def read(recipe):
        each = script.Spelling.of(recipe)
        return each.name, each.search, each.effort, each.reader

    assert read("coterie-bits") == ("coterie-bits", 0, "fast", "")
    assert read("coterie-bits:balanced@packed") == ("coterie-bits", 0, "balanced", "packed")
    assert read("coterie-bits+search=40") == ("coterie-bits", 40, "fast", "")
    assert read("coterie-bits+search=8:thorough@packed") == ("coterie-bits", 8, "thorough", "packed")


@pytest.mark.parametrize("file_format", MIXES)
def test_a_format_gives_more_bits_where_llama_cpp_does(rival, file_format):
    assert MIXES.keys() == rival.FORMATS.keys()
    shape = rival.Shape(num_layers=6, num_experts=32, heads_per_kv_head=1)
    types = rival.types_of(a_file(rival), shape, file_format)
    own, mix = rival.FORMATS[file_format], MIXES[file_format]
    assert types["token_embd.weight"] == mix.get("head", own)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        assert in_layers(types, part) == [mix.get(part, {}).get(layer, own) for layer in range(6)], part
    for layer in range(6):
        assert {types[f"blk.{layer}.{name}"] for name in ("attn_norm.weight", "ffn_gate_inp.weight")} == {"F32"}
        assert types[f"blk.{layer}.exp_probs_b.bias"] == "F32"


def test_in_deep_models_the_first_and_last_eighth_and_every_third_layer_get_more_bits(rival):
    shape = rival.Shape(num_layers=48, num_experts=128, heads_per_kv_head=8)
    tensors = a_file(rival, layers=48, tied=False)
    more = [layer < 6 or layer >= 42 or layer % 3 == 2 for layer in range(48)]
    types = rival.types_of(tensors, shape, "Q4_K_M")
    for part in ("attn_v", "ffn_down_exps"):
        assert in_layers(types, part) == ["Q6_K" if each else "Q4_K" for each in more]
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert in_layers(rival.types_of(tensors, shape, "Q3_K_M"), "ffn_down_exps") == ["Q5_K"] * 3 + ["Q4_K"] * 45
    assert in_layers(rival.types_of(tensors, shape, "IQ3_M"), "ffn_down_exps") == ["Q4_K"] * 6 + ["IQ3_S"] * 42
    types = rival.types_of(tensors, shape, "IQ2_M")
    assert in_layers(types, "ffn_down_exps") == ["IQ3_S"] * 6 + ["IQ2_S"] * 42
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q5_K", "IQ3_S")
    # Heads that share keys and values.
    for file_format, kind in {"Q2_K": "Q4_K", "IQ3_XXS": "Q4_K", "IQ4_XS": "Q5_K"}.items():
        assert set(in_layers(rival.types_of(tensors, shape, file_format), "attn_v")) == {kind}
    # Two-bit formats count tensors, and a shared expert's is one.
    shared = a_file(rival, layers=48, extra=("ffn_down_shexp.weight",))
    types = rival.types_of(shared, shape, "IQ2_M")
    assert in_layers(types, "ffn_down_exps") == ["IQ3_S"] * 3 + ["IQ2_S"] * 45


def test_models_of_eight_experts_have_rules_of_their_own(rival):
    shape = rival.Shape(num_layers=6, num_experts=8, heads_per_kv_head=4)
    types = rival.types_of(a_file(rival), shape, "Q4_K_M")
    assert {kind for part in ("attn_k", "attn_v") for kind in in_layers(types, part)} == {"Q8_0"}
    assert set(in_layers(types, "attn_output")) == {"Q5_K"}
    types = rival.types_of(a_file(rival), shape, "IQ2_XS")
    assert {kind for part in ("attn_k", "attn_v") for kind in in_layers(types, part)} == {"Q4_K"}


@pytest.mark.parametrize(
    ("file_format", "stands_in"),
    {"Q8_0": "Q8_0", "Q6_K": "Q8_0", "Q5_K_M": "Q5_1", "Q4_K_M": "Q5_0", "IQ4_XS": "IQ4_NL", "IQ3_M": "IQ4_NL",
     "IQ3_XXS": "IQ4_NL", "Q2_K": "Q4_0", "IQ2_M": "IQ4_NL", "IQ2_XS": "IQ4_NL"}.items(),
)  # fmt: skip
def test_other_types_stand_in_where_rows_are_no_whole_blocks(rival, file_format, stands_in):
    shape = rival.Shape(num_layers=6, num_experts=32, heads_per_kv_head=1)
    types = rival.types_of(a_file(rival, width=192, expert_width=96), shape, file_format)
    assert set(in_layers(types, "ffn_gate_exps")) == {stands_in}
    assert types["token_embd.weight"] == "Q8_0"
    assert rival.fitting("Q4_K", 40) == "F16"


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe", "qwen3_moe"])
def test_every_tensor_of_a_model_is_in_its_file_once(rival, tiny, family):
    checkpoint = Checkpoint.open(tiny(family))
    tensors = rival.gguf_tensors(checkpoint)
    listed = [name for tensor in tensors for name in tensor.names]
    assert len(listed) == len(set(listed))
    head = {"lm_head.weight"} if checkpoint.config.get("tie_word_embeddings") else set()
    assert set(listed) == checkpoint.tensors.keys() - head
    plain = [name for tensor in tensors if not tensor.rounded for name in tensor.names]
    assert all("norm" in name or "bias" in name or name.endswith(".mlp.gate.weight") for name in plain)
    numbers = {rounded: sum(tensor.num_bytes("F32") // 4 for tensor in tensors if tensor.rounded is rounded)
               for rounded in (False, True)}  # fmt: skip
    assert rival.plain_bytes(tensors) == 4 * numbers[False] + 2 * numbers[True]
    experts = [tensor for tensor in tensors if tensor.name.endswith("_exps.weight")]
    shape = rival.Shape.of(checkpoint.config)
    assert {len(tensor.names) for tensor in experts} == {shape.num_experts}
    for tensor in experts:
        assert [int(name.split(".")[-3]) for name in tensor.names] == list(range(shape.num_experts))


def test_models_that_gguf_has_no_names_for_are_refused(rival, tiny):
    checkpoint = Checkpoint.open(tiny())
    with pytest.raises(ValueError, match="no experts"):
        rival.Shape.of({"model_type": "llama"})
    checkpoint.config["model_type"] = "moe_of_tomorrow"
    with pytest.raises(ValueError, match="knows no model type moeoftomorrow"):
        rival.gguf_tensors(checkpoint)


def test_the_importance_matrix_is_the_mean_square_of_each_input(rival, tiny):
    folder = tiny("olmoe", num_experts=4, num_experts_per_tok=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BS = torch.arange(24).reshape(2, 12)
    received = {}

    def keep(name):
        return lambda module, args: received.update({name: args[0].detach().flatten(0, -2)})

    for name in ("self_attn.o_proj", "mlp"):
        model.get_submodule(f"model.layers.1.{name}").register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(ids_BS)
    found = rival.importance(folder, [ids_BS[:1], ids_BS[1:]])
    close = {"rtol": 1e-4, "atol": 1e-9}
    prefix = "model.layers.1."
    expected = received["self_attn.o_proj"].square().mean(0)
    torch.testing.assert_close(found[f"{prefix}self_attn.o_proj.weight"], expected, **close)
    weights = load_file(folder / "model.safetensors")
    for expert in range(4):
        names = {part: f"{prefix}mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")}
        for part in ("gate", "up"):
            torch.testing.assert_close(found[names[part]], received["mlp"].square().mean(0), **close)
        gate, up = (received["mlp"] @ weights[names[part]].float().T for part in ("gate", "up"))
        hidden = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(found[names["down"]], hidden.square().mean(0), **close)
    # As tools/imatrix does it: nothing for the head, nor for what is never rounded.
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in found)


def test_an_expert_that_no_token_chose_weighs_all_columns_alike(rival, tiny):
    folder = tiny("olmoe", num_experts=16, num_experts_per_tok=1)
    found = rival.importance(folder, [torch.tensor([[1, 2, 3]])])
    experts = [value for name, value in found.items() if name.endswith("layers.0.mlp.experts.0.up_proj.weight")]
    experts += [value for name, value in found.items() if ".mlp.experts." in name and "down" in name]
    ones = [bool((value == 1).all()) for value in experts]
    assert any(ones)
    assert not all(ones)


@pytest.mark.long
def test_what_the_library_writes_is_read_as_gguf_reads_it_and_the_importance_matrix_counts(rival, library):
    rival.check_library(library)
    with pytest.raises(ValueError, match="40 columns are no whole blocks of Q4_0"):
        library.quantise(torch.ones(2, 40), "Q4_0")
    with pytest.raises(ValueError, match=r"an importance of shape \(3,\) for 64 columns"):
        library.quantise(torch.ones(2, 64), "Q4_0", torch.ones(3))


def test_a_check_that_cannot_fail_is_none(rival, library, monkeypatch):
    monkeypatch.setattr(rival, "FORMATS", {"Q4_0": "Q4_0"})
    monkeypatch.setattr(rival, "STANDS_IN", {})
    quantise, dequantise = library.quantise, library.dequantise
    rival.check_library(library)
    monkeypatch.setattr(library, "quantise", lambda weight, kind, weighing=None: quantise(weight, kind))
    with pytest.raises(RuntimeError, match="Q4_0: the importance matrix does not lower"):
        rival.check_library(library)
    monkeypatch.setattr(library, "quantise", quantise)
    monkeypatch.setattr(library, "dequantise", lambda bytes_RK, kind: dequantise(bytes_RK, kind) * 1.001)
    with pytest.raises(RuntimeError, match="Q4_0 is read otherwise than gguf reads it"):
        rival.check_library(library)


def test_a_rival_is_the_model_with_rounded_matrices(rival, script, library, tiny, tmp_path):
    checkpoint = Checkpoint.open(tiny("olmoe", hidden_size=64, intermediate_size=32))
    tensors = rival.gguf_tensors(checkpoint)
    types = rival.types_of(tensors, rival.Shape.of(checkpoint.config), "Q4_K_M")
    script.write_rival(checkpoint, tensors, types, {}, library, tmp_path / "rival")
    written, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "rival", checkpoint.path))
    for tensor in tensors:
        for name in tensor.names:
            error = float((written[name] - plain[name].float()).square().mean() / plain[name].float().square().mean())
            assert error == 0 if types[tensor.name] == "F32" else 0 < error < 0.003, (name, types[tensor.name], error)


@pytest.mark.long
def test_ours_take_no_more_bytes_and_rows_are_kept(script, rival, library, tiny, text, tmp_path, monkeypatch, capsys):
    folder = tiny("olmoe", hidden_size=64, intermediate_size=32)
    outputs = ("--markdown", tmp_path / "table.md", "--json", tmp_path / "rows.json")
    line = ("bits.py", "--models", folder, tmp_path / "none", "--formats", "Q8_0", "Q4_K_M", "--text", text, "--test",
            text, "--tokens", 512, "--test-tokens", 256, "--seq-len", 32, *outputs)  # fmt: skip
    monkeypatch.setattr(script, "open_library", lambda: library)

    def run(*more):
        monkeypatch.setattr("sys.argv", [str(part) for part in (*line, *more)])
        script.main()
        return json.loads((tmp_path / "rows.json").read_text())["rows"]

    rows = run("--shares", 0.4, "--recipes", "nearest", "coterie-bits")
    shown = capsys.readouterr().out
    assert shown.endswith((tmp_path / "table.md").read_text())
    assert [(row["recipe"], row["format"]) for row in rows] == [
        *(("llama.cpp", name) for name in ("Q8_0", "Q4_K_M")),
        *((recipe, name) for recipe in ("nearest", "coterie-bits") for name in ("Q8_0", "Q4_K_M", "0.4 of bf16")),
    ]
    assert [row.get("expected") is not None for row in rows] == [row["recipe"] == "coterie-bits" for row in rows]
    checkpoint = Checkpoint.open(folder)
    tensors = rival.gguf_tensors(checkpoint)
    for row in rows:
        assert row["kl"] > 0
        assert row["seconds"] > 0
        if row["format"] not in rival.FORMATS:
            assert 0.3 < row["share"] <= 0.4
            continue
        types = rival.types_of(tensors, rival.Shape.of(checkpoint.config), row["format"])
        most = sum(tensor.num_bytes(types[tensor.name]) for tensor in tensors)
        assert row["bytes"] == most if row["recipe"] == "llama.cpp" else 0.8 * most < row["bytes"] <= most
    # The same again: nothing is made; then one recipe is.
    monkeypatch.setattr(script, "compress", None)
    assert run("--shares", 0.4, "--recipes", "nearest", "coterie-bits") == rows
    with pytest.raises(TypeError):
        run("--recipes", "nearest", "--again", "nearest")
    assert [row["recipe"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [
        row["recipe"] for row in rows if row["recipe"] != "nearest"
    ]


def test_a_table_tells_ours_by_the_rival(script):
    def row(recipe, name, kl, error=0.001):
        return {"model": "m", "format": name, "recipe": recipe, "bytes": 2000, "share": 0.25, "kl": kl,
                "kl_error": error, "agreement": 0.9}  # fmt: skip

    rows = [row("llama.cpp", "Q2_K", 0.1), row("gptq", "Q2_K", 0.05), row("gptq", "Q2_K", 0.07), row("gptq", "Q8_0", 1)]
    rows += [row("llama.cpp", "Q8_0", 0.0005, None), row("nearest", "Q2_K", None)]
    assert list(script.tables(rows, ["Q8_0", "Q2_K"], ["nearest", "gptq"])) == [
        "**m**",
        "",
        "| format | bytes | of bf16 | llama.cpp KL | top-1 | gptq KL | top-1 | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| Q8_0 | 2,000 | 0.250 | 0.00050 | 0.900 | 1.0000 ± 0.00100 | 0.900 | 2000.00 |",
        "| Q2_K | 2,000 | 0.250 | 0.1000 ± 0.00100 | 0.900 | 0.0600 ± 0.00100 | 0.900 | 0.60 |",
        "",
    ]


def test_a_table_shows_sizes_of_no_format_and_what_was_expected(script):
    def row(recipe, name, kl, expected=None):
        return {"model": "m", "format": name, "recipe": recipe, "bytes": 1000, "share": 0.16, "kl": kl,
                "kl_error": None, "agreement": 0.9, "expected": expected}  # fmt: skip

    rows = [row("coterie-bits", "0.16 of bf16", 0.1, 0.08), row("coterie-bits", "0.16 of bf16", 0.2, 0.1)]
    rows += [row("gptq", "0.16 of bf16", 0.3)]
    assert list(script.tables(rows, ["Q8_0", script.share_name(0.16)], ["gptq", "coterie-bits"])) == [
        "**m**",
        "",
        "| format | bytes | of bf16 | llama.cpp KL | top-1 | gptq KL | top-1 | ratio | coterie-bits KL | top-1 | ratio "
        "| expected |",
        f"| --- |{' ---: |' * 11}",
        "| 0.16 of bf16 | 1,000 | 0.160 | - | - | 0.3000 | 0.900 | - | 0.1500 | 0.900 | - | 0.0900 |",
        "",
    ]


@pytest.mark.long
def test_experts_alone_are_compared_at_their_own_bytes(script, tmp_path, text, capsys, monkeypatch):
    model = tiny_checkpoint(
        tmp_path / "model", "qwen3_moe", hidden_size=256, moe_intermediate_size=256, dtype=torch.bfloat16
    )
    line = f"--models {model} --formats --expert-shares 0.3 --recipes coterie-bits pmq --text {text} --test {text}"
    line += f" --tokens 512 --test-tokens 256 --seq-len 32 --json {tmp_path / 'rows.json'}"
    monkeypatch.setattr("sys.argv", ["bits.py", *line.split()])
    script.main()
    rows = {(row["format"], row["recipe"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    for recipe in ("coterie-bits", "pmq"):
        row = rows["0.3 of experts", recipe]
        assert 0.25 < row["share"] <= 0.3
        assert sum(row["types"].values()) % 3 == 0  # gate, up and down of experts; with the ten others it would not be
    assert "| 0.3 of experts |" in capsys.readouterr().out
