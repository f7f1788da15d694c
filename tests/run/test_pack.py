"""Packed models: the same numbers with any room, exactly what was stored, whole or not there, and checked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints import tensors_of
from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.errors import (
    CorruptCheckpoint,
    InputError,
    OutOfSpace,
    OutputExists,
    ReloadMismatch,
    StaleArtifact,
    UnsupportedDtype,
)
from coterie.model.arch.inspect import inspect
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.kernel_matrix import SCALE, KernelMatrix, this_isa
from coterie.model.disk.header import header_of, read_header
from coterie.model.disk.open import open_checkpoint
from coterie.model.disk.quantized_records import BLOCK
from coterie.run import pack as packing
from coterie.run import prepare as preparing
from coterie.run.engine import Runtime, Sampling
from coterie.run.forecast import forecast
from coterie.run.kernels import EightBitProjection, FourBitProjection, KernelLinear
from coterie.run.pack import PACK_FILE, pack, verify
from coterie.testing import tiny_checkpoint, tiny_text
from integer_formats import Matrix, compressed_bytes, compressed_config
from run_folders import Crash, partial, tree

REFERENCE = Path(__file__).parents[2] / "reference"
IDS = torch.arange(5, 45)[None]

#: Families whose experts lie on disk in different ways, with what says their width.
FAMILIES = {
    "olmoe": "intermediate_size", "mixtral": "intermediate_size", "gpt_oss": "intermediate_size",
    "granitemoe": "intermediate_size", "deepseek_v3": "moe_intermediate_size", "qwen3_vl_moe": "moe_intermediate_size",
    "jamba": "intermediate_size", "glm4_moe": "moe_intermediate_size",
}  # fmt: skip


def logits(runtime, ids=IDS):
    with torch.no_grad():
        return runtime.model(ids).logits


def whole(model, **options):
    return Runtime(model, memory="64GiB", context=64, **options)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("pack") / "olmoe", "olmoe", intermediate_size=64)


@pytest.fixture(scope="module")
def packed(olmoe, tmp_path_factory):
    return pack(olmoe, tmp_path_factory.mktemp("packed") / "out", bits=4, dense=8).path


def as_plain_numbers(folder, out):
    """Write what a packed folder unpacks to, in float32, as a plain checkpoint."""
    checkpoint = open_checkpoint(folder, output_dtype="float32")
    out.mkdir()
    with checkpoint.reader() as reader:
        tensors = {name: reader.read(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
    for file in checkpoint.other_files():
        shutil.copyfile(file, out / file.name)
    return out


def eight_in_float32(projection, x, bias=None):
    return torch.nn.functional.linear(x, projection.number_RC.float() * projection.scale_R.float()[:, None], bias)


def four_in_float32(projection, x, bias=None):
    encoding = KernelMatrix(bits=4, group=projection.group, isa=this_isa(), dtype="F32")
    values = encoding.unpack({"": projection.packed_RC, SCALE: projection.scale_GR2})
    return torch.nn.functional.linear(x, values, bias)


def test_any_room_computes_the_same_bits(packed):
    with whole(packed) as runtime:
        expected, alone = logits(runtime), logits(runtime, IDS[:, :1])
    with whole(packed, most_experts=3, policy="lru", lookahead=8) as runtime:
        assert torch.equal(logits(runtime), expected)
        assert torch.equal(logits(runtime, IDS[:, :1]), alone)
        assert runtime.residency.counters.evictions > 0


@pytest.mark.long
@pytest.mark.parametrize(("bits", "dense"), [(4, 8), (8, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_was_stored_with_any_room(family, bits, dense, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "model", family, **{FAMILIES[family]: 64})
    result = pack(model, tmp_path / "out", bits=bits, dense=dense)
    assert "bfloat16" not in result.kinds
    assert 0.003 < result.rounding.relative < 0.09
    with whole(result.path) as runtime:
        assert sum(isinstance(module, KernelLinear) for module in runtime.model.modules()) > 3
        expected = logits(runtime)
        one_by_one = [logits(runtime, IDS[:, : n + 1])[:, -1] for n in (0, 3)]
    cases = [(2, "decay", 1, 0), (3, "lru", 2, 2), (5, "lcu", 3, 8)]
    for slots, policy, lanes, lookahead in cases:
        options = {"most_experts": slots, "policy": policy, "lanes": lanes, "lookahead": lookahead}
        with whole(result.path, **options) as runtime:
            assert torch.equal(logits(runtime), expected)
            again = [logits(runtime, IDS[:, : n + 1])[:, -1] for n in (0, 3)]
            assert all(torch.equal(a, b) for a, b in zip(again, one_by_one, strict=True))
            assert runtime.residency.counters.evictions > 0
    # The same in float32 is exactly what a plain checkpoint of the stored numbers computes.
    plain = as_plain_numbers(result.path, tmp_path / "plain")
    monkeypatch.setattr(EightBitProjection, "__call__", eight_in_float32)
    monkeypatch.setattr(FourBitProjection, "__call__", four_in_float32)
    with whole(result.path, dtype=torch.float32) as few, whole(plain, dtype=torch.float32) as many:
        got, expected = logits(few), logits(many)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_expert_is_one_aligned_read_and_is_multiplied_with_where_it_lies(packed):
    records = [info for info in Checkpoint.open(packed).tensors.values() if info.name.endswith(".record")]
    assert len(records) == 2 * 8
    assert all(info.begin % BLOCK == 0 and info.num_bytes % BLOCK == 0 for info in records)
    with whole(packed) as runtime:
        assert all(len(record.ranges) == 1 for record in runtime.residency.records.values())
        assert runtime.budget.slot == records[0].num_bytes
        [streamed] = {module._coterie_installed.function.__self__ for module in runtime.model.modules()
                      if hasattr(module, "_coterie_installed")}  # fmt: skip
        layer = next(iter(streamed._layers.values()))
        with runtime.residency.acquire(0, [3]) as leases:
            projections = streamed._projections(layer, leases[3])
            begin = leases[3].data.data_ptr()
            for projection in projections.values():
                assert isinstance(projection, FourBitProjection)
                for tensor in (projection.packed_RC, projection.scale_GR2):
                    assert begin <= tensor.data_ptr() < begin + runtime.budget.slot
                    assert tensor.data_ptr() % 64 == 0
            del projections, projection, tensor


def test_what_is_not_packed_is_as_it_was(olmoe, packed):
    before, after = tensors_of(olmoe), {}
    for file in packed.glob("*.safetensors"):
        after |= load_file(file)  # stock readers read these files
    kept = before.keys() & {name for name, tensor in after.items() if tensor.dtype != torch.uint8}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= kept
    assert any(name.endswith("mlp.gate.weight") for name in kept), "routers stay"
    assert not any("_proj" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        assert (packed / name).read_bytes() == (olmoe / name).read_bytes()


def test_less_memory_is_taken_and_text_comes_out(olmoe, packed):
    with whole(olmoe) as runtime:
        plain = runtime.budget
    with whole(packed) as runtime:
        assert runtime.budget.resident < 0.8 * plain.resident
        assert runtime.budget.slot < 0.3 * plain.slot
        resident = {id(tensor): tensor for module in runtime.model.modules() if isinstance(module, KernelLinear)
                    for tensor in (module.projection.number_RC, module.projection.scale_R)}  # fmt: skip
        state = sum(t.numel() * t.element_size() for t in runtime.model.state_dict().values() if not t.is_meta)
        packed_bytes = sum(t.numel() * t.element_size() for t in resident.values())
        assert state + packed_bytes == runtime.budget.resident
        made = runtime.generate("def main():", template=False, max_tokens=8, sampling=Sampling(temperature=0))
    assert made.tokens > 0


def test_widths_that_no_kernel_takes_stay_in_bfloat16_and_that_is_said(tmp_path, caplog):
    model = tiny_checkpoint(tmp_path / "model", "olmoe", dtype=torch.bfloat16)  # expert width 24
    result = pack(model, tmp_path / "out", bits=4)
    assert result.kinds == {"bfloat16": 48}
    assert result.isa is None
    assert "48 matrices of experts stay in bfloat16, such as those of 24 rows and 32 columns" in caplog.text
    with whole(model) as plain, whole(result.path) as runtime:
        assert torch.equal(logits(runtime), logits(plain))
    mixed = pack(model, tmp_path / "mixed", bits=8, dry_run=True)
    assert mixed.kinds == {"8 bits": 32, "bfloat16": 16}


@pytest.mark.long
def test_experts_of_which_some_matrices_are_plain_compute_the_same_bits(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "olmoe", dtype=torch.bfloat16)
    mixed = pack(model, tmp_path / "mixed", bits=8).path
    with whole(mixed) as runtime, whole(mixed, most_experts=2) as small:
        assert torch.equal(logits(runtime), logits(small))


@pytest.mark.long
def test_numbers_of_compressed_tensors_stay_as_they_are(tmp_path):
    """Those of GPTQ, symmetric and with scales in bfloat16; groups as they are."""
    wide = tiny_checkpoint(tmp_path / "wide", "olmoe", dtype=torch.float32, hidden_size=128, intermediate_size=256)
    text = tiny_text(tmp_path / "text", documents=4)
    integers = compress(
        wide, tmp_path / "int4", type="INT4", recipe="gptq", target="compressed-tensors", text=text, tokens=256,
        seq_len=32, experts_only=True,
    ).out  # fmt: skip
    result = pack(integers, tmp_path / "out", bits=4)
    assert sum(result.kinds.values()) == 48
    assert (result.rounding.exact, result.rounding.matrices) == (48, 48)
    stored, again = (open_checkpoint(folder, output_dtype="float32") for folder in (integers, result.path))
    with stored.reader() as one, again.reader() as other:
        names = [name for name in stored.tensors if ".experts." in name]
        assert len(names) == 48
        assert all(torch.equal(one.read(name), other.read(name)) for name in names)


def test_numbers_of_eight_bits_with_a_scale_for_each_row_stay_as_they_are(olmoe, tmp_path):
    folder = tmp_path / "int8"
    shutil.copytree(olmoe, folder)
    tensors = tensors_of(folder)
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        matrix = Matrix(weight, 8, [0] * weight.shape[1], symmetric=True, scale_dtype=torch.bfloat16)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{leaf}": each.contiguous() for leaf, each in compressed_bytes(matrix).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = compressed_config("int-quantized", num_bits=8)
    (folder / "config.json").write_text(json.dumps(config))
    result = pack(folder, tmp_path / "out", bits=8)
    assert (result.rounding.exact, result.rounding.matrices) == (48, 48)


# --- whole or not there ---------------------------------------------------------------------------------------------


def test_a_pack_that_was_killed_goes_on_and_is_the_same(olmoe, packed, tmp_path, monkeypatch):
    out, write, written = tmp_path / "out", packing._write, []

    def killed(run, file, *rest):
        if written:
            (run.folder / file.name).write_bytes(b"half of it")
            raise Crash
        written.append(file.name)
        write(run, file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(packing, "_write", killed)
        with pytest.raises(Crash):
            pack(olmoe, out, bits=4, dense=8)
    assert not out.exists()
    assert [file.name for file in (partial(out) / "result").iterdir()] == written
    with pytest.raises(StaleArtifact, match="begun otherwise: bits was 4, now it is 8"):
        pack(olmoe, out, bits=8, dense=8)
    again = []
    monkeypatch.setattr(packing, "_write", lambda run, file, *rest: (again.append(file.name), write(run, file, *rest)))
    result = pack(olmoe, out, bits=4, dense=8)
    assert written[0] not in again
    assert len(again) == 2
    assert tree(out) == tree(packed)
    assert result.rounding.matrices == 48 + 9
    assert not partial(out).exists()


def test_what_reads_back_as_something_else_is_no_result(olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_changed", lambda folder, infos, digests: iter(sorted(infos)[:1]))
    with pytest.raises(ReloadMismatch, match=r"experts\.0\.record reads back as something else"):
        pack(olmoe, tmp_path / "out", bits=8)
    assert list(tmp_path.iterdir()) == []
    assert header_of({"a": ("U8", (5,))}, multiple=BLOCK)[:8] == (BLOCK - 8).to_bytes(8, "little")


def test_a_disk_without_room_is_noticed_before(olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "free_space", lambda place: (tmp_path, 1000))
    with pytest.raises(OutOfSpace, match=r"out needs 16\.\d MiB, .* has 0.98 KiB free"):
        pack(olmoe, tmp_path / "out", bits=8)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_said(olmoe, packed, tmp_path):
    with pytest.raises(InputError, match="--bits 3 and --dense None: kernels compute with 8 bits, and with 4"):
        pack(olmoe, tmp_path / "out", bits=3)
    with pytest.raises(InputError, match="--group 48 is none that kernels compute with: 32, 64, 128, 256"):
        pack(olmoe, tmp_path / "out", bits=4, group=48)
    with pytest.raises(OutputExists, match="exists; choose another place"):
        pack(olmoe, packed, bits=4)
    with pytest.raises(InputError, match="is inside the model folder"):
        pack(olmoe, olmoe / "out", bits=4)
    with pytest.raises(InputError, match="was not packed by coterie pack"):
        verify(olmoe)
    assert list(tmp_path.iterdir()) == []


# --- what is read ---------------------------------------------------------------------------------------------------


def copy_of(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_checksums_name_the_record_that_was_changed(packed, tmp_path):
    copy = copy_of(packed, tmp_path)
    told = verify(copy)
    assert told.tensors == len(json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"])
    info = Checkpoint.open(copy).tensors["model.layers.1.mlp.experts.5.record"]
    with (copy / info.shard).open("r+b") as file:
        file.seek(info.begin + 1000)
        byte = file.read(1)
        file.seek(info.begin + 1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match=r"experts\.5\.record is not what was written"):
        verify(copy)
    with (copy / "config.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json is not what was written"):
        verify(copy)
    (copy / PACK_FILE).unlink()
    with pytest.raises(InputError, match="there are no checksums"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=9), "packed by another version of coterie"),
        (lambda s: s["records"][0].update(count=9), r"experts\.8\.record' is missing"),
        (lambda s: s["records"][0].update(count=0), "records that cannot be"),
        (lambda s: s["records"][0]["matrices"][0].update(rows=48), "does not fit"),
        (lambda s: s["records"][0]["matrices"][0].update(rows=2**60), "does not fit"),
        (lambda s: s["records"][0]["matrices"][0].update(rows="a"), "records that cannot be"),
        (lambda s: s["records"][0]["matrices"][0].update(bits=5), "records that cannot be"),
        (lambda s: s["records"][0]["matrices"].pop(), "does not fit"),
        (
            lambda s: s["records"][0]["tensors"][0]["parts"][0].update(start=3),
            "and (a part has|its parts)",
        ),
        (
            lambda s: s["records"][0]["tensors"][0]["parts"][0].update(matrix=0),
            "and (a part has|its parts)",
        ),
        (
            lambda s: s["records"][0]["tensors"][0].update(shape=[2**60, 32]),
            "and (a part has|its parts)",
        ),
        (lambda s: s.update(records=[7]), "records that cannot be"),
        (lambda s: [each.update(group=64) for each in s["records"][0]["matrices"]], "does not fit|cannot be"),
    ],
)
def test_a_config_that_contradicts_the_files_is_refused(packed, tmp_path, change, message):
    copy = copy_of(packed, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((CorruptCheckpoint, UnsupportedDtype), match=message):
        whole(copy)


def test_another_processor_is_told_to_pack_again(packed, monkeypatch):
    monkeypatch.setattr(preparing, "this_isa", lambda: "SVE256")
    with pytest.raises(InputError, match=rf"packed for processors with {this_isa()}.* computes with SVE256: pack"):
        whole(packed)


@pytest.mark.long
@pytest.mark.skipif(this_isa() not in ("AVX512", "AVX2"), reason="torch has one way to compute here")
def test_each_kind_of_processor_packs_for_itself(olmoe, tmp_path):
    """torch is made to compute as an older processor does."""
    program = """
