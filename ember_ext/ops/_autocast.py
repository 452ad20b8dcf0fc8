"""Autocast's state for any device, those included that have none, such as meta."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast rounds to on a device type; None where it is off."""
    if _is_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


@torch.compiler.assume_constant_result
def _is_available(device_type: str) -> bool:
    """Whether there is an autocast for a device type; torch 2.10 cannot trace the question."""
    return bool(torch.amp.is_autocast_available(device_type))


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off."""
    # Nothing is switched off where nothing is on, so the graph of an export stays in one piece.
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
