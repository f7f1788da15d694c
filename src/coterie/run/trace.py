"""What routers chose, token by token: recorded while a model runs, kept in a small file, and how alike tokens choose.

    coterie run MODEL PROMPT --save-trace trace.json
    coterie inspect MODEL --run --memory 6GiB --trace trace.json

How many experts of a cache are hits depends on what follows what, which no header says. `srp` and `sch` say how much
there is to be had ("Not All Models Suit Expert Offloading", arXiv 2505.16056); `coterie.run.replay.replay` says what
a policy makes of it.

Legend: T tokens, L MoE layers, K chosen experts at most, E experts of a layer, M tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.artifact import open_artifact, write_artifact
from coterie.errors import CorruptArtifact, InputError, StaleArtifact
from coterie.fields import Fields
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import installed, intercepted
from coterie.run.policies import Asked

if TYPE_CHECKING:
    from coterie.run.engine import Runtime

#: What a trace calls the text of a run that has no name.
TEXT = "text"


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """What was chosen.

    Attributes:
        model: digest of the checkpoint that chose.
        name: name of its folder, for people.
        layers: numbers of its MoE layers, ascending (L).
        num_experts: E of each of them (L).
        chosen: for each text by name what its tokens chose, int16 [T, L, K], where -1 stands for none.
    """

    model: str
    name: str
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    chosen: Mapping[str, NDArray[np.int16]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(chosen_TLK) for chosen_TLK in self.chosen.values())

    @property
    def most(self) -> int:
        """Experts of all layers."""
        return sum(self.num_experts)

    def joined(self) -> NDArray[np.int16]:
        """Return all texts, one after the other, [T, L, K]."""
        return np.concatenate(list(self.chosen.values()))

    def steps(self) -> list[Asked]:
        """Return it as policies replay it, token by token."""
        return self._entries([(text, start, start + 1) for text in self.chosen for start in range(self._length(text))])

    def run_steps(self, chunk: int) -> tuple[list[Asked], list[bool]]:
        """Return it as a run asks, the first half of each text as a prompt, and which entries are behind the prompt.

        Args:
            chunk: tokens of a prompt that pass the model at once; what a layer asks for is what any of them chose.
        """
        entries: list[Asked] = []
        behind: list[bool] = []
        step = 0
        for text in self.chosen:
            half = self._length(text) // 2
            parts = [(text, start, min(start + chunk, half)) for start in range(0, half, chunk)]
            answer = [(text, start, start + 1) for start in range(half, self._length(text))]
            for is_behind, each in ((False, parts), (True, answer)):
                entries += self._entries(each, step)
                behind += [is_behind] * (len(entries) - len(behind))
                step += half if not is_behind else self._length(text) - half
        return entries, behind

    def chunk_steps(self, chunk: int) -> list[Asked]:
        """Return it as a run asks that takes all of it for prompts, in chunks of so many tokens."""
        return self._entries(
            [
                (text, start, min(start + chunk, self._length(text)))
                for text in self.chosen
                for start in range(0, self._length(text), chunk)
            ]
        )

    def _length(self, text: str) -> int:
        return len(self.chosen[text])

    def _entries(self, parts: Sequence[tuple[str, int, int]], step: int = 0) -> list[Asked]:
        """Return what each layer is asked for by parts of texts (name, from, to), each of which is a pass."""
        entries = []
        for text, start, stop in parts:
            for place, layer in enumerate(self.layers):
                chosen_TK = self.chosen[text][start:stop, place]
                token_N, slot_N = np.nonzero(chosen_TK >= 0)
                experts, which_N = np.unique(chosen_TK[token_N, slot_N], return_inverse=True)
                tokens = None if stop - start == 1 else [token_N[which_N == n].tolist() for n in range(len(experts))]
                if len(experts):
                    entries.append(Asked(step, layer, experts.tolist(), tokens))
            step += stop - start
        return entries

    def save(self, path: Path) -> None:
        """Write it: a JSON file, and numbers beside it."""
        wide = max(self.num_experts, default=0) > np.iinfo(np.uint8).max
        kept = {
            name: torch.from_numpy(chosen_TLK.copy() if wide else (chosen_TLK + 1).astype(np.uint8))
            for name, chosen_TLK in self.chosen.items()
        }
        body = {
            "name": self.name, "layers": list(self.layers), "num_experts": list(self.num_experts),
            "tokens": {name: len(chosen_TLK) for name, chosen_TLK in self.chosen.items()},
        }  # fmt: skip
        write_artifact(path, kind="trace", body=body, inputs={"model": self.model}, tensors=kept)

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read one.

        Raises:
            CorruptArtifact: there is none, or it is damaged.
            StaleArtifact: a newer version wrote it.
        """
        artifact = open_artifact(path, kind="trace")
        fields = Fields(artifact.body, where=str(path))
        with fields.all_read():
            name = fields.text("name")
            layers, num_experts = fields.wholes("layers"), fields.wholes("num_experts", least=1)
            fields.ignore("tokens")
        if len(layers) != len(num_experts):
            raise CorruptArtifact(f"{path}: {len(layers)} layers, and experts of {len(num_experts)}; record it again")
        chosen = {}
        for text, tensor in artifact.tensors.items():
            shifted = tensor.dtype == torch.uint8
            if tensor.dtype not in (torch.uint8, torch.int16) or tensor.ndim != 3 or tensor.shape[1] != len(layers):
                raise CorruptArtifact(
                    f"{path}: {text} is {tensor.dtype} {list(tensor.shape)}, and not tokens x {len(layers)} layers x "
                    "experts; record it again"
                )
            chosen[text] = tensor.numpy().astype(np.int16) - int(shifted)
            above = chosen[text].max(axis=(0, 2), initial=-1) >= np.array(num_experts)
            if above.any() or chosen[text].min(initial=0) < -1:
                raise CorruptArtifact(f"{path}: {text} names experts that the model does not have; record it again")
        if not chosen:
            raise CorruptArtifact(f"{path}: holds no tokens; record it again")
        digest = str(artifact.inputs.get("model", ""))
        return cls(model=digest, name=name, layers=tuple(layers), num_experts=tuple(num_experts), chosen=chosen)


