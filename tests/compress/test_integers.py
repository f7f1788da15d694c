"""Results that stock loaders load: integers as compressed-tensors stores them, from end to end."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file

import coterie.compress.decide as decide_module
import coterie.compress.layers as layers_module
import coterie.compress.stock as stock_module
from checkpoints import tensors_of, weight_digests
from coterie.cli.plan import print_plan
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.dry_run import dry_run
from coterie.compress.integers import compressed_config
from coterie.compress.plan import Plan
from coterie.compress.source import Source
from coterie.errors import Infeasible, InputError, ReloadMismatch, UnknownName
from coterie.evaluate.run import evaluate
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 128, "seq_len": 32}

#: Those that transformers loads, each with its own names on disk; with shared experts, dense layers, low ranks.
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "olmoe": {"intermediate_size": 64},
    "mixtral": {"intermediate_size": 64},
    "deepseek_v3": {"moe_intermediate_size": 64},
    "glm4_moe": {"moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64},
}
EVERY = [name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]

there = importlib.util.find_spec("compressed_tensors") is not None
stock = pytest.mark.skipif(not there, reason="the package compressed-tensors is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_folder):
    """Return a factory of (model, result), each made once."""
    folder, done = tmp_path_factory.mktemp("integers"), {}

    def make(family="qwen3_moe", type_="INT4", recipe="nearest", **changes):
        key = repr((family, type_, recipe, changes))
        if key not in done:
            number = len(done)
            sizes = {"hidden_size": 64, **FAMILIES[family], **changes}
            model = tiny_checkpoint(folder / f"{number}-model", family, **{"dtype": torch.bfloat16, **sizes})
            out = compress(model, folder / f"{number}-out", recipe=recipe, type=type_, text=text_folder, **TEXT)
            done[key] = (model, out)
        return done[key]

    return make


@pytest.fixture(scope="module")
def small(made):
    return made()[0]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def errors(model, out):
    """Return how far each matrix of experts and linear modules is from what it was, by its length, and all others."""
    before = load_model(model, dtype=torch.float32).state_dict()
    after = load_model(out, dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    return {name: float((before[name] - after[name]).norm() / before[name].norm()) for name in before}


def in_stock(folder, **options):
    """Return the parameters of a result as transformers has them once it ran, and what it said as it loaded."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    with torch.no_grad():
        model(input_ids=torch.arange(4)[None])
    return model.state_dict(), {key: value for key, value in said.items() if value}


def check_stock_numbers(folder):
    """Compare all that transformers has with Coterie's own reader, which knows nothing of the other."""
    theirs, said = in_stock(folder)
    assert said == {}
    ours = load_model(folder, dtype=torch.float32).state_dict()
    assert {name for name in theirs if not name.endswith(("weight_scale", "weight_shape"))} == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].float(), tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("type_", ["INT4", pytest.param("INT8", marks=pytest.mark.long)])
@pytest.mark.parametrize("family", EVERY)
def test_every_weight_is_near_to_what_it_was_and_in_its_place(family, type_, made):
    model, result = made(family, type_)
    distances = errors(model, result.out)
    limit = {"INT4": 0.12, "INT8": 0.012}[type_]
    assert 0.001 < max(distances.values()) < limit
    experts = [name for name in distances if re.search(r"experts\.(gate_up|down)_proj", name)]
    assert experts
    assert min(distances[name] for name in experts) > 0.001
    plain = [name for name in distances if re.search(r"norm|embed|lm_head|\.gate\.|shared_expert_gate|bias", name)]
    assert not any(distances[name] for name in plain)
    assert result.logits_error <= 1e-6
    assert result.manifest.form is ResultForm.COMPRESSED_TENSORS
    assert result.manifest.loads_with == "transformers"
    if not there:
        assert "compressed-tensors is not installed" in result.manifest.left_out["loading with transformers"]


