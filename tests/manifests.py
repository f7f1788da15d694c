"""Manifests made up for tests: a plain result of two layers, of whose four experts two are left."""

from typing import Any

from coterie.model.disk.manifest import LayerEntry, Manifest, ResultForm


def layer_entry(index: int = 0, **changes: Any) -> LayerEntry:
    fields: dict[str, Any] = {
        "index": index, "block": f"layers.{index}.mlp", "num_experts_before": 4, "num_experts_after": 2,
        "top_k_before": 2, "top_k_after": 2, "width_before": 12, "width_after": 12, "widths_after": None, "parts": 1,
        "expert_map": (0, 1, -1, 1), "centres": (0, 3), "notes": {"cluster": {"distance": 0.5}},
    }  # fmt: skip
    return LayerEntry(**fields | changes)


def manifest_of(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "form": ResultForm.PLAIN, "recipe": "mergemoe", "passes": (("cluster", {"rule": "x"}), ("average", {})),
        "router": "plain", "plan": {"layers": [{"num_experts": 2}]}, "model": "größe ☃", "domains": ("code", "prose"),
        "calibration_tokens": 800, "calibration_inputs": "original", "seq_len": 64, "seed": -3, "logits_error": 2e-7,
        "ragged": None, "distilled": None, "layers": (layer_entry(0), layer_entry(1)), "bytes_before": 100,
        "bytes_after": 60,
    }  # fmt: skip
    return Manifest(**fields | changes)
