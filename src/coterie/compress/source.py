"""The original, opened once in a run: its checkpoint, what it computes, and the names on both sides."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from coterie.compress.find_weights import find_weights
from coterie.compress.plan import Mtp
from coterie.compress.sizes import Sizing
from coterie.compress.target import Reader
from coterie.compress.weights import Weight, read_by
from coterie.errors import InputError, UnsupportedDtype
from coterie.model.arch.accounting import Accounting, LayerTensors, layer_tensors
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.head import with_head
from coterie.model.arch.idle import without_idle_biases
from coterie.model.arch.inspect import read_headers
from coterie.model.arch.layers import Architecture
from coterie.model.arch.prediction import Prediction, without_prediction
from coterie.model.disk.checkpoint import Checkpoint, Fetch
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.open import open_checkpoint


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that is compressed.

    Attributes:
        original: its files, as plain numbers.
        checkpoint: the same, without prediction layers where they are left out.
        mtp: what becomes of prediction layers; None where there are none.
        prediction: the prediction layers of `checkpoint`.
        dropped: names of the prediction layers that are left out.
        architecture: what it computes.
        conversion: between its names on disk and in memory.
        target: who is to read matrices in blocks, which decides how blocks may lie.
    """

    original: Checkpoint
    checkpoint: Checkpoint
    mtp: Mtp | None
    prediction: Prediction
    dropped: tuple[str, ...]
    architecture: Architecture
    conversion: WeightConversion
    target: Reader = "gguf"

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        output_dtype: str = "bfloat16",
        allow_pickle: bool = False,
        mtp: Mtp = "keep",
        fetch: Fetch = "weights",
        target: Reader = "gguf",
    ) -> Source:
        """Open a model folder or a hub id by its headers.

        Args:
            model: the model folder or the hub id.
            output_dtype: number format of what is stored quantised.
            allow_pickle: read weights that are stored as pickles.
            mtp: what becomes of prediction layers, if there are any.
            fetch: what of the weights of a hub id is fetched; "samples" is enough to plan.
            target: who is to read matrices in blocks, see `coterie.compress.target.Target`.

        Raises:
            NotACheckpoint, NotAMoE, CorruptCheckpoint, ArchitectureMismatch: the model cannot be used.
            InputError: it is a mapped or ragged result.
            UnsupportedDtype: its experts are stored in a format that cannot be compressed.
        """
        checkpoint = open_checkpoint(model, output_dtype=output_dtype, allow_pickle=allow_pickle, fetch=fetch)
        manifest = Manifest.read(checkpoint.path)
        if manifest is not None and manifest.form is not ResultForm.PLAIN:
            raise InputError(f"{checkpoint.path} is a {manifest.form} result; compress the model that it was made from")
        checkpoint = with_head(checkpoint)
        architecture = Architecture.of(checkpoint)
        conversion = WeightConversion(checkpoint, architecture.model)
        original = without_idle_biases(checkpoint, architecture.model, conversion)
        if original is not checkpoint:
            checkpoint, conversion = original, WeightConversion(original, architecture.model)
        prediction = Prediction.of(checkpoint, architecture, conversion)
        if prediction.names and mtp == "drop":
            checkpoint = replace(
                checkpoint,
                tensors={name: info for name, info in original.tensors.items() if name not in prediction.names},
                config=without_prediction(original.config, prediction.counts),
            )
            architecture = Architecture.of(checkpoint)
            conversion = WeightConversion(checkpoint, architecture.model)
        source = cls(
            original=original,
            checkpoint=checkpoint,
            mtp=mtp if prediction.names else None,
            prediction=prediction if mtp == "keep" else Prediction.of(checkpoint, architecture, conversion),
            dropped=prediction.layers if mtp == "drop" else (),
            architecture=architecture,
            conversion=conversion,
            target=target,
        )
        source.conversion.check_whole(architecture.model)
        source.check_dtypes()
        return source

    @cached_property
    def tensors(self) -> tuple[LayerTensors, ...]:
        """Names on disk of each layer's tensors that have an expert axis."""
        return layer_tensors(self.checkpoint, self.architecture.layers, self.conversion)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that can be stored in fewer bits."""
        weights = find_weights(self.checkpoint, self.architecture, self.conversion, self.tensors)
        return read_by(self.target, weights)

    def sizing(self, *, keeps_rows: bool) -> Sizing:
        """Return what says how many bytes a result takes; `keeps_rows` for a mapped one."""
        twins = len(self.prediction.twins)
        return Sizing(self.accounting, keeps_rows=keeps_rows, twins=twins, unused=self._unused)

    def _unused(self) -> int:
        """Return the parameters of prediction layers, which no token uses to be answered."""
        part_of = read_headers(self.checkpoint).part_of
        return sum(self.checkpoint.tensors[name].num_elements for name, part in part_of.items() if part == "unused")

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
