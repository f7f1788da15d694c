"""Experts with widths of their own whose matrices are stored in fewer bits."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from checkpoints import weight_digests
from coterie.compress.apply import compress
from coterie.compress.decide import checked, plan
from coterie.compress.layer_plan import ragged_plan
from coterie.compress.layers import LayerWriter
from coterie.compress.narrow import AT_ONCE, largest, narrowed
from coterie.compress.source import Source
from coterie.errors import Infeasible, InputError
from coterie.export.run import export
from coterie.model.arch.inspect import inspect
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.publish.modeling_coterie import CoterieModel
from coterie.testing import tiny_checkpoint
from coterie.train import distill

TEXT = {"tokens": 256, "seq_len": 32}

#: Widths of the experts of both layers: none, some, most and all neurons go.
WIDTHS = ((32, 64, 96, 128, 128, 96, 0, 32), (128, 96, 0, 64, 128, 32, 32, 64))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths") / "olmoe"
    return tiny_checkpoint(folder, "olmoe", dtype=torch.float32, hidden_size=96, intermediate_size=128)


def ragged(model, widths=WIDTHS, recipe="gptq", **types):
    """Return a plan of these widths: experts in Q4_K whose blocks run on, or in other types by projection."""
    made = plan(model, type="Q4_K", target="packed", recipe=recipe)
    chosen = {
        name: next((kind for part, kind in types.items() if f".{part}_proj" in name and "experts" in name), kind)
        for name, kind in made.types.items()
    }
    layers = tuple(ragged_plan(each) for each in widths)
    return replace(made, layers=layers, types=chosen)


def saved(made, folder):
    return made.save(folder / "plan.json")


def problem(rows=20, columns=40, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def slow_surgery(down, hessian, width, damping=0.01):
    """Remove the cheapest columns and solve the least squares of those that stay from the beginning, each time."""
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    stay, original = list(range(len(hessian))), down.double()
    weight = original
    while len(stay) > width:
        inverse = torch.linalg.inv(hessian[stay][:, stay])
        costs = [float(weight[:, place].square().sum() / inverse[place, place]) for place in range(len(stay))]
        go = sorted(range(len(stay)), key=lambda place: costs[place])[: min(AT_ONCE, len(stay) - width)]
        stay = [neuron for place, neuron in enumerate(stay) if place not in go]
        weight = torch.linalg.lstsq(hessian[stay][:, stay], (original @ hessian[:, stay]).T).solution.T
    return stay, weight


@pytest.mark.parametrize(("width", "seed"), list(itertools.product((8, 21, 39, 40), (0, 1))))
def test_the_neurons_that_go_are_those_that_cost_least_and_the_others_make_them_good(width, seed):
    down, hessian = problem(seed=seed)
    stay, weight = narrowed(down, hessian, width)
    expected, fitted = slow_surgery(down, hessian, width)
    assert stay.tolist() == expected
    torch.testing.assert_close(weight.double(), fitted, rtol=1e-4, atol=1e-5)


def test_of_an_expert_that_nobody_chose_the_largest_stay():
    down, up = (
        torch.ones(3, 4) * torch.tensor([1.0, 4.0, 2.0, 3.0]),
        torch.ones(4, 5) * torch.tensor([[9.0, 1, 1, 2]]).T,
    )
    assert largest(down, up, 2).tolist() == [0, 3]


def slow_values(folder):
    """Return the tensors of a result as its files, config.json and manifest say, read without Coterie's readers."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            star = re.sub(r"experts\.\d+\.", "experts.*.", name)
            group = next((each for key in (name, star) for each in groups if key in each["tensors"]), None)
            if group is not None and tensor.numel():  # else it is of an expert without neurons
                value = torch.from_numpy(dequantize(tensor.numpy(), GGMLQuantizationType[group["type"]]))
                tensor = value.reshape(-1, group.get("columns", value.shape[-1]))
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize("recipe", ["gptq", pytest.param("gptaq", marks=pytest.mark.long)])
def test_a_plan_of_widths_and_types_is_written_and_loaded(model, text_folder, tmp_path, recipe):
    made, out = ragged(model, recipe=recipe, gate="Q6_K.W", up="Q6_K.W", down="Q8_0"), tmp_path / "out"
    result = compress(model, out, plan=saved(made, tmp_path), text=text_folder, **TEXT)
    assert sum(info.num_bytes for info in Checkpoint.open(out).tensors.values()) == result.plan.predicted_bytes
    assert [entry.widths_after for entry in result.manifest.layers] == list(WIDTHS)
    assert (result.manifest.form.value, result.manifest.ragged.width) == ("ragged", 128)
    assert result.logits_error <= 1e-6
    assert result.manifest.left_out == {}
    values = slow_values(out)
    original, loaded = (load_model(each, dtype=torch.float32).state_dict() for each in (model, out))
    before = Checkpoint.open(model)
    with before.reader() as reader:
        for (layer, widths), expert in itertools.product(enumerate(WIDTHS), range(8)):
            if not widths[expert]:
                continue
            name = f"model.layers.{layer}.mlp.experts.{expert}.{{}}_proj.weight"
            gate, up, down = (values[name.format(part)] for part in ("gate", "up", "down"))
            assert (len(gate), len(up), down.shape[1]) == (widths[expert],) * 3
            old = torch.cat([reader.read(name.format(part)) for part in ("gate", "up")], dim=1)
            near = torch.cdist(torch.cat((gate, up), dim=1), old).argmin(dim=1).tolist()
            assert near == sorted(set(near))  # neurons that stay keep their order
            fused = loaded[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
            for half, part in zip(fused.chunk(2), (gate, up), strict=True):
                torch.testing.assert_close(half[: len(part)], part, rtol=1e-6, atol=1e-9)
                assert not half[len(part) :].any()
            read = loaded[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
            torch.testing.assert_close(read[:, : widths[expert]], down, rtol=1e-6, atol=1e-9)
            assert not read[:, widths[expert] :].any()
            if widths[expert] == 128 and recipe == "gptq":
                off = (down - reader.read(name.format("down"))).norm() / down.norm()
                assert off < 0.02
    assert loaded.keys() == original.keys()
    for name, tensor in CoterieModel.from_pretrained(out, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    inspected = inspect(out)
    assert inspected.total.bytes == result.plan.predicted_bytes
    assert "pip install gguf" in (out / "README.md").read_text()
    with pytest.raises(InputError, match="it is ragged"):
        export(out, tmp_path / "out.gguf")


@pytest.mark.long
def test_one_expert_may_have_a_type_of_its_own_as_well(model, text_folder, tmp_path):
    made, single = ragged(model), "model.layers.0.mlp.experts.2.down_proj.weight"
    types = {**made.types, single: "Q8_0"}
    result = compress(
        model, tmp_path / "out", plan=saved(replace(made, types=types), tmp_path), text=text_folder, **TEXT
    )
    stored = Checkpoint.open(result.out).tensors
    assert stored[single].shape == (96, 96 // 32 * 34)
    assert sum(info.num_bytes for info in stored.values()) == result.plan.predicted_bytes
    assert result.logits_error <= 1e-6


@pytest.mark.parametrize("down", ["Q4_K.W", "Q2_K.W", "IQ4_NL", "Q8_0", "IQ1_S.W"])
def test_bytes_are_counted_by_width(model, down):
    for widths in itertools.islice(itertools.permutations((32, 64, 96, 128)), 0, 24, 7):
        made = checked(Source.open(model, target="packed"), ragged(model, (widths * 2, widths * 2), down=down))
        whole = checked(Source.open(model, target="packed"), ragged(model, ((128,) * 8,) * 2, down=down))
        block, size = {"Q4_K.W": (256, 144), "Q2_K.W": (256, 84), "IQ4_NL": (32, 18), "Q8_0": (32, 34),
                       "IQ1_S.W": (256, 50)}[down]  # fmt: skip
        neurons = 2 * (8 * 128 - 2 * sum(widths))  # of two layers
        fewer = neurons * 96 * 2 * 144 // 256 + neurons * 96 * size // block
        assert whole.predicted_bytes - made.predicted_bytes == fewer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ((128,) * 8, (128,) * 7 + (100,))}, r"layer 1 .*experts\[7\] has width 100; .*multiples of 32"),
        ({"widths": ((128,) * 8, (0,) * 8)}, r"layer 1 .*: no expert has any neurons left; keep 32 of one"),
        (
            {"down": "Q4_K"},
            r"layers\.0\.mlp\.experts\.0\.down_proj\.weight as Q4_K.*its rows have 32 numbers: take Q4_K\.W",
        ),
        ({"down": "INT4_G32"}, "compressed-tensors has one for all"),
    ],
)
def test_plans_say_what_cannot_be(model, change, message):
    with pytest.raises(Infeasible, match=message):
        checked(Source.open(model, target="packed"), ragged(model, **change))


