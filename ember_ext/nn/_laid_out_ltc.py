"""The weights of an LTC cell, laid out for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ember_ext.nn import ltc_cell
from ember_ext.nn._laid_out import LaidOut
from ember_ext.ops._ltc_packing import PackedLTC


class LaidOutLTC(LaidOut):
    """An LTC cell laid out.

    Args:
        cell: the cell.
        owner: the layer whose `rnn_cell` it is; None for a cell of its own.
    """

    positive_timespans = True

    def __init__(self, cell: Any, owner: nn.Module | None = None) -> None:
        super().__init__(
            owner,
            "rnn_cell",
            [cell],
            cell._params.values(),
            inputs=int(cell.sensory_size),
            state=int(cell.state_size),
            dtype=cell.gleak.dtype,
        )
        self._cell = cell
        self._settings = _settings(cell)

    def is_current(self) -> bool:
        """See `LaidOut.is_current`."""
        cell = self._cell
        if _settings(cell) != self._settings or ltc_cell.has_own_methods(cell):
            return False
        return super().is_current()

    def lay_out(self, timespan: float | None) -> PackedLTC:
        """See `LaidOut.lay_out`."""
        cell = self._cell
        with torch.no_grad():
            weights, synapses = ltc_cell.Ready.of(cell)
            outputs = ltc_cell.output_width(cell)
            ode_unfolds, eps = ltc_cell.check_solver("LTCCell", cell._ode_unfolds, cell._epsilon)
            return PackedLTC(
                weights,
                synapses,
                input_map=_affine(ltc_cell.mapping(cell, "input")),
                output_map=_affine(ltc_cell.mapping(cell, "output")),
                timespan=timespan,
                ode_unfolds=ode_unfolds,
                eps=eps,
                outputs=outputs,
                watch=self.watch,
            )


def _affine(mapping: Sequence[Tensor]) -> Tensor | None:
    """A mapping as scale and shift, [2, width]."""
    if not mapping:
        return None
    scale, *shift = mapping
    return torch.stack([scale, *(shift or [torch.zeros_like(scale)])])


def _settings(cell: Any) -> tuple[Any, ...]:
    """The settings of a cell that decide what it computes, and are neither tensors nor modules."""
    return cell._ode_unfolds, cell._epsilon, cell._input_mapping, cell._output_mapping
