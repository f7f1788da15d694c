"""The ways to meet a budget: fewer bits, fewer experts, or both, each with its bytes and what it is about to cost.

ways("model", "12GiB") reads headers alone, and goes by what other models lost (`coterie.compress.expected`).
With prices (`coterie.price`) types cost what was measured on this one. No torch here, unless there are prices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.amounts import parse_bytes
from coterie.compress.expected import MIXED, ONE_TYPE, expected_at
from coterie.compress.memory_budget import memory_budget, memory_budget_of
from coterie.compress.target import Reader
from coterie.compress.way import Sized, Way, Ways, as_it_is, mixed_way, single_way, with_fewer_experts
from coterie.compress.weights import one_type, smallest_types
from coterie.errors import UnsupportedDtype
from coterie.model.arch.inspect import Headers, Inspection, inspect_headers, read_headers
from coterie.model.arch.run_settings import Running
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES, bits_of
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.quantized import dequantized

if TYPE_CHECKING:
    from coterie.compress.prices import Prices


def ways(
    model: str | Path,
    budget: str | int,
    *,
    prices: Prices | str | Path | None = None,
    target: Reader = "gguf",
    running: Running | None = None,
    allow_pickle: bool = False,
) -> Ways:
    """List the ways to meet a budget, each with its bytes and what it is expected to cost.

    Args:
        model: a model folder or a hub id; only headers are read.
        budget: bytes that all tensors may take, as a number or like "12GiB".
        prices: what types cost on this model (`coterie.price`), or the folder of that. Without them costs are those of
            the bundled models in as many bytes.
        target: who is to read weights in fewer bits, "gguf" or "packed", see `coterie.compress.target.Target.reader`.
        running: how the result is to run in llama.cpp, where the budget is for the memory that this takes.
        allow_pickle: read the headers of weights that are stored as pickles.

    Raises:
        NotACheckpoint, CorruptCheckpoint, NotAMoE, ArchitectureMismatch: the model cannot be used.
        InputError: the budget is no amount of bytes.
        StaleArtifact: the prices are of another model.
        Infeasible: a run takes all of the budget, see `coterie.compress.memory_budget.memory_budget`.
    """
    if prices is not None:
        from coterie.compress.frontier import priced_ways

        memory = None if running is None else memory_budget(model, budget, running)
        limit = parse_bytes(budget) if memory is None else memory.weights
        return replace(priced_ways(model, prices, limit, target), memory=memory)
    headers = read_headers(Checkpoint.open(model, allow_pickle=allow_pickle, fetch="headers"))
    return ways_of(headers, parse_bytes(budget), target, running)


def inspect_with_ways(
    model: str | Path, budget: str | int, *, running: Running | None = None
) -> tuple[Inspection, Ways]:
    """Look into a model and list the ways to meet a budget, its headers read once; see `coterie.inspect`, `ways`."""
    limit = parse_bytes(budget)
    headers = read_headers(Checkpoint.open(model, fetch="headers"))
    listed = ways_of(headers, limit, running=running)
    return inspect_headers(headers, listed.limit), listed


def ways_of(headers: Headers, limit: int, target: Reader = "gguf", running: Running | None = None) -> Ways:
    """List the ways to meet a budget by headers alone; see `ways`."""
    checkpoint = headers.checkpoint
    manifest, refused = Manifest.read(checkpoint.path), None
    if manifest is not None and manifest.form is not ResultForm.PLAIN:
        refused = f"this is a {manifest.form} result; look at the model that it was made from"
    else:
        try:
            plain = dequantized(checkpoint)
        except UnsupportedDtype as error:
            refused = str(error)
    if refused is not None:
        size, most = checkpoint.num_bytes, max(layer.num_experts for layer in headers.moe_layers)
        return Ways(
            limit=limit, original_bytes=size, least_bytes=size, num_experts=most, ways=(), refused=refused
        )  # fmt: skip
    headers = headers if plain is checkpoint else read_headers(plain)
    memory = None if running is None else memory_budget_of(headers, limit, running)
    limit = limit if memory is None else memory.weights
    model = Sized.of(headers, target)
    return Ways(
        limit=limit, original_bytes=model.num_bytes({}), least_bytes=model.num_bytes(smallest_types(model.weights)),
        num_experts=model.num_experts,
        ways=as_it_is(model, limit) or (*_in_fewer_bits(model, limit), *with_fewer_experts(model, limit)),
        memory=memory,
    )  # fmt: skip


def _in_fewer_bits(model: Sized, limit: int) -> Iterator[Way]:
    """Yield one type for all, the largest that fits, and a type for each matrix where that can be better."""
    singles = {name: model.num_bytes(one_type(model.weights, name)) for name in SIZES if name not in OWN_TYPES}
    fitting = [name for name in sorted(singles, key=bits_of, reverse=True) if singles[name] <= limit]
    if fitting:
        name = max(fitting, key=lambda each: singles[each])
        yield single_way(model, name, singles[name], expected_at(ONE_TYPE, model.share(singles[name])))
    largest = max(singles.values())
    if model.num_bytes(smallest_types(model.weights)) <= limit < largest:
        yield mixed_way(model, limit, limit, expected_at(MIXED, model.share(limit)))
