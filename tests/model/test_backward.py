"""Gradients through a streamed model against autograd on the model as a whole."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream import loss as loss_module
from coterie.model.stream.stream import Stream
from coterie.profile.observation import observed
from coterie.testing import tiny_checkpoint
from some import first

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_moe", "glm4_moe"]

#: Elements of a slice of logits: all positions at once, five, one.
SLICES = [2**25, 2 * 6 * 300, 0]


def whole_model_gradients(folder, ids_BS):
    """Loss, and the gradient at each layer's routed output, by plain autograd."""
    model = load_model(folder, dtype=torch.float32)
    found = []

    def experts(module, hidden_TD, index_TK, weight_TK):
        output_TD = routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)
        output_TD.retain_grad()
        found.append(output_TD)
        return output_TD

    with intercepted(model, experts):
        logits = model(input_ids=ids_BS, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum")
        loss.backward()
    return float(loss.detach()), [output_TD.grad for output_TD in found]


@pytest.mark.parametrize(
    ("family", "elements"),
    first(
        3,
        [
            ("granitemoe", SLICES[1]),
            *(("olmoe", few) for few in SLICES[1:]),
            *((family, SLICES[0]) for family in FAMILIES),
        ],
    ),
)
def test_gradients_at_every_layer_equal_those_of_the_whole_model(family, elements, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_module, "LOSS_ELEMENTS", elements)
    folder = tiny_checkpoint(tmp_path / "model", family)
    ids = [torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = [whole_model_gradients(folder, ids_BS) for ids_BS in ids]
    checkpoint = open_checkpoint(folder)
    layers = Architecture.of(checkpoint).layers
    found = {job: {} for job in range(len(ids))}
    order = []
    with Stream(checkpoint) as stream:
        run = stream.run([stream.loss_job(ids_BS) for ids_BS in ids], gradients=True)
        for stage in run:
            order.append((stage.unit.name, stage.backward))
            here = tuple(layer for layer in layers if stage.unit.holds(layer.experts))
            for call in stage.calls:
                gradients = {}
                with observed(stream.model, here, gradients=gradients):
                    call.finish(call.compute())
                if stage.backward:
                    found[call.job] |= gradients
    for job, (loss, gradients) in enumerate(expected):
        assert run.results[job] == pytest.approx(loss, rel=1e-5)
        assert sorted(found[job]) == [layer.index for layer in layers]
        for index, gradient_TD in enumerate(gradients):
            scale = float(gradient_TD.abs().max())
            assert scale > 0
            torch.testing.assert_close(found[job][index] / scale, gradient_TD / scale, rtol=1e-3, atol=1e-4)
    there = [name for name, backward in order if not backward]
    back = [name for name, backward in order if backward]
    assert back == [name for name in reversed(there) if name in back]
    assert {layer.block.rpartition(".")[0] for layer in layers} <= set(back)


@pytest.mark.parametrize("elements", SLICES)
def test_the_gradient_of_a_loss_in_slices_is_that_of_all_logits_at_once(elements, monkeypatch):
    monkeypatch.setattr(loss_module, "LOSS_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(4)
    weight_VD, bias_V = torch.randn(300, 8, generator=generator).double(), torch.randn(300, generator=generator)
    hidden_BSD = torch.randn(2, 13, 8, generator=generator).double()
    ids_BS = torch.randint(300, (2, 13), generator=generator)
    sizes = []

    def head(ids_BP, output):
        assert torch.equal(ids_BP, ids_BS[:, sum(size - 1 for size in sizes) :][:, : ids_BP.shape[1]])
        sizes.append(ids_BP.shape[1])
        return torch.tanh(output.last_hidden_state @ weight_VD.T) * 3 + bias_V  # as with a soft cap

    loss, gradient_BSD = loss_module.loss_and_gradient(
        head, ids_BS, BaseModelOutput(last_hidden_state=hidden_BSD), vocab_size=300
    )
    assert max(sizes) * 2 * 300 <= max(elements, 2 * 2 * 300)
    expected_loss, expected_BSD = 0.0, torch.zeros_like(hidden_BSD)
    for row in range(2):
        for place in range(12):
            raw_V = torch.tanh(weight_VD @ hidden_BSD[row, place])
            share_V = (3 * raw_V + bias_V).softmax(0)
            token = int(ids_BS[row, place + 1])
            expected_loss -= float(share_V[token].log())
            share_V[token] -= 1
            expected_BSD[row, place] = (share_V * 3 * (1 - raw_V.square())) @ weight_VD
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    torch.testing.assert_close(gradient_BSD, expected_BSD, rtol=1e-9, atol=1e-12)
