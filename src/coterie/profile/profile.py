"""The Profile: what a model's experts did on text. An artefact that plans and recipes read.

Legend: E experts, D model width, F expert width, T tokens, K chosen experts, G domains.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.artifact import atomic_path, check_file, digest_of, file_digest, open_artifact, write_artifact
from coterie.errors import CorruptArtifact, InputError, StaleArtifact, UnknownName
from coterie.fields import Fields
from coterie.model.arch.layers import MoELayer
from coterie.outputs import claim_output
from coterie.profile.checks import check_layer_header, check_names, check_sample, check_statistic, layer_of
from coterie.profile.places import lowest
from coterie.profile.sources import On
from coterie.profile.statistics import MATRICES, MAXIMA, merged, over_domains
from coterie.profile.sums import BinnedSum, Totals

FILE = "profile.json"

_T = TypeVar("_T")


def layer_file(index: int) -> str:
    """Return the name of the file that holds one layer's statistics and sample."""
    return f"profile-layer-{index:05d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A bounded, seeded sample of one layer's tokens; the same token positions in every layer.

    Domain by domain, in the order of priority; see `coterie.profile.places`.

    Attributes:
        inputs_TD: what the block's experts received.
        index_TK: chosen experts.
        weight_TK: routing weights that the model really applied.
        logits_TE: router scores of all experts as the model recorded them, or None when it records none.
        output_TD: routed output (without shared experts).
        domain_T: domain of each token, as an index into the profile's domains.
        block_TD: what the block that holds router and experts received, where that is not `inputs_TD`.
        priority_T: priority of each token's place; None where the sample was not drawn by priorities.
    """

    inputs_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor | None
    output_TD: Tensor
    domain_T: Tensor
    block_TD: Tensor | None = None
    priority_T: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sample:
        """Return the sample whose `tensors` these are."""
        return cls(**({"logits_TE": None} | dict(tensors)))  # type: ignore[arg-type]

    @property
    def router_inputs_TD(self) -> Tensor:  # noqa: N802  # the suffix names the shape
        """What the block that holds router and experts received."""
        return self.inputs_TD if self.block_TD is None else self.block_TD

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
        num_tokens: tokens of each domain that were measured.
        seq_len: tokens in a sequence.
        seed: seed of the draw of text and sample.
        layers: the MoE layers, in order.
        statistics: for each layer, statistic name -> sums by domain (G, ...), float64. All are sums over tokens (a few
            are maxima), so the profiles of two halves of a text add up to the profile of the whole; what was measured
            or read is added to the last bit, see `coterie.profile.sums`.
        samples: for each layer, its token sample.
        sample_counts: tokens of the sample of each domain, at most.
        thin: every so many-th token was taken for the statistics of all experts on all tokens, see `Observation.thin`;
            the largest such number where profiles were added.
        numerics: what it was measured with, see `coterie.model.numerics`: the last bits hang on it. Empty where an
            early version wrote it, and where profiles of different ones were added.
        asked: names of the statistics that were to be measured; what a model does not show is not in `statistics`.
        on: which tokens of the text were measured: "all", or those of answers, "assistant".

    A profile that was loaded reads a layer's statistics or sample from its file each time it is asked for them, so one
    of any size takes the memory of one layer.
    """

    model_digest: str
    text_digest: str
    domains: tuple[str, ...]
    num_tokens: tuple[int, ...]
    seq_len: int
    seed: int
    layers: tuple[MoELayer, ...]
    statistics: Sequence[Mapping[str, Tensor]]
    samples: Sequence[Sample]
    sample_counts: tuple[int, ...] = ()
    thin: int = 1
    asked: tuple[str, ...] = ()
    on: On = "all"
    numerics: Mapping[str, str | int] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a digest of what was measured and of what it was made from."""
        content = [self.model_digest, self.text_digest, self.domains, self.num_tokens, self.seq_len, self.seed]
        if isinstance(self.statistics, _Stored):
            return digest_of([*content, self.statistics.digests])
        layers = (_tensors(*layer) for layer in zip(self.statistics, self.samples, strict=True))
        return digest_of([*content, [_hash(tensor) for tensors in layers for tensor in tensors.values()]])

    def sum(self, layer: int, name: str) -> Tensor:
        """Return one statistic of one layer over all domains: the sum, for maxima the largest.

        float64; for those of `coterie.profile.statistics.MATRICES` float32.

        Raises:
            UnknownName: the profile does not hold that statistic.
        """
        return over_domains(name, self._statistic(layer, name))

    def all_layers(self, name: str) -> Tensor:
        """Return one statistic of all layers, summed over all domains, as (L, ...); raises UnknownName."""
        return torch.stack([self.sum(layer, name) for layer in range(len(self.layers))])

    def by_domain(self, layer: int, name: str) -> Tensor:
        """Return one statistic of one layer with its domain axis first, float64.

        Raises:
            UnknownName: the profile does not hold that statistic.
            InputError: it is measured over all text, without a domain axis.
        """
        if name in MATRICES:
            raise InputError(
                f"{name} is one sum over all text, since it would be too large by domain: ask for its sum, or profile "
                "the domains one by one"
            )
        return self._statistic(layer, name)

    def _statistic(self, layer: int, name: str) -> Tensor:
        statistics = self.statistics[layer]
        if name not in statistics:
            raise UnknownName("statistic", name, statistics)
        return statistics[name]

    def merge(self, other: Profile) -> Profile:
        """Add the profile of other text through the same model; layers are added when they are asked for.

        The profiles of parts of a text add up to the profile of the whole text to the last bit, in any order: sums are
        exact (`coterie.profile.sums`) and the sample keeps the lowest priorities of both (`coterie.profile.places`).
        What a model computes for a sequence depends in the last bits on the batch that it is in. So the parts must be
        made of whole batches, which holds for any parts where a batch is one sequence, and of the same `thin`.

        Raises:
            StaleArtifact: the profiles are of different models, domains or seeds, or were made by an earlier version.
        """
        if (self.model_digest, self.domains, self.layers) != (other.model_digest, other.domains, other.layers):
            raise StaleArtifact("profiles of different models or domains cannot be added")
        if self.seed != other.seed:
            raise StaleArtifact(
                f"profiles with the seeds {self.seed} and {other.seed} cannot be added: their samples were drawn by "
                "other priorities; profile again with one seed"
            )
        if self.on != other.on:
            raise StaleArtifact(
                f"profiles on {self.on} and on {other.on} cannot be added: they measured other tokens; profile again"
            )
        if not self.sample_counts or not other.sample_counts:
            raise StaleArtifact("a profile does not say how its sample was drawn, so it cannot be added; profile again")
        counts = tuple(map(min, self.sample_counts, other.sample_counts))
        count = len(self.layers)
        return Profile(
            model_digest=self.model_digest,
            text_digest=f"{self.text_digest}+{other.text_digest}",
            domains=self.domains,
            num_tokens=tuple(a + b for a, b in zip(self.num_tokens, other.num_tokens, strict=True)),
            seq_len=self.seq_len,
            seed=self.seed,
            layers=self.layers,
            statistics=_ByLayer(
                len(self.layers), lambda index: _added(self.statistics[index], other.statistics[index])
            ),
            samples=_ByLayer(count, lambda index: _joined(self.samples[index], other.samples[index], counts)),
            sample_counts=counts,
            thin=max(self.thin, other.thin),
            asked=tuple(name for name in self.asked if name in other.asked),
            on=self.on,
            numerics=self.numerics if self.numerics == other.numerics else {},
        )

    def save(self, folder: str | Path) -> Path:
        """Write the profile into a folder: a file a layer, then ``profile.json``; return the JSON's path.

        A profile that is there is replaced; a file of that name that is none is refused (OutputExists).
        """
        target = Path(folder)
        claim_output(target / FILE, kind="profile")
        target.mkdir(parents=True, exist_ok=True)
        digests = {}
        for index, (statistics, sample) in enumerate(zip(self.statistics, self.samples, strict=True)):
            name = write_layer(target, index, statistics, sample)
            digests[name] = file_digest(target / name)
        return self.commit(target, digests)

    def commit(self, folder: Path, digests: Mapping[str, str]) -> Path:
        """Write ``profile.json`` beside the layers' files, whose SHA-256 digests are given by name."""
        body: dict[str, Any] = {
            "domains": list(self.domains),
            "num_tokens": list(self.num_tokens),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "sample_counts": list(self.sample_counts),
            "thin": self.thin,
            "statistics": list(self.asked),
            "on": self.on,
            "numerics": dict(self.numerics),
            "layers": [asdict(layer) for layer in self.layers],
        }
        path = folder / FILE
        inputs = {"model": self.model_digest, "text": self.text_digest}
        write_artifact(path, kind="profile", body=body, inputs=inputs, files=digests)
        return path

    @classmethod
    def load(cls, folder: str | Path, *, model_digest: str | None = None, text_digest: str | None = None) -> Profile:
        """Open a profile in the folder that `save` wrote; layers are read when asked for.

        Raises:
            CorruptArtifact: missing or damaged, or a field is missing, unknown, of another type or contradicts another
                one; a layer's file that is damaged or does not fit the layer is noticed when it is first read.
            StaleArtifact: made from another model or text than the digests that are given.
        """
        path = Path(folder) / FILE
        expected = {"model": model_digest, "text": text_digest}
        artifact = open_artifact(
            path, kind="profile", inputs={name: digest for name, digest in expected.items() if digest is not None}
        )
        inputs = Fields(dict(artifact.inputs), where=str(path), path="inputs")
        body = Fields(artifact.body, where=str(path))
        with inputs.all_read(), body.all_read():
            model, text = inputs.text("model"), inputs.text("text")
            domains = body.texts("domains")
            counts = body.wholes("num_tokens")
            # Profiles of early versions say none of the next five.
            numerics = body.texts_or_wholes_by_name("numerics") if body.said("numerics") else {}
            sample_counts = body.wholes("sample_counts") if body.said("sample_counts") else ()
            thin = body.whole("thin", least=1) if body.said("thin") else 1
            asked = body.texts("statistics") if body.said("statistics") else ()
            on = cast(On, body.text("on", get_args(On))) if body.said("on") else "all"
            seq_len, seed = body.whole("seq_len", least=1), body.whole("seed", least=None)
            layers = tuple(layer_of(entry, position) for position, entry in enumerate(body.each("layers")))
            if len(set(domains)) < len(domains) or not domains:
                raise body.wrong("domains", list(domains), "should be one name or more, each once")
            for name, listed in (("num_tokens", counts), ("sample_counts", sample_counts)):
                if len(listed) != len(domains) and (listed or name == "num_tokens"):
                    raise body.wrong(name, list(listed), f"should have {len(domains)} entries, one for each domain")
            check_names(body, "statistics", asked)
        files = _LayerFiles(path.parent, artifact.files, layers, len(domains))
        return cls(
            model_digest=model,
            text_digest=text,
            domains=domains,
            num_tokens=counts,
            seq_len=seq_len,
            seed=seed,
            layers=layers,
            statistics=_Stored(files),
            samples=_ByLayer(len(layers), files.sample),
            sample_counts=sample_counts,
            thin=thin,
            asked=asked,
            on=on,
            numerics=numerics,
        )