class Recorder:
    """Notes what tokens choose while a model runs; made by `recording`."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        """Begin with nothing."""
        self._layers = layers
        self._passes: dict[str, dict[int, list[Tensor]]] = {}
        self._text = TEXT

    def begin(self, text: str) -> None:
        """Say what the text is called that comes now."""
        self._text = text

    def note(self, layer: int, index_TK: Tensor) -> None:
        """Take what the tokens of a pass chose in a layer."""
        self._passes.setdefault(self._text, {}).setdefault(layer, []).append(index_TK.to("cpu", torch.int16))

    def trace(self, *, model: str, name: str) -> RoutingTrace:
        """Return what was noted.

        Args:
            model: digest of the checkpoint.
            name: name of its folder.

        Raises:
            InputError: no token passed, or not all layers.
        """
        if not self._passes:
            raise InputError("no token passed the model while it was to be recorded")
        chosen = {text: self._joined(passes) for text, passes in self._passes.items()}
        return RoutingTrace(
            model=model, name=name, layers=tuple(layer.index for layer in self._layers),
            num_experts=tuple(layer.num_experts for layer in self._layers), chosen=chosen,
        )  # fmt: skip

    def _joined(self, passes: Mapping[int, Sequence[Tensor]]) -> NDArray[np.int16]:
        columns = [torch.cat(list(passes.get(layer.index, ())) or [torch.empty(0, 1)]) for layer in self._layers]
        counts = {len(column) for column in columns}
        if len(counts) > 1:
            raise InputError(
                f"layers saw {min(counts)} to {max(counts)} tokens: tokens that skip layers cannot be recorded"
            )
        chosen_TLK = np.full((counts.pop(), len(columns), max(len(c[0]) for c in columns)), -1, dtype=np.int16)
        for place, (layer, column) in enumerate(zip(self._layers, columns, strict=True)):
            ids_TK = column.numpy().astype(np.int16)
            chosen_TLK[:, place, : ids_TK.shape[1]] = np.where(ids_TK < layer.num_experts, ids_TK, -1)
        return chosen_TLK


@contextmanager
def recording(model: PreTrainedModel, layers: Sequence[MoELayer]) -> Iterator[Recorder]:
    """Within the block, note what the experts of a model are asked for; it computes what it computed before.

    Args:
        model: with a function in the place of its experts, as a `Runtime` has, or with its own.
        layers: its MoE layers.
    """
    recorder = Recorder(layers)
    modules: dict[int, tuple[int, nn.Module]] = {}
    functions = {}
    for layer in layers:
        module = model.get_submodule(layer.experts)
        modules[id(module)] = (layer.index, module)
        functions[id(module)] = installed(module) or type(module).forward.__wrapped__  # type: ignore[attr-defined]

    def note(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        recorder.note(modules[id(module)][0], index_TK)
        output_TD: Tensor = functions[id(module)](module, hidden_TD, index_TK, weight_TK)
        return output_TD

    with intercepted(model, note):
        yield recorder


def record(runtime: Runtime, texts: Mapping[str, str], *, tokens: int) -> RoutingTrace:
    """Run text through a model and return what its tokens choose.

    Args:
        runtime: the model; its context is the most tokens of a text.
        texts: text by name.
        tokens: how many of each are taken, from its beginning.

    Raises:
        InputError: there is no text.
    """
    tokenizer: Any = runtime.tokenizer
    with recording(runtime.model, runtime.layers) as recorder, torch.no_grad():
        for name, text in texts.items():
            ids_1S = tokenizer(text, return_tensors="pt").input_ids[:, : min(tokens, runtime.context)]
            recorder.begin(name)
            if ids_1S.numel():
                runtime.model(ids_1S, logits_to_keep=1, use_cache=False)
    return recorder.trace(model=runtime.digest, name=runtime.path.name)


def check_trace_path(path: Path) -> None:
    """Raise InputError where a trace cannot be written: the name is no JSON file, or something else has it."""
    if path.suffix != ".json":
        raise InputError(f"{path}: a trace is a JSON file, with numbers beside it; give it a name that ends in .json")
    if path.exists():
        try:
            RoutingTrace.load(path)
        except (CorruptArtifact, StaleArtifact):
            raise InputError(f"{path} exists and is no trace; choose another name, or remove it") from None


def bundled_traces() -> dict[str, RoutingTrace]:
    """Return the traces of the three reference models that come with the package, by name; see reference/traces.py."""
    with as_file(files("coterie.run") / "traces") as folder:
        loaded = [RoutingTrace.load(file) for file in sorted(folder.glob("*.json"))]
    return {trace.name: trace for trace in loaded}


def mask_of(chosen_TK: NDArray[np.int16], num_experts: int) -> NDArray[np.bool_]:
    """Return which experts each token chose, [T, E], from one layer's choices, where -1 stands for none."""
    mask_TE = np.zeros((len(chosen_TK), num_experts + 1), dtype=bool)  # a column more, for none
    mask_TE[np.arange(len(chosen_TK))[:, None], chosen_TK] = True
    return mask_TE[:, :num_experts]


