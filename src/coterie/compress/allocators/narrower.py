"""The same width for all experts of all layers, as stock model classes have it."""

from __future__ import annotations

import math

from coterie.compress.allocators.problem import Allocation, Problem
from coterie.errors import Infeasible
from coterie.model.arch.width import ALIGNMENT, width_rule


def allocate(problem: Problem) -> Allocation:
    """Keep the share or width of the experts that the target says or, of a budget, the largest width that fits.

    Raises:
        Infeasible: a width that the config cannot say, or a budget below the smallest result; names the nearest.
    """
    layers = problem.same_width(_width(problem))
    return Allocation(layers=layers, num_bytes=problem.sizing.num_bytes(layers))


def _width(problem: Problem) -> int:
    target, full, limit = problem.target, problem.full_width(), problem.limit
    if limit is not None:
        widths = problem.multiples(width_rule(problem.architecture).feasible_widths(), "width")
        options = {width: problem.same_width(width) for width in widths}
        return problem.largest_within(options, limit, "slimming experts", "that can be written, width {}")
    width = target.width
    if width is None:
        assert target.keep is not None
        step = math.gcd(full, ALIGNMENT)
        width = step * max(1, math.ceil(target.keep * full / step - 0.5))
    if not 1 <= width <= full:
        raise Infeasible(f"--width {width} is out of range: experts are {full} wide; choose 1 to {full}")
    if target.multiple_of is not None:
        widths = problem.multiples(width_rule(problem.architecture).feasible_widths(), "width")
        return min(widths, key=lambda each: (abs(each - width), each))
    if width != full:
        width_rule(problem.architecture).check_feasible(width)
    return width
