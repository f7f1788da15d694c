"""Profiling a model: what is measured leaves no trace, the sample is what it claims, and a layer proves itself."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from coterie import compress
from coterie.compress.recipes import get_recipe
from coterie.errors import (
    ArchitectureMismatch,
    InputError,
    NotAMoE,
    OutputExists,
    StaleArtifact,
    TextError,
    UnknownName,
)
from coterie.model.arch import router_scores as router_scores_module
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.seam import installed
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import ResultForm
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile import measure as measure_module
from coterie.profile import observation as observation_module
from coterie.profile import run as run_module
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.measure import profile_model
from coterie.profile.observation import TOLERANCE, observed, prove_layers
from coterie.profile.profile import FILE, Profile
from coterie.profile.run import profile
from coterie.profile.statistics import wanted_statistics
from coterie.profile.text import CalibrationText, TextSettings
from coterie.testing import CORE_FAMILIES
from manifests import manifest_of
from some import first

IDS = torch.arange(60).view(3, 20)
every_family = pytest.mark.parametrize("model_type", CORE_FAMILIES)


def loaded(path, dtype=None):
    model = load_model(path, dtype=dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the fast kernels know no float64
    return model, Architecture.of(Checkpoint.open(path)).layers


def forward(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- what the seam shows ------------------------------------------------------------------------------------------


@every_family
def test_an_observation_is_what_the_model_really_did(tiny, model_type):
    model, layers = loaded(tiny(model_type), torch.float64)
    received, returned, scores = [], [], []
    handles = []
    for layer in layers:
        experts, router = model.get_submodule(layer.experts), model.get_submodule(layer.router)
        handles.append(experts.register_forward_hook(lambda _, inputs, output: received.append((inputs, output))))
        handles.append(router.register_forward_hook(lambda _, inputs, output: scores.append(output)))
    model.set_experts_implementation("eager")
    plain = forward(model)
    for handle in handles:
        handle.remove()
    returned = [output for _, output in received]
    with observed(model, layers) as observations:
        torch.testing.assert_close(forward(model), plain, rtol=1e-9, atol=1e-9)
    assert [observation.layer for observation in observations] == list(layers)
    for observation, (inputs, _), output, score in zip(observations, received, returned, scores, strict=True):
        torch.testing.assert_close(observation.hidden_TD, inputs[0])
        assert torch.equal(observation.index_TK, inputs[1])
        torch.testing.assert_close(observation.weight_TK, inputs[2])
        torch.testing.assert_close(observation.output_TD, output)
        assert observation.logits_TE.shape == (60, 8)
        candidates = [each for each in score if each.shape == (60, 8)]
        assert any(torch.allclose(observation.logits_TE, each.to(observation.logits_TE.dtype)) for each in candidates)
        for token, slot in ((0, 0), (17, 1), (59, 0)):
            x_TD = observation.hidden_TD[token : token + 1]
            output_TD = observation.experts.output(int(observation.index_TK[token, slot]), x_TD)
            assert observation.norm_TK[token, slot].item() == pytest.approx(output_TD.norm().item(), rel=1e-5)


@every_family
def test_the_recorded_scores_rank_the_chosen_experts(tiny, model_type):
    # Scores of all experts, before the choice: where no correction bias is added, the best of them are chosen.
    model, layers = loaded(tiny(model_type))
    with observed(model, layers) as observations:
        forward(model)
    for observation in observations:
        best = observation.logits_TE.topk(2).indices.sort().values
        agree = (best == observation.index_TK.sort().values).all(-1)
        corrected = any("correction" in name for name, _ in observation.layer.router_tensors)
        assert agree.any() if corrected else agree.all()


def test_observing_leaves_no_trace(tiny):
    model, layers = loaded(tiny())
    plain = forward(model)

    def fail():
        with observed(model, layers):
            forward(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks(model) == 0
    assert not any(installed(module) for module in model.modules())
    assert torch.equal(forward(model), plain)


@pytest.mark.parametrize("passes", [0, 2])
def test_anything_but_one_forward_pass_is_an_error(tiny, passes):
    model, layers = loaded(tiny())

    def run():
        with observed(model, layers):
            for _ in range(passes):
                forward(model)

    with pytest.raises(ArchitectureMismatch, match="expected each of 2 once"):
        run()
    assert hooks(model) == 0


def test_a_model_that_records_no_scores_is_still_measured(tiny, text, monkeypatch):
    model, layers = loaded(tiny())
    monkeypatch.setattr(router_scores_module, "find_router", lambda *_: None)
    tokens = tokenize(load_tokenizer(tiny()), text, seq_len=8, tokens=32)
    found = profile_model(model, layers, tokens, model_digest="m")
    assert "usage" in found.statistics[0]
    assert "logit_sum" not in found.statistics[0]
    assert all(sample.logits_TE is None for sample in found.samples)


# --- the token sample ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tiny):
    """A model with its tokens, every token id different, and what a plain forward pass gives each layer."""
    model, layers = loaded(tiny("deepseek_v3"), torch.float64)
    rows = torch.randperm(270, generator=torch.Generator().manual_seed(0)).view(18, 15)
    token_set = TokenSet(sequences={"a": rows[:6], "b": rows[6:10]}, seq_len=15, digest="d")
    received: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    handles = [
        model.get_submodule(layer.experts).register_forward_pre_hook(
            lambda _, inputs, index=layer.index: received[index].append(inputs[0])
        )
        for layer in layers
    ]
    for ids in token_set.sequences.values():
        forward(model, ids)
    for handle in handles:
        handle.remove()
    return model, layers, token_set, [torch.cat(received[layer.index]) for layer in layers]


def positions(sample, all_TD):
    """Return the place of each token of a sample among all tokens."""
    distance = torch.cdist(sample.inputs_TD, all_TD)
    assert (distance.min(1).values < 1e-5).all(), "every row of the sample is a token of the text"
    assert (distance.topk(2, largest=False).values[:, 1] > 0.1).all(), "tokens can be told apart"
    return distance.argmin(1).tolist()


@pytest.mark.parametrize(
    ("sample_tokens", "expected"), [(20, [10, 10]), (7, [3, 3]), (150, [75, 60]), (10**6, [90, 60])]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_sample_is_bounded_shared_and_the_same_tokens_in_every_layer(numbered, sample_tokens, expected, batch_size):
    model, layers, token_set, received = numbered
    found = profile_model(
        model, layers, token_set, model_digest="m", sample_tokens=sample_tokens, batch_size=batch_size, seed=5
    )
    places = [positions(sample, all_TD) for sample, all_TD in zip(found.samples, received, strict=True)]
    assert places[0] == places[1], "the same positions, in the same order"
    assert len(set(places[0])) == len(places[0]), "no token twice"
    for sample in found.samples:
        assert torch.bincount(sample.domain_T, minlength=2).tolist() == expected
        assert len(sample.domain_T) <= sample_tokens
        assert (sample.domain_T == torch.tensor([place >= 90 for place in places[0]])).all()


def test_the_seed_decides_the_sample(numbered):
    model, layers, token_set, received = numbered

    def places(seed):
        found = profile_model(model, layers, token_set, model_digest="m", sample_tokens=30, seed=seed)
        return positions(found.samples[0], received[0])

    assert places(1) == places(1)
    assert places(1) != places(2)


def test_the_sample_explains_its_outputs(numbered):
    model, layers, token_set, _ = numbered
    found = profile_model(model, layers, token_set, model_digest="m", sample_tokens=24)
    for layer, sample in zip(layers, found.samples, strict=True):
        module = model.get_submodule(layer.experts)
        block = model.get_submodule(layer.block)
        width = layer.width
        for t in range(len(sample.inputs_TD)):
            x_D = sample.inputs_TD[t]
            with torch.no_grad():
                total_D = torch.zeros(32, dtype=torch.float64)
                for k in range(2):
                    e = int(sample.index_TK[t, k])
                    both = module.gate_up_proj[e] @ x_D
                    hidden_F = both[:width] * torch.sigmoid(both[:width]) * both[width:]
                    total_D += sample.weight_TK[t, k] * (module.down_proj[e] @ hidden_F)
                logits_E = block.gate.weight.float() @ x_D.float()
            torch.testing.assert_close(sample.output_TD[t], total_D, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(sample.logits_TE[t].float(), logits_E, rtol=1e-5, atol=1e-5)


# --- a layer proves itself ----------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", first(1, [*TOLERANCE, torch.float64]), ids=str)
def test_every_family_proves_itself_in_every_number_format(tiny, model_type, dtype):
    model, layers = loaded(tiny(model_type), dtype)
    plain = forward(model)
    errors = prove_layers(model, layers, IDS)
    assert errors.keys() == {0, 1}
    assert max(errors.values()) < TOLERANCE.get(dtype, 1e-12)
    assert torch.equal(forward(model), plain)


def swap(experts):
    return replace(experts, gate_EFD=experts.up_EFD, up_EFD=experts.gate_EFD)


def transpose_down(experts):
    return replace(experts, down_EDF=experts.down_EDF.transpose(1, 2))


def transpose_up(experts):
    return replace(experts, up_EFD=experts.up_EFD.transpose(1, 2))


def forget_bias(experts):
    return replace(experts, down_bias_ED=None)


def rotate(experts):
    return experts.select(torch.arange(8).roll(1))


def change_activation(experts):
    return replace(experts, combine=lambda gate, up: nn.functional.gelu(gate) * up)


FAULTS = {
    "gate and up swapped": ("olmoe", swap),
    "gate and up swapped, interleaved": ("gpt_oss", swap),
    "square down projection transposed": ("olmoe", transpose_down),
    "square up projection transposed": ("olmoe", transpose_up),
    "a bias forgotten": ("gpt_oss", forget_bias),
    "experts in another order": ("mixtral", rotate),
    "another activation": ("qwen3_moe", change_activation),
}


@pytest.mark.parametrize("broken_layer", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_read_wrongly_is_caught_and_named(tiny, monkeypatch, fault, broken_layer):
    model_type, change = FAULTS[fault]
    square = {"intermediate_size": 32} if "square" in fault else {}
    model, layers = loaded(tiny(model_type, **square))
    name = layers[broken_layer].experts
    wrong = model.get_submodule(name)

    def misread(module):
        experts = canonical_experts(module)
        if module is not wrong:
            return experts
        changed = change(experts)
        assert {n: t.shape for n, t in changed.tensors().items() if n in experts.tensors()} == {
            n: t.shape for n, t in experts.tensors().items() if n in changed.tensors()
        }, "no shape gives it away"
        return changed

    monkeypatch.setattr(observation_module, "canonical_experts", misread)
    with pytest.raises(ArchitectureMismatch, match=rf"^{name}: recomputed.*differs.*\d\.\d+e[+-]\d+ of.*limit 1e-04"):
        prove_layers(model, layers, IDS)
    assert not any(installed(module) for module in model.modules())


def test_a_family_whose_own_loop_does_not_use_its_declared_gate_is_caught(tiny, text, monkeypatch):
    model, layers = loaded(tiny())
    declared = lambda module, both: torch.relu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]  # noqa: E731
    monkeypatch.setattr(type(model.get_submodule(layers[0].experts)), "_apply_gate", declared)
    tokens = tokenize(load_tokenizer(tiny()), text, seq_len=8, tokens=32)
    with pytest.raises(ArchitectureMismatch, match=r"model\.layers\.0\.mlp\.experts"):
        profile_model(model, layers, tokens, model_digest="m")


@pytest.mark.parametrize(("model_type", "mark"), [("olmoe", False), ("gpt_oss", True)])
def test_channels_read_in_the_wrong_layout_are_caught(tiny, model_type, mark):
    # What gate and up are joined with undoes the wrong reading, so the output is right; the channels are not.
    model, layers = loaded(tiny(model_type))
    model.get_submodule(layers[1].experts).is_concatenated = mark
    with pytest.raises(
        ArchitectureMismatch, match=r"^model\.layers\.1\.mlp\.experts: with its channels in another order"
    ):
        prove_layers(model, layers, IDS)


def test_numbers_that_are_none_are_caught(tiny):
    model, layers = loaded(tiny())
    with torch.no_grad():
        model.get_submodule(layers[0].experts).down_proj[:, 0, 0] = float("nan")
    with pytest.raises(ArchitectureMismatch, match=r"model\.layers\.0\.mlp\.experts: recomputed.*nan"):
        prove_layers(model, layers, IDS)


def test_small_errors_are_told_apart_from_rounding(tiny, monkeypatch):
    model, layers = loaded(tiny())

    def off_by(share):
        def misread(module):
            return canonical_experts(module).map(lambda tensor: tensor * (1 + share))

        monkeypatch.setattr(observation_module, "canonical_experts", misread)
        return prove_layers(model, layers, IDS)

    assert max(off_by(1e-6).values()) < 1e-4
    with pytest.raises(ArchitectureMismatch):
        off_by(1e-3)


# --- from folder to folder ----------------------------------------------------------------------------------------


LAYER_FILES = ("profile-layer-00000.safetensors", "profile-layer-00001.safetensors")


def run(tiny, text, out=None, **options):
    return profile(tiny(), out, text=text, **({"tokens": 128, "seq_len": 16, "sample_tokens": 32} | options))


def test_from_a_model_and_text_to_a_profile(tiny, text, tmp_path):
    out = tmp_path / "run" / "profile"
    found = run(tiny, text, out)
    checkpoint = Checkpoint.open(tiny())
    assert found.model_digest == checkpoint.digest
    assert found.layers == Architecture.of(checkpoint).layers
    assert found.domains == ("code", "prose")
    assert found.num_tokens == (64, 64)
    assert (found.seq_len, found.seed) == (16, 0)
    for index in range(2):
        assert found.by_domain(index, "tokens").tolist() == [64, 64]
        assert found.sum(index, "usage").sum() == 2 * 128, "every token chose two experts"
        assert len(found.samples[index].inputs_TD) == 32
    again = Profile.load(out, model_digest=checkpoint.digest, text_digest=found.text_digest)
    for one, two in zip(found.statistics, again.statistics, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(file.name for file in out.iterdir()) == [*LAYER_FILES, FILE]


def test_the_same_again_is_the_same_bytes(tiny, text, tmp_path):
    for name in ("a", "b"):
        run(tiny, text, tmp_path / name)
    for name in (FILE, *LAYER_FILES):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_what_is_named_is_measured_and_the_file_says_so(tiny, text, tmp_path):
    run(tiny, text, tmp_path / "out", statistics=["reap", "usage"])
    found = Profile.load(tmp_path / "out")
    assert found.asked == ("usage", "reap")
    assert [set(held) for held in found.statistics] == [{"usage", "reap"}] * 2
    assert json.loads((tmp_path / "out" / FILE).read_text())["body"]["statistics"] == ["usage", "reap"]
    every = run(tiny, text)
    for index in range(2):
        assert torch.equal(found.by_domain(index, "reap"), every.by_domain(index, "reap"))
        assert torch.equal(found.samples[index].inputs_TD, every.samples[index].inputs_TD)


def test_a_statistic_that_needs_gradients_gets_them(tiny, text):
    found = run(tiny, text, statistics=["channel_fisher"])
    assert [set(held) for held in found.statistics] == [{"channel_fisher"}] * 2
    assert all(found.sum(index, "channel_fisher").max() > 0 for index in range(2))


def test_unknown_statistics_are_refused_before_anything_is_computed(tiny, text, monkeypatch):
    monkeypatch.setattr(measure_module.Measure, "stream", None)
    with pytest.raises(UnknownName, match="unknown statistic 'raep'; did you mean reap"):
        run(tiny, text, statistics=["raep"])
    settings = measure_module.ProfileSettings(statistics=("raep",))
    checkpoint = Checkpoint.open(tiny())
    calibration_text = CalibrationText(checkpoint, TextSettings(source=text, tokens=64, seq_len=16))
    with pytest.raises(UnknownName, match="unknown statistic 'raep'; did you mean reap"):
        settings.measure(checkpoint, Architecture.of(checkpoint), calibration_text)


def test_a_run_that_was_ended_early_does_not_go_on_with_other_statistics(tiny, text, tmp_path, monkeypatch):
    real, written = run_module.write_layer, []

    def full(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(run_module, "write_layer", full)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, text, tmp_path / "out", statistics=["usage"])
    monkeypatch.setattr(run_module, "write_layer", real)
    with pytest.raises(StaleArtifact, match="statistics"):
        run(tiny, text, tmp_path / "out", statistics=["reap"])
    assert run(tiny, text, tmp_path / "out", statistics=["usage"]).asked == ("usage",)


@pytest.mark.parametrize("recipe", ["reap", "naee", "heapr"])
def test_compress_without_a_profile_measures_only_what_its_recipe_needs(tiny, text, tmp_path, monkeypatch, recipe):
    measured = []

    class Recorded(measure_module.Collector):
        def __init__(self, token_set, names, **options):
            measured.append(set(names))
            super().__init__(token_set, names, **options)

    monkeypatch.setattr(measure_module, "Collector", Recorded)
    compress(
        tiny(), tmp_path / "out", keep=0.5, recipe=recipe, text=text, tokens=128, seq_len=16, sample_tokens=32
    )  # fmt: skip
    assert measured == [set(get_recipe(recipe).needs)] * 2


def test_compress_measures_for_other_recipes_too_where_the_profile_is_kept(tiny, text, tmp_path):
    compress(
        tiny(), tmp_path / "out", keep=0.5, recipe="reap", profile=tmp_path / "profile", text=text, tokens=128,
        seq_len=16, sample_tokens=32,
    )  # fmt: skip
    held = Profile.load(tmp_path / "profile")
    assert held.asked == wanted_statistics()
    compress(tiny(), tmp_path / "other", keep=0.5, recipe="hc-smoe", profile=held)


def test_a_profile_of_other_statistics_is_refused_with_the_command_that_measures_them(tiny, text, tmp_path):
    held = run(tiny, text, statistics=["usage"])
    with pytest.raises(InputError, match=r"reap, which the profile does not hold: .*--statistics reap, with --rec"):
        compress(tiny(), tmp_path / "out", keep=0.5, recipe="reap", profile=held)
    compress(tiny(), tmp_path / "out", keep=0.5, recipe="frequency", profile=held)


def test_only_some_domains(tiny, text):
    found = run(tiny, text, domains=("prose",))
    assert found.domains == ("prose",)
    assert found.num_tokens == (128,)
    with pytest.raises(UnknownName, match="prose"):
        run(tiny, text, domains=("prosa",))


def test_a_profile_is_never_overwritten(tiny, text, tmp_path, monkeypatch):
    (tmp_path / FILE).write_text("kept")
    monkeypatch.setattr(measure_module.Measure, "stream", None)  # refused before anything is computed
    with pytest.raises(OutputExists, match="exists; choose another place"):
        run(tiny, text, tmp_path)
    assert (tmp_path / FILE).read_text() == "kept"


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": -1}, {"sample_tokens": 0}])
def test_nothing_to_measure_is_refused(tiny, text, options):
    with pytest.raises(InputError, match="nothing can be measured"):
        run(tiny, text, **options)


def test_text_problems_come_before_the_model_is_loaded(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_module.Measure, "stream", None)
    with pytest.raises(TextError, match="is not a folder"):
        run(tiny, tmp_path / "nowhere")
    with pytest.raises(TextError, match="fewer than one sequence of 100000"):
        run(tiny, text, seq_len=100_000)


def test_a_mapped_result_is_refused(tiny, text, tmp_path):
    shutil.copytree(tiny(), tmp_path / "mapped")
    manifest_of(form=ResultForm.MAPPED, router="map").write(tmp_path / "mapped", {})
    with pytest.raises(InputError, match="is a mapped result; profile the model that it was made from"):
        profile(tmp_path / "mapped", text=text)


def test_a_dense_model_is_refused(tiny, text, tmp_path):
    shutil.copytree(tiny(), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotAMoE):
        profile(tmp_path / "dense", text=text)


def test_profiling_says_nothing_and_draws_nothing_outside_a_terminal(tiny, text, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        run(tiny, text)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