def write_layer(folder: Path, index: int, statistics: Mapping[str, Tensor], sample: Sample) -> str:
    """Write one layer's file, atomically, and return its name."""
    name = layer_file(index)
    tensors = {key: tensor.contiguous() for key, tensor in _tensors(statistics, sample).items()}
    with atomic_path(folder / name) as temporary:
        save_file(tensors, temporary)
    return name


def _tensors(statistics: Mapping[str, Tensor], sample: Sample) -> dict[str, Tensor]:
    """Return what a layer's file holds, by name in it."""
    tensors = {f"sample.{key}": tensor for key, tensor in sample.tensors().items()}
    for key in statistics:
        total = _exact(statistics, key)
        if isinstance(total, BinnedSum):
            tensors |= {f"digits.{key}": total.digits_K, f"place.{key}": total.place}
        else:
            tensors[f"statistics.{key}"] = total
    return tensors


def _exact(statistics: Mapping[str, Tensor], name: str) -> BinnedSum | Tensor:
    """Return a statistic as it is added up: a sum to the last bit, or a tensor where it is no sum of that kind."""
    if isinstance(statistics, Totals):
        return statistics.exact(name)
    return statistics[name] if name in MAXIMA or name in MATRICES else BinnedSum.of(statistics[name].double())


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


