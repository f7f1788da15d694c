"""Only answers count: statistics, samples, gradients, losses and training against loops over those tokens alone."""

import itertools
import math
import random
import re
import string
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

import coterie
from chats import chat_model, chat_text
from coterie.cli.main import app
from coterie.errors import InputError, StaleArtifact
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.measure import profile_model
from coterie.profile.observation import observed
from coterie.profile.places import chosen_places
from coterie.profile.profile import Profile
from coterie.profile.statistics import MATRICES, STATISTICS
from coterie.profile.text import TextSettings
from coterie.train.distill import divergence_loss
from coterie.train.predictions import Predictions

SETTINGS = {"tokens": 1024, "seq_len": 32, "on": "assistant"}
SUMS = sorted(set(STATISTICS) | set(MATRICES))


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return chat_model(tiny(), tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return chat_text(tmp_path_factory.mktemp("chats") / "text")


@pytest.fixture(scope="module")
def tokens(model, chats):
    return tokenize(load_tokenizer(model), chats, **SETTINGS)


@pytest.fixture(scope="module")
def measured(model, chats):
    return coterie.profile(model, text=chats, statistics=SUMS, sample_tokens=10**6, thin=1, **SETTINGS)


def loops(model, tokens):
    """Return by layer the statistics of the tokens that count, one token after another in float64, and their inputs."""
    loaded = load_model(model, dtype=torch.float32)
    layers = Architecture.of(Checkpoint.open(model)).layers
    totals = [{name: {} for name in SUMS} for _ in layers]
    inputs = [[] for _ in layers]
    for domain, rows_NS in tokens.sequences.items():
        for ids_S, counts_S in zip(rows_NS, tokens.counts[domain], strict=True):
            gradients = {}
            with observed(loaded, layers, gradients=gradients) as observations:
                logits_SV = loaded(input_ids=ids_S[None], use_cache=False).logits[0]
                loss = sum(-logits_SV[s - 1].log_softmax(-1)[ids_S[s]] for s in range(1, len(ids_S)) if counts_S[s])
                loss.backward()
            loaded.zero_grad()
            for observation in observations:
                index = observation.layer.index
                for t in counts_S.nonzero().flatten().tolist():
                    inputs[index].append(observation.hidden_TD[t])
                    add_token(totals[index], domain, observation, t, gradients[index][t].double())
    return totals, inputs


def add_token(totals, domain, observation, t, d_D):
    experts, num_experts = observation.experts, observation.layer.num_experts

    def add(name, value, at=()):
        held = totals[name].setdefault(domain, {})
        held[at] = held.get(at, 0) + value

    x_1D = observation.hidden_TD[t][None]
    logits_E = observation.logits_TE[t].double()
    add("tokens", 1)
    for e in range(num_experts):
        hidden_F = experts.hidden(e, x_1D)[0].double()
        output_D = experts.output(e, x_1D)[0].double()
        slope_F = d_D @ experts.down_EDF[e].double()
        add("mean_output", output_D, (e,))
        add("logit_sum", logits_E[e], (e,))
        add("logit_product", logits_E[e] * logits_E, (e,))
        add("gradient_energy", slope_F**2, (e,))
        for slot in (observation.index_TK[t] == e).nonzero().flatten().tolist():
            g = float(observation.weight_TK[t, slot])
            norm = math.sqrt(float((output_D**2).sum()))
            after_D = observation.residual_TD[t].double() + observation.output_TD[t].double()
            turn = 1 - float(torch.nn.functional.cosine_similarity(observation.residual_TD[t].double(), after_D, dim=0))
            x_D = x_1D[0].double()
            for name, value in {
                "usage": 1, "gate_mass": g, "reap": g * norm, "output_norm": norm, "output_square": norm**2,
                "easy_ep": g * norm * max(turn, 0), "tcess": logits_E[e], "tcess_tokens": 1,
                "hidden_square": hidden_F**2, "gated_hidden_square": (g * hidden_F) ** 2,
                "channel_gradient": (g * slope_F) ** 2, "channel_fisher": (g * hidden_F * slope_F) ** 2,
                "hessian_input": x_D[:, None] * x_D, "hessian_hidden": g**2 * hidden_F[:, None] * hidden_F,
            }.items():  # fmt: skip
                add(name, value, (e,))
            held = totals["output_peak"].setdefault(domain, {})
            held[e,] = max(held.get((e,), 0), float(output_D.abs().max()))


@pytest.mark.slow
def test_statistics_are_those_of_a_loop_over_the_tokens_that_count(model, tokens, measured):
    totals, inputs = loops(model, tokens)
    assert set(measured.statistics[0]) == set(SUMS)
    for layer in measured.layers:
        for name in SUMS:
            by_domain = totals[layer.index][name]
            if name in MATRICES:
                found, entries = measured.sum(layer.index, name)[None], {"all": Counter()}
                for held in by_domain.values():
                    for at, value in held.items():
                        entries["all"][at] = entries["all"][at] + value
            else:
                found, entries = measured.by_domain(layer.index, name), by_domain
            expected = torch.zeros_like(found, dtype=torch.float64)
            for number, held in enumerate(entries.values()):
                for at, value in held.items():
                    expected[(number, *at)] = value
            scale = float(expected.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-4, atol=1e-5, msg=name)
        sample = measured.samples[layer.index].inputs_TD
        expected_rows = torch.stack(inputs[layer.index])
        assert sample.shape == expected_rows.shape, "all tokens that count, and no others"
        torch.testing.assert_close(sample.sum(0), expected_rows.sum(0), rtol=1e-3, atol=1e-3)


def test_the_tokens_that_count_are_what_was_measured(tokens, measured):
    assert measured.on == "assistant"
    assert dict(zip(measured.domains, measured.num_tokens, strict=True)) == tokens.num_counted
    assert sum(measured.num_tokens) < sum(tokens.num_tokens.values()) == 1024
    for layer in measured.layers:
        assert measured.by_domain(layer.index, "tokens").tolist() == list(measured.num_tokens)
        assert int(measured.sum(layer.index, "usage").sum()) == sum(measured.num_tokens) * layer.top_k
        assert len(measured.samples[layer.index].inputs_TD) == sum(measured.num_tokens)


def test_a_model_in_memory_is_measured_in_the_same_way(model, tokens, measured):
    loaded = load_model(model, dtype=torch.float32)
    names = [name for name in measured.asked if "gradient" not in name and name != "channel_fisher"]
    found = profile_model(
        loaded, measured.layers, tokens, model_digest="", sample_tokens=10**6, statistics=names, thin=1
    )
    for name in names:
        torch.testing.assert_close(found.sum(1, name), measured.sum(1, name), rtol=1e-3, atol=1e-4)


def test_the_sample_is_drawn_from_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    ids_NS = torch.randint(99, (600, 7), generator=generator)
    counts_NS = torch.rand(600, 7, generator=generator) < 0.3
    everything = chosen_places("a", ids_NS, count=10**6, seed=1)
    numbers = counts_NS.flatten().cumsum(0) - 1
    expected = sorted(
        (int(everything.priority_N[place]), int(numbers[place])) for place in counts_NS.flatten().nonzero().flatten()
    )
    found = chosen_places("a", ids_NS, count=50, seed=1, counts_NS=counts_NS)
    pairs = sorted(zip(found.priority_N.tolist(), found.position_N.tolist(), strict=True))
    assert pairs == expected[:50]


def test_a_profile_says_which_tokens_it_measured(measured, tmp_path):
    measured.save(tmp_path)
    assert Profile.load(tmp_path).on == "assistant"
    with pytest.raises(StaleArtifact, match="profiles on assistant and on all cannot be added"):
        measured.merge(
            Profile(**{name: getattr(measured, name) for name in measured.__dataclass_fields__} | {"on": "all"})
        )


# --- losses -------------------------------------------------------------------------------------------------------


def in_float64(model):
    loaded = load_model(model, dtype=torch.float64)
    loaded.set_experts_implementation("eager")
    return loaded


def slow_losses(model, tokens):
    """Return by domain the losses of the tokens that count, in float64."""
    loaded = in_float64(model)
    losses = {}
    for domain, rows_NS in tokens.sequences.items():
        with torch.no_grad():
            log_p_NSV = loaded(input_ids=rows_NS, use_cache=False).logits.log_softmax(-1)
        losses[domain] = [
            (number, s - 1, -float(log_p_NSV[number, s - 1, ids_S[s]]))
            for number, ids_S in enumerate(rows_NS)
            for s in range(1, len(ids_S))
            if tokens.counts[domain][number, s]
        ]
    return losses


@pytest.mark.long
def test_perplexity_and_divergence_are_those_of_answers(model, tiny, chats, tmp_path):
    other = chat_model(tiny(seed=1), tmp_path / "other")
    options = {"text": chats, "against": model, "questions": 0, **SETTINGS}
    for cache in (None, tmp_path / "cache"):
        [card] = coterie.evaluate(other, cache=cache, **options)
        tokens = tokenize(load_tokenizer(model), chats, **SETTINGS)
        losses = slow_losses(other, tokens)
        loaded, base = map(in_float64, (other, model))
        for domain, rows_NS in tokens.sequences.items():
            with torch.no_grad():
                log_q, log_p = (
                    each(input_ids=rows_NS, use_cache=False).logits.log_softmax(-1) for each in (loaded, base)
                )
            places = [(n, s) for n, s, _ in losses[domain]]
            kl = [float((log_p[n, s].exp() * (log_p[n, s] - log_q[n, s])).sum()) for n, s in places]
            same = [int(log_p[n, s].argmax()) == int(log_q[n, s].argmax()) for n, s in places]
            scores = card.domains[domain]
            assert scores["tokens"] == len(places)
            assert scores["perplexity"] == pytest.approx(
                math.exp(sum(x for *_, x in losses[domain]) / len(places)), rel=1e-4
            )
            assert scores["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
            assert scores["agreement"] == pytest.approx(sum(same) / len(same), abs=2 / len(same))
    assert card.on == "assistant"
    card.save(tmp_path / "card.json")
    assert coterie.Scorecard.load(tmp_path / "card.json").on == "assistant"


def test_what_a_source_is_to_a_model_is_told_of_its_answers(model, chats, tokens):
    found = {source.domain: source for source in coterie.calibrate(model, text=chats, **SETTINGS).sources}
    losses, least = slow_losses(model, tokens), min(tokens.num_counted.values())
    for domain, source in found.items():
        counted, grams = [], {2: [], 4: []}
        for ids_S, counts_S in zip(tokens.sequences[domain].tolist(), tokens.counts[domain].tolist(), strict=True):
            run = []
            for token, counts in zip(ids_S, counts_S, strict=True):
                run = [*run, token] if counts and len(counted) < least else []
                counted += run[-1:]
                for length, seen in grams.items():
                    seen += [tuple(run[-length:])] if len(run) >= length else []
        assert source.tokens == tokens.num_counted[domain]
        assert source.loss == pytest.approx(sum(x for *_, x in losses[domain]) / len(losses[domain]), rel=1e-4)
        assert source.diversity == pytest.approx(len(set(grams[2])) / len(grams[2]))
        assert source.aggregation == pytest.approx(1 - len(set(grams[4])) / len(grams[4]))
        shares = [count / least for count in Counter(counted).values()]
        assert source.entropy == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_training_follows_the_predictions_of_answers(model, tiny, tokens):
    student = load_model(tiny(seed=1), dtype=torch.float32)
    teacher = load_model(model, dtype=torch.float32)
    ids_BS, counts_BS = tokens.sequences["chat"][:6], tokens.counts["chat"][:6]
    with torch.no_grad():
        predictions = Predictions.of(teacher(input_ids=ids_BS, use_cache=False).logits, 16)
        logits = student(input_ids=ids_BS, use_cache=False).logits
    each_BS = predictions.divergences(logits)
    places = [(b, s) for b, s in itertools.product(range(6), range(31)) if counts_BS[b, s + 1]]
    mean = len(places) / 6
    loss = divergence_loss(student, ids_BS, predictions, counts_BS)
    with torch.no_grad():
        for rows in ([0, 1, 2, 3, 4, 5], [1, 4], [3]):
            expected = sum(float(each_BS[b, s]) for b, s in places if b in rows) / (len(rows) * mean)
            assert float(loss(torch.tensor(rows))) == pytest.approx(expected, rel=1e-4)
        everything = divergence_loss(student, ids_BS, predictions, torch.ones_like(counts_BS))
        expected = float(each_BS[:, :-1].mean())
        assert float(everything(torch.arange(6))) == pytest.approx(expected, rel=1e-4)


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_a_result_is_measured_and_trained_on_answers(model, chats, tokens, tmp_path, monkeypatch, inputs):
    from coterie.compress.result_steps import distill as step

    seen = []
    real = step.distill
    monkeypatch.setattr(
        step, "distill", lambda *a, counts_BS, **o: seen.append(counts_BS) or real(*a, counts_BS=counts_BS, **o)
    )
    recipe = {"original": "coterie", "compressed": "reap"}[inputs]
    training = {"train_tokens": 512} if recipe == "coterie" else {}
    result = coterie.compress(
        model,
        tmp_path / "out",
        keep=0.5,
        recipe=recipe,
        text=chats,
        sample_tokens=128,
        inputs=inputs,
        **training,
        **SETTINGS,
    )
    assert result.manifest.calibration_tokens == sum(tokens.num_counted.values())
    if training:
        assert seen[0].dtype == torch.bool
        assert 0 < int(seen[0].sum()) < seen[0].numel()


def test_a_profile_decides_on_which_tokens_more_is_done(model, chats, measured, tmp_path):
    folder = tmp_path / "profile"
    measured.save(folder)
    with pytest.raises(InputError, match="the profile was measured on assistant, and --on all is asked for"):
        coterie.compress(model, tmp_path / "out", keep=0.5, recipe="reap", profile=folder, on="all")


def test_what_the_model_writes_has_no_answers():
    with pytest.raises(InputError, match="text that the model writes holds no conversations"):
        TextSettings(source="self", tokens=1, seq_len=8, on="assistant").check()


def test_the_command_measures_answers_and_names_the_formats(model, chats, tmp_path):
    arguments = ["profile", str(model), str(tmp_path / "p"), "--text", str(chats), "--tokens", "512", "--seq-len", "32"]
    done = CliRunner().invoke(app, [*arguments, "--on", "assistant", "--sample-tokens", "16", "--statistics", "usage"])
    assert done.exit_code == 0, done.output
    assert Profile.load(tmp_path / "p").on == "assistant"
    shown = " ".join(re.sub(r"[^\w.*:,-]+", " ", CliRunner().invoke(app, ["profile", "--help"]).output).split())
    for word in ("*.txt", "*.jsonl", "messages", "prompt and completion", ".gz", "*.parquet", "hf:NAME", "assistant"):
        assert word in shown, word


def test_counts_follow_their_batches():
    source = random.Random(0)
    rows = {name: torch.tensor([[source.randrange(9) for _ in range(4)] for _ in range(source.randint(1, 7))])
            for name in string.ascii_lowercase[:4]}  # fmt: skip
    token_set = TokenSet(sequences=rows, seq_len=4, digest="", counts={name: ids > 4 for name, ids in rows.items()})
    for size in (1, 2, 3, 9):
        pairs = list(zip(token_set.batches(size), token_set.batch_counts(size), strict=True))
        assert all(torch.equal(counts, ids > 4) for (_, ids), counts in pairs)
