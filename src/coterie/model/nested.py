"""Tensors in nested tuples, lists, dicts and outputs of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dicts and dataclass-like outputs, in order."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    mapped(value, note)
    return tensors


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors in nested tuples, lists, dicts and dataclass-like outputs."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, function) for item in value)
    if type(value) is dict:
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, ModelOutput):
        return type(value)(**{key: mapped(item, function) for key, item in value.items()})
    return value
