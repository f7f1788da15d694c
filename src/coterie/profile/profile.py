"""The Profile: what a model's experts did on text. An artefact that plans and recipes read.

Legend: E experts, D model width, F expert width, T tokens, K chosen experts, G domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.artifact import read_artifact, write_artifact
from coterie.errors import StaleArtifact, UnknownName
from coterie.model.layers import MoELayer

FILE = "profile.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A bounded, seeded sample of one layer's tokens; the same token positions in every layer.

    Attributes:
        inputs_TD: what the block's experts received.
        index_TK: chosen experts.
        weight_TK: routing weights that the model really applied.
        logits_TE: router scores of all experts as the model recorded them, or None when it records none.
        output_TD: routed output (without shared experts).
        domain_T: domain of each token, as an index into the profile's domains.
    """

    inputs_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor | None
    output_TD: Tensor
    domain_T: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by field name."""
        return {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Statistics of every MoE layer, the token sample, and what they were made from.

    Attributes:
        model_digest: digest of the checkpoint.
        text_digest: digest of the tokens.
        domains: domain names.
        num_tokens: tokens of each domain.
        seq_len: tokens in a sequence.
        seed: seed of the draw of text and sample.
        layers: the MoE layers, in order.
        statistics: for each layer, statistic name -> sums by domain (G, ...), float64. All are sums over tokens, so
            the profiles of two halves of a text add up to the profile of the whole.
        samples: for each layer, its token sample.
    """

    model_digest: str
    text_digest: str
    domains: tuple[str, ...]
    num_tokens: tuple[int, ...]
    seq_len: int
    seed: int
    layers: tuple[MoELayer, ...]
    statistics: tuple[Mapping[str, Tensor], ...]
    samples: tuple[Sample, ...]

    def sum(self, layer: int, name: str) -> Tensor:
        """Return one statistic of one layer summed over all domains, float64.

        Raises:
            UnknownName: the profile does not hold that statistic.
        """
        return self.by_domain(layer, name).sum(0)

    def by_domain(self, layer: int, name: str) -> Tensor:
        """Return one statistic of one layer with its domain axis first, float64; raises UnknownName."""
        held = self.statistics[layer]
        if name not in held:
            raise UnknownName("statistic", name, held)
        return held[name]

    def merge(self, other: Profile) -> Profile:
        """Add the profile of other text through the same model: sums add up, samples are joined.

        Raises:
            StaleArtifact: the profiles are of different models or domains.
        """
        if (self.model_digest, self.domains, self.layers) != (other.model_digest, other.domains, other.layers):
            raise StaleArtifact("profiles of different models or domains cannot be added")
        return Profile(
            model_digest=self.model_digest,
            text_digest=f"{self.text_digest}+{other.text_digest}",
            domains=self.domains,
            num_tokens=tuple(a + b for a, b in zip(self.num_tokens, other.num_tokens, strict=True)),
            seq_len=self.seq_len,
            seed=self.seed,
            layers=self.layers,
            statistics=tuple(
                {name: a[name] + b[name] for name in a.keys() & b.keys()}
                for a, b in zip(self.statistics, other.statistics, strict=True)
            ),
            samples=tuple(_join(a, b) for a, b in zip(self.samples, other.samples, strict=True)),
        )

    def save(self, folder: str | Path) -> Path:
        """Write the profile into a folder as ``profile.json`` and ``profile.safetensors``; return the JSON's path."""
        tensors: dict[str, Tensor] = {}
        for index, (statistics, sample) in enumerate(zip(self.statistics, self.samples, strict=True)):
            tensors |= {f"{index}.statistics.{name}": tensor for name, tensor in statistics.items()}
            tensors |= {f"{index}.sample.{name}": tensor for name, tensor in sample.tensors().items()}
        body: dict[str, Any] = {
            "domains": list(self.domains),
            "num_tokens": list(self.num_tokens),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "layers": [asdict(layer) for layer in self.layers],
        }
        path = Path(folder) / FILE
        inputs = {"model": self.model_digest, "text": self.text_digest}
        write_artifact(path, kind="profile", body=body, inputs=inputs, tensors=tensors)
        return path

    @classmethod
    def load(cls, folder: str | Path, *, model_digest: str | None = None, text_digest: str | None = None) -> Profile:
        """Read a profile from the folder that `save` wrote.

        Raises:
            CorruptArtifact: missing or damaged.
            StaleArtifact: made from another model or text than the digests that are given.
        """
        from coterie.artifact import read_header

        path = Path(folder) / FILE
        expected = {"model": model_digest, "text": text_digest}
        body, tensors = read_artifact(
            path, kind="profile", inputs={name: digest for name, digest in expected.items() if digest is not None}
        )
        inputs = read_header(path)["inputs"]
        layers = tuple(_layer_from(entry) for entry in body["layers"])
        grouped: list[dict[str, dict[str, Tensor]]] = [{"statistics": {}, "sample": {}} for _ in layers]
        for name, tensor in tensors.items():
            index, group, key = name.split(".", 2)
            grouped[int(index)][group][key] = tensor
        return cls(
            model_digest=inputs["model"],
            text_digest=inputs["text"],
            domains=tuple(body["domains"]),
            num_tokens=tuple(body["num_tokens"]),
            seq_len=body["seq_len"],
            seed=body["seed"],
            layers=layers,
            statistics=tuple(entry["statistics"] for entry in grouped),
            samples=tuple(Sample(**({"logits_TE": None} | entry["sample"])) for entry in grouped),  # type: ignore[arg-type]
        )


def _layer_from(entry: Mapping[str, Any]) -> MoELayer:
    router_tensors = tuple((str(name), int(axis)) for name, axis in entry["router_tensors"])
    return MoELayer(**{**entry, "router_tensors": router_tensors})


def _join(a: Sample, b: Sample) -> Sample:
    first, second = a.tensors(), b.tensors()
    joined = {name: torch.cat((first[name], second[name])) for name in first.keys() & second.keys()}
    return Sample(**({"logits_TE": None} | joined))  # type: ignore[arg-type]
