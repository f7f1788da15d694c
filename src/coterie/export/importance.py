"""What comes into each matrix of a model, summed up as llama.cpp's ``llama-imatrix`` does.

A matrix has the sum of squares of each of its inputs and the number of tokens; a stack of experts has both for each
expert, over the tokens that chose it. Which tensors that are, and what comes into them, follows from the places of the
model's tensors in a GGUF file (`coterie.export.layout`).

Facts are from llama.cpp's ``tools/imatrix/imatrix.cpp``: tensors of layers count, and not the head; experts are those
of the choice, without routing weights; keys and values that come from a latent vector (MLA) are two stacks there, a
matrix a head, of which the first multiplies queries, and the second what a head's attention makes of latent vectors.

Legend: T tokens (B sequences of S), C columns (inputs) of a matrix, N matrices of a stack, E experts, K chosen experts,
H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coterie.compress.moments import Watch, watching
from coterie.errors import ArchitectureMismatch, InputError
from coterie.export.layout import Layout
from coterie.export.tensors import Output, takes_numbers
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.gguf.names import layer_of
from coterie.model.stream.memory import Stage as MemoryStage
from coterie.model.stream.memory import batch_lines, text_lines, unit_lines
from coterie.model.stream.stream import Call, Stage, Stream
from coterie.model.stream.unit import Unit
from coterie.model.stream.work import UnitWork, unit_work
from coterie.profile.calibration import TokenSet
from coterie.profile.observation import proving
from coterie.progress import track

#: What is waited for.
MEASURING = "measuring inputs"

#: Names of lines of a forecast.
SUMS, HEADS = "sums of squares", "latent vectors by head"

#: Sequences of a batch.
BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a model's GGUF file that may be rounded, and what comes into it.

    Attributes:
        name: its name there.
        inputs: what comes in: what a linear module receives; what experts receive, and what they hand on from gate and
            up to down; queries, by head; latent vectors, by head as it attends to them.
        source: name in memory of the weight of the linear module that is watched, or of an expert.
        layer: the MoE layer, of experts.
        matrices: how many there are in the stack; 1 where it is none.
        columns: inputs of each.
    """

    name: str
    inputs: Literal["linear", "experts", "between", "queries", "latent"]
    source: str
    layer: MoELayer | None
    matrices: int
    columns: int

    @property
    def counts(self) -> int:
        """How many numbers of tokens it has: one for each expert, and one for anything else."""
        return self.matrices if self.layer is not None else 1


def entries_of(layout: Layout, stream: Stream, layers: Sequence[MoELayer]) -> list[Entry]:
    """Return the tensors that have an importance, in the order of the units that text passes.

    Args:
        layout: of the model's GGUF file.
        stream: the model.
        layers: its MoE layers.

    Raises:
        ArchitectureMismatch: a tensor that nothing is known to come into.
    """
    memory = stream.conversion.memory_names
    order = {name: unit.order for unit in stream.units for name in unit.names}
    sources = {output.name: memory[output.parts[0].source] for output in layout.outputs}
    entries = []
    for output in layout.outputs:
        if layer_of(output.name) is None or len(output.shape) < 2 or takes_numbers(output.name):
            continue
        source, part = sources[output.name], output.name.split(".", 2)[-1]
        layer, stacked = None, len(output.shape) == 3
        inputs: Literal["linear", "experts", "between", "queries", "latent"] = "linear"
        if part.endswith("_exps.weight"):
            layer = next((layer for layer in layers if source.startswith(f"{layer.experts}.")), None)
            inputs = "between" if part.startswith("ffn_down") else "experts"
        elif stacked:
            inputs = "queries" if output.parts[0].take.turned else "latent"
            if inputs == "queries":  # they are multiplied with keys' rows before these meet the latent vector
                source = _queries(output.name, sources)
        if stacked and inputs != "linear" and (layer is None) == part.endswith("_exps.weight"):
            raise ArchitectureMismatch(f"{source} is a stack of experts in none of the {len(layers)} MoE layers")
        entries.append(
            Entry(
                name=output.name, inputs=inputs, source=source, layer=layer, columns=output.shape[-1],
                matrices=output.shape[0] if stacked else 1,
            )
        )  # fmt: skip
    return sorted(entries, key=lambda entry: order[entry.source])


def _queries(name: str, sources: Mapping[str, str]) -> str:
    prefix = name.rpartition("attn_k_b")[0]
    [source] = [sources[each] for each in (f"{prefix}attn_q_b.weight", f"{prefix}attn_q.weight") if each in sources]
    return source


