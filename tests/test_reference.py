"""The training of the reference models: the fast pass is the stock one, balancing balances, a resume is no break."""

import argparse
import copy
import importlib
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

REFERENCE = Path(__file__).parent.parent / "reference"
NAMES = ("olmoe", "glm4_moe", "qwen3_moe")
MODULES = ("data", "fast", "optim", "families", *(f"families.{name}" for name in NAMES), "train", "card")
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts_per_tok": 3}
FAMILY_SIZES = {
    "olmoe": {"intermediate_size": 10, "num_experts": 6, "num_key_value_heads": 4},
    "glm4_moe": {"intermediate_size": 20, "moe_intermediate_size": 10, "n_routed_experts": 6, "head_dim": 8},
    "qwen3_moe": {"moe_intermediate_size": 10, "num_experts": 6, "head_dim": 8},
}


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts' modules, importable for as long as this file runs."""
    sys.path.insert(0, str(REFERENCE))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(REFERENCE))
        for name in MODULES:
            sys.modules.pop(name, None)


def build_tiny(family: ModuleType, name: str, vocabulary: int = 61) -> PreTrainedModel:
    """A float32 model of the family at a tiny size; all else as the reference model has it."""
    config = family.build(0, "cpu").config
    for key, value in (SIZES | FAMILY_SIZES[name] | {"vocab_size": vocabulary}).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = family.MODEL(config).float()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model


def draw_tokens(rows: int = 2, length: int = 17) -> tuple[Tensor, Tensor]:
    windows = torch.randint(0, 61, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return windows[:, :-1], windows[:, 1:]


def find_gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_fast_pass_has_the_stock_loss_gradients_and_routing(modules, name):
    family = modules[f"families.{name}"]
    model = build_tiny(family, name)
    tokens, labels = draw_tokens()
    chosen = []
    for block in modules["fast"].moe_blocks(model):
        block.gate.register_forward_hook(lambda module, arguments, output: chosen.append(output[2]))

    loss, prob_LE, load_LE = family.training_pass(model, tokens, labels)
    stock = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())

    torch.testing.assert_close(loss, stock, rtol=1e-5, atol=1e-6)
    fast, slow = find_gradients(loss, model), find_gradients(stock, model)
    assert min(grad.abs().max().item() for grad in slow.values()) > 1e-4  # no parameter is out of play
    for key in slow:
        assert torch.allclose(fast[key], slow[key], rtol=1e-4, atol=1e-6), key
    assert len(chosen) == len(load_LE) == {"olmoe": 3, "glm4_moe": 2, "qwen3_moe": 3}[name]
    for index_TK, load_E in zip(chosen, load_LE, strict=True):
        counted = [sum(e in row for row in index_TK.tolist()) / len(index_TK) for e in range(6)]
        assert load_E.tolist() == pytest.approx(counted)
    torch.testing.assert_close(prob_LE.sum(1), torch.ones(len(prob_LE)))


def test_fast_pass_refuses_what_it_would_compute_wrongly(modules):
    family = modules["families.glm4_moe"]
    model = build_tiny(family, "glm4_moe")
    model.config.n_group = 2
    with pytest.raises(ValueError, match="one group only"):
        family.training_pass(model, *draw_tokens())


