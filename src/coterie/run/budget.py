"""What a run takes of memory, line by line, before anything is loaded; and how many experts there is room for.

All lines exist at the same time but one: what reading the resident part takes comes before the experts' slots, keys,
values and buffers. What is left of the budget becomes slots.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from coterie.amounts import format_bytes
from coterie.errors import NotEnoughMemory
from coterie.model.stream.memory import Line, total_of

#: What libraries take once they are used for the first time, stacks of threads, and what the C library keeps.
_LIBRARIES = 96 * 2**20

#: The steps in which a smallest budget is named.
_STEP = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunBudget:
    """The memory of a run.

    Attributes:
        limit: bytes that it may take.
        program: what this process takes before it loads anything.
        resident: weights that stay in memory.
        reading: what reading those takes on top, before anything else is there.
        cache: keys and values of the whole context, of all sequences.
        buffers: activations of a chunk of the prompt, masks and logits, and what the policy counts.
        slot: bytes of the memory of one expert.
        least: slots that are needed, as many as a token chooses experts.
        most: slots that can be used, as many as there are experts.
        sequences: how many pass at once.
        draft: a model that guesses, with its keys and values.
        kv: how keys and values are kept, see `coterie.run.kv`.
    """

    limit: int
    program: int
    resident: int
    reading: int
    cache: int
    buffers: int
    slot: int
    least: int
    most: int
    sequences: int = 1
    draft: int = 0
    kv: str = "full"

    @property
    def fixed(self) -> int:
        """Bytes of all but the slots."""
        return self.program + _LIBRARIES + self.resident + self.cache + self.buffers + self.draft

    @property
    def num_slots(self) -> int:
        """How many experts are in memory at once."""
        return min(self.most, max(0, self.limit - self.fixed) // self.slot)

    @property
    def smallest(self) -> int:
        """The smallest budget that works, in bytes."""
        loading = self.program + _LIBRARIES + self.resident + self.draft + self.reading
        size = max(loading, self.fixed + self.least * self.slot)
        return -(-size // _STEP) * _STEP

    @property
    def lines(self) -> tuple[Line, ...]:
        """What takes memory at the same time, in the order in which it is named."""
        return (
            ("weights that every token passes", self.resident),
            (f"{self.num_slots} of {self.most} experts", self.num_slots * self.slot),
            (self._of_cache, self.cache),
            ("activations", self.buffers),
            ("the model that drafts", self.draft),
            ("the program", self.program + _LIBRARIES),
        )

    @property
    def _of_cache(self) -> str:
        """What keys and values are called."""
        kind = "" if self.kv == "full" else f" ({self.kv})"
        return f"keys and values{kind}" if self.sequences == 1 else f"keys and values{kind} of {self.sequences}"

    def check(self) -> None:
        """Raise NotEnoughMemory where it is too little, with what it takes and the smallest that works."""
        if self.limit < self.smallest:
            lines = ((name, size) for name, size in self._least_lines() if size)
            parts = " + ".join(f"{format_bytes(size)} ({name})" for name, size in lines)
            smaller = "--context" if self.sequences == 1 else "--context or batch"
            raise NotEnoughMemory(
                f"--memory {format_bytes(self.limit)} is too little for this model: {format_bytes(self.smallest)} is "
                f"the smallest that works: {parts}; a smaller {smaller} takes less"
            )

    def _least_lines(self) -> tuple[Line, ...]:
        lines = [line for line in self.lines if not line[0].endswith("experts")]
        lines.insert(1, (f"{self.least} of {self.most} experts", self.least * self.slot))
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self) | {
            "num_slots": self.num_slots,
            "smallest": self.smallest,
            "num_bytes": total_of(self.lines),
        }

    def __str__(self) -> str:
        parts = " + ".join(f"{format_bytes(size)} ({name})" for name, size in self.lines if size)
        return f"at most {format_bytes(total_of(self.lines))} of memory: {parts}"