@pytest.mark.parametrize("family", EVERY)
def test_the_files_hold_the_bytes_that_the_plan_said(family, made):
    _, result = made(family)
    in_files = 0
    for file in result.out.glob("*.safetensors"):
        raw = file.read_bytes()
        in_files += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert in_files == result.plan.predicted_bytes == result.manifest.bytes_after
    assert result.plan.predicted_bytes < 0.4 * result.plan.original_bytes


@stock
@pytest.mark.parametrize("type_", ["INT4", pytest.param("INT8", marks=pytest.mark.long)])
@pytest.mark.parametrize("family", EVERY)
def test_transformers_loads_the_same_numbers(family, type_, made):
    _, result = made(family, type_)
    check_stock_numbers(result.out)
    assert result.manifest.left_out == {}


def test_what_config_json_says(made):
    _, result = made()
    config = config_of(result.out)
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["num_bits"] == 4
    assert group["weights"]["group_size"] == 64
    assert config["ignore"] == ["lm_head", r"re:.*\.mlp\.gate$"]
    assert config["format"] == "pack-quantized"
    assert config["kv_cache_scheme"] is None
    assert "auto_map" not in json.loads((result.out / "config.json").read_text())
    assert not (result.out / "modeling_coterie.py").exists()
    tensors = Checkpoint.open(result.out).tensors
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    assert name not in tensors
    stored = {suffix: tensors[f"{name}_{suffix}"] for suffix in ("packed", "scale", "shape")}
    assert {suffix: (info.dtype, info.shape) for suffix, info in stored.items()} == {
        "packed": ("I32", (64, 8)), "scale": ("BF16", (64, 1)), "shape": ("I64", (2,)),
    }  # fmt: skip


@pytest.mark.long
def test_what_stays_plain_is_named_and_nothing_else(made):
    model, result = made("deepseek_v3")
    patterns = config_of(result.out)["ignore"]
    taken = {name.removesuffix("_packed") for name in Checkpoint.open(result.out).tensors if name.endswith("_packed")}
    for name, tensor in tensors_of(model).items():
        module = name.removesuffix(".weight")
        matched = module in patterns or any(
            re.match(pattern.removeprefix("re:"), module) for pattern in patterns if pattern.startswith("re:")
        )
        linear = tensor.ndim == 2 and "embed" not in name
        assert matched == (linear and name not in taken), name


@pytest.mark.long
def test_prediction_layers_stay_plain_and_are_named_as_such(made, text_folder, tmp_path):
    """Their matrices are called like those of a layer, which are packed."""
    model = shutil.copytree(made("deepseek_v3")[0], tmp_path / "model")
    config, tensors = json.loads((model / "config.json").read_text()), tensors_of(model)
    number = config["num_hidden_layers"]
    base, prefix = f"model.layers.{number - 1}.", f"model.layers.{number}."
    tensors |= {name.replace(base, prefix): each.clone() for name, each in tensors.items() if name.startswith(base)}
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    result = compress(model, tmp_path / "out", recipe="nearest", type="INT4", text=text_folder, **TEXT)
    written = tensors_of(result.out)
    plain = {name for name in tensors if name.startswith(prefix)}
    assert {name for name in written if name.startswith(prefix)} == plain
    assert all(torch.equal(written[name], tensors[name]) for name in plain)
    ignored = config_of(result.out)["ignore"]
    assert rf"re:model\.layers\.{number}\.mlp\.experts\.\d+\.up_proj$" in ignored
    assert r"re:.*\.eh_proj$" in ignored
    if there:
        assert result.manifest.left_out == {}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.float16])
def test_models_in_other_number_formats(dtype, tied, made):
    """Scales are bfloat16 whatever the model is in; what is read differs from what transformers has by a rounding."""
    model, result = made(dtype=dtype, tie_word_embeddings=tied)
    assert 0.01 < max(errors(model, result.out).values()) < 0.12
    assert result.logits_error <= 1e-6
    if there:
        assert result.manifest.left_out == {}


