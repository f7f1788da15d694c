"""Weights in fewer bits, from end to end: the right bytes in the right places, whatever way a family stores experts."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file

import coterie.compress.apply as apply_module
import coterie.compress.layers as layers_module
from checkpoints import tensors_of, weight_digests
from coterie.compress.apply import compress
from coterie.compress.damages import DamageMeter
from coterie.compress.decide import plan
from coterie.compress.dry_run import dry_run
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.pack import Packer
from coterie.compress.pack_forecast import MOMENTS, PackForecast
from coterie.compress.plan import Plan
from coterie.compress.source import Source
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.evaluate.run import evaluate
from coterie.evaluate.speed import memory_in_use, peak_memory
from coterie.model.arch.inspect import inspect
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import SIZES
from coterie.model.disk.manifest import ResultForm
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream.memory import FIXED_BYTES
from coterie.testing import tiny_checkpoint

#: Each way to lay out experts: alone, fused, transposed and interleaved with biases, beside shared ones, in a hybrid;
#: either way round on disk; a linear module that is called by itself; towers that text does not pass; a router of
#: several layers.
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "olmoe": {"intermediate_size": 64},
    "mixtral": {"intermediate_size": 64},
    "granitemoe": {"intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64},
    "deepseek_v3": {"moe_intermediate_size": 64},
    "glm4_moe": {"moe_intermediate_size": 64},
    "qwen3_next": {"moe_intermediate_size": 64},
    "qwen3_vl_moe": {"moe_intermediate_size": 64},
    "gemma4_text": {"moe_intermediate_size": 64},
    "muse_spark": {"hidden_size": 32, "moe_intermediate_size": 64, "moe_hidden_size": 32},
    "zaya": {"moe_intermediate_size": 64, "router_hidden_size": 32},
}
TEXT = {"tokens": 128, "seq_len": 32}

#: Those that run every time; the others take their seconds where all are asked for.
QUICK = ("qwen3_moe", "gpt_oss", "granitemoe")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_folder):
    """Return a factory of (model, result), each made once."""
    folder, done = tmp_path_factory.mktemp("packed"), {}

    def make(family="qwen3_moe", recipe="nearest", *, dtype=torch.float32, target=None, **changes):
        key = repr((family, recipe, dtype, target, changes))
        if key not in done:
            number = len(done)
            sizes = {"hidden_size": 64, **FAMILIES[family], **changes}
            model = tiny_checkpoint(folder / f"{number}-model", family, dtype=dtype, **sizes)
            settings = {"type": "Q8_0"} if target is None else target
            out = compress(model, folder / f"{number}-out", recipe=recipe, text=text_folder, **TEXT, **settings)
            done[key] = (model, out)
        return done[key]

    return make


def furthest(original, packed):
    """Return the largest distance of a row from what it was, by its length, and the name of the tensor."""
    worst = (0.0, "")
    for name, tensor in original.items():
        rows, others = tensor.double(), packed[name].double()
        distance = (rows - others).norm(dim=-1) / rows.norm(dim=-1).clamp(min=1e-9)
        worst = max(worst, (float(distance.max()), name))
    return worst


def states(model, out):
    """Return the tensors of both by name in memory, as all load them."""
    return load_model(model, dtype=torch.float32).state_dict(), load_model(out, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("family", EVERY)
def test_every_weight_is_near_to_what_it_was_and_in_its_place(family, made):
    """Eight bits are off by less than a hundredth; gate in the place of up, or a row moved, by as much as there is."""
    model, result = made(family)
    original, packed = states(model, result.out)
    assert original.keys() == packed.keys()
    far, name = furthest(original, packed)
    assert 1e-4 < far < 0.01, name
    assert result.manifest.form is ResultForm.PACKED
    assert result.logits_error <= 1e-6
    stored, read = Checkpoint.open(result.out), open_checkpoint(result.out)
    plain = {name for name, info in stored.tensors.items() if info.dtype != "U8"}
    given = {name: info.shape for name, info in Checkpoint.open(model).tensors.items()}
    assert {name: info.shape for name, info in read.tensors.items()} == given
    for name in plain:  # norms, biases, routers and what is no multiple of 32 wide stay what they are, to the bit
        with Checkpoint.open(model).reader() as first, stored.reader() as second:
            assert torch.equal(first.read(name), second.read(name)), name
    experts = [name for name in given if ".experts" in name or "block_sparse_moe." in name]
    left = [name for name in experts if name in plain and not re.search("bias|router|norm", name)]
    assert [name for name in left if "gate.weight" not in name] == []


@pytest.mark.parametrize("family", EVERY)
def test_the_files_hold_the_bytes_that_the_plan_said(family, made):
    _, result = made(family)
    infos = Checkpoint.open(result.out).tensors.values()
    in_files = 0
    for file in result.out.glob("*.safetensors"):
        raw = file.read_bytes()
        in_files += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert in_files == sum(info.num_bytes for info in infos) == result.plan.predicted_bytes
    assert result.manifest.bytes_after == result.plan.predicted_bytes
    assert result.plan.predicted_bytes < 0.4 * result.plan.original_bytes


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stock_loaders_refuse_it(family, made):
    _, result = made(family)
    with pytest.raises((ValueError, RuntimeError)):
        transformers.AutoModelForCausalLM.from_pretrained(result.out)
    assert result.manifest.loads_with == "coterie"
    assert "coterie.load_model" in result.manifest.how_to_load(result.out)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_embeddings(tied, made):
    """A head gets six bits at least; codes of a head of its own are chosen by what comes into it."""
    model, result = made("qwen3_moe", "gptq", target={"type": "Q4_0"}, tie_word_embeddings=tied)
    types = result.plan.types
    assert types["model.embed_tokens.weight"] == ("Q8_0" if tied else "Q4_0")
    assert ("lm_head.weight" in types) is not tied
    original, packed = states(model, result.out)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert furthest({name: original[name] for name in names}, packed)[0] < 0.15
    if tied:
        assert torch.equal(packed[names[0]], packed[names[1]])
    else:
        assert types["lm_head.weight"] == "Q8_0"


def test_what_comes_into_the_head_decides_its_codes(made):
    _, plain = made("qwen3_moe", "nearest")
    _, other = made("qwen3_moe", "gptq", target={"type": "Q8_0"})
    heads = []
    for result in (plain, other):
        with Checkpoint.open(result.out).reader() as reader:
            heads.append(reader.read("lm_head.weight"))
    assert not torch.equal(*heads)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["gptaq", pytest.param("coterie-bits", marks=pytest.mark.long)])
def test_other_recipes_write_what_they_said_and_what_loads(recipe, made):
    target = {"bits": 5.5, "train_tokens": 256} if recipe == "coterie-bits" else {"type": "Q4_0"}
    model, result = made("olmoe", recipe, target=target, dtype=torch.bfloat16)
    original, packed = states(model, result.out)
    assert furthest(original, packed)[0] < 0.5
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes
    assert result.logits_error <= 1e-6
    if recipe == "coterie-bits":
        assert len(set(result.plan.types.values())) > 1
        weights = sum(info.num_elements for info in Checkpoint.open(model).tensors.values())
        assert result.plan.predicted_bytes <= weights * 5.5 / 8 * 1.1
        assert result.plan.damage > 0


@pytest.mark.parametrize(("kind", "hidden"), [("Q4_K", 256), pytest.param("IQ3_XXS", 256, marks=pytest.mark.long)])
def test_wide_blocks_go_where_they_fit(kind, hidden, made):
    """Rows of 256 get the type, those of 64 what stands in for it."""
    model, result = made("qwen3_moe", target={"type": kind}, hidden_size=hidden, num_hidden_layers=1, num_experts=4)
    found = {name.rpartition("experts.*.")[2]: kind for name, kind in result.plan.types.items() if "experts" in name}
    narrow = {"Q4_K": "Q5_0", "IQ3_XXS": "IQ4_NL"}[kind]
    assert found == {"gate_proj.weight": kind, "up_proj.weight": kind, "down_proj.weight": narrow}
    original, packed = states(model, result.out)
    assert furthest(original, packed)[0] < 0.4


# What the tools say of it.


def test_inspect_says_what_is_on_the_disk_and_what_it_stands_for(made):
    model, result = made()
    before, after = inspect(model), inspect(result.out)
    assert sum(amount.bytes for amount in after.parts.values()) == result.plan.predicted_bytes
    assert {part: amount.parameters for part, amount in after.parts.items()} == {
        part: amount.parameters for part, amount in before.parts.items()
    }
    assert after.active_parameters == before.active_parameters
    assert inspect(result.out, budget="1MiB").budget.feasible
    assert [(layer.num_experts, layer.width, layer.hidden_size) for layer in after.moe_layers] == [
        (layer.num_experts, layer.width, layer.hidden_size) for layer in before.moe_layers
    ]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_moe"])
@pytest.mark.long
def test_inspect_of_every_layout(family, made):
    model, result = made(family)
    before, after = inspect(model), inspect(result.out)
    assert {part: amount.parameters for part, amount in after.parts.items()} == {
        part: amount.parameters for part, amount in before.parts.items()
    }
    assert sum(amount.bytes for amount in after.parts.values()) == result.plan.predicted_bytes


@pytest.mark.long
def test_evaluate_report_and_card_know_its_bytes(made, text_folder, tmp_path):
    from coterie.amounts import format_bytes
    from coterie.evaluate.card import card as write_card
    from coterie.evaluate.run import evaluate
    from coterie.report.page import report

    model, result = made()
    run = tmp_path / "run"
    shutil.copytree(result.out, run / "out")
    (card,) = evaluate([run / "out"], against=model, text=text_folder, tokens=128, seq_len=32)
    card.save(run / "out.json")
    assert card.num_bytes == result.plan.predicted_bytes
    assert card.bytes_ratio == pytest.approx(result.plan.predicted_bytes / result.plan.original_bytes)
    text = write_card(run / "out", scorecard=card).read_text()
    assert "coterie.load_model" in text
    page = report(run).read_text()
    for each in (text, page):
        assert format_bytes(result.plan.predicted_bytes) in each


def test_it_is_not_compressed_again(made, text_folder, tmp_path):
    _, result = made()
    with pytest.raises(InputError, match="is a packed result; compress the model that it was made from"):
        compress(result.out, tmp_path / "out", recipe="reap", keep=0.5, text=text_folder)


# Plans.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 64}
    return tiny_checkpoint(tmp_path_factory.mktemp("small") / "model", "qwen3_moe", **sizes)


def test_a_plan_edited_by_hand_is_what_is_done(small, text_folder, tmp_path):
    """Types may differ by tensor, and what is left out stays as it is, be it a whole layer."""
    file = plan(small, type="Q8_0", recipe="nearest").save(tmp_path / "plan.json")
    content = json.loads(file.read_text())
    types = content["body"]["types"] if "body" in content else content["types"]
    gone = [name for name in types if ".layers.1." in name]
    for name in gone:
        del types[name]
    types["model.layers.0.mlp.experts.*.gate_proj.weight"] = "Q4_0"
    del types["model.embed_tokens.weight"]
    file.write_text(json.dumps(content))
    result = compress(small, tmp_path / "out", plan=file, text=text_folder, **TEXT)
    assert result.plan.types == types
    assert result.logits_error <= 1e-6
    stored = Checkpoint.open(result.out)
    assert stored.num_bytes == result.plan.predicted_bytes
    sizes = {name: info.shape[-1] for name, info in stored.tensors.items() if info.dtype == "U8"}
    assert sizes["model.layers.0.mlp.experts.3.gate_proj.weight"] == 2 * 18
    assert sizes["model.layers.0.mlp.experts.3.up_proj.weight"] == 2 * 34
    assert not [name for name in sizes if ".layers.1." in name]
    original, packed = states(small, result.out)
    assert furthest(original, packed)[0] < 0.2


@pytest.mark.parametrize("recipe", ["nearest", pytest.param("gptaq", marks=pytest.mark.long)])
def test_types_may_differ_between_the_experts_of_a_layer(recipe, small, text_folder, tmp_path):
    """One that is named itself gets its own type, the others that of the star; or one stays plain."""
    whole = plan(small, type="Q8_0", recipe=recipe)
    experts = "model.layers.0.mlp.experts"
    types = {
        **whole.types,
        f"{experts}.1.gate_proj.weight": "Q4_0",
        f"{experts}.1.up_proj.weight": "Q4_0",
        f"{experts}.2.up_proj.weight": "Q5_0",
        f"{experts}.3.down_proj.weight": "IQ4_NL",
    }
    del types["model.layers.1.mlp.experts.*.down_proj.weight"]
    types["model.layers.1.mlp.experts.0.down_proj.weight"] = "Q5_1"
    result = compress(small, tmp_path / "out", plan=replace(whole, types=types), text=text_folder, **TEXT)
    assert result.plan.types == types
    assert result.logits_error <= 1e-6
    stored = Checkpoint.open(result.out)
    assert stored.num_bytes == result.plan.predicted_bytes

    def kinds(layer, part):
        names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(8)]
        by_size = {2 * SIZES[kind][1]: kind for kind in ("Q8_0", "Q4_0", "Q5_0", "Q5_1")}
        return [
            by_size[stored.tensors[name].shape[-1]] if stored.tensors[name].dtype == "U8" else None for name in names
        ]

    rest = ["Q8_0"] * 4
    assert kinds(0, "gate") == ["Q8_0", "Q4_0", "Q8_0", "Q8_0", *rest]
    assert kinds(0, "up") == ["Q8_0", "Q4_0", "Q5_0", "Q8_0", *rest]
    assert kinds(0, "down") == ["Q8_0", "Q8_0", "Q8_0", "Q4_0", *rest]  # IQ4_NL has blocks of the same size
    assert kinds(1, "down") == ["Q5_1", *[None] * 7]
    amounts = inspect(result.out).parts.values()
    assert sum(amount.bytes for amount in amounts) == result.plan.predicted_bytes
    original, packed = states(small, result.out)
    gate_up = packed["model.layers.0.mlp.experts.gate_up_proj"] - original["model.layers.0.mlp.experts.gate_up_proj"]
    assert furthest(original, packed)[0] < 0.2
    off = gate_up.norm(dim=-1).view(8, 2, -1).mean(dim=-1)  # expert, gate or up
    assert off[1].min() > 5 * off[[0, 3, 7]].max()
    assert off[2, 1] > 2 * off[2, 0]


def test_in_one_type_it_does_not_matter_by_which_names_experts_get_it(small, text_folder, tmp_path):
    whole = plan(small, type="Q4_0", recipe="gptq")
    first = compress(small, tmp_path / "first", plan=whole, text=text_folder, **TEXT)
    apart = {
        single: kind
        for name, kind in whole.types.items()
        for single in ([name.replace("*", str(e)) for e in range(8)] if "*" in name else [name])
    }
    second = compress(small, tmp_path / "second", plan=replace(whole, types=apart), text=text_folder, **TEXT)
    assert second.plan.predicted_bytes == first.plan.predicted_bytes
    assert weight_digests(first.out) == weight_digests(second.out)


@pytest.mark.parametrize("recipe", ["nearest", "gptaq"])
def test_a_plan_may_leave_a_layer_of_experts_alone(recipe, small, text_folder, tmp_path):
    whole = plan(small, type="Q4_0", recipe=recipe)
    types = {name: kind for name, kind in whole.types.items() if ".layers.0." not in name}
    result = compress(small, tmp_path / "out", plan=replace(whole, types=types), text=text_folder, **TEXT)
    assert result.logits_error <= 1e-6
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.0.mlp.experts.*.wrong.weight": "Q8_0"}, r"wrong\.weight as Q8_0; matrices .* are named like"),
        ({"model.layers.0.mlp.gate.weight": "Q8_0"}, "gate.weight as Q8_0; matrices"),
        ({"model.embed_tokens.weight": "Q9_9"}, "as Q9_9; types that can be written are Q8_0, "),
        (
            {f"model.layers.0.mlp.experts.{e}.up_proj.weight": "Q4_0" for e in range(8)},
            r"experts\.\*\.up_proj\.weight as Q8_0, and names every expert of that layer itself",
        ),
        ({"model.layers.0.mlp.experts.8.up_proj.weight": "Q4_0"}, r"experts\.8\.up_proj\.weight as Q4_0; matrices"),
        ({"model.embed_tokens.weight": "Q4_K"}, "in blocks of 256; its rows have 64 numbers: take Q5_0"),
    ],
)
def test_types_that_cannot_be_are_refused(changes, words, small, text_folder, tmp_path):
    whole = plan(small, type="Q8_0", recipe="nearest")
    wrong = replace(whole, types={**whole.types, **changes})
    with pytest.raises((Infeasible, UnknownName), match=words):
        compress(small, tmp_path / "out", plan=wrong, text=text_folder, **TEXT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantiser": None}, "names no quantiser"),
        ({"quantiser": ("gtpq", {})}, "gtpq.*gptq"),
        ({"quantiser": ("gptq", {"dampening": 1})}, "dampening.*damping"),
        ({"quantiser": ("gptq", {"damping": "much"})}, "damping of the quantiser gptq is 'much'"),
        ({"router": "map"}, "experts that stay as they are"),
        ({"passes": (("select", {"score": "reap"}),)}, "experts that stay as they are"),
        ({"result_steps": (("distill", {}),)}, "experts that stay as they are"),
        ({"layers": (LayerPlan(num_experts=8), LayerPlan(num_experts=4))}, "layer 1 (changes its|has 4) experts"),
    ],
)
def test_plans_that_contradict_themselves_are_refused_before_anything_is_done(
    changes, words, small, text_folder, tmp_path
):
    wrong = replace(plan(small, type="Q8_0", recipe="nearest"), **changes)
    with pytest.raises((Infeasible, UnknownName, InputError), match=words):
        compress(small, tmp_path / "out", plan=wrong, text=text_folder, **TEXT)


def test_a_dry_run_says_the_bytes_and_writes_nothing(small, text_folder, tmp_path):
    foretold = dry_run(small, tmp_path / "out", recipe="gptaq", type="Q4_0", text=text_folder, **TEXT)
    done = compress(small, tmp_path / "out", recipe="gptaq", type="Q4_0", text=text_folder, **TEXT)
    assert foretold.plan.predicted_bytes == done.plan.predicted_bytes
    assert foretold.plan.types == done.plan.types


# Targets.


def test_types_are_named_in_any_case(small):
    assert plan(small, type="q8_0", recipe="nearest").types == plan(small, type="Q8_0", recipe="nearest").types


@pytest.mark.parametrize("recipe", ["nearest", "gptq", "gptaq"])
def test_bits_choose_the_largest_type_below(recipe, small):
    kinds = plan(small, bits=4.5, recipe=recipe).types
    inner = {kind for name, kind in kinds.items() if "head" not in name}
    assert {8 * SIZES[kind][1] / SIZES[kind][0] for kind in inner} == {4.5}
    assert kinds["lm_head.weight"] == "Q8_0"


def test_a_budget_is_met_or_the_least_is_said(small):
    whole = plan(small, bits=16, recipe="nearest").predicted_bytes
    for budget in (whole, whole - 1, whole * 6 // 10):
        assert plan(small, budget=budget, recipe="nearest").predicted_bytes <= budget
    with pytest.raises(Infeasible, match=r"the smallest type takes \d"):
        plan(small, budget="9KiB", recipe="nearest")


def test_mixed_types_say_the_least_as_well(small, text_folder, tmp_path):
    with pytest.raises(Infeasible, match=r"cannot be met with fewer bits alone"):
        compress(small, tmp_path / "out", recipe="coterie-bits", budget="9KiB", text=text_folder, **TEXT)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose gate and up rows, and all but those of down, have blocks of 256."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "moe_intermediate_size": 64}
    return tiny_checkpoint(tmp_path_factory.mktemp("wide") / "model", "qwen3_moe", **sizes)


def least_budget(model, recipe):
    """Return the smallest budget that is not refused."""
    low, high = 0, plan(model, bits=16, recipe=recipe).predicted_bytes
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            plan(model, budget=middle, recipe=recipe)
        except Infeasible:
            low = middle
        else:
            high = middle
    return high


def test_a_mixture_meets_budgets_below_the_smallest_single_type(wide):
    """Before anything is priced the smallest types stand for it; with them it is known what the least is."""
    mixture, single = least_budget(wide, "coterie-bits"), least_budget(wide, "gptq")
    assert mixture < single
    outlined = plan(wide, budget=mixture, recipe="coterie-bits")
    assert outlined.predicted_bytes == mixture
    assert outlined.types["lm_head.weight"] == "IQ1_S"  # a single type gives the head Q6_K at least
    with pytest.raises(Infeasible, match="cannot be met with fewer bits alone"):
        plan(wide, budget=mixture - 1, recipe="coterie-bits")


@pytest.mark.long
def test_what_the_outline_promises_is_kept(wide, text_folder, tmp_path):
    budget = (least_budget(wide, "coterie-bits") + least_budget(wide, "gptq")) // 2
    result = compress(wide, tmp_path / "out", recipe="coterie-bits", budget=budget, text=text_folder, **TEXT)
    assert result.plan.predicted_bytes == Checkpoint.open(result.out).num_bytes <= budget
    assert 0 <= result.plan.gap <= 1


def test_bits_that_no_block_of_the_model_has_are_refused(small):
    with pytest.raises(Infeasible, match=r"--bits 4 cannot be met: .* take 4\.500 bits a number at least"):
        plan(small, bits=4, recipe="coterie-bits")


@pytest.mark.parametrize("recipe", ["pmq", "mxmoe", "alphaq", "bitsmoe-bits", "edgemoe"])
def test_published_allocators_say_beforehand_how_large_the_result_is(recipe, wide):
    outlined = plan(wide, bits=4.2, recipe=recipe)
    assert len(set(outlined.types.values())) > 2
    again = plan(wide, budget=outlined.predicted_bytes, recipe=recipe)  # experts that cost the same may change places
    assert 0.98 * outlined.predicted_bytes < again.predicted_bytes <= outlined.predicted_bytes
    with pytest.raises(Infeasible, match=r"cannot be met by this recipe, which chooses from IQ1_S.* is the least"):
        plan(wide, budget="9KiB", recipe=recipe)


@pytest.mark.parametrize("recipe", ["nearest", "coterie-bits", "pmq", "mxmoe", "alphaq", "edgemoe"])
def test_experts_alone_have_the_bits_where_that_is_asked_for(recipe, wide):
    decided = plan(wide, bits=4.6, recipe=recipe, experts_only=True)
    assert decided.types
    assert all(".experts." in name for name in decided.types)
    weights = Source.open(wide, mtp="keep", fetch="samples").weights
    experts = [weight for weight in weights if weight.kind == "expert"]
    saved = sum(weight.plain_bytes for weight in experts) - (decided.original_bytes - decided.predicted_bytes)
    assert saved * 8 <= 4.6 * sum(weight.num_elements for weight in experts)
    assert plan(wide, budget=decided.predicted_bytes, recipe=recipe, experts_only=True).types


@pytest.mark.long
def test_all_but_experts_stays_to_the_bit_where_that_is_asked_for(wide, text_folder, tmp_path):
    result = compress(wide, tmp_path / "out", bits=4.2, experts_only=True, train_tokens=0, text=text_folder, **TEXT)
    stored = Checkpoint.open(result.out)
    with Checkpoint.open(wide).reader() as first, stored.reader() as second:
        for name in stored.tensors:
            assert (".experts." in name) != torch.equal(first.read(name), second.read(name)), name
    assert "--experts-only" in (result.out / "README.md").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["pmq", "mxmoe", "alphaq", "bitsmoe-bits", "edgemoe"])
def test_published_allocators_write_what_they_chose(recipe, wide, text_folder, tmp_path):
    budget = plan(wide, bits=4.2, recipe=recipe).predicted_bytes
    foretold = dry_run(wide, tmp_path / "out", recipe=recipe, budget=budget, text=text_folder, **TEXT)
    result = compress(wide, tmp_path / "out", recipe=recipe, budget=budget, text=text_folder, **TEXT)
    assert result.logits_error <= 1e-6
    assert foretold.plan.predicted_bytes <= budget
    assert result.plan.predicted_bytes == Checkpoint.open(result.out).num_bytes <= budget
    assert result.plan.damage is None
    kinds = {kind for name, kind in result.plan.types.items() if re.search(r"experts\.\d+\.", name)}
    assert len(kinds) > 1
    original, packed = states(wide, result.out)
    assert furthest(original, packed)[0] < 0.7


@pytest.mark.parametrize("target", [{"bits": 4.5}, {"type": "Q4_0"}])
@pytest.mark.parametrize("recipe", ["reap", "heapr", "coterie-local"])
def test_recipes_that_change_structure_send_you_to_those_that_do_not(recipe, target, small):
    like = "coterie-bits" if "bits" in target else "gptaq"
    with pytest.raises(InputError, match=f"or take a recipe that stores weights in fewer bits, such as {like}$"):
        plan(small, recipe=recipe, **target)


def test_experts_alone_are_no_choice_of_recipes_that_change_structure(small):
    with pytest.raises(InputError, match="--experts-only is about weights in fewer bits"):
        plan(small, recipe="reap", keep=0.5, experts_only=True)


@pytest.mark.parametrize("recipe", ["nearest", "gptq", "gptaq", "coterie-bits"])
def test_a_share_of_the_experts_is_no_target_of_these(recipe, small):
    with pytest.raises(InputError, match=f"recipe {recipe} stores weights in fewer bits and leaves experts alone; say"):
        plan(small, recipe=recipe, keep=0.5)


def test_wrong_types_and_bits_are_refused(small):
    with pytest.raises(UnknownName, match="Q4_9"):
        plan(small, type="Q4_9", recipe="nearest")
    with pytest.raises(InputError, match=r"--bits 1 is out of range: 1\.56"):
        plan(small, bits=1, recipe="nearest")
    with pytest.raises(InputError, match="no profile"):
        compress(small, "out", type="Q8_0", recipe="nearest", profile="somewhere")


# Inputs that are quantised, and runs that are killed.


def in_eight_bits(model, folder):
    """Write a checkpoint with all of its matrices but router, embedding and head in 8-bit floats, and one beside it
    with the numbers that these stand for: what loads 8-bit floats in transformers is not among our tools."""
    meant_folder = folder.with_name(f"{folder.name}-meant")
    shutil.copytree(model, folder)
    shutil.copytree(model, meant_folder)
    tensors, meant = {}, {}
    for name, tensor in tensors_of(model).items():
        if tensor.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")):
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
            meant[name] = tensors[name].float() * scale
        else:
            tensors[name] = meant[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    save_file(meant, meant_folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, meant_folder


def test_a_quantised_model_is_packed_from_what_it_stands_for(small, text_folder, tmp_path):
    model, meant = in_eight_bits(small, tmp_path / "fp8")
    result = compress(model, tmp_path / "out", recipe="gptq", type="Q8_0", text=text_folder, **TEXT)
    assert Checkpoint.open(result.out).num_bytes == result.plan.predicted_bytes
    assert result.logits_error <= 1e-6
    original, packed = states(meant, result.out)
    assert 1e-4 < furthest(original, packed)[0] < 0.03
    assert json.loads((result.out / "config.json").read_text())["quantization_config"]["quant_method"] == "coterie"


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "recipe",
    ["gptaq", pytest.param("coterie-bits", marks=pytest.mark.long), pytest.param("nearest", marks=pytest.mark.long)],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(recipe, small, text_folder, tmp_path, monkeypatch):
    settings = {"recipe": recipe, "bits": 5.5, "text": text_folder, **TEXT}
    if recipe == "coterie-bits":
        settings["train_tokens"] = 256
    whole = compress(small, tmp_path / "whole", **settings)
    real, done = layers_module.write_shard, []

    def once(*arguments, **options):
        if len(done) == 2:
            raise Killed
        done.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(layers_module, "write_shard", once)
    with pytest.raises(Killed):
        compress(small, tmp_path / "out", **settings)
    monkeypatch.undo()
    again = compress(small, tmp_path / "out", **settings)
    assert weight_digests(again.out) == weight_digests(whole.out)
    assert again.manifest == whole.manifest


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["nearest", "gptaq"])
def test_the_sums_that_are_announced_are_those_that_are_made(recipe, small, text_folder, tmp_path, monkeypatch):
    """To the byte; what is mixed and put side by side of them beside."""
    made, forecasts = [], []
    measure, stages = Packer._measure, PackForecast.stages

    def keep(self, stage, layers, linear):
        moments = measure(self, stage, layers, linear)
        sums = [*moments.linear.values()]
        for each in moments.experts.values():
            sums += [each.all_tokens, *each.into, *each.between]
        tensors = [tensor for each in sums for tensor in (each.hessian_CC, each.missed_CC) if tensor is not None]
        made.append((stage.unit, sum(tensor.nbytes for tensor in tensors)))
        return moments

    def announce(self):
        forecasts.append(self)
        return stages(self)

    monkeypatch.setattr(Packer, "_measure", keep)
    monkeypatch.setattr(PackForecast, "stages", announce)
    result = compress(small, tmp_path / "out", recipe=recipe, type="Q8_0", text=text_folder, **TEXT)
    (forecast,) = forecasts
    copies = 1 if recipe == "nearest" else 2
    for unit, num_bytes in made:
        assert num_bytes == 4 * copies * sum(count * size**2 for count, size in forecast.moments(unit))
        announced = dict(forecast.choosing_lines(unit))
        assert announced[MOMENTS] >= num_bytes
    assert max(num_bytes for _, num_bytes in made) > 0
    assert result.forecast == max(stage.num_bytes for stage in forecast.stages())


@pytest.mark.long
@pytest.mark.parametrize(
    "target",
    [
        {"recipe": "gptaq", "type": "Q4_0"},
        pytest.param({"recipe": "coterie-bits", "bits": 5.0}, marks=pytest.mark.slow),  # codes of a grid take a minute
    ],
)
def test_what_is_announced_is_what_it_takes_at_most(target, tmp_path, text_folder):
    """Measured above what is there before; the rest that is announced for all runs is left out of both."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 8192}
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16, **sizes)
    warm = compress(model, tmp_path / "first", text=text_folder, **TEXT, **target)
    cpu = torch.device("cpu")
    with peak_memory(cpu, above=memory_in_use(cpu)) as peak:
        compress(model, tmp_path / "second", text=text_folder, **TEXT, **target)
    assert peak.num_bytes < warm.forecast - FIXED_BYTES + 64 * 2**20


