"""The original, opened once in a run: its checkpoint, what it computes, and the names on both sides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coterie.compress.sizes import Sizing
from coterie.errors import InputError, UnsupportedDtype
from coterie.model.arch.accounting import Accounting, LayerTensors, layer_tensors
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.open import open_checkpoint


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that is compressed.

    Attributes:
        checkpoint: its files, as plain numbers.
        architecture: what it computes.
        conversion: between its names on disk and in memory.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    conversion: WeightConversion

    @classmethod
    def open(cls, model: str | Path, *, output_dtype: str = "bfloat16", allow_pickle: bool = False) -> Source:
        """Open a model folder or a hub id by its headers.

        Raises:
            NotACheckpoint, NotAMoE, CorruptCheckpoint, ArchitectureMismatch: the model cannot be used.
            InputError: it is a mapped or ragged result.
            UnsupportedDtype: its experts are stored in a format that cannot be compressed.
        """
        checkpoint = open_checkpoint(model, output_dtype=output_dtype, allow_pickle=allow_pickle)
        manifest = Manifest.read(checkpoint.path)
        if manifest is not None and manifest.form is not ResultForm.PLAIN:
            raise InputError(f"{checkpoint.path} is a {manifest.form} result; compress the model that it was made from")
        architecture = Architecture.of(checkpoint)
        source = cls(
            checkpoint=checkpoint,
            architecture=architecture,
            conversion=WeightConversion(checkpoint, architecture.model),
        )
        source.conversion.check_whole(architecture.model)
        source.check_dtypes()
        return source

    @cached_property
    def tensors(self) -> tuple[LayerTensors, ...]:
        """Names on disk of each layer's tensors that have an expert axis."""
        return layer_tensors(self.checkpoint, self.architecture.layers, self.conversion)

    def sizing(self, *, keeps_rows: bool) -> Sizing:
        """Return what says how many bytes a result takes; `keeps_rows` for a mapped one."""
        return Sizing(self.accounting, keeps_rows=keeps_rows)

    @cached_property
    def accounting(self) -> Accounting:
        """What says how large results are."""
        return Accounting.of(self.checkpoint, self.architecture, self.conversion)

    def check_dtypes(self) -> None:
        """Raise UnsupportedDtype where experts or routers are stored in a format that cannot be compressed."""
        for names in self.tensors:
            for name in (*names.experts, *names.router):
                dtype = self.checkpoint.tensors[name].dtype
                if dtype not in TORCH_DTYPES:
                    raise UnsupportedDtype(
                        f"{self.checkpoint.path}: {name} is stored as {dtype}; experts in {', '.join(TORCH_DTYPES)} "
                        "can be compressed: convert the checkpoint first (transformers dequantizes on load)"
                    )

    def untouched_prefixes(self) -> tuple[str, ...]:
        """Return the names on disk, up to the layer number, of tensors that the model class has no place for."""
        places = self.architecture.model.state_dict().keys()
        prefixes = set()
        for disk_name, memory_name in self.conversion.memory_names.items():
            if memory_name not in places:
                match = re.match(r".*?\.\d+(?=\.)", disk_name)
                prefixes.add(match.group() if match else disk_name)
        return tuple(sorted(prefixes))