@pytest.mark.parametrize("recipe", [pytest.param("gptq", marks=pytest.mark.long), "gptaq"])
def test_codes_are_chosen_by_what_comes_in(recipe, made):
    _, plain = made()
    model, result = made(recipe=recipe)
    assert 0.001 < max(errors(model, result.out).values()) < 0.5
    assert weight_digests(result.out) != weight_digests(plain.out)
    if there:
        check_stock_numbers(result.out)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(made, text_folder, tmp_path, monkeypatch):
    model, whole = made(recipe="gptaq")
    real, done = layers_module.write_shard, []

    def once(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(layers_module, "write_shard", once)
    settings = {"recipe": "gptaq", "type": "int4", "text": text_folder, **TEXT}
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", **settings)
    monkeypatch.undo()
    again = compress(model, tmp_path / "out", **settings)
    assert weight_digests(again.out) == weight_digests(whole.out)
    assert again.manifest == whole.manifest


def test_evaluate_and_the_card_know_it(made, text_folder, tmp_path):
    model, result = made()
    (card,) = evaluate([result.out], against=model, text=text_folder, tokens=64, seq_len=32)
    assert card.num_bytes == result.plan.predicted_bytes
    text = (result.out / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text
    assert "library_name: transformers" in text
    assert "package `compressed-tensors`" in text
    assert "--type INT4" in text


def test_a_dry_run_says_the_bytes_and_whether_transformers_will_load_it(small, text_folder, tmp_path):
    told = dry_run(small, tmp_path / "out", recipe="nearest", type="INT8", text=text_folder, **TEXT)
    assert told.outlook.disk["the result"] == told.plan.predicted_bytes
    assert not (tmp_path / "out").exists()
    names = [stage.name for stage in told.outlook.memory.stages]
    assert ("loading with transformers" in names) is there
    assert ("loading with transformers" in told.left_out) is not there


# What cannot be, or loads in vLLM alone.


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("granitemoe", marks=pytest.mark.long)])
def test_experts_in_one_tensor_are_refused(family, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", family, hidden_size=64, intermediate_size=64)
    with pytest.raises(Infeasible, match=r"lie together in one tensor.*take a type of GGML, such as Q4_0"):
        plan(model, type="INT4", recipe="nearest")


@pytest.mark.parametrize("family", ["kimi_linear", pytest.param("bailing_hybrid", marks=pytest.mark.long)])
def test_other_tensors_that_transformers_would_put_together_are_refused(family, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", family, hidden_size=64, moe_intermediate_size=64)
    with pytest.raises(Infeasible, match=r"self_attn.conv1d.weight is put together from 3 tensors, such as .*k_conv1d"):
        plan(model, type="INT4", recipe="nearest")


def test_widths_that_no_group_divides_are_refused(small, tmp_path):
    narrow = tiny_checkpoint(tmp_path / "narrow", "qwen3_moe", hidden_size=64, moe_intermediate_size=48)
    with pytest.raises(Infeasible, match=r"down_proj.weight have 48 numbers, which are no whole groups of 32: take a"):
        plan(narrow, type="INT4", recipe="nearest")
    with pytest.raises(Infeasible, match=r"have 64 numbers, which are no whole groups of 128: take INT8_G64"):
        plan(small, type="INT8_G128", recipe="nearest")
    with pytest.raises(UnknownName, match="INT3"):
        plan(small, type="INT3", recipe="nearest")


def test_a_budget_takes_the_largest_type_that_fits(small):
    def decided(**target):
        return plan(small, target="compressed-tensors", **target)

    sizes = {name: plan(small, type=name) for name in ("INT8_G32", "INT8_G64", "INT4_G32", "INT4_G64")}
    sizes = {name: each.predicted_bytes for name, each in sizes.items()}
    assert list(sizes) == sorted(sizes, key=sizes.__getitem__, reverse=True)
    for name, size in sizes.items():
        chosen = decided(budget=size)
        assert (set(chosen.types.values()), chosen.predicted_bytes) == ({name}, size)
        assert chosen.recipe == "gptaq"
    with pytest.raises(Infeasible, match="the smallest type takes"):
        decided(budget=sizes["INT4_G64"] - 1)
    assert set(decided(bits=8.3).types.values()) == {"INT8_G64"}
    assert set(decided(bits=5).types.values()) == {"INT4_G32"}
    with pytest.raises(Infeasible, match=r"--bits 4\.2 cannot be met .* INT4_G64 takes 4\.25 a number"):
        decided(bits=4.2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "INT4", "target": "gguf"}, "--type INT4 is for transformers and vLLM: take --target compressed-"),
        ({"type": "Q4_K", "target": "compressed-tensors"}, "--type Q4_K is a type of GGML"),
        ({"budget": "1MB", "target": "compressed-tensors", "recipe": "coterie-bits"}, "take nearest, gptq or gptaq$"),
        ({"keep": 0.5, "target": "compressed-tensors"}, "is about weights in fewer bits"),
        ({"type": "INT4", "recipe": "reap"}, "take a recipe that stores weights in fewer bits"),
    ],
)
def test_targets_types_and_recipes_that_do_not_go_together_are_refused(settings, words, small):
    with pytest.raises(InputError, match=words):
        plan(small, **settings)


