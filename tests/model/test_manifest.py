"""The manifest: what is written comes back, and whatever is not one is refused with file and field."""

import json
import math
import re
from dataclasses import replace

import pytest

from coterie.artifact import read_artifact, write_artifact
from coterie.errors import CorruptArtifact, StaleArtifact
from coterie.model.disk.manifest import MANIFEST, VERSION, Manifest, PredictionEntry, RaggedWidths, ResultForm
from manifests import layer_entry, manifest_of

INPUTS = {"model": "a" * 64, "text": "b" * 64}


RAGGED = {
    "form": ResultForm.RAGGED,
    "ragged": RaggedWidths(width=12, axes={"layers.0.experts.*.up": 0, "layers.0.experts.*.down": 1}),
    "layers": (
        layer_entry(num_experts_after=4, widths_after=(0, 12, 3, 7), expert_map=(0, 1, 2, 3), centres=None),
    ),
}  # fmt: skip
CUT = {
    "layers": (layer_entry(num_experts_after=3, width_after=4, parts=3, expert_map=(0, -1, 2, -1), centres=(0, 0, 2)),)
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logits_error": None, "distilled": {"steps": 4, "rates": [0.1, 0.2], "taken": True}},
        {"form": ResultForm.MAPPED, "router": "map", "calibration_inputs": "compressed"},
        {"form": ResultForm.PACKED},
        RAGGED,
        CUT,
        {"prediction": PredictionEntry(kept=False, layers=("model.layers.4",))},
        {
            "prediction": PredictionEntry(
                kept=True,
                layers=("mtp", "mtp.0"),
                compressed=("mtp.0",),
                like="model.layers.3",
                experts=(0, 0, 2),
                width=8,
                neurons="largest weights",
                factor=3.0,
            )
        },
    ],
    ids=["plain", "distilled", "mapped", "packed", "ragged", "cut", "prediction dropped", "prediction compressed"],
)
def test_what_is_written_comes_back(tmp_path, changes):
    written = manifest_of(**changes)
    assert Manifest.read(tmp_path) is None
    written.write(tmp_path, INPUTS)
    assert Manifest.read(tmp_path) == written
    body, _ = read_artifact(tmp_path / MANIFEST, kind="manifest", inputs=INPUTS)
    assert body == written.content()
    assert (body["version"], body["form"]) == (VERSION, written.form.value)


def test_what_passes_note_becomes_plain_json(tmp_path):
    notes = {"refit": {"ridge": (0.5, math.nan, None), "error": math.inf}}
    manifest_of(layers=(layer_entry(notes=notes),)).write(tmp_path, INPUTS)
    assert "NaN" not in (tmp_path / MANIFEST).read_text()
    read = Manifest.read(tmp_path)
    assert read is not None
    assert read.layers[0].notes == {"refit": {"ridge": [0.5, None, None], "error": None}}


@pytest.mark.parametrize(
    ("changes", "loads_with", "how"),
    [
        ({}, "transformers", "transformers.AutoModelForCausalLM.from_pretrained('the folder')"),
        ({"form": ResultForm.MAPPED, "router": "map"}, "coterie", "coterie.load_model('the folder')"),
        (RAGGED, "coterie", "coterie.load_model('the folder')"),
    ],
)
def test_it_says_how_to_load(changes, loads_with, how):
    assert manifest_of(**changes).loads_with == loads_with
    assert manifest_of(**changes).how_to_load("the folder") == how


