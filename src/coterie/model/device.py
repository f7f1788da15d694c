"""Devices: whether one is there, asked before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coterie.errors import InputError

if TYPE_CHECKING:
    import torch


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that tensors can be put on; ``cuda`` alone becomes the current one, with its number.

    Args:
        device: a device or its name, like cpu, cuda or cuda:1.

    Raises:
        InputError: it is no device, is not there, or holds no values.
    """
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device ({_first_line(error)}); use cpu, cuda or cuda:1") from None
    if target.type == "cuda":
        # Counting does not start CUDA, which takes memory.
        count = torch.cuda.device_count()
        if (target.index or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
            raise InputError(f"device {target} is not there: torch sees {count} CUDA devices; use {there}")
        return target if target.index is not None else torch.device("cuda", torch.cuda.current_device())
    if target.type == "meta":
        raise InputError("device meta holds no values, so nothing can be computed there; use cpu, cuda or cuda:1")
    if target.type != "cpu":
        try:
            torch.empty(0, device=target)
        except Exception as error:  # whatever a backend raises that is not installed or finds no device
            raise InputError(f"device {target} is not there ({_first_line(error)}); use cpu, cuda or cuda:1") from None
    return target


def check_device_name(name: str) -> str:
    """Return the name of a device, for options of commands; see `check_device`. The CPU is there without a look."""
    if name != "cpu":
        check_device(name)
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
