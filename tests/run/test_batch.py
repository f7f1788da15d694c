"""Several answers in one batch: each as it would be alone, ended by its own end, and with fewer experts asked for."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from coterie.errors import Cancelled, InputError, NotEnoughMemory
from coterie.run.answers import generate_answers
from coterie.run.batch import Wanted
from coterie.run.engine import Runtime, Sampling
from coterie.run.prepare import prepare
from coterie.testing import tiny_checkpoint

PROMPT = "def main():\n    print(1 + 2)\n"
GREEDY = Sampling(temperature=0)
#: Of different lengths; the second and third share their beginning, and two are the same.
PROMPTS = ("one", PROMPT * 4, PROMPT * 4 + "x = 1\n", "a much shorter one", "one")
FAMILIES = ("olmoe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "glm4_moe", "afmoe", "minimax_m2")
#: Families that keep a state of linear attention, or keys of an index, beside keys and values.
ONE_BY_ONE = ("qwen3_next", "jamba", "glm_moe_dsa")


def drawn(seed):
    return Sampling(temperature=1.3, top_k=40, seed=seed)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    model = tiny_checkpoint(tmp_path_factory.mktemp("batch") / "olmoe", "olmoe")
    with Runtime(model, memory="64GiB", context=256, dtype=torch.float32, batch=8, most_experts=9) as runtime:
        yield runtime


def ids(runtime, prompt):
    return runtime.ids(prompt, template=False)


def alone(runtime, prompt, **options):
    return runtime.generate_ids(ids(runtime, prompt), **options)


@pytest.mark.parametrize("family", [
    FAMILIES[0], *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES[1:])
])  # fmt: skip
def test_each_answer_is_what_it_is_alone(family, tmp_path, caplog):
    model = tiny_checkpoint(tmp_path / family, family)
    with Runtime(model, memory="64GiB", context=256, dtype=torch.float32, batch=8, chunk=48) as runtime:
        for sampling in (GREEDY, drawn(7), Sampling(temperature=0, repetition_penalty=1.3)):
            expected = [alone(runtime, prompt, max_tokens=6, sampling=sampling) for prompt in PROMPTS]
            made = runtime.generate_batch([
                Wanted(ids_1S=ids(runtime, prompt), max_tokens=6, sampling=sampling) for prompt in PROMPTS
            ])  # fmt: skip
            assert [(each.ids, each.error) for each in made] == [(each, None) for each in expected]
    assert not caplog.text


@pytest.mark.parametrize("family", [
    ONE_BY_ONE[0], *(pytest.param(family, marks=pytest.mark.long) for family in ONE_BY_ONE[1:])
])  # fmt: skip
def test_families_that_keep_more_than_keys_and_values_answer_one_by_one_and_it_is_said(family, tmp_path, caplog):
    model = tiny_checkpoint(tmp_path / family, family)
    with Runtime(model, memory="64GiB", context=256, dtype=torch.float32, batch=8) as runtime:
        expected = [alone(runtime, prompt, max_tokens=5, sampling=GREEDY) for prompt in PROMPTS[:2]]
        for _ in range(2):
            made = runtime.generate_batch([
                Wanted(ids_1S=ids(runtime, prompt), max_tokens=5, sampling=GREEDY) for prompt in PROMPTS[:2]
            ])  # fmt: skip
            assert [(each.ids, each.error) for each in made] == [(each, None) for each in expected]
    assert caplog.text.count("answers are made one by one") == 1


def test_a_prefix_that_prompts_share_passes_once_and_padding_chooses_no_experts(runtime):
    """Counted where experts are chosen: so many by each token in each layer."""
    top_k, layers = runtime.layers[0].top_k, len(runtime.layers)
    one, two, three = (ids(runtime, prompt) for prompt in (PROMPT * 4, PROMPT * 4 + "x = 1\n", "one"))
    shared = one.shape[1] - 1  # the last token of a prompt passes with its rest
    assert torch.equal(one[0, :shared], two[0, :shared])
    before = runtime.experts.num_chosen
    runtime.generate_batch([Wanted(ids_1S=each, max_tokens=1) for each in (one, two, two, one)])
    tokens = shared + one.shape[1] - shared + two.shape[1] - shared
    assert runtime.experts.num_chosen - before == tokens * top_k * layers
    before = runtime.experts.num_chosen
    runtime.generate_batch([Wanted(ids_1S=each, max_tokens=2, sampling=GREEDY) for each in (one, three)])
    assert runtime.experts.num_chosen - before == (one.shape[1] + three.shape[1] + 2) * top_k * layers


def test_an_answer_that_ends_leaves_the_batch(runtime):
    top_k, layers = runtime.layers[0].top_k, len(runtime.layers)
    seen = {}

    def until(number, count):
        def take(token, scores_V):
            seen.setdefault(number, []).append(token)
            return len(seen[number]) == count

        return take

    prompt = ids(runtime, PROMPT)
    before = runtime.experts.num_chosen
    made = runtime.generate_batch([
        Wanted(ids_1S=prompt, max_tokens=20, sampling=drawn(n), on_token=until(n, count))
        for n, count in enumerate((3, 99, 1, 7))
    ])  # fmt: skip
    assert [len(each.ids) for each in made] == [3, 20, 1, 7]
    assert [seen[number] for number in range(4)] == [each.ids for each in made]
    passed = prompt.shape[1] + 2 + 19 + 0 + 6
    assert runtime.experts.num_chosen - before == passed * top_k * layers


def test_a_seed_draws_the_same_however_many_answers_there_are(runtime):
    expected = [alone(runtime, PROMPT, max_tokens=10, sampling=drawn(seed)) for seed in range(5)]
    assert len({tuple(each) for each in expected}) == 5
    for count in (2, 5):
        wanted = [Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=10, sampling=drawn(seed)) for seed in range(count)]
        assert [each.ids for each in runtime.generate_batch(wanted)] == expected[:count]
    undrawn = [Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=10, sampling=Sampling(temperature=2.0))] * 3
    assert len({tuple(each.ids) for each in runtime.generate_batch(undrawn)}) == 3


def test_what_ends_one_answer_ends_no_other(runtime):
    expected = alone(runtime, PROMPT, max_tokens=9, sampling=GREEDY)
    tokens = itertools.count()

    def fail(token, scores_V):
        raise ZeroDivisionError

    prompt = ids(runtime, PROMPT)
    called_off = Wanted(ids_1S=prompt, max_tokens=9, sampling=GREEDY, cancelled=lambda: next(tokens) > 5)
    wrong = Wanted(ids_1S=prompt, max_tokens=9, sampling=GREEDY, on_token=fail)
    fine = Wanted(ids_1S=prompt, max_tokens=9, sampling=GREEDY)
    ended = []
    fine = replace(fine, on_end=ended.append)
    made = runtime.generate_batch([called_off, wrong, fine])
    assert ended == made[2:]
    assert isinstance(made[0].error, Cancelled)
    assert 0 < len(made[0].ids) < 9
    assert isinstance(made[1].error, ZeroDivisionError)
    assert (made[2].ids, made[2].error) == (expected, None)


def test_a_batch_that_nobody_wants_any_more_ends_before_the_next_layer(runtime):
    calls = itertools.count()
    wanted = Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=9, cancelled=lambda: next(calls) >= 4)
    before = runtime.experts.num_chosen
    made = runtime.generate_batch([wanted, wanted])
    assert [str(each.error) for each in made] == ["the generation was cancelled"] * 2
    assert next(calls) <= 8
    assert runtime.experts.num_chosen - before < 10 * wanted.ids_1S.shape[1] * runtime.layers[0].top_k


def test_a_disk_error_ends_those_under_way_and_the_next_batch_passes(runtime, monkeypatch):
    from coterie.run import weight_file

    expected = alone(runtime, PROMPT, max_tokens=8, sampling=GREEDY)
    read, calls, over = weight_file.os.preadv, itertools.count(), []

    def failing(*arguments):
        if over and next(calls) >= 4:
            raise OSError(5, "Input/output error")
        return read(*arguments)

    wanted = [
        Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=8, sampling=GREEDY, on_token=lambda *_: over.append(1) or True),
        *(Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=200, sampling=drawn(n)) for n in range(2)),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(weight_file.os, "preadv", failing)
        made = runtime.generate_batch(wanted)
    assert made[0].error is None
    assert made[0].ids == expected[:1]
    assert all("Input/output error" in str(each.error) for each in made[1:])
    assert [each.ids for each in runtime.generate_batch([Wanted(
        ids_1S=ids(runtime, PROMPT), max_tokens=8, sampling=GREEDY)] * 2)] == [expected] * 2  # fmt: skip


def test_answers_to_one_prompt_say_what_they_took(runtime):
    answers = generate_answers(runtime, PROMPT, answers=11, max_tokens=6, sampling=drawn(3), template=False)
    assert answers.texts == tuple(
        runtime.tokenizer.decode(alone(runtime, PROMPT, max_tokens=6, sampling=drawn(3 + n)), skip_special_tokens=True)
        for n in range(11)
    )
    assert answers.tokens == (6,) * 11
    assert 1.0 < answers.sharing < 8
    assert answers.bytes_per_token == answers.bytes_read // 66
    other = PROMPT[::-1]  # of which nothing is known
    single = generate_answers(runtime, other, answers=1, max_tokens=6, sampling=drawn(3), template=False)
    assert single.sharing == 1.0
    assert single.bytes_per_token > answers.bytes_per_token > 0
    assert "in 11 answers" in str(answers)


def test_memory_is_for_all_sequences_and_what_does_not_fit_is_refused(runtime, tmp_path):
    settings = {"context": 256, "kv": "full"}
    one, eight = (prepare(runtime.path, memory="64GiB", batch=batch, **settings).budget for batch in (1, 8))
    assert eight.cache == 8 * one.cache
    assert eight.buffers > one.buffers
    between = (one.smallest + eight.smallest) // 2
    with pytest.raises(NotEnoughMemory, match=r"\(keys and values of 8\).*a smaller --context or batch takes less"):
        Runtime(runtime.path, memory=between, batch=8, **settings)
    for batch in (0, 65):
        with pytest.raises(InputError, match=f"a batch of {batch}"):
            Runtime(runtime.path, memory="64GiB", batch=batch)
    with pytest.raises(InputError, match="9 answers at once"):
        runtime.generate_batch([Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=1)] * 9)
    with pytest.raises(InputError, match="--max-tokens 0"):
        runtime.generate_batch([Wanted(ids_1S=ids(runtime, PROMPT), max_tokens=0)] * 2)
    with pytest.raises(InputError, match="--answers 0"):
        generate_answers(runtime, PROMPT, answers=0)
    assert runtime.generate_batch([]) == []


LIMITED = """
import json, resource, sys
from coterie.model.stream.memory import peak_bytes
from coterie.run.answers import generate_answers
from coterie.run.engine import Runtime, Sampling
model, memory, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
with Runtime(model, memory=memory, context=512, **options) as runtime:
    if len(sys.argv) > 4:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sampling = Sampling(temperature=1.0, seed=1)
    made = generate_answers(
        runtime, "a = 1\\n" * 64, answers=runtime.batch, max_tokens=100, sampling=sampling, template=False
    )
    json.dump({"peak": peak_bytes(), "smallest": runtime.budget.smallest, "texts": made.texts}, sys.stdout)
"""


@pytest.mark.long
@pytest.mark.parametrize("way", ["batch", "resident", "sibling"])
def test_no_more_memory_is_taken_than_allowed(tmp_path, way):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 4}
    model = tiny_checkpoint(tmp_path / "m", "qwen3_moe", dtype=torch.bfloat16, num_local_experts=64, **sizes)
    small = tiny_checkpoint(tmp_path / "small", "qwen3_moe", dtype=torch.bfloat16, num_local_experts=8, **sizes)
    options = {"batch": {"batch": 6}, "resident": {"draft": "resident"}, "sibling": {"draft": str(small)}}[way]

    def run(memory, *more):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(model), str(memory), json.dumps(options), *more], capture_output=True,
            text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return json.loads(done.stdout)

    memory = run(4 * 2**30)["smallest"] + 16 * 2**20
    limited = run(memory, "limited")
    assert limited["peak"] <= memory
    assert len(limited["texts"]) == options.get("batch", 1)
