"""Sizes of what the kernels lay out, asked of the compiled library.

Fake kernels must know them, and the headers in `csrc/common` define them. The batch and the number
of steps may be symbolic under `torch.compile`, so the library is asked what one row and one step
take.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

from ember_ext import _native


class CfCSizes(NamedTuple):
    """Sizes of a CfC cell in elements; csrc/common/cfc_scan.h says what they hold."""

    step: int
    """The tape, for each row and time step."""
    row: int
    """The tape, once more for each row: the width of [1, x, h] with padding."""
    packed: int
    """The packed cell."""


def cfc_sizes(inputs: int, hidden: int, heads: int, backbone: Sequence[int]) -> CfCSizes:
    """The sizes of a cell.

    Args:
        inputs: I.
        hidden: H.
        heads: the number of heads, 1, 3 or 4.
        backbone: the widths of the backbone's layers.
    """
    # Sizes of a network are fixed in a graph, even where they come as symbols.
    return _cfc_sizes(int(inputs), int(hidden), heads, tuple(map(int, backbone)))


@functools.cache
def _cfc_sizes(inputs: int, hidden: int, heads: int, backbone: tuple[int, ...]) -> CfCSizes:
    assert _native.library is not None
    widths = (ctypes.c_int64 * len(backbone))(*backbone)
    sizes = (ctypes.c_int64 * 3)()
    _native.library.ember_ext_cfc_sizes(inputs, hidden, heads, len(backbone), widths, sizes)
    return CfCSizes(*sizes)


def ltc_packed_size(inputs: int, units: int, sensory: int, recurrent: int) -> int:
    """Elements of a packed LTC network without its maps.

    Args:
        inputs: I.
        units: S.
        sensory: the number of synapses from inputs.
        recurrent: the number of synapses between units.
    """
    assert _native.library is not None
    return int(_native.library.ember_ext_ltc_packed_size(inputs, units, sensory, recurrent))
