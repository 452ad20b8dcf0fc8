"""The LIF gate as a module, and the raw parameters that every gated module owns."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext import ops
from ember_ext.nn._arguments import check_dtype, count, fail
from ember_ext.ops.lif_gate import Norm, check_norm

PresetName = Literal["text", "released"]


@dataclass(frozen=True)
class GatePreset:
    """The initial raw values of a gate, and how a raw threshold becomes the effective one.

    Leak and steepness have one transform everywhere: a sigmoid makes the leak of its raw value, and
    a softplus the steepness.

    Examples::

        >>> from ember_ext.nn import GATE_PRESETS
        >>> GATE_PRESETS["released"].raw_threshold, GATE_PRESETS["released"].threshold_scale
        (0.01, 0.1)
    """

    raw_threshold: float
    raw_leak: float
    raw_steepness: float
    threshold_scale: float
    """The threshold is this times the absolute value of the raw one; 0 stands for the raw one."""
    norm: Norm | None
    """The norm of each row that a gate on activations preserves by default."""

    def effective_threshold(self, raw: Tensor) -> Tensor:
        """Compute the effective threshold of a raw one; any shape."""
        return self.threshold_scale * raw.abs() if self.threshold_scale else raw


GATE_PRESETS: dict[str, GatePreset] = {
    # The paper's text, section 2.1: θ starts at 0, λ at 0.73, and the gate preserves ‖x‖.
    "text": GatePreset(
        raw_threshold=0.0, raw_leak=1.0, raw_steepness=2.0, threshold_scale=0.0, norm="l2"
    ),
    # The code behind the published numbers: θ starts at 0.001, λ at 0.881; no norm on activations.
    "released": GatePreset(
        raw_threshold=0.01, raw_leak=2.0, raw_steepness=2.0, threshold_scale=0.1, norm=None
    ),
}
"""The presets of gates: "text" is the paper's text, "released" the code behind its numbers."""

FIXED_RAW_THRESHOLD = 1.0
"""The raw threshold of the paper's non-learnable control."""

_RAW_PREFIX = "raw_"
_FORMERLY_PLAIN = ("threshold", "leak", "steepness", "within", "across")
"""The names of tensors that lacked the prefix in earlier checkpoints."""


def current_name(name: str) -> str:
    """The name in a state dict of today of what `name` was in an earlier one.

    Raw parameters of gates used to be called by what are now the names of the effective values.
    """
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{_RAW_PREFIX}{last}" if last in _FORMERLY_PLAIN else name


class GateParameters(nn.Module):
    """Raw parameters, and read-only properties with the effective values that are made of them.

    The raw parameter of the property `leak` is called `raw_leak`, and so on.
    """

    _effective: ClassVar[tuple[str, ...]] = ()
    """The names of these properties."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._effective:
            self._refuse_to_set(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter; see `torch.nn.Module.register_parameter`."""
        if name in self._effective:
            self._refuse_to_set(name)
        super().register_parameter(name, param)

    def _refuse_to_set(self, name: str) -> NoReturn:
        raise AttributeError(
            f"ember_ext.nn.{type(self).__name__}: {name} is computed from {_RAW_PREFIX}{name} and "
            f"cannot be set; change {_RAW_PREFIX}{name} in its place"
        )

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._effective:
            old, new = f"{prefix}{name}", f"{prefix}{_RAW_PREFIX}{name}"
            # `load_state_dict` hands on a copy, which may be changed.
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        kinds: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        for tensors in kinds:
            for name in [name for name in tensors if name in self._effective]:
                tensors[_RAW_PREFIX + name] = tensors.pop(name)
        if self.__dict__.get("preset") == "seed":  # its name in earlier versions
            self.preset = "text"


