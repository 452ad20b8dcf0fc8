"""A classifier of sequences: layers of CfC, LTC, GRU or LSTM, with or without LIF gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ember_ext.nn import LTC, CfC, LIFGate

CellName = Literal["cfc", "cfc-mixed", "ltc", "gru", "lstm"]
Pooling = Literal["last", "mean"]

CONTINUOUS: tuple[CellName, ...] = ("cfc", "cfc-mixed", "ltc")
"""The cells that take time spans. The others get them as one more channel."""

LEAST_SPAN = 1e-6
"""An LTC takes time spans above 0 only, and two events may come at one time."""


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes and variant of a :class:`SequenceClassifier`.

    Attributes:
        channels: of the series.
        classes: how many there are.
        cell: "cfc", "cfc-mixed" for a CfC with mixed memory, "ltc", "gru" or "lstm".
        units: of each layer.
        layers: how many.
        backbone_units: of each CfC.
        activation: of each CfC's backbone.
        gate: whether a LIF gate with one threshold, leak and steepness a unit follows each layer.
        pooling: "last" classifies by the last step, "mean" by the mean over all steps.
        dropout: rate after the pooling.
    """

    channels: int
    classes: int
    cell: CellName = "cfc"
    units: int = 64
    layers: int = 1
    backbone_units: int = 64
    activation: str = "lecun_tanh"
    gate: bool = False
    pooling: Pooling = "mean"
    dropout: float = 0.0


class SequenceClassifier(nn.Module):
    """Classifies series of different lengths that were sampled at irregular times.

    Args:
        config: sizes and variant. Models that are built with the same random seed have equal
            weights with and without gates.

    Examples::

        >>> import torch
        >>> from ember_ext.paper.sequences import ClassifierConfig, SequenceClassifier
        >>> model = SequenceClassifier(ClassifierConfig(channels=3, classes=2, gate=True))
        >>> x, timespans = torch.randn(4, 10, 3), torch.rand(4, 10)
        >>> model(x, timespans, torch.tensor([10, 3, 7, 1])).shape
        torch.Size([4, 2])
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers, gates, inputs = [], [], config.channels
        for _ in range(config.layers):
            layers.append(_layer(config, inputs))
            # Gates draw no random numbers, so all other weights are those of a model without gates.
            gates.append(LIFGate(config.units) if config.gate else nn.Identity())
            inputs = config.units
        self.layers = nn.ModuleList(layers)
        self.gates = nn.ModuleList(gates)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.units, config.classes)

    def forward(self, x: Tensor, timespans: Tensor, lengths: Tensor) -> Tensor:
        """Map series [B, T, C], time spans [B, T] and lengths [B] to logits [B, classes].

        What lies beyond the end of a series must be finite, and has no influence.
        """
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = gate(self._run(layer, x, timespans, lengths))
        if self.config.pooling == "last":
            pooled = x[torch.arange(len(x), device=x.device), lengths - 1]
        else:
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            pooled = (x * valid[..., None]).sum(1) / lengths[:, None]
        logits: Tensor = self.head(self.drop(pooled))
        return logits

    def _run(self, layer: Any, x: Tensor, timespans: Tensor, lengths: Tensor) -> Tensor:
        if self.config.cell not in CONTINUOUS:
            y: Tensor = layer(torch.cat([x, timespans[..., None]], 2))[0]
            return y
        if self.config.cell == "ltc":
            timespans = timespans.clamp(min=LEAST_SPAN)
        y = layer(x, timespans=timespans, lengths=lengths)[0]
        return y


def _layer(config: ClassifierConfig, inputs: int) -> nn.Module:
    units = config.units
    if config.cell == "ltc":
        return LTC(inputs, units)
    if config.cell in CONTINUOUS:
        mixed = config.cell == "cfc-mixed"
        return CfC(
            inputs,
            units,
            mixed_memory=mixed,
            activation=config.activation,
            backbone_units=config.backbone_units,
        )
    kind = nn.GRU if config.cell == "gru" else nn.LSTM
    return kind(inputs + 1, units, batch_first=True)
