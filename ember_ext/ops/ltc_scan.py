"""A whole LTC sequence as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _checks, _ltc_registration, _sequence
from ember_ext.ops._autocast import without_autocast
from ember_ext.ops._ltc_checks import OP, check_arguments
from ember_ext.ops._ltc_packing import raw_arguments
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights, list_synapses

MAX_KEPT = 1 << 27
"""The most numbers, of all states after solver steps, that are kept by default."""
DEFAULT_CHUNK = 64


def ltc_synapses(mask: Tensor, sensory_mask: Tensor) -> LTCSynapses:
    """List the synapses of a liquid time-constant network, for :func:`~ember_ext.ltc_scan`.

    Args:
        mask: [S, S], of any dtype: 1 where unit i has a synapse to unit j, else 0. ncps calls it
            `sparsity_mask`.
        sensory_mask: [I, S]: the same of inputs and units; `sensory_sparsity_mask` in ncps.

    Returns:
        The lists, on the device of the masks. They do not follow later changes of the masks.

    Raises:
        TypeError: a mask is not a tensor.
        ValueError: a shape or device does not fit, or an entry is neither 0 nor 1.

    Examples::

        >>> import torch
        >>> from ember_ext import ltc_synapses
        >>> synapses = ltc_synapses(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1, 0]]))
        >>> synapses.recurrent[:2]  # sources and targets
        tensor([[1, 0],
                [0, 1]])
    """
    for argument, value in (("mask", mask), ("sensory_mask", sensory_mask)):
        if not isinstance(value, Tensor):
            _checks.fail(
                "ltc_synapses", argument, "a torch.Tensor", type(value).__name__, TypeError
            )
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        _checks.fail("ltc_synapses", "mask", "[S, S]", list(mask.shape))
    if sensory_mask.dim() != 2 or sensory_mask.shape[1] != mask.shape[1]:
        expected = f"[I, S] with S = {mask.shape[1]}"
        _checks.fail("ltc_synapses", "sensory_mask", expected, list(sensory_mask.shape))
    _checks.check_device("ltc_synapses", "sensory_mask", sensory_mask, mask, "mask")
    for argument, value in (("mask", mask), ("sensory_mask", sensory_mask)):
        bad = (value != 0) & (value != 1)
        if bool(bad.any()):
            index = bad.nonzero()[0].tolist()
            got = f"{value[tuple(index)].item()} at {index}"
            _checks.fail("ltc_synapses", argument, "of zeros and ones", got)
    with torch.no_grad():
        return LTCSynapses(list_synapses(mask), list_synapses(sensory_mask))


def ltc_scan(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None = None,
    *,
    synapses: LTCSynapses | None = None,
    timespans: Tensor | float = 1.0,
    lengths: Tensor | None = None,
    ode_unfolds: int = 6,
    eps: float = 1e-8,
    outputs: int | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Run a liquid time-constant (LTC) network over a sequence, as `ncps.torch.LTC` does.

    Each time step takes `ode_unfolds` solver steps, beginning with :math:`v = h_{t-1}`. A solver
    step is

    .. math::

        v_j \leftarrow \frac{c_j v_j + \mathrm{gleak}_j\,\mathrm{vleak}_j
            + \sum_i a_{ij}\,\mathrm{erev}_{ij} + \sum_i A_{ij}\,\mathrm{sensory\_erev}_{ij}}
            {c_j + \mathrm{gleak}_j + \sum_i a_{ij} + \sum_i A_{ij} + \mathrm{eps}}

    with :math:`c = \mathrm{cm} / (\Delta t / \mathrm{ode\_unfolds})`. The synapses between units
    open with :math:`a_{ij} = w_{ij}\,\sigma(\mathrm{sigma}_{ij} (v_i - \mathrm{mu}_{ij}))`, and
    those from the inputs :math:`x_t` likewise with :math:`A_{ij}`. The last :math:`v` is
    :math:`h_t`.

    The operator is differentiable in `x`, `h0`, time spans and weights, and through both results.
    The weights of a synapse that is not listed have no influence, and a gradient of exactly 0.
    Everything is computed in fp32 (fp64 for fp64 input), under autocast too, and the results are
    rounded once. A denominator may vanish where weights are negative; results are infinite or NaN
    then.

    Args:
        x: input, [B, T, I], in float64, float32, bfloat16 or float16; any strides.
        weights: an :class:`~ember_ext.ops.LTCWeights` of a network with S units; tensors of any
            floating dtype.
        h0: initial state, [B, S]. Default: zeros.
        synapses: those that exist, from :func:`~ember_ext.ltc_synapses`. Default: all.
        timespans: :math:`\Delta t > 0` and finite, in the unit of time that the weights were
            trained with: a number, or a tensor of a floating or integer dtype, which has no
            dimension, or is [B, T] or [B, T, 1]. Default: 1.
        lengths: [B], integers within [0, T]: row b ends after `lengths[b]` steps. Its state is
            frozen from there on, its outputs are zero, and no gradient passes. Input and time spans
            may hold anything there, NaN too. Default: all T.
        ode_unfolds: solver steps per time step, from 1 to 2^30. Default: 6.
        eps: added to the denominator, at least 0. Default: 1e-8.
        outputs: how many units' states to return, beginning with the first. Default: all S.
        chunk_size: time steps for which the backward pass keeps the states of all solver steps at
            once. It computes those of other chunks again, from the states at the chunks' borders. 0
            keeps everything, which is B T S `ode_unfolds` numbers. Default: 0 up to 128 million
            numbers, and 64 beyond that.

    Returns:
        The states [B, T, outputs], and the state [B, S] after each row's last step, both in the
        dtype of `x`.

    Raises:
        TypeError: an argument is not of a supported type or dtype.
        ValueError: a shape, device, value or option does not fit. The values of time spans and
            lengths are checked on CPU tensors only, because the check would wait for a GPU.

    Examples::

        >>> import torch
        >>> from ember_ext import ltc_scan
        >>> from ember_ext.ops import LTCWeights
        >>> inputs, units = 3, 4
        >>> weights = LTCWeights(
        ...     cm=torch.full((units,), 0.5),
        ...     gleak=torch.rand(units),
        ...     vleak=torch.zeros(units),
        ...     w=torch.rand(units, units),
        ...     mu=torch.rand(units, units),
        ...     sigma=torch.full((units, units), 5.0),
        ...     erev=torch.randn(units, units).sign(),
        ...     sensory_w=torch.rand(inputs, units),
        ...     sensory_mu=torch.rand(inputs, units),
        ...     sensory_sigma=torch.full((inputs, units), 5.0),
        ...     sensory_erev=torch.randn(inputs, units).sign(),
        ... )
        >>> x, spans = torch.randn(2, 7, inputs), 0.5 + torch.rand(2, 7)
        >>> y, h = ltc_scan(x, weights, timespans=spans)
        >>> y.shape, torch.equal(y[:, -1], h)
        (torch.Size([2, 7, 4]), True)
    """
    check_arguments(x, weights, h0, synapses, ode_unfolds, eps, outputs)
    _sequence.check_chunk_size(OP, chunk_size)
    timespans = _sequence.as_timespans(OP, "timespans", timespans, x.dtype)
    lengths = _sequence.as_lengths(OP, lengths, x)
    _sequence.check_timespans(OP, timespans, x, positive=True, lengths=lengths)
    with without_autocast(x.device.type):
        if not _native.runs(x.device.type, OP):
            return reference.ltc_scan(
                x,
                weights,
                h0,
                synapses=synapses,
                timespans=timespans,
                lengths=lengths,
                ode_unfolds=ode_unfolds,
                eps=eps,
                outputs=outputs,
            )
        return _native_scan(
            chunk_size, x, weights, h0, synapses, timespans, lengths, ode_unfolds, eps, outputs
        )


def _native_scan(chunk_size: int | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    x, h0, units, sensory, recurrent, *_, spans, _, unfolds, _, _ = raw = raw_arguments(*arguments)
    differentiable = (x, h0, units, sensory, recurrent, spans)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        if chunk_size is None:
            kept = x.shape[1] * unfolds * h0.numel()
            chunk_size = 0 if _sequence.is_known(kept <= MAX_KEPT) else DEFAULT_CHUNK
        y, h_last, _ = torch.ops.ember_ext.ltc_scan(*raw, chunk_size)
    else:
        y, h_last, _ = torch.ops.ember_ext.ltc_scan_forward(*raw, -1)
    return y, h_last.to(x.dtype)


if _native.has("cpu"):
    _ltc_registration.register()
