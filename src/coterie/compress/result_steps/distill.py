"""Distil: train the whole result towards what the original predicts (`coterie.train.distill`)."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.compress.prepare import Job
from coterie.compress.result_steps import LeftOut
from coterie.compress.result_steps.training import Prepared, prepare_training
from coterie.compress.shards import write_shard
from coterie.compress.work import Work
from coterie.model.arch.load import load_model
from coterie.train.distill import distill, make_predictions
from coterie.train.memory import training_stage
from coterie.train.model import experts_apart, trainable


def prepare(job: Job) -> Prepared | LeftOut | None:
    """Draw the text and announce what training takes; see `coterie.compress.result_steps.training`."""
    return prepare_training(
        job,
        "distill",
        lambda model: (
            training_stage(
                model, job.source.architecture.layers, seq_len=job.options.seq_len, device=job.stream.device
            ),
        ),
    )


def run(work: Work, prepared: Prepared) -> None:
    """Train the result, and write its layers anew where that helped."""
    job, run = work.job, work.run
    batches = [ids_BS for _, ids_BS in prepared.token_set.batches(prepared.batch_size)]
    predictions = make_predictions(run, job.stream, batches, cache=job.options.cache)
    model = load_model(run.folder, dtype=torch.float32, device=str(job.stream.device))
    model.requires_grad_(False)
    layers, counts = job.source.architecture.layers, prepared.token_set.counts
    outcome = distill(
        run, model, trainable(model, layers), torch.cat(batches), predictions,
        computing=experts_apart(model), tokens=prepared.tokens, seed=work.plan.seed, rounded=work.result.rounded,
        counts_BS=None if counts is None else torch.cat(list(counts.values())),
    )  # fmt: skip
    work.notes["distill"] = outcome.notes
    if outcome.weights is None:
        return
    for shard in work.shards:
        content = run.finished[shard.file].content
        changed = work.result.changed(run.folder, shard, outcome.weights)
        if changed is not None:
            run.forget(shard.file)
            write_shard(run.folder, shard, changed)
            run.finish(shard.file, files=[shard.file], content=content)
    with torch.no_grad():
        logits_BSV: Tensor = model(input_ids=work.check_ids().to(model.device), use_cache=False).logits
    work.logits_BSV = logits_BSV.float().cpu()