def test_choosing_codes_and_pricing_types_take_time_that_is_announced(small, text_folder, tmp_path):
    def times(recipe, **target):
        foretold = dry_run(small, tmp_path / "out", recipe=recipe, text=text_folder, **TEXT, **target)
        return {stage.name: stage.seconds for stage in foretold.outlook.times}

    plain, mixed = times("gptq", type="Q8_0"), times("coterie-bits", bits=5.5)
    assert "pricing types" in mixed
    assert "pricing types" not in plain
    assert all(seconds > 0 for seconds in mixed.values())


@pytest.mark.long
def test_prices_are_measured_once(small, text_folder, tmp_path, monkeypatch):
    settings = {"recipe": "coterie-bits", "bits": 5.5, "train_tokens": 0, "text": text_folder, **TEXT}
    whole = compress(small, tmp_path / "whole", **settings)
    steps = apply_module.STEPS

    def die(work):
        raise Killed

    monkeypatch.setattr(apply_module, "STEPS", tuple((name, die if name == "compress" else do) for name, do in steps))
    with pytest.raises(Killed):
        compress(small, tmp_path / "out", **settings)
    monkeypatch.undo()

    def measured_again(self, skip=()):
        raise AssertionError("priced twice")

    monkeypatch.setattr(DamageMeter, "measure", measured_again)
    again = compress(small, tmp_path / "out", **settings)
    assert weight_digests(again.out) == weight_digests(whole.out)
    assert again.manifest == whole.manifest
    assert again.plan == whole.plan == Plan.from_body(whole.plan.body(), whole.plan.inputs, where="here")


def test_speed_and_memory_of_a_packed_result_are_measured(small, text_folder, tmp_path):
    result = compress(small, tmp_path / "out", recipe="nearest", type="Q8_0", text=text_folder, **TEXT)
    [card] = evaluate(
        result.out, against=small, text=text_folder, tokens=128, seq_len=32, questions=0, speed_seconds=0.05
    )
    assert card.tokens_per_second > 0
    assert card.speed_ratio > 0
    assert card.memory_bytes > result.plan.predicted_bytes  # plain numbers in memory