class LIFParameters(GateParameters):
    """The parameters of `num_units` LIF gates.

    The learnable parameters are raw values, which may be any number. The operators take effective
    ones, which are the properties `threshold`, `leak` and `steepness`. These are differentiable and
    cannot be set. They are computed at each access, so filling one in place, as in
    `gates.leak.fill_(0.5)`, may change nothing: change the raw value. State dicts of earlier
    versions, which lack the `raw_`, load as they are.

    Args:
        num_units: how many gates; each has its own threshold, leak and steepness.
        preset: "text" for the paper's text or "released" for the code behind its numbers, see
            :data:`~ember_ext.nn.GATE_PRESETS`. Default: "text".
        learnable: with False the raw values are buffers, and the raw threshold is 1, as in the
            paper's fixed control. Default: True.
        device: of the raw values. Default: torch's default device.
        dtype: of the raw values, floating. Default: torch's default dtype.

    Attributes:
        raw_threshold (Tensor): [num_units].
        raw_leak (Tensor): [num_units].
        raw_steepness (Tensor): [num_units].

    Raises:
        TypeError: `num_units` is not an integer, or `dtype` not a floating one.
        ValueError: an unknown preset, or a negative `num_units`.

    Examples::

        >>> import torch
        >>> from ember_ext import lif_gate, nn
        >>> gates = nn.LIFParameters(4, preset="released")
        >>> gates.raw_leak.detach()
        tensor([2., 2., 2., 2.])
        >>> gates.leak
        tensor([0.8808, 0.8808, 0.8808, 0.8808], grad_fn=<SigmoidBackward0>)
        >>> y = lif_gate(torch.randn(2, 4), gates.threshold, gates.leak, gates.steepness)
    """

    _effective: ClassVar[tuple[str, ...]] = ("threshold", "leak", "steepness")

    raw_threshold: Tensor
    raw_leak: Tensor
    raw_steepness: Tensor

    def __init__(
        self,
        num_units: int,
        *,
        preset: PresetName = "text",
        learnable: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if preset not in GATE_PRESETS:
            fail(name, "preset", f"one of {list(GATE_PRESETS)}", repr(preset))
        check_dtype(name, dtype)
        self.num_units = count(name, "num_units", num_units)
        self.preset = preset
        self.learnable = learnable
        for raw in ("raw_threshold", "raw_leak", "raw_steepness"):
            value = torch.empty(self.num_units, device=device, dtype=dtype)
            if learnable:
                self.register_parameter(raw, nn.Parameter(value))
            else:
                self.register_buffer(raw, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the raw values with the constants of the preset. This draws no random numbers."""
        values = GATE_PRESETS[self.preset]
        threshold = values.raw_threshold if self.learnable else FIXED_RAW_THRESHOLD
        nn.init.constant_(self.raw_threshold, threshold)
        nn.init.constant_(self.raw_leak, values.raw_leak)
        nn.init.constant_(self.raw_steepness, values.raw_steepness)

    def _values(self) -> tuple[Tensor, ...]:
        """All effective values, in the order of `_effective`.

        Modules call this. Within a property `nn.Module` takes an AttributeError, such as that of
        somebody's hook, for a missing attribute, and hides it.
        """
        return (
            GATE_PRESETS[self.preset].effective_threshold(self.raw_threshold),
            torch.sigmoid(self.raw_leak),
            F.softplus(self.raw_steepness),
        )

    @property
    def threshold(self) -> Tensor:
        """The threshold as the operators take it, [num_units]; differentiable."""
        return self._values()[0]

    @property
    def leak(self) -> Tensor:
        """The leak as the operators take it, [num_units], within (0, 1); differentiable."""
        return self._values()[1]

    @property
    def steepness(self) -> Tensor:
        """The steepness as the operators take it, [num_units], above 0; differentiable."""
        return self._values()[2]

    def extra_repr(self) -> str:
        """The arguments that tell one gate from another."""
        return f"{self.num_units}, preset={self.preset!r}, learnable={self.learnable}"


class LIFGate(LIFParameters):
    """Gate activations by their magnitude: :func:`~ember_ext.lif_gate` with parameters of its own.

    Args:
        num_units: the size of the input's dimension `unit_dim`.
        preset: as for :class:`~ember_ext.nn.LIFParameters`.
        learnable: as for `LIFParameters`.
        norm: "l1" or "l2" to preserve that norm of each row (the last dimension), None for no norm.
            Default: "preset", that is "l2" for "text" and None for "released".
        unit_dim: the dimension of the input along which units lie. Default: the last.
        device: as for `LIFParameters`.
        dtype: as for `LIFParameters`.

    Shape:
        The input is [..., num_units, ...] of any floating dtype, and the output is like it.

    Raises:
        TypeError: `num_units` is not an integer, or `dtype` not a floating one.
        ValueError: an unknown preset or norm, or a negative `num_units`.

    Examples::

        >>> import torch
        >>> from ember_ext import lif_gate, nn
        >>> gate = nn.LIFGate(64)
        >>> x = torch.randn(8, 10, 64)
        >>> y = gate(x)
        >>> torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
        True

    The same by the operator::

        >>> by_hand = lif_gate(x, gate.threshold, gate.leak, gate.steepness, norm=gate.norm)
        >>> torch.equal(y, by_hand)
        True
    """

    def __init__(
        self,
        num_units: int,
        *,
        preset: PresetName = "text",
        learnable: bool = True,
        norm: Norm | Literal["preset"] | None = "preset",
        unit_dim: int = -1,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_units, preset=preset, learnable=learnable, device=device, dtype=dtype)
        self.norm: Norm | None = GATE_PRESETS[preset].norm if norm == "preset" else norm
        check_norm(f"nn.{type(self).__name__}", self.norm)
        self.unit_dim = unit_dim

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x`; see :func:`~ember_ext.lif_gate`."""
        return ops.lif_gate(x, *self._values(), norm=self.norm, unit_dim=self.unit_dim)

    def extra_repr(self) -> str:
        """The arguments that tell one gate from another."""
        return f"{super().extra_repr()}, norm={self.norm!r}, unit_dim={self.unit_dim}"
