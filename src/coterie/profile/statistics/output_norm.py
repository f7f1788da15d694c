"""How large each expert's outputs are where it was chosen: EAN and, squared, MSAN (2606.15716)."""

from collections.abc import Mapping

from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``output_norm`` (E,): the sum of |f_e(x_t)|, and ``output_square`` (E,): of its square."""
    norm_TK = observation.norm_TK.double()
    return {
        "output_norm": observation.sum_by_expert(norm_TK),
        "output_square": observation.sum_by_expert(norm_TK.square()),
    }
