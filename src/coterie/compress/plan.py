"""The Plan: what every layer, and every expert in it, becomes. Made once, it can be read and edited, and is executed.

coterie plan MODEL PROFILE --keep 0.5 --recipe reap --out plan.json
coterie compress MODEL OUT --plan plan.json --profile PROFILE
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from coterie.artifact import open_artifact, write_artifact
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.recipes import ROUTERS, Step
from coterie.errors import Infeasible
from coterie.fields import Fields
from coterie.model.arch.shapes import awkward_shapes
from coterie.model.disk.encodings.integer_types import are_integers
from coterie.model.disk.manifest import RouterForm
from coterie.outputs import claim_output

log = logging.getLogger(__name__)

Mtp = Literal["keep", "drop"]

_COUNTS = ("original_bytes", "predicted_bytes", "original_parameters", "predicted_parameters", "seed")


#: What the divergence of results was over the damage that their plans expected: 1.2 to 1.5 in benchmarks/bits.md, from
#: 0.33 to 0.21 of the bytes. Prices are those of nearest rounding, each matrix by itself.
KL_OVER_DAMAGE = 1.3

#: The same where experts get widths of their own: 1.4 to 2.5 in benchmarks/bits-packed.md and bits-experts*.md. What
#: neurons cost adds up less well than what types cost.
NARROWED_KL_OVER_DAMAGE = 1.8


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonShape:
    """What all layers of a stock model class share.

    Attributes:
        num_experts: experts of each layer.
        width: hidden neurons of each; None for those of the original.
        top_k: experts that a token chooses; None for those of the original.
    """

    num_experts: int
    width: int | None
    top_k: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `compress` does: what each layer becomes, and the steps that make it so.

    Attributes:
        recipe: name of the recipe that it was made for.
        router: "map" (E rows and a map, which no stock class loads) or a form of M rows, which loads anywhere: "plain"
            (those of the centres), "mean" (means over the clusters) or "refit" (fitted to the block's output).
        passes: (name, options) of what is done to each layer, in order.
        result_steps: (name, options) of what is done to the whole result at the end.
        layers: what each MoE layer becomes, in order.
        untouched: parts of the checkpoint that the model class has no place for, such as heads for multi-token
            prediction; they are copied as they are, but for the experts of prediction layers (`mtp`).
        mtp: what becomes of prediction layers: "keep", with the experts that the last MoE layer keeps, or "drop"; None
            where there are none.
        original_bytes: bytes of all tensors of the checkpoint; of a quantised one, as it is read.
        predicted_bytes: bytes of all tensors of the result.
        original_parameters: number of elements of all tensors of the checkpoint.
        predicted_parameters: number of elements of all tensors of the result.
        seed: seed of everything random in the passes.
        inputs: digests of the model (and the profile's text) that the plan was made from.
        quantiser: (name, options) of what chooses the codes of weights that are stored in blocks; None where none are.
        types: type of every matrix that is stored in blocks, by its name on disk; a star for the expert's number
            stands for all experts of a layer but those that are named themselves. Types of GGML, or of integers alone.
        damage: rise of the loss that the allocator expects, in nats a token; None where it expects none in numbers.
        vllm_only: whether experts of layers are stored in different integer types, which vLLM loads and transformers
            does not; counted anew, as the bytes are, for a plan that was edited.
        gap: by which share of its own `damage` may exceed the least that these bytes allow; None where it is not known.
    """

    recipe: str
    router: RouterForm
    passes: tuple[Step, ...]
    result_steps: tuple[Step, ...]
    layers: tuple[LayerPlan, ...]
    untouched: tuple[str, ...]
    original_bytes: int
    predicted_bytes: int
    original_parameters: int
    predicted_parameters: int
    seed: int
    inputs: Mapping[str, str]
    mtp: Mtp | None = None
    quantiser: Step | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    damage: float | None = None
    gap: float | None = None
    vllm_only: bool = False

    def body(self) -> dict[str, Any]:
        """Return the plan as JSON content (without the input digests)."""
        return {
            "recipe": self.recipe,
            "router": self.router,
            "passes": [[name, dict(options)] for name, options in self.passes],
            "result_steps": [[name, dict(options)] for name, options in self.result_steps],
            "layers": [layer.content() for layer in self.layers],
            "untouched": list(self.untouched),
            **({} if self.mtp is None else {"mtp": self.mtp}),
            **({} if self.quantiser is None else {"quantiser": [self.quantiser[0], dict(self.quantiser[1])]}),
            **({"types": dict(self.types)} if self.types else {}),
            **({} if self.damage is None else {"damage": self.damage}),
            **({} if self.gap is None else {"gap": self.gap}),
            **({"vllm_only": True} if self.vllm_only else {}),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    @property
    def expected_kl(self) -> float | None:
        """What the divergence from the original is expected to be before training, nats a token; None where unknown."""
        if self.damage is None:
            return None
        return (NARROWED_KL_OVER_DAMAGE if self.ragged else KL_OVER_DAMAGE) * self.damage

    @property
    def ragged(self) -> bool:
        """Whether experts get widths of their own; no stock class loads such a result."""
        return any(layer.widths is not None for layer in self.layers)

    @property
    def mapped(self) -> bool:
        """Whether routers keep a row for each expert of the original; no stock class loads such a result."""
        return self.router == "map"

    @property
    def packed(self) -> bool:
        """Whether weights are stored in blocks; no stock class loads such a result, but for `integers`."""
        return bool(self.types)

    @property
    def integers(self) -> bool:
        """Whether weights are stored in integers, as compressed-tensors does."""
        return are_integers(self.types.values())

    @property
    def awkward(self) -> tuple[str, ...]:
        """What other programs will not like about the shapes of the result, a sentence each."""
        return awkward_shapes(self.shape.num_experts, self.shape.width)

    @property
    def shape(self) -> CommonShape:
        """What all layers have in common; see `common_shape`."""
        return common_shape(self.layers)

    def save(self, path: str | Path) -> Path:
        """Write the plan as one JSON file; one that is there is replaced, anything else refused (OutputExists)."""
        target = claim_output(path, kind="plan")
        write_artifact(target, kind="plan", body=self.body(), inputs=self.inputs)
        return target

    @classmethod
    def load(cls, path: str | Path, *, inputs: Mapping[str, str] | None = None) -> Plan:
        """Read a plan; one that was edited by hand is read as well, and that it was is logged.

        Whether a model can have it is checked where it is used (`coterie.compress.decide.checked`).

        Raises:
            CorruptArtifact: missing, no plan, or something in it is of the wrong kind; names what.
            StaleArtifact: made from other inputs.
        """
        file = Path(path)
        plan = open_artifact(file, kind="plan", inputs=inputs, edited=True)
        if plan.edited:
            log.info("%s was edited since it was made", file)
        return cls.from_body(plan.body, plan.inputs, where=str(file))

    @classmethod
    def from_body(cls, body: Mapping[str, Any], inputs: Mapping[str, str], *, where: str) -> Plan:
        """Return the plan of a body that `body` made; raises CorruptArtifact, with `where` it stood."""
        content = Fields(dict(body), where=where)
        with content.all_read():
            return cls(
                recipe=content.text("recipe"),
                router=cast(RouterForm, content.text("router", choices=tuple(ROUTERS))),
                passes=content.pairs("passes"),
                result_steps=content.pairs("result_steps"),
                layers=tuple(map(LayerPlan.from_fields, content.each("layers"))),
                untouched=content.texts("untouched"),
                mtp=cast(Mtp, content.text("mtp", choices=("keep", "drop"))) if content.said("mtp") else None,
                quantiser=content.pair("quantiser") if content.said("quantiser") else None,
                types=content.texts_by_name("types") if content.said("types") else {},
                damage=content.number("damage", least=0.0) if content.said("damage") else None,
                gap=content.number("gap", least=0.0) if content.said("gap") else None,
                vllm_only=content.yes_or_no("vllm_only") if content.said("vllm_only") else False,
                **{name: content.whole(name, least=None if name == "seed" else 0) for name in _COUNTS},
                inputs=dict(inputs),
            )


def common_shape(layers: Sequence[LayerPlan]) -> CommonShape:
    """Return what all layers have in common, as the one config.json of a stock model class has to say it.

    Raises:
        Infeasible: a layer differs from the first; names both, and what they have.
    """
    shapes = [CommonShape(num_experts=layer.num_experts, width=layer.width, top_k=layer.top_k) for layer in layers]
    for number, shape in enumerate(shapes):
        for name, what in (("num_experts", "experts"), ("width", "width"), ("top_k", "experts a token chooses")):
            first, other = getattr(shapes[0], name), getattr(shape, name)
            if first != other:
                raise Infeasible(
                    f"layer {number} has {_said(other)} {what}, layer 0 has {_said(first)}: config.json holds one "
                    f"number for all layers, so give both {_said(first)} or both {_said(other)}; only widths of "
                    "single experts may differ (a ragged result)"
                )
    return shapes[0]


def _said(value: int | None) -> str:
    return "unchanged" if value is None else str(value)
