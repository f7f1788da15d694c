"""A stream computes what the model in memory computes, and holds one unit's weights at a time."""

import ctypes
import gc
import subprocess
import sys
import threading

import pytest
import torch
import transformers

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.stream import spill as spill_module
from coterie.model.stream.memory import fitting_batch, peak_bytes
from coterie.model.stream.stream import Stream, working_dtype
from coterie.testing import tiny_checkpoint

IDS = torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def make(model_type="olmoe", **changes):
        key = (model_type, *sorted(changes.items()))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(model_type) / "model", model_type, **changes)
        return made[key]

    return make


def stock_logits(path, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def streamed_logits(path, batches, **options):
    with Stream(Checkpoint.open(path), **options) as stream:
        run = stream.run([stream.logits_job(ids) for ids in batches])
        for _ in run:
            pass
    return run.results


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe"])
def test_logits_are_those_of_the_stock_model(tiny, model_type):
    path = tiny(model_type)
    for found, ids in zip(streamed_logits(path, IDS.split(2)), IDS.split(2), strict=True):
        assert torch.equal(found, stock_logits(path, ids))


def test_tied_embeddings_come_from_the_one_tensor_on_disk(tiny):
    path = tiny("qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(path).tensors
    assert torch.equal(streamed_logits(path, [IDS])[0], stock_logits(path, IDS))


def test_units_are_the_layers_and_what_stands_beside_them(tiny):
    with Stream(Checkpoint.open(tiny())) as stream:
        names = [unit.name for unit in stream.units]
        assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
        held = [name for unit in stream.units for name in unit.names]
        assert sorted(held) == sorted(stream.model.state_dict())
        on_disk = [name for unit in stream.units for name in unit.disk_names]
        assert sorted(on_disk) == sorted(stream.checkpoint.tensors)


def test_only_the_present_unit_has_weights(tiny):
    with Stream(Checkpoint.open(tiny())) as stream:
        seen = []
        for stage in stream.run([stream.logits_job(ids) for ids in IDS.split(2)]):
            real = {name for name, tensor in stream.model.state_dict().items() if not tensor.is_meta}
            assert real == set(stage.unit.names)
            assert [call.job for call in stage.calls] == [0, 1, 2]
            seen.append(stage.unit.name)
        assert seen == [unit.name for unit in stream.units]
        assert all(tensor.is_meta for tensor in stream.model.state_dict().values())
        # One pass reads every tensor once, however many batches there are.
        assert stream.bytes_read == stream.checkpoint.num_bytes


@pytest.mark.parametrize(("file_bytes", "expected_files"), [(0, 8 * 3), (2**20, 1)])
def test_outputs_beyond_the_bound_go_to_files_and_come_back_equal(
    tiny, tmp_path, monkeypatch, file_bytes, expected_files
):
    expected = streamed_logits(tiny(), IDS.split(2))
    monkeypatch.setattr(spill_module, "SPILL_BYTES", 0)
    monkeypatch.setattr(spill_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(spill_module, "FILE_BYTES", file_bytes)
    files = []
    real = spill_module.tempfile.TemporaryFile
    monkeypatch.setattr(
        spill_module.tempfile, "TemporaryFile", lambda **options: files.append(options) or real(**options)
    )
    found = streamed_logits(tiny(), IDS.split(2), scratch=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(files) == expected_files  # for each batch of 5 units and 3 tensors of its job, or one
    assert all(options["dir"] == tmp_path for options in files)
    assert list(tmp_path.iterdir()) == []


def test_what_jobs_make_themselves_takes_no_memory_while_they_wait(tiny):
    """A mask that is written out for every batch, as eager attention takes it, is in a file wherever it is known."""
    ids_BS, size = torch.randint(256, (3, 160), generator=torch.Generator().manual_seed(1)), 3 * 160 * 160 * 4

    def plain_tensors():
        return [each for each in gc.get_objects() if type(each) is torch.Tensor and each.layout == torch.strided]

    before = [each for each in plain_tensors() if each.nbytes == size]  # of other tests in this process
    others = set(map(id, before))
    with Stream(Checkpoint.open(tiny())) as stream:
        stream.model.set_attn_implementation("eager")
        run = stream.run([stream.logits_job(ids_BS)] * 4)
        for stage in run:
            if ".layers." in stage.unit.name:
                masks = [each for each in plain_tensors() if each.nbytes == size and id(each) not in others]
                assert len(masks) >= 4
                assert all(stream._spill._holds(mask) for mask in masks)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected_BSV = model(input_ids=ids_BS, use_cache=False).logits
    assert all(torch.equal(result, expected_BSV) for result in run.results)


def test_raw_tensors_are_handed_out_as_they_are_on_disk(tiny):
    with Stream(Checkpoint.open(tiny())) as stream:
        for stage in stream.run([stream.logits_job(IDS)], keep=lambda name: "norm" in name):
            assert set(stage.kept) == {name for name in stage.unit.disk_names if "norm" in name}
            for name, tensor in stage.kept.items():
                assert torch.equal(tensor, stream.read(name))


def test_a_call_can_be_computed_again_and_answered_with_something_else(tiny):
    with Stream(Checkpoint.open(tiny())) as stream:
        run = stream.run([stream.logits_job(IDS), stream.logits_job(IDS)])
        for stage in run:
            if stage.unit.name == "model.layers.1":
                first, second = stage.calls
                output = first.compute()
                assert torch.equal(output, first.compute())
                second.finish(torch.zeros_like(output))
    doubled = stock_logits(tiny(), IDS)
    assert torch.equal(run.results[0], doubled)
    assert run.results[1].abs().max() == 0  # the norm of zeros, times the head


def test_the_head_alone_gives_the_same_logits_again(tiny):
    for model_type in ("olmoe", "granitemoe"):
        with Stream(Checkpoint.open(tiny(model_type))) as stream:
            run = stream.run([lambda: stream.model.base_model(input_ids=IDS, use_cache=False)])
            for _ in run:
                pass
            with stream.head() as head:
                for _ in range(2):
                    assert torch.equal(head(IDS, run.results[0]), stock_logits(tiny(model_type), IDS))


def test_reading_ahead_changes_nothing(tiny):
    """As on a GPU: while a layer is computed, the next one of the list is read in another thread."""
    with Stream(Checkpoint.open(tiny("qwen3_moe", num_hidden_layers=5))) as stream:
        stream.reads_ahead = True
        readers, real = [], stream._load_unit

        def load(unit, keep):
            readers.append((unit.name, threading.current_thread() is threading.main_thread()))
            return real(unit, keep)

        stream._load_unit = load
        run = stream.run([stream.logits_job(ids) for ids in IDS.split(2)])
        for _ in run:
            pass
        assert stream.bytes_read == stream.checkpoint.num_bytes
    by_main = dict(readers)
    assert [by_main[f"model.layers.{number}"] for number in range(5)] == [True, False, False, False, False]
    for found, ids in zip(run.results, IDS.split(2), strict=True):
        assert torch.equal(found, stock_logits(tiny("qwen3_moe", num_hidden_layers=5), ids))


def job_threads():
    """Threads of jobs; others (of progress bars, of whoever runs the tests) come and go."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("coterie-job")]


def test_an_error_in_a_job_comes_out_and_leaves_no_thread(tiny):
    def broken():
        stream.model.base_model(input_ids=IDS, use_cache=False)
        raise RuntimeError("mine")

    with Stream(Checkpoint.open(tiny())) as stream, pytest.raises(RuntimeError, match="mine"):
        for _ in stream.run([stream.logits_job(IDS), broken]):
            pass
    assert job_threads() == []


def test_a_loop_that_is_left_early_leaves_no_thread_and_no_weights(tiny):
    with Stream(Checkpoint.open(tiny())) as stream:
        for stage in stream.run([stream.logits_job(IDS)] * 3):
            if stage.unit.name == "model.layers.0":
                assert len(job_threads()) == 3
                break
        assert job_threads() == []
        assert all(tensor.is_meta for tensor in stream.model.state_dict().values())


def test_a_missing_tensor_is_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tiny_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.self_attn\.k_proj\.weight is missing, and 0 others"):
        Stream(Checkpoint.open(path))  # before anything is read


def test_the_model_is_whole_again_after_use(tiny):
    """Closing a stream gives the units their own forward back."""
    with Stream(Checkpoint.open(tiny())) as stream:
        assert "forward" in vars(stream.model.lm_head)
    assert type(stream.model.lm_head).forward == torch.nn.Linear.forward
    assert stream.model.lm_head.forward.__func__ is torch.nn.Linear.forward


def test_bfloat16_is_worked_in_float32_on_the_cpu_and_as_it_is_elsewhere(tmp_path):
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16))
    assert working_dtype(checkpoint, torch.device("cpu")) == torch.float32
    assert working_dtype(checkpoint, torch.device("cuda")) == torch.bfloat16
    with Stream(checkpoint, dtype=torch.bfloat16) as stream:
        run = stream.run([stream.logits_job(IDS)])
        for stage in run:
            assert stream.unit_bytes(stage.unit) == sum(
                tensor.numel() * tensor.element_size()
                for name, tensor in stream.model.state_dict().items()
                if stage.unit.holds(name)
            )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(run.results[0], model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.long
def test_the_measured_peak_grows_with_what_is_held():
    before = peak_bytes()
    held = torch.ones(before // 4 + 2**25)  # more than the peak so far, and touched
    assert peak_bytes() >= held.numel() * 4
    assert peak_bytes() > before


def test_batches_shrink_where_a_model_is_wide():
    assert fitting_batch(8, seq_len=512, hidden_size=256) == 8
    assert fitting_batch(8, seq_len=512, hidden_size=2048) == 4
    assert fitting_batch(8, seq_len=100_000, hidden_size=8192) == 1


@pytest.mark.long
def test_large_tensors_leave_no_holes_in_the_heap():
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("no glibc that tells")
    script = """
import ctypes, torch
from coterie.model.stream.spill import OWN_BYTES, keep_out_of_heaps

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
keep_out_of_heaps()
del_me = torch.zeros(2**22)
del del_me  # by itself the library takes what is smaller than this from its heap from now on
before = library.mallinfo2().e
tensor = torch.zeros(OWN_BYTES // 4)
print(library.mallinfo2().e - before >= OWN_BYTES)  # bytes outside of the heap
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "True\n"
