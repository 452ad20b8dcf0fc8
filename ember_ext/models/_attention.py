"""LIF attention over a cache, with and without refractory thresholds, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ember_ext.nn.lif_gate import LIFParameters, PresetName

EPS = 1e-8


class RefractoryParameters(LIFParameters):
    """LIF parameters whose threshold rises with the attention that a key has already drawn.

    θ + softplus(within) · load + sigmoid(across) · (the previous layer's load)

    Args:
        num_units: number of heads.
        preset: as `LIFParameters`.
    """

    def __init__(self, num_units: int, *, preset: PresetName = "seed") -> None:
        super().__init__(num_units, preset=preset)
        self.within = nn.Parameter(torch.full((num_units,), -2.0))
        self.across = nn.Parameter(torch.full((num_units,), -2.0))


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Causal softmax of query [B, H, T, D] and key [B, H, S + T, D]: [B, H, T, S + T].

    The last query stands at the last key.
    """
    queries, keys = query.shape[2], key.shape[2]
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    visible = scores.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def gate_probabilities(
    p: Tensor,
    gate: LIFParameters,
    previous_load: Tensor,
    past_loads: tuple[Tensor, Tensor] | None,
    mode: str,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """LIF gate on attention probabilities, renormalised so that rows sum to 1.

    Args:
        p: [B, H, T, S + T].
        gate: one (θ, λ, k) per head; with `RefractoryParameters` thresholds follow loads.
        previous_load: what the previous layer returned, broadcastable to [B, T, S + T].
        past_loads: sums over the S queries before these: `LayerCache.loads`.
        mode: "causal" or "paper"; see `EmberConfig.refractory_mode`.

    Returns:
        The weights, like p; the load for the next layer; with `RefractoryParameters` in causal
        mode, the sums with these queries added.
    """
    threshold, leak, steepness = (v.view(-1, 1, 1) for v in gate.effective())
    refractory = gate if isinstance(gate, RefractoryParameters) else None
    past_p, past_w = (None, None) if past_loads is None else past_loads
    if refractory is not None:
        load, sum_p = _mean_over_queries(p, past_p, mode)
        within = F.softplus(refractory.within).view(-1, 1, 1)
        across = torch.sigmoid(refractory.across).view(-1, 1, 1)
        threshold = threshold + within * load + across * previous_load.unsqueeze(1)
    fire = torch.sigmoid(steepness * (p - threshold))
    w = p * (fire + leak * (1 - fire))
    w = w / (w.sum(-1, keepdim=True) + EPS)
    if refractory is None:
        return w, previous_load, None
    next_load, sum_w = _mean_over_queries(w.mean(1), past_w, mode)
    return w, next_load, None if mode == "paper" else (sum_p, sum_w)


def _mean_over_queries(weights: Tensor, past: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """Mean of `weights` [..., T, S + T] over all queries, or at each over those up to it; the sum.

    `past` [..., S] is the sum over the S queries before these.
    """
    if mode == "paper":
        return weights.mean(-2, keepdim=True), weights.sum(-2)
    queries, keys = weights.shape[-2:]
    sums = weights.cumsum(-2)
    if past is not None:
        sums = sums + F.pad(past, (0, queries)).unsqueeze(-2)
    counts = torch.arange(keys - queries + 1, keys + 1, device=sums.device)
    return sums / counts.unsqueeze(-1), sums[..., -1, :]
