"""Encodings: how a tensor is stored, one file each; sizes follow from shapes alone, without torch.

What an encoding can do is said by `coterie.model.disk.tensors.Encoding`. The JSON content that one gives of itself
(`config`) makes it again here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from coterie.errors import UnknownName
from coterie.model.disk.tensors import Encoding

#: Name of each encoding, as ``config()["encoding"]`` says it.
ENCODINGS = {
    "awq": "coterie.model.disk.encodings.awq:Awq",
    "gptq": "coterie.model.disk.encodings.gptq:Gptq",
    "plain": "coterie.model.disk.encodings.plain:Plain",
    "bit-planes": "coterie.model.disk.encodings.bit_planes:BitPlanes",
    "block-scaled": "coterie.model.disk.encodings.block_scaled:BlockScaled",
    "ggml": "coterie.model.disk.encodings.ggml_blocks:GgmlBlocks",
    "kernel-matrix": "coterie.model.disk.encodings.kernel_matrix:KernelMatrix",
    "mxfp4": "coterie.model.disk.encodings.mxfp4:Mxfp4",
    "packed-integers": "coterie.model.disk.encodings.packed_integers:PackedIntegers",
    "ragged": "coterie.model.disk.encodings.ragged:Ragged",
    "rearranged": "coterie.model.disk.encodings.rearranged:Rearranged",
    "shared-base": "coterie.model.disk.encodings.shared_base:SharedBase",
    "stacked": "coterie.model.disk.encodings.stacked:Stacked",
}

#: Options that are encodings themselves.
_NESTED = ("inner", "base", "factors")

#: ``quant_method`` of what Coterie writes.
OWN_METHOD = "coterie"


def encoding_from(config: Mapping[str, Any]) -> Encoding:
    """Make the encoding that gave this content of itself.

    Raises:
        UnknownName: no encoding has that name.
        ValueError: an option cannot be; TypeError: there is no such option.
    """
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    name = str(options.pop("encoding", ""))
    for option in _NESTED:
        if option in config:
            if not isinstance(config[option], Mapping):
                raise TypeError(f"{option} is {config[option]!r}: it should be an encoding")
            options[option] = encoding_from(config[option])
    if name not in ENCODINGS:
        raise UnknownName("encoding", name, ENCODINGS)
    home, _, attribute = ENCODINGS[name].partition(":")
    encoding: Encoding = getattr(import_module(home), attribute)(**options)
    return encoding


def quantization_config(encodings: Mapping[str, Encoding]) -> dict[str, Any]:
    """Return what config.json says of weights in encodings of their own; stock loaders refuse it by its method.

    Args:
        encodings: by name on disk, or by pattern with a star for one number in it.
    """
    by_content: dict[str, list[str]] = {}
    for pattern, encoding in encodings.items():
        by_content.setdefault(json.dumps(encoding.config(), sort_keys=True), []).append(pattern)
    groups = [{**json.loads(content), "tensors": sorted(patterns)} for content, patterns in by_content.items()]
    return {"quant_method": OWN_METHOD, "groups": groups}