def changed(content, path, value):
    """Return JSON content with the value at a path such as ``layers.0.seed`` replaced; or left out, for ``...``."""
    *parents, last = path.split(".")
    inner = content = json.loads(json.dumps(content))
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    key = int(last) if last.isdigit() else last
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("recipe", ..., "recipe is missing"),
        ("layers.1.parts", ..., "layers[1].parts is missing"),
        ("ragged.width", ..., "ragged.width is missing"),
        ("surprise", 1, "surprise is 1: no such field"),
        ("layers.0.rank", [2], "layers[0].rank is [2]: no such field"),
        ("ragged.height", 2, "ragged.height is 2: no such field"),
        ("recipe", None, "recipe is None: should be a text"),
        ("form", "flat", "form is 'flat': should be plain or mapped or ragged or packed"),
        ("router", "mapped", "router is 'mapped': should be plain or mean"),
        ("calibration_inputs", "both", "calibration_inputs is 'both': should be original or compressed"),
        ("plan", [], "plan is []: should be an object"),
        ("passes.1", ["average"], "passes[1] is ['average']: should be a name and an object"),
        ("passes.1", ["average", {"x": math.nan}], "passes[1].x is nan: should be a finite number"),
        ("domains.0", 3, "domains[0] is 3: should be a text"),
        ("seed", 1.0, "seed is 1.0: should be a whole number"),
        ("seed", True, "seed is True: should be a whole number"),
        ("bytes_after", -1, "bytes_after is -1: should be a whole number from 0 on"),
        ("logits_error", math.nan, "logits_error is nan: should be a finite number"),
        ("logits_error", "0", "logits_error is '0': should be a finite number"),
        ("distilled", {"rates": [0.1, math.inf]}, "distilled.rates[1] is inf: should be a finite number"),
        ("layers", {}, "layers is {}: should be a list"),
        ("layers.1", [1], "layers[1] is [1]: should be an object"),
        ("layers.1.index", 0, "layers[1].index is 0: it should be 1"),
        ("layers.0.width_before", 0, "layers[0].width_before is 0: it should be 1 or more"),
        ("layers.0.expert_map.3", 4, "layers[0].expert_map[3] is 4: it should be from -1 to 3"),
        ("layers.0.expert_map.3", -2, "layers[0].expert_map[3] is -2: it should be from -1 to 3"),
        ("layers.0.expert_map.3", None, "layers[0].expert_map[3] is None: should be a whole number"),
        ("layers.0.expert_map", [0, 1], "layers[0].expert_map has 2 entries: it should have 4"),
        ("layers.1.centres", [0, 9], "layers[1].centres[1] is 9: it should be from 0 to 3"),
        ("layers.1.centres", [0], "layers[1].centres has 1 entries: it should have 2"),
        ("layers.0.widths_after.2", 13, "layers[0].widths_after[2] is 13: it should be from 0 to 12"),
        ("layers.0.widths_after", [1, 2], "layers[0].widths_after has 2 entries: it should have 4"),
        ("layers.1.parts", 5, "layers[1].parts is 5: that takes centres"),
        ("layers.0.notes", {"a": {"b": [math.nan]}}, "layers[0].notes.a.b[0] is nan: should be a finite number"),
        ("ragged", None, "form is 'ragged': router is 'plain', and ragged widths are not given"),
        ("form", "plain", "form is 'plain': router is 'plain', and ragged widths are given"),
        ("router", "map", "form is 'ragged': router is 'map'"),
        ("ragged.width", 0, "ragged.width is 0: experts have a width"),
        ("ragged.axes", {"layers.0.up": 0}, "ragged.axes['layers.0.up'] is 0: expected one star"),
        ("ragged.axes", {"a.*": -1}, "ragged.axes.a.* is -1: should be a whole number"),
        ("provenance", 3, "provenance is 3: should be an object"),
        ("provenance.model_id", 3, "provenance.model_id is 3: should be a text"),
        ("provenance.active_after", -1, "provenance.active_after is -1: should be a whole number from 0 on"),
        ("provenance.commands", "x", "provenance.commands is 'x': should be a list"),
        ("version", 0, "version is 0: it should be a whole number from 1 on"),
        ("version", "2", "version is '2': it should be a whole number from 1 on"),
        ("version", True, "version is True: it should be a whole number from 1 on"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused_with_file_and_field(tmp_path, path, value, message):
    layers = (*RAGGED["layers"], layer_entry(1))
    good = manifest_of(**RAGGED | {"layers": layers}).content()
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=good, inputs=INPUTS)
    assert Manifest.read(tmp_path) is not None
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=changed(good, path, value), inputs=INPUTS)
    with pytest.raises(CorruptArtifact, match=re.escape(f"{tmp_path / MANIFEST}: {message}")):
        Manifest.read(tmp_path)


def test_a_manifest_of_a_later_version_is_refused(tmp_path):
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=manifest_of().content() | {"version": 3}, inputs=INPUTS)
    with pytest.raises(StaleArtifact, match="has version 3; this version of coterie reads up to 2"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"form": ResultForm.MAPPED, "router": "map"},
        RAGGED,
        CUT | {"layers": (replace(CUT["layers"][0], notes={"segment": {}}),)},
        CUT | {"layers": (replace(CUT["layers"][0], top_k_after=3),)},
    ],
    ids=["plain", "mapped", "ragged", "cut", "cut, more chosen"],
)
def test_the_version_before_is_read(tmp_path, changes):
    expected = manifest_of(**changes)
    old = {name: value for name, value in expected.content().items() if name not in ("version", "form", "provenance")}
    for layer in old["layers"]:
        del layer["parts"]
    old |= {"loads_with": expected.loads_with, "how_to_load": expected.how_to_load("OUT")}
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=old, inputs=INPUTS)
    assert Manifest.read(tmp_path) == expected


def test_a_manifest_without_provenance_is_read(tmp_path):
    old = manifest_of().content()
    del old["provenance"]
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=old, inputs=INPUTS)
    assert Manifest.read(tmp_path) == manifest_of()


def test_early_manifests_are_refused_in_one_line(tmp_path):
    old = manifest_of().content()
    for layer in old["layers"]:
        for name in ("width_before", "width_after", "widths_after", "top_k_before", "top_k_after", "parts"):
            del layer[name]
    del old["version"], old["form"]
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=old, inputs=INPUTS)
    with pytest.raises(StaleArtifact, match=r"early version.*compress again") as refused:
        Manifest.read(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("body", [{"layers": 3}, {"layers": [3]}, {}])
def test_what_was_never_a_manifest_is_refused(tmp_path, body):
    write_artifact(tmp_path / MANIFEST, kind="manifest", body=body, inputs=INPUTS)
    with pytest.raises((CorruptArtifact, StaleArtifact), match=re.escape(str(tmp_path / MANIFEST))):
        Manifest.read(tmp_path)