import sys, torch
from coterie.errors import InputError
from coterie.run.engine import Runtime
from coterie.run.pack import pack
model, other, out = sys.argv[1:]
try:
    Runtime(other, memory="64GiB", context=64)
except InputError as error:
    print(error)
packed = pack(model, out, bits=4)
with Runtime(packed.path, memory="64GiB", context=64) as runtime, torch.no_grad():
    print("LOGITS", packed.isa, runtime.model(torch.arange(5, 45)[None]).logits.float().norm().item())
"""
    first = pack(olmoe, tmp_path / "first", bits=4)
    done = subprocess.run(
        [sys.executable, "-c", program, str(olmoe), str(first.path), str(tmp_path / "second")], capture_output=True,
        text=True, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert f"was packed for processors with {this_isa()}" in done.stdout
    _, isa, norm = done.stdout.strip().splitlines()[-1].split()
    assert isa == "DEFAULT"
    with whole(first.path) as runtime:
        assert abs(float(norm) / float(logits(runtime).float().norm()) - 1) < 0.1


def test_everybody_else_reads_a_packed_folder_as_plain_numbers(olmoe, packed):
    before, after = inspect(olmoe), inspect(packed)
    assert after.total.parameters == before.total.parameters
    assert after.active_parameters == before.active_parameters
    assert after.parts["experts"].bytes < 0.2 * before.parts["experts"].bytes
    assert after.file_bytes == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    with torch.no_grad():
        got, expected = (load_model(each, dtype=torch.float32)(IDS).logits for each in (packed, olmoe))
    assert 0 < float((got - expected).norm()) < 0.3 * float(expected.norm())
    again = pack(packed, packed.parent / "again", bits=4, dense=8)
    assert again.rounding.relative < 1e-3, "what was packed changes no more"


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"recipe": "hc-smoe", "router": "map"}, {"recipe": "heapr-ragged"}], ids=["mapped", "ragged"]
)
def test_results_that_coterie_alone_loads_are_packed(tmp_path, options):
    wide = tiny_checkpoint(tmp_path / "wide", "olmoe", intermediate_size=64)
    text = tiny_text(tmp_path / "text", documents=4)
    small = compress(wide, tmp_path / "small", keep=0.5, text=text, tokens=256, seq_len=32, **options).out
    out = pack(small, tmp_path / "out", bits=8).path
    with whole(small, dtype=torch.float32) as plain, whole(out, dtype=torch.float32) as runtime:
        got, expected = logits(runtime), logits(plain)
    assert float((got - expected).norm()) < 0.15 * float(expected.norm())


@pytest.mark.long
def test_no_more_memory_is_taken_than_is_said(tmp_path):
    program = """