def files_tensors(entries: Sequence[Entry]) -> list[Output]:
    """Return the tensors of an importance matrix file: sums of squares (N, C) and counts, two of each entry."""
    tensors = []
    for entry in entries:
        shapes = {"in_sum2": (entry.matrices, entry.columns), "counts": (entry.counts, 1)}
        tensors += [
            Output(
                name=f"{entry.name}.{suffix}", shape=shape, type="F32", parts=(), copied=False, unpacked=False,
                block=1, block_bytes=4,
            )
            for suffix, shape in shapes.items()
        ]  # fmt: skip
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What is measured on which text.

    Attributes:
        stream: the model, not open.
        layers: its MoE layers.
        entries: what is measured, in the order of the units that text passes.
        token_set: the text.
    """

    stream: Stream
    layers: tuple[MoELayer, ...]
    entries: Sequence[Entry]
    token_set: TokenSet

    @classmethod
    def of(cls, stream: Stream, layers: tuple[MoELayer, ...], layout: Layout, token_set: TokenSet) -> Measurement:
        """Return the measurement of all tensors of a GGUF file that have an importance; see `entries_of`."""
        return cls(stream=stream, layers=layers, entries=entries_of(layout, stream, layers), token_set=token_set)

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, whether they count or not."""
        return sum(self.token_set.num_tokens.values())

    @property
    def chunks(self) -> int:
        """Sequences that are read."""
        return sum(len(rows) for rows in self.token_set.sequences.values())

    @property
    def work(self) -> UnitWork:
        """How long each unit is reckoned to take."""
        return unit_work(self.stream, self.layers, tokens=self.num_tokens, base=True)

    def memory(self, batch_size: int) -> MemoryStage:
        """Return what it takes, with batches of so many sequences."""
        seq_len, total = self.token_set.seq_len, self.num_tokens
        batch = batch_lines(self.stream, self.layers, batch_size=batch_size, seq_len=seq_len, tokens=total)
        # Those of one layer in float64, and one of them as it is written.
        sums = max(12 * sum(each.matrices * each.columns for each in self._of(unit)) for unit in self.stream.units)
        # What heads get of latent vectors in place of values, as it comes and squared; queries are no wider.
        heads = max((each.matrices * each.columns for each in self.entries if each.inputs == "latent"), default=0)
        lines = (
            *unit_lines(self.stream, batch), (SUMS, sums), (HEADS, 3 * 4 * heads * batch_size * seq_len),
            *text_lines(total),
        )  # fmt: skip
        return MemoryStage(name=MEASURING, lines=lines)

    def _of(self, unit: Unit) -> list[Entry]:
        return [entry for entry in self.entries if entry.source in unit.names]

    def run(self) -> Iterator[tuple[Entry, Tensor, Tensor]]:
        """Run text through the open stream; yield each entry with sums (N, C) float64 and counts (N or 1,) int64.

        Raises:
            ArchitectureMismatch: a layer does not compute what its canonical experts compute.
            InputError: sums that are no numbers.
        """
        stream, work, left = self.stream, self.work, list(self.entries)
        counts = [None if each is None else each.flatten() for each in self.token_set.batch_counts(BATCH)]
        run = stream.run([stream.base_job(ids_BS) for _, ids_BS in self.token_set.batches(BATCH)])
        for stage in track(run, MEASURING, work.total, weight=work.of, largest=work.largest):
            here = self._of(stage.unit)
            if not here:
                continue
            inside = tuple(layer for layer in self.layers if stage.unit.holds(layer.experts))
            if inside:
                with proving(stream.model, inside):
                    stage.calls[0].compute()
            sums = _Sums(entries=here)
            for call in stage.calls:
                _see(stream, stage, call, inside, sums, counts[call.job])
            for entry in here:
                total_NC, count_N = sums.of(entry)
                if not bool(total_NC.isfinite().all()):
                    raise InputError(f"{entry.name}: squares of its inputs sum up to no number; is the model damaged?")
                yield entry, total_NC, count_N
                left.remove(entry)
        if left:
            raise ArchitectureMismatch(f"text ran through the model without passing {left[0].source}")


def _see(
    stream: Stream, stage: Stage, call: Call, layers: Sequence[MoELayer], sums: _Sums, counts_T: Tensor | None
) -> None:
    """Compute one call of a unit and add what was seen; what is seen holds the unit's weights, and ends here."""
    module = stream.model.get_submodule(stage.unit.name)
    latent = [entry.source for entry in sums.entries if entry.inputs == "latent"]
    with (
        watching(stream.model, stage.unit.name, module, sums.linear, layers) as seen,
        _attending(stream.model, latent, seen) as attended,
    ):
        call.finish(call.compute(seen.stand_in))
    sums.add(seen, attended, stream.model, counts_T)