@pytest.mark.parametrize("name", NAMES)
def test_reference_models_have_the_documented_size_and_start_in_bfloat16(modules, name):
    model = modules[f"families.{name}"].build(0, "cpu")
    sizes = {"olmoe": 17_881_344, "glm4_moe": 8_573_952, "qwen3_moe": 17_582_848}
    assert sum(p.numel() for p in model.parameters()) == sizes[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    biases = [b for key, b in model.named_buffers() if "correction_bias" in key]
    assert [b.dtype for b in biases] == [torch.float32] * {"olmoe": 0, "glm4_moe": 5, "qwen3_moe": 0}[name]


def test_the_correction_bias_evens_out_the_load(modules):
    family, fast = modules["families.glm4_moe"], modules["fast"]
    model = build_tiny(family, "glm4_moe")
    tokens, labels = draw_tokens(rows=8, length=64)
    first = fast.moe_blocks(model)[0].gate.e_score_correction_bias.clone()
    with torch.no_grad():
        before_LE = family.training_pass(model, tokens, labels)[2]
        family.adjust(model, before_LE, 0.5)
        moved_E = fast.moe_blocks(model)[0].gate.e_score_correction_bias - first
        for e, load in enumerate(before_LE[0].tolist()):  # six experts, three slots: an even load is a half
            assert moved_E[e].item() == pytest.approx(0.5 * family.BIAS_RATE * (1 if load < 0.5 else -1), abs=1e-6)
        for scale in [4.0] * 50 + [1.0] * 10:
            family.adjust(model, family.training_pass(model, tokens, labels)[2], scale)
        after_LE = family.training_pass(model, tokens, labels)[2]
    assert before_LE.max() - before_LE.min() > 0.3
    assert after_LE.max() - after_LE.min() < 0.1


@pytest.fixture
def train(modules, monkeypatch, tmp_path) -> ModuleType:
    """The training script at home in a folder with a corpus of two domains, of nonsense, and with a tiny model."""
    train, data, family = modules["train"], modules["data"], modules["families.glm4_moe"]
    rng = random.Random(0)
    for folder in ("corpus/train", "text/calibration"):
        (tmp_path / folder).mkdir(parents=True)
        for domain, letters in (("low", "abcdef "), ("high", "uvwxyz ")):
            documents = ["".join(rng.choices(letters, k=3000)) for _ in range(6)]
            (tmp_path / folder / f"{domain}.txt").write_text(f"\n{data.END}\n".join(documents))
    model = build_tiny(family, "glm4_moe", vocabulary=300)
    monkeypatch.setattr(family, "build", lambda end, device: copy.deepcopy(model))
    monkeypatch.setattr(data, "VOCABULARY", 300)
    names = {"HERE": tmp_path, "RUN": tmp_path / "run", "NUM_WINDOWS": 2, "MICRO_WINDOWS": 1, "SHARES": {}}
    for name, value in names.items():
        monkeypatch.setattr(train, name, value)
    return train


@pytest.mark.long
def test_a_resumed_run_ends_as_one_without_a_break(train, tmp_path):
    arguments = argparse.Namespace(model="glm4_moe", device="cpu", steps=4, minutes=None, threads=1)
    straight = train.Trainer(arguments)
    losses = [straight.train_step()["lm_loss"] for _ in range(4)]

    broken = train.Trainer(arguments)
    assert [broken.train_step()["lm_loss"] for _ in range(2)] == losses[:2]
    broken.save()
    resumed = train.Trainer(arguments)
    resumed.resume(4, None)
    assert [resumed.train_step()["lm_loss"] for _ in range(2)] == losses[2:]
    expected = straight.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in resumed.model.state_dict().items())
    assert (tmp_path / "run" / "glm4_moe" / "checkpoint.pt").exists()


def test_a_run_of_minutes_ends_in_time_at_a_varying_pace(train, monkeypatch, tmp_path):
    now = 0.0
    rates = []
    plain_step = train.Trainer.train_step

    def timed_step(trainer: object) -> dict[str, float]:
        nonlocal now
        now += 180 if 240 <= now < 600 else 60  # somebody else has the machine for a while
        record = plain_step(trainer)
        rates.append(record["rate"] / train.MUON_RATE)
        return record

    monkeypatch.setattr(train.Trainer, "train_step", timed_step)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now))
    arguments = {"model": "glm4_moe", "device": "cpu", "steps": 1000, "minutes": 12, "threads": 1}
    train.train(argparse.Namespace(**arguments, compile=False, save_minutes=4, export=tmp_path / "out"))

    assert now == 720
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])  # the last quarter begins at 540


def test_a_resume_changes_the_plan_only_before_the_decay(train):
    arguments = argparse.Namespace(model="glm4_moe", device="cpu", steps=8, minutes=None, threads=1)
    trainer = train.Trainer(arguments)
    trainer.step, trainer.seconds = 3, 90.0
    trainer.save()
    for steps, minutes, plan in ((20, None, (20, None)), (2, None, (4, None)), (8, 1.0, (8, 2.0))):
        trainer.resume(steps, minutes)
        assert (trainer.steps, trainer.minutes) == plan
    assert trainer.in_decay
    trainer.save()
    trainer.resume(50, 60.0)
    assert (trainer.steps, trainer.minutes) == (8, 2.0)


def test_an_export_is_a_stock_folder_with_the_correction_bias_in_float32(train, tmp_path):
    trainer = train.Trainer(argparse.Namespace(model="glm4_moe", device="cpu", steps=4, minutes=None, threads=1))
    train.export(trainer.model.bfloat16(), trainer.tokenizer, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_card_counts_what_the_routers_choose(modules, name):
    family, card = modules[f"families.{name}"], modules["card"]
    model = build_tiny(family, name)
    tokens, labels = draw_tokens()
    windows = torch.cat((tokens, labels[:, -1:]), dim=1)
    with torch.no_grad():
        loss, _, load_LE = family.training_pass(model, tokens, labels)
        measured, accuracy, counts_LE = card.measure_domain(model, windows)
        right = (model(tokens).logits.argmax(-1) == labels).float().mean().item()
    torch.testing.assert_close(counts_LE.float() / tokens.numel(), load_LE)
    assert measured == pytest.approx(loss.item(), rel=1e-5)
    assert accuracy == pytest.approx(right)


def test_mutual_information_is_all_or_nothing_at_the_extremes(modules):
    apart = torch.tensor([[[8, 0], [4, 4]], [[0, 4], [2, 2]]])  # domain, layer, expert
    first, second = modules["card"].measure_routing(apart)
    assert first["mutual_information_bits"] == pytest.approx(1.0)
    assert first["mutual_information_normalised"] == pytest.approx(1.0)
    assert second["mutual_information_bits"] == pytest.approx(0.0, abs=1e-12)
    assert (first["entropy"], second["entropy"]) == pytest.approx((1.0, 1.0))
