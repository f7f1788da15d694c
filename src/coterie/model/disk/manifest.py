"""The manifest of a checkpoint that Coterie wrote: what kind of result it is, and what became of every layer.

It lies beside the weights as ``coterie.json``. This file holds its one writer and its one reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, cast, get_args

from coterie.artifact import open_artifact, write_artifact
from coterie.errors import CorruptArtifact, StaleArtifact
from coterie.fields import Fields, plain_content, shown
from coterie.model.disk.provenance import Provenance

MANIFEST = "coterie.json"

#: Version 1 did not say `form` nor `parts`, and said how to load; it is still read.
VERSION = 2

#: How the rows of the router were made; "map" keeps those of the original.
RouterForm = Literal["plain", "mean", "refit", "map"]
KeptNeurons = Literal["all", "largest weights"]
CalibrationInputs = Literal["original", "compressed"]

_SAID_HOW_TO_LOAD = ("loads_with", "how_to_load")  # in version 1


class ResultForm(StrEnum):
    """What a result is on disk; all but a plain one take Coterie, or the code that is beside them, to load."""

    PLAIN = "plain"
    """A checkpoint of its family; loads anywhere."""
    MAPPED = "mapped"
    """The router keeps the original's rows and points them at fewer experts."""
    RAGGED = "ragged"
    """Every expert has a width of its own."""
    PACKED = "packed"
    """Weights are stored in an encoding of their own."""
    COMPRESSED_TENSORS = "compressed-tensors"
    """Weights are integers as compressed-tensors stores them, those of all experts alike; loads in transformers with
    that package, and in vLLM."""
    COMPRESSED_TENSORS_BY_LAYER = "compressed-tensors by layer"
    """The same, where experts of layers differ; loads in vLLM, while transformers takes them to be alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RaggedWidths:
    """How the tensors of a ragged result are filled up as they are read, see `coterie.model.disk.filled`.

    Attributes:
        width: the full width of an expert.
        axes: pattern of names, in which a star stands for the number of the expert -> the axis that the width runs
            along.

    Raises:
        ValueError: no width, or a pattern without a star.
    """

    width: int
    axes: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}: experts have a width from 1 on")
        for pattern, axis in self.axes.items():
            if pattern.split(".").count("*") != 1 or axis < 0:
                raise ValueError(f"axes[{pattern!r}] is {axis}: expected one star in the name, and an axis from 0 on")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEntry:
    """What became of one MoE layer.

    Attributes:
        index: position among the MoE layers.
        block: name of the block.
        num_experts_before: experts of the original, E.
        num_experts_after: experts of the result, M; parts where experts were cut.
        top_k_before: experts that a token chose.
        top_k_after: experts that a token chooses now.
        width_before: hidden neurons of each expert of the original.
        width_after: hidden neurons of each expert of the result; where they differ, the full width that is read.
        widths_after: hidden neurons of each expert of the result where they differ (M entries), else None.
        parts: into how many parts each expert was cut, 1 where it was not.
        expert_map: for each original expert the one that stands for it now (its first part, where experts were cut),
            -1 when it was dropped.
        centres: for each expert of the result the original one that it is centred on, or was cut from; None where
            experts are what they were.
        notes: what passes noted, by pass.

    Raises:
        ValueError: a count, a width or an expert's number that cannot be; the message begins with the field.
    """

    index: int
    block: str
    num_experts_before: int
    num_experts_after: int
    top_k_before: int
    top_k_after: int
    width_before: int
    width_after: int
    widths_after: tuple[int, ...] | None
    parts: int
    expert_map: tuple[int, ...]
    centres: tuple[int, ...] | None
    notes: Mapping[str, Any]

    def __post_init__(self) -> None:
        before, after = self.num_experts_before, self.num_experts_after
        for name in ("num_experts_before", "num_experts_after", "top_k_before", "top_k_after", "width_before",
                     "width_after", "parts"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it should be 1 or more")
        _check_numbers("expert_map", self.expert_map, length=before, least=-1, below=after)
        _check_numbers("centres", self.centres, length=after, least=0, below=before)
        _check_numbers("widths_after", self.widths_after, length=after, least=0, below=self.width_before + 1)
        if self.parts > 1 and (self.centres is None or self.width_after * self.parts > self.width_before):
            raise ValueError(
                f"parts is {self.parts}: that takes centres, and parts of width {self.width_after} in a "
                f"width of {self.width_before}"
            )

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {name: plain_content(getattr(self, name)) for name in self.__dataclass_fields__}


def _check_numbers(name: str, numbers: tuple[int, ...] | None, *, length: int, least: int, below: int) -> None:
    if numbers is None:
        return
    if len(numbers) != length:
        raise ValueError(f"{name} has {len(numbers)} entries: it should have {length}, one for each expert")
    for position, number in enumerate(numbers):
        if not least <= number < below:
            raise ValueError(f"{name}[{position}] is {number}: it should be from {least} to {below - 1}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionEntry:
    """What became of the prediction layers (MTP) of a model.

    Attributes:
        kept: whether they are in the result.
        layers: their names, and those of modules beside them.
        compressed: those that follow the last MoE layer; none where config.json stayed as it was.
        like: the name of that layer.
        experts: for each expert of theirs the one of the original that it is, or is a part of.
        width: hidden neurons of each.
        neurons: which those are: "all", or those with the "largest weights".
        factor: what outputs of experts are multiplied by, where these were cut into parts.
    """

    kept: bool
    layers: tuple[str, ...]
    compressed: tuple[str, ...] = ()
    like: str | None = None
    experts: tuple[int, ...] | None = None
    width: int | None = None
    neurons: KeptNeurons | None = None
    factor: float | None = None

    def content(self) -> dict[str, Any]:
        """Return it as JSON content, without what is not said."""
        entries = {name: plain_content(getattr(self, name)) for name in self.__dataclass_fields__}
        return {name: value for name, value in entries.items() if value is not None and value != []}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a result of Coterie is, how it was made, and what became of every layer.

    Attributes:
        form: what it is on disk.
        recipe: name of the recipe.
        passes: (name, options) of every pass.
        router: form of the router.
        plan: content of the plan that was carried out.
        model: name of the original's folder.
        domains: domains of the calibration text.
        calibration_tokens: tokens of it in all.
        calibration_inputs: what each layer received while it was measured.
        seq_len: tokens in a calibration sequence.
        seed: seed of everything random.
        logits_error: largest difference of logits, in flight against loaded again, relative to the largest logit; None
            until that was checked.
        ragged: how tensors are filled up, for a ragged result; else None.
        distilled: what training the result did; None where that was left out.
        prediction: what became of prediction layers (MTP); None where there are none.
        layers: what became of every MoE layer, in order.
        bytes_before: bytes of all tensors of the original, as they are read.
        bytes_after: bytes of all tensors of the result.
        left_out: why steps of the recipe on the whole result, or the check with transformers, were left out, by name.
        numerics: what it was computed with, see `coterie.model.numerics`: with another number of threads, device or
            version of torch the last bits may differ. Empty where an earlier version wrote it, as for `left_out`.
        provenance: what the card says beside all this.

    Raises:
        ValueError: the form contradicts the router or the widths, or layers are not in order; the message begins with
            the field.
    """

    form: ResultForm
    recipe: str
    passes: tuple[tuple[str, Mapping[str, Any]], ...]
    router: RouterForm
    plan: Mapping[str, Any]
    model: str
    domains: tuple[str, ...]
    calibration_tokens: int
    calibration_inputs: CalibrationInputs
    seq_len: int
    seed: int
    logits_error: float | None
    ragged: RaggedWidths | None
    distilled: Mapping[str, Any] | None
    layers: tuple[LayerEntry, ...]
    bytes_before: int
    bytes_after: int
    prediction: PredictionEntry | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, str | int] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        for form, holds in ((ResultForm.MAPPED, self.router == "map"), (ResultForm.RAGGED, self.ragged is not None)):
            if holds != (self.form is form):
                raise ValueError(
                    f"form is {self.form.value!r}: router is {self.router!r}, and ragged widths are "
                    f"{'given' if self.ragged else 'not given'}"
                )
        for position, layer in enumerate(self.layers):
            if layer.index != position:
                raise ValueError(f"layers[{position}].index is {layer.index}: it should be {position}")

    @property
    def loads_with(self) -> Literal["transformers", "vllm", "coterie"]:
        """Whose classes load it: those of transformers, of vLLM alone, or Coterie's, or the code beside the weights."""
        if self.form in (ResultForm.PLAIN, ResultForm.COMPRESSED_TENSORS):
            return "transformers"
        return "vllm" if self.form is ResultForm.COMPRESSED_TENSORS_BY_LAYER else "coterie"

    def how_to_load(self, folder: str | Path) -> str:
        """Return the Python expression that loads the result from a folder."""
        if self.loads_with == "vllm":
            return f"vllm.LLM({str(folder)!r})"
        if self.loads_with == "transformers":
            return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        return f"coterie.load_model({str(folder)!r})"

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        body: dict[str, Any] = {"version": VERSION}
        for name in self.__dataclass_fields__:
            body[name] = plain_content(getattr(self, name))
        if self.prediction is None:
            del body["prediction"]
        else:
            body["prediction"] = self.prediction.content()
        ragged = self.ragged
        body["ragged"] = None if ragged is None else {"width": ragged.width, "axes": dict(ragged.axes)}
        body["layers"] = [layer.content() for layer in self.layers]
        body["provenance"] = self.provenance.content()
        return body

    def write(self, folder: Path, inputs: Mapping[str, str]) -> None:
        """Write it beside the weights.

        Args:
            folder: the result.
            inputs: digest of everything that the result was made from, by name.

        Raises:
            OutOfSpace: the disk filled up.
        """
        write_artifact(folder / MANIFEST, kind="manifest", body=self.content(), inputs=inputs)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read the manifest of a checkpoint; None where Coterie did not write it.

        Raises:
            CorruptArtifact: it is damaged, or a field is missing, unknown, of another type or contradicts another one.
            StaleArtifact: a later version wrote it, or one before there were widths in it.
        """
        path = folder / MANIFEST
        return cls.read_file(path) if path.is_file() else None

    @classmethod
    def read_file(cls, path: Path) -> Manifest:
        """Read a manifest that must be there; see `read`."""
        body = open_artifact(path, kind="manifest").body
        return _manifest_of(Fields(_upgraded(body, path), where=str(path)))


def _upgraded(body: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the content as this version has it, of a manifest of version 1 or this version."""
    version = body.get("version", 1)
    if type(version) is not int or version < 1:
        raise CorruptArtifact(f"{path}: version is {shown(repr(version))}: it should be a whole number from 1 on")
    if version > VERSION:
        raise StaleArtifact(
            f"{path} has version {shown(version)}; this version of coterie reads up to {VERSION}: upgrade it"
        )
    if version == VERSION:
        return dict(body)
    layers = body.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "top_k_before" in layer for layer in layers):
        raise StaleArtifact(
            f"{path} is of an early version, which did not say how wide experts are and how many a token chooses; "
            "compress again, or remove the file where stock transformers loads the model"
        )
    upgraded = {name: value for name, value in body.items() if name not in _SAID_HOW_TO_LOAD}
    form = "mapped" if body.get("router") == "map" else "ragged" if body.get("ragged") is not None else "plain"
    upgraded["layers"] = [layer | {"parts": _parts_of(layer)} for layer in layers]
    return upgraded | {"version": VERSION, "form": form}