import json, sys
from coterie.run.pack import pack
from coterie.model.stream.memory import peak_bytes
model, out, small = sys.argv[1:]
said = pack(model, out + "-tried", bits=4, dense=4, dry_run=True).memory_bytes
pack(small, out + "-small", bits=4, dense=4)  # libraries, once
before = peak_bytes()
pack(model, out, bits=4, dense=4)
print(json.dumps([said, peak_bytes() - before]))
"""
    shape = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 2}
    model = tiny_checkpoint(
        tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16, num_local_experts=48, vocab_size=32_768, **shape
    )
    small = tiny_checkpoint(tmp_path / "small", "qwen3_moe", moe_intermediate_size=64)
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(tmp_path / "out"), str(small)], capture_output=True, text=True,
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said, taken = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert taken <= said < size / 1.5


@pytest.mark.long
def test_a_forecast_measures_what_the_run_computes_with(packed):
    told = forecast(packed, memory="2GiB", context=64, disk_seconds=0.2)
    assert told.fits
    assert told.compute is not None
    info = next(iter(read_header(next(packed.glob("*.safetensors"))).values()))
    assert told.compute.expert_bytes <= info.num_bytes
    assert told.disk is not None
    assert told.disk.record_bytes == info.num_bytes


@pytest.mark.long
def test_predictions_of_a_trained_model_hardly_move(tmp_path):
    """Divergence from the plain model, in nats, on text of the reference models."""
    model = REFERENCE / "qwen3_moe"
    text = (REFERENCE / "text" / "test" / "english_prose.txt").read_text(encoding="utf-8")
    divergences = {}
    with whole(model, dtype=torch.float32) as runtime:
        ids = torch.tensor(runtime.tokenizer(text[:4000]).input_ids[:512])[None]
        expected = logits(runtime, ids)[0].log_softmax(-1)
    for bits, dense in ((8, 8), (4, None), (4, 8)):
        out = pack(model, tmp_path / f"{bits}-{dense}", bits=bits, dense=dense).path
        with whole(out) as runtime:
            got = logits(runtime, ids)[0].float().log_softmax(-1)
        divergences[bits, dense] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert 0 < divergences[8, 8] < 0.001
    assert divergences[8, 8] < divergences[4, None] < 0.006
    assert divergences[4, 8] < 0.006


# --- the command ----------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_packs_checks_and_says_what_it_would_do(olmoe, tmp_path):
    out = tmp_path / "out"
    would = command("pack", olmoe, out, "--bits", 4, "--dense", 8, "--dry-run", "--json")
    assert would.exit_code == 0
    assert not out.exists()
    done = command("pack", olmoe, out, "--bits", 4, "--dense", 8)
    assert done.exit_code == 0
    assert "matrices: 32 in 4 bits, groups of 32, 16 in 4 bits, groups of 64, 9 in 8 bits" in done.stdout
    written = sum(info.num_bytes for info in Checkpoint.open(out).tensors.values())
    assert json.loads(would.stdout)["num_bytes"] == written
    checked = command("pack", out, "--verify", "--json")
    assert json.loads(checked.stdout)["num_bytes"] == written
    ran = command("run", out, "def", "--memory", "64GiB", "--context", 64, "--max-tokens", 3, "--json")
    assert json.loads(ran.stdout)["tokens"] == 3
    for arguments, message in (
        ((olmoe,), "say where the packed model goes"),
        ((olmoe, tmp_path / "x"), "say in how many bits"),
        ((out, tmp_path / "x", "--verify"), "with --verify nothing is written"),
    ):
        refused = command("pack", *arguments)
        assert refused.exit_code == 2
        assert message in refused.output
