"""Gradients through a streamed model against autograd on the model as a whole."""

import pytest
import torch

from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream.stream import Stream
from coterie.profile.observation import observed
from coterie.testing import tiny_checkpoint

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_moe", "glm4_moe"]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_every_layer_equal_those_of_the_whole_model(family, tmp_path):
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
    assert {layer.experts.rpartition(".mlp")[0] for layer in layers} <= set(back)
