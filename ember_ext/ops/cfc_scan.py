"""A whole CfC sequence as one operator."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ember_ext import reference
from ember_ext.ops import _checks
from ember_ext.reference.cfc_scan import Affine, CfCWeights

Mode = Literal["default", "pure", "no_gate"]
Activation = Literal["lecun_tanh", "tanh", "relu", "silu", "gelu"]

_OP = "cfc_scan"
MODES = ("default", "pure", "no_gate")
ACTIVATIONS = ("lecun_tanh", "tanh", "relu", "silu", "gelu")


def cfc_scan(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None = None,
    *,
    timespans: Tensor | float = 1.0,
    lengths: Tensor | None = None,
    mode: Mode = "default",
    activation: Activation = "lecun_tanh",
    dropout_scale: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one closed-form continuous-time cell over a sequence (section 2.3 of the paper).

    With z = [x_t, h_{t-1}], through the backbone if there is one, and Δt the time span:
    `default`: h_t = tanh(ff1 z) (1 - g) + tanh(ff2 z) g with g = σ(Δt time_a z + time_b z);
    `no_gate`: h_t = tanh(ff1 z) + tanh(ff2 z) g;
    `pure`: h_t = A - A exp(-Δt (|w_tau| + |ff1 z|)) ff1 z.
    Differentiable once in every floating tensor argument but `lengths`, and through both results.
    Sums, the gate and the state between steps are kept in fp32 (fp64 for fp64 input).

    Under autocast `x` and the weight matrices are rounded to autocast's dtype, unless `x` is fp64.

    Args:
        x: input, [B, T, I], in float64, float32, bfloat16 or float16; any strides.
        weights: of a cell with H units and, where it has one, a backbone of width U; tensors of any
            floating dtype.
        h0: initial state, [B, H]. Default: zeros.
        timespans: Δt ≥ 0 and finite, in the unit of time that the weights were trained with: a
            number, a tensor of no dimension, [B, T] or [B, T, 1]. Default: 1.
        lengths: [B], integers within [0, T]: row b ends after `lengths[b]` steps. Its state is
            frozen from there on, its outputs are zero, and no gradient passes. Default: all T.
        mode: "default", "pure" or "no_gate".
        activation: of the backbone: "lecun_tanh", "tanh", "relu", "silu" or "gelu".
        dropout_scale: [B, T, layers - 1, U], multiplied onto the outputs of the backbone's second
            and later layers: 0 or 1 / (1 - p). Default: no dropout.
        chunk_size: time steps for which the backward pass keeps activations at once; those of other
            chunks are computed again, which takes about a third more time. Default: all T
            up to 1024 steps, and 128 beyond that. 0 keeps everything.

    Returns:
        The states [B, T, H], and the state [B, H] after each row's last step, both in x's dtype.

    Raises:
        TypeError: an argument is not of a supported type or dtype.
        ValueError: a shape, device, value or option does not fit. The values of time spans and
            lengths are checked on CPU tensors only: on a GPU the check would wait for the device.
    """
    _check(x, weights, h0, mode, activation, dropout_scale, chunk_size)
    _check_timespans(timespans, x)
    _check_lengths(lengths, x)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(low), _round_matrices(weights, low)
    with torch.autocast(x.device.type, enabled=False):
        return reference.cfc_scan(
            x,
            weights,
            h0,
            timespans=timespans,
            lengths=lengths,
            mode=mode,
            activation=activation,
            dropout_scale=dropout_scale,
        )


def _round_matrices(weights: CfCWeights, dtype: torch.dtype) -> CfCWeights:
    def low(affine: Affine | None) -> Affine | None:
        return None if affine is None else Affine(affine.weight.to(dtype), affine.bias)

    return weights._replace(
        ff1=Affine(weights.ff1.weight.to(dtype), weights.ff1.bias),
        ff2=low(weights.ff2),
        time_a=low(weights.time_a),
        time_b=low(weights.time_b),
        backbone=tuple(Affine(w.to(dtype), b) for w, b in weights.backbone),
    )


