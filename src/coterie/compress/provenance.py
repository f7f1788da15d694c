"""What a compression was made from and how, for the result's card; of folders only their last names."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from coterie.compress.prepare import Job
from coterie.compress.recipes import get_recipe
from coterie.compress.target import option_of
from coterie.errors import CoterieError
from coterie.model.arch.inspect import inspect_checkpoint
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.gguf.folder import place_of
from coterie.model.disk.manifest import Manifest
from coterie.model.disk.provenance import Provenance
from coterie.profile.profile import Profile
from coterie.profile.sources import source_name
from coterie.publish.original import card_of, hub_id

log = logging.getLogger(__name__)

#: Options of `coterie compress` that go into the command, in order, with the value that need not be said.
_OPTIONS = (
    ("--effort", "effort", "balanced"),
    ("--train-tokens", "train_tokens", None),
    ("--search", "search", None),
    ("--sample-tokens", "sample_tokens", 8_192),
    ("--device", "device", "cpu"),
    ("--inputs", "inputs", "original"),
    ("--output-dtype", "output_dtype", "bfloat16"),
    ("--mtp", "mtp", None),
    ("--on", "on", None),
)


def provenance_of(job: Job, profile: Profile | None, result: Path | None = None) -> Provenance:
    """Return what the manifest says of the original, the recipe and the command.

    Args:
        job: the compression.
        profile: what was measured before it, by a run of its own; None where that is part of it.
        result: the folder of the result, once it is whole.
    """
    source, recipe_name = job.source, job.outline.recipe
    checkpoint = source.original
    model_id = hub_id(job.options.model, checkpoint.path, checkpoint.config)
    recipe = None if job.request is None else job.request.recipe
    if recipe is None:
        try:
            recipe = get_recipe(recipe_name)
        except CoterieError:  # the plan was made for a recipe that is not here
            recipe = None
    text = job.options.text
    return Provenance(
        model_id=model_id,
        **card_of(checkpoint.path),
        text=None if text is None else source_name(text),
        recipe_summary=None if recipe is None else recipe.summary,
        recipe_paper=None if recipe is None else recipe.paper,
        commands=(*_earlier(checkpoint.path), *_commands(job, profile, model_id or _name(checkpoint.path))),
        active_before=None if result is None else _active(checkpoint),
        active_after=None if result is None else _active(Checkpoint.open(result)),
    )


def _earlier(folder: Path) -> tuple[str, ...]:
    """Return the commands that made a model, where it is a result itself: the last of them puts it where it is."""
    manifest = Manifest.read(folder)
    if manifest is None or not manifest.provenance.commands:
        return ()
    *before, last = manifest.provenance.commands
    return (*before, _line([_name(folder) if word == "OUT" else word for word in shlex.split(last)]))


def _name(folder: Path) -> str:
    return place_of(folder.resolve()).name


def _active(checkpoint: Checkpoint) -> int | None:
    """Return the parameters that one token uses, or None where headers and config do not say it."""
    try:
        return inspect_checkpoint(checkpoint).active_parameters
    except CoterieError as error:
        log.debug("%s: parameters that one token uses are not known: %s", checkpoint.path, error)
        return None


def _commands(job: Job, profile: Profile | None, model: str) -> tuple[str, ...]:
    options = job.options
    words: list[Any] = ["coterie", "compress", model, "OUT"]
    target = options.target
    if options.plan is not None:
        words += ["--plan", "PLAN"]
    else:
        for name, value in target.sizes.items():
            words += [option_of(name), f"{value:g}" if isinstance(value, float) else value]
        if target.multiple_of is not None:
            words += ["--multiple-of", target.multiple_of]
        if target.reader is not None:
            words += ["--target", target.reader]
        if target.experts_only:
            words.append("--experts-only")
        words += ["--recipe", job.outline.recipe]
        if job.outline.router != "plain":
            words += ["--router", job.outline.router]
    lines = []
    if profile is not None:
        lines.append(_line(_profile_words(profile, model)))
        words += ["--profile", "PROFILE"]
    if options.text is not None:
        words += ["--text", source_name(options.text)]
        if options.weights is not None:
            words += ["--domains", ",".join(f"{domain}={share:g}" for domain, share in options.weights.items())]
        words += ["--tokens", options.tokens, "--seq-len", options.seq_len]
    words += ["--seed", options.seed]
    for option, name, default in _OPTIONS:
        value = getattr(options, name)
        if value != default:
            words += [option, value]
    if options.allow_pickle:
        words.append("--allow-pickle")
    return (*lines, _line(words))


def _profile_words(profile: Profile, model: str) -> list[Any]:
    words: list[Any] = ["coterie", "profile", model, "PROFILE", "--text", "TEXT"]
    words += ["--domains", ",".join(profile.domains)]
    words += ["--tokens", sum(profile.num_tokens), "--seq-len", profile.seq_len, "--seed", profile.seed]
    if profile.on != "all":
        words += ["--on", profile.on]
    return words


def _line(words: list[Any]) -> str:
    return shlex.join(map(str, words))
