"""Reading: run text through a model of any size, one unit in memory at a time, and turn the outcome into logits.

Logits of a whole text are larger than the model, so what is kept is what the base model returns (in files, see
`coterie.model.stream.stream`), and the head is applied to a part of one batch at a time.

Legend: B sequences of a batch, S tokens of a sequence, P positions of a part, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coterie.model.stream.likelihood import position_slices
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import unit_work
from coterie.progress import track

#: Gives logits (B, S, V) from token ids (B, S) and what the base model returned, as `Stream.head` does.
Head = Callable[[Tensor, Any], Tensor]


def read(stream: Stream, batches: Sequence[Tensor], *, description: str) -> list[Any]:
    """Run batches of token ids (B, S) through the base model of an open stream, in one pass over its weights.

    Args:
        stream: the model.
        batches: token ids; batches may differ in shape.
        description: title of the progress bar.

    Returns:
        What the base model returned for each batch; its last hidden states are in files where they are large.
    """
    run = stream.run([functools.partial(base_output, stream.model, ids_BS) for ids_BS in batches])
    work = unit_work(stream, (), tokens=sum(ids_BS.numel() for ids_BS in batches), base=True)
    for _ in track(run, description, work.total, weight=work.of, largest=work.largest):
        pass
    stream.release()
    return run.results


def logits_at(head: Head, ids_BS: Tensor, output: Any, positions: slice) -> Tensor:
    """Return the logits (B, P, V) at some positions of a batch.

    Args:
        head: the model's.
        ids_BS: the batch.
        output: what the base model returned for it.
        positions: which ones.
    """
    return head(ids_BS[:, positions], type(output)(last_hidden_state=output.last_hidden_state[:, positions]))


def predictions(ids_BS: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut a batch so that the logits of each part are few enough to exist at a time.

    Yields:
        Positions of a part and its token ids (B, P). Its last position is the first of the next part: what is said
        after a part's last token does not count there.
    """
    for piece in position_slices(ids_BS.shape[1] - 1, len(ids_BS), vocab_size):
        positions = slice(piece.start, piece.stop + 1)
        yield positions, ids_BS[:, positions]


def likeliest(head: Head, ids_BS: Tensor, output: Any, *, start: int, vocab_size: int) -> Tensor:
    """Return the model's likeliest next token after each position from `start` on (B, S - start), int64, on the CPU."""
    parts = [
        logits_at(head, ids_BS, output, slice(start + piece.start, start + piece.stop)).argmax(-1).cpu()
        for piece in position_slices(ids_BS.shape[1] - start, len(ids_BS), vocab_size)
    ]
    return torch.cat(parts, 1)


def num_logits(stream: Stream) -> int:
    """Return how many tokens a model scores."""
    return int(stream.model.config.get_text_config().vocab_size)


def base_output(model: Any, ids_BS: Tensor) -> Any:
    """Return what the base model returns for token ids (B, S): its last hidden states alone."""
    output = model.base_model(input_ids=ids_BS, use_cache=False)
    # Routers' scores and the like are not needed, and would stay in memory for the whole text.
    return type(output)(last_hidden_state=output.last_hidden_state)
