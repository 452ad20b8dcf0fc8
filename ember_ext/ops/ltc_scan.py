"""A whole LTC sequence as one operator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _checks, _gradients, _sequence
from ember_ext.ops._autocast import without_autocast
from ember_ext.ops._watch import Watch, WeightsChangedError
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights, all_synapses, list_synapses

_OP = "ltc_scan"
MAX_KEPT = 1 << 27
"""The most numbers, of all states after solver steps, that are kept by default."""
DEFAULT_CHUNK = 64
MAX_UNFOLDS = 1 << 30
MAX_SYNAPSES = 1 << 26
"""The most synapses between units, and from inputs, that the kernels' offsets can count."""


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
    _check(x, weights, h0, synapses, ode_unfolds, eps, outputs)
    _sequence.check_chunk_size(_OP, chunk_size)
    timespans = _sequence.as_timespans(_OP, "timespans", timespans, x.dtype)
    lengths = _sequence.as_lengths(_OP, lengths, x)
    _sequence.check_timespans(_OP, timespans, x, positive=True, lengths=lengths)
    with without_autocast(x.device.type):
        if not _native.runs(x.device.type, _OP):
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


def raw_arguments(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None,
    synapses: LTCSynapses | None,
    timespans: Tensor | float,
    lengths: Tensor | None,
    ode_unfolds: int,
    eps: float,
    outputs: int | None,
) -> tuple[Any, ...]:
    """The arguments of the raw operators, without `chunk`, for checked ones of `ltc_scan`."""
    dtype = _checks.compute_dtype(x.dtype)
    batch, steps, inputs = x.shape
    units = weights.cm.shape[0]
    if synapses is None:
        synapses = LTCSynapses(
            all_synapses(units, units, x.device), all_synapses(inputs, units, x.device)
        )
    if not isinstance(timespans, Tensor):
        # A product keeps the float symbolic. To fill a tensor, torch.compile would make a constant
        # of it.
        spans = (x.new_ones((), dtype=dtype) * timespans).expand(batch, steps)
    elif timespans.dim():
        spans = timespans.to(dtype).reshape(batch, steps)
    else:
        spans = timespans.to(dtype).expand(batch, steps)
    return (
        x,
        x.new_zeros(batch, units, dtype=dtype) if h0 is None else h0.to(dtype),
        torch.stack([weights.cm, weights.gleak, weights.vleak]).to(dtype),
        _listed(weights[7:], synapses.sensory, dtype),
        _listed(weights[3:7], synapses.recurrent, dtype),
        synapses.sensory,
        synapses.recurrent,
        spans,
        lengths,
        ode_unfolds,
        units if outputs is None else outputs,
        eps,
    )