def _parts_of(layer: Mapping[str, Any]) -> int:
    """Return into how many parts the experts of a layer were cut, which version 1 only says between the lines."""
    before, after = layer.get("width_before"), layer.get("width_after")
    cut = "segment" in (layer.get("notes") or ()) or layer.get("top_k_before") != layer.get("top_k_after")
    whole = type(before) is int and type(after) is int and 0 < after < before
    return int(before) // int(after) if cut and whole and layer.get("centres") is not None else 1  # type: ignore[arg-type]


def _manifest_of(fields: Fields) -> Manifest:
    with fields.all_read():
        fields.whole("version")
        return Manifest(
            form=ResultForm(fields.text("form", tuple(ResultForm))),
            recipe=fields.text("recipe"),
            passes=fields.pairs("passes"),
            router=cast(RouterForm, fields.text("router", get_args(RouterForm))),
            plan=fields.content("plan"),
            model=fields.text("model"),
            domains=fields.texts("domains"),
            calibration_tokens=fields.whole("calibration_tokens"),
            calibration_inputs=cast(CalibrationInputs, fields.text("calibration_inputs", get_args(CalibrationInputs))),
            seq_len=fields.whole("seq_len"),
            seed=fields.whole("seed", least=None),
            logits_error=None if fields.null("logits_error") else fields.number("logits_error"),
            ragged=None if fields.null("ragged") else _ragged_of(fields.nested("ragged")),
            distilled=None if fields.null("distilled") else fields.content("distilled"),
            layers=tuple(_layer_of(layer) for layer in fields.each("layers")),
            bytes_before=fields.whole("bytes_before"),
            bytes_after=fields.whole("bytes_after"),
            prediction=_prediction_of(fields.nested("prediction")) if fields.said("prediction") else None,
            # Early versions say neither of the next two.
            left_out=(
                {name: str(value) for name, value in fields.texts_or_wholes_by_name("left_out").items()}
                if fields.said("left_out")
                else {}
            ),
            numerics=fields.texts_or_wholes_by_name("numerics") if fields.said("numerics") else {},
            provenance=(
                Provenance.from_fields(fields.nested("provenance")) if fields.said("provenance") else Provenance()
            ),
        )


