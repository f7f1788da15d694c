"""Matrices in blocks with trainable scales: their values, their bytes, and the gradients that reach the scales."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_checkpoint
from coterie.train import blocks as blocks_module
from coterie.train.blocks import Blocks, Stack, experts_in_blocks, train_rounded, train_scales
from coterie.train.model import experts_apart

#: Where the float16 numbers of a block lie, as llama.cpp's ggml-common.h has it.
PLACES = {
    "Q8_0": [0], "Q6_K": [208], "Q5_1": [0, 2], "Q5_0": [0], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q4_0": [0],
    "Q4_K": [0, 2], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "Q3_K": [108], "IQ3_S": [0], "IQ3_XXS": [0],
    "Q2_K": [80, 82], "IQ2_S": [0], "IQ2_XS": [0], "IQ2_XXS": [0],
    "TQ2_0": [64], "TQ1_0": [52], "IQ1_M": [], "IQ1_S": [0],
    "TURBO4": [0], "TURBO3": [0], "TURBO2": [0],
}  # fmt: skip


def random_bytes(kind, rows=6, blocks=2, seed=0):
    """Return bytes (rows, ...) of random codes with scales of an ordinary size."""
    generator = np.random.default_rng(seed)
    byte_GK = generator.integers(0, 256, (rows * blocks, SIZES[kind][1]), dtype=np.uint8)
    for place in PLACES[kind]:
        numbers = generator.uniform(0.01, 0.1, (len(byte_GK), 1)).astype(np.float16)
        byte_GK[:, place : place + 2] = numbers.view(np.uint8)
    if kind == "MXFP4":
        byte_GK[:, 0] = generator.integers(118, 130, len(byte_GK))
    if kind == "IQ1_M":  # a scale from 0 up to 2
        byte_GK[:, 55] &= 0x3F
    return byte_GK.reshape(rows, -1)


def with_products(kind, byte_RK, multiplier_Gn):
    """Return bytes in which every number is its product with a multiplier, one block after the other."""
    byte_GK = byte_RK.reshape(-1, SIZES[kind][1]).copy()
    for number, block in enumerate(byte_GK):
        for which, place in enumerate(PLACES[kind]):
            before = block[place : place + 2].copy().view(np.float16)[0]
            product = np.float32(before) * np.float32(multiplier_Gn[number, which])
            block[place : place + 2] = np.array([product], np.float32).astype(np.float16).view(np.uint8)
    return byte_GK.reshape(byte_RK.shape)


@pytest.mark.parametrize("kind", SIZES)
def test_values_are_those_of_the_bytes_with_products_in_them(kind, monkeypatch):
    """Both by a slow loop and the package gguf; some blocks at a time, the last ones fewer."""
    monkeypatch.setattr(blocks_module, "NUMBERS_AT_ONCE", 5 * SIZES[kind][0])
    byte_RK = random_bytes(kind)
    blocks = Blocks(kind, torch.from_numpy(byte_RK))
    multiplier_Gn = 1 + 0.2 * torch.randn(blocks.ones().shape, generator=torch.Generator().manual_seed(1))
    expected = with_products(kind, byte_RK, multiplier_Gn.numpy())
    assert np.array_equal(blocks.bytes(multiplier_Gn).numpy(), expected)
    if kind not in OWN_TYPES:
        values = gguf.quants.dequantize(expected, gguf.GGMLQuantizationType[kind])
        assert blocks.shape == values.shape
        np.testing.assert_allclose(blocks.values(multiplier_Gn).numpy(), values, rtol=1e-6, atol=1e-7)
    stored = {"": torch.from_numpy(expected)}
    assert torch.equal(blocks.values(multiplier_Gn), GgmlBlocks(type=kind, dtype="F32").unpack(stored))


@pytest.mark.parametrize("kind", SIZES)
def test_multipliers_of_one_give_the_very_bytes(kind):
    byte_RK = torch.from_numpy(random_bytes(kind))
    blocks = Blocks(kind, byte_RK)
    assert torch.equal(blocks.bytes(blocks.ones()), byte_RK)
    assert blocks.num_numbers == len(PLACES[kind])


@pytest.mark.parametrize("kind", [kind for kind in SIZES if PLACES[kind]])
def test_codes_and_factors_stay_whatever_the_multipliers(kind):
    byte_RK = torch.from_numpy(random_bytes(kind))
    blocks = Blocks(kind, byte_RK)
    before, after = (
        each.reshape(-1, SIZES[kind][1]) for each in (byte_RK, blocks.bytes(torch.full_like(blocks.ones(), 1.7)))
    )
    changed = {int(place) for place in (before != after).any(dim=0).nonzero()}
    assert changed <= {byte for place in PLACES[kind] for byte in (place, place + 1)}
    assert {place + 1 for place in PLACES[kind]} <= changed


@pytest.mark.parametrize("kind", [kind for kind in SIZES if PLACES[kind]])
def test_gradients_are_what_a_doubled_scale_adds(kind):
    """Values are linear in each number, and a power of two is not rounded: what it adds is the derivative."""
    blocks = Blocks(kind, torch.from_numpy(random_bytes(kind)))
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(blocks.shape, generator=generator)
    multiplier_Gn = blocks.ones().requires_grad_(True)
    (found_Gn,) = torch.autograd.grad((blocks.values(multiplier_Gn) * gradient).sum(), multiplier_Gn)
    for which in range(blocks.num_numbers):
        doubled_Gn = blocks.ones()
        doubled_Gn[:, which] = 2
        added = blocks.values(doubled_Gn) - blocks.values(blocks.ones())
        expected_G = (added.double() * gradient).reshape(-1, SIZES[kind][0]).sum(dim=-1)
        torch.testing.assert_close(found_Gn[:, which].double(), expected_G, rtol=1e-4, atol=1e-4)


def test_a_product_beyond_float16_is_its_largest_number():
    blocks = Blocks("Q8_0", torch.from_numpy(random_bytes("Q8_0")))
    values = blocks.values(torch.full_like(blocks.ones(), 1e9))
    assert torch.isfinite(values).all()


def test_a_tied_matrix_has_one_tensor_of_multipliers():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 32), "head": nn.Linear(32, 6, bias=False)})
    blocks = Blocks("Q4_0", torch.from_numpy(random_bytes("Q4_0", blocks=1)))
    multiplier_Gn = train_scales(model, ("embedding.weight", "head.weight"), blocks)
    assert [id(each) for each in model.parameters()] == [id(multiplier_Gn)]
    with torch.no_grad():
        multiplier_Gn *= 2
    for module in (model["embedding"], model["head"]):
        assert torch.equal(module.weight, blocks.values(multiplier_Gn))
    multiplier_Gn.requires_grad_(True)
    output = model["head"](model["embedding"](torch.tensor([1, 2])))
    (gradient_Gn,) = torch.autograd.grad(output.sum(), multiplier_Gn)
    assert (gradient_Gn != 0).all()


def test_plain_numbers_are_rounded_where_they_are_used_and_train_as_if_they_were_not():
    module = nn.LayerNorm(4)
    weight = train_rounded(module, "weight", torch.bfloat16)
    with torch.no_grad():
        weight.copy_(torch.tensor([1.001, 2.003, -0.3, 0.0]))
    assert torch.equal(module.weight, weight.to(torch.bfloat16).float())
    assert not torch.equal(module.weight, weight)
    (gradient,) = torch.autograd.grad((module.weight * torch.arange(4.0)).sum(), weight)
    assert torch.equal(gradient, torch.arange(4.0))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("olmoe") / "model", "olmoe", hidden_size=64, intermediate_size=32)


def test_experts_in_blocks_compute_what_their_values_do_and_gradients_are_those_of_the_values(olmoe):
    """The model with the values as its weights, all of them kept for the way back, is the slow reference."""
    layers = Architecture.of(open_checkpoint(olmoe)).layers
    model = load_model(olmoe).requires_grad_(False)
    stacks = {}
    for layer in layers:
        module = model.get_submodule(layer.experts)
        own = stacks[layer.experts] = {}
        for field, matrix in canonical_experts(module).tensors().items():
            byte_ERK = GgmlBlocks(type="Q4_0", dtype="F32").pack(matrix)[""]
            blocks = Blocks("Q4_0", byte_ERK)
            own[field] = [Stack(blocks=blocks, multiplier_Gn=blocks.ones().requires_grad_(True))]
        values = {field: each.blocks.values(each.multiplier_Gn).detach() for field, [each] in own.items()}
        module.gate_up_proj.data = torch.cat((values["gate_EFD"], values["up_EFD"]), dim=1)
        module.down_proj.data = values["down_EDF"]
        module.requires_grad_(True)
    ids_BS = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(3))
    with experts_apart(model):
        loss = model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)[..., 7].sum()
        matrices = [model.get_submodule(layer.experts).down_proj for layer in layers]
        gradients = torch.autograd.grad(loss, matrices)
    for layer in layers:
        model.get_submodule(layer.experts).requires_grad_(False)
    with experts_in_blocks(model, stacks):
        again = model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)[..., 7].sum()
        downs = [stacks[layer.experts]["down_EDF"][0] for layer in layers]
        found = torch.autograd.grad(again, [each.multiplier_Gn for each in downs])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)[..., 7].sum(), again)
    assert torch.equal(loss, again)
    for gradient, matrix, found_Gn in zip(gradients, matrices, found, strict=True):
        expected_G = (gradient * matrix).reshape(-1, 32).sum(dim=-1)
        torch.testing.assert_close(found_Gn[:, 0], expected_G, rtol=1e-4, atol=1e-6)


def test_experts_of_several_widths_are_computed_as_if_they_were_filled_up(olmoe):
    """Zeros in the place of neurons that are not there, and gradients of those that are."""
    layer = Architecture.of(open_checkpoint(olmoe)).layers[0]
    model = load_model(olmoe).requires_grad_(False)
    module, widths = model.get_submodule(layer.experts), [32, 64, 32, 64, 64, 32, 32, 64]
    generator = torch.Generator().manual_seed(5)
    stacks, filled = {}, {}
    for field, rows in (("gate_EFD", True), ("up_EFD", True), ("down_EDF", False)):
        filled[field] = torch.zeros(8, 64, 64)
        stacks[field] = []
        for width in (32, 64):
            experts = tuple(expert for expert, each in enumerate(widths) if each == width)
            matrix = torch.randn(4, *((width, 64) if rows else (64, width)), generator=generator) / 8
            blocks = Blocks("Q4_0", GgmlBlocks(type="Q4_0", dtype="F32").pack(matrix)[""])
            multiplier = blocks.ones().requires_grad_(True)
            stacks[field].append(Stack(blocks=blocks, multiplier_Gn=multiplier, experts=experts))
            for expert, value in zip(experts, blocks.values(multiplier).detach(), strict=True):
                filled[field][expert, : value.shape[0], : value.shape[1]] = value
    ids_BS = torch.randint(5, 60, (2, 16), generator=generator)
    with experts_in_blocks(model, {layer.experts: stacks}):
        found = model(input_ids=ids_BS, use_cache=False).logits.square().mean()
        down = stacks["down_EDF"]
        gradients = torch.autograd.grad(found, [each.multiplier_Gn for each in down])
    module.gate_up_proj.data = torch.cat((filled["gate_EFD"], filled["up_EFD"]), dim=1)
    module.down_proj.data = filled["down_EDF"]
    module.requires_grad_(True)
    with experts_apart(model):
        loss = model(input_ids=ids_BS, use_cache=False).logits.square().mean()
        [expected] = torch.autograd.grad(loss, [module.down_proj])
    torch.testing.assert_close(found, loss)
    for stack, gradient_Gn in zip(down, gradients, strict=True):
        _, rows, width = stack.blocks.shape
        product = (expected * filled["down_EDF"])[list(stack.experts), :rows, :width]
        torch.testing.assert_close(gradient_Gn[:, 0], product.reshape(-1, 32).sum(dim=-1), rtol=1e-3, atol=1e-6)
