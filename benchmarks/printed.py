"""What a benchmark prints, kept for a file as well."""

from __future__ import annotations

from pathlib import Path


class Printed:
    """Lines that were printed."""

    def __init__(self) -> None:
        """Have none yet."""
        self._lines: list[str] = []

    def say(self, *lines: str) -> None:
        """Print lines."""
        self._lines.extend(lines)
        print(*lines, sep="\n", flush=True)

    def keep(self, file: Path | None) -> None:
        """Write all of them into a file, if there is one to write."""
        if file is not None:
            file.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
