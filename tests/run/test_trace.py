"""Traces of routing: what is recorded is what was chosen, and measures of likeness against slow, obvious ones."""

import numpy as np
import pytest
import torch

from coterie.errors import CorruptArtifact, InputError
from coterie.model.arch.load import load_model
from coterie.run.engine import Runtime, Sampling
from coterie.run.policies import Asked
from coterie.run.replay import replay
from coterie.run.trace import RoutingTrace, bundled_traces, mask_of, record, recording, sch, srp
from coterie.testing import tiny_checkpoint

PROMPT = "def main():\n    print(1 + 2)\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("trace") / "qwen3_moe", "qwen3_moe", dtype=torch.float32)


def slow_srp(masks, segment):
    """Return the best F1 over thresholds, counting one segment and expert after the other."""
    uses = [
        sum(bool(mask[start + place, expert]) for place in range(segment))
        for mask in masks
        for expert in range(mask.shape[1])
        for start in range(len(mask) - segment + 1)
    ]
    best = 0.0
    for threshold in range(1, segment + 1):
        kept = [count for count in uses if count >= threshold]
        if sum(uses) and (predicted := segment * len(kept)):
            precision, recall = sum(kept) / predicted, sum(kept) / sum(uses)
            best = max(best, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return best


def slow_sch(mask, size, segment):
    """Return the hit rate of a cache that is a list from longest ago to last used."""
    cache: list[int] = []
    hits = asked = 0
    for token in range(len(mask)):
        wanted = [expert for expert in range(mask.shape[1]) if mask[token, expert]]
        asked += len(wanted)
        hits += sum(expert in cache for expert in wanted)
        cache = [expert for expert in cache if expert not in wanted] + wanted
        while len(cache) > size:
            others = [expert for expert in cache if expert not in wanted]
            least = min(sum(mask[token + 1 : token + 1 + segment, expert]) for expert in others)
            cache.remove(next(e for e in others if sum(mask[token + 1 : token + 1 + segment, e]) == least))
    return hits / asked


def drawn(seed, tokens=40, experts=9, top_k=3):
    """Return a mask in which tokens choose what their neighbours choose, now and then something else."""
    generator = np.random.default_rng(seed)
    score, rows = generator.normal(size=experts), []
    for _ in range(tokens):
        score = 0.8 * score + generator.normal(size=experts)
        rows.append(np.sort(np.argsort(score)[-top_k:]))
    return mask_of(np.array(rows, dtype=np.int16), experts)


@pytest.mark.parametrize("segment", [1, 3, 16, 40])
def test_srp_is_the_best_f1_of_any_threshold(segment):
    masks = [drawn(1), drawn(2)]
    assert srp(masks, segment) == pytest.approx(slow_srp(masks, segment), abs=1e-12)


@pytest.mark.parametrize(("size", "segment"), [(3, 4), (4, 1), (5, 16), (9, 8)])
def test_sch_is_what_a_cache_that_knows_the_segment_hits(size, segment):
    mask = drawn(3)
    assert sch(mask, size, segment) == pytest.approx(slow_sch(mask, size, segment), abs=1e-12)


def test_tokens_that_choose_the_same_are_served_wholly():
    mask = mask_of(np.array([[0, 2]] * 10, dtype=np.int16), 4)
    assert srp([mask], 5) == 1.0
    assert sch(mask, 2, 5) == pytest.approx(18 / 20)


def test_what_does_not_fit_is_said():
    with pytest.raises(InputError, match="segments of 41 tokens do not fit into 40"):
        srp([drawn(1)], 41)
    with pytest.raises(InputError, match="a cache of 2 experts does not hold the 3"):
        sch(drawn(1), 2, 4)


def test_what_is_recorded_is_what_the_router_chose(model):
    """Against the indices that transformers itself computes, in a model that is loaded whole."""
    texts = {"code": PROMPT * 4, "words": "one two three four five"}
    with Runtime(model, memory="64GiB", context=256) as runtime:
        trace = record(runtime, texts, tokens=24)
        tokens = {name: runtime.ids(text, template=False)[:, :24] for name, text in texts.items()}
    stock = load_model(model, dtype=torch.float32)
    chosen: list[torch.Tensor] = []
    for layer in range(len(trace.layers)):
        gate = stock.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _module, _input, output: chosen.append(output[-1]))
    for name, ids in tokens.items():
        chosen.clear()
        with torch.no_grad():
            stock(ids)
        expected = torch.stack(chosen, dim=1).sort(-1).values.numpy()
        np.testing.assert_array_equal(np.sort(trace.chosen[name], axis=-1), expected)
    assert list(trace.chosen) == ["code", "words"]


