"""Guesses that are checked: the same text as without them, whoever guesses, and nothing where they do not pay."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from coterie.compress.apply import compress
from coterie.errors import Cancelled, CoterieError, InputError, NotEnoughMemory
from coterie.run.engine import Runtime, Sampling
from coterie.run.prepare import prepare
from coterie.run.stop_rule import FixedLength
from coterie.testing import tiny_checkpoint, tiny_text

REFERENCE = Path(__file__).parent.parent.parent / "reference" / "model"
PROMPT = "one two three one two three one two"
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.2, top_k=30, seed=5)
#: Keys and values alone, some with windows of the last tokens; routers by softmax, by sigmoid and with biases.
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "afmoe")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("draft") / "m", "qwen3_moe", num_hidden_layers=3)


def open_runtime(model, draft, *, fixed=None, slots=11, **options):
    runtime = Runtime(
        model, memory="64GiB", context=256, dtype=torch.float32, most_experts=slots, draft=draft, **options
    )
    if fixed is not None:
        runtime.speculation.rule = FixedLength(fixed)
    return runtime


def made(runtime, prompt=PROMPT, *, tokens=32, sampling=GREEDY, **options):
    return runtime.generate_ids(runtime.ids(prompt, template=False), max_tokens=tokens, sampling=sampling, **options)


@pytest.fixture(scope="module")
def expected(model):
    with open_runtime(model, "off") as runtime:
        assert runtime.speculation is None
        return [made(runtime, sampling=sampling) for sampling in (GREEDY, DRAWN)]


DRAFTS = (("lookup", 3), ("resident", 1), ("resident:0.5", 4), ("resident", None), ("itself", 3))


@pytest.mark.parametrize(("draft", "length"), DRAFTS)
def test_the_text_is_that_without_guesses_drawn_or_not(model, expected, draft, length):
    assert len(expected[0]) == len(expected[1]) == 32
    with open_runtime(model, str(model) if draft == "itself" else draft, fixed=length, chunk=16) as runtime:
        assert [made(runtime, sampling=sampling) for sampling in (GREEDY, DRAWN)] == expected
        drafted = runtime.speculation.drafted
        assert drafted.tokens == 2 * 31
        assert drafted.guesses > 0
        if draft == "itself":  # who guesses as it is going to draw is always right
            assert drafted.right == drafted.guesses
            assert drafted.passes == 2 * 8


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_text_is_that_without_guesses_in_other_families(family, tmp_path):
    model = tiny_checkpoint(tmp_path / family, family)
    with open_runtime(model, "off") as runtime:
        expected = [made(runtime, sampling=sampling) for sampling in (GREEDY, DRAWN)]
    for draft, length in DRAFTS:
        with open_runtime(model, str(model) if draft == "itself" else draft, fixed=length, chunk=16) as runtime:
            assert [made(runtime, sampling=sampling) for sampling in (GREEDY, DRAWN)] == expected


def test_an_exponential_draw_is_the_one_of_multinomial():
    """What transformers draws with, so that a seed means the same with guesses."""
    share = torch.rand(3, 50).softmax(-1)
    torch.manual_seed(3)
    expected = [int(torch.multinomial(row[None], 1)) for row in share for _ in range(20)]
    torch.manual_seed(3)
    drawn = [int((row[None] / torch.empty(1, 50).exponential_()).argmax()) for row in share for _ in range(20)]
    assert drawn == expected
    assert len(set(drawn)) > 10


def test_each_token_comes_with_the_scores_that_the_model_gives_without_guesses(model):
    def scored(runtime, stop):
        seen = []

        def take(token, scores_V):
            seen.append((token, scores_V))
            return len(seen) == stop

        tokens = made(runtime, on_token=take)
        assert [token for token, _ in seen] == tokens
        return seen

    with open_runtime(model, "off") as runtime:
        expected = scored(runtime, 17)
    with open_runtime(model, str(model), fixed=5) as runtime:
        seen = scored(runtime, 17)  # in the middle of a round
    assert [token for token, _ in seen] == [token for token, _ in expected]
    for (_, scores), (_, others) in zip(seen, expected, strict=True):
        torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)


def test_the_text_comes_piece_by_piece_and_what_guesses_brought_is_said(model):
    pieces = []
    with open_runtime(model, "resident", fixed=2) as runtime:
        generated = runtime.generate(PROMPT, template=False, max_tokens=20, sampling=GREEDY, on_text=pieces.append)
        assert "".join(pieces) == generated.text
        assert generated.drafted.tokens == 19
        assert "guesses were right" in str(generated)
        again = runtime.generate(PROMPT, template=False, max_tokens=20, sampling=GREEDY)
        assert (again.text, again.drafted.tokens) == (generated.text, 19)
        assert again.to_json()["drafted"]["tokens"] == 19
    with open_runtime(model, "off") as runtime:
        assert runtime.generate(PROMPT, template=False, max_tokens=20, sampling=GREEDY).drafted is None


def test_guessing_reads_nothing_and_changes_nothing_of_what_is_counted(model):
    with open_runtime(model, "resident", fixed=4, slots=8) as runtime:
        made(runtime, tokens=12)
        residency, draft, text = runtime.residency, runtime.speculation._draft, runtime.ids(PROMPT, template=False)
        with torch.no_grad():
            cache = runtime.model(text[:, :-1], use_cache=True).past_key_values
            before = (residency.counters, residency.in_memory(), residency.step, runtime.experts.num_chosen)

            def pass_token(ids_11):
                return runtime.model(ids_11, past_key_values=cache, use_cache=True).logits[0, -1]

            draft.begin(text, lambda ids, scores, ahead: (int(scores.argmax()), 0.5, 1.0), pass_token)
            guesses = [draft.next() for _ in range(4)]
        assert draft.end() == 4
        assert sum(guess.misses for guess in guesses) == len(draft._restriction.missing) > 0
        assert (residency.counters, residency.in_memory(), residency.step, runtime.experts.num_chosen) == before
        assert residency._num_pinned == 0
        assert runtime.experts.restriction is None


def test_a_generation_with_guesses_is_cancelled_and_the_next_one_passes(model, expected):
    with open_runtime(model, "resident", fixed=4) as runtime:
        calls = itertools.count()
        with pytest.raises(Cancelled):
            made(runtime, cancelled=lambda: next(calls) >= 14)
        assert runtime.experts.restriction is None
        assert made(runtime) == expected[0]


def test_what_cannot_be_cut_off_gets_no_guesses_and_that_is_said(tmp_path, caplog):
    model = tiny_checkpoint(tmp_path / "m", "qwen3_next")
    with open_runtime(model, "off") as runtime:
        expected = made(runtime, tokens=6, sampling=DRAWN)
    with open_runtime(model, "lookup") as runtime:
        seen = []
        for _ in range(2):
            tokens = made(runtime, tokens=6, sampling=DRAWN, on_token=lambda *each: bool(seen.append(each[0])))
            assert tokens == expected
        assert seen == expected * 2
    assert caplog.text.count("there are no drafts") == 1


def test_a_compressed_model_guesses_within_the_budget(model, expected, tmp_path):
    text = tiny_text(tmp_path / "text", documents=4)
    small = compress(model, tmp_path / "small", keep=0.5, recipe="reap", text=text, tokens=256, seq_len=32).out
    without, with_it = (prepare(model, memory="64GiB", context=256, draft=name).budget for name in ("off", str(small)))
    weights = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert with_it.draft > 0.9 * weights
    assert with_it.fixed - without.fixed >= with_it.draft
    with pytest.raises(NotEnoughMemory, match="the model that drafts"):
        Runtime(model, memory="20MiB", context=256, draft=str(small))
    with open_runtime(model, str(small), fixed=2) as runtime:
        assert made(runtime) == expected[0]
        assert runtime.speculation.drafted.guesses > 20


def test_a_draft_that_cannot_be_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="share"):
        Runtime(model, memory="64GiB", draft="resident:2")
    with pytest.raises(CoterieError, match="nowhere"):
        Runtime(model, memory="64GiB", draft="nowhere")
    with pytest.raises(InputError, match="has other tokens"):
        Runtime(model, memory="64GiB", draft=str(REFERENCE))


def test_a_dense_model_guesses_too(model, expected, tmp_path):
    config = Qwen3Config(
        vocab_size=json.loads((model / "config.json").read_text())["vocab_size"], hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "dense")
    with open_runtime(model, str(tmp_path / "dense"), fixed=2) as runtime:
        assert runtime.budget.draft > 0
        assert made(runtime) == expected[0]
        assert runtime.speculation.drafted.guesses > 20