def _check(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None,
    mode: str,
    activation: str,
    dropout_scale: Tensor | None,
    chunk_size: int | None,
) -> None:
    _checks.check_tensor(_OP, "x", x)
    if x.dim() != 3:
        _checks.fail(_OP, "x", "[B, T, I]", list(x.shape))
    if not isinstance(weights, CfCWeights):
        _checks.fail(_OP, "weights", "a CfCWeights", type(weights).__name__, TypeError)
    if mode not in MODES:
        _checks.fail(_OP, "mode", "'default', 'pure' or 'no_gate'", repr(mode))
    if activation not in ACTIVATIONS:
        _checks.fail(_OP, "activation", f"one of {list(ACTIVATIONS)}", repr(activation))
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 0):
        _checks.fail(_OP, "chunk_size", "None or an integer >= 0", repr(chunk_size))
    batch, steps, width = x.shape
    hidden = weights.ff1.bias.shape[0]
    width += hidden
    for layer, affine in enumerate(weights.backbone):
        units = affine.bias.shape[0]
        _check_affine(f"weights.backbone[{layer}]", affine, "[U, in]", units, width, x)
        width = units
    heads: list[tuple[str, Affine | None]] = [("ff1", weights.ff1)]
    vectors: list[tuple[str, Tensor | None]] = []
    if mode == "pure":
        vectors = [("w_tau", weights.w_tau), ("amplitude", weights.amplitude)]
    else:
        heads += [(name, getattr(weights, name)) for name in ("ff2", "time_a", "time_b")]
    for name, head in heads:
        if head is None:
            _checks.fail(_OP, f"weights.{name}", f"given in mode {mode!r}", None)
        _check_affine(f"weights.{name}", head, "[H, Z]", hidden, width, x)
    for name, vector in vectors:
        if vector is None:
            _checks.fail(_OP, f"weights.{name}", f"given in mode {mode!r}", None)
        _check_fits(f"weights.{name}", vector, "[H]", (hidden,), x)
    if weights.mask is not None:
        _check_fits("weights.mask", weights.mask, "[H, Z]", (hidden, width), x)
    if h0 is not None:
        _check_fits("h0", h0, "[B, H]", (batch, hidden), x)
    if dropout_scale is not None:
        if len(weights.backbone) < 2:
            _checks.fail(_OP, "dropout_scale", "None with fewer than two backbone layers", "one")
        units = weights.backbone[0].bias.shape[0]
        shape = (batch, steps, len(weights.backbone) - 1, units)
        _check_fits("dropout_scale", dropout_scale, "[B, T, layers - 1, U]", shape, x)


def _check_fits(
    argument: str, value: Tensor, symbols: str, shape: tuple[int, ...], x: Tensor
) -> None:
    _checks.check_tensor(_OP, argument, value)
    _checks.check_shape(_OP, argument, value, symbols, shape)
    _checks.check_device(_OP, argument, value, x, "x")


def _check_affine(
    argument: str, affine: Affine, symbols: str, out: int, width: int, x: Tensor
) -> None:
    _check_fits(f"{argument}.weight", affine.weight, symbols, (out, width), x)
    _check_fits(f"{argument}.bias", affine.bias, "[out]", (out,), x)


def _check_timespans(timespans: Tensor | float, x: Tensor) -> None:
    batch, steps, _ = x.shape
    if not isinstance(timespans, Tensor):
        if isinstance(timespans, bool) or not isinstance(timespans, (int, float)):
            got = type(timespans).__name__
            _checks.fail(_OP, "timespans", "a number or a tensor", got, TypeError)
        if not (timespans >= 0 and math.isfinite(timespans)):
            _checks.fail(_OP, "timespans", "finite and >= 0", timespans)
        return
    _checks.check_tensor(_OP, "timespans", timespans)
    _checks.check_device(_OP, "timespans", timespans, x, "x")
    if timespans.shape not in ((), (batch, steps), (batch, steps, 1)):
        expected = f"a scalar, [B, T] or [B, T, 1] with [B, T] = {[batch, steps]}"
        _checks.fail(_OP, "timespans", expected, list(timespans.shape))
    if timespans.device.type == "cpu" and not torch.compiler.is_compiling():
        good = (timespans >= 0) & timespans.isfinite()
        if not bool(good.all()):
            index = (~good).nonzero()[0].tolist()
            got = f"{timespans[tuple(index)].item()} at {index}"
            _checks.fail(_OP, "timespans", "finite and >= 0", got)


def _check_lengths(lengths: Tensor | None, x: Tensor) -> None:
    if lengths is None:
        return
    batch, steps, _ = x.shape
    if not isinstance(lengths, Tensor):
        _checks.fail(_OP, "lengths", "a torch.Tensor", type(lengths).__name__, TypeError)
    if lengths.dtype not in (torch.int64, torch.int32):
        _checks.fail(_OP, "lengths", "int64 or int32", lengths.dtype, TypeError)
    _checks.check_shape(_OP, "lengths", lengths, "[B]", (batch,))
    _checks.check_device(_OP, "lengths", lengths, x, "x")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        good = (lengths >= 0) & (lengths <= steps)
        if not bool(good.all()):
            index = int((~good).nonzero()[0])
            got = f"{lengths[index].item()} at index {index}"
            _checks.fail(_OP, "lengths", f"within [0, T] = [0, {steps}]", got)
