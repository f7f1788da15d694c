"""The study behind the recipe `coterie` runs, goes on where it was, and measures what the package makes."""

import importlib
import json
import math
import sys
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import torch

from coterie.artifact import digest_of
from coterie.compress.apply import compress
from coterie.compress.methods import segment
from coterie.compress.methods.slim import RANKINGS, SCORES
from coterie.evaluate.run import evaluate
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.open import open_checkpoint
from coterie.profile.profile import Profile
from coterie.testing import tiny_text
from coterie.train.distill import divergence_loss
from coterie.train.loop import Loop
from coterie.train.model import experts_apart, trainable
from coterie.train.optimiser import Adam, load_optimiser
from coterie.train.predictions import Predictions
from coterie.train.schedule import Schedule, rate_at, shuffled

pytestmark = pytest.mark.long

SMALL = ("--tokens", 1024, "--test-tokens", 256, "--seq-len", 32, "--scale", 1 / 64)

#: Some of each group, and every choice that training has.
TRIED = {
    "score": ["activation-uniform", "activation-ragged", "heapr-ragged", "fisher-uniform", "mean-ragged", "reap"],
    "form": [
        "whole-experts", "parts-2", "parts-3", "gap-0", "chosen-0.75", "chosen-1.5", "ragged-layers",
        "ragged-everywhere",
    ],
    "refit": ["no-refit", "joint", "joint-256", "removal", "removal-joint", "narrower-joint"],
    "rate": ["rate-0.01"],
    "distil": [
        "untrained", "step-512", "classes-64", "attention-too", "hidden-1", "muon", "eigenbasis",
        "average-0.5", "own-text", "from-narrower", "text-2x", "text-4x-fall", "four-times", "from-ragged",
    ],
    "answers": ["answers-msan", "answers-slow", "answers-asked"],
}  # fmt: skip
NAMES = [name for names in TRIED.values() for name in names]


@pytest.fixture(scope="module")
def research(importable):
    return importlib.import_module("research")


@pytest.fixture(scope="module")
def parts(research):
    return importlib.import_module("research_training")


@pytest.fixture(scope="module")
def optimisers(research):
    return importlib.import_module("research_optimisers")


@pytest.fixture(scope="module")
def command(research, tiny, text, tmp_path_factory):
    """Run the script on a tiny model whose experts can be cut into 2, 3, 4 and 6 parts; what it says comes back."""
    model = tiny(intermediate_size=96)
    test = tiny_text(tmp_path_factory.mktemp("test"), seed=1)

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            places = ("--model", model, "--text", text, "--test", test)
            patch.setattr(sys, "argv", ["research.py", *map(str, (*places, *SMALL, *arguments))])
            research.main()

    run.model, run.text, run.test = model, text, test
    return run


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    """A folder with results, and the tables of them."""
    out = tmp_path_factory.mktemp("study")
    before = set(SCORES), set(RANKINGS), segment.GAP
    command("--out", out, "--markdown", out / "tables.md", "--variants", *NAMES)
    assert (set(SCORES), set(RANKINGS), segment.GAP) == before, "the package is as it was"
    return out


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_variant_has_a_line_and_a_row(research, done):
    found = lines(done)
    assert [line["name"] for line in found] == NAMES
    assert len({line["key"] for line in found}) == len(NAMES)
    tables = (done / "tables.md").read_text()
    for line in found:
        assert line["name"] in TRIED[line["group"]]
        assert 0 < line["kl"] < 5
        assert 0 < line["agreement"] < 1
        kl = line["kl_by_domain"]
        assert line["kl"] == pytest.approx(sum(kl.values()) / 2)
        assert line["worst_kl"] == kl[line["worst_domain"]] == max(kl.values())
        [row] = [row for row in tables.splitlines() if row.startswith(f"| {line['name']} |")]
        cells = [cell.strip() for cell in row.split("|")[3:-1]]
        numbers = [f"{line['kl']:.4f}", f"{line['agreement']:.1%}", f"{line['worst_kl']:.3f}", f"{line['seconds']:.1f}"]
        if line["group"] == "answers":
            numbers.append(f"{line['exact']:.1%}")
            assert 0 <= line["exact"] <= 1
        assert cells == numbers
    assert [row for row in tables.splitlines() if row[:2] == "##"] == [
        f"## {title}" for title in research.GROUPS.values()
    ]


