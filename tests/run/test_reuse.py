"""Prompts that begin as another one did: computed from there on, with the same text, and within the same memory."""

import itertools
from functools import partial

import pytest
import torch

from coterie.errors import Cancelled, InputError
from coterie.run import session_store, weight_file
from coterie.run.cache_layers import cache_tokens, can_cut, num_bytes
from coterie.run.chunks import goes_on, new_cache
from coterie.run.engine import Runtime, Sampling
from coterie.run.kv import KVFormat
from coterie.run.reuse import KeptSequences
from coterie.run.session_store import SessionStore, check_folder, session_key
from coterie.testing import tiny_checkpoint

GREEDY = Sampling(temperature=0)

#: Families that keep different things of a text: keys and values, latent vectors, windows, states, convolutions.
FAMILIES = (
    "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next", "lfm2_moe", "granitemoehybrid", "nemotron_h", "zaya",
    "mixtral",
)  # fmt: skip


def draw(count, seed=1):
    return torch.randint(5, 250, (1, count), generator=torch.Generator().manual_seed(seed))


def go_on(runtime, ids, tokens=8):
    """Return what a runtime generates and how many tokens of the prompt it knew."""
    new = runtime.generate_ids(ids, max_tokens=tokens, sampling=GREEDY)
    return new, runtime.reused


def scores_of(runtime, ids, tokens):
    """Return the scores (T, V) of the tokens that a runtime generates."""
    rows = []

    def take(token, scores_V):
        rows.append(scores_V)
        return False

    runtime.generate_ids(ids, max_tokens=tokens, sampling=GREEDY, on_token=take)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("reuse") / "olmoe", "olmoe", dtype=torch.float32)


@pytest.fixture(scope="module")
def shared(olmoe):
    with wide(olmoe, chunk=32, most_experts=12) as runtime:
        yield runtime


@pytest.fixture
def runtime(shared):
    """A runtime that knows nothing yet."""
    with_context(shared, 256)
    return shared


def with_context(runtime, context, store=None):
    """Let a runtime keep nothing yet, and as much as a context of another length takes at most."""
    runtime._kept = KeptSequences(runtime._kept._size, context, partial(new_cache, runtime.model), store)


def wide(model, **options):
    return Runtime(model, memory="64GiB", dtype=torch.float32, **({"context": 256} | options))


@pytest.mark.parametrize("family", [
    FAMILIES[0], *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES[1:])
])  # fmt: skip
def test_a_second_turn_is_computed_from_where_the_first_one_ended(family, tmp_path):
    ids, more = draw(90), draw(12, seed=2)
    with wide(tiny_checkpoint(tmp_path / "m", family), chunk=32) as runtime:
        first, known = go_on(runtime, ids)
        assert known == 0
        second = torch.cat([ids, torch.tensor([first]), more], 1)
        answer, known = go_on(runtime, second)
        assert known == 90 + len(first) - 1  # keys and values of the last token were never needed
        other = torch.cat([ids[:, :50], more], 1)
        [kept] = runtime._kept._kept
        whole = all(map(can_cut, kept.cache.layers))
        beginning, known = go_on(runtime, other)
        assert known == (50 if whole else 0)
        for prompt, expected in ((second, answer), (other, beginning)):
            runtime.forget()
            assert go_on(runtime, prompt) == (expected, 0)


def test_logits_agree_as_far_as_sums_in_another_order_do(runtime):
    ids = draw(100)
    anew = scores_of(runtime, ids, 4)
    runtime.forget()
    scores_of(runtime, ids[:, :61], 1)
    known = scores_of(runtime, ids, 4)
    assert runtime.reused == 61
    torch.testing.assert_close(known, anew, rtol=1e-5, atol=1e-5 * float(anew.abs().max()))


