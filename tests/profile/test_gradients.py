"""Profiles that send gradients back: the same forward statistics, and the gradients that plain autograd gives."""

import pytest
import torch

from coterie import compress
from coterie.errors import InputError
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.open import open_checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile import run as run_module
from coterie.profile.calibration import tokenize
from coterie.profile.profile import Profile
from coterie.profile.run import profile

SETTINGS = {"tokens": 96, "seq_len": 16, "sample_tokens": 40}


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def folder(request, tiny):
    return tiny(request.param)


def squared_slopes(folder, text):
    """Sums of (d_t . w_k)^2 over all tokens, by layer, and of (g d_t . w_k)^2 over tokens that chose e; slow loops."""
    model = load_model(folder, dtype=torch.float32)
    layers = Architecture.of(open_checkpoint(folder)).layers
    seen = []

    def experts(module, hidden_TD, index_TK, weight_TK):
        output_TD = routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)
        output_TD.retain_grad()
        seen.append((output_TD, index_TK, weight_TK.detach()))
        return output_TD

    energy = [0.0 for _ in layers]
    gradient = [0.0 for _ in layers]
    for ids_BS in tokenize(load_tokenizer(folder), text, seq_len=16, tokens=96).sequences.values():
        seen.clear()
        with intercepted(model, experts):
            logits = model(input_ids=ids_BS, use_cache=False).logits
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum"
            ).backward()
        for number, (layer, (output_TD, index_TK, weight_TK)) in enumerate(zip(layers, seen, strict=True)):
            down_EDF = canonical_experts(model.get_submodule(layer.experts)).down_EDF
            for token, gradient_D in enumerate(output_TD.grad):
                for expert, down_DF in enumerate(down_EDF):
                    slope_F = gradient_D.double() @ down_DF.double()
                    energy[number] = energy[number] + slope_F.square()[None] * _one_hot(expert, layer.num_experts)
                    for slot in range(layer.top_k):
                        if index_TK[token, slot] == expert:
                            row = (float(weight_TK[token, slot]) * slope_F).square()
                            gradient[number] = gradient[number] + row[None] * _one_hot(expert, layer.num_experts)
    return energy, gradient


def _one_hot(expert, count):
    found = torch.zeros(count, 1, dtype=torch.float64)
    found[expert] = 1
    return found


def test_gradient_statistics_equal_loops_over_autograd_on_the_whole_model(folder, text):
    found = profile(folder, text=text, gradients=True, **SETTINGS)
    energy, gradient = squared_slopes(folder, text)
    for layer in found.layers:
        for name, expected in (("gradient_energy", energy), ("channel_gradient", gradient)):
            value_EF = found.sum(layer.index, name)
            assert float(expected[layer.index].max()) > 0
            torch.testing.assert_close(
                value_EF / expected[layer.index].max(), expected[layer.index] / expected[layer.index].max(),
                rtol=1e-3, atol=1e-5,
            )  # fmt: skip


def test_what_the_forward_pass_measures_does_not_depend_on_gradients(folder, text):
    plain = profile(folder, text=text, **SETTINGS)
    found = profile(folder, text=text, gradients=True, **SETTINGS)
    for layer in plain.layers:
        held = plain.statistics[layer.index]
        assert found.statistics[layer.index].keys() - held.keys() == {"channel_gradient", "gradient_energy"}
        for name, value in held.items():
            torch.testing.assert_close(found.statistics[layer.index][name], value, rtol=1e-5, atol=1e-6)
        for name, value in plain.samples[layer.index].tensors().items():
            torch.testing.assert_close(found.samples[layer.index].tensors()[name], value, rtol=1e-5, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_profile(folder, text, tmp_path, monkeypatch):
    whole = profile(folder, tmp_path / "whole", text=text, gradients=True, **SETTINGS)
    real, written = run_module.write_layer, []

    def full(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(run_module, "write_layer", full)
    with pytest.raises(KeyboardInterrupt):
        profile(folder, tmp_path / "out", text=text, gradients=True, **SETTINGS)
    assert written == [len(whole.layers) - 1], "gradients come to the last layer first"
    monkeypatch.setattr(run_module, "write_layer", real)
    assert profile(folder, tmp_path / "out", text=text, gradients=True, **SETTINGS).digest() == whole.digest()
    assert Profile.load(tmp_path / "out").digest() == whole.digest()


@pytest.mark.long
def test_gradients_are_asked_for_where_a_recipe_needs_them(folder, text, tmp_path):
    held = profile(folder, text=text, **SETTINGS)
    with pytest.raises(InputError, match="run coterie profile with --gradients, or leave the profile out"):
        compress(folder, tmp_path / "out", keep=0.5, recipe="heapr", profile=held)
    assert not (tmp_path / "out").exists()
    made = compress(folder, tmp_path / "out", keep=0.5, recipe="heapr", text=text, **SETTINGS)
    assert made.manifest.recipe == "heapr"
