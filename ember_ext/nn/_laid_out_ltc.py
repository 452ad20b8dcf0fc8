"""The weights of an LTC cell, laid out for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ember_ext.nn import ltc_cell
from ember_ext.nn._laid_out import LaidOut
from ember_ext.ops import _checks
from ember_ext.ops._watch import Watch, WeightsChangedError
from ember_ext.ops.ltc_scan import raw_arguments
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights


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
        self._packed = _LookedUp(
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


class _LookedUp:
    """An LTC cell's weights as the raw operator takes them, for many calls.

    A copy: it does not follow later changes of the weights. CPU only, and not differentiable.

    Args:
        weights: of the cell.
        synapses: those that exist, or None for all.
        dtype: of the inputs to come.
        timespan: the Δt of every step, > 0, or None if it is given with each call. Default: 1.
        ode_unfolds: as for `ltc_scan`.
        eps: as for `ltc_scan`.
        outputs: as for `ltc_scan`. Default: all.
    """

    def __init__(
        self,
        weights: LTCWeights,
        synapses: LTCSynapses | None = None,
        *,
        dtype: torch.dtype,
        timespan: float | None = 1.0,
        ode_unfolds: int = 6,
        eps: float = 1e-8,
        outputs: int | None = None,
    ) -> None:
        self._compute_dtype = _checks.compute_dtype(dtype)
        self._timespan, self._spans = timespan, torch.empty(0, 0)
        x = weights.cm.new_empty((0, 0, weights.sensory_w.shape[0]), dtype=dtype)
        raw = raw_arguments(x, weights, None, synapses, 1.0, None, ode_unfolds, eps, outputs)
        self._weights, self._options = raw[2:7], (*raw[9:], -1)
        # Looking the overload up takes as long as the arithmetic of a small cell.
        self._run: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
            torch.ops.ember_ext.ltc_scan_forward.default
        )

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States in x's dtype, shaped as x, and the final state in h's.

        Args:
            x: input, [B, T, I], or [B, I] for a single step.
            h: initial state, [B, S].
            timespans: [B, T], or [B] for a single step; exactly if the time span was not fixed.
            lengths: [B], int64, see `ltc_scan`.
        """
        dtype = h.dtype
        single = x.dim() == 2
        if single:
            x = x.unsqueeze(1)
        if timespans is None:
            timespans = self._spans
            if timespans.shape != x.shape[:2]:
                timespans = h.new_full(x.shape[:2], self._timespan, dtype=self._compute_dtype)  # type: ignore[arg-type]
                self._spans = timespans
        else:
            timespans = timespans.to(self._compute_dtype).reshape(x.shape[:2])
        if dtype != self._compute_dtype:
            h = h.to(self._compute_dtype)
        y, h, _ = self._run(x, h, *self._weights, timespans, lengths, *self._options)
        return y.squeeze(1) if single else y, h.to(dtype)
