"""Bytes, of every tiny family for every reader of fewer bits: foretold, planned, written, and what files are long.

What is stored is read back: by the package gguf, or from integers and scales by hand, and by the library.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatch

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

import coterie
from coterie.compress.dry_run import dry_run
from coterie.errors import Infeasible
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.block_types import SIZES
from coterie.model.disk.gguf.families import FAMILIES
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_families
from export_cases import RIGHT

#: Families whose experts lie together in one tensor, for which compressed-tensors has no name.
FUSED = {
    "aria_text", "gemma4_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hy_v4", "inkling2_text", "inkling_text", "minimax_m3_vl_text", "mistral4", "muse_spark", "openai_privacy_filter",
    "qwen3_vl_moe", "zaya",
}  # fmt: skip
#: Families of which other weights are put together from several, which stock loaders of that format fail at.
PUT_TOGETHER = {"bailing_hybrid", "glm5_next", "kimi_linear"}
REFUSED = dict.fromkeys(FUSED, "experts of this model lie together in one tensor") | dict.fromkeys(
    PUT_TOGETHER, r"conv1d\.weight is put together from 3 tensors"
)
CALIBRATION = {"tokens": 32, "seq_len": 16, "recipe": "nearest"}


def widened(tiny, family):
    """Return a tiny checkpoint whose experts are as wide as a block of 32."""
    config = json.loads((tiny(family) / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config", {})
    keys = {key for part in (config, inner) for key, value in part.items() if value == 24 and type(value) is int}
    return tiny(family, **dict.fromkeys(sorted(keys), 32), **RIGHT.get(family, {}))


def written(folder):
    """Return {name: tensor} of all files of weights, and check that these hold nothing but headers beside them."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            here = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # it is no dict
        head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == head + sum(tensor.nbytes for tensor in here.values()), file.name
        tensors |= here
    return tensors


def check_bytes(model, out, text, **how):
    foretold = dry_run(model, out, text=text, **CALIBRATION, **how).plan
    made = coterie.compress(model, out, text=text, **CALIBRATION, **how)
    stored = written(out)
    assert foretold.predicted_bytes == made.plan.predicted_bytes == made.manifest.bytes_after
    assert sum(tensor.nbytes for tensor in stored.values()) == made.plan.predicted_bytes
    assert Checkpoint.open(out).num_bytes == made.plan.predicted_bytes
    assert made.plan.types
    return made, stored


def groups_of(folder) -> list[Mapping]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["groups"]


def numbers_of_blocks(stored, group):
    """Return the numbers of a tensor that is stored in blocks, by the package gguf."""
    kind = gguf.GGMLQuantizationType[group["type"]]
    rows = stored if group["axis"] == -1 else stored.transpose(-1, -2).contiguous()
    values = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(rows.numpy(), kind)))
    return values.reshape(*values.shape[:-2], -1, group["columns"]) if group.get("columns") else values


def check_numbers_of_blocks(folder, stored):
    checkpoint = open_checkpoint(folder, output_dtype="float32")
    some = 0
    with checkpoint.reader() as reader:
        for group in groups_of(folder):
            for name in (name for name in stored if any(fnmatch(name, pattern) for pattern in group["tensors"])):
                block, size = SIZES[group["type"]]
                expected = numbers_of_blocks(stored[name], group)
                assert stored[name].nbytes * block == expected.numel() * size, name
                read = reader.read(name)
                read = read if group["axis"] == -1 else read.transpose(-1, -2)
                torch.testing.assert_close(read.reshape(expected.shape), expected, rtol=1e-6, atol=1e-7)
                some += 1
    assert some


@pytest.mark.long
@pytest.mark.parametrize("family", tiny_families())
def test_bytes_of_blocks_are_what_was_said(family, tiny, text, tmp_path):
    _, stored = check_bytes(tiny(family), tmp_path / "out", text, type="IQ4_NL", target="packed")
    check_numbers_of_blocks(tmp_path / "out", stored)


@pytest.mark.long
@pytest.mark.parametrize("family", tiny_families())
def test_bytes_of_integers_are_what_was_said(family, tiny, text, tmp_path):
    model, how = widened(tiny, family), {"type": "INT4_G32", "target": "compressed-tensors"}
    if family in REFUSED:
        with pytest.raises(Infeasible, match=REFUSED[family]):
            coterie.compress(model, tmp_path / "out", text=text, **CALIBRATION, **how)
        return
    made, stored = check_bytes(model, tmp_path / "out", text, **how)
    packed = [name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")]
    assert packed
    with open_checkpoint(tmp_path / "out", output_dtype="float32").reader() as reader:
        for name in packed:
            word_RW, scale_RG = stored[f"{name}_packed"], stored[f"{name}_scale"].float()
            rows, columns = stored[f"{name}_shape"].tolist()
            # Eight numbers of four bits in a word, the first one lowest, with 8 in place of 0.
            code_RC = torch.stack([(word_RW >> 4 * place) & 15 for place in range(8)], -1).flatten(1)[:, :columns] - 8
            value_RC = code_RC * scale_RG.repeat_interleave(32, 1)
            assert torch.equal(reader.read(name), value_RC), name
            assert word_RW.nbytes == rows * columns // 2
    assert made.manifest.bytes_before > made.manifest.bytes_after


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bytes_of_a_gguf_file_are_what_was_said(family, tiny, text, tmp_path):
    model = tiny(family, **RIGHT.get(family, {}))
    _, stored = check_bytes(model, tmp_path / "out", text, type="Q4_0", target="gguf")
    check_numbers_of_blocks(tmp_path / "out", stored)
    said = coterie.export(tmp_path / "out", tmp_path / "out.gguf", dry_run=True)
    done = coterie.export(tmp_path / "out", tmp_path / "out.gguf")
    assert said == done
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert done.num_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert done.types == {
        kind: sum(int(t.n_bytes) for t in tensors if t.tensor_type.name == kind) for kind in done.types
    }