def test_training_has_the_steps_that_it_says(done):
    steps = {line["name"]: line["steps"] for line in lines(done) if "steps" in line}
    assert set(steps) == {*TRIED["rate"], *TRIED["distil"], *TRIED["answers"]} - {"untrained", "answers-msan"}
    assert steps.pop("step-512") == 2
    assert steps.pop("text-2x") == 1
    assert {steps.pop(name) for name in ("four-times", "from-ragged", "text-4x-fall")} == {2}
    assert set(steps.values()) == {1}


def test_what_is_the_same_gives_the_same(done):
    kl = {line["name"]: line["kl"] for line in lines(done)}
    assert kl["untrained"] == kl["joint"]
    assert kl["joint"] < kl["no-refit"]
    assert kl["removal-joint"] < kl["removal"]
    assert len(set(kl.values())) == len(kl) - 1, "all others differ"


def test_the_same_command_computes_nothing_again(research, command, done, monkeypatch, capsys):
    before = (done / "results.jsonl").read_bytes()
    monkeypatch.setattr(research.Study, "measure", lambda study, variant: pytest.fail(f"{variant.name} again"))
    monkeypatch.setattr(research, "profile", lambda *_, **__: pytest.fail("profiled again"))
    command("--out", done, "--variants", *NAMES)
    assert capsys.readouterr().out == (done / "tables.md").read_text()
    assert (done / "results.jsonl").read_bytes() == before


def test_other_settings_are_measured_anew_and_a_torn_line_counts_as_none(
    research, command, done, tmp_path, monkeypatch
):
    out = tmp_path / "study"
    out.mkdir()
    content = (done / "results.jsonl").read_text()
    torn = next(line for line in content.splitlines() if json.loads(line)["name"] == "joint")
    (out / "results.jsonl").write_text(content.replace(torn + "\n", "") + torn[:-20])
    for name in ("starts", *(folder.name for folder in done.glob("profile-*"))):
        (out / name).symlink_to(done / name)
    seen = []
    measure = research.Study.measure
    monkeypatch.setattr(
        research.Study, "measure", lambda study, variant: seen.append(variant.name) or measure(study, variant)
    )
    command("--out", out, "--variants", "joint", "no-refit", "step-512", "--scale", 1 / 32)
    assert seen == ["joint", "step-512"], "the one that was torn, and the one that is trained on more"
    command("--out", out, "--variants", "joint", "no-refit", "step-512", "--scale", 1 / 32)
    assert len(seen) == 2
    last = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()[-2:]]
    assert [line["name"] for line in last] == ["joint", "step-512"]
    assert last[1]["steps"] == 4
    assert {key: value for key, value in last[0].items() if key != "seconds"} == {
        key: value for key, value in json.loads(torn).items() if key != "seconds"
    }


def test_the_numbers_are_those_of_the_package(command, done, tmp_path):
    held = Profile.load(next(done.glob("profile-*")))
    options = {"keep": 0.5, "profile": held}
    made = {
        "joint": compress(command.model, tmp_path / "parts", recipe="coterie", effort="fast", **options),
        "heapr-ragged": compress(command.model, tmp_path / "ragged", recipe="heapr-ragged", **options),
        "reap": compress(command.model, tmp_path / "reap", recipe="reap", **options),
    }
    cards = evaluate(
        [result.out for result in made.values()], against=command.model, text=command.test, tokens=256, seq_len=32,
        questions=0,
    )  # fmt: skip
    found = {line["name"]: line for line in lines(done)}
    for name, card in zip(made, cards, strict=True):
        assert found[name]["kl"] == pytest.approx(card.overall["kl"], rel=1e-3), name
        assert found[name]["agreement"] == pytest.approx(card.overall["agreement"], abs=0.005), name