def test_linear_modules_that_no_group_divides_stay_plain(tmp_path):
    model = tiny_checkpoint(
        tmp_path / "model", "qwen2_moe", hidden_size=64, moe_intermediate_size=64, shared_expert_intermediate_size=24
    )
    types = plan(model, type="INT4", recipe="nearest").types
    shared = "model.layers.0.mlp.shared_expert.{}_proj.weight"
    assert types[shared.format("up")] == "INT4_G64"
    assert shared.format("down") not in types
    ignored = compressed_config(Source.open(model), types)["ignore"]
    assert {r"re:.*\.mlp\.shared_expert\.down_proj$", r"re:.*\.mlp\.shared_expert_gate$"} <= set(ignored)


EXPERTS = "model.layers.{}.mlp.experts.*.{}_proj.weight"


def of_layer(layer, kind):
    return {EXPERTS.format(layer, part): kind for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": "Q8_0"}, "q_proj.weight as Q8_0 and model.*integers are for"),
        ({EXPERTS.format(1, "down"): "INT8_G64"}, "layer 1: the plan stores .*as INT8_G64 and .*as INT4_G64; all proj"),
        ({EXPERTS.format(1, "down"): None}, "layer 1: the plan stores .*down_proj.weight as plain numbers; all proj"),
        ({EXPERTS.format(0, "down").replace("*", "3"): "INT4_G32"}, "layer 0: the plan stores .*INT4_G32"),
        ({**of_layer(0, None), **of_layer(1, None)}, "leaves all experts plain numbers"),
        ({"lm_head.weight": "INT8_G64"}, "lm_head.weight, an embedding or a head"),
        ({"model.layers.1.self_attn.q_proj.weight": "INT8_G64"}, "linear modules that are no experts have one type"),
        ({EXPERTS.format(0, "down"): "INT4_G64.W"}, r"down_proj.weight as INT4_G64\.W; types that can be written are"),
        ({EXPERTS.format(0, "up"): "INT4_G128"}, "INT4_G128, in blocks of 128; its rows have 64 numbers"),
    ],
)  # fmt: skip
def test_plans_that_nothing_loads_are_refused(changes, words, small, text_folder, tmp_path):
    decided = plan(small, type="INT4", recipe="nearest")
    types = {name: kind for name, kind in {**decided.types, **changes}.items() if kind is not None}
    with pytest.raises(Infeasible, match=words):
        compress(small, tmp_path / "out", plan=replace(decided, types=types), text=text_folder, **TEXT)
    assert not (tmp_path / "out").exists()


