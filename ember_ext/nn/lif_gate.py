"""The LIF gate as a module, and the raw parameters that every gated module owns."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext import ops
from ember_ext.ops.lif_gate import Norm, check_norm

PresetName = Literal["seed", "released"]


@dataclass(frozen=True)
class GatePreset:
    """Initial raw values of a gate, and how a raw threshold becomes θ.

    Leak and steepness have one transform everywhere: λ = sigmoid(raw), k = softplus(raw).
    """

    threshold: float
    leak: float
    steepness: float
    threshold_scale: float
    """θ = threshold_scale · |raw|; 0 stands for θ = raw."""
    norm: Norm | None
    """The norm of each row that a gate on activations preserves."""

    def effective_threshold(self, raw: Tensor) -> Tensor:
        """θ of a raw threshold."""
        return self.threshold_scale * raw.abs() if self.threshold_scale else raw


GATE_PRESETS: dict[str, GatePreset] = {
    # The paper's text, section 2.1: θ starts at 0, λ at 0.73, and the gate preserves ‖x‖.
    "seed": GatePreset(threshold=0.0, leak=1.0, steepness=2.0, threshold_scale=0.0, norm="l2"),
    # The code behind the published numbers: θ starts at 0.001, λ at 0.881; no norm on activations.
    "released": GatePreset(threshold=0.01, leak=2.0, steepness=2.0, threshold_scale=0.1, norm=None),
}

FIXED_RAW_THRESHOLD = 1.0
"""The raw threshold of the paper's non-learnable control."""


class LIFParameters(nn.Module):
    """Raw threshold, leak and steepness of `num_units` gates, and their transforms.

    Args:
        num_units: how many gates; one (θ, λ, k) each.
        preset: "seed" for the paper's text or "released" for the code behind its numbers (see
            `GATE_PRESETS`). Default: "seed".
        learnable: with False the raw values are buffers, and the raw threshold is 1: the paper's
            fixed control. Default: True.

    Attributes:
        threshold, leak, steepness: raw values, [num_units], float32.

    Raises:
        TypeError: `num_units` is not an integer.
        ValueError: an unknown preset, or a negative `num_units`.
    """

    threshold: Tensor
    leak: Tensor
    steepness: Tensor

    def __init__(
        self, num_units: int, *, preset: PresetName = "seed", learnable: bool = True
    ) -> None:
        super().__init__()
        name = f"ember_ext.nn.{type(self).__name__}"
        if preset not in GATE_PRESETS:
            raise ValueError(f"{name}: preset must be one of {list(GATE_PRESETS)}, got {preset!r}")
        try:
            num_units = operator.index(num_units)
        except TypeError:
            raise TypeError(f"{name}: num_units must be an integer, got {num_units!r}") from None
        if num_units < 0:
            raise ValueError(f"{name}: num_units must be >= 0, got {num_units}")
        self.num_units = num_units
        self.preset = preset
        self.learnable = learnable
        for raw in ("threshold", "leak", "steepness"):
            value = torch.empty(num_units)
            if learnable:
                self.register_parameter(raw, nn.Parameter(value))
            else:
                self.register_buffer(raw, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the raw values with the preset's constants; draws no random numbers."""
        values = GATE_PRESETS[self.preset]
        threshold = values.threshold if self.learnable else FIXED_RAW_THRESHOLD
        nn.init.constant_(self.threshold, threshold)
        nn.init.constant_(self.leak, values.leak)
        nn.init.constant_(self.steepness, values.steepness)

    def effective(self) -> tuple[Tensor, Tensor, Tensor]:
        """θ, λ and k, [num_units] each, as the operators take them."""
        return (
            GATE_PRESETS[self.preset].effective_threshold(self.threshold),
            torch.sigmoid(self.leak),
            F.softplus(self.steepness),
        )

    def extra_repr(self) -> str:
        """The arguments that tell one gate from another."""
        return f"{self.num_units}, preset={self.preset!r}, learnable={self.learnable}"


class LIFGate(LIFParameters):
    """Gate activations by their magnitude: `ember_ext.ops.lif_gate` with its own parameters.

    Args:
        num_units: the size of the input's dimension `unit_dim`.
        preset: as `LIFParameters`.
        learnable: as `LIFParameters`.
        norm: "l1" or "l2" to preserve that norm of each row (the last dimension), None for no norm.
            Default: "preset", that is "l2" for "seed" and None for "released".
        unit_dim: the dimension of the input along which units lie. Default: the last.

    Shapes: input [..., num_units, ...] of any floating dtype, output alike.

    Raises:
        TypeError: `num_units` is not an integer.
        ValueError: an unknown preset or norm, or a negative `num_units`.
    """

    def __init__(
        self,
        num_units: int,
        *,
        preset: PresetName = "seed",
        learnable: bool = True,
        norm: Norm | Literal["preset"] | None = "preset",
        unit_dim: int = -1,
    ) -> None:
        super().__init__(num_units, preset=preset, learnable=learnable)
        self.norm: Norm | None = GATE_PRESETS[preset].norm if norm == "preset" else norm
        check_norm(f"nn.{type(self).__name__}", self.norm)
        self.unit_dim = unit_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated `x`; see `ember_ext.ops.lif_gate`."""
        return ops.lif_gate(x, *self.effective(), norm=self.norm, unit_dim=self.unit_dim)

    def extra_repr(self) -> str:
        """The arguments that tell one gate from another."""
        return f"{super().extra_repr()}, norm={self.norm!r}, unit_dim={self.unit_dim}"
