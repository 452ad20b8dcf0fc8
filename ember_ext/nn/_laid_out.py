"""A liquid layer's weights, laid out for inference, and whether they still are its own."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Runner(Protocol):
    """Cells with their weights laid out, such as `ember_ext.ops.cfc_scan.PackedCells`."""

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output and final state; `timespans` exactly if none was fixed when laying out."""
        ...


class _OptimizerSteps:
    """Counts the steps of all optimisers: fused ones change weights without a new version."""

    count = 0

    @classmethod
    def add(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.add)


class LaidOut:
    """A network's weights laid out: for one fixed time span, and for varying ones once needed.

    Args:
        network: the module whose weights they are.
        inputs: width of its input, I.
        state: width of its state, S.
        dtype: of its weights.
    """

    def __init__(self, network: nn.Module, inputs: int, state: int, dtype: torch.dtype) -> None:
        modules = list(network.modules())
        self._sources = [
            (owned, name, value, value._version)
            for module in modules
            for owned in (module._parameters, module._buffers)
            for name, value in owned.items()
            if value is not None
        ]
        self._children = [(m._modules, dict(m._modules)) for m in modules if m._modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._optimizer_steps = _OptimizerSteps.count
        self._fixed: tuple[float, Runner] | None = None
        self._varying: Runner | None = None
        self.inputs, self.state, self.dtype = inputs, state, dtype
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]

    def lay_out(self, timespan: float | None) -> Runner:
        """The weights laid out for one time span, or for any with None."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Whether the cells have these parts still, without hooks, and the parts these weights.

        Every tensor must be the same object, unchanged since as far as autograd can tell. Where its
        memory lies would take as long to ask as all the rest.
        """
        if self._optimizer_steps != _OptimizerSteps.count or any(self._hooks):
            return False
        for children, known in self._children:
            if children != known:
                return False
        try:
            for owned, name, value, version in self._sources:
                if owned[name] is not value or value._version != version:
                    return False
        except KeyError:  # pruned or parametrised: the weight goes by another name
            return False
        return True

    def takes(self, x: Tensor, h: Tensor) -> bool:
        """Whether x, [B, T, I] or [B, I], and the state h, [B, S], are fit for the kernel."""
        if self.dropouts and any(dropout.training for dropout in self.dropouts):
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        if x.dtype != self.dtype or h.dtype != self.dtype:
            return False
        return x.shape[-1] == self.inputs and h.shape == (x.shape[0], self.state)

    def run(
        self, x: Tensor, h: Tensor, timespans: Tensor | float, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """As `Runner.run`, or None if a time span or a length is not a good one."""
        if lengths is not None:
            if not isinstance(lengths, Tensor) or lengths.shape != x.shape[:1]:
                return None
            if lengths.dtype not in (torch.int32, torch.int64) or lengths.device != x.device:
                return None
            if not bool(((lengths >= 0) & (lengths <= x.shape[1])).all()):
                return None
            lengths = lengths.to(torch.int64)
        if isinstance(timespans, Tensor):
            shape = x.shape[:-1]
            if not bool(((timespans >= 0) & timespans.isfinite()).all()):
                return None
            timespans = timespans.detach().reshape(() if timespans.numel() == 1 else shape)
            timespans = timespans.expand(shape)
        else:
            # Weights for a single time span are a quarter less work, and a copy: one is kept.
            if self._fixed is None and 0 <= timespans < math.inf:
                self._fixed = timespans, self.lay_out(timespans)
            if self._fixed is not None and self._fixed[0] == timespans:
                return self._fixed[1].run(x, h, None, lengths)
            if not 0 <= timespans < math.inf:
                return None
            timespans = h.new_full(x.shape[:-1], timespans)
        if self._varying is None:
            self._varying = self.lay_out(None)
        return self._varying.run(x, h, timespans, lengths)
