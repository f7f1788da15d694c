"""What lets stock transformers load a result that its classes cannot: code beside the weights, named in config.json.

The code is `coterie.publish.modeling_coterie`, byte for byte: it needs no Coterie, and runs for those who say
``trust_remote_code=True``. Coterie itself never runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from coterie.artifact import atomic_path
from coterie.model.disk.beside import MODELING_FILE

_CLASS = f"{Path(MODELING_FILE).stem}.CoterieModel"

#: The auto classes that load language models, and what says which families they know.
_AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}


def auto_map(config: Mapping[str, Any], family: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the ``auto_map`` of a result that stock classes cannot load.

    Models of text alone are asked for in every family, others where the family has them. What the original's config
    names for anything else, such as a processor, stays.

    Args:
        config: the content of the original's config.json.
        family: the class of its config in transformers.
    """
    own = {
        name: _CLASS
        for name, mapping in _AUTO_CLASSES.items()
        if name == "AutoModelForCausalLM" or family in getattr(modeling_auto, mapping)
    }
    replaced = replaced_code(config)
    return {name: code for name, code in _named(config).items() if name not in replaced} | own


def replaced_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the code that the original's config names for its config and model, by auto class.

    A result has code of ours in its place: classes of transformers, which it is loaded with, need no other config.
    """
    return {name: code for name, code in _named(config).items() if name.startswith(("AutoConfig", "AutoModel"))}


def _named(config: Mapping[str, Any]) -> Mapping[str, Any]:
    named = config.get("auto_map")
    return named if isinstance(named, Mapping) else {}


def write_modeling_file(folder: Path) -> None:
    """Write the code into the folder of a result.

    Raises:
        OutOfSpace: the disk filled up.
    """
    content = (files("coterie.publish") / MODELING_FILE).read_bytes()
    with atomic_path(folder / MODELING_FILE) as temporary:
        temporary.write_bytes(content)
