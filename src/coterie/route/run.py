"""Make a policy for a model, and write it beside it: what `coterie route` does."""

from __future__ import annotations

from pathlib import Path

from coterie.errors import InputError
from coterie.model.disk.checkpoint import Checkpoint
from coterie.outputs import check_output
from coterie.profile.profile import Profile
from coterie.route.budget import RuleName, budget_policy
from coterie.route.policy import KIND, RoutePolicy


def route(
    model: str | Path,
    out: str | Path,
    *,
    experts_per_token: float,
    profile: Profile | str | Path,
    rule: RuleName = "output",
    renormalise: bool = False,
) -> RoutePolicy:
    """Decide how many experts a token gets, and write it into a file; see `coterie.route.budget.budget_policy`.

    Args:
        model: a model folder, a GGUF file or a hub id; its headers are read.
        out: the file, ``*.json``; a policy that is there is replaced.
        experts_per_token: experts of a layer that are computed for a token in the mean, from 1 to what it chooses.
        profile: of that model.
        rule: how experts are told from each other.
        renormalise: scale the weights that are left to the sum that they had.

    Raises:
        InputError: a number out of range, or a file that is no JSON.
        OutputExists: something else has the name.
        StaleArtifact: the profile is of another model.
        CorruptArtifact: it is damaged.
    """
    path = Path(out)
    if path.suffix != ".json":
        raise InputError(f"{path}: a policy is a JSON file; give it a name that ends in .json")
    check_output(path, kind=KIND)
    digest = Checkpoint.open(model).digest
    measured = profile if isinstance(profile, Profile) else Profile.load(profile, model_digest=digest)
    policy = budget_policy(measured, experts_per_token=experts_per_token, rule=rule, renormalise=renormalise)
    policy.save(path)
    return policy
