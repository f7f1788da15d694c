"""Names of tensors with a star for one number in them, which stands for all experts of a layer. No torch here."""

from __future__ import annotations

from collections.abc import Container


def matching(name: str, patterns: Container[str]) -> str | None:
    """Return the pattern that a tensor's name on disk matches: itself, or with a star for one number in it."""
    if name in patterns:
        return name
    components = name.split(".")
    for place in reversed(range(len(components))):
        if components[place].isdigit():
            pattern = ".".join((*components[:place], "*", *components[place + 1 :]))
            if pattern in patterns:
                return pattern
    return None