def test_a_choice_that_was_added_later_leaves_other_results_what_they_are(research, parts, tmp_path):
    usual = next(each for each in research.variants() if each.name == "step-2048")
    results = research.Results(tmp_path, {})
    results.add(usual, {"kl": 0.5})
    assert results.find(usual) is not None
    for change in ({"rate": 0.1}, {"order": 1}, {"sure": 1.0}):
        assert results.find(replace(usual, training=replace(usual.training, **change))) is None, change
    about = {key: value for key, value in asdict(usual).items() if key not in ("group", "says")}
    assert results.find(usual)["key"] == digest_of([{}, about | {"training": {}}])[:16], "all is as usual"


def test_tokens_of_which_the_original_is_sure_count_more(parts, command):
    original, model = (load_model(command.model, dtype=torch.float32).requires_grad_(False) for _ in range(2))
    for each, factor in ((original, 40.0), (model, 25.0)):
        each.get_output_embeddings().weight.mul_(factor)
    ids_BS = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    log_p_TV, log_q_TV = (
        each(input_ids=ids_BS).logits.double().log_softmax(-1).flatten(0, 1) for each in (original, model)
    )
    total = weights = 0.0
    for log_p_V, log_q_V in zip(log_p_TV, log_q_TV, strict=True):
        weight = 5.0 if max(log_p_V.exp().tolist()) > 0.9 else 1.0
        total += weight * float((log_p_V.exp() * (log_p_V - log_q_V)).sum())
        weights += weight
    assert len(log_p_TV) < weights < 5 * len(log_p_TV), "some are sure, some are not"
    plain, loss = parts._loss(model, original, ids_BS, parts.Training(sure=4.0))
    assert float(loss) == pytest.approx(total / weights, rel=1e-3)
    assert float(loss) != pytest.approx(float(plain), rel=1e-2)


def test_what_a_model_cannot_be_is_left_out_and_said(research, tiny, command, tmp_path, capsys):
    command("--model", tiny(), "--out", tmp_path, "--variants", "parts-4", "narrower")
    said = capsys.readouterr()
    assert "parts-4 is left out: experts of width 24 cannot be cut into 4 parts here" in said.err
    assert [line["name"] for line in lines(tmp_path)] == ["narrower"]
    assert "| parts-4 | experts are cut into 4 parts, the best parts stay | - | - | - | - |" in said.out


def test_all_variants_are_listed_and_others_refused(research, command, capsys):
    command("--list")
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    every = research.variants()
    assert listed == [[variant.group, variant.name] for variant in every]
    assert len({variant.name for variant in every}) == len(every)
    assert not any("|" in variant.says for variant in every), "it would end a cell of the table"
    command("--list", "--only", "refit,score", "--variants", "joint", "reap", "parts-4")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["reap", "joint"]
    for wrong, message in (
        (["--only", "forms"], "unknown group forms; choose from score, form"),
        (["--variants", "x"], "'x'"),
    ):
        with pytest.raises(SystemExit):
            command(*wrong)
        assert message in capsys.readouterr().err


def test_the_package_is_as_it_was_when_something_fails(parts):
    before = dict(SCORES), dict(RANKINGS), segment.GAP
    for context in (parts.added_scores(), parts.router_gap(0.7)):
        with suppress(RuntimeError), context:
            assert before != (SCORES, RANKINGS, segment.GAP)
            raise RuntimeError("something else")
    assert before == (SCORES, RANKINGS, segment.GAP)


def test_neurons_are_removed_as_by_least_squares_tried_one_by_one(parts):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 40, 6, generator=generator, dtype=torch.float64)
    hidden[:, :, 4] = hidden[:, :, 1] + 0.1 * hidden[:, :, 4]  # two that can do each other's work
    down = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    added_EF, order_EF = parts.greedy_removal(hidden.mT @ hidden, down)
    for expert in range(3):
        wanted = hidden[expert] @ down[expert].T
        left, error = list(range(6)), 0.0
        for step in range(6):
            errors = {}
            for neuron in left:
                others = hidden[expert][:, [each for each in left if each != neuron]]
                best = torch.linalg.lstsq(others, wanted).solution if others.shape[1] else wanted.new_zeros(0, 5)
                errors[neuron] = float((wanted - others @ best).square().sum())
            cheapest = min(left, key=lambda neuron: errors[neuron])
            assert order_EF[expert, step] == cheapest
            assert float(added_EF[expert, step]) == pytest.approx(errors[cheapest] - error, rel=1e-6)
            error = errors[cheapest]
            left.remove(cheapest)


