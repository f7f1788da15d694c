"""Make a policy for a model, and write it beside it: what `coterie route` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coterie.errors import InputError
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.open import open_checkpoint
from coterie.outputs import check_output
from coterie.profile.profile import Profile
from coterie.profile.text import CalibrationText, TextSettings
from coterie.route.budget import RuleName, budget_policy
from coterie.route.layers import divergences_of, means_by_damage
from coterie.route.policy import KIND, RoutePolicy


def route(
    model: str | Path,
    out: str | Path,
    *,
    experts_per_token: float,
    profile: Profile | str | Path,
    rule: RuleName = "threshold",
    renormalise: bool = False,
    text: str | Path | None = None,
    tokens: int = 4096,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> RoutePolicy:
    """Decide how many experts a token gets, and write it into a file; see `coterie.route.budget.budget_policy`.

    Args:
        model: a model folder, a GGUF file or a hub id; its headers are read.
        out: the file, ``*.json``; a policy that is there is replaced.
        experts_per_token: experts of a layer that are computed for a token in the mean, from 1 to what it chooses.
        profile: of that model.
        rule: how experts are told from each other.
        renormalise: scale the weights that are left to the sum that they had.
        text: a text folder, on which it is measured how many experts each layer needs, and what the policy costs; all
            layers get the same number, and nothing is measured, when None.
        tokens: tokens of that text.
        seq_len: tokens in a sequence.
        seed: seed of the draw of sequences.
        device: where the model runs for that.

    Raises:
        InputError: a number out of range, or a file that is no JSON.
        OutputExists: something else has the name.
        StaleArtifact: the profile is of another model.
        CorruptArtifact: it is damaged.
        TextError: there is no such text, or too little.
    """
    path, target = Path(out), check_device(device)
    if path.suffix != ".json":
        raise InputError(f"{path}: a policy is a JSON file; give it a name that ends in .json")
    check_output(path, kind=KIND)
    stored = Checkpoint.open(model)
    measured = profile if isinstance(profile, Profile) else Profile.load(profile, model_digest=stored.digest)
    means, batches = None, []
    checkpoint = open_checkpoint(stored.path)
    if text is not None:
        if rule == "fewer":
            raise InputError("the rule 'fewer' gives all layers the same number of experts: leave --text out")
        drawn = CalibrationText(checkpoint, TextSettings(source=text, tokens=tokens, seq_len=seq_len, seed=seed)).draw()
        batches = [ids_BS for _, ids_BS in drawn.batches(8)]
        means = means_by_damage(
            checkpoint, measured, batches, experts_per_token=experts_per_token, rule=rule, device=target
        )  # fmt: skip
    policy = budget_policy(
        measured, experts_per_token=experts_per_token, rule=rule, renormalise=renormalise, means=means
    )
    if batches:
        [divergence] = divergences_of(checkpoint, measured.layers, [policy], batches, target)
        policy = replace(policy, divergence=divergence)
    policy.save(path)
    return policy
