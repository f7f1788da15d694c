"""Keys and values in fewer bytes: what rounding costs at most, what it takes, and what attention sees."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import InputError
from coterie.model.arch.seam import intercepted
from coterie.run.engine import Runtime, Sampling
from coterie.run.kv import BLOCK, SINKS, Heads, Int8Layer, KVFormat, WindowLayer, ZipLayer, layer_size, plain_layers
from coterie.run.prepare import prepare
from coterie.run.sizes import CacheSize
from coterie.testing import tiny_checkpoint

GREEDY = Sampling(temperature=0)

#: Families, and how many of their layers keep keys and values of all tokens.
FAMILIES = {
    "olmoe": (2, 2), "qwen3_moe": (2, 2), "glm4_moe": (3, 3), "granitemoe": (2, 2), "gpt_oss": (1, 2), "jamba": (2, 4),
    "qwen3_next": (1, 2), "deepseek_v3": (0, 3), "mixtral": (0, 2), "gemma4_text": (1, 2), "minimax_m2": (2, 2),
}  # fmt: skip


def states(heads=3, tokens=BLOCK, width=16, seed=0, dtype=torch.float32, scale=1.0):
    drawn = torch.randn(1, heads, tokens, width, generator=torch.Generator().manual_seed(seed)) * scale
    drawn[..., 3] *= 20  # as in keys, a channel is larger than the others
    return drawn.to(dtype)


def taken_by(layer):
    tensors = (layer.keys, layer.values) if isinstance(layer, WindowLayer) else layer.stored.values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("kv") / "olmoe", "olmoe", dtype=torch.float32)


def int8_reference(states_HSD):
    """Return what is left of each number, one by one in float64."""
    left = states_HSD.double().clone()
    for head in left:
        for token in head:
            scale = max(abs(float(number)) for number in token) / 127
            for place, number in enumerate(token.tolist()):
                token[place] = 0.0 if scale == 0 else round(number / scale) * scale
    return left


def rounded(numbers):
    """Return numbers in 16 steps from the smallest to the largest."""
    low, high = min(numbers), max(numbers)
    step = (high - low) / 15
    return [low if step == 0 else low + round((number - low) / step) * step for number in numbers]


def zip_reference(keys_SD, values_SD):
    """Return what is left of a block of one head: keys by channel, values by channel and token."""
    keys, values = keys_SD.double().clone(), values_SD.double().clone()
    for channel in range(keys.shape[1]):
        keys[:, channel] = torch.tensor(rounded(keys[:, channel].tolist()), dtype=torch.float64)
    norms = [max(abs(number) for number in values[:, channel].tolist()) ** 0.5 or 1.0
             for channel in range(values.shape[1])]  # fmt: skip
    for token in range(values.shape[0]):
        divided = [number / norm for number, norm in zip(values[token].tolist(), norms, strict=True)]
        values[token] = torch.tensor([number * norm for number, norm in zip(rounded(divided), norms, strict=True)])
    return keys, values


def test_eight_bits_are_those_of_a_slow_reference():
    layer = Int8Layer()
    keys, values = states(tokens=20), states(tokens=20, width=12, seed=1)
    keys[0, 1, 7] = 0
    for unpacked, wide in zip(layer.update(keys, values), (keys, values), strict=True):
        torch.testing.assert_close(unpacked[0].double(), int8_reference(wide[0]), rtol=1e-6, atol=1e-7)


def test_four_bits_are_those_of_a_slow_reference():
    layer = ZipLayer()
    keys, values = states(heads=2, tokens=BLOCK + 5, width=6), states(heads=2, tokens=BLOCK + 5, width=5, seed=1)
    values[..., 2] = 0
    seen = layer.update(keys, values)
    for head in range(2):
        expected = zip_reference(keys[0, head, :BLOCK], values[0, head, :BLOCK])
        for unpacked, wide, reference in zip(seen, (keys, values), expected, strict=True):
            torch.testing.assert_close(unpacked[0, head, :BLOCK].double(), reference, rtol=1e-5, atol=1e-5)
            assert torch.equal(unpacked[0, head, BLOCK:], wide[0, head, BLOCK:])


numbers = st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_eight_bits_are_off_by_half_a_step_at_most(tokens):
    wide = torch.tensor(tokens)[None, None]
    unpacked, _ = Int8Layer().update(wide, wide)
    step = wide.abs().amax(-1, keepdim=True) / 127
    assert ((unpacked - wide).abs() <= 0.5 * step * (1 + 1e-4) + 1e-37).all()
    assert (unpacked.abs() <= wide.abs().amax(-1, keepdim=True) * (1 + 1e-6)).all()


@given(st.integers(0, 2**20), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_four_bits_are_off_by_half_a_step_at_most(seed, scale, shift):
    wide = states(heads=1, width=4, seed=seed, scale=scale) + shift
    keys, values = ZipLayer().update(wide, wide)
    slack = 1e-6 * wide.abs().amax()
    step = (wide.amax(-2, keepdim=True) - wide.amin(-2, keepdim=True)) / 15
    assert ((keys - wide).abs() <= 0.5 * step * (1 + 1e-4) + slack).all()
    norms = wide.abs().amax(-2, keepdim=True).sqrt()
    divided = wide / norms
    step = (divided.amax(-1, keepdim=True) - divided.amin(-1, keepdim=True)) / 15 * norms
    assert ((values - wide).abs() <= 0.5 * step * (1 + 1e-4) + slack).all()


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from(["int8", "int4"]))
def test_pieces_of_a_text_are_kept_as_the_whole_is(pieces, name):
    tokens = sum(pieces)
    keys, values = states(heads=2, tokens=tokens, width=6), states(heads=2, tokens=tokens, width=5, seed=1)
    whole, layer, begin = KVFormat(name=name).layer(), KVFormat(name=name).layer(), 0
    expected = whole.update(keys, values)
    for piece in pieces:
        seen = layer.update(keys[:, :, begin : begin + piece], values[:, :, begin : begin + piece])
        begin += piece
        assert layer.get_seq_length() == begin
        assert layer.get_mask_sizes(3) == (begin + 3, 0)
    assert all(torch.equal(*each) for each in zip(seen, expected, strict=True))


@given(st.integers(1, 400), st.data())
def test_what_is_cut_back_is_as_it_was_up_to_rounding(tokens, data):
    end = data.draw(st.integers(0, tokens))
    keys, values = states(heads=2, tokens=tokens, width=6), states(heads=2, tokens=tokens, width=5, seed=1)
    for name in ("int8", "int4"):
        layer = KVFormat(name=name).layer()
        before = layer.update(keys, values)
        layer.crop(end - tokens)
        assert layer.get_seq_length() == end
        more = states(heads=2, tokens=2, width=6, seed=2), states(heads=2, tokens=2, width=5, seed=3)
        after = layer.update(*more)
        whole_blocks = end // BLOCK * BLOCK
        for seen, wide in zip(after, before, strict=True):
            assert torch.equal(seen[:, :, :whole_blocks], wide[:, :, :whole_blocks])
            if (end + 2) // BLOCK * BLOCK == whole_blocks or name == "int8":  # else what is left is rounded again
                assert torch.equal(seen[:, :, :end], wide[:, :, :end])


def test_a_window_is_what_a_mask_makes_of_attention(olmoe):
    ids, window = torch.randint(5, 250, (1, 60), generator=torch.Generator().manual_seed(1)), 16
    place = torch.arange(60)
    distance = place[:, None] - place[None]
    mask = (distance >= 0) & ((distance <= window) | (place[None] < SINKS))
    with Runtime(olmoe, memory="64GiB", context=128, kv=f"window:{window}") as runtime, torch.no_grad():
        expected = runtime.model(ids, attention_mask=mask[None, None]).logits
        cache = runtime._kept._new_cache()
        assert {type(layer) for layer in cache.layers} == {WindowLayer}
        rows = [runtime.model(ids[:, n : n + 1], past_key_values=cache).logits[:, 0] for n in range(60)]
    torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert cache.get_seq_length() == 60
    assert cache.layers[0].keys.shape[2] == SINKS + window


def test_a_window_that_has_forgotten_cannot_be_cut_back(olmoe):
    ids = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(1))
    with Runtime(olmoe, memory="64GiB", context=128, kv="window:64") as runtime:
        first = runtime.generate_ids(ids, max_tokens=4, sampling=GREEDY)
        again = runtime.generate_ids(ids, max_tokens=4, sampling=GREEDY)
        assert (again, runtime.reused) == (first, 39)  # nothing is forgotten yet
        longer = torch.cat([ids, torch.tensor([first]), ids], 1)
        runtime.generate_ids(longer, max_tokens=4, sampling=GREEDY)
        assert runtime.reused == 43
        runtime.generate_ids(longer[:, :70], max_tokens=4, sampling=GREEDY)
        assert runtime.reused in (0, 39, 43)


@pytest.mark.parametrize("family", [
    "gpt_oss", *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES if family != "gpt_oss")
])  # fmt: skip
def test_what_is_counted_is_what_is_taken_and_scores_stay_near(family, tmp_path):
    """Without experts: where routers choose others, scores are others altogether."""
    model = tiny_checkpoint(tmp_path / "m", family, dtype=torch.float32)
    ids = torch.randint(5, 250, (1, 150), generator=torch.Generator().manual_seed(1))
    scores = {}
    plain, layers = FAMILIES[family]
    for kv, most in {"full": 0.0, "int8": 0.05, "int4": 0.5, "window:200": 1e-5}.items():
        with Runtime(model, memory="64GiB", context=256, chunk=64, kv=kv) as runtime:
            cache = runtime._kept._new_cache()
            kinds = [type(layer) in (Int8Layer, ZipLayer, WindowLayer) for layer in cache.layers]
            assert (sum(kinds), len(kinds)) == (plain if kv != "full" else 0, layers)
            rows = []

            def take(token, scores_V, rows=rows):
                rows.append(scores_V)
                return True

            with intercepted(runtime.model, lambda _, hidden_TD, *chosen: torch.zeros_like(hidden_TD)):
                runtime.generate_ids(ids, max_tokens=1, on_token=take)
            scores[kv] = rows[0]
            [kept] = runtime._kept._kept
            size = runtime._kept._size
            own = [(layer, size.layers[number]) for number, layer in enumerate(kept.cache.layers) if kinds[number]]
        difference = (scores[kv] - scores["full"]).abs().max() / scores["full"].abs().max()
        assert difference <= most
        assert (difference > 0) == (plain > 0 and kv.startswith("int")) or kv.startswith("window")
        for layer, expected in own:
            assert taken_by(layer) <= expected.num_bytes(150)
            assert taken_by(layer) == expected.num_bytes(150) or kv == "int4"


@given(st.integers(1, 600), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
def test_bytes_are_foretold_from_shapes(tokens, heads, key, value):
    keys, values = torch.zeros(1, heads, tokens, key), torch.zeros(1, heads, tokens, value)
    for how in (KVFormat(name="int8"), KVFormat(name="int4"), KVFormat(name="window", window=50)):
        layer = how.layer()
        layer.update(keys, values)
        taken = taken_by(layer)
        size = layer_size(how, Heads(count=heads, key=key, value=value), 4)
        expected = CacheSize(layers=(size,)).num_bytes(tokens)
        assert taken <= expected
        if how.name != "int4":
            assert taken == expected
        else:  # of the last tokens it is not known how many are no whole block
            most = size.wide * min(tokens, BLOCK) + size.token * BLOCK
            assert expected - taken <= most


def test_formats_are_read_strictly():
    assert KVFormat.parse("auto") is None
    for text in ("full", "int8", "int4", "window:12"):
        assert str(KVFormat.parse(text)) == text
    for text in ("", "int2", "window", "window:0", "window:-3", "window:1.5", "INT8", "window:٣", "full:3"):
        with pytest.raises(InputError, match="is none of auto, full, int8, int4, window:N"):
            KVFormat.parse(text)


def test_a_short_budget_takes_eight_bits_and_a_large_one_all(olmoe, tmp_path, monkeypatch):
    size = psutil.Process().memory_info()
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: size)  # the same each time
    prepared = prepare(olmoe, memory="64GiB", context=65536)
    assert (str(prepared.kv), prepared.budget.kv) == ("full", "full")
    needed = 2 * sum(layer.top_k for layer in prepared.architecture.layers)
    full = prepare(olmoe, memory="64GiB", context=65536, kv="full").budget
    short = full.fixed + (needed - 1) * full.slot
    chosen = prepare(olmoe, memory=short, context=65536)
    assert str(chosen.kv) == "int8"
    assert chosen.plain == (0, 1)
    assert chosen.budget.cache < full.cache
    assert chosen.budget.smallest < full.smallest
    assert "keys and values (int8)" in str(chosen.budget)
    assert str(prepare(olmoe, memory=full.fixed + needed * full.slot, context=65536).kv) == "full"
    # Where no layer can have fewer bits nothing is chosen, and who asks for it is told.
    latent = tiny_checkpoint(tmp_path / "m", "deepseek_v3")
    assert str(prepare(latent, memory=short, context=65536).kv) == "full"


def test_who_asks_for_what_changes_nothing_is_told(tmp_path, caplog):
    latent = tiny_checkpoint(tmp_path / "m", "deepseek_v3")
    assert plain_layers(prepare(latent, memory="64GiB").architecture.model) == {}
    prepare(latent, memory="64GiB", kv="int8")
    assert "--kv int8 changes nothing" in caplog.text


def test_turns_go_on_in_eight_bits_with_the_bits_of_a_text_that_is_read_anew(olmoe, tmp_path):
    ids = torch.randint(5, 250, (1, 90), generator=torch.Generator().manual_seed(1))
    with Runtime(olmoe, memory="64GiB", context=256, chunk=32, kv="int8", sessions=tmp_path / "s") as runtime:
        first = runtime.generate_ids(ids, max_tokens=8, sampling=GREEDY)
        longer = torch.cat([ids, torch.tensor([first]), ids[:, :9]], 1)
        second = runtime.generate_ids(longer, max_tokens=8, sampling=GREEDY)
        assert runtime.reused == 97
    for kv, known in (("int8", 106), ("int4", 0)):
        with Runtime(olmoe, memory="64GiB", context=256, chunk=32, kv=kv, sessions=tmp_path / "s") as runtime:
            answer = runtime.generate_ids(longer, max_tokens=8, sampling=GREEDY)
            assert runtime.reused == known
            assert answer == second or kv == "int4"


LIMITED = """
import json, resource, sys
from coterie.model.stream.memory import peak_bytes
from coterie.run.engine import Runtime, Sampling
from coterie.run.prepare import prepare
model, context, kv = sys.argv[1], int(sys.argv[2]), sys.argv[3]
memory = prepare(model, memory="8GiB", context=context, kv=kv).budget.smallest + 2**24
known = []
with Runtime(model, memory=memory, context=context, kv=kv) as runtime:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    for words in (context // 8, context // 8 + 5, context // 30, context // 30):
        prompt = f"{words % 7} = 1\\n" * words
        runtime.generate(prompt, template=False, max_tokens=16, sampling=Sampling(temperature=0))
        known.append(runtime.reused)
    json.dump({"peak": peak_bytes(), "memory": memory, "known": known, "cache": runtime.budget.cache,
               "kept": runtime._kept.num_bytes}, sys.stdout)
"""


@pytest.mark.long
@pytest.mark.parametrize("kv", ["full", "int8", "int4"])
def test_turns_take_no_more_memory_than_allowed(kv, tmp_path):
    """A model whose keys and values are large, at a budget that holds the fewest experts that work, and 16 MiB."""
    model = tiny_checkpoint(
        tmp_path / "m", "qwen3_moe", dtype=torch.float32, num_hidden_layers=4, hidden_size=512, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), "2048", kv], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["peak"] <= said["memory"]
    assert said["known"][3] > 400
    assert 0 < said["kept"] <= said["cache"]
