"""Which experts each domain of a text would keep, as an artefact: the expert patterns of PreMoe (2505.17639).

    patterns(profile, 32).save("patterns.json")

Legend: E experts, M kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.artifact import open_artifact, write_artifact
from coterie.compress.decide import check_statistics
from coterie.compress.methods.scores import score_needs
from coterie.compress.methods.select import score_by_domain, top_experts
from coterie.errors import Infeasible
from coterie.fields import Fields
from coterie.outputs import claim_output
from coterie.profile.profile import Profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Patterns:
    """The experts that each domain keeps.

    Attributes:
        score: name of the score that they are the best by.
        num_experts: M.
        kept: by domain, for each MoE layer the numbers of its M experts, ascending.
        inputs: digests of the model and the text that they were made from.
    """

    score: str
    num_experts: int
    kept: Mapping[str, tuple[tuple[int, ...], ...]]
    inputs: Mapping[str, str]

    def save(self, path: str | Path) -> Path:
        """Write them as one JSON file; one that is there is replaced, anything else refused (OutputExists)."""
        target = claim_output(path, kind="patterns")
        kept = {domain: [list(layer) for layer in layers] for domain, layers in self.kept.items()}
        body = {"score": self.score, "num_experts": self.num_experts, "kept": kept}
        write_artifact(target, kind="patterns", body=body, inputs=self.inputs)
        return target

    @classmethod
    def load(cls, path: str | Path, *, inputs: Mapping[str, str] | None = None) -> Patterns:
        """Read them.

        Raises:
            CorruptArtifact: missing or damaged, a field is missing, unknown or of another type, or the experts of a
                layer are not M different ones in order.
            StaleArtifact: made from other inputs.
        """
        artifact = open_artifact(Path(path), kind="patterns", inputs=inputs)
        body = Fields(artifact.body, where=str(path))
        with body.all_read():
            score = body.text("score")
            num_experts = body.whole("num_experts", least=1)
            by_domain = body.nested("kept")
            kept = {domain: by_domain.rows(domain) for domain in by_domain.names()}
            num_layers = max(map(len, kept.values()), default=0)
            for domain, layers in kept.items():
                if len(layers) != num_layers:
                    raise by_domain.wrong(domain, [], f"has {len(layers)} layers, another domain has {num_layers}")
                for index, experts in enumerate(layers):
                    if len(experts) != num_experts or sorted(set(experts)) != list(experts):
                        raise by_domain.wrong(
                            f"{domain}[{index}]", list(experts), f"should be {num_experts} experts, ascending"
                        )
        return cls(score=score, num_experts=num_experts, kept=kept, inputs=artifact.inputs)


def patterns(profile: Profile, num_experts: int, *, score: str = "tcess") -> Patterns:
    """Choose for each domain by itself the experts with the highest score in each layer.

    Args:
        profile: of a text of several domains.
        num_experts: M, experts that a domain keeps in each layer; with router groups, an equal share of each.
        score: name of a score, see `coterie.compress.methods.scores`.

    Raises:
        UnknownName: no such score.
        Infeasible: more experts than there are, fewer than a token chooses, or no equal share for router groups.
        ArchitectureMismatch: the profile lacks a statistic that the score reads.
    """
    needs = score_needs(score)
    kept: dict[str, list[tuple[int, ...]]] = {domain: [] for domain in profile.domains}
    for index, layer in enumerate(profile.layers):
        if not layer.top_k <= num_experts <= layer.num_experts or num_experts % layer.num_groups:
            groups = f" in {layer.num_groups} groups of equal size" if layer.num_groups > 1 else ""
            raise Infeasible(
                f"{layer.block}: {num_experts} experts cannot be kept of {layer.num_experts}{groups} where every token "
                f"chooses {layer.top_k}"
            )
        by_domain = profile.statistics[index]
        check_statistics(by_domain.keys(), needs)
        for domain, values_E in zip(profile.domains, score_by_domain(score, by_domain), strict=True):
            kept[domain].append(tuple(top_experts(values_E, num_experts, layer.num_groups).tolist()))
    return Patterns(
        score=score,
        num_experts=num_experts,
        kept={domain: tuple(layers) for domain, layers in kept.items()},
        inputs={"model": profile.model_digest, "text": profile.text_digest},
    )
