"""Experts of a real checkpoint, read as the runtime reads them and as everybody does."""

import re
from collections import defaultdict

import pytest
import torch

from checkpoints import tensors_of
from coterie.model.disk.checkpoint import Checkpoint
from coterie.run.arena import Arena
from coterie.run.reader import Reader
from coterie.run.records import Piece, Record, slot_bytes
from coterie.run.residency import Residency
from coterie.testing import tiny_checkpoint


@pytest.mark.parametrize("direct", [True, False])
def test_the_matrices_of_every_expert_arrive(tmp_path, direct):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    names = defaultdict(list)
    for name in Checkpoint.open(folder).tensors:
        if match := re.search(r"layers\.(\d+)\..*experts\.(\d+)\.", name):
            names[int(match[1]), int(match[2])].append(name)
    tensors = Checkpoint.open(folder).tensors
    infos = {key: [tensors[name] for name in each] for key, each in names.items()}
    records = {
        key: Record(
            pieces=tuple(Piece(file=folder / info.shard, begin=info.begin, num_bytes=info.num_bytes) for info in each)
        )
        for key, each in infos.items()
    }
    assert {len(record.pieces) for record in records.values()} == {3}
    expected = tensors_of(folder)
    with Residency(Arena(3, slot_bytes(records.values())), Reader(direct=direct), records) as residency:
        for layer, expert in records:
            with residency.acquire(layer, [expert]) as leases:
                lease = leases[expert]
                for number, info in enumerate(infos[layer, expert]):
                    original = expected[info.name]
                    matrix = lease.piece(number).view(original.dtype).view(original.shape)
                    assert torch.equal(matrix, original)
                    assert matrix.data_ptr() == lease.data.data_ptr() + lease.offsets[number], "no copy"
    assert residency.counters.misses == len(records)
