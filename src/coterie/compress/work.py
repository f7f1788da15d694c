"""A compression on its way: what the steps of a run hand on to each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from coterie import __version__
from coterie.compress.integers import stored_name
from coterie.compress.layer import LayerSummary
from coterie.compress.output import carry_files, write_config
from coterie.compress.plan import Plan
from coterie.compress.prepare import Job
from coterie.compress.prices import Prices
from coterie.compress.provenance import provenance_of
from coterie.compress.result_model import ResultModel
from coterie.compress.shards import Shard, write_index
from coterie.journal import Run
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.prediction import Follower
from coterie.model.disk.beside import files_beside
from coterie.model.disk.files import name_of_model
from coterie.model.disk.manifest import LayerEntry, Manifest, PredictionEntry, ResultForm
from coterie.model.disk.patterns import matching
from coterie.profile.profile import Profile
from coterie.publish.card import CARD, write_card

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Work:
    """What is there so far.

    Attributes:
        job: what was prepared.
        run: where it goes.
        shards: the weight files of the result.
        profile: what was measured; None before that, and with compressed inputs.
        plan: what each layer becomes; it names experts once they are decided.
        summaries: what was done to each layer, by its index.
        logits_BSV: logits of the result for `check_ids`, as it is in flight.
        notes: what steps on the whole result have to say, by name.
        logits_error: largest difference of logits, in flight against loaded again, relative to the largest logit.
        measured_before: the profile, where it was measured by a run of its own.
        prices: what types cost, where that was measured before.
    """

    job: Job
    run: Run
    shards: Sequence[Shard]
    profile: Profile | None
    plan: Plan
    summaries: Mapping[int, LayerSummary] = field(default_factory=dict)
    logits_BSV: Tensor | None = None
    notes: dict[str, Mapping[str, object]] = field(default_factory=dict)
    logits_error: float | None = None
    measured_before: Profile | None = None
    prices: Prices | None = None

    @cached_property
    def result(self) -> ResultModel:
        """The meta model of the result; asked for once all is decided."""
        return ResultModel(self.job.stream, self.job.source, self.plan)

    def check_ids(self) -> Tensor:
        """Return the seeded random tokens (B, S) that the result is checked with."""
        vocabulary = int(self.job.stream.model.config.get_text_config().vocab_size)
        return torch.randint(vocabulary, (2, 64), generator=torch.Generator().manual_seed(self.plan.seed))

    def rest_of(self, shard: Shard) -> dict[str, Tensor]:
        """Return the tensors of a file that no layer wrote, by name on disk; prediction layers follow the last layer.

        Where config.json stays as it is, as for mapped and ragged results, they do as well.
        """
        read = self.job.stream.read
        if self.plan.mapped or self.plan.ragged or not self.job.source.prediction.twins:
            return self._packed({name: read(name) for name in shard.names})
        tensors: dict[str, Tensor] = {}
        for name in shard.names:
            tensors |= self._follower.tensors(name, read)
        return self._packed(tensors)

    def _packed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store matrices that text does not pass in their types too: nothing comes in, so codes are the nearest."""
        encodings = self.result.encodings
        packed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if (pattern := matching(name, encodings)) is None:
                packed[name] = tensor
                continue
            log.info("%s: no token passes it; its codes are the nearest", name)
            stored = encodings[pattern].pack(tensor.float())
            if self.plan.integers:
                packed |= {stored_name(name, suffix): each for suffix, each in stored.items()}
            else:
                packed[name] = stored[""]
        return packed

    @cached_property
    def _follower(self) -> Follower:
        """How prediction layers follow the last MoE layer: its experts or, where it merges them, the centres."""
        source = self.job.source
        layer = source.architecture.layers[-1]
        summary, plan = self.summaries[layer.index], self.plan.layers[layer.index]
        kept = summary.centres
        if kept is None:
            kept = [summary.expert_map.index(expert) for expert in range(summary.num_experts)]
        # What parts weigh was asked from the last layer's router, and is taken to be no other here.
        times = 1.0 if plan.top_k is None else plan.top_k / layer.top_k
        cut: Any = summary.notes.get("segment") or {}
        return Follower.of(
            source.checkpoint, source.architecture, source.conversion, source.prediction,
            kept=kept, width=summary.width, factor=float(cut.get("factor", times)),
        )  # fmt: skip

    def _prediction(self) -> PredictionEntry | None:
        """Return what became of prediction layers, for the manifest; None where there are none."""
        source = self.job.source
        if source.mtp is None:
            return None
        if source.mtp == "drop":
            return PredictionEntry(kept=False, layers=source.dropped)
        entry = PredictionEntry(kept=True, layers=source.prediction.layers)
        if self.plan.mapped or self.plan.ragged or not source.prediction.twins:
            return entry
        follower = self._follower
        return replace(
            entry,
            compressed=source.prediction.twins,
            like=source.prediction.base,
            experts=tuple(follower.kept),
            width=follower.width,
            neurons="all" if follower.width == follower.full_width else "largest weights",
            factor=None if follower.factor == 1 else follower.factor,
        )

    def write_small_files(self) -> None:
        """Write all that makes weight files a checkpoint."""
        num_bytes = write_index(self.run.folder, self.shards)
        assert num_bytes == self.plan.predicted_bytes, f"planned {self.plan.predicted_bytes} bytes, wrote {num_bytes}"
        write_config(self.job.source, self.plan, self.run.folder)
        carry_files(self.job.source.checkpoint, self.run.folder)
        self.write_manifest()

    def write_manifest(self, *, whole: bool = False) -> Manifest:
        """Write coterie.json into the result, and return what it says; `whole` where nothing is to come after it."""
        result = self.run.folder if whole else None
        manifest = replace(self._manifest(), provenance=provenance_of(self.job, self.measured_before, result))
        manifest.write(self.run.folder, {"model": self.job.source.checkpoint.digest, "text": self._text()[3]})
        return manifest

    def write_card(self, manifest: Manifest) -> None:
        """Write the model card into the result, whose files are all there."""
        folder = self.run.folder
        card = folder / CARD
        files = [file.relative_to(folder).as_posix() for file in files_beside(folder)]
        write_card(card, manifest, files=files, version=__version__)

    def _text(self) -> tuple[Sequence[str], int, int, str]:
        """Return domains, number of tokens, tokens in a sequence and digest of the text that was measured."""
        if self.profile is not None:
            profile = self.profile
            return profile.domains, sum(profile.num_tokens), profile.seq_len, profile.text_digest
        assert self.job.measure is not None
        token_set = self.job.measure.token_set
        return token_set.domains, sum(token_set.num_counted.values()), token_set.seq_len, token_set.digest

    def _manifest(self) -> Manifest:
        plan = self.plan
        domains, num_tokens, seq_len, _ = self._text()
        return Manifest(
            form=self._form(),
            recipe=plan.recipe,
            passes=plan.passes,
            router=plan.router,
            plan=plan.body(),
            model=name_of_model(self.job.source.checkpoint.path),
            domains=tuple(domains),
            calibration_tokens=num_tokens,
            calibration_inputs=self.job.options.inputs,
            seq_len=seq_len,
            seed=plan.seed,
            logits_error=self.logits_error,
            ragged=self.result.ragged,
            distilled=self.notes.get("distill", self.notes.get("distill-blocks")),
            prediction=self._prediction(),
            layers=tuple(self._entry(layer) for layer in self.job.source.architecture.layers),
            bytes_before=plan.original_bytes,
            bytes_after=plan.predicted_bytes,
            left_out=self.job.left_out,
            numerics=self.job.numerics,
        )

    def _form(self) -> ResultForm:
        plan = self.plan
        if plan.integers:
            return ResultForm.COMPRESSED_TENSORS_BY_LAYER if plan.vllm_only else ResultForm.COMPRESSED_TENSORS
        if plan.mapped:
            return ResultForm.MAPPED
        return ResultForm.RAGGED if plan.ragged else ResultForm.PACKED if plan.packed else ResultForm.PLAIN

    def _entry(self, layer: MoELayer) -> LayerEntry:
        summary, plan = self.summaries[layer.index], self.plan.layers[layer.index]
        cut = plan.top_k is not None and summary.centres is not None
        return LayerEntry(
            index=layer.index,
            block=layer.block,
            num_experts_before=layer.num_experts,
            num_experts_after=summary.num_experts,
            top_k_before=layer.top_k,
            top_k_after=plan.top_k or layer.top_k,
            width_before=layer.width,
            width_after=summary.width,
            widths_after=plan.widths,
            parts=layer.width // summary.width if cut else 1,
            expert_map=tuple(summary.expert_map),
            centres=None if summary.centres is None else tuple(summary.centres),
            notes=summary.notes,
        )
