"""Reading what earlier versions wrote: one place says what has changed since then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATER_FIELDS: Mapping[str, Any] = {"cell": "cfc", "persistence_mode": "causal"}
"""Fields that configurations of earlier versions lack, and the values that their runs had."""

_RENAMED_VALUES = {
    ("refractory_mode", "paper"): "look_ahead",
    ("gate_preset", "seed"): "text",
}
_RENAMED_VARIANTS = {"lif-seed": "lif-text"}


def current_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration, with its values by their names of today."""
    return {
        field: _RENAMED_VALUES.get((field, value), value) if isinstance(value, str) else value
        for field, value in config.items()
    }


def current_variant(variant: str) -> str:
    """A variant by its name of today."""
    return _RENAMED_VARIANTS.get(variant, variant)
