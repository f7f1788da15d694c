"""Self-generated text: what the model itself writes, where no text is given that fits it.

Documents are sampled from the model one token after another [self-calibration, arXiv 2410.17170; LLM-QAT, arXiv
2305.17888], from its start token on. Every document has random numbers of its own, so a seed gives the same documents
however many are asked for, up to rounding. The model is in memory as a whole meanwhile: to write a token, all its
weights are read.

Legend: B documents of a batch, S tokens of a document, P those that are given, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from coterie.errors import InputError, TextError
from coterie.model.arch.load import checkpoint_meta_model, load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream.memory import CACHE, WEIGHTS, Forecast, Stage
from coterie.model.stream.spill import trim_memory
from coterie.model.stream.stream import working_dtype
from coterie.profile.token_file import encoded, start_ids
from coterie.progress import track

log = logging.getLogger(__name__)

#: Name of the domain that the model's own text is, and what stands for it in place of a text folder.
SELF = "self"

#: Where a document's first token comes from: drawn like all others, or the n-th likeliest for the n-th document.
FirstToken = Literal["sampled", "likeliest"]

#: Documents that are written at a time, and the bytes that their keys and values may take.
_BATCH_SIZE = 64
_CACHE_BYTES = 2**29


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """How a model is to write text.

    Attributes:
        tokens: tokens to write at least, ends of documents included.
        max_length: tokens of a document at most, its end included.
        seed: seed of everything random.
        temperature: what logits are divided by before a token is drawn; 1 draws from the model's own distribution.
        first_token: where the first token of a document comes from.
        device: where the model runs.
        dtype: number format of the model; see `coterie.model.arch.load.load_model`.
    """

    tokens: int
    max_length: int
    seed: int = 0
    temperature: float = 1.0
    first_token: FirstToken = "sampled"
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def check(self) -> None:
        """Raise InputError for settings that nothing can be written with."""
        if self.tokens < 1 or self.max_length < 2:
            raise InputError(
                f"{self.tokens} tokens in documents of up to {self.max_length} are no text; ask for 1 or more in "
                "documents of 2 or more"
            )
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"a temperature of {self.temperature} draws nothing; take one above 0, such as 1.0")


def write_text(checkpoint: Checkpoint, writing: Writing, *, limit: int | None = None) -> list[str]:
    """Let a model write documents.

    Args:
        checkpoint: the model; it is loaded as a whole.
        writing: how.
        limit: bytes of memory that may be taken; as many as are free when None.

    Raises:
        InputError: the checkpoint is stored in a way that cannot be loaded as a whole, or nothing can be written.
        Infeasible: the model does not fit into memory.
        TextError: the model writes no text.
    """
    writing.check()
    check_fits(checkpoint, writing, limit=limit)
    model: Any = load_model(checkpoint.path, dtype=writing.dtype, device=writing.device)
    try:
        return write_documents(model, load_tokenizer(checkpoint.path), writing)
    finally:
        del model
        trim_memory()


def check_fits(checkpoint: Checkpoint, writing: Writing, *, limit: int | None) -> None:
    """Say how much memory writing takes, and raise Infeasible when that is more than there is."""
    if checkpoint.pickled or any(info.packed is not None for info in checkpoint.tensors.values()):
        stored = "as pickles" if checkpoint.pickled else "quantised"
        raise InputError(
            f"{checkpoint.path} is stored {stored} and cannot be loaded as a whole, which writing text needs; "
            "give a folder of text with --text"
        )
    device = torch.device(writing.device)
    dtype = writing.dtype or working_dtype(checkpoint, device)
    model = checkpoint_meta_model(checkpoint, dtype=dtype)
    if not model.can_generate():
        raise InputError(
            f"{checkpoint.path} is a {type(model).__name__}, which writes no text; give a folder of text with --text"
        )
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    cache = _batch_size(model, writing) * _cache_bytes(model, writing)
    stage = Stage(
        name="writing text with the model in memory as a whole",
        lines=((WEIGHTS, weights), (CACHE, cache)),
        way_out="let it write where it fits (coterie calibrate MODEL --generate DIR), and give --text DIR here",
        device=device,
    )
    Forecast(stages=(stage,)).check(limit)


def _cache_bytes(model: Any, writing: Writing) -> int:
    """Return the bytes of the keys and values of one document: as many as the model is wide, in every layer."""
    config = model.config.get_text_config()
    return int(2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * writing.max_length)


def _batch_size(model: Any, writing: Writing) -> int:
    # What is free at the moment must not matter: rounding, and so the text, may depend on the size.
    needed = -(-writing.tokens // writing.max_length)
    return max(1, min(_BATCH_SIZE, _CACHE_BYTES // _cache_bytes(model, writing), needed))


def write_documents(model: Any, tokenizer: Any, writing: Writing) -> list[str]:
    """Sample documents from a model in memory until they have as many tokens as were asked for.

    A document starts after the tokenizer's start tokens or, where it has none, its end-of-text token; with neither its
    first token is drawn evenly from the vocabulary. It ends with an end-of-text token, or when it is as long as it may
    be. Special tokens are never drawn.

    Args:
        model: a causal language model; its generation config is set aside.
        tokenizer: its tokenizer.
        writing: how.

    Raises:
        InputError: the model's predictions are not numbers.
        TextError: the model writes no text.
    """
    voice = _Voice(model, tokenizer, writing)
    size = _batch_size(model, writing)
    documents: list[str] = []
    count = 0
    longest = size * writing.max_length  # documents may be shorter, so there may be more batches than these
    for first in track(itertools.count(step=size), "writing", total=-(-writing.tokens // longest)):
        new = [text for text in voice.speak(range(first, first + size)) if text.strip()]
        if not new:
            raise TextError(f"the model wrote {size} documents without any text in them; give a folder of text instead")
        documents += new
        count += sum(map(len, encoded(tokenizer, ((text, True) for text in new))))
        if count >= writing.tokens:
            break
    return documents


class _Voice:
    """A model that writes documents by their numbers."""

    def __init__(self, model: Any, tokenizer: Any, writing: Writing) -> None:
        self._model, self._tokenizer, self._writing = model, tokenizer, writing
        config: GenerationConfig = model.generation_config
        ends = config.eos_token_id
        last = {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id}
        vocab_size = int(model.config.get_text_config().vocab_size)
        self._ends = sorted(int(end) for end in last if end is not None and int(end) < vocab_size)
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._start = start_ids(tokenizer) or [int(start) for start in starts if start is not None][:1]
        # What a model's own settings do to its distribution (top-k, penalties) is not asked for here.
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        # Tokens of a chat format and the like are special too, without having a role that the tokenizer knows.
        marked = {token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special}
        usable = {int(token) for token in tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids, *marked}
        self._allowed_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._allowed_V[[token for token in usable if token < vocab_size]] = True

    def speak(self, numbers: Sequence[int]) -> list[str]:
        """Write the documents of these numbers."""
        length, device = self._writing.max_length, self._model.device
        uniform_BS = torch.stack([_uniform(self._writing.seed, number, length) for number in numbers])
        if not self._start:
            usable = self._allowed_V.nonzero()[:, 0]
            prompt_BP = usable[(uniform_BS[:, :1] * len(usable)).long()]
            written = 1
        else:
            prompt_BP = torch.tensor(self._start).repeat(len(numbers), 1)
            written = 0
        sampler = _Sampler(
            uniform_BS=uniform_BS,
            written=written,
            temperature=self._writing.temperature,
            allowed_V=self._allowed_V.to(device),
            ends=torch.tensor(self._ends, dtype=torch.int64, device=device),
            ranks_B=torch.tensor(numbers) if self._writing.first_token == "likeliest" else None,
        )
        with torch.no_grad():
            ids_BS = self._model.generate(
                input_ids=prompt_BP.to(device),
                attention_mask=torch.ones_like(prompt_BP).to(device),
                max_new_tokens=max(1, length - prompt_BP.shape[1]),
                do_sample=False,
                eos_token_id=self._ends or None,
                pad_token_id=self._ends[0] if self._ends else 0,
                logits_processor=LogitsProcessorList([sampler]),
            )
        return [self._text(ids) for ids in ids_BS[:, prompt_BP.shape[1] - written :].tolist()]

    def _text(self, ids: list[int]) -> str:
        stop = next((place for place, token in enumerate(ids) if token in self._ends), None)
        text: str = self._tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.replace("\0", "")  # which no file of text may hold, and a model of bytes may write
        # A document that was cut off may end within a character.
        return text if stop is not None else text.rstrip("\ufffd")


class _Sampler(LogitsProcessor):
    """Draws each document's next token and leaves greedy search no other choice.

    So the model's own ``generate`` does all that a family needs (its kind of cache, positions), and the draw is the
    same on every device up to rounding.
    """

    def __init__(
        self,
        *,
        uniform_BS: Tensor,
        written: int,
        temperature: float,
        allowed_V: Tensor,
        ends: Tensor,
        ranks_B: Tensor | None,
    ) -> None:
        self._uniform_BS, self._step, self._temperature = uniform_BS, written, temperature
        self._allowed_V, self._ends, self._ranks_B = allowed_V, ends, ranks_B

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logits_BV = scores.double() / self._temperature
        if not logits_BV[:, self._allowed_V].isfinite().all():
            raise InputError("the model's predictions are not numbers; its weights are damaged, or it needs float32")
        allowed_V = self._allowed_V
        if self._step > 0:  # a document is never empty
            allowed_V = allowed_V.index_fill(0, self._ends, True)
        logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
        if self._step == 0 and self._ranks_B is not None:
            order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
            ranks_B1 = (self._ranks_B % int(allowed_V.sum()))[:, None].to(order_BV.device)
            token_B1 = order_BV.gather(1, ranks_B1)
        else:
            total_BV = logits_BV.softmax(-1).cumsum(-1)
            uniform_B1 = self._uniform_BS[:, self._step, None].to(total_BV)
            token_B1 = torch.searchsorted(total_BV, uniform_B1 * total_BV[:, -1:], right=True)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


def _uniform(seed: int, number: int, length: int) -> Tensor:
    """Return the random numbers of a document, one a token, in [0, 1 - 2^-24], float32."""
    own = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big")
    return torch.rand(length, generator=torch.Generator().manual_seed(own))