def test_a_ranking_by_removal_is_its_order_and_has_no_ties(parts, command, done):
    held, model = Profile.load(next(done.glob("profile-*"))), load_model(command.model, dtype=torch.float32)
    for layer, sample in zip(held.layers, held.samples, strict=True):
        experts = canonical_experts(model.get_submodule(layer.experts))
        scores_EF = parts.removal_scores(experts, sample)
        assert scores_EF.shape == (8, 96)
        assert scores_EF.dtype == torch.float64
        assert (scores_EF.sort(1).values.diff(dim=1) > 0).all()


def test_losses_are_those_of_the_packages_own_distillation(parts, command):
    layers = Architecture.of(open_checkpoint(command.model)).layers
    original = load_model(command.model, dtype=torch.float32)
    ids_BS = torch.randint(5, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predictions = Predictions.of(original(input_ids=ids_BS, use_cache=False).logits, 8)

    def disturbed():
        model = load_model(command.model, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for layer in layers:
            for tensor in model.get_submodule(layer.experts).parameters():
                tensor.data.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        return model

    own, other = disturbed(), disturbed()
    training = parts.Training(tokens=6 * 48, step_tokens=48, rate=0.01, classes=8, falls_late=True)
    found = parts.train(own, original, layers, ids_BS, training)
    weights = trainable(other, layers)
    schedule = Schedule(steps=6, rows=shuffled(6, 3, seed=0), rate=lambda step: rate_at(step, 6, 0.01))
    expected: list[float] = []
    with experts_apart(other):
        loop = Loop(
            weights, divergence_loss(other, ids_BS, predictions), optimiser=Adam(weights), schedule=schedule, micro=2
        )
        loop.run(after=lambda step, loss: expected.append(loss))
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    # Gate and up have a size each there, and one together here.
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < 0.9 * found[0]
    for name, tensor in other.state_dict().items():
        assert torch.allclose(own.state_dict()[name], tensor, atol=0.02), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden": 0.5}, {"others": 0.2}, {"optimizer": "muon"}, {"optimizer": "eigenbasis"}, {"average": 0.25}],
)
def test_training_changes_what_it_should_and_gets_nearer(parts, command, changes):
    layers = Architecture.of(open_checkpoint(command.model)).layers
    original, model = (load_model(command.model, dtype=torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        for tensor in model.get_submodule(layer.experts).parameters():
            tensor.data.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    ids_BS = torch.randint(5, 60, (8, 16), generator=generator)
    losses = parts.train(model, original, layers, ids_BS, parts.Training(tokens=8 * 64, step_tokens=64, **changes))
    assert len(losses) == 8
    assert losses[-1] < 0.95 * losses[0]
    routed = {name for layer in layers for name, _ in layer.router_tensors}
    inside = tuple(f"{layer.experts}." for layer in layers)
    for name, tensor in model.state_dict().items():
        trained = name.startswith(inside) or name in routed
        trained |= "others" in changes and "embed" not in name and "lm_head" not in name
        assert torch.equal(tensor, before[name]) != trained, name
    assert all(torch.equal(tensor, whole[name]) for name, tensor in original.state_dict().items())


def test_the_mean_of_the_last_steps_is_taken_while_the_rate_stays(parts, command, monkeypatch):
    layers = Architecture.of(open_checkpoint(command.model)).layers
    original = load_model(command.model, dtype=torch.float32)
    ids_BS = torch.randint(5, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    held, rates = [], []
    add_to, rate_at = parts.Student.add_to, parts.Training.rate_at

    def remember(student, sums):
        held.append({name: tensor.detach().clone() for name, tensor in student.weights.items()})
        add_to(student, sums)

    monkeypatch.setattr(parts.Student, "add_to", remember)
    monkeypatch.setattr(parts.Training, "rate_at", lambda *arguments: rates.append(rate_at(*arguments)) or rates[-1])
    model = load_model(command.model, dtype=torch.float32)
    model.get_submodule(layers[0].experts).down_proj.data.mul_(0.5)
    parts.train(model, original, layers, ids_BS, parts.Training(tokens=8 * 64, step_tokens=64, average=0.25))
    assert len(held) == 2
    assert rates[-1] == pytest.approx(0.005), "it does not fall"
    [name, *_] = [name for name, _ in layers[0].router_tensors]
    assert not torch.equal(held[0][name], held[1][name])
    expected = (held[0][name].double() + held[1][name].double()) / 2
    assert torch.allclose(model.state_dict()[name].double(), expected, rtol=1e-6)


def test_the_loss_over_all_tokens_is_that_over_as_many_classes(parts, command):
    original, model = (load_model(command.model, dtype=torch.float32).requires_grad_(False) for _ in range(2))
    model.get_output_embeddings().weight.mul_(0.7)
    ids_BS = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    whole, classes = (
        float(parts._loss(model, original, ids_BS, parts.Training(classes=classes))[0]) for classes in (None, 10**6)
    )
    assert whole == pytest.approx(classes, rel=1e-5)
    log_p, log_q = (each(input_ids=ids_BS).logits.double().log_softmax(-1) for each in (original, model))
    slow = sum(
        math.exp(p) * (p - q)
        for p, q in zip(log_p.flatten().tolist(), log_q.flatten().tolist(), strict=True)
    )  # fmt: skip
    assert whole == pytest.approx(slow / ids_BS.numel(), rel=1e-4)


def test_in_a_basis_that_only_swaps_inputs_nothing_changes(optimisers):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 5, generator=generator)
    turned, plain = {"w": start.clone()}, {"w": start.clone()}
    moment = torch.diag(torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0]))
    one, other = optimisers.Turned(turned, {"w": moment}), Adam(plain)
    for _ in range(3):
        gradient = torch.randn(2, 4, 5, generator=generator)
        one.step([gradient], 0.1)
        other.step([gradient], 0.1)
    assert torch.allclose(turned["w"], plain["w"], atol=1e-6)
    assert not torch.allclose(turned["w"], start, atol=0.05)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 8, 8)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes(optimisers, shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ optimisers.orthogonalised(matrices) @ right.mT
    sizes = found.diagonal(dim1=-2, dim2=-1)
    assert sizes.min() > 0.3
    assert sizes.max() < 1.3
    assert float((found - torch.diag_embed(sizes)).abs().max()) < 1e-3


def test_a_step_of_muon_has_the_size_of_its_rate(optimisers):
    start = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0)) * 0.3
    weights = {"w": start.clone()}
    optimisers.Muon(weights).step([torch.randn(start.shape, generator=torch.Generator().manual_seed(1))], 0.1)
    step = float((weights["w"] - start).square().mean().sqrt())
    assert step == pytest.approx(0.1 * 0.3, rel=0.3)


