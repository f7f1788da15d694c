"""Keys and values in fewer bytes: layers of a cache that stand in the place of those that keep all as it is.

    full        as wide as the model computes
    int8        8 bits, with a scale for each token and head
    int4        4 bits after ZipCache (2405.14256): keys by channel, values by channel and token
    window:N    the first 4 tokens and the last N (StreamingLLM, 2309.17453), at the positions that they had

Only layers that keep keys and values of all tokens are replaced: a window, a latent vector (MLA), a state of linear
attention are small already, and stay what they are. Attention gets numbers as wide as the model's, made anew for each
token, one layer at a time.

Legend: H heads, S tokens, D numbers of a head, B blocks of tokens, G tokens of a block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from coterie.errors import InputError
from coterie.model.arch.seam import intercepted
from coterie.model.arch.structure import nearest_entry
from coterie.model.quiet import quiet
from coterie.run.sizes import LayerSize

#: Tokens at the beginning that a window never loses.
SINKS = 4

#: Tokens that become 4 bits at once; fewer stay as they are until there are so many.
BLOCK = 128

#: Bytes of a scale, and of what is as wide.
_WIDE = 4

#: What `--kv` may be, beside the choice that the budget makes.
FORMATS = ("full", "int8", "int4", "window:N")


@dataclass(frozen=True, kw_only=True, slots=True)
class KVFormat:
    """How keys and values are kept.

    Attributes:
        name: "full", "int8", "int4" or "window".
        window: tokens of a window.
    """

    name: str = "full"
    window: int | None = None

    @classmethod
    def parse(cls, text: str) -> KVFormat | None:
        """Return what somebody wrote; None for "auto", where the budget chooses.

        Raises:
            InputError: it is none of these.
        """
        if text == "auto":
            return None
        if text in ("full", "int8", "int4"):
            return cls(name=text)
        match = re.fullmatch(r"window:(\d{1,9})", text, flags=re.ASCII)
        if match is not None and int(match[1]) > 0:
            return cls(name="window", window=int(match[1]))
        raise InputError(f"--kv {text!r} is none of auto, {', '.join(FORMATS)}; a window is of 1 token or more")

    def __str__(self) -> str:
        return self.name if self.window is None else f"{self.name}:{self.window}"

    def layer(self) -> DynamicLayer:
        """Return an empty layer that keeps them so."""
        if self.window is not None:
            return WindowLayer(self.window)
        return {"full": DynamicLayer, "int8": Int8Layer, "int4": ZipLayer}[self.name]()


class _BitsLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """What layers in fewer bits have in common: tensors in a table, of which keys and values are made."""

    #: Names of the tensors.
    names: ClassVar[tuple[str, ...]]

    def __init__(self, **options: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stored: dict[str, Tensor | None] = dict.fromkeys(self.names)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note number format and place."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, and return the keys and values (1, H, S, D) of all."""
        self.lazy_initialization(key_states, value_states)
        self.add(key_states, value_states)
        return self.unpacked()

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens."""
        raise NotImplementedError

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as attention sees them."""
        raise NotImplementedError

    def append(self, **tensors: Tensor) -> None:
        """Add tensors behind those that are there."""
        for name, tensor in tensors.items():
            before = self.stored[name]
            self.stored[name] = tensor if before is None else torch.cat([before, tensor], dim=-2)

    def get(self, name: str) -> Tensor:
        """Return a tensor, which is there."""
        tensor = self.stored[name]
        assert tensor is not None
        return tensor

    def length(self, name: str) -> int:
        """Return how many tokens, or blocks, a tensor has."""
        tensor = self.stored[name]
        return 0 if tensor is None else tensor.shape[-2]

    def reset(self) -> None:
        """Forget all."""
        self.stored = dict.fromkeys(self.names)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequences into another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence several times."""
        for name, tensor in self.stored.items():
            self.stored[name] = None if tensor is None else tensor.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        for name, tensor in self.stored.items():
            self.stored[name] = None if tensor is None else tensor[indices.to(tensor.device), ...]


class Int8Layer(_BitsLayer):  # type: ignore[no-untyped-call]
    """Keys and values in 8 bits: whole numbers from -127 to 127 times the scale of their token and head.

    A token is the same whatever comes before and after it, so where a text is cut into pieces changes nothing.
    """

    names = ("keys", "key_scales", "values", "value_scales")

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens."""
        for name, states in (("key", keys), ("value", values)):
            codes, scales = to_int8(states)
            self.append(**{f"{name}s": codes, f"{name}_scales": scales})

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as attention sees them."""
        keys, values = (from_int8(self.get(f"{name}s"), self.get(f"{name}_scales"), self.dtype)
                        for name in ("key", "value"))  # fmt: skip
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many tokens there are."""
        return self.length("keys")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, of which a negative number is given."""
        end = self.get_seq_length() - abs(tokens_to_remove)
        for name, tensor in self.stored.items():
            self.stored[name] = None if tensor is None else tensor[:, :, :end]


class ZipLayer(_BitsLayer):  # type: ignore[no-untyped-call]
    """Keys and values in 4 bits, in blocks of 128 tokens; the last tokens, of no whole block, stay as they are.

    Keys are rounded by channel: a few channels of keys are large in all tokens. Values are divided by the square root
    of the largest of their channel, rounded by token, and multiplied again (ZipCache's "channel-separable tokenwise").
    There the largest is that of the whole text, here that of the block, so that nothing has to be rounded twice.
    """

    names = (
        "keys", "key_lows", "key_scales", "values", "value_lows", "value_scales", "value_norms", "last_keys",
        "last_values",
    )  # fmt: skip

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, and round what are whole blocks by then."""
        self.append(last_keys=keys, last_values=values)
        whole = self.length("last_keys") // BLOCK * BLOCK
        if not whole:
            return
        keys, values = self.get("last_keys"), self.get("last_values")
        for begin in range(0, whole, BLOCK):
            self._round(keys[:, :, begin : begin + BLOCK], values[:, :, begin : begin + BLOCK])
        self.stored["last_keys"], self.stored["last_values"] = keys[:, :, whole:].clone(), values[:, :, whole:].clone()

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as attention sees them."""
        last_keys, last_values = self.get("last_keys"), self.get("last_values")
        shape, tokens, rounded = last_keys.shape, self.get_seq_length(), self.length("keys")
        keys = last_keys.new_empty(*shape[:2], tokens, shape[3])
        values = last_values.new_empty(*shape[:2], tokens, last_values.shape[3])
        keys[:, :, rounded:], values[:, :, rounded:] = last_keys, last_values
        for block in range(rounded // BLOCK):
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            keys[:, :, place], values[:, :, place] = self._block(block)
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many tokens there are."""
        return self.length("keys") + self.length("last_keys")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, of which a negative number is given; what is left of a block is wide again."""
        end, rounded = self.get_seq_length() - abs(tokens_to_remove), self.length("keys")
        if end >= rounded:
            for name in ("last_keys", "last_values"):
                self.stored[name] = self.get(name)[:, :, : end - rounded]
            return
        blocks, rest = divmod(end, BLOCK)
        keys, values = self._block(blocks)
        self.stored["last_keys"], self.stored["last_values"] = keys[:, :, :rest], values[:, :, :rest]
        for name in self.names[:-2]:
            per_block = BLOCK if name in ("keys", "values", "value_lows", "value_scales") else 1
            self.stored[name] = self.get(name)[:, :, : blocks * per_block] if blocks else None

    def _round(self, keys: Tensor, values: Tensor) -> None:
        """Add a whole block."""
        codes, lows, scales = to_int4(keys, dim=-2)
        self.append(keys=codes, key_lows=lows, key_scales=scales)
        norms = channel_norms(values)
        codes, lows, scales = to_int4(values.float() / norms, dim=-1)
        self.append(values=codes, value_lows=lows, value_scales=scales, value_norms=norms)

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a block that was rounded."""
        tokens, own = slice(number * BLOCK, (number + 1) * BLOCK), slice(number, number + 1)
        last_keys, last_values = self.get("last_keys"), self.get("last_values")
        keys = from_int4(
            self.get("keys")[:, :, tokens], self.get("key_lows")[:, :, own], self.get("key_scales")[:, :, own],
            last_keys.shape[-1],
        )  # fmt: skip
        values = from_int4(
            self.get("values")[:, :, tokens], self.get("value_lows")[:, :, tokens],
            self.get("value_scales")[:, :, tokens], last_values.shape[-1],
        ).mul_(self.get("value_norms")[:, :, own])  # fmt: skip
        return keys.to(last_keys.dtype), values.to(last_values.dtype)


class WindowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The first tokens and the last ones; what lies between is forgotten.

    A token sees at least so many before it: tokens that pass together see those that pass with them too.

    Attributes:
        window: how many of the last ones stay.
        seen: how many there were.
    """

    def __init__(self, window: int, **options: Any) -> None:
        """Begin with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.window, self.seen = window, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, and return keys and values of those that they see."""
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        if keys.shape[-2] > SINKS + self.window:
            self.keys, self.values = (
                torch.cat([states[:, :, :SINKS], states[:, :, -self.window :]], dim=-2) for states in (keys, values)
            )
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many tokens there were, which is where the next one stands."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens are seen, and where the first of them would stand if none were missing."""
        stored = min(self.seen, SINKS + self.window)
        return stored + query_length, self.seen - stored

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether none is forgotten, so that the last ones can be removed."""
        return self.seen <= SINKS + self.window

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, of which a negative number is given, while none is forgotten."""
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.seen = 0


def to_int8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers (..., D) of 8 bits, and the scales (..., 1) that they are multiplied by."""
    wide = states.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `to_int8` rounded, head by head, since it exists in 32 bits before it is narrow."""
    states = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for head in range(codes.shape[1]):
        states[:, head] = codes[:, head] * scales[:, head]
    return states


def to_int4(states: Tensor, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return whole numbers of 4 bits, two in a byte, and what they are made wide by.

    Args:
        states: (..., S, D).
        dim: along which numbers share the smallest of them and a scale.

    Returns:
        Bytes (..., S, (D + 1) / 2), the smallest numbers and the scales, both of length 1 along `dim`.
    """
    wide = states.float()
    lows = wide.amin(dim, keepdim=True)
    scales = (wide.amax(dim, keepdim=True) - lows) / 15
    codes = ((wide - lows) / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(0, 15).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | codes[..., 1::2] << 4, lows, scales


def from_int4(codes: Tensor, lows: Tensor, scales: Tensor, width: int) -> Tensor:
    """Return what `to_int4` rounded, D numbers wide, in 32 bits."""
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :width]
    return both.float().mul_(scales).add_(lows)


def channel_norms(values: Tensor) -> Tensor:
    """Return the square roots (..., 1, D) of the largest size in each channel of a block, 1 where all is 0."""
    norms = values.float().abs().amax(-2, keepdim=True).sqrt_()
    return torch.where(norms > 0, norms, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Keys and values of a token in a layer that keeps them all.

    Attributes:
        count: heads.
        key: numbers of a head's key.
        value: numbers of a head's value.
    """

    count: int
    key: int
    value: int


def plain_layers(model: PreTrainedModel) -> dict[int, Heads]:
    """Return the layers of a cache that keep keys and values of all tokens, as a token through the meta model shows.

    Args:
        model: on the meta device.
    """
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    with quiet(), torch.no_grad(), intercepted(model, _nothing), FakeTensorMode(allow_non_fake_inputs=True):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"), past_key_values=cache, use_cache=True)
    rank = nearest_entry(config.to_dict(), (), lambda key: key == "kv_lora_rank")
    layers = {}
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer) is DynamicLayer and keys is not None and values is not None and keys.numel():
            heads = Heads(count=keys.shape[1], key=keys.shape[3], value=values.shape[3])
            if heads != Heads(count=1, key=rank or 0, value=heads.value):  # a latent vector
                layers[number] = heads
    return layers


def layer_size(how: KVFormat, heads: Heads, itemsize: int) -> LayerSize:
    """Return what a layer takes that keeps keys and values so.

    Args:
        how: the way.
        heads: of the layer.
        itemsize: bytes of a number as the model computes.
    """
    full = heads.count * (heads.key + heads.value) * itemsize
    if how.name == "int8":  # and two scales in 32 bits
        return LayerSize(token=heads.count * (heads.key + heads.value + 2 * _WIDE), wide=full)
    if how.name == "int4":
        codes = -(-heads.key // 2) - (-heads.value // 2)
        by_token, by_block = 2 * _WIDE, _WIDE * (2 * heads.key + heads.value)
        token = -(-heads.count * ((codes + by_token) * BLOCK + by_block) // BLOCK)
        return LayerSize(token=token, wide=full, last=BLOCK)
    return LayerSize(token=full, wide=full, window=None if how.window is None else SINKS + how.window)


def _nothing(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return torch.zeros_like(hidden_TD)
