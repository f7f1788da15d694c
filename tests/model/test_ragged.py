import pytest
import torch

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint, Infeasible
from coterie.model.arch.accounting import layer_tensors
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.arch.ragged import Place, cut, places_of
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.filled import filled_up
from coterie.model.disk.manifest import RaggedWidths


def found(path):
    checkpoint = Checkpoint.open(path)
    architecture = Architecture.of(checkpoint)
    conversion = WeightConversion(checkpoint, architecture.model)
    parts = layer_tensors(checkpoint, architecture.layers, conversion)
    return places_of(conversion, architecture, [part.experts for part in parts]), checkpoint


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("olmoe", {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}),
        ("mixtral", {"w1.weight": 0, "w3.weight": 0, "w2.weight": 1}),
        ("nemotron_h", {"up_proj.weight": 0, "down_proj.weight": 1}),
    ],
)
def test_every_tensor_of_an_expert_has_its_place(tiny, model_type, names):
    places, checkpoint = found(tiny(model_type))
    expected = {name for name in checkpoint.tensors if ".experts." in name and "shared" not in name}
    assert places.keys() == expected
    for name, place in places.items():
        head, _, tail = name.partition(".experts.")
        expert, _, leaf = tail.partition(".")
        assert (place.expert, place.axis, place.pattern) == (int(expert), names[leaf], f"{head}.experts.*.{leaf}")
        assert checkpoint.tensors[name].shape[place.axis] == 24


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "aria_text", "gemma4_text"])
def test_fused_experts_are_refused(tiny, model_type):
    with pytest.raises(Infeasible, match="stores all experts of a layer in one tensor"):
        found(tiny(model_type))


def test_cutting_and_filling_up_are_inverse(tmp_path):
    from safetensors.torch import save_file

    widths = (0, 2, 5)
    whole = {}
    for expert, width in enumerate(widths):
        whole[f"layers.7.experts.{expert}.up"] = torch.randn(5, 4) * (torch.arange(5) < width)[:, None]
        whole[f"layers.7.experts.{expert}.down"] = torch.randn(4, 5) * (torch.arange(5) < width)
    whole["layers.7.up"] = torch.randn(5, 4)
    places = {
        name: Place(layer=2, expert=int(name.split(".")[3]), axis=int("down" in name), pattern="")
        for name in whole
        if "experts" in name
    }
    narrow = cut(whole, places, {2: widths})
    assert narrow["layers.7.experts.1.down"].shape == (4, 2)
    assert narrow["layers.7.up"] is whole["layers.7.up"]
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, tmp_path / "model.safetensors")
    axes = {"layers.7.experts.*.up": 0, "layers.7.experts.*.down": 1}
    stored = Checkpoint.open(tmp_path)
    view = filled_up(stored, RaggedWidths(width=5, axes=axes))
    with view.reader() as reader:
        for name, tensor in whole.items():
            assert view.tensors[name].shape == tensor.shape
            assert torch.equal(reader.read(name), tensor), name
        assert reader.num_bytes_read == stored.num_bytes
        for name, tensor in whole.items():
            before, num_rows = reader.num_bytes_read, len(tensor)
            assert torch.equal(reader.read_rows(name, 1, num_rows), tensor[1:]), name
            count, all_rows = reader.num_bytes_read - before, stored.tensors[name].num_bytes
            filled = name.endswith((".0.up", ".1.up"))  # along this very axis: cut from the whole
            assert count == (all_rows if filled else all_rows * (num_rows - 1) // num_rows)
    assert view.num_bytes == sum(tensor.numel() * 4 for tensor in whole.values())
    assert filled_up(stored, None) is stored
    with pytest.raises(CorruptCheckpoint, match=r"experts\.2\.\w+ \[.*\] is wider than the 4 of the manifest"):
        filled_up(stored, RaggedWidths(width=4, axes=axes))


def test_only_zeros_are_cut_off():
    tensor = torch.ones(2, 3)
    with pytest.raises(ArchitectureMismatch, match="axis 1 is not the width of an expert"):
        cut({"e": tensor}, {"e": Place(layer=0, expert=0, axis=1, pattern="*")}, {0: (2,)})
    assert torch.equal(cut({"e": tensor}, {"e": Place(layer=0, expert=0, axis=1, pattern="*")}, {0: (3,)})["e"], tensor)