def _ragged_of(fields: Fields) -> RaggedWidths:
    with fields.all_read():
        return RaggedWidths(width=fields.whole("width"), axes=fields.wholes_by_name("axes"))


def _prediction_of(fields: Fields) -> PredictionEntry:
    with fields.all_read():
        said = fields.said
        return PredictionEntry(
            kept=fields.yes_or_no("kept"),
            layers=fields.texts("layers") if said("layers") else (),
            compressed=fields.texts("compressed") if said("compressed") else (),
            like=fields.text("like") if said("like") else None,
            experts=fields.wholes("experts") if said("experts") else None,
            width=fields.whole("width") if said("width") else None,
            neurons=cast(KeptNeurons, fields.text("neurons", get_args(KeptNeurons))) if said("neurons") else None,
            factor=fields.number("factor") if said("factor") else None,
        )


def _layer_of(fields: Fields) -> LayerEntry:
    with fields.all_read():
        return LayerEntry(
            index=fields.whole("index"),
            block=fields.text("block"),
            num_experts_before=fields.whole("num_experts_before"),
            num_experts_after=fields.whole("num_experts_after"),
            top_k_before=fields.whole("top_k_before"),
            top_k_after=fields.whole("top_k_after"),
            width_before=fields.whole("width_before"),
            width_after=fields.whole("width_after"),
            widths_after=None if fields.null("widths_after") else fields.wholes("widths_after"),
            parts=fields.whole("parts"),
            expert_map=fields.wholes("expert_map", least=None),
            centres=None if fields.null("centres") else fields.wholes("centres"),
            notes=fields.content("notes"),
        )
