"""The limits of `ltc_scan`, and whether its arguments fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ember_ext.ops import _checks
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights

OP = "ltc_scan"
MAX_UNFOLDS = 1 << 30
MAX_SYNAPSES = 1 << 26
"""The most synapses between units, and from inputs, that the kernels' offsets can count."""


def check_arguments(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None,
    synapses: LTCSynapses | None,
    ode_unfolds: int,
    eps: float,
    outputs: int | None,
) -> None:
    """Raise unless the arguments of `ltc_scan` but time spans and lengths fit each other."""
    _checks.check_tensor(OP, "x", x)
    if x.dim() != 3:
        _checks.fail(OP, "x", "[B, T, I]", list(x.shape))
    if not isinstance(weights, LTCWeights):
        _checks.fail(OP, "weights", "an LTCWeights", type(weights).__name__, TypeError)
    _checks.check_tensor(OP, "weights.cm", weights.cm)
    if weights.cm.dim() != 1:
        _checks.fail(OP, "weights.cm", "[S]", list(weights.cm.shape))
    batch, _, inputs = x.shape
    units = weights.cm.shape[0]
    for name, value in zip(LTCWeights._fields, weights, strict=True):
        symbols: str
        shape: tuple[int, ...]
        if name in ("cm", "gleak", "vleak"):
            symbols, shape = "[S]", (units,)
        elif name.startswith("sensory"):
            symbols, shape = "[I, S]", (inputs, units)
        else:
            symbols, shape = "[S, S]", (units, units)
        _checks.check_fits(OP, f"weights.{name}", value, symbols, shape, x)
    if h0 is not None:
        _checks.check_fits(OP, "h0", h0, "[B, S]", (batch, units), x)
    if synapses is not None:
        _check_synapses(synapses, x)
    elif max(units, inputs) * units > MAX_SYNAPSES:
        expected = f"given for a network of more than {MAX_SYNAPSES} pairs of units or inputs"
        _checks.fail(OP, "synapses", expected, None)
    if isinstance(ode_unfolds, bool) or not isinstance(ode_unfolds, int) or ode_unfolds < 1:
        _checks.fail(OP, "ode_unfolds", "an integer >= 1", repr(ode_unfolds))
    if ode_unfolds > MAX_UNFOLDS:
        _checks.fail(OP, "ode_unfolds", f"at most {MAX_UNFOLDS}", ode_unfolds)
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not 0 <= eps < math.inf:
        _checks.fail(OP, "eps", "a finite number >= 0", repr(eps))
    if outputs is not None and (not isinstance(outputs, int) or not 0 <= outputs <= units):
        _checks.fail(OP, "outputs", f"within [0, S] = [0, {units}]", repr(outputs))


def _check_synapses(synapses: Any, x: Tensor) -> None:
    if not isinstance(synapses, LTCSynapses):
        expected = "None or an LTCSynapses, from ltc_synapses"
        _checks.fail(OP, "synapses", expected, type(synapses).__name__, TypeError)
    for name, value in zip(LTCSynapses._fields, synapses, strict=True):
        argument = f"synapses.{name}"
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            _checks.fail(OP, argument, "an int64 tensor", got, TypeError)
        if value.dim() != 2 or value.shape[0] != 3:
            _checks.fail(OP, argument, "[3, E]", list(value.shape))
        if value.shape[1] > MAX_SYNAPSES:
            _checks.fail(OP, argument, f"at most {MAX_SYNAPSES} synapses", value.shape[1])
        _checks.check_device(OP, argument, value, x, "x")