def _listed(matrices: tuple[Tensor, ...], index: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of matrices [from, to] for listed synapses, [matrices, E]."""
    entries = index[0] * matrices[0].shape[1] + index[1]
    return torch.stack(matrices).to(dtype).flatten(1).index_select(1, entries)


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


class PackedLTC:
    """A network with its weights laid out once for many calls, inputs' and outputs' maps included.

    A copy: it does not follow later changes of the weights, but with a `watch` it says that there
    were some. CPU only, and not differentiable.

    Args:
        weights: see `ltc_scan`.
        synapses: those that exist. Default: all.
        input_map: [2, I]: scale and shift of inputs. Default: none.
        output_map: [2, outputs]: scale and shift of outputs. Default: none.
        timespan: the Δt of every step, > 0, or None if it is given with each call. Default: 1.
        ode_unfolds: solver steps per time step.
        eps: added to the denominator.
        outputs: how many units' states to return, beginning with the first. Default: all S.
        watch: of all that the weights come from; begun before they are handed over here. Default:
            none.
    """

    def __init__(
        self,
        weights: LTCWeights,
        synapses: LTCSynapses | None = None,
        *,
        input_map: Tensor | None = None,
        output_map: Tensor | None = None,
        timespan: float | None = 1.0,
        ode_unfolds: int = 6,
        eps: float = 1e-8,
        outputs: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        dtype = self.dtype = _checks.compute_dtype(weights.cm.dtype)
        inputs, units = weights.sensory_w.shape
        x = weights.cm.new_empty(0, 0, inputs)
        _, _, *tensors, _, _, _, outputs, _ = raw_arguments(
            x, weights, None, synapses, 1.0, None, ode_unfolds, eps, outputs
        )
        maps = [None if m is None else m.detach().to(dtype) for m in (input_map, output_map)]
        counts = [index.shape[1] for index in tensors[3:]]
        with_maps = [int(m is not None) for m in maps]
        self._plan = (inputs, units, outputs, *counts, ode_unfolds, *with_maps)
        self._eps = float(eps)
        self._packed = torch.ops.ember_ext.ltc_scan_pack(
            *(tensor.detach() for tensor in tensors), *maps, self._plan
        )
        self._watch, self._watch_number = watch, 0 if watch is None else watch.number
        self._timespan, self._spans = timespan, torch.empty(0)
        # A look-up of the overload takes as long as the arithmetic of a small network.
        self._run: Callable[..., tuple[Tensor, Tensor]] = (
            torch.ops.ember_ext.ltc_scan_packed.default
        )

    def run(
        self,
        x: Tensor,
        h: Tensor,
        timespans: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        checked: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The outputs in x's dtype, shaped as x, and the final state in h's.

        Args:
            x: input, [B, T, I], or [B, I] for a single step; in the dtype of the weights.
            h: state, [B, S].
            timespans: [B, T], or [B] for a single step; exactly if the time span was not fixed.
            lengths: [B], int64, see `ltc_scan`.
            checked: whether to look at what the watched tensors hold. Default: True.

        Raises:
            WeightsChangedError: they do not hold any more what they held when the watch began.
        """
        if h.dtype != self.dtype:
            y, last = self.run(x, h.to(self.dtype), timespans, lengths, checked=checked)
            return y, last.to(h.dtype)
        if timespans is None:
            timespans = self._spans
            if timespans.shape != x.shape[:-1]:
                timespans = self._spans = h.new_full(x.shape[:-1], self._timespan)  # type: ignore[arg-type]
        elif timespans.dtype != self.dtype:
            timespans = timespans.to(self.dtype)
        watch = self._watch_number if checked else 0
        result = self._run(x, h, timespans, lengths, self._packed, self._plan, self._eps, watch)
        if result[1].dim() == 1:
            raise WeightsChangedError("ember_ext.ltc_scan: the weights have changed")
        return result


def _check(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None,
    synapses: LTCSynapses | None,
    ode_unfolds: int,
    eps: float,
    outputs: int | None,
) -> None:
    _checks.check_tensor(_OP, "x", x)
    if x.dim() != 3:
        _checks.fail(_OP, "x", "[B, T, I]", list(x.shape))
    if not isinstance(weights, LTCWeights):
        _checks.fail(_OP, "weights", "an LTCWeights", type(weights).__name__, TypeError)
    _checks.check_tensor(_OP, "weights.cm", weights.cm)
    if weights.cm.dim() != 1:
        _checks.fail(_OP, "weights.cm", "[S]", list(weights.cm.shape))
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
        _checks.check_fits(_OP, f"weights.{name}", value, symbols, shape, x)
    if h0 is not None:
        _checks.check_fits(_OP, "h0", h0, "[B, S]", (batch, units), x)
    if synapses is not None:
        _check_synapses(synapses, x)
    elif max(units, inputs) * units > MAX_SYNAPSES:
        expected = f"given for a network of more than {MAX_SYNAPSES} pairs of units or inputs"
        _checks.fail(_OP, "synapses", expected, None)
    if isinstance(ode_unfolds, bool) or not isinstance(ode_unfolds, int) or ode_unfolds < 1:
        _checks.fail(_OP, "ode_unfolds", "an integer >= 1", repr(ode_unfolds))
    if ode_unfolds > MAX_UNFOLDS:
        _checks.fail(_OP, "ode_unfolds", f"at most {MAX_UNFOLDS}", ode_unfolds)
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not 0 <= eps < math.inf:
        _checks.fail(_OP, "eps", "a finite number >= 0", repr(eps))
    if outputs is not None and (not isinstance(outputs, int) or not 0 <= outputs <= units):
        _checks.fail(_OP, "outputs", f"within [0, S] = [0, {units}]", repr(outputs))


def _check_synapses(synapses: Any, x: Tensor) -> None:
    if not isinstance(synapses, LTCSynapses):
        expected = "None or an LTCSynapses, from ltc_synapses"
        _checks.fail(_OP, "synapses", expected, type(synapses).__name__, TypeError)
    for name, value in zip(LTCSynapses._fields, synapses, strict=True):
        argument = f"synapses.{name}"
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            _checks.fail(_OP, argument, "an int64 tensor", got, TypeError)
        if value.dim() != 2 or value.shape[0] != 3:
            _checks.fail(_OP, argument, "[3, E]", list(value.shape))
        if value.shape[1] > MAX_SYNAPSES:
            _checks.fail(_OP, argument, f"at most {MAX_SYNAPSES} synapses", value.shape[1])
        _checks.check_device(_OP, argument, value, x, "x")


def _defined(
    indices: tuple[Tensor, Tensor],
    lengths: Tensor | None,
    unfolds: int,
    outputs: int,
    eps: float,
    x: Tensor,
    h0: Tensor,
    units: Tensor,
    sensory: Tensor,
    recurrent: Tensor,
    spans: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition with the raw operators' arguments; the final state stays in h0's dtype."""
    size = units.shape[1]

    def matrices(listed: Tensor, index: Tensor, sources: int) -> Iterable[Tensor]:
        entries = index[0] * size + index[1]
        dense = listed.new_zeros(len(listed), sources * size).index_copy(1, entries, listed)
        return dense.view(-1, sources, size).unbind(0)

    sensory_index, recurrent_index = indices
    weights = LTCWeights(
        *units.unbind(0),
        *matrices(recurrent, recurrent_index, size),
        *matrices(sensory, sensory_index, x.shape[2]),
    )
    y, h_last = reference.ltc_scan(
        x.to(h0.dtype),
        weights,
        h0,
        synapses=LTCSynapses(recurrent_index, sensory_index),
        timespans=spans,
        lengths=lengths,
        ode_unfolds=unfolds,
        eps=eps,
        outputs=outputs,
    )
    return y.to(x.dtype), h_last


def _packed_size(inputs: int, units: int, _: int, sensory: int, recurrent: int) -> int:
    """Elements of a packed network without its maps; csrc/common/ltc_scan.h says what they are."""
    lanes = 16
    rows = 4 * units + 8 * lanes
    for sources, count in ((inputs, sensory), (units, recurrent)):
        filled = count + lanes * (sources + 2) + units
        rows += 5 * filled + 2 * units + sources + 8 * lanes
    groups = 5 * (sensory + recurrent) + 6 * units + 8 * lanes
    return (groups + lanes - 1) // lanes * lanes + rows


def _register() -> None:
    """Give the operators their fake kernels and gradients."""

    @torch.library.register_fake("ember_ext::ltc_scan")
    @torch.library.register_fake("ember_ext::ltc_scan_forward")
    def _(x: Tensor, h0: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *_, unfolds, outputs, _, chunk = rest
        batch, steps, _ = x.shape
        slots = steps * unfolds + 1
        if chunk < 0:
            slots = 0
        elif chunk > 0:
            slots = (steps + chunk - 1) // chunk
        return (
            x.new_empty(batch, steps, outputs),
            h0.new_empty(h0.shape),
            h0.new_empty(slots * h0.numel()),
        )

    @torch.library.register_fake("ember_ext::ltc_scan_backward")
    def _(
        grad_y: Tensor,
        grad_h_last: Tensor,
        saved: Tensor,
        x: Tensor,
        units: Tensor,
        sensory: Tensor,
        recurrent: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *_, input_gradient, weight_gradients = rest
        batch, steps, inputs = x.shape
        return (
            x.new_empty(batch if input_gradient else 0, steps, inputs),
            grad_h_last.new_empty(grad_h_last.shape),
            *(
                w.new_empty(w.shape[0] if weight_gradients else 0, w.shape[1])
                for w in (units, sensory, recurrent)
            ),
            grad_h_last.new_empty(batch, steps),
        )

    @torch.library.register_fake("ember_ext::ltc_scan_pack")
    def _(unit_weights: Tensor, *rest: Any) -> Tensor:
        *_, input_map, output_map, plan = rest
        maps = sum(m.numel() for m in (input_map, output_map) if m is not None)
        return unit_weights.new_empty(_packed_size(*plan[:5]) + maps)

    @torch.library.register_fake("ember_ext::ltc_scan_packed")
    def _(
        x: Tensor,
        h: Tensor,
        timespans: Tensor,
        lengths: Tensor | None,
        packed: Tensor,
        plan: list[int],
        eps: float,
        watch: int,
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(*x.shape[:-1], plan[2]), h.new_empty(h.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, h0, *tensors, ctx.unfolds, ctx.outputs, ctx.eps, ctx.chunk = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[2], x, h0, *tensors)

    def backward(ctx: Any, grad_y: Tensor | None, grad_h_last: Tensor | None, _: Any) -> Any:
        saved, x, h0, *tensors = ctx.saved_tensors
        units, sensory, recurrent, sensory_index, recurrent_index, spans, lengths = tensors
        wanted = ctx.needs_input_grad
        if _gradients.are_differentiated():
            definition = functools.partial(
                _defined,
                (sensory_index, recurrent_index),
                lengths,
                ctx.unfolds,
                ctx.outputs,
                ctx.eps,
            )
            grad_x, grad_h0, *weights, grad_spans = _gradients.of_definition(
                _OP,
                definition,
                (x, h0, units, sensory, recurrent, spans),
                (*wanted[:5], wanted[7]),
                (grad_y, grad_h_last),
            )
        else:
            if grad_y is None:
                grad_y = x.new_zeros((*x.shape[:2], ctx.outputs))
            if grad_h_last is None:
                grad_h_last = torch.zeros_like(h0)
            grad_x, grad_h0, *weights, grad_spans = torch.ops.ember_ext.ltc_scan_backward(
                grad_y,
                grad_h_last,
                saved,
                x,
                *tensors,
                ctx.unfolds,
                ctx.eps,
                ctx.chunk,
                wanted[0],
                any(wanted[2:5]),
            )
        gradients = (grad_x, grad_h0, *weights, None, None, grad_spans)
        return (
            *(g if wants else None for g, wants in zip(gradients, wanted, strict=False)),
            *[None] * 5,
        )

    torch.library.register_autograd("ember_ext::ltc_scan", backward, setup_context=setup_context)
    _checks.forbid_double_backward("ember_ext::ltc_scan_backward", _OP)
    _gradients.batch_in_a_loop("ember_ext::ltc_scan_backward")


if _native.has("cpu"):
    _register()
