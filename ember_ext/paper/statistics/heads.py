"""Attention heads: their roles by their entropy, and how far their gates are from open.

The paper names roles without a numerical rule; the cut-offs here are fixed before any run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.training.metrics import SUPPORT_THRESHOLD

Role = Literal["pointer", "focuser", "mixed", "gatherer"]
ROLES: tuple[Role, ...] = ("pointer", "focuser", "mixed", "gatherer")

POINTER_BELOW = 0.1
FOCUSER_BELOW = 1.0
GATHERER_ABOVE = 3.5 / 4.560
"""The share of uniform attention's entropy from which a head is a gatherer.

3.5 nats suit windows of 256, where uniform attention has 4.560. The cut-off is a share because the
scale of entropies ends at uniform attention: it is 2.98 nats for windows of 128."""

DEVIATES_ABOVE = 0.01
"""Effective threshold: |raw| > 0.1 with the released gate, which starts at 0.001."""

GateLabel = Literal["selective", "mild", "moderate", "pass-through"]


def uniform_entropy(block_size: int) -> float:
    """Mean entropy in nats of causal attention that weighs all visible tokens alike."""
    return math.lgamma(block_size + 1) / block_size


def uniform_support(block_size: int) -> float:
    """Mean support of the same attention: a query before which few tokens stand uses all."""
    return sum(n for n in range(1, block_size + 1) if 1 / n > SUPPORT_THRESHOLD) / block_size


def uniform_first_token_mass(block_size: int) -> float:
    """Mean weight of the first token in the same attention."""
    return sum(1 / n for n in range(1, block_size + 1)) / block_size


def gatherer_cut_off(block_size: int) -> float:
    """The entropy in nats above which a head gathers."""
    return GATHERER_ABOVE * uniform_entropy(block_size)


def head_role(entropy: float, block_size: int) -> Role:
    """The role of a head by its mean attention entropy in nats.

    Pointer below 0.1, focuser below 1, gatherer above 77 % of the entropy of uniform attention,
    otherwise mixed. In windows below 8 tokens that share is under 1 nat, and the lower cut-offs
    decide first.
    """
    if entropy < POINTER_BELOW:
        return "pointer"
    if entropy < FOCUSER_BELOW:
        return "focuser"
    return "gatherer" if entropy > gatherer_cut_off(block_size) else "mixed"


def head_entropies(run: RunResult) -> list[list[float]]:
    """Entropy of each head of each layer at the last evaluation of a Transformer."""
    entropies: list[list[float]] = run.evaluations[-1]["attention_entropy"]
    return entropies


def head_roles(run: RunResult) -> list[list[Role]]:
    """Role of each head of each layer at the last evaluation of a Transformer."""
    block_size = int(run.config["block_size"])
    return [[head_role(h, block_size) for h in layer] for layer in head_entropies(run)]


def role_counts(run: RunResult) -> list[Counter[Role]]:
    """Count the heads of each layer that have each role."""
    return [Counter(layer) for layer in head_roles(run)]


@dataclass(frozen=True)
class GateUnit:
    """The gate of one head or neuron, in effective parameters.

    Attributes:
        layer, index: its place.
        threshold, leak, steepness: θ, λ and k.
    """

    layer: int
    index: int
    threshold: float
    leak: float
    steepness: float

    @property
    def contrast(self) -> float:
        """g(1)/g(0): how much more a weight of 1 passes than one of 0. An open gate has 1."""
        return self._gain(1.0) / self._gain(0.0)

    @property
    def deviates(self) -> bool:
        """Whether the threshold has left its start: |θ| > 0.01."""
        return abs(self.threshold) > DEVIATES_ABOVE

    @property
    def label(self) -> GateLabel:
        """The label of the authors' gate analysis, made for the released gate.

        Selective: θ > .02 and λ < .85; mild: θ > .02; pass-through: θ < .005; moderate: between.
        """
        if self.threshold > 0.02:
            return "selective" if self.leak < 0.85 else "mild"
        return "pass-through" if self.threshold < 0.005 else "moderate"

    def _gain(self, u: float) -> float:
        x = self.steepness * (u - self.threshold)
        # The form that cannot overflow for either sign.
        fire = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
        return self.leak + (1 - self.leak) * fire


def gate_units(run: RunResult, evaluation: int = -1) -> list[GateUnit]:
    """The gates of all heads or neurons at one evaluation, by default the last; empty without."""
    units = []
    for layer, gate in enumerate(run.evaluations[evaluation]["gates"].values()):
        values = zip(gate["threshold"], gate["leak"], gate["steepness"], strict=True)
        units += [GateUnit(layer, i, *map(float, unit)) for i, unit in enumerate(values)]
    return units
