"""The options of `cfc_scan`, and whether its arguments fit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ember_ext.ops import _checks, _sequence
from ember_ext.reference.cfc_scan import Affine, CfCWeights

Mode = Literal["default", "pure", "no_gate"]
Activation = Literal["lecun_tanh", "tanh", "relu", "silu", "gelu"]

OP = "cfc_scan"
MODES = ("default", "pure", "no_gate")
ACTIVATIONS = ("lecun_tanh", "tanh", "relu", "silu", "gelu")
MAX_CUDA_LAYERS = 15
"""The deepest backbone that the CUDA kernels take."""


def check_arguments(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None,
    mode: str,
    activation: str,
    dropout_scale: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raise unless the arguments of `cfc_scan` but time spans and lengths fit each other."""
    _checks.check_tensor(OP, "x", x)
    if x.dim() != 3:
        _checks.fail(OP, "x", "[B, T, I]", list(x.shape))
    if not isinstance(weights, CfCWeights):
        _checks.fail(OP, "weights", "a CfCWeights", type(weights).__name__, TypeError)
    if mode not in MODES:
        _checks.fail(OP, "mode", "'default', 'pure' or 'no_gate'", repr(mode))
    if activation not in ACTIVATIONS:
        _checks.fail(OP, "activation", f"one of {list(ACTIVATIONS)}", repr(activation))
    _sequence.check_chunk_size(OP, chunk_size)
    batch, steps, width = x.shape
    hidden = _count_outputs("weights.ff1", weights.ff1)
    width += hidden
    layers = len(weights.backbone)
    if x.device.type == "cuda" and layers > MAX_CUDA_LAYERS:
        _checks.fail(OP, "weights.backbone", f"at most {MAX_CUDA_LAYERS} layers on a GPU", layers)
    for layer, affine in enumerate(weights.backbone):
        units = _count_outputs(f"weights.backbone[{layer}]", affine)
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
            _checks.fail(OP, f"weights.{name}", f"given in mode {mode!r}", None)
        _check_affine(f"weights.{name}", head, "[H, Z]", hidden, width, x)
    for name, vector in vectors:
        if vector is None:
            _checks.fail(OP, f"weights.{name}", f"given in mode {mode!r}", None)
        _checks.check_fits(OP, f"weights.{name}", vector, "[H]", (hidden,), x)
    if weights.mask is not None:
        _checks.check_fits(OP, "weights.mask", weights.mask, "[H, Z]", (hidden, width), x)
    if h0 is not None:
        _checks.check_fits(OP, "h0", h0, "[B, H]", (batch, hidden), x)
    if dropout_scale is not None:
        if len(weights.backbone) < 2:
            _checks.fail(OP, "dropout_scale", "None with fewer than two backbone layers", "one")
        widths = [affine.bias.shape[0] for affine in weights.backbone]
        if len(set(widths)) > 1:
            _checks.fail(OP, "weights.backbone", "of one width U with dropout_scale", widths)
        units = widths[0]
        shape = (batch, steps, len(weights.backbone) - 1, units)
        _checks.check_fits(OP, "dropout_scale", dropout_scale, "[B, T, layers - 1, U]", shape, x)
        if dropout_scale.requires_grad and torch.is_grad_enabled():
            _checks.fail(OP, "dropout_scale", "detached, as it gets no gradient", "requires_grad")


def _check_affine(
    argument: str, affine: Affine, symbols: str, out: int, width: int, x: Tensor
) -> None:
    _count_outputs(argument, affine)
    _checks.check_fits(OP, f"{argument}.weight", affine.weight, symbols, (out, width), x)
    _checks.check_fits(OP, f"{argument}.bias", affine.bias, "[out]", (out,), x)


def _count_outputs(argument: str, affine: object) -> int:
    if not isinstance(affine, Affine):
        _checks.fail(OP, argument, "an Affine", type(affine).__name__, TypeError)
    _checks.check_tensor(OP, f"{argument}.bias", affine.bias)
    if affine.bias.dim() != 1:
        _checks.fail(OP, f"{argument}.bias", "[out]", list(affine.bias.shape))
    return affine.bias.shape[0]
