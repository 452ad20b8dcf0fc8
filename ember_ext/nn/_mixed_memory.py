"""The LSTM that ncps runs on the state before each step of a layer with mixed memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ember_ext import _native
from ember_ext.nn._plain import why_lstm_differs
from ember_ext.nn._rows import Rows


def memory_step(
    layer: str, lstm: Any, packed: Tensor, rows: Rows
) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make a function that takes step t of ncps' LSTM cell from h and c, [B, S] each, to the next.

    Args:
        layer: for the warning that the cell has to be called.
        lstm: an `ncps.torch.lstm.LSTMCell`.
        packed: the input, as `rows` packs it, [..., C].
        rows: which rows take each step.
    """
    reason = why_lstm_differs(lstm)
    if reason is not None:
        _native.warn_once(f"nn.{layer} calls its LSTM at each step, which is slower: {reason}")
        inputs = rows.split(packed)
        return lambda t, h, c: lstm(inputs[t], (h, c))
    gates = rows.split(input_gates(lstm, packed))
    recurrent = lstm.recurrent_map.weight.t()
    return lambda t, h, c: remember(torch.addmm(gates[t], h, recurrent), c)


def input_gates(lstm: Any, x: Tensor) -> Tensor:
    """The part of the LSTM's gates that has no recurrence: that of x, [..., C], is [..., 4 S]."""
    size = int(lstm.hidden_size)
    # The cell adds 1 to the third gate.
    offset = nn.functional.pad(x.new_ones(size), (2 * size, size))
    return nn.functional.linear(x, lstm.input_map.weight, lstm.input_map.bias + offset)


def remember(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Output and memory of ncps' LSTM cell from its gates before activation, [B, 4 S].

    The gates are value, write, keep and read, and 1 was added to keep.
    """
    size = c.shape[1]
    value, gates = z.split((size, 3 * size), 1)
    write, keep, read = torch.sigmoid(gates).chunk(3, 1)
    c = torch.addcmul(c * keep, torch.tanh(value), write)
    return torch.tanh(c) * read, c
