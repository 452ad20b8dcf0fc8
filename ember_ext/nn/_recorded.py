"""A layer with mixed memory, as exporters record it: one loop for sequences of any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ember_ext.nn._mixed_memory import input_gates, remember
from ember_ext.reference.time_loop import conditions, over_time


class RecordedCells(NamedTuple):
    """A layer's cells as a function of nothing but its arguments, as `over_time` takes it."""

    step: Callable[[Any, Any, Tensor, Any], tuple[Tensor, Tensor]]
    """(constants, input of a step, state [B, S], time span) -> output [B, M] and next state."""
    constants: Any
    inputs: Any
    """[B, T, ...] each."""
    width: int
    """M."""


def record(
    cells: RecordedCells,
    lstm: Any,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    timespans: Tensor | float,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cells' output [B, T, M], the final state and the memory's, [B, S] each.

    Args:
        cells: those after the memory.
        lstm: the memory, an `ncps.torch.lstm.LSTMCell`.
        x: input, [B, T, C].
        h: state, [B, S].
        c: the memory's state, [B, S].
        timespans: a number, or a tensor of no dimension or [B, T, 1].
        lengths: [B], or None.
    """
    dtype = timespans.dtype if isinstance(timespans, Tensor) else x.dtype
    number, fixed, spans, running = conditions(x, timespans, lengths, dtype)

    def step(constants: Any, state: Any, now: Any) -> tuple[Any, Tensor]:
        cell_constants, recurrent, fixed = constants
        h, c = state
        value, gates, span, running = now
        if span is None:
            span = number if fixed is None else fixed
        seen, seen_c = h, c
        if running is not None:  # a row without steps may have any state
            seen, seen_c = torch.where(running, h, 0), torch.where(running, c, 0)
        mixed, new_c = remember(torch.addmm(gates, seen, recurrent), seen_c)
        y, new_h = cells.step(cell_constants, value, mixed, span)
        if running is not None:
            y = torch.where(running, y, 0)
            new_h, new_c = torch.where(running, new_h, h), torch.where(running, new_c, c)
        return (new_h, new_c), y

    (h, c), y = over_time(
        step,
        (h, c),
        (cells.inputs, input_gates(lstm, x), spans, running),
        (cells.constants, lstm.recurrent_map.weight.t(), fixed),
        cells.width,
    )
    return y, h, c
