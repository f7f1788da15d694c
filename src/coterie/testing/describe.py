"""What each family is like, read off its tiny model: the rows of ``coterie families``.

Nothing is loaded and nothing is computed: the models are built empty from their tiny configs.

    python -m coterie.testing.describe            # what differs from families.json with the installed transformers
    python -m coterie.testing.describe --write    # write families.json anew
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from coterie.artifact import atomic_path
from coterie.errors import CoterieError, UnknownName
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.quiet import quiet
from coterie.progress import track
from coterie.testing.facts import FILE, FamilyFacts, FamilyTable, known_families
from coterie.testing.families import TINY, UNSUPPORTED, model_class, tiny_config


def describe_families(names: Iterable[str] = ()) -> FamilyTable:
    """Read facts of families off the installed transformers.

    A family that should work and does not is in the table with what went wrong.

    Args:
        names: keys of `coterie.testing.families.TINY`; all of them when there are none.

    Raises:
        UnknownName: no such family.
    """
    chosen = sorted(set(names)) or sorted(TINY)
    families = tuple(_describe_or_say(name) for name in track(chosen, "reading families", total=len(chosen)))
    return FamilyTable(transformers=transformers.__version__, families=families)


def _describe_or_say(model_type: str) -> FamilyFacts:
    try:
        return describe_family(model_type)
    except UnknownName:
        raise
    except CoterieError as error:
        facts = FamilyFacts(model_type=model_type, model_class=model_class(model_type).__name__)
        return replace(facts, problem="it should work, and does not", refusal=str(error))


def describe_family(model_type: str) -> FamilyFacts:
    """Return the facts of one family.

    Args:
        model_type: a key of `coterie.testing.families.TINY`.

    Raises:
        UnknownName: no such family.
        CoterieError: the family is not listed as unsupported, and yet Coterie cannot derive it.
    """
    stock = model_class(model_type)
    # As a file would give it: through JSON, with the class that it names.
    with quiet():
        config = json.loads(tiny_config(model_type).to_json_string(use_diff=False)) | {
            "architectures": [stock.__name__]
        }
    try:
        architecture = Architecture.from_config(config, where=f"the tiny {model_type}")
    except CoterieError as error:
        if model_type not in UNSUPPORTED:
            raise
        return FamilyFacts(
            model_type=model_type,
            model_class=stock.__name__,
            problem=UNSUPPORTED[model_type],
            refusal=str(error),
        )
    text_config: Any = architecture.model.config.get_text_config()
    kinds = getattr(text_config, "layer_types", None) or ()
    first = architecture.layers[0]
    moe = {layer.block.split(".layers.")[1].split(".")[0] for layer in architecture.layers}
    return FamilyFacts(
        model_type=model_type,
        model_class=stock.__name__,
        layers=tuple("moe" if str(index) in moe else "dense" for index in range(text_config.num_hidden_layers)),
        token_mixing=tuple(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else (),
        router=_router_features(architecture, first),
        experts=_experts_features(architecture.model.get_submodule(first.experts)),
        shared_experts=_has_shared(architecture, first),
    )


def _router_features(architecture: Architecture, layer: MoELayer) -> tuple[str, ...]:
    state = architecture.model.state_dict()
    shapes = [(state[name].ndim, state[name].shape[axis]) for name, axis in layer.router_tensors]
    features = {
        "vectors": any(state[name].squeeze().ndim == 1 for name, _ in layer.router_tensors),
        "groups": hasattr(architecture.model.config.get_text_config(), "n_group"),
        "spare rows": any(extent > layer.num_experts for _, extent in shapes),
    }
    return tuple(name for name, present in features.items() if present)


def _experts_features(module: nn.Module) -> tuple[str, ...]:
    features = {
        "no gate": not module.has_gate,
        "transposed": module.is_transposed,
        "interleaved": not module.is_concatenated,
        "bias": module.has_bias,
        "norm": getattr(module, "has_post_expert_norm", False),
    }
    return tuple(name for name, present in features.items() if present)


def _has_shared(architecture: Architecture, layer: MoELayer) -> bool:
    """Tell whether there are shared experts in the block or beside it."""
    parent = layer.block.rpartition(".")[0] if not layer.block.split(".")[-1].isdecimal() else layer.block
    return any("shared" in name for name, _ in architecture.model.get_submodule(parent).named_parameters())


def compare(recorded: FamilyTable, now: FamilyTable) -> tuple[str, ...]:
    """Return what differs between a table and a new one of some or all of its families, a sentence for each fact."""
    before = {family.model_type: family for family in recorded.families}
    sentences: list[str] = []
    for family in now.families:
        if family.model_type in before:
            sentences += before[family.model_type].differences(family)
        else:
            sentences.append(f"{family.model_type}: is not in the table")
    return tuple(sentences)


def write(table: FamilyTable, file: Path = FILE) -> None:
    """Write a table, one family a line."""
    content = table.content()
    lines = ",\n".join(json.dumps(family, ensure_ascii=False) for family in content["families"])
    with atomic_path(file) as temporary:
        text = f'{{"transformers": {json.dumps(table.transformers)}, "families": [\n{lines}\n]}}\n'
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the program; its exit code is 1 where something differs and is not written."""
    parser = argparse.ArgumentParser(description="Compare families.json with the installed transformers.")
    parser.add_argument("--write", action="store_true", help="write it anew")
    arguments = parser.parse_args()
    now = describe_families()
    if arguments.write:
        write(now)
        sys.exit(0)
    differences = compare(known_families(), now)
    sys.stdout.writelines(f"{sentence}\n" for sentence in differences)
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
