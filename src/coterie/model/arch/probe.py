"""See what a meta model does when it is run on nothing: which experts are reached, how many a token chooses.

Legend: D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch, NotAMoE
from coterie.model.arch.seam import intercepted

log = logging.getLogger(__name__)

#: Configs whose probes are remembered.
_REMEMBERED = 16

#: What running whole meta models showed, by the text of their configs.
_probed: dict[str, dict[str, int]] = {}


def probe_top_k(model: PreTrainedModel, names: list[str], where: str, known_as: str) -> dict[str, int]:
    """Read K from the shape of the routing decisions that empty text leads to, by name of the experts modules it meets.

    Mostly a block can be run by itself, which takes no time. Where it cannot, or where a layer has several kinds of
    experts and text may not meet them all, the whole meta model is run: a tenth of a second a layer, so what that
    showed is kept under `known_as`, the text of the config.
    """
    if known_as in _probed:
        return dict(_probed[known_as])
    kinds = {re.sub(r"\d+", "#", name) for name in names}
    if len(kinds) == 1:
        try:
            return {name: run_on_nothing(model, [name], name.rpartition(".")[0])[name] for name in names}
        except Exception as error:  # whatever a family's block raises: it wants more than hidden states
            log.debug("%s: a block does not run by itself (%s); running the whole model", where, error)
    try:
        top_k_by_name = run_on_nothing(model, names, "")
    except ArchitectureMismatch:
        raise
    except Exception as error:  # whatever a family's model raises, the way out is the same
        raise ArchitectureMismatch(
            f"{where}: how many experts a token chooses cannot be seen, the meta model does not run "
            f"({type(error).__name__}: {str(error).strip()[:200]}); please report it"
        ) from error
    if not top_k_by_name:
        raise NotAMoE(f"{where}: text reaches none of its {len(names)} experts modules ({names[0]}, ...)")
    if len(_probed) >= _REMEMBERED:
        _probed.clear()
    _probed[known_as] = dict(top_k_by_name)
    return top_k_by_name


def run_on_nothing(model: PreTrainedModel, names: list[str], block: str) -> dict[str, int]:
    """Run a block, or the whole model for "", on nothing; return K by name of the experts modules that were called."""
    by_module = {id(model.get_submodule(name)): name for name in names}
    calls: list[tuple[str, int]] = []

    def probe(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        calls.append((by_module[id(module)], index_TK.shape[-1]))
        return torch.zeros_like(hidden_TD)

    with torch.no_grad(), intercepted(model, probe):
        if block:
            # Some experts work in a narrower space than the block that holds them.
            width = int(model.config.get_text_config(decoder=True).hidden_size)
            model.get_submodule(block)(torch.zeros(1, 2, width, device="meta"))
        else:
            # Fake tensors are what transformers takes for tracing: then it asks no mask for its values.
            with FakeTensorMode(allow_non_fake_inputs=True):
                model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="meta"), use_cache=False)
    top_k_by_name = dict(calls)
    if len(calls) != len(top_k_by_name) or (block and not top_k_by_name):
        raise ArchitectureMismatch(
            f"{block or 'the model'} called its experts {len(calls)} times for one input, expected {len(names)} "
            "modules once each"
        )
    # In the order of the model, whatever the order of the calls.
    return {name: top_k_by_name[name] for name in names if name in top_k_by_name}
