"""What a result weighs when its layers become what their plans say; see `coterie.model.arch.accounting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.compress.layer_plan import LayerPlan
from coterie.model.arch.accounting import Accounting, LayerShape


class Sizing:
    """Predicts the size of a result from the plans of its layers."""

    def __init__(
        self, accounting: Accounting, *, keeps_rows: bool, twins: int = 0, unused: Callable[[], int] = int
    ) -> None:
        """Take an accounting.

        Args:
            accounting: of the original.
            keeps_rows: whether the router keeps its rows, however many experts go.
            twins: prediction layers that lose the experts that the last layer loses.
            unused: tells how many parameters of the original no token uses to be answered.
        """
        self._unused = unused
        self._twins = twins
        self._accounting = accounting
        self._keeps_rows = keeps_rows

    def shapes(self, layers: Sequence[LayerPlan]) -> list[LayerShape]:
        """Return what layers become as the accounting takes it."""
        return [
            LayerShape(
                num_experts=plan.num_experts,
                width=None if plan.widths is not None else plan.width,
                widths=plan.widths,
                keeps_rows=self._keeps_rows,
            )
            for plan in layers
        ]

    def num_bytes(self, layers: Sequence[LayerPlan]) -> int:
        """Return the bytes of all tensors when every layer becomes what its plan says."""
        return self._total(layers, self._accounting.num_bytes)

    def num_parameters(self, layers: Sequence[LayerPlan]) -> int:
        """Return the elements of all tensors when every layer becomes what its plan says."""
        return self._total(layers, self._accounting.num_elements)

    def num_active(self, layers: Sequence[LayerPlan], top_k: Sequence[int]) -> int:
        """Return the parameters that one token uses, as `coterie.model.arch.inspect.Inspection` counts them.

        Args:
            layers: what layers become.
            top_k: how many experts a token chooses in each, where its plan does not say.
        """
        shapes = self.shapes(layers)
        active = self._accounting.num_elements(shapes) - self._unused()
        for index, (shape, plan, chosen) in enumerate(zip(shapes, layers, top_k, strict=True)):
            experts = self._accounting.expert_elements(index, shape)
            count = shape.num_experts
            active += experts * min(chosen if plan.top_k is None else plan.top_k, count) // count - experts
        return active

    def _total(self, layers: Sequence[LayerPlan], count: Callable[[Sequence[LayerShape]], int]) -> int:
        shapes = self.shapes(layers)
        total = count(shapes)
        # Where config.json stays as it is, prediction layers do as well.
        if self._twins and not self._keeps_rows and shapes[-1].widths is None:
            whole = LayerShape(num_experts=self._accounting.layers[-1].num_experts)
            total += self._twins * (total - count([*shapes[:-1], whole]))
        return total

    def neuron_bytes(self, layer: int) -> int:
        """Return the bytes that one hidden neuron of one expert of a layer takes."""
        return self._accounting.neuron_bytes(layer)
