"""The paper's measures of its models: attention entropy, fire rate, neuron entropy.

The definitions are those of the authors' analysis code, except that models without a gate are
measured through a virtual one, a gate at its initial values: the authors set their fire rate to 1
and their entropy to 0 by definition, which makes any comparison with them meaningless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ember_ext.models import Ember, LiquidEmber, MembraneGate
from ember_ext.nn.lif_gate import GateParameters, LIFParameters, PresetName
from ember_ext.reference.lif_gate import fire_mask

HISTOGRAM_BINS = 10

METRIC_WINDOWS = 16
"""Validation windows that entropies and fire rates are measured on.

The authors' attention entropies are of 16 windows as well, their fire rates of 320."""

SUPPORT_THRESHOLD = 0.01
"""The weight above which a key counts as attended to."""

ALWAYS_ON_ABOVE = 0.95
"""The fire rate above which a neuron counts as always on."""

SELECTIVE_BELOW = 0.5
"""The fire rate below which a neuron counts as selective."""


def attention_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of the attention of each head.

    Args:
        weights: rows that sum to 1, [B, H, T, T].

    Returns:
        -Σ w ln w in nats, averaged over batch and all queries, [H]. Over a uniform causal window
        of T = 256 it is 4.560.
    """
    return -(weights * weights.clamp_min(1e-10).log()).sum(-1).mean((0, 2))


def attention_support(weights: Tensor) -> Tensor:
    """Count the keys that matter to a query, for each head.

    Args:
        weights: rows that sum to 1, [B, H, T, T].

    Returns:
        The number of weights above 0.01, averaged over batch and all queries, [H]. Over a uniform
        causal window of T = 256 it is 19.34.
    """
    return (weights > SUPPORT_THRESHOLD).sum(-1).float().mean((0, 2))


def first_token_mass(weights: Tensor) -> Tensor:
    """Measure the attention that the first token draws, for each head.

    Args:
        weights: rows that sum to 1, [B, H, T, T].

    Returns:
        The weight of key 0, averaged over batch and all queries, [H]. Over a uniform causal window
        of T = 256 it is 0.0239.
    """
    return weights[..., 0].mean((0, 2))


def fire_rate(firing: Tensor) -> Tensor:
    """Measure how often each neuron fires.

    Args:
        firing: `f = σ(k (|x| - θ))` of each neuron, [..., N].

    Returns:
        The fraction with `f > 1/2`, that is with `|x| > θ`, [N].
    """
    return (firing > 0.5).flatten(0, -2).float().mean(0)


def neuron_entropy(firing: Tensor) -> Tensor:
    """Measure how widely each neuron's firing varies.

    Args:
        firing: f of each neuron, [..., N].

    Returns:
        Entropy in nats of the histogram of f in ten equal bins of [0, 1], [N]; at most 2.303.
    """
    bins = (firing.flatten(0, -2) * HISTOGRAM_BINS).long().clamp_max(HISTOGRAM_BINS - 1)
    shares = torch.stack([(bins == i).float().mean(0) for i in range(HISTOGRAM_BINS)], -1)
    return -(shares * shares.clamp_min(1e-10).log()).sum(-1)


@torch.no_grad()
def collect_metrics(
    model: Ember | LiquidEmber, windows: Tensor, gate_preset: PresetName
) -> dict[str, Any]:
    """Measure every layer of a model on a few windows of text.

    Nothing of this is computed in training.

    Args:
        model: in evaluation mode.
        windows: tokens [B, T], int64, on the model's device.
        gate_preset: the virtual gate's initial values.

    Returns:
        A dictionary. Its "gates" has for each gate, by its name, the effective "threshold", "leak"
        and "steepness" of each head or neuron, and with refractory thresholds or persistent heads
        also the two couplings. A model with membranes has "membranes", by name, too, each with a
        "leak", a "threshold" and a "steepness" of one value.

        A Transformer has "attention_entropy", "attention_support" and "first_token_mass", for each
        layer a list with one value for each head.

        A CfC has one value for each layer. "fire_rate" and "neuron_entropy" are means over the
        neurons, "always_on" and "selective" the shares of neurons with a fire rate above 0.95 and
        below 0.5. All four are measured through the model's own gates, and are None without gates.
        "virtual_fire_rate" and so on are measured through the virtual gate.
    """
    parameters = {"gates": {name: _effective(gate) for name, gate in model.gates().items()}}
    membranes = {
        name: _effective(gate)
        for name, gate in model.named_modules()
        if isinstance(gate, MembraneGate)
    }
    if membranes:
        parameters["membranes"] = membranes
    if isinstance(model, Ember):
        measures = (attention_entropy, attention_support, first_token_mass)
        # One window and layer at a time: all weights would take far more than a training step.
        by_window = [
            torch.stack([torch.stack([measure(w) for measure in measures])
                         for w in model.attention_weights(window)])
            for window in windows.split(1)
        ]  # fmt: skip
        by_measure = torch.stack(by_window).mean(0).unbind(1)  # [layer, head] each
        names = (measure.__name__ for measure in measures)
        values = (value.tolist() for value in by_measure)
        return {**parameters, **dict(zip(names, values, strict=True))}
    virtual = LIFParameters(model.config.n_embd, preset=gate_preset).to(windows.device)
    modules = [block.get_submodule("gate") for block in model.blocks]
    firing: list[dict[str, float | None]] = []
    for module, (x,) in zip(modules, _inputs(model, modules, windows), strict=True):
        through_virtual = _firing(x, virtual)
        own: Mapping[str, float | None] = dict.fromkeys(through_virtual)
        if isinstance(module, LIFParameters):
            own = _firing(x, module)
        firing.append({**own, **{f"virtual_{name}": v for name, v in through_virtual.items()}})
    return {**parameters, **{name: [layer[name] for layer in firing] for name in firing[0]}}


def _effective(gate: GateParameters) -> dict[str, list[float]]:
    """The effective values of a gate, by their names."""
    return {name: getattr(gate, name).tolist() for name in gate._effective}


def _firing(x: Tensor, gate: LIFParameters) -> dict[str, float]:
    """Measure the neurons of x [B, T, N] behind a gate, as means over neurons."""
    firing = fire_mask(x.abs(), gate.threshold, gate.steepness)
    rate = fire_rate(firing)
    by_neuron = {
        "fire_rate": rate,
        "neuron_entropy": neuron_entropy(firing),
        "always_on": (rate > ALWAYS_ON_ABOVE).float(),
        "selective": (rate < SELECTIVE_BELOW).float(),
    }
    return {name: float(values.mean()) for name, values in by_neuron.items()}


def _inputs(
    model: nn.Module, modules: Iterable[nn.Module], windows: Tensor
) -> list[tuple[Any, ...]]:
    """The positional arguments that each of `modules` receives in one forward pass."""
    caught: list[tuple[Any, ...]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
        for module in modules
    ]
    try:
        model(windows)
    finally:
        for hook in hooks:
            hook.remove()
    return caught
