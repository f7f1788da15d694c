"""What a profile's files must say: the facts of each layer in the JSON, and the tensors of each layer's file.

Legend: E experts, D model width, G domains, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import CorruptArtifact
from coterie.fields import Fields, shown
from coterie.model.arch.layers import MoELayer
from coterie.profile.statistics import MATRICES, MAXIMA, STATISTICS, shape_of
from coterie.profile.sums import DIGITS, NUM_PLACES

#: Tensors of a sample that every profile has, and those that a model or an early version may not show.
_SAMPLE = frozenset({"inputs_TD", "index_TK", "weight_TK", "output_TD", "domain_T"})
_SAMPLE_IF_SHOWN = frozenset({"logits_TE", "block_TD", "priority_T"})

#: Dtypes, as safetensors names them.
_FLOATS, _WHOLE = frozenset({"F64", "F32", "F16", "BF16"}), frozenset({"I64"})

#: dtype as safetensors names it, and shape.
Header = Mapping[str, tuple[str, tuple[int, ...]]]


def layer_of(entry: Fields, position: int) -> MoELayer:
    """Read the facts of one layer; raises CorruptArtifact with the path of the field."""
    with entry.all_read():
        layer = MoELayer(
            index=entry.whole("index"),
            block=entry.text("block"),
            experts=entry.text("experts"),
            router=None if entry.null("router") else entry.text("router"),
            router_tensors=entry.named_wholes("router_tensors"),
            num_experts=entry.whole("num_experts", least=1),
            top_k=entry.whole("top_k", least=1),
            width=entry.whole("width", least=1),
            hidden_size=entry.whole("hidden_size", least=1),
            num_groups=entry.whole("num_groups", least=1),
        )
        if layer.index != position:
            raise ValueError(f"index is {layer.index}: it should be {position}")
        if layer.top_k > layer.num_experts:
            raise ValueError(f"top_k is {layer.top_k}: there are {layer.num_experts} experts")
        if layer.num_experts % layer.num_groups:
            raise ValueError(f"num_groups is {layer.num_groups}: it should divide {layer.num_experts} experts")
    return layer


def check_names(fields: Fields, field: str, names: Sequence[str]) -> None:
    """Refuse names of statistics that do not exist or come twice; raises CorruptArtifact with the field."""
    for position, name in enumerate(names):
        if name not in STATISTICS and name not in MATRICES:
            raise fields.wrong(f"{field}[{position}]", name, "no such statistic is known")
        if name in names[:position]:
            raise fields.wrong(f"{field}[{position}]", name, "it is there twice")


def check_layer_header(file: Path, header: Header, layer: MoELayer, num_domains: int) -> None:
    """Check which tensors a layer's file holds, their dtypes, and their shapes against the layer.

    Args:
        file: the file, for messages.
        header: (dtype, shape) of every tensor by name.
        layer: the layer that it belongs to.
        num_domains: G.

    Raises:
        CorruptArtifact: a tensor is unknown or missing, or of another dtype or shape.
    """
    samples = {name.removeprefix("sample."): entry for name, entry in header.items() if name.startswith("sample.")}
    for name in sorted(_SAMPLE - samples.keys()):
        raise CorruptArtifact(f"{file}: sample.{name} is missing; make the profile again")
    _check_sample(file, samples, layer)
    for name, (dtype, shape) in header.items():
        group, _, statistic = name.partition(".")
        if group == "sample":
            continue
        if group not in ("statistics", "digits", "place") or not (statistic in STATISTICS or statistic in MATRICES):
            raise CorruptArtifact(f"{file}: {shown(name)} is no tensor of a profile; make the profile again")
        expected_shape = shape_of(statistic, layer)
        if statistic in MATRICES:
            if group != "statistics":
                raise CorruptArtifact(f"{file}: {name} is a matrix, and no sum of digits; make the profile again")
            _expect(file, name, dtype, frozenset({"F32"}), shape, expected_shape)
            continue
        expected_shape = (num_domains, *expected_shape)
        if group == "statistics":
            _expect(file, name, dtype, frozenset({"F64"}), shape, expected_shape)
            continue
        other = f"place.{statistic}" if group == "digits" else f"digits.{statistic}"
        if other not in header or f"statistics.{statistic}" in header or statistic in MAXIMA:
            raise CorruptArtifact(f"{file}: {name} is no sum by itself; make the profile again")
        if group == "digits":
            _expect(file, name, dtype, frozenset({"F64"}), shape, (DIGITS, *expected_shape))
        else:
            _expect(file, name, dtype, frozenset({"U8"}), shape, expected_shape)


def _check_sample(file: Path, samples: Header, layer: MoELayer) -> None:
    num_tokens = samples["domain_T"][1][0] if samples["domain_T"][1] else 0
    num_chosen = samples["index_TK"][1][-1] if samples["index_TK"][1] else 0
    block_size = samples["block_TD"][1][-1] if "block_TD" in samples and samples["block_TD"][1] else 0
    token_shapes = {
        "inputs_TD": (layer.hidden_size,),
        "output_TD": (layer.hidden_size,),
        "block_TD": (block_size,),
        "index_TK": (num_chosen,),
        "weight_TK": (num_chosen,),
        "logits_TE": (layer.num_experts,),
        "domain_T": (),
        "priority_T": (),
    }
    for name, (dtype, shape) in samples.items():
        if name not in _SAMPLE | _SAMPLE_IF_SHOWN:
            raise CorruptArtifact(
                f"{file}: {shown(f'sample.{name}')} is no tensor of a profile; make the profile again"
            )
        dtypes = _WHOLE if name in ("index_TK", "domain_T", "priority_T") else _FLOATS
        _expect(file, f"sample.{name}", dtype, dtypes, shape, (num_tokens, *token_shapes[name]))


def _expect(
    file: Path, name: str, dtype: str, dtypes: frozenset[str], shape: tuple[int, ...], expected_shape: tuple[int, ...]
) -> None:
    """Check one tensor: it has one of some dtypes, and a shape."""
    if dtype not in dtypes:
        should = f"{' or '.join(sorted(dtypes))} of shape {list(expected_shape)}"
    elif shape != expected_shape:
        should = f"of shape {list(expected_shape)}"
    else:
        return
    raise CorruptArtifact(
        f"{file}: {name} is {dtype} of shape {list(shape)}: it should be {should}; make the profile again"
    )


def check_statistic(file: Path, name: str, tensor: Tensor) -> None:
    """Refuse numbers that are none; raises CorruptArtifact.

    Args:
        file: the file, for the message.
        name: name of the tensor in it.
        tensor: what it holds.
    """
    if tensor.numel() == 0:
        return
    least, largest = tensor.aminmax()
    if name.startswith("place."):
        if int(largest) >= NUM_PLACES:
            raise CorruptArtifact(f"{file}: {name} holds {int(largest)}: places are below {NUM_PLACES}")
    elif not (least.isfinite() and largest.isfinite()):
        at = tuple((~tensor.isfinite()).nonzero()[0].tolist())
        raise CorruptArtifact(
            f"{file}: {name}{list(at)} is {float(tensor[at])}, no number: the model computes such values, or the file "
            "is damaged; look for NaN in the model's weights, and make the profile again"
        )


def check_sample(file: Path, sample: Mapping[str, Tensor], layer: MoELayer, num_domains: int) -> None:
    """Check the whole numbers of a sample: experts from 0 to E, E for none, and domains from 0 to G - 1.

    Raises:
        CorruptArtifact: one of them cannot be.
    """
    for name, below in (("index_TK", layer.num_experts + 1), ("domain_T", num_domains), ("priority_T", 2**63)):
        if name not in sample or sample[name].numel() == 0:
            continue
        least, largest = (int(end) for end in torch.aminmax(sample[name]))
        if least < 0 or largest >= below:
            wrong = least if least < 0 else largest
            raise CorruptArtifact(f"{file}: sample.{name} holds {wrong}: it should be from 0 to {below - 1}")
