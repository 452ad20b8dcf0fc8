"""A liquid layer's weights, laid out for inference, and whether they still are its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ember_ext.ops._packed import Packed
from ember_ext.ops._watch import Watch, can_watch


class LaidOut:
    """A network's weights laid out: for one fixed time span, and for varying ones once needed.

    What a step computes is decided by the modules, by which tensors they have, and by what these
    hold. `is_current` looks at the first two, and each run at the third.

    Args:
        owner: the module that has the network as its child, or None for a network of its own.
        name: the child whose weights they are.
        parts: the modules that compute, each with all of its descendants.
        weights: what is laid out.
        inputs: width of its input, I.
        state: width of its state, S.
        dtype: of its weights.
    """

    positive_timespans: ClassVar[bool] = False
    """Whether a time span of 0 is refused."""

    def __init__(
        self,
        owner: nn.Module | None,
        name: str,
        parts: Iterable[nn.Module],
        weights: Iterable[Tensor],
        *,
        inputs: int,
        state: int,
        dtype: torch.dtype,
    ) -> None:
        modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
        self._modules, self._kinds = modules, [*map(type, modules)]
        self._sources = [
            (owned, name, value)
            for module in modules
            for owned in (module._parameters, module._buffers)
            for name, value in owned.items()
            if value is not None
        ]
        self._tensor_names = [m._parameters for m in modules] + [m._buffers for m in modules]
        self._tensor_counts = [*map(len, self._tensor_names)]
        self._own_names = [module.__dict__ for module in modules]
        self._children = [] if owner is None else [(owner._modules, dict(owner._modules))]
        self._children += [(m._modules, dict(m._modules)) for m in modules if m._modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._fixed: tuple[float, Packed] | None = None
        self._varying: Packed | None = None
        self.inputs, self.state, self.dtype = inputs, state, dtype
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
        tensors = {id(value): value for _, _, value in self._sources}
        self.watch: Watch | None = None
        """A watch of all tensors of the network; None if the weights cannot be laid out."""
        if all(map(can_watch, tensors.values())) and _follow_from_parameters(modules, weights):
            self.watch = Watch(list(tensors.values()))

    def lay_out(self, timespan: float | None) -> Packed:
        """The weights laid out for one time span, or for any with None; with `watch`."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Whether the network still has the same parts and tensors, and no hooks.

        What the tensors hold is for the runs to see.
        """
        if any(self._hooks) or [*map(type, self._modules)] != self._kinds:
            return False
        if [*map(len, self._tensor_names)] != self._tensor_counts:
            return False
        for names in self._own_names:
            if "forward" in names:
                return False
        for children, known in self._children:
            if children != known:
                return False
        try:
            for owned, name, value in self._sources:
                if owned[name] is not value:
                    return False
        except KeyError:  # pruned or parametrised: the weight goes by another name
            return False
        return True

    def takes(self, x: Tensor, h: Tensor) -> bool:
        """Whether x, [B, T, I] or [B, I], and the state h, [B, S], suit the kernel."""
        if self.watch is None:
            return False
        if self.dropouts and any(dropout.training for dropout in self.dropouts):
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        if x.dtype != self.dtype or h.dtype != self.dtype:
            return False
        return x.shape[-1] == self.inputs and h.shape == (x.shape[0], self.state)

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | float,
        lengths: Tensor | None = None,
        *,
        checked: bool = True,
    ) -> tuple[Tensor, Tensor] | None:
        """Run as `Packed.run`, or return None if a time span is not a good one."""
        if isinstance(timespans, Tensor):
            shape = x.shape[:-1]
            good = timespans > 0 if self.positive_timespans else timespans >= 0
            good = good & timespans.isfinite()
            if not bool(good.all()):
                if lengths is None or timespans.numel() == 1:
                    return None
                beyond = torch.arange(x.shape[1]) >= lengths[:, None]
                if not bool((good.reshape(shape) | beyond).all()):
                    return None
            timespans = timespans.detach().reshape(() if timespans.numel() == 1 else shape)
            timespans = timespans.expand(shape)
        else:
            # Weights for a single time span save a quarter of the work. They are a
            # copy, so only one is kept.
            if self._fixed is not None and self._fixed[0] == timespans:
                return self._fixed[1].run(x, h, None, lengths, checked=checked)
            if not 0 <= timespans < math.inf or (self.positive_timespans and timespans == 0):
                return None
            if self._fixed is None:
                self._fixed = timespans, self.lay_out(timespans)
                return self._fixed[1].run(x, h, None, lengths, checked=checked)
            timespans = h.new_full(x.shape[:-1], timespans)
        if self._varying is None:
            self._varying = self.lay_out(None)
        return self._varying.run(x, h, timespans, lengths, checked=checked)


_KNOWN_PARAMETRIZATIONS = tuple(
    getattr(parametrizations, name) for name in ("_WeightNorm", "_Orthogonal", "_SpectralNorm")
)


def _follow_from_parameters(modules: Sequence[nn.Module], weights: Iterable[Tensor]) -> bool:
    """Whether `weights` are parameters and buffers of these modules, or computed from nothing else.

    A parametrisation of the user's may draw random numbers, or depend on anything.
    """
    lists = [m for m in modules if isinstance(m, parametrize.ParametrizationList)]
    if any(not isinstance(part, _KNOWN_PARAMETRIZATIONS) for parts in lists for part in parts):
        return False
    own = {id(t) for m in modules for t in (*m._parameters.values(), *m._buffers.values())}
    return bool(lists) or all(id(weight) in own for weight in weights)
