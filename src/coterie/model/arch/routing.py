"""Which numbers of experts a router can route to; the one rule that plans and inspections share. No torch here."""

from __future__ import annotations


def routing_problem(num_experts: int, *, top_k: int, num_groups: int = 1, num_chosen_groups: int = 1) -> str | None:
    """Say why a router cannot work with so many experts, or None when it can.

    Args:
        num_experts: experts in the layer.
        top_k: experts that a token chooses.
        num_groups: router groups of equal size (DeepSeek-V3, 2412.19437); 1 for a router without groups.
        num_chosen_groups: groups that a token chooses its experts from.
    """
    if num_experts < top_k:
        return f"every token chooses {top_k} experts"
    if num_experts % num_groups:
        return f"the router has {num_groups} groups of equal size"
    a_group = num_experts // num_groups
    if num_groups > 1 and a_group * num_chosen_groups < top_k:
        return (
            f"{num_chosen_groups} of {num_groups} groups hold {a_group * num_chosen_groups} experts, {top_k} are chosen"
        )
    if num_groups > 1 and a_group < 2:
        return f"the router scores a group by its two best experts, {a_group} would be left"
    return None
