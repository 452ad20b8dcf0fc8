"""Every module of the package, small, as tests that go through all of them take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ncps.wirings import AutoNCP
from torch import Tensor

from ember_ext import nn
from ember_ext.models._base import MLP
from ember_ext.nn._lean import Dropout

FEATURES = 6

MODULES: dict[str, Callable[[float], torch.nn.Module]] = {
    "gate": lambda p: nn.LIFGate(FEATURES),
    "gate without norm": lambda p: nn.LIFGate(FEATURES, preset="released"),
    "attention": lambda p: nn.LIFSelfAttention(FEATURES, 2, dropout=p),
    "refractory causal": lambda p: nn.LIFSelfAttention(FEATURES, 2, dropout=p, refractory="causal"),
    "refractory look-ahead": lambda p: nn.LIFSelfAttention(
        FEATURES, 2, dropout=p, refractory="look_ahead"
    ),
    "dense cfc": lambda p: nn.CfC(
        FEATURES, FEATURES, backbone_units=7, backbone_layers=2, backbone_dropout=p
    ),
    "chunked cfc": lambda p: nn.CfC(FEATURES, FEATURES, mode="no_gate", chunk_size=2),
    "pure cfc": lambda p: nn.CfC(FEATURES, FEATURES, backbone_units=7, mode="pure"),
    "wired cfc": lambda p: nn.CfC(FEATURES, AutoNCP(12, FEATURES, seed=1)),
    "mixed cfc": lambda p: nn.CfC(FEATURES, FEATURES, backbone_units=7, mixed_memory=True),
    "ltc": lambda p: nn.LTC(FEATURES, FEATURES, ode_unfolds=2),
    "wired ltc": lambda p: nn.LTC(FEATURES, AutoNCP(12, FEATURES, seed=1), ode_unfolds=2),
    "mlp": lambda p: MLP(FEATURES, p, True),
    "dropout": lambda p: Dropout(p),
}
"""Builders by name; each takes the dropout rate, and its module maps [B, T, FEATURES] to that."""

every_module = pytest.mark.parametrize("name", list(MODULES))


class First(torch.nn.Module):
    """A module's output alone, without states, caches or loads."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Tensor:
        y = self.module(*inputs)
        return y[0] if isinstance(y, tuple) else y


class WithLoad(nn.LIFSelfAttention):
    """Attention that returns its load too, as the layers of a stack do."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """Return the output, and the load if there is one."""
        out: Any = super().forward(x, need_load=True)
        return out.output, out.load


def build(name: str, dropout: float = 0.0) -> First:
    """A module of `MODULES`, the same weights each time."""
    torch.manual_seed(0)
    return First(MODULES[name](dropout))


def trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that require gradients."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
