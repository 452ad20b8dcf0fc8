"""The weights of an LTC cell, laid out for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ember_ext.nn import ltc_cell
from ember_ext.nn._laid_out import LaidOut
from ember_ext.ops._watch import Watch, WeightsChangedError
from ember_ext.ops.ltc_scan import PackedLTC


class LaidOutLTC(LaidOut):
    """An LTC cell laid out.

    Args:
        cell: the cell.
        owner: the layer whose `rnn_cell` it is; None for a cell of its own.
    """

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
        """As `LaidOut.is_current`."""
        cell = self._cell
        if _settings(cell) != self._settings or ltc_cell.has_own_methods(cell):
            return False
        return super().is_current()

    def lay_out(self, timespan: float | None) -> _Runner:
        """As `LaidOut.lay_out`."""
        with torch.no_grad():
            return _Runner(self._cell, timespan, self.watch)

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | float,
        lengths: Tensor | None = None,
        *,
        checked: bool = True,
    ) -> tuple[Tensor, Tensor] | None:
        """As `LaidOut.run`; a time span of 0 is not a good one."""
        if isinstance(timespans, Tensor):
            if bool((timespans == 0).any()):
                return None
        elif timespans == 0:
            return None
        return super().run(x, h, timespans, lengths, checked=checked)


def _settings(cell: Any) -> tuple[Any, ...]:
    """What of a cell counts, and is neither a tensor nor a module."""
    return cell._ode_unfolds, cell._epsilon, cell._input_mapping, cell._output_mapping


class _Runner:
    """A `Runner`: the operator with weights, synapses and mappings that are looked up once."""

    def __init__(self, cell: Any, timespan: float | None, watch: Watch | None) -> None:
        weights, synapses = ltc_cell.Ready.of(cell)
        self._watch = watch
        dtype = cell.gleak.dtype
        self._input, self._output = (
            [value.detach().clone() for value in ltc_cell.mapping(cell, side)]
            for side in ("input", "output")
        )
        self._packed = PackedLTC(
            weights,
            synapses,
            dtype=dtype,
            timespan=timespan,
            ode_unfolds=int(cell._ode_unfolds),
            eps=float(cell._epsilon),
            outputs=ltc_cell.output_width(cell),
        )

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        checked: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As `Runner.run`."""
        if checked and self._watch is not None and not self._watch.unchanged():
            raise WeightsChangedError("ember_ext.ltc_scan: the weights have changed")
        y, h = self._packed.run(ltc_cell.mapped(x, *self._input), h, timespans, lengths)
        y = ltc_cell.mapped(y, *self._output)
        if lengths is not None and len(self._output) == 2:
            y.masked_fill_((torch.arange(x.shape[1]) >= lengths[:, None])[..., None], 0)
        return y, h
