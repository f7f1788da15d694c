"""benchmarks/plain_quantisation.py: weights are rounded as it says, and bytes are counted with their scales."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def script(importable):
    return importlib.import_module("plain_quantisation")


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("columns", [64, 40])
def test_weights_are_rounded_to_the_nearest_of_their_group(script, bits, columns):
    weight = torch.randn(3, columns, dtype=torch.bfloat16)
    weight[1] = 0
    found = script.round_to_bits(weight, bits)
    largest = 2 ** (bits - 1) - 1
    for row, numbers in enumerate(weight.double().tolist()):
        for start in range(0, columns, 32):
            group = numbers[start : start + 32]
            scale = float(torch.tensor(max(map(abs, group)) / largest).half())
            expected = [scale * min(largest, max(-largest, round(number / scale))) if scale else 0 for number in group]
            assert found[row, start : start + 32].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_rounded_copy_differs_in_its_experts_alone_and_its_bytes_are_counted(script, tiny, tmp_path):
    model = tiny()
    script.write_rounded(model, tmp_path / "rounded", 4)
    config = json.loads((tmp_path / "rounded" / "config.json").read_text())
    assert config["dtype"] == "float32"
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "rounded"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    matrices = [name for name in before if ".experts." in name]
    assert changed == set(matrices)
    groups = sum(len(before[name]) * ((before[name].shape[1] + 31) // 32) for name in matrices)
    assert script.expert_bits(model, 4) == 4 * sum(before[name].numel() for name in matrices) + 16 * groups
    assert script.expert_bits(model) == 16 * sum(before[name].numel() for name in matrices)


@pytest.mark.slow
def test_the_benchmark_runs_and_rounding_to_eight_bits_costs_less_than_half_of_the_experts(
    bundled, script, monkeypatch, capsys, tmp_path
):
    line = ["plain_quantisation.py", "--tokens", "4096", "--recipes", "reap", "--test-tokens", "5120"]
    monkeypatch.setattr("sys.argv", [*line, "--questions", "10", "--markdown", str(tmp_path / "table.md")])
    script.main()
    table = (tmp_path / "table.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    kl = {cells[1].strip(): float(cells[3]) for cells in (row.split("|") for row in table.splitlines()[2:])}
    assert kl["the original"] < kl["8-bit rounding"] < kl["4-bit rounding"] < kl["half removed, reap"]
