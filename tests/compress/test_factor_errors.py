"""What rounding factors in a shared basis would cost, against singular vectors and loops over tokens in float64."""

import numpy as np
import pytest
import torch
from tests.compress.test_output_errors import FAMILIES, IDS, reached, rounded_in

from coterie.compress.allocators import bitsmoe
from coterie.compress.allocators.expert_types import by_matrix
from coterie.compress.factor_errors import FactorErrors, rounded_rows, shared_basis
from coterie.compress.source import Source
from coterie.model.arch.load import load_model
from coterie.model.disk.encodings.ggml import get_type
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint

TYPES = ("Q8_0", "Q4_0")


def factors(matrices, *, down):
    """Return the shared basis (D, K) and each expert's factors (K, F), by singular vectors of all matrices together."""
    if down:
        basis = np.linalg.svd(np.concatenate(list(matrices), axis=1), full_matrices=False)[0]
    else:
        basis = np.linalg.svd(np.concatenate(list(matrices), axis=0), full_matrices=False)[2].T
    for k in range(basis.shape[1]):
        if basis[np.argmax(np.abs(basis[:, k])), k] < 0:
            basis[:, k] *= -1
    return basis, [basis.T @ each if down else (each @ basis).T for each in matrices]


def slow(experts, expert, part, kind, hidden, index, weight):
    """Return the cost of a type for one projection of one expert, token by token and direction by direction."""
    matrices = {"gate": experts.gate_EFD, "up": experts.up_EFD, "down": experts.down_EDF}[part].numpy()
    basis, of_experts = factors(matrices, down=part == "down")
    chosen = [(token, float(weight[token, slot])) for token, slot in (index == expert).nonzero().tolist()]
    inputs = {token: hidden[token].numpy() for token, _ in chosen}
    between = {token: experts.hidden(expert, hidden[token : token + 1])[0].numpy() for token, _ in chosen}
    rows, total = torch.tensor(of_experts[expert]), 0.0
    rounded = round_to_nearest(rows.float()[None], torch.ones(1, rows.shape[1]), get_type(kind))[1][0]
    for k, off in enumerate((rounded.double() - rows).numpy()):
        for token, gate in chosen:
            if part == "down":
                total += gate**2 * float(((off * between[token]) ** 2).sum())
            else:
                total += gate**2 * float((off**2).sum()) * float(basis[:, k] @ inputs[token]) ** 2
    return total


@pytest.mark.parametrize(
    "family", [name if name == "olmoe" else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_it_is_what_errors_of_factors_add_to_the_output_of_a_projection(family, tmp_path):
    folder = tiny_checkpoint(tmp_path / family, family, **FAMILIES[family])
    source, seen = Source.open(folder), reached(load_model(folder, dtype=torch.float32).double())
    with Stream(source.checkpoint) as stream:
        meter = FactorErrors(
            stream=stream, source=source, batches=list(IDS.split(2)), counts=[None] * 2, types=TYPES, groups=by_matrix
        )
        measured = {key: values for _, some in meter.measure() for key, values in some.items()}
    every = by_matrix(source.weights)
    assert measured.keys() == {group.key for group in every}
    for group in every[:: max(1, len(every) // 3)]:
        experts, hidden, index, weight = seen[group.layer]
        expert, parts = rounded_in(group)
        numbers = range(experts.num_experts) if expert is None else [expert]
        held = [part for part in parts if part != "gate" or experts.gate_EFD is not None]
        for kind in TYPES:
            cost = sum(slow(experts, e, part, kind, hidden, index, weight) for e in numbers for part in held)
            # A number between two codes falls to either side where directions differ in their last bits.
            assert measured[group.key][kind] == pytest.approx(cost, rel=0.02, abs=1e-12)
    assert any(values["Q4_0"] > 10 * values["Q8_0"] > 0 for values in measured.values())


@pytest.mark.parametrize("down", [False, True])
def test_the_shared_basis_is_that_of_all_matrices_together(down):
    shape = (3, 12, 5) if down else (3, 5, 12)
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    basis, expected = shared_basis(matrices, down=down), factors(matrices.double().numpy(), down=down)[0]
    assert torch.allclose(basis.double(), torch.tensor(expected), atol=1e-4)


def test_matrices_of_low_rank_leave_nothing_to_other_directions():
    """Experts that all see one direction alone: what any type costs there is all that it costs."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(12, generator=generator), dim=0)
    matrices = torch.randn(3, 5, 1, generator=generator) * direction
    factor = (matrices[1] @ shared_basis(matrices, down=False)).T
    assert factor[0].norm() == pytest.approx(float(matrices[1].norm()), rel=1e-5)
    assert factor[1:].abs().max() < 1e-5


@pytest.mark.parametrize("columns", [40, 256, 300])
def test_rows_are_rounded_each_by_itself(columns):
    rows = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e3], [1], [1e-3], [0]])
    for kind in bitsmoe.TYPES.types:
        together = rounded_rows(rows, kind)
        assert together.shape == rows.shape
        assert torch.equal(together, torch.cat([rounded_rows(row[None], kind) for row in rows]))
        if kind == "Q8_0":
            assert ((together - rows).abs() <= 0.006 * rows.abs().amax(dim=1, keepdim=True)).all()