def test_the_same_prompt_again_computes_one_token(runtime):
    answer, _ = go_on(runtime, draw(90))
    passes = []
    hook = runtime.model.register_forward_pre_hook(
        lambda _, arguments, options: passes.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert go_on(runtime, draw(90)) == (answer, 89)
    hook.remove()
    assert passes == [1] * len(answer)


def test_what_is_kept_and_what_runs_have_the_memory_of_one_context(runtime):
    kept, token = runtime._kept, runtime._kept._size.num_bytes(1)
    seen = []
    make_room = kept.make_room

    def watched(tokens, **options):
        make_room(tokens, **options)
        seen.append(kept.num_bytes + token * tokens)

    kept.make_room = watched
    for seed, length in enumerate((60, 60, 60, 200, 30, 30, 120)):
        go_on(runtime, draw(length, seed=10 + seed))
        assert kept.num_bytes == sum(num_bytes(each.cache) for each in kept._kept)
        assert kept.num_bytes == token * sum(map(len, kept.sequences))
    assert max(seen) <= token * 256
    assert [len(ids_S) for ids_S in kept.sequences] == [37, 37, 127]
    assert go_on(runtime, draw(30, seed=14))[1] == 29


def test_a_beginning_that_two_share_stays_where_there_is_room_and_is_taken_where_not(runtime):
    begin = draw(60)
    left, right = (torch.cat([begin, draw(40, seed)], 1) for seed in (2, 3))
    go_on(runtime, left)
    assert go_on(runtime, right)[1] == 60
    assert go_on(runtime, left)[1] == 99
    assert [ids_S.tolist()[:100] for ids_S in runtime._kept.sequences] == [right[0].tolist(), left[0].tolist()]
    with_context(runtime, 200)
    go_on(runtime, left)
    assert go_on(runtime, right)[1] == 60
    assert go_on(runtime, left)[1] == 60


def test_what_is_copied_changes_nothing_of_what_it_was_copied_from(runtime):
    left, right = (torch.cat([draw(60), draw(40, seed)], 1) for seed in (2, 3))
    go_on(runtime, left)
    [kept] = runtime._kept._kept
    before = [(layer.keys.clone(), layer.values.clone()) for layer in kept.cache.layers]
    go_on(runtime, right)
    assert kept in runtime._kept._kept
    for layer, (keys, values) in zip(kept.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_what_was_cancelled_is_no_worse_than_what_was_never_begun(runtime):
    ids = draw(90)
    longer = torch.cat([ids, draw(70, seed=2)], 1)
    expected, _ = go_on(runtime, longer)
    for last in (3, 4, 5, 8, 9):  # two layers: within a chunk of the prompt, and between tokens of the answer
        runtime.forget()
        go_on(runtime, ids)
        calls = itertools.count()
        with pytest.raises(Cancelled):
            runtime.generate_ids(longer, max_tokens=8, cancelled=lambda calls=calls, last=last: next(calls) >= last)
        # Chunks whose keys and values all layers have.
        assert go_on(runtime, longer) == (expected, min(90 + 32 * ((last + 1) // 2), 159))


def test_a_disk_that_fails_takes_nothing_of_what_is_known(runtime, monkeypatch):
    ids = draw(90)
    longer = torch.cat([ids, draw(70, seed=2)], 1)
    expected, _ = go_on(runtime, longer)
    runtime.forget()
    go_on(runtime, ids)

    def failing(*arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(weight_file.os, "preadv", failing)
        with pytest.raises(Exception, match="Input/output error"):
            go_on(runtime, longer)
    answer, known = go_on(runtime, longer)
    assert answer == expected
    assert known >= 90


def test_a_layer_that_was_interrupted_within_is_forgotten(runtime):
    """As where there was memory for the keys and none for the values."""
    ids_S = draw(20)[0]
    for uneven in (False, True):
        running = runtime._kept.begin(ids_S)
        assert running.reused == 0
        with torch.no_grad():
            runtime.model(ids_S[None], past_key_values=running.cache)
        if uneven:
            running.cache.layers[1].values = running.cache.layers[1].values[:, :, :-1]
        running.end(whole=False)
        assert len(runtime._kept.sequences) == (0 if uneven else 1)
        runtime.forget()


def test_a_state_is_forgotten_where_a_generation_is_cancelled(tmp_path):
    ids = draw(40)
    with wide(tiny_checkpoint(tmp_path / "m", "qwen3_next"), chunk=32) as runtime:
        assert goes_on(runtime.model)
        expected, _ = go_on(runtime, ids)
        runtime.forget()
        calls = itertools.count()
        with pytest.raises(Cancelled):
            runtime.generate_ids(ids, max_tokens=8, cancelled=lambda: next(calls) >= 7)
        assert runtime._kept.sequences == []
        assert go_on(runtime, ids) == (expected, 0)


def test_a_family_that_goes_on_with_single_tokens_only_gets_single_tokens(tmp_path):
    ids = draw(40)
    with wide(tiny_checkpoint(tmp_path / "m", "jamba"), chunk=16) as runtime:
        assert not goes_on(runtime.model)
        with torch.no_grad():
            expected = runtime.model(ids).logits[0, -1]
        [scores] = scores_of(runtime, ids, 1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_model_with_a_cache_of_its_own_says_what_it_cannot(tmp_path):
    with wide(tiny_checkpoint(tmp_path / "m", "minimax"), chunk=16) as runtime:
        answer = go_on(runtime, draw(12))
        assert answer[1] == 0
        assert go_on(runtime, draw(12)) == answer
        with pytest.raises(InputError, match="has 17 tokens, and this model, which has a cache of its own, takes at"):
            go_on(runtime, draw(17))


def test_a_cache_counts_what_passed_all_layers(runtime):
    cache = new_cache(runtime.model)
    assert cache_tokens(cache) == 0
    with torch.no_grad():
        runtime.model(draw(7), past_key_values=cache)
    assert cache_tokens(cache) == 7
    cache.layers[1].crop(-2)
    assert cache_tokens(cache) == 5


# The disk.


@pytest.mark.parametrize("family", [
    "olmoe", *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES[:-1])
])  # fmt: skip
def test_another_runtime_goes_on_where_this_one_ended(family, tmp_path):
    model, ids = tiny_checkpoint(tmp_path / "m", family), draw(70)
    with wide(model, sessions=tmp_path / "s") as runtime:
        first, _ = go_on(runtime, ids)
        whole = all(map(can_cut, runtime._kept._kept[0].cache.layers))
    [file] = (tmp_path / "s").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    longer = torch.cat([ids, torch.tensor([first]), draw(9, seed=3)], 1)
    other = torch.cat([ids[:, :33], draw(20, seed=4)], 1)
    with wide(model, sessions=tmp_path / "s") as runtime:
        answer, known = go_on(runtime, longer)
        assert known == 70 + len(first) - 1
        runtime._kept._kept.clear()
        beginning, known = go_on(runtime, other)
        assert known == (33 if whole else 0)
        with_context(runtime, 256)
        assert [go_on(runtime, longer), go_on(runtime, other)] == [(answer, 0), (beginning, 33 if whole else 0)]


@pytest.fixture
def store(runtime, tmp_path):
    """Return a function that looks at the folder anew."""

    def open_store(size="1GiB", key="model", context=256):
        cache = partial(new_cache, runtime.model)
        store = SessionStore(tmp_path / "s", size, key=key, context=context, new_cache=cache)
        with_context(runtime, 256, store)
        return store

    return open_store


def test_a_file_that_is_damaged_or_foreign_is_passed_over_with_a_word(runtime, store, tmp_path, caplog):
    ids, folder = draw(70), tmp_path / "s"
    store()
    expected, _ = go_on(runtime, ids)
    runtime.forget()
    [file] = folder.iterdir()
    good = file.read_bytes()
    flipped, other_ids, head = bytearray(good), bytearray(good), int.from_bytes(good[:8], "little") + 8
    flipped[-4000] ^= 1
    other_ids[head] ^= 1  # the first token
    damages = {
        "cut": good[:-100], "empty": b"", "flipped": bytes(flipped), "text": b"hello" * 100, "ids": bytes(other_ids),
        "shape": good.replace(b'"shape": [1, 1, 77, 16]', b'"shape": [1, 1, 16, 77]'),
        "rank": good.replace(b'"shape": [1, 1, 77, 16]', b'"shape": [1232]          '[:23]),
        "layers": good.replace(b'[{\\"is_initialized\\": true}, ', b'['.ljust(31)),
        "json": good.replace(b"true}, {", b"true}  {"), "type": good.replace(b'"F32"', b'"I32"'),
        "name": good.replace(b'"0.keys"', b'"0.kexs"'), "other layer": good.replace(b'"0.keys"', b'"7.keys"'),
    }  # fmt: skip
    for name, content in damages.items():
        assert content != good, name
        caplog.clear()
        file.write_bytes(content)
        store()
        assert go_on(runtime, ids) == (expected, 0), name
        assert "is not used" in caplog.text or name == "ids", name
        runtime.forget()
        assert file.read_bytes() == good, name  # written anew
    (folder / "notes.txt").write_text("mine")
    (folder / f"session-{'0' * 64}.safetensors").mkdir()
    store()
    assert go_on(runtime, ids) == (expected, 69)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_that_goes_while_a_server_runs_is_passed_over_with_a_word(runtime, store, tmp_path, caplog):
    store()
    expected, _ = go_on(runtime, draw(70))
    runtime.forget()
    for file in (tmp_path / "s").iterdir():
        file.unlink()
    assert go_on(runtime, draw(70)) == (expected, 0)
    assert "No such file" in caplog.text


def test_a_text_that_is_longer_than_the_context_is_left_on_the_disk(runtime, store):
    store()
    go_on(runtime, draw(200))
    runtime.forget()
    assert store(context=207).best(draw(100)[0]) == 99
    assert store(context=206).best(draw(100)[0]) == 0


def test_what_hangs_on_other_things_does_not_meet(olmoe, runtime, store, tmp_path, caplog):
    for key in ("one", "two"):
        store(key=key)
        assert go_on(runtime, draw(70))[1] == 0
        runtime.forget()
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert caplog.text == ""
    cache, other = new_cache(runtime.model), new_cache(runtime.model, KVFormat(name="int8"), (0, 1))
    keys = {session_key(runtime.model, digest, cache, "full") for digest in ("a", "b")}
    keys |= {session_key(runtime.model, "a", other, "int8"), session_key(runtime.model, "a", cache, "window:9")}
    with Runtime(olmoe, memory="64GiB", context=256, dtype=torch.bfloat16) as narrow:
        keys.add(session_key(narrow.model, "a", cache, "full"))
    assert len(keys) == 5


def test_what_was_used_longest_ago_goes_and_the_bound_holds(runtime, store, tmp_path):
    folder, size = tmp_path / "s", 60_000
    store(size)
    for seed in range(6):
        go_on(runtime, draw(60, seed))
        runtime.forget()
        assert sum(file.stat().st_size for file in folder.iterdir()) <= size
    assert go_on(runtime, draw(60, 4))[1] == 59
    runtime._kept._kept.clear()
    go_on(runtime, draw(60, 7))
    runtime.forget()
    assert [go_on(runtime, draw(60, seed))[1] for seed in (3, 4)] == [0, 59]  # 4 was used, so 3 went
    files = sorted(folder.iterdir())
    store(2000)
    go_on(runtime, draw(60, 9))
    runtime.forget()
    assert sorted(folder.iterdir()) == files  # a session that is too large by itself takes nobody's place


def test_a_beginning_is_one_file_with_what_goes_on(runtime, store, tmp_path):
    ids = draw(60)
    for _ in range(2):
        sessions = store()
        first, _ = go_on(runtime, ids)
        runtime.forget()
        ids = torch.cat([ids, torch.tensor([first]), draw(5, seed=2)], 1)
        assert len(list((tmp_path / "s").iterdir())) == 1
    go_on(runtime, draw(60))
    runtime.forget()
    assert [len(each) for each in sessions.sequences] == [ids.shape[1] - 6]


def test_a_disk_that_is_full_costs_a_session_and_no_answer(runtime, store, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_store, "_write", full)
    store()
    assert len(go_on(runtime, draw(30))[0]) == 8
    runtime.forget()
    assert "a session is not kept" in caplog.text
    assert list((tmp_path / "s").iterdir()) == []


def test_a_folder_that_cannot_be_is_said(olmoe, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="--sessions"):
            check_folder(folder, "1GiB")
        with pytest.raises(InputError, match="--sessions"):
            Runtime(olmoe, memory="64GiB", sessions=folder)
    with pytest.raises(InputError, match="is no amount"):
        check_folder(tmp_path / "s", "much")
