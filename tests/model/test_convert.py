"""WeightConversion between names on disk and in memory: both ways give back every bit, for every family."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.arch.resize import resized_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.quiet import quiet
from coterie.testing import CORE_FAMILIES

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_family = pytest.mark.parametrize("model_type", CORE_FAMILIES)


def opened(path):
    """Return the checkpoint, its architecture and its conversion."""
    checkpoint = Checkpoint.open(path)
    architecture = Architecture.of(checkpoint)
    return checkpoint, architecture, WeightConversion(checkpoint, architecture.model)


def parts_of(layer, conversion):
    """Return the names on disk of the experts and the router tensors of one layer."""
    routers = {name for name, _ in layer.router_tensors}
    return [
        name
        for name, memory in conversion.memory_names.items()
        if memory.startswith(layer.experts + ".") or memory in routers
    ]


def is_empty(model):
    return all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@both_dtypes
@every_family
def test_there_and_back_gives_every_bit(tiny, model_type, dtype):
    checkpoint, architecture, conversion = opened(tiny(model_type, dtype=dtype))
    on_disk = load_file(checkpoint.path / "model.safetensors")
    with checkpoint.reader() as reader:
        for layer in architecture.layers:
            names = parts_of(layer, conversion)
            memory, conversions = conversion.read(reader, names)
            assert is_empty(architecture.model)
            assert memory.keys() == {conversion.memory_names[name] for name in names}
            module = architecture.model.get_submodule(layer.experts)
            expected = {f"{layer.experts}.{name}" for name, _ in module.named_parameters()}
            assert memory.keys() == expected | {name for name, _ in layer.router_tensors}
            for name, tensor in memory.items():
                assert tensor.dtype == torch.float32
                assert tensor.device.type == "cpu"
                assert tensor.shape == architecture.model.state_dict()[name].shape
            back = conversion.write(architecture.model, memory, conversions)
            assert back.keys() == set(names)
            for name, tensor in back.items():
                assert tensor.dtype == on_disk[name].dtype == TORCH_DTYPES[checkpoint.tensors[name].dtype]
                assert tensor.shape == on_disk[name].shape
                assert torch.equal(bits(tensor), bits(on_disk[name])), name
            assert is_empty(architecture.model)


@every_family
def test_names_and_values_in_memory_are_those_of_the_stock_model(tiny, model_type):
    checkpoint, architecture, conversion = opened(tiny(model_type))
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).state_dict()
    assert set(conversion.memory_names) == set(checkpoint.tensors)
    assert set(conversion.memory_names.values()) <= stock.keys()
    with checkpoint.reader() as reader:
        for layer in architecture.layers:
            memory, _ = conversion.read(reader, parts_of(layer, conversion))
            for name, tensor in memory.items():
                assert torch.equal(tensor, stock[name]), name


@every_family
def test_all_tensors_at_once_cross_as_well(tiny, model_type):
    checkpoint, architecture, conversion = opened(tiny(model_type))
    with checkpoint.reader() as reader:
        memory, conversions = conversion.read(reader, checkpoint.tensors)
    assert memory.keys() == set(conversion.memory_names.values())
    back = conversion.write(architecture.model, memory, conversions)
    on_disk = load_file(checkpoint.path / "model.safetensors")
    assert back.keys() == on_disk.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in on_disk.items())


def test_the_result_may_have_fewer_experts(tiny):
    checkpoint, architecture, conversion = opened(tiny("qwen3_moe"))
    layer = architecture.layers[1]
    with checkpoint.reader() as reader:
        memory, conversions = conversion.read(reader, parts_of(layer, conversion))
    kept = torch.tensor([6, 1, 3])
    small = Architecture.from_config(resized_config(architecture, 3)).model
    back = conversion.write(small, {name: tensor[kept] for name, tensor in memory.items()}, conversions)
    on_disk = load_file(checkpoint.path / "model.safetensors")
    assert len(back) == 3 * 3 + 1
    for new, old in enumerate(kept.tolist()):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{layer.block}.experts.{{}}.{part}.weight"
            assert torch.equal(back[name.format(new)], on_disk[name.format(old)])
    assert torch.equal(back[f"{layer.block}.gate.weight"], on_disk[f"{layer.block}.gate.weight"][kept])


def test_reading_twice_gives_the_same(tiny):
    checkpoint, architecture, conversion = opened(tiny("mixtral"))
    names = parts_of(architecture.layers[0], conversion)
    with checkpoint.reader() as reader:
        first, _ = conversion.read(reader, names)
        again, _ = conversion.read(reader, reversed(names))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_nothing_read_is_nothing(tiny):
    checkpoint, architecture, conversion = opened(tiny())
    with checkpoint.reader() as reader:
        assert conversion.read(reader, []) == ({}, [])
    assert conversion.write(architecture.model, {}, []) == {}


@pytest.fixture
def broken(tiny, tmp_path):
    """Return a function that copies a tiny checkpoint and changes its tensors and its config."""

    def make(model_type, *, config=None, **tensors):
        path = tmp_path / "broken"
        shutil.copytree(tiny(model_type), path)
        held = load_file(path / "model.safetensors")
        assert tensors.keys() <= held.keys()
        save_file(held | tensors, path / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | (config or {})))
        return path

    return make


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("olmoe", {"intermediate_size": 16}),
        ("gpt_oss", {"intermediate_size": 16}),
        ("deepseek_v3", {"n_routed_experts": 6}),
        ("gpt_oss", {"num_local_experts": 12}),
        ("mixtral", {"num_local_experts": 12}),
    ],
)
def test_a_config_that_contradicts_the_weights_is_named(broken, model_type, change):
    checkpoint, architecture, conversion = opened(broken(model_type, config=change))
    layer = architecture.layers[0]
    with checkpoint.reader() as reader, pytest.raises(CorruptCheckpoint, match=r"has shape .*config\.json says"):
        conversion.read(reader, parts_of(layer, conversion))
    assert is_empty(architecture.model)


def test_one_expert_of_another_shape_is_named(broken):
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    checkpoint, architecture, conversion = opened(broken("olmoe", **{name: torch.zeros(16, 32)}))
    with checkpoint.reader() as reader:
        with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.0\.mlp\.experts\.\S+ cannot be converted"):
            conversion.read(reader, parts_of(architecture.layers[0], conversion))
        assert is_empty(architecture.model)
        memory, _ = conversion.read(reader, parts_of(architecture.layers[1], conversion))
    assert all(name.startswith("model.layers.1.") for name in memory), "nothing of the failed layer is left"


def test_names_that_the_checkpoint_does_not_have_are_refused(tiny):
    checkpoint, architecture, conversion = opened(tiny("olmoe"))
    with checkpoint.reader() as reader:
        memory, conversions = conversion.read(reader, parts_of(architecture.layers[0], conversion))
    moved = {name.replace("layers.0", "layers.7"): tensor for name, tensor in memory.items()}
    with pytest.raises(
        ArchitectureMismatch, match=r"25 names that the checkpoint does not have, the first is model\.layers\.7"
    ):
        conversion.write(architecture.model, moved, conversions)
