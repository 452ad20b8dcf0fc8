"""`Streamer`: a copy of a liquid layer that takes steps without looking for changed weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ember_ext.nn._arguments import Hidden
    from ember_ext.nn._liquid import LiquidLayer


class Streamer:
    """A copy of a liquid layer for streaming, which the layer's `streamer()` makes.

    It has the weights that the layer had when the copy was made, and does not follow later changes.
    Make a new one after them. In return a step does not read the weights a second time to compare
    them. Where weights cannot be laid out, as on a GPU, with mixed memory or with hooks, it takes
    the steps that the layer takes.

    Examples::

        >>> import torch
        >>> from ncps.wirings import AutoNCP
        >>> from ember_ext import nn
        >>> streamer = nn.CfC(3, AutoNCP(16, 2)).streamer()
        >>> state = torch.zeros(1, 16)
        >>> for reading in torch.randn(5, 1, 3):
        ...     output, state = streamer.step(reading, state, 0.05)
        >>> output.shape
        torch.Size([1, 2])
    """

    def __init__(self, layer: LiquidLayer) -> None:
        if not callable(getattr(layer, "streamer", None)):
            kinds = "an ember_ext.nn.CfC or LTC"
            raise TypeError(
                f"ember_ext.nn.Streamer: layer must be {kinds}, got {type(layer).__name__}"
            )
        self._layer = copy.deepcopy(layer).requires_grad_(False)
        weight = next(self._layer.parameters())
        x = weight.new_zeros(1, self._layer._features)
        h = weight.new_zeros(1, int(self._layer.state_size))
        self._laid_out = None if layer.use_mixed else self._layer._packed_for(x, h)

    def __reduce__(self) -> tuple[Any, ...]:
        # Laid-out weights belong to this process, so a copy lays out its own.
        return type(self), (self._layer,)

    def __repr__(self) -> str:
        return f"Streamer of {self._layer!r}"

    def step(
        self, input: Tensor, hx: Hidden | None = None, timespan: Tensor | float | None = 1.0
    ) -> tuple[Tensor, Hidden]:
        """Take one time step without a gradient, with the arguments of the layer's `step`.

        Args:
            input: [B, C], or [C] for a single sequence.
            hx: the state. Default: zeros.
            timespan: time since the previous step. Default: 1.

        Returns:
            The output and the new state.
        """
        laid_out = self._laid_out
        with torch.no_grad():
            if (
                laid_out is not None
                and type(timespan) is float
                and isinstance(hx, Tensor)
                and input.dim() == 2
                and laid_out.takes(input, hx)
            ):
                result = laid_out.run(input, hx, timespan, checked=False)
                if result is not None:
                    return self._layer._read_out(result[0]), result[1]
            return self._layer.step(input, hx, timespan)