@pytest.mark.parametrize("name", ["adam", "muon", "eigenbasis"])
def test_every_optimiser_goes_on_from_its_state_with_the_same_bits(optimisers, name):
    start = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 2, 4, 5, generator=torch.Generator().manual_seed(1))
    square = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    make, options = load_optimiser(optimisers.OPTIMISERS[name]), {}
    if name == "eigenbasis":
        options = {"moments": {"w": square @ square.T}}
    schedule = Schedule(steps=8, rows=lambda step: torch.tensor([step]), rate=lambda step: 0.1)

    def loop():
        weights = {"w": start.clone(), "bias": torch.ones(3)}
        both = optimisers.Together(
            list(weights),
            [(("bias",), Adam({"bias": weights["bias"]}), 0.5), (("w",), make({"w": weights["w"]}, **options), 1.0)],
        )

        def loss(rows_N):
            return ((weights["w"] * noise[rows_N[0]]).sum() + weights["bias"].square().sum()).square()

        return Loop(weights, loss, optimiser=both, schedule=schedule)

    states = {}
    whole = loop()
    whole.run(save=lambda step, state: states.update({step: copied(state)}), save_seconds=0.0)
    assert not torch.allclose(whole.weights["w"], start, atol=0.05)
    for step in range(1, 8):
        again = loop()
        again.restore(states[step])
        again.run()
        assert again.step == 8
        for key, tensor in whole.state().items():
            assert torch.equal(again.state()[key], tensor), (step, key)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}
