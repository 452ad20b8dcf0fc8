"""Runs a network from weights that are laid out once for many calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ember_ext.ops._watch import Watch, WeightsChangedError


class Packed:
    """A network with its weights laid out for inference. CPU only, and not differentiable.

    A copy: it does not follow later changes of the weights, but with a `watch` it says that there
    were some.

    Args:
        operator: the overload that runs it: looking it up at each call takes as long as the
            arithmetic of a small network.
        packed: the weights.
        plan: the integers that say how they lie there.
        settings: further arguments of the operator, before the watch.
        dtype: of states and time spans.
        timespan: of every step; None if the operator needs none, or it is given with each call.
        watch: of all that the weights come from; begun before they were laid out. None for none.
    """

    op: ClassVar[str]
    """The stem of the operator, for errors."""

    def __init__(
        self,
        operator: Callable[..., tuple[Tensor, Tensor]],
        packed: Tensor,
        plan: Sequence[int],
        *settings: Any,
        dtype: torch.dtype,
        timespan: float | None,
        watch: Watch | None,
    ) -> None:
        self.dtype = dtype
        self._run, self._packed, self._plan, self._settings = operator, packed, plan, settings
        self._timespan = timespan
        self._spans = torch.empty(0)
        self._watch, self._watch_number = watch, 0 if watch is None else watch.number

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        checked: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The outputs in x's dtype, shaped as x, and the final states in h's dtype.

        Args:
            x: input, [B, T, I], or [B, I] for a single step; in the dtype of the weights.
            h: states of all cells side by side, [B, S].
            timespans: [B, T], or [B] for a single step; exactly if the time span was not fixed.
            lengths: [B], int64, see the operator.
            checked: whether to look at what the watched tensors hold. Default: True.

        Raises:
            WeightsChangedError: they do not hold any more what they held when the watch began.
        """
        if h.dtype != self.dtype:
            y, last = self.run(x, h.to(self.dtype), timespans, lengths, checked=checked)
            return y, last.to(h.dtype)
        if timespans is None:
            if self._timespan is not None:
                timespans = self._spans
                if timespans.shape != x.shape[:-1]:
                    timespans = self._spans = h.new_full(x.shape[:-1], self._timespan)
        elif timespans.dtype != self.dtype:
            timespans = timespans.to(self.dtype)
        watch = self._watch_number if checked else 0
        result = self._run(
            x, h, timespans, lengths, self._packed, self._plan, *self._settings, watch
        )
        if result[1].dim() == 1:
            raise WeightsChangedError(f"ember_ext.{self.op}: the weights have changed")
        return result
