"""What a GGUF file of a checkpoint holds, decided and checked from its config and headers; no tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import InputError
from coterie.export.checks import check_config, heads_of, is_tied
from coterie.export.tensors import Output, plan_outputs
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.head import model_config
from coterie.model.arch.meta import meta_model, parse_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.gguf.families import Family, family_of
from coterie.model.disk.gguf.names import targets_of
from coterie.model.disk.manifest import Manifest, ResultForm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A GGUF file that is still to be written.

    Attributes:
        family: the family in llama.cpp.
        config: the model's config.
        manifest: what Coterie wrote beside the weights; None where it did not make them.
        outputs: the tensors of the file, in their order.
        left_out: tensors of the checkpoint that are not in it.
    """

    family: Family
    config: PreTrainedConfig
    manifest: Manifest | None
    outputs: Sequence[Output]
    left_out: tuple[str, ...]


def layout_of(checkpoint: Checkpoint, *, number_type: str) -> Layout:
    """Return what the file of a checkpoint holds.

    Args:
        checkpoint: as plain numbers.
        number_type: type of matrices of plain numbers, by its name in GGML.

    Raises:
        InputError: a family or a config that llama.cpp would compute otherwise, or is not known to compute rightly;
            tensors that have no place there; experts that differ in number or width.
        CorruptCheckpoint: tensors are missing, or contradict the config.
    """
    where = str(checkpoint.path)
    manifest = Manifest.read(checkpoint.path)
    if manifest is not None and manifest.form in (ResultForm.MAPPED, ResultForm.RAGGED):
        raise InputError(
            f"{where} cannot be exported: it is {manifest.form.value}, and llama.cpp has one router row and one width "
            "for every expert; compress with a recipe and a router whose result stock loaders load"
        )
    family = family_of(checkpoint.config, where)
    model = meta_model(model_config(checkpoint), where=where)
    config = parse_config(checkpoint.config)
    check_config(family, config, where)
    conversion = WeightConversion(checkpoint, model)
    conversion.check_whole(model)
    conversion.check_shapes(model)
    targets = targets_of(family, heads_of(config), config.num_hidden_layers, is_tied(config), checkpoint.tensors)
    outputs = plan_outputs(checkpoint.tensors, targets, number_type=number_type)
    _check_experts(outputs, family, config, where)
    left_out = tuple(sorted(name for name, there in targets.items() if not there))
    return Layout(family=family, config=config, manifest=manifest, outputs=outputs, left_out=left_out)


def _check_experts(outputs: Sequence[Output], family: Family, config: Any, where: str) -> None:
    """Check that every layer has as many experts as the config says, all of one width."""
    stacks: dict[str, tuple[int, ...]] = {}
    for output, projection in _stacks(outputs):
        shape = stacks.setdefault(projection, output.shape)
        if shape != output.shape:
            raise InputError(
                f"{where} cannot be exported: {output.name} is {list(output.shape)} and another layer's "
                f"{list(shape)}; llama.cpp has one number of experts and one width for all layers"
            )
    if not stacks:
        raise InputError(f"{where} cannot be exported: it has no experts under names that are known")
    for projection, shape in stacks.items():
        count = int(getattr(config, family.experts))
        if shape[0] != count:
            raise InputError(f"{where}: {projection} has {shape[0]} experts, and config.json says {count}")
        width, said = shape[2 if projection.startswith("ffn_down") else 1], int(getattr(config, family.expert_width))
        if width != said:
            raise InputError(f"{where}: {projection} has experts of width {width}, and config.json says {said}")


def _stacks(outputs: Sequence[Output]) -> Iterator[tuple[Output, str]]:
    for output in outputs:
        projection = output.name.split(".", 2)[-1]
        if projection.endswith("_exps.weight"):
            yield output, projection
