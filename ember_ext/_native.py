"""Loads the compiled operators, and says once why where they are missing."""

from __future__ import annotations

import warnings


def has(device_type: str) -> bool:
    """Whether compiled kernels for this device type ("cpu", "cuda") are registered."""
    return False
