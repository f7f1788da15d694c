"""Sizes said before: against the ratio of bytes that a result must have, between forms, and where they are refused."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.accounting import Accounting, LayerShape, expert_place
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.inspect import accounting_of
from coterie.model.arch.layers import Architecture
from coterie.model.arch.structure import Block
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.encodings.ragged import Ragged
from coterie.model.disk.tensors import TensorInfo

#: One family for each way to lie on disk: one tensor an expert, fused, fused with biases, rows beyond the experts.
FAMILIES = ("olmoe", "granitemoe", "gpt_oss", "inkling_text", "nemotron_h", "ernie4_5_moe")


def both(path):
    """Return the accounting of a checkpoint as its architecture and as its headers alone have it."""
    checkpoint = Checkpoint.open(path)
    architecture = Architecture.of(checkpoint)
    derived = Accounting.of(checkpoint, architecture, WeightConversion(checkpoint, architecture.model))
    return checkpoint, architecture, derived, accounting_of(checkpoint)


def slow_bytes(checkpoint, architecture, size):
    """Return the bytes of a result in float32, from what a layer holds by the mathematics of it."""
    total = checkpoint.num_bytes
    for layer in architecture.layers:
        module = architecture.model.get_submodule(layer.experts)
        matrices, bias = (3 if module.has_gate else 2), bool(module.has_bias)

        def neuron(layer=layer, matrices=matrices, bias=bias):
            return matrices * layer.hidden_size + (matrices - 1) * bias

        rows = 0
        for name, axis in layer.router_tensors:
            tensor = architecture.model.state_dict()[name]
            rows += tensor.numel() // tensor.shape[axis]
        expert = layer.hidden_size * bias + (0 if size.keeps_rows else rows)
        widths = size.widths or (layer.width if size.width is None else size.width,) * size.num_experts
        before = layer.num_experts * (layer.width * neuron() + expert)
        after = sum(widths) * neuron() + size.num_experts * expert
        total += 4 * (after - before)
    return total


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "size",
    [
        LayerShape(num_experts=8),
        LayerShape(num_experts=3),
        LayerShape(num_experts=3, keeps_rows=True),
        LayerShape(num_experts=8, width=5),
        LayerShape(num_experts=20, width=8),
        LayerShape(num_experts=4, widths=(0, 24, 7, 1)),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_experts_that_stay(tiny, model_type, size):
    checkpoint, architecture, derived, told = both(tiny(model_type))
    sizes = [size] * len(architecture.layers)
    fused = any(tensor.expert_axis == 0 and not tensor.router for tensor in derived.layers[0].tensors)
    for accounting in (derived, told):
        if fused and size.widths is not None:
            for ask in (accounting.tensors, accounting.num_bytes, accounting.num_elements):
                with pytest.raises(Infeasible, match="cannot hold experts of different widths"):
                    ask(sizes)
            continue
        listed = accounting.tensors(sizes)
        expected = slow_bytes(checkpoint, architecture, size)
        assert sum(tensor.num_bytes for tensor in listed) == expected
        assert accounting.num_bytes(sizes) == expected
        assert sum(tensor.num_elements for tensor in listed) == accounting.num_elements(sizes) == expected // 4
        assert [tensor.name for tensor in listed] == sorted({tensor.name for tensor in listed})
    if not (fused and size.widths is not None):
        assert derived.tensors(sizes) == told.tensors(sizes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_changed_is_what_is_there(tiny, model_type):
    checkpoint, architecture, derived, told = both(tiny(model_type))
    sizes = [LayerShape(num_experts=layer.num_experts) for layer in architecture.layers]
    for accounting in (derived, told):
        listed = {tensor.name: (tensor.shape, tensor.encoding) for tensor in accounting.tensors(sizes)}
        assert listed == {name: (info.shape, Plain(dtype=info.dtype)) for name, info in checkpoint.tensors.items()}


def test_tensors_of_ragged_experts_are_cut_one_by_one(tiny):
    _, _, derived, _ = both(tiny())
    size = LayerShape(num_experts=8, widths=(0, 24, 7, 1, 2, 3, 4, 5))
    listed = {tensor.name: tensor for tensor in derived.tensors([size, size])}
    down = listed["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert (down.shape, down.num_elements) == ((32, 24), 32 * 7)
    assert down.encoding == Ragged(axis=1, width=7, full=24, inner=Plain(dtype="F32"))
    assert listed["model.layers.1.mlp.experts.0.up_proj.weight"].num_bytes == 0


@pytest.mark.parametrize("model_type", FAMILIES)
@given(data=st.data())
def test_fast_forms_are_the_list(tiny, model_type, data):
    _, architecture, derived, _ = both_of(tiny, model_type)
    layers = architecture.layers
    whole = [LayerShape(num_experts=layer.num_experts) for layer in layers]
    index = data.draw(st.integers(0, len(layers) - 1))
    count = data.draw(st.integers(1, 9))
    width = data.draw(st.none() | st.integers(0, 24))
    keeps_rows = data.draw(st.booleans())

    def listed(size):
        return sum(tensor.num_bytes for tensor in derived.tensors([*whole[:index], size, *whole[index + 1 :]]))

    def size(more_experts=0, more_width=0):
        wide = None if width is None else width + more_width
        return LayerShape(num_experts=count + more_experts, width=wide, keeps_rows=keeps_rows)

    difference = listed(size(1)) - listed(size())
    assert derived.expert_bytes(index, width=width, keeps_rows=keeps_rows) == difference
    assert derived.layer_bytes(index, size()) - derived.layer_bytes(index, whole[index]) == listed(size()) - listed(
        whole[index]
    )
    if width is not None:
        assert listed(size(0, 1)) - listed(size()) == count * derived.neuron_bytes(index)


MADE = {}


def both_of(tiny, model_type):
    if model_type not in MADE:
        MADE[model_type] = both(tiny(model_type))
    return MADE[model_type]


def test_sizes_must_be_one_for_each_layer(tiny):
    _, _, derived, _ = both(tiny())
    for ask in (derived.tensors, derived.num_bytes, derived.num_elements):
        with pytest.raises(ValueError, match="shorter"):
            ask([LayerShape(num_experts=8)])
    with pytest.raises(ArchitectureMismatch, match="3 widths for 8 experts"):
        derived.num_bytes([LayerShape(num_experts=8, widths=(1, 2, 3))] * 2)


# --- headers alone ------------------------------------------------------------------------------------------------


def info(name, *shape, dtype="F32"):
    return TensorInfo(name=name, dtype=dtype, shape=shape, shard="x")


def one_block(experts, *, fused, num_experts=2, inner=(4, 3), router=(2, 4)):
    """Return the accounting of one block of these tensors and a router."""
    gate = info("layers.0.gate.weight", *router)
    block = Block(
        stack="layers", layer=0, name="layers.0", num_experts=num_experts, experts=tuple(experts),
        first_expert=tuple(experts[:1]), fused=fused, router=(gate,), router_axes={gate.name: 0}, shared=(),
    )  # fmt: skip
    norm = info("norm", 4)
    return Accounting.of_blocks({each.name: each for each in (*experts, gate, norm)}, [block], [inner])


@pytest.mark.parametrize("dtype", ["F4", "U8", "I32", "BF16"])
def test_whatever_is_stored_counts_by_experts(dtype):
    accounting = one_block([info("layers.0.experts.w", 2, 6, 4, dtype=dtype)], fused=True)
    bits = {"F4": 4, "U8": 8, "I32": 32, "BF16": 16}[dtype]
    assert accounting.num_bytes([LayerShape(num_experts=1)]) == 24 * bits // 8 + 4 * 4 + 4 * 4


def test_a_tensor_of_fused_experts_without_their_axis_stays():
    accounting = one_block([info("layers.0.experts.w", 2, 6, 4), info("layers.0.experts.scale", 5)], fused=True)
    assert accounting.num_bytes([LayerShape(num_experts=1)]) == 4 * (24 + 5 + 4 + 4)


@pytest.mark.parametrize("inner", [(4, 4), (4, 5), (6, 3)])
def test_a_width_that_headers_do_not_tell_is_refused(inner):
    square = one_block([info(f"layers.0.experts.{e}.w", 4, 4) for e in range(2)], fused=False, inner=inner)
    assert square.num_bytes([LayerShape(num_experts=1)]) == 4 * (16 + 4 + 4)
    for size in (LayerShape(num_experts=2, width=2), LayerShape(num_experts=2, widths=(1, 2))):
        with pytest.raises(ArchitectureMismatch, match="headers alone do not tell along which axes the width runs"):
            square.num_bytes([size])


def test_of_experts_that_differ_the_widest_stay():
    widths = (1, 3, 2)
    tensors = [info(f"layers.0.experts.{e}.w", 4, width) for e, width in enumerate(widths)]
    accounting = one_block(tensors, fused=False, num_experts=3, router=(3, 4))
    listed = {tensor.name: tensor.shape for tensor in accounting.tensors([LayerShape(num_experts=3)])}
    assert {name: listed[name] for name in listed if "experts" in name} == {each.name: each.shape for each in tensors}
    fixed = 4 * 4
    for count, neurons in ((3, 6), (2, 5), (1, 3)):
        expected = 4 * 4 * neurons + 4 * 4 * count + fixed
        assert accounting.num_bytes([LayerShape(num_experts=count)]) == expected
        assert sum(tensor.num_bytes for tensor in accounting.tensors([LayerShape(num_experts=count)])) == expected
    with pytest.raises(ArchitectureMismatch, match="has 3 experts, which differ, not 4"):
        accounting.num_bytes([LayerShape(num_experts=4)])


def test_experts_that_differ_in_more_than_width_are_refused():
    with pytest.raises(ArchitectureMismatch, match="differ in more than their width"):
        one_block([info("layers.0.experts.0.w", 4, 3), info("layers.0.experts.1.w", 5, 2)], fused=False)


@pytest.mark.parametrize(
    ("names", "count", "place"),
    [
        (["a.0.e.0.w", "a.0.e.1.w"], 2, 3),
        (["a.1.e.1.w", "a.1.e.0.w", "a.1.e.0.v"], 2, 3),
        (["a.0.e.0.w"], 1, 3),
        (["a.0.e.w"], 2, None),
        (["a.0.e.0.w", "a.0.e.2.w"], 2, None),
        ([], 2, None),
    ],
)
def test_the_part_of_a_name_that_counts_experts(names, count, place):
    assert expert_place(names, count) == place


def test_tensors_that_lie_otherwise_are_refused(tiny, tmp_path):
    path = tiny()
    checkpoint = Checkpoint.open(path)
    architecture = Architecture.of(checkpoint)
    conversion = WeightConversion(checkpoint, architecture.model)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    changed = {**checkpoint.tensors, name: info(name, 32, 24)}
    with pytest.raises(ArchitectureMismatch, match="experts of one layer differ in shape or number format"):
        Accounting.of(SimpleNamespace(tensors=changed, path=path), architecture, conversion)
