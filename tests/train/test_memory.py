"""How much memory training takes: said before, measured in a process of its own; it does not depend on the text."""

import os
import subprocess
import sys

import pytest
import torch

from coterie.model.arch.layers import Architecture
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_checkpoint
from coterie.train.memory import too_large, training_bytes, training_stage

CPU = torch.device("cpu")

#: Takes two steps of training a model towards what another predicts; says by how much the process grew, in bytes.
MEASURE = """
import sys
from pathlib import Path
import torch
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream.memory import peak_bytes
from coterie.train.distill import KEPT, MICRO, SEQUENCES, divergence_loss
from coterie.train.loop import Loop
from coterie.train.model import experts_apart, trainable
from coterie.train.optimiser import Adam
from coterie.train.predictions import PredictionFile, Predictions, writing_predictions
from coterie.train.schedule import Schedule, shuffled
folder, path, workers, seq_len = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
ids_BS = torch.randint(5, 60, (8, seq_len), generator=torch.Generator().manual_seed(0))
logits_BSV = torch.randn(1, seq_len, KEPT, generator=torch.Generator().manual_seed(0))
with writing_predictions(path, 8) as writer:
    for row in range(8):
        writer.put(row, Predictions.of(logits_BSV, KEPT))
layers = Architecture.of(open_checkpoint(folder)).layers
before = peak_bytes()
model = load_model(folder, dtype=torch.float32).requires_grad_(False)
weights = trainable(model, layers)
loop = Loop(
    weights, divergence_loss(model, ids_BS, PredictionFile(path)), optimiser=Adam(weights), micro=MICRO,
    workers=workers, schedule=Schedule(steps=2, rows=shuffled(8, SEQUENCES, 0), rate=lambda step: 0.01),
)
with experts_apart(model):
    loop.run()
print(peak_bytes() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some 9 million parameters, most of them experts'."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 3}
    return tiny_checkpoint(tmp_path_factory.mktemp("large") / "model", "olmoe", dtype=torch.bfloat16, **sizes)


SLOW = pytest.mark.slow  # each starts an interpreter


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "seq_len"), [pytest.param(1, 32, marks=SLOW), (2, 32), pytest.param(1, 512, marks=SLOW)]
)
def test_what_is_said_is_what_it_takes_at_most(large, tmp_path, workers, seq_len):
    command = [sys.executable, "-c", MEASURE, large, tmp_path / "p", str(workers), str(seq_len)]
    # Tensors of real models are so large that the C library gives them back at once; these are not, unless it is told.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    architecture = Architecture.of(open_checkpoint(large))
    lines = training_bytes(architecture.model, architecture.layers, seq_len=seq_len, workers=workers)
    said = sum(size for _, size in lines)
    slack = 32 * 2**20  # code of torch and transformers that is loaded only then
    assert 0.6 * said < int(done.stdout) < said + slack


def test_lines_by_hand(large):
    model, layers = (architecture := Architecture.of(open_checkpoint(large))).model, architecture.layers
    lines = dict(training_bytes(model, layers, seq_len=16, workers=8))
    trained = 3 * (32 * 3 * 128 * 256 + 32 * 128)
    assert lines["weights"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert lines["moments of the gradients"] == 8 * trained
    # Those of two parts of a step, and those of the layer that both threads are in, four times.
    assert lines["gradients"] == 4 * (2 * trained + 2 * 4 * trained / 3)
    one = dict(training_bytes(model, layers, seq_len=16, workers=1))
    assert one["gradients"] == 4 * (2 * trained + 4 * trained / 3)
    assert {what: size for what, size in one.items() if 2 * size != lines[what]} == {
        what: lines[what] for what in ("weights", "moments of the gradients")
    } | {"gradients": one["gradients"]}


def test_more_threads_than_parts_take_no_more(large):
    architecture = Architecture.of(open_checkpoint(large))
    two, many = (
        training_bytes(architecture.model, architecture.layers, seq_len=64, workers=workers) for workers in (2, 64)
    )
    assert two == many


def test_what_does_not_fit_has_a_reason_that_does_not_hang_on_the_moment(large, monkeypatch):
    architecture = Architecture.of(open_checkpoint(large))
    stage = training_stage(architecture.model, architecture.layers, seq_len=64, device=CPU)
    assert too_large(stage, limit=2**50) is None
    reason = too_large(stage, limit=2**20)
    assert reason.startswith("training the result as a whole takes at most")
    assert reason.endswith("of memory, more than --max-memory allowed")
    reasons = set()
    for free in (stage.num_bytes, stage.num_bytes - 1, 1):
        monkeypatch.setattr("coterie.model.stream.memory.free_bytes", lambda device, free=free: free)
        reasons.add(too_large(stage, limit=None))
    assert reasons == {None, reason.replace("--max-memory allowed", "was free")}