def srp(masks: Sequence[NDArray[np.bool_]], segment: int) -> float:
    """Return segment routing best performance: how well one set of experts can serve all tokens of a segment.

    For each expert, and each run of M tokens, f is how many of them choose it. Who keeps the experts with f of at least
    a threshold for a segment hits M x precision of what is kept, and misses the rest; the best F1 over all thresholds
    is the value, 1 where tokens of a segment choose the same.

    Args:
        masks: which experts each token chose, [T, E], of each layer that is taken together with others.
        segment: M, at most T.

    Raises:
        InputError: M is none of 1 to T.
    """
    if not 1 <= segment <= min(map(len, masks)):
        raise InputError(f"segments of {segment} tokens do not fit into {min(map(len, masks))} tokens")
    count_F = np.zeros(segment + 1, dtype=np.int64)
    for mask_TE in masks:
        sum_TE = np.concatenate([np.zeros((1, mask_TE.shape[1]), dtype=np.int64), mask_TE.cumsum(0, dtype=np.int64)])
        count_F += np.bincount((sum_TE[segment:] - sum_TE[:-segment]).ravel(), minlength=segment + 1)
    hits_F = (np.arange(segment + 1) * count_F)[::-1].cumsum()[::-1]
    kept_F = segment * count_F[::-1].cumsum()[::-1]
    return float((2 * hits_F[1:] / np.maximum(kept_F[1:] + hits_F[0], 1)).max())


def sch(mask_TE: NDArray[np.bool_], size: int, segment: int) -> float:
    """Return segment cache best hit rate: of a layer's cache that knows how often the next M tokens choose each expert.

    Where there is no room, the expert goes that the next M tokens choose least often, of several the one that was
    chosen longest ago; what the token under way chose stays.

    Args:
        mask_TE: which experts each token chose.
        size: experts that the cache holds, as many as a token chooses at least.
        segment: M.

    Raises:
        InputError: the cache holds less than a token chooses.
    """
    if size < mask_TE.sum(1).max(initial=0):
        raise InputError(f"a cache of {size} experts does not hold the {mask_TE.sum(1).max()} that a token chooses")
    num_tokens, num_experts = mask_TE.shape
    sum_TE = np.concatenate([np.zeros((1, num_experts), dtype=np.int64), mask_TE.cumsum(0, dtype=np.int64)])
    cached_E, last_E = np.zeros(num_experts, dtype=bool), np.full(num_experts, -1)
    hits = 0
    for token in range(num_tokens):
        wanted_E = mask_TE[token]
        hits += int((wanted_E & cached_E).sum())
        cached_E |= wanted_E
        last_E[wanted_E] = token
        over = int(cached_E.sum()) - size
        if over > 0:
            ahead_E = sum_TE[min(token + 1 + segment, num_tokens)] - sum_TE[token + 1]
            may_go = np.flatnonzero(cached_E & ~wanted_E)
            order = np.lexsort((last_E[may_go], ahead_E[may_go]))
            cached_E[may_go[order[:over]]] = False
    return hits / max(int(mask_TE.sum()), 1)
