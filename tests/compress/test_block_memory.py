"""How much memory training a result in blocks takes: said before from headers, measured in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from coterie import compress
from coterie.compress.block_model import block_sizes
from coterie.compress.decide import plan
from coterie.compress.pack import packed_names
from coterie.compress.shards import lay_out
from coterie.compress.source import Source
from coterie.compress.target import Target
from coterie.model.stream.memory import FIXED_BYTES
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint, tiny_text
from coterie.train.memory import block_training_stages

#: Reads a result in blocks and takes two steps; says by how much the process grew, in bytes.
MEASURE = """
import sys
from pathlib import Path
import torch
from coterie.compress.block_model import BlockModel
from coterie.compress.pack import packed_names
from coterie.compress.plan import Plan
from coterie.compress.result_model import ResultModel
from coterie.compress.shards import lay_out
from coterie.compress.source import Source
from coterie.compress.target import Target
from coterie.model.stream.memory import peak_bytes
from coterie.model.stream.stream import Stream
from coterie.train.distill import KEPT, MICRO, SEQUENCES, divergence_loss
from coterie.train.loop import Loop
from coterie.train.optimiser import Adam
from coterie.train.predictions import PredictionFile, Predictions, writing_predictions
from coterie.train.schedule import Schedule, shuffled
folder, result, made_as, path, seq_len = *map(Path, sys.argv[1:5]), int(sys.argv[5])
ids_BS = torch.randint(5, 60, (8, seq_len), generator=torch.Generator().manual_seed(0))
logits_BSV = torch.randn(1, seq_len, KEPT, generator=torch.Generator().manual_seed(0))
with writing_predictions(path, 8) as writer:
    for row in range(8):
        writer.put(row, Predictions.of(logits_BSV, KEPT))
source = Source.open(folder)
stream, plan = Stream(source.checkpoint), Plan.load(made_as)
shards = lay_out(source.checkpoint, stream.units, stream.conversion, packed_names(source, plan))
before = peak_bytes()
blocks = BlockModel(
    folder=result, shards=shards, source=source, stream=stream, plan=plan, result=ResultModel(stream, source, plan)
)
loop = Loop(
    blocks.weights, divergence_loss(blocks.model, ids_BS, PredictionFile(path)), optimiser=Adam(blocks.weights),
    micro=MICRO, schedule=Schedule(steps=2, rows=shuffled(8, SEQUENCES, 0), rate=lambda step: 0.01),
)
with blocks.computing():
    loop.run()
print(peak_bytes() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some 9 million parameters, most of them experts'."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 3}
    return tiny_checkpoint(tmp_path_factory.mktemp("large") / "model", "olmoe", dtype=torch.bfloat16, **sizes)


def said(folder, planned, *, seq_len):
    source = Source.open(folder)
    stream = Stream(source.checkpoint)
    shards = lay_out(source.checkpoint, stream.units, stream.conversion, packed_names(source, planned))
    sizes = block_sizes(source, stream, planned, shards)
    return sizes, block_training_stages(sizes, stream.model, seq_len=seq_len, device=torch.device("cpu"))


def test_sizes_by_hand(large):
    sizes, (reading, training) = said(large, plan(large, type="Q4_K", recipe="nearest"), seq_len=16)
    experts, attention, vocabulary = 3 * 32 * 128 * 256, 2 * 128 * 128 + 2 * 64 * 128, 272 * 128
    assert sizes.largest_layer == experts
    assert (sizes.outer, sizes.largest_outer) == (3 * attention + 2 * vocabulary, vocabulary)
    wide = experts  # of three layers the down projections alone have rows of 256
    assert sizes.scales == 2 * wide // 256 + (2 * experts + sizes.outer) // 32
    assert sizes.trained_plain == 3 * (32 * 128 + 2 * 128 + 128 + 64) + 128  # routers, norms of layers, q and k; last
    assert sizes.plain == sizes.trained_plain
    assert dict(training.lines)["moments of the gradients"] == 8 * (sizes.scales + sizes.trained_plain)
    assert dict(reading.lines)["weights"] == sizes.stored_bytes + 4 * (sizes.plain + sizes.scales)


def test_types_that_are_yet_to_be_chosen_have_as_many_scales_at_most(large):
    source = Source.open(large)
    stream = Stream(source.checkpoint)
    planned = plan(large, bits=4.5, recipe="coterie-bits")
    shards = lay_out(source.checkpoint, stream.units, stream.conversion, packed_names(source, planned))
    bound = block_sizes(source, stream, planned, shards, target=Target(bits=4.5))
    for kind in ("Q4_0", "Q4_K", "Q3_K"):
        one = block_sizes(source, stream, plan(large, type=kind, recipe="nearest"), shards)
        assert one.scales <= bound.scales


@pytest.mark.long
@pytest.mark.parametrize("seq_len", [32, pytest.param(512, marks=pytest.mark.slow)])
def test_what_is_said_is_what_it_takes_at_most(large, tmp_path, seq_len):
    text = tiny_text(tmp_path / "text", documents=4)
    result = compress(large, tmp_path / "out", type="Q4_0", recipe="nearest", text=text, tokens=128, seq_len=32)
    made_as = plan(large, type="Q4_0", recipe="nearest").save(tmp_path / "plan.json")
    command = [sys.executable, "-c", MEASURE, large, result.out, made_as, tmp_path / "p", str(seq_len)]
    # Tensors of real models are so large that the C library gives them back at once; these are not, unless it is told.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    most = max(stage.num_bytes for stage in said(large, result.plan, seq_len=seq_len)[1]) - FIXED_BYTES
    slack = 32 * 2**20  # code of torch and transformers that is loaded only then
    assert 0.5 * most < int(done.stdout) < most + slack
