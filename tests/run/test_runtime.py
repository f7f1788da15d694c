"""Models that run within a budget of memory: the same numbers with any budget, and no more memory than that."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coterie.compress.apply import compress
from coterie.errors import Cancelled, InputError, NotEnoughMemory, UnknownName
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.route.apply import routed
from coterie.route.policy import LayerRule, uniform_policy
from coterie.run.engine import Runtime, Sampling, run
from coterie.run.policies import POLICIES
from coterie.run.prepare import prepare
from coterie.testing import tiny_checkpoint, tiny_text

REFERENCE = Path(__file__).parent.parent.parent / "reference" / "model"
PROMPT = "def main():\n    print(1 + 2)\n"
GREEDY = Sampling(temperature=0)

#: Families whose experts lie on disk in different ways: one by one, in one tensor, interleaved, transposed.
FAMILIES = ("olmoe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "qwen3_vl_moe", "jamba", "glm4_moe")


def with_slots(model, num_slots, **options):
    """Return a runtime that has room for so many experts."""
    return Runtime(model, memory="64GiB", context=256, most_experts=num_slots, **options)


def logits(runtime, ids):
    with torch.no_grad():
        return runtime.model(ids).logits


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run") / "olmoe", "olmoe")


IDS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("family", [
    FAMILIES[0], *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES[1:])
])  # fmt: skip
def test_any_room_any_policy_and_any_lanes_compute_the_same_bits(family, tmp_path):
    model = tiny_checkpoint(tmp_path / family, family)
    with Runtime(model, memory="64GiB", context=256) as whole:
        assert whole.budget.num_slots == whole.budget.most
        expected = logits(whole, IDS)
        one_by_one = [logits(whole, IDS[:, : n + 1])[:, -1] for n in (0, 3)]
    with Runtime(model, memory="64GiB", context=256, dtype=torch.float32) as wide:
        with torch.no_grad():
            loaded = load_model(model, dtype=torch.float32)(IDS).logits
        assert (logits(wide, IDS) - loaded).abs().max() < 1e-5 * loaded.abs().max()
    cases = [
        (2, "decay", 1, 0), (4, "follow", 2, 2), (3, "lru", 2, 2), (5, "lcu", 3, 0), (4, "edgemoe", 2, 8),
        (7, "lfu", 2, 1),
    ]  # fmt: skip
    for slots, policy, lanes, lookahead in cases:
        with with_slots(model, slots, policy=policy, lanes=lanes, lookahead=lookahead) as runtime:
            assert runtime.budget.num_slots == slots < whole.budget.most
            assert torch.equal(logits(runtime, IDS), expected)
            assert [torch.equal(logits(runtime, IDS[:, : n + 1])[:, -1], each) for n, each in
                    zip((0, 3), one_by_one, strict=True)] == [True, True]  # fmt: skip
            counters = runtime.residency.counters
            assert counters.evictions > 0
            assert counters.hits + counters.misses > 0


def test_a_generation_is_what_transformers_generates(olmoe):
    with Runtime(olmoe, memory="64GiB", context=128, dtype=torch.float32) as runtime:
        pieces = []
        made = runtime.generate(PROMPT, template=False, max_tokens=20, sampling=GREEDY, on_text=pieces.append)
        ids = runtime.ids(PROMPT, template=False)
        again = runtime.generate(PROMPT, template=False, max_tokens=20, sampling=GREEDY)
    stock = load_model(olmoe, dtype=torch.float32)
    output = stock.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    new = output[0, ids.shape[1] :]
    assert made.text == runtime.tokenizer.decode(new, skip_special_tokens=True) == "".join(pieces)
    assert (made.tokens, made.prompt_tokens) == (len(new), ids.shape[1])
    assert again.text == made.text
    assert again.hits == 1.0
    assert again.bytes_read == 0
    assert made.bytes_read > 0


def test_long_prompts_pass_in_chunks(olmoe):
    prompt = PROMPT * 12
    texts = []
    for chunk in (16, 50, 512):
        with Runtime(olmoe, memory="64GiB", context=512, chunk=chunk, dtype=torch.float32) as runtime:
            assert runtime.ids(prompt, template=False).shape[1] > 100
            texts.append(runtime.generate(prompt, template=False, max_tokens=8, sampling=GREEDY).text)
    assert len(set(texts)) == 1


def test_draws_come_from_the_seed(olmoe):
    def text(seed):
        sampling = Sampling(temperature=1.5, top_k=50, seed=seed)
        return run(olmoe, PROMPT, memory="64GiB", context=128, max_tokens=12, sampling=sampling, template=False).text

    assert text(1) == text(1) != text(2)


def test_what_is_packed_runs_as_it_is_stored(tmp_path):
    text_folder = tiny_text(tmp_path / "text", documents=4)
    wide = tiny_checkpoint(tmp_path / "wide", "olmoe", dtype=torch.float32, hidden_size=96, intermediate_size=128)
    text = {"text": text_folder, "tokens": 256, "seq_len": 32}
    for name, options in {
        "blocks": {"type": "Q4_K", "recipe": "nearest", "target": "packed"},
        "integers": {"type": "INT4", "recipe": "nearest", "target": "compressed-tensors"},
        "ragged": {"keep": 0.5, "recipe": "heapr-ragged"},
        "mapped": {"keep": 0.5, "recipe": "hc-smoe", "router": "map"},
    }.items():
        out = compress(wide, tmp_path / name, **options, **text).out
        with Runtime(out, memory="64GiB", context=64, dtype=torch.float32) as runtime:
            assert runtime.budget.slot < 3 * 96 * 128 * 4 or name == "mapped"
            got = logits(runtime, IDS)
            alone = torch.cat([logits(runtime, IDS[:, n : n + 1]) for n in range(16)])
        with torch.no_grad():
            whole = load_model(out, dtype=torch.float32)
            expected, expected_alone = whole(IDS).logits, whole(IDS[0, :16, None]).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        # Of a mapped result a token may have one expert twice.
        torch.testing.assert_close(alone, expected_alone, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("only_misses", [False, True])
def test_what_a_policy_leaves_out_is_not_read(olmoe, tmp_path, only_misses):
    """With room for all experts, misses alone are the first use of each; with little, most of what is left out."""
    top_k = [layer.top_k for layer in Architecture.of(Checkpoint.open(olmoe)).layers]
    policy = uniform_policy(LayerRule(most=1), top_k, experts_per_token=1, origin="test")
    policy.save(tmp_path / "policy.json")
    options = {"route": tmp_path / "policy.json", "only_misses": only_misses, "dtype": torch.float32}
    with with_slots(olmoe, 3, dtype=torch.float32) as whole:
        all_of_it = logits(whole, IDS)
        for n in range(12):
            logits(whole, IDS[:, n : n + 1])
        wanted = whole.residency.counters.hits + whole.residency.counters.misses
    with with_slots(olmoe, 3, **options) as runtime:
        first = logits(runtime, IDS[:, :1])
        for n in range(12):
            logits(runtime, IDS[:, n : n + 1])
        counters = runtime.residency.counters
        assert counters.hits + counters.misses < wanted
    model = load_model(olmoe, dtype=torch.float32)
    layers = Architecture.of(Checkpoint.open(olmoe)).layers
    with torch.no_grad(), routed(model, layers, policy):  # nothing was in memory before the first token
        torch.testing.assert_close(first, model(IDS[:, :1]).logits, rtol=1e-5, atol=1e-5)
    with Runtime(olmoe, memory="64GiB", context=256, **options) as roomy:
        got = logits(roomy, IDS)
        again = logits(roomy, IDS)  # what one token left out, another one may have brought
    assert not torch.equal(got, all_of_it)
    assert torch.equal(got, again) is not only_misses
    with pytest.raises(InputError, match="--only-misses is about what a policy leaves out"):
        Runtime(olmoe, memory="1GiB", only_misses=True)


def test_the_smallest_budget_is_named_and_works(olmoe):
    with pytest.raises(
        NotEnoughMemory, match=r"--memory 20.0 MiB is too little .* is the smallest that works: "
    ) as told:
        Runtime(olmoe, memory="20MiB", context=64)
    assert "experts" in str(told.value)
    smallest = prepare(olmoe, memory="1GiB", context=64).budget.smallest
    with pytest.raises(NotEnoughMemory):
        Runtime(olmoe, memory=int(0.95 * smallest), context=64)
    with Runtime(olmoe, memory=int(1.01 * smallest), context=64) as runtime:
        assert runtime.generate(PROMPT, template=False, max_tokens=3).tokens == 3


def test_what_cannot_be_is_said(olmoe):
    with pytest.raises(UnknownName, match="policy"):
        Runtime(olmoe, memory="1GiB", policy="belady")
    with pytest.raises(InputError, match="lanes 0"):
        Runtime(olmoe, memory="1GiB", lanes=0)
    with pytest.raises(InputError, match="context 0"):
        Runtime(olmoe, memory="1GiB", context=0)
    with Runtime(olmoe, memory="64GiB", context=16) as runtime:
        with pytest.raises(InputError, match=r"the prompt has \d+ tokens, which leaves none of --context 16"):
            runtime.generate(PROMPT * 3, template=False)
        with pytest.raises(InputError, match="the prompt is empty"):
            runtime.generate("", template=False)
        with pytest.raises(InputError, match="--max-tokens 0"):
            runtime.generate("a", max_tokens=0)
        with pytest.raises(InputError, match="--top-p 2 is out of range"):
            runtime.generate("a", sampling=Sampling(top_p=2.0))


def test_a_generation_is_cancelled_within_a_layer_and_the_next_one_passes(olmoe):
    with Runtime(olmoe, memory="64GiB", context=64) as runtime:
        expected = runtime.generate(PROMPT, template=False, max_tokens=8, sampling=GREEDY).text
        calls = itertools.count()
        with pytest.raises(Cancelled):
            runtime.generate(PROMPT, template=False, max_tokens=8, cancelled=lambda: next(calls) >= 5)
        assert next(calls) == 6
        assert runtime.generate(PROMPT, template=False, max_tokens=8, sampling=GREEDY).text == expected


def test_a_disk_error_ends_one_generation_and_the_next_one_passes(olmoe, monkeypatch):
    from coterie.run import weight_file

    with with_slots(olmoe, 3) as runtime:
        expected = runtime.generate(PROMPT, template=False, max_tokens=8, sampling=GREEDY).text
        read, calls = weight_file.os.preadv, itertools.count()

        def failing(*arguments):
            if next(calls) >= 10:
                raise OSError(5, "Input/output error")
            return read(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(weight_file.os, "preadv", failing)
            with pytest.raises(Exception, match="Input/output error"):
                runtime.generate(PROMPT, template=False, max_tokens=8, sampling=GREEDY)
        assert runtime.generate(PROMPT, template=False, max_tokens=8, sampling=GREEDY).text == expected


LIMITED = """
import json, resource, sys
import torch
from coterie.model.stream.memory import peak_bytes
from coterie.run.engine import Runtime, Sampling
model, memory, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Runtime(model, memory=memory, context=context, kv="full") as runtime:
    if len(sys.argv) > 4:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    prompt = "a = 1\\n" * (context // 8)
    made = runtime.generate(prompt, template=False, max_tokens=16, sampling=Sampling(temperature=0))
    json.dump({"peak": peak_bytes(), "tokens": made.tokens, "slots": runtime.budget.num_slots, "text": made.text,
               "smallest": runtime.budget.smallest}, sys.stdout)
"""


def in_a_process(model, memory, context, *more):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), str(memory), str(context), *more], capture_output=True, text=True,
        check=True, env={**__import__("os").environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.long
def test_no_more_memory_is_taken_than_allowed(tmp_path):
    """A model of some hundred MiB, at budgets that hold all of its experts, half of them and the fewest that work."""
    model = tiny_checkpoint(
        tmp_path / "m", "qwen3_moe", dtype=torch.bfloat16, hidden_size=512, moe_intermediate_size=512,
        num_local_experts=64, num_hidden_layers=4,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    assert size > 300 * 2**20
    whole = in_a_process(model, 4 * 2**30, 512)
    assert whole["slots"] == 4 * 64
    for memory in (whole["smallest"] + size // 2, whole["smallest"] + 16 * 2**20):
        limited = in_a_process(model, memory, 512, "limited")
        assert limited["peak"] <= memory
        assert limited["slots"] < 4 * 64
        assert limited["text"] == whole["text"]


def test_policies_are_named_in_the_help_of_the_command():
    from coterie.cli.run import run as command

    [said] = command.__annotations__["policy"].__metadata__
    assert all(name in said.help for name in POLICIES.keys() - {"belady"})


def test_guessing_goes_on_where_it_is_right_and_stops_where_it_is_wrong(tmp_path, caplog):
    with Runtime(REFERENCE, memory="64GiB", context=256, most_experts=24, lookahead=2) as runtime:
        runtime.generate(PROMPT, template=False, max_tokens=80, sampling=GREEDY)
        counters = runtime.residency.counters
        assert counters.prefetches > 100
        assert counters.prefetches_used > 0.5 * (counters.prefetches_used + counters.prefetches_wasted)
        assert runtime.lookahead.is_on
    drawn = tiny_checkpoint(tmp_path / "m", "qwen3_moe", num_hidden_layers=4)
    with Runtime(drawn, memory="64GiB", context=256, most_experts=12, lookahead=6) as runtime:
        text = runtime.generate(PROMPT, template=False, max_tokens=60, sampling=GREEDY).text
        assert not runtime.lookahead.is_on
        assert "experts that were read ahead were of use" in caplog.text
    with Runtime(drawn, memory="64GiB", context=256) as runtime:
        assert runtime.generate(PROMPT, template=False, max_tokens=60, sampling=GREEDY).text == text
