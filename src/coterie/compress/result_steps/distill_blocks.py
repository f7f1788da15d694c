"""Distil a result in blocks: train the scales of its matrices, its norms and routers; see `coterie.train.blocks`.

What was trained is written into the very same bytes. New weight files are made beside the old ones and put in their
place when all are there, so that a run that was killed on the way ends with the same bytes: codes that were chosen for
what the layers before gave are never chosen anew for what they give once they are trained.
"""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.artifact import atomic_path
from coterie.compress.block_model import BlockModel, block_sizes
from coterie.compress.pack import packed_names
from coterie.compress.prepare import Job, may_differ
from coterie.compress.result_steps import LeftOut
from coterie.compress.result_steps.training import Prepared, prepare_training
from coterie.compress.shards import lay_out, write_shard
from coterie.compress.work import Work
from coterie.errors import CorruptArtifact
from coterie.train.distill import distill, make_predictions
from coterie.train.memory import block_training_stages

#: As `coterie.train.distill.RATE`: a scale moves all weights of its block the same way, so that less is far.
RATE = 0.005

#: How often the held-out sequences are looked at.
LOOKS = 4

#: The step of the run after which the new weight files are there, and what their names begin with.
_DONE, _NEW = "distilled blocks", "distilled-"

#: What the step of a weight file says once it is the new one.
_IN_PLACE = "trained"

_LOGITS = f"{_NEW}logits.safetensors"


def prepare(job: Job) -> Prepared | LeftOut | None:
    """Draw the text and announce what training takes; see `coterie.compress.result_steps.training`."""
    source, stream, plan = job.source, job.stream, job.outline
    shards = lay_out(source.checkpoint, stream.units, stream.conversion, packed_names(source, plan))
    priced = job.request is not None and job.request.recipe.prices
    sizes = block_sizes(
        source, stream, plan, shards, target=job.options.target if priced else None,
        differ=may_differ(plan, job.request),
    )  # fmt: skip
    return prepare_training(
        job,
        "distill-blocks",
        lambda model: block_training_stages(sizes, model, seq_len=job.options.seq_len, device=stream.device),
        disk={"the new weight files, until they are in their place": plan.predicted_bytes},
    )


def run(work: Work, prepared: Prepared) -> None:
    """Train the result, and write its weight files anew where that helped.

    Raises:
        CorruptArtifact: new weight files were damaged while the run stood still, and some of them in their place
            already: what they were made from is gone.
    """
    run = work.run
    if _DONE not in run.finished:
        if placed := [shard.file for shard in work.shards if _IN_PLACE in run.finished[shard.file].content]:
            raise CorruptArtifact(
                f"{run.private} lacks a file of the trained result, and {placed[0]} is trained already; what was begun "
                "is removed: give the same command again"
            )
        _train(work, prepared)
    done = run.finished[_DONE]
    work.notes["distill-blocks"] = done.content
    if not done.content["taken"]:
        return
    for shard in work.shards:
        content = {**run.finished[shard.file].content, _IN_PLACE: True}
        run.forget(shard.file)
        with atomic_path(run.folder / shard.file) as temporary:
            shutil.copyfile(run.private / f"{_NEW}{shard.file}", temporary)
        run.finish(shard.file, files=[shard.file], content=content)
    work.logits_BSV = load_file(run.private / _LOGITS)["logits"]


def _train(work: Work, prepared: Prepared) -> None:
    job, run = work.job, work.run
    batches = [ids_BS for _, ids_BS in prepared.token_set.batches(prepared.batch_size)]
    predictions = make_predictions(run, job.stream, batches, cache=job.options.cache)
    result = BlockModel(
        folder=run.folder, shards=work.shards, source=job.source, stream=job.stream, plan=work.plan, result=work.result
    )
    counts = prepared.token_set.counts
    outcome = distill(
        run, result.model, result.weights, torch.cat(batches), predictions,
        computing=result.computing(), tokens=prepared.tokens, seed=work.plan.seed, rounded=lambda weights: weights,
        rate=RATE, looks=LOOKS, counts_BS=None if counts is None else torch.cat(list(counts.values())),
    )  # fmt: skip
    files: list[str] = []
    if outcome.weights is not None:
        for shard in work.shards:
            files.append(f"{_NEW}{shard.file}")
            write_shard(run.private, shard, result.changed(shard, outcome.weights), file=files[-1])
        with torch.no_grad(), result.computing():
            logits_BSV: Tensor = result.model(input_ids=work.check_ids().to(job.stream.device), use_cache=False).logits
        files.append(_LOGITS)
        with atomic_path(run.private / _LOGITS) as temporary:
            save_file({"logits": logits_BSV.float().cpu().contiguous()}, temporary)
    run.finish(_DONE, private=files, content=dict(outcome.notes))
