"""A whole CfC sequence as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _cfc_registration, _sequence
from ember_ext.ops._autocast import autocast_dtype, without_autocast
from ember_ext.ops._cfc_checks import OP, Activation, Mode, check_arguments
from ember_ext.ops._cfc_packing import raw_arguments, round_matrices
from ember_ext.reference.cfc_scan import CfCWeights


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
    r"""Run one closed-form continuous-time (CfC) cell over a sequence (section 2.3 of the paper).

    With :math:`z = [x_t, h_{t-1}]`, through the backbone if there is one, the next state depends on
    the mode:

    .. math::

        \text{default:} \quad h_t &= \tanh(\mathrm{ff1}\,z)\,(1 - g) + \tanh(\mathrm{ff2}\,z)\,g, \\
        \text{no\_gate:} \quad h_t &= \tanh(\mathrm{ff1}\,z) + \tanh(\mathrm{ff2}\,z)\,g, \\
        \text{pure:} \quad h_t &= A - A\,e^{-\Delta t\,(\lvert \mathrm{w\_tau} \rvert
            + \lvert \mathrm{ff1}\,z \rvert)}\,\mathrm{ff1}\,z,

    where the gate :math:`g = \sigma(\Delta t\,\mathrm{time\_a}\,z + \mathrm{time\_b}\,z)` moves
    with the time span :math:`\Delta t`, and :math:`A` is the amplitude.

    The operator is differentiable in `x`, `h0`, time spans and weights, and through both results.
    Sums, the gate and the state between steps are kept in fp32 (fp64 for fp64 input). Under
    autocast `x` and the weight matrices are rounded to autocast's dtype, unless `x` is fp64.

    Args:
        x: input, [B, T, I], in float64, float32, bfloat16 or float16; any strides.
        weights: an :class:`~ember_ext.ops.CfCWeights` of a cell with H units and, where it has one,
            a backbone of width U, which on a GPU has at most 15 layers; tensors of any floating
            dtype.
        h0: initial state, [B, H]. Default: zeros.
        timespans: :math:`\Delta t \ge 0` and finite, in the unit of time that the weights were
            trained with: a number, or a tensor of a floating or integer dtype, which has no
            dimension, or is [B, T] or [B, T, 1]. Default: 1.
        lengths: [B], integers within [0, T]: row b ends after `lengths[b]` steps. Its state is
            frozen from there on, its outputs are zero, and no gradient passes. The other arguments
            may hold anything there, NaN too. Default: all T.
        mode: "default", "pure" or "no_gate".
        activation: of the backbone: "lecun_tanh" (the default), "tanh", "relu", "silu" or "gelu".
        dropout_scale: [B, T, layers - 1, U], multiplied onto the outputs of the backbone's second
            and later layers: 0 or 1 / (1 - p). It is not differentiable. Default: no dropout.
        chunk_size: time steps for which the backward pass keeps activations at once. It computes
            those of other chunks again, which saves memory and costs time. 0 keeps everything.
            Default: all T up to 1024 steps, and 128 beyond that.

    Returns:
        The states [B, T, H], and the state [B, H] after each row's last step, both in the dtype of
        `x`.

    Raises:
        TypeError: an argument is not of a supported type or dtype.
        ValueError: a shape, device, value or option does not fit. The values of time spans and
            lengths are checked on CPU tensors only, because the check would wait for a GPU.

    Examples::

        >>> import torch
        >>> from ember_ext import cfc_scan
        >>> from ember_ext.ops import Affine, CfCWeights
        >>> inputs, units = 3, 4
        >>> def head():
        ...     return Affine(torch.randn(units, inputs + units), torch.zeros(units))
        >>> weights = CfCWeights(ff1=head(), ff2=head(), time_a=head(), time_b=head())
        >>> x, spans = torch.randn(2, 7, inputs), torch.rand(2, 7)
        >>> y, h = cfc_scan(x, weights, timespans=spans, lengths=torch.tensor([7, 5]))
        >>> y.shape, h.shape
        (torch.Size([2, 7, 4]), torch.Size([2, 4]))
        >>> torch.equal(h[1], y[1, 4])  # the second row ends after five steps
        True
    """
    check_arguments(x, weights, h0, mode, activation, dropout_scale, chunk_size)
    timespans = _sequence.as_timespans(OP, "timespans", timespans, x.dtype)
    lengths = _sequence.as_lengths(OP, lengths, x)
    _sequence.check_timespans(OP, timespans, x, lengths=lengths)
    low = autocast_dtype(x.device.type)
    if low is not None and x.dtype != torch.float64:
        x, weights = x.to(low), round_matrices(weights, low)
    with without_autocast(x.device.type):
        if not _native.runs(x.device.type, OP):
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
        return _native_scan(
            chunk_size, x, weights, h0, timespans, lengths, mode, activation, dropout_scale
        )


def _native_scan(chunk_size: int | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    x, state, maps, spans, _, _, decay, *_ = raw = raw_arguments(*arguments)
    differentiable = [x, state, *maps, spans, decay]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        chunk = _sequence.chunk_to_keep(chunk_size, x.shape[1])
        if torch.compiler.is_compiling():
            y, h_last, _ = torch.ops.ember_ext.cfc_scan.default(*raw, chunk)
        else:
            # The list of weights at the end, as autograd takes no list.
            y, h_last = _cfc_registration.CfCScan.apply(x, state, *raw[3:], chunk, *maps)  # type: ignore[no-untyped-call]
    else:
        y, h_last, _ = torch.ops.ember_ext.cfc_scan_forward.default(*raw, -1)
    return y, h_last.to(x.dtype)


if _native.has("cpu"):
    _cfc_registration.register()