@contextmanager
def _attending(model: PreTrainedModel, sources: Sequence[str], seen: Watch) -> Iterator[dict[str, Tensor]]:
    """Within the block, heads attend once more, to latent vectors in place of the values made of them.

    Args:
        model: the model.
        sources: names in memory of the weights that make values of latent vectors.
        seen: where what these receive is kept.

    Yields:
        What each head gets, (T, H, C), by these names.
    """
    attended: dict[str, Tensor] = {}
    if not sources:
        yield attended
        return
    kind = str(model.config._attn_implementation)
    if (attend := ALL_ATTENTION_FUNCTIONS.get(kind)) is None:
        raise ArchitectureMismatch(f"heads attend by {kind!r}, which cannot be watched")
    owners = {id(model.get_submodule(source.removesuffix(".weight").rpartition(".")[0])): source for source in sources}

    def both(module: nn.Module, query: Tensor, key_BHSC: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = attend(module, query, key_BHSC, *args, **kwargs)
        if (source := owners.get(id(module))) is not None:
            batch, heads, length, _ = key_BHSC.shape
            latent_BHSC = seen.linear[source].reshape(batch, 1, length, -1).expand(-1, heads, -1, -1)
            attended_BSHC, _ = attend(module, query, key_BHSC, latent_BHSC, *args[1:], **kwargs)
            attended[source] = attended_BSHC.flatten(0, 1)
        return answer

    ALL_ATTENTION_FUNCTIONS[kind] = both
    try:
        yield attended
    finally:
        del ALL_ATTENTION_FUNCTIONS[kind]  # type: ignore[no-untyped-call]
        if ALL_ATTENTION_FUNCTIONS.get(kind) is not attend:  # it was replaced by somebody before
            ALL_ATTENTION_FUNCTIONS[kind] = attend


@dataclass(kw_only=True)
class _Sums:
    """Sums of one unit, by what comes in: two projections that receive the same share them."""

    entries: Sequence[Entry]

    def __post_init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    @property
    def linear(self) -> list[str]:
        """Names in memory of the weights of linear modules that are watched."""
        return sorted({entry.source for entry in self.entries if entry.layer is None})

    def of(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Return the sums and counts of an entry; zeros where no token came."""
        if (key := _key(entry)) not in self._sums:
            return torch.zeros(entry.matrices, entry.columns).double(), torch.zeros(entry.counts).long()
        total_NC, count_N = self._sums[key]
        return total_NC.cpu().expand(entry.matrices, entry.columns), count_N.cpu()

    @torch.no_grad()
    def add(self, seen: Watch, attended: Mapping[str, Tensor], model: PreTrainedModel, counts_T: Tensor | None) -> None:
        """Add a batch, of which some tokens count (bool); all where that is None."""
        done: set[tuple[str, str]] = set()
        for entry in self.entries:
            if (key := _key(entry)) in done:
                continue
            done.add(key)
            if entry.layer is not None and entry.layer.index in seen.experts:
                self._add(key, *_of_experts(entry, seen, counts_T))
            elif entry.layer is None and entry.source in seen.linear:
                input_THC = seen.linear[entry.source][:, None]
                if entry.inputs == "queries":
                    query_TR = model.get_submodule(entry.source.rpartition(".")[0])(seen.linear[entry.source])
                    input_THC = query_TR.unflatten(-1, (entry.matrices, -1))[..., : entry.columns]
                elif entry.inputs == "latent":
                    input_THC = attended[entry.source]
                input_THC = _counted(input_THC, counts_T)
                self._add(key, _squares(input_THC), torch.tensor([len(input_THC)]))

    def _add(self, key: tuple[str, str], square_NC: Tensor, count_N: Tensor) -> None:
        if key in self._sums:
            total_NC, total_N = self._sums[key]
            square_NC, count_N = total_NC + square_NC, total_N + count_N
        self._sums[key] = square_NC, count_N


def _key(entry: Entry) -> tuple[str, str]:
    return entry.inputs, entry.source if entry.layer is None else entry.layer.experts


def _of_experts(entry: Entry, seen: Watch, counts_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums (E, C) and counts (E,) of what comes into the experts of a layer."""
    assert entry.layer is not None
    experts, hidden_TD, index_TK, _ = seen.experts[entry.layer.index]
    hidden_TD, index_TK = _counted(hidden_TD, counts_T), _counted(index_TK, counts_T)
    sums_EC = torch.zeros(entry.matrices, entry.columns, dtype=torch.float64, device=hidden_TD.device)
    count_E = torch.zeros(entry.matrices, dtype=torch.int64)
    for expert in range(entry.matrices):
        input_TD = hidden_TD[(index_TK == expert).any(-1)]
        count_E[expert] = len(input_TD)
        if len(input_TD):
            sums_EC[expert] = _squares(experts.hidden(expert, input_TD) if entry.inputs == "between" else input_TD)
    return sums_EC, count_E


def _squares(input_TC: Tensor) -> Tensor:
    return input_TC.float().square().sum(0, dtype=torch.float64)


def _counted(value_TC: Tensor, counts_T: Tensor | None) -> Tensor:
    """Return the rows of tokens that count; all where rows are no tokens."""
    if counts_T is None or len(counts_T) != len(value_TC):
        return value_TC
    return value_TC[counts_T.to(value_TC.device)]