def test_what_is_cut_to_a_width_has_a_type(model):
    made = ragged(model)
    fewer = {name: kind for name, kind in made.types.items() if "layers.1.mlp.experts.*.up_proj" not in name}
    with pytest.raises(Infeasible, match=r"layers\.1\.mlp\.experts\.0\.up_proj\.weight no type"):
        checked(Source.open(model, target="packed"), replace(made, types=fewer))


def test_experts_in_one_tensor_have_no_widths(tmp_path):
    model = tiny_checkpoint(tmp_path / "m", "granitemoe", dtype=torch.float32, hidden_size=96, intermediate_size=64)
    made = plan(model, type="Q4_K", target="packed", recipe="gptq")
    layers = tuple(ragged_plan((32,) * layer.num_experts) for layer in made.layers)
    with pytest.raises(Infeasible, match="stores all experts of a layer in one tensor"):
        checked(Source.open(model, target="packed"), replace(made, layers=layers))


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(model, text_folder, tmp_path, monkeypatch):
    file, settings = saved(ragged(model, recipe="gptq"), tmp_path), {"text": text_folder, **TEXT}
    whole = compress(model, tmp_path / "whole", plan=file, **settings)
    packed, pack = [], LayerWriter._pack

    def stop_at_the_third(self, stage, layers, shard):
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(stage.unit.name)
        pack(self, stage, layers, shard)

    with monkeypatch.context() as patched:
        patched.setattr(LayerWriter, "_pack", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "killed", plan=file, **settings)
    assert "model.layers.0" in packed
    resumed = compress(model, tmp_path / "killed", plan=file, **settings)
    assert weight_digests(resumed.out) == weight_digests(whole.out)
    assert resumed.plan == whole.plan