def test_training_in_blocks_is_not_for_integers(small, text_folder, tmp_path):
    decided = plan(small, type="INT4", recipe="nearest")
    with pytest.raises(Infeasible, match=r"distill-blocks trains .*float16"):
        compress(
            small, tmp_path / "out", plan=replace(decided, result_steps=(("distill-blocks", {}),)), text=text_folder,
            **TEXT,
        )  # fmt: skip


def test_other_linear_modules_may_have_a_type_of_their_own(small, text_folder, tmp_path):
    decided = plan(small, type="INT4", recipe="nearest")
    types = {name: "INT8_G32" if "self_attn" in name else kind for name, kind in decided.types.items()}
    result = compress(small, tmp_path / "out", plan=replace(decided, types=types), text=text_folder, **TEXT)
    assert result.manifest.form is ResultForm.COMPRESSED_TENSORS
    distances = errors(small, result.out)
    assert max(each for name, each in distances.items() if "self_attn" in name) < 0.012
    assert max(each for name, each in distances.items() if "experts" in name) > 0.03
    if there:
        check_stock_numbers(result.out)


@pytest.mark.parametrize("second", ["INT8_G32", pytest.param(None, marks=pytest.mark.long)])
def test_layers_that_differ_are_for_vllm_alone_and_said_to_be(second, small, text_folder, tmp_path, capsys):
    decided = plan(small, type="INT4", recipe="nearest")
    types = {**decided.types, **of_layer(1, second)}
    types = {name: kind for name, kind in types.items() if kind is not None}
    result = compress(small, tmp_path / "out", plan=replace(decided, types=types), text=text_folder, **TEXT)
    assert result.manifest.form is ResultForm.COMPRESSED_TENSORS_BY_LAYER
    assert result.manifest.loads_with == "vllm"
    assert result.manifest.how_to_load("out") == "vllm.LLM('out')"
    assert "vLLM loads" in result.manifest.left_out["loading with transformers"]
    assert Manifest.read(result.out) == result.manifest
    assert Plan.from_body(result.plan.body(), result.plan.inputs, where="there") == result.plan
    print_plan(result.plan)
    assert "vLLM alone loads that" in capsys.readouterr().out
    assert "transformers does not" in (result.out / "README.md").read_text()
    distances = errors(small, result.out)
    of_second = [each for name, each in distances.items() if "layers.1.mlp.experts" in name]
    assert max(of_second) < 0.012 if second else max(of_second) == 0
    assert max(each for name, each in distances.items() if "layers.0.mlp.experts" in name) > 0.03
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes


@stock
def test_what_transformers_would_load_wrongly_is_found(small, text_folder, tmp_path, monkeypatch):
    """Four bits, then eight by layer: it loads without a word, and experts are other numbers."""
    decided = plan(small, type="INT4", recipe="nearest")
    mixed = replace(decided, types={**decided.types, **of_layer(1, "INT8_G64")})
    result = compress(small, tmp_path / "mixed", plan=mixed, text=text_folder, **TEXT)
    try:
        _, said = in_stock(result.out)
    except Exception:  # later versions may refuse it
        said = {}
    assert said == {}
    monkeypatch.setattr(decide_module, "loader_of", lambda weights, types: "transformers")
    with pytest.raises(ReloadMismatch, match=r"in transformers|transformers does not load|transformers loads what"):
        compress(small, tmp_path / "out", plan=mixed, text=text_folder, **TEXT)
    assert not (tmp_path / "out").exists()


@stock
def test_numbers_that_were_changed_after_they_were_written_are_found(made, tmp_path):
    _, result = made()
    shutil.copytree(result.out, tmp_path / "out")
    ours = load_model(result.out, dtype=torch.float32).state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    stock_module._compare(name, ours[name], ours[name].bfloat16())
    with pytest.raises(ReloadMismatch, match=f"{name} loads as other numbers in transformers, off by up to"):
        stock_module._compare(name, ours[name], ours[name].roll(1, 0))
    with pytest.raises(ReloadMismatch, match="there is no such tensor"):
        stock_module._compare(name, ours[name], None)