class _ByLayer(Sequence[_T]):
    """A sequence with one entry a layer, each made when it is asked for."""

    def __init__(self, count: int, make: Callable[[int], _T]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)


class _Stored(_ByLayer[Mapping[str, Tensor]]):
    """The statistics in the files of a profile, whose digests stand for them."""

    def __init__(self, files: _LayerFiles) -> None:
        super().__init__(files.count, files.statistics)
        self.digests = dict(files.digests)


class _LayerFiles:
    """The files of a profile's layers; each is checked against digest and layer when it is first read."""

    def __init__(self, folder: Path, digests: Mapping[str, str], layers: Sequence[MoELayer], num_domains: int) -> None:
        names = [layer_file(index) for index in range(len(layers))]
        for index, name in enumerate(names):
            if name not in digests:
                raise CorruptArtifact(f"{folder / FILE} names no file for layer {index}; make the profile again")
            if not (folder / name).is_file():
                raise CorruptArtifact(f"{folder / name} is missing; {FILE} needs it")
        for name in sorted(digests.keys() - set(names)):
            raise CorruptArtifact(f"{folder / FILE} names {name!r}, which is the file of no layer")
        self.count = len(layers)
        self.digests = digests
        self._folder = folder
        self._layers = layers
        self._num_domains = num_domains
        self._checked: set[int] = set()

    def statistics(self, index: int) -> Totals:
        """Return the statistics of one layer; each is read when it is asked for."""
        names = sorted(self._names(index, "statistics.") | self._names(index, "digits."))
        return Totals(names, functools.partial(self._statistic, index))

    def sample(self, index: int) -> Sample:
        """Return the token sample of one layer."""
        with self._open(index) as file:
            tensors = {name: file.get_tensor(f"sample.{name}") for name in sorted(self._names(index, "sample."))}
        check_sample(self._folder / layer_file(index), tensors, self._layers[index], self._num_domains)
        return Sample.of(tensors)

    def _statistic(self, index: int, name: str) -> BinnedSum | Tensor:
        if name in self._names(index, "statistics."):
            return self._read(index, f"statistics.{name}")
        return BinnedSum(digits_K=self._read(index, f"digits.{name}"), place=self._read(index, f"place.{name}"))

    def _read(self, index: int, name: str) -> Tensor:
        with self._open(index) as file:
            tensor: Tensor = file.get_tensor(name)
        check_statistic(self._folder / layer_file(index), name, tensor)
        return tensor

    def _names(self, index: int, group: str) -> set[str]:
        with self._open(index) as file:
            return {key.removeprefix(group) for key in file.keys() if key.startswith(group)}  # noqa: SIM118

    def _open(self, index: int) -> Any:
        name = layer_file(index)
        path = self._folder / name
        if index not in self._checked:
            check_file(self._folder, name, self.digests[name])
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CorruptArtifact(f"{path} holds no tensors ({error}); make the profile again") from None
        if index not in self._checked:
            header = _header_of(opened)
            check_layer_header(path, header, self._layers[index], self._num_domains)
            self._checked.add(index)
        return opened


def _header_of(opened: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor in an opened file, by name."""
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def summed(by_domain: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a layer's statistics over all domains, each read and summed when it is asked for."""
    return Totals(by_domain, lambda name: over_domains(name, by_domain[name]))


def _added(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Totals:
    """Return the statistics that both hold, added up when they are asked for."""

    def both(name: str) -> BinnedSum | Tensor:
        one, two = _exact(a, name), _exact(b, name)
        if isinstance(one, BinnedSum) and isinstance(two, BinnedSum):
            return one + two
        assert isinstance(one, Tensor)
        assert isinstance(two, Tensor)
        return merged(name, one, two)

    return Totals([name for name in a if name in b], both)


def _joined(a: Sample, b: Sample, counts: Sequence[int]) -> Sample:
    """Return the sample of both texts: of each domain so many tokens with the lowest priorities."""
    first, second = a.tensors(), b.tensors()
    return Sample.of(lowest({name: torch.cat((first[name], second[name])) for name in first if name in second}, counts))
