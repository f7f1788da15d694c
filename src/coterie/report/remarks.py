"""What a reader of the table of results should know of single ones: prediction layers, and awkward shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coterie.model.arch.shapes import awkward_shapes
from coterie.model.disk.manifest import Manifest, PredictionEntry
from coterie.report.gather import Entry


def remarks(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for whatever is to be said, each once, with the names of the results that it is said of."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        if entry.result is not None:
            for sentence in _sentences(entry.result.manifest):
                names.setdefault(sentence, []).append(entry.label)
    return [f"{', '.join(dict.fromkeys(labels))}: {sentence}" for sentence, labels in names.items()]


def _sentences(manifest: Manifest) -> Iterator[str]:
    if manifest.prediction is not None:
        yield _prediction(manifest.prediction)
    if manifest.layers:
        layer = manifest.layers[0]
        narrower = layer.widths_after is None and layer.width_after != layer.width_before
        yield from awkward_shapes(layer.num_experts_after, layer.width_after if narrower else None)


def _prediction(prediction: PredictionEntry) -> str:
    names = ", ".join(prediction.layers)
    if not prediction.kept:
        return f"prediction layers (MTP) were left out: {names}"
    if not prediction.compressed:
        return f"prediction layers (MTP) were kept as they are: {names}"
    width = f", of width {prediction.width}" if prediction.neurons == "largest weights" else ""
    return (
        f"prediction layers (MTP) got what {prediction.like} got, {len(prediction.experts or ())} experts{width}: "
        f"{', '.join(prediction.compressed)}"
    )
