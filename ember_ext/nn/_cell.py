"""`LiquidCell`: what a cell that stands alone needs to take a step by one operator call."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ember_ext.nn._packing import Packing


class LiquidCell(Packing):
    """A cell with ncps' calling convention, to be mixed into a cell of ncps.

    It adds no state to that cell, so that an instance of it can change class. What it cannot
    compute as ncps does, it leaves to ncps' own code: changed cells, inputs of mixed dtypes, time
    spans that belong to units.
    """

    def _why_cells_differ(self) -> str | None:
        """The reason why the cell's weights do not tell what it computes; None if they do."""
        raise NotImplementedError

    def _takes(self, x: Tensor, h: Tensor) -> bool:
        """Whether `_scan` can take x, [B, I], and the state h, [B, S]."""
        return False

    def _scan(self, x: Tensor, h: Tensor, timespan: Tensor | float) -> tuple[Tensor, Tensor]:
        """Output [B, 1, M] and next state [B, S] by the operator, for x [B, 1, I]."""
        raise NotImplementedError

    def _calls_cells(self) -> bool:
        return self._why_cells_differ() is not None

    def _advance(self, x: Any, h: Any, timespan: Any) -> tuple[Tensor, Tensor] | None:
        """Output and next state; None where ncps' own code has to compute them.

        Args:
            x: input, [B, I].
            h: state, [B, S].
            timespan: as `row_timespan` returns it.
        """
        if not (isinstance(x, Tensor) and isinstance(h, Tensor) and x.dim() == h.dim() == 2):
            return None
        if isinstance(timespan, Tensor) and timespan.shape not in ((), (x.shape[0], 1)):
            return None
        if not torch.is_grad_enabled():
            # The operator reports arguments that do not fit.
            result = self._run_packed(x, h, timespan)
            if result is not None:
                return result
        if x.shape[0] != h.shape[0] or not self._takes(x, h) or self._calls_cells():
            return None
        y, h = self._scan(x.unsqueeze(1), h, timespan)
        return y.squeeze(1), h


def row_timespan(timespan: Any, x: Any) -> Any:
    """A cell's time span: one for each row as [B, 1], a single one as a number or of no dimension.

    ncps multiplies [B] along the units. Whatever is neither belongs to units, and is left as it is.
    """
    if type(timespan) is float:
        return timespan
    if isinstance(timespan, Tensor):
        if timespan.numel() == 1 and timespan.dim() <= 2:
            return timespan.reshape(())
        rows = isinstance(x, Tensor) and x.dim() == 2 and timespan.shape == (x.shape[0],)
        return timespan.unsqueeze(1) if rows else timespan
    return float(timespan) if isinstance(timespan, Real) else timespan