def test_a_generation_is_recorded_and_computes_the_same(model):
    greedy = Sampling(temperature=0)
    with Runtime(model, memory="64GiB", context=64, most_experts=5) as runtime:
        with recording(runtime.model, runtime.layers) as recorder:
            made = runtime.generate(PROMPT, template=False, max_tokens=8, sampling=greedy)
        expected = runtime.generate(PROMPT, template=False, max_tokens=8, sampling=greedy)
        trace = recorder.trace(model=runtime.digest, name=runtime.path.name)
        assert made.text == expected.text == runtime.generate(
            PROMPT, template=False, max_tokens=8, sampling=greedy
        ).text  # fmt: skip
    assert trace.num_tokens == made.prompt_tokens + made.tokens - 1  # nobody has asked what follows the last one
    assert (trace.joined() >= 0).all()


def test_a_trace_is_the_same_after_it_was_saved(model, tmp_path):
    with Runtime(model, memory="64GiB", context=64) as runtime:
        trace = record(runtime, {"code": PROMPT}, tokens=16)
    trace.save(tmp_path / "t.json")
    loaded = RoutingTrace.load(tmp_path / "t.json")
    assert (loaded.model, loaded.name, loaded.layers, loaded.num_experts) == (
        trace.model, trace.name, trace.layers, trace.num_experts
    )  # fmt: skip
    np.testing.assert_array_equal(loaded.chosen["code"], trace.chosen["code"])
    with pytest.raises(CorruptArtifact, match="does not exist"):
        RoutingTrace.load(tmp_path / "u.json")
    with pytest.raises(InputError, match="no token passed"), Runtime(model, memory="64GiB", context=64) as runtime:
        record(runtime, {"nothing": ""}, tokens=16)


def test_steps_are_tokens_or_chunks():
    chosen = np.array([[[0, 2], [1, -1]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]], dtype=np.int16)
    trace = RoutingTrace(
        model="", name="m", layers=(0, 1), num_experts=(4, 3), chosen={"a": chosen[:2], "b": chosen[2:]}
    )
    assert (trace.num_tokens, trace.most) == (3, 7)
    assert trace.steps() == [
        Asked(0, 0, [0, 2]), Asked(0, 1, [1]), Asked(1, 0, [2, 3]), Asked(1, 1, [0, 1]), Asked(2, 0, [0, 1]),
        Asked(2, 1, [1, 2]),
    ]  # fmt: skip
    assert trace.chunk_steps(2) == [
        Asked(0, 0, [0, 2, 3], [[0], [0, 1], [1]]), Asked(0, 1, [0, 1], [[1], [0, 1]]), Asked(2, 0, [0, 1]),
        Asked(2, 1, [1, 2]),
    ]  # fmt: skip


def test_the_first_half_of_a_text_is_its_prompt():
    chosen = np.array([[[0, 2]], [[2, 3]], [[1, 2]], [[0, 1]], [[1, 3]], [[0, 3]]], dtype=np.int16)
    trace = RoutingTrace(model="", name="m", layers=(0,), num_experts=(4,), chosen={"a": chosen, "b": chosen[:2]})
    steps, behind = trace.run_steps(2)
    assert steps == [
        Asked(0, 0, [0, 2, 3], [[0], [0, 1], [1]]), Asked(2, 0, [1, 2]), Asked(3, 0, [0, 1]), Asked(4, 0, [1, 3]),
        Asked(5, 0, [0, 3]), Asked(6, 0, [0, 2]), Asked(7, 0, [2, 3]),
    ]  # fmt: skip
    assert behind == [False, False, True, True, True, False, True]


def test_a_trace_that_cannot_be_is_refused(tmp_path):
    chosen = np.array([[[0, 5]]], dtype=np.int16)
    RoutingTrace(model="", name="m", layers=(0,), num_experts=(4,), chosen={"a": chosen}).save(tmp_path / "t.json")
    with pytest.raises(CorruptArtifact, match="experts that the model does not have"):
        RoutingTrace.load(tmp_path / "t.json")
    RoutingTrace(model="", name="m", layers=(0, 1), num_experts=(9, 9), chosen={"a": chosen}).save(tmp_path / "t.json")
    with pytest.raises(CorruptArtifact, match=r"not tokens x 2 layers x experts"):
        RoutingTrace.load(tmp_path / "t.json")


@pytest.mark.long
@pytest.mark.parametrize("name", ["glm4_moe", "model", "qwen3_moe"])
def test_on_bundled_traces_the_policy_passes_lru_and_comes_near_to_who_knows_the_future(name):
    trace = bundled_traces()[name]
    steps = trace.steps()
    for share, least in ((0.25, 0.78), (0.5, 0.9)):
        hits = {each: replay(steps, round(share * trace.most), each) for each in ("lru", "decay", "follow", "belady")}
        assert hits["follow"] > hits["decay"]
        assert hits["follow"] > hits["lru"] + 0.03 * sum(len(entry.experts) for entry in steps)
        assert hits["follow"] > least * hits["belady"]