#: Types of some experts, in place of those of their layer.
OWN = {
    "model.layers.1.mlp.experts.3.gate_proj.weight": "Q6_K.W",
    "model.layers.1.mlp.experts.4.gate_proj.weight": "Q6_K.W",
    "model.layers.1.mlp.experts.0.down_proj.weight": "Q8_0",
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("widths", "types", "own"),
    [
        (WIDTHS, {"down": "Q4_K.W"}, {}),
        (WIDTHS, {"gate": "Q8_0", "down": "IQ4_NL"}, OWN),
        (None, {"down": "Q4_K.W"}, OWN),
    ],
)
def test_scales_are_trained(model, text_folder, tmp_path, monkeypatch, widths, types, own):
    made = ragged(model, recipe="gptaq", **types)
    layers = made.layers if widths else plan(model, type="Q4_K", target="packed").layers
    made = replace(made, layers=layers, types=made.types | own, result_steps=(("distill-blocks", {}),))
    file, settings = saved(made, tmp_path), {"text": text_folder, **TEXT}
    untrained = compress(model, tmp_path / "untrained", plan=file, train_tokens=0, **settings)
    falling = itertools.count(0.5, -0.01)  # whatever it is worth: random models may not gain
    monkeypatch.setattr(distill, "mean_loss", lambda *arguments, **options: next(falling))
    trained = compress(model, tmp_path / "trained", plan=file, train_tokens=256, **settings)
    assert trained.manifest.left_out == {}
    assert trained.logits_error <= 1e-6  # what is loaded computes what was trained
    stored = Checkpoint.open(trained.out).tensors.values()
    assert sum(info.num_bytes for info in stored) == trained.plan.predicted_bytes
    before, after = slow_values(untrained.out), slow_values(trained.out)
    for expert, part in itertools.product(range(8), ("gate", "up", "down")):
        name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        assert before[name].shape == after[name].shape
        if not before[name].numel():
            assert widths[1][expert] == 0
            continue
        assert not torch.equal(before[name], after[name]), name
        # Scales moved a little, and what was zero is zero: codes are the same.
        assert ((before[name] == 0) == (after[name] == 0)).float().mean() > 0.99
        assert (before[name] - after[name]).norm() < 0.2 * before[name].norm()


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "key"),
    [("mixtral", "intermediate_size"), ("nemotron_h", "moe_intermediate_size"), ("qwen3_next", "moe_intermediate_size"),
     ("deepseek_v3", "moe_intermediate_size")],
)  # fmt: skip
def test_other_families_store_widths_too(family, key, text_folder, tmp_path):
    model = tiny_checkpoint(tmp_path / "m", family, dtype=torch.float32, **{key: 96})
    made = plan(model, type="IQ4_NL", target="packed", recipe="gptaq")
    layers = tuple(
        ragged_plan([32 + 32 * (expert % 3) for expert in range(layer.num_experts)]) for layer in made.layers
    )
    file = saved(replace(made, layers=layers), tmp_path)
    result = compress(model, tmp_path / "out", plan=file, text=text_folder, **TEXT)
    assert result.logits_error <= 1e-5
    loaded = load_model(result.out, dtype=torch.float32).state_dict()
    for name, tensor in CoterieModel.from_pretrained(result.out, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
