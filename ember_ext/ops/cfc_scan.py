"""A whole CfC sequence as one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _checks, _gradients, _sequence
from ember_ext.ops._autocast import autocast_dtype, without_autocast
from ember_ext.ops._watch import Watch, WeightsChangedError
from ember_ext.reference.cfc_scan import Affine, CfCWeights

Mode = Literal["default", "pure", "no_gate"]
Activation = Literal["lecun_tanh", "tanh", "relu", "silu", "gelu"]

_OP = "cfc_scan"
MODES = ("default", "pure", "no_gate")
ACTIVATIONS = ("lecun_tanh", "tanh", "relu", "silu", "gelu")
MAX_CUDA_LAYERS = 15
"""The deepest backbone that the CUDA kernels take."""


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
    _check(x, weights, h0, mode, activation, dropout_scale, chunk_size)
    timespans = _sequence.as_timespans(_OP, "timespans", timespans, x.dtype)
    lengths = _sequence.as_lengths(_OP, lengths, x)
    _sequence.check_timespans(_OP, timespans, x, lengths=lengths)
    low = autocast_dtype(x.device.type)
    if low is not None and x.dtype != torch.float64:
        x, weights = x.to(low), _round_matrices(weights, low)
    with without_autocast(x.device.type):
        if not _native.runs(x.device.type, _OP):
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


def raw_arguments(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None,
    timespans: Tensor | float,
    lengths: Tensor | None,
    mode: str,
    activation: str,
    dropout_scale: Tensor | None,
) -> tuple[Any, ...]:
    """What the raw operators take, without `chunk`, for checked arguments of `cfc_scan`."""
    dtype = _checks.compute_dtype(x.dtype)
    batch, steps, _ = x.shape
    if isinstance(timespans, Tensor):
        timespans = timespans.to(dtype)
    varying = isinstance(timespans, Tensor) and timespans.dim() > 0
    maps = joined_maps(weights, mode, None if varying else timespans, dtype)
    decay = spans = None
    if mode == "pure":
        decay = _decay(weights, dtype)
        if not isinstance(timespans, Tensor):
            # A product: to fill a tensor with it, torch.compile would make a constant of a float.
            spans = (x.new_ones((), dtype=dtype) * timespans).expand(batch, steps)
        elif not varying:
            spans = timespans.expand(batch, steps)
    if varying:
        spans = timespans.reshape(batch, steps)  # type: ignore[union-attr]
    if h0 is None:
        state = x.new_zeros(batch, weights.ff1.bias.shape[0], dtype=dtype)
    else:
        state = h0.to(dtype)
    return (
        x,
        state,
        maps,
        spans,
        lengths,
        None if dropout_scale is None else dropout_scale.to(dtype),
        decay,
        MODES.index(mode),
        ACTIVATIONS.index(activation),
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
            y, h_last = _CfCScan.apply(x, state, *raw[3:], chunk, *maps)  # type: ignore[no-untyped-call]
    else:
        y, h_last, _ = torch.ops.ember_ext.cfc_scan_forward.default(*raw, -1)
    return y, h_last.to(x.dtype)


class PackedCells:
    """Cells stacked on each other, with their weights laid out once for many calls.

    A copy: it does not follow later changes of the weights, but with a `watch` it says that there
    were some. CPU only, and not differentiable.

    Args:
        cells: each cell's weights; a cell's input is the state of the one before.
        mode: of all cells, see `cfc_scan`.
        activation: of all backbones.
        timespan: the Δt of every step, or None if it is given with each call. Default: 1.
        watch: of all that the weights come from; begun before they are handed over here. Default:
            none.
    """

    def __init__(
        self,
        cells: Sequence[CfCWeights],
        *,
        mode: Mode = "default",
        activation: Activation = "lecun_tanh",
        timespan: float | None = 1.0,
        watch: Watch | None = None,
    ) -> None:
        self._watch, self._watch_number = watch, 0 if watch is None else watch.number
        self.dtype = _checks.compute_dtype(cells[0].ff1.weight.dtype)
        self._timespan = timespan if mode == "pure" else None
        plan, tensors = [ACTIVATIONS.index(activation), MODES.index(mode)], []
        for weights in cells:
            maps = joined_maps(weights, mode, timespan, self.dtype)
            hidden = weights.ff1.bias.shape[0]
            plan += [maps[0].shape[1] - 1 - hidden, hidden, len(maps[-1]) // hidden]
            plan += [len(maps), *(len(matrix) for matrix in maps[:-1])]
            tensors += maps
            if mode == "pure":
                tensors.append(_decay(weights, self.dtype))
        self._plan = tuple(plan)
        self._packed = torch.ops.ember_ext.cfc_scan_pack(tensors, self._plan)
        # Looking the overload up takes as long as the arithmetic of a small cell.
        self._run: Callable[..., tuple[Tensor, Tensor]] = (
            torch.ops.ember_ext.cfc_scan_packed.default
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
        """The last cell's states in x's dtype, shaped as x, and all cells' final states in h's.

        Args:
            x: input, [B, T, I], or [B, I] for a single step; in the dtype of the weights.
            h: states of all cells side by side, [B, S].
            timespans: [B, T], or [B] for a single step; exactly if the time span was not fixed.
            lengths: [B], int64, see `cfc_scan`.
            checked: whether to look at what the watched tensors hold. Default: True.

        Raises:
            WeightsChangedError: they do not hold any more what they held when the watch began.
        """
        if timespans is None:
            if self._timespan is not None:
                timespans = h.new_full(x.shape[:-1], self._timespan, dtype=self.dtype)
        elif timespans.dtype != self.dtype:
            timespans = timespans.to(self.dtype)
        if h.dtype != self.dtype:
            y, last = self.run(x, h.to(self.dtype), timespans, lengths, checked=checked)
            return y, last.to(h.dtype)
        watch = self._watch_number if checked else 0
        result = self._run(x, h, timespans, lengths, self._packed, self._plan, watch)
        if result[1].dim() == 1:
            raise WeightsChangedError("ember_ext.cfc_scan: the weights have changed")
        return result


def tensors_of(weights: CfCWeights) -> list[Tensor]:
    """All tensors of a cell."""
    leaves = torch.utils._pytree.tree_leaves(weights)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _decay(weights: CfCWeights, dtype: torch.dtype) -> Tensor:
    """w_tau and A, [2, H]."""
    assert weights.w_tau is not None
    assert weights.amplitude is not None
    return torch.stack([weights.w_tau, weights.amplitude]).to(dtype)


def joined_maps(
    weights: CfCWeights, mode: str, timespan: Tensor | float | None, dtype: torch.dtype
) -> list[Tensor]:
    """The affine maps of a cell as matrices [out, 1 + in], bias first: backbone, then all heads.

    The heads lie below each other and are masked: ff1, ff2, time_a, time_b; only ff1 in mode
    "pure". With one `timespan` for all steps, time_a and time_b come to a single head,
    Δt time_a + time_b.
    """
    maps = [_joined(affine, dtype) for affine in weights.backbone]
    return [*maps, _joined_heads(weights, mode, timespan, dtype)]


def _joined(affine: Affine, dtype: torch.dtype) -> Tensor:
    """An affine map as one matrix [out, 1 + in], the bias first."""
    return torch.cat([affine.bias.to(dtype)[:, None], affine.weight.to(dtype)], 1)


def _joined_heads(
    weights: CfCWeights, mode: str, timespan: Tensor | float | None, dtype: torch.dtype
) -> Tensor:
    """The heads below each other, [heads * H, 1 + Z]."""
    heads = [weights.ff1] if weights.ff2 is None else [weights.ff1, weights.ff2]
    if mode == "pure":
        heads = heads[:1]
    matrices = [_joined(head, dtype) for head in heads]
    if weights.mask is not None:
        mask = torch.nn.functional.pad(weights.mask.to(dtype), (1, 0), value=1.0)
        matrices = [matrix * mask for matrix in matrices]
    if mode != "pure":
        assert weights.time_a is not None
        assert weights.time_b is not None
        time_a, time_b = _joined(weights.time_a, dtype), _joined(weights.time_b, dtype)
        matrices += [time_a, time_b] if timespan is None else [timespan * time_a + time_b]
    return torch.cat(matrices)


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
    _sequence.check_chunk_size(_OP, chunk_size)
    batch, steps, width = x.shape
    hidden = _count_outputs("weights.ff1", weights.ff1)
    width += hidden
    layers = len(weights.backbone)
    if x.device.type == "cuda" and layers > MAX_CUDA_LAYERS:
        _checks.fail(_OP, "weights.backbone", f"at most {MAX_CUDA_LAYERS} layers on a GPU", layers)
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
            _checks.fail(_OP, f"weights.{name}", f"given in mode {mode!r}", None)
        _check_affine(f"weights.{name}", head, "[H, Z]", hidden, width, x)
    for name, vector in vectors:
        if vector is None:
            _checks.fail(_OP, f"weights.{name}", f"given in mode {mode!r}", None)
        _checks.check_fits(_OP, f"weights.{name}", vector, "[H]", (hidden,), x)
    if weights.mask is not None:
        _checks.check_fits(_OP, "weights.mask", weights.mask, "[H, Z]", (hidden, width), x)
    if h0 is not None:
        _checks.check_fits(_OP, "h0", h0, "[B, H]", (batch, hidden), x)
    if dropout_scale is not None:
        if len(weights.backbone) < 2:
            _checks.fail(_OP, "dropout_scale", "None with fewer than two backbone layers", "one")
        widths = [affine.bias.shape[0] for affine in weights.backbone]
        if len(set(widths)) > 1:
            _checks.fail(_OP, "weights.backbone", "of one width U with dropout_scale", widths)
        units = widths[0]
        shape = (batch, steps, len(weights.backbone) - 1, units)
        _checks.check_fits(_OP, "dropout_scale", dropout_scale, "[B, T, layers - 1, U]", shape, x)
        if dropout_scale.requires_grad and torch.is_grad_enabled():
            _checks.fail(_OP, "dropout_scale", "detached, as it gets no gradient", "requires_grad")


def _check_affine(
    argument: str, affine: Affine, symbols: str, out: int, width: int, x: Tensor
) -> None:
    _count_outputs(argument, affine)
    _checks.check_fits(_OP, f"{argument}.weight", affine.weight, symbols, (out, width), x)
    _checks.check_fits(_OP, f"{argument}.bias", affine.bias, "[out]", (out,), x)


def _count_outputs(argument: str, affine: object) -> int:
    if not isinstance(affine, Affine):
        _checks.fail(_OP, argument, "an Affine", type(affine).__name__, TypeError)
    _checks.check_tensor(_OP, f"{argument}.bias", affine.bias)
    if affine.bias.dim() != 1:
        _checks.fail(_OP, f"{argument}.bias", "[out]", list(affine.bias.shape))
    return affine.bias.shape[0]


def _pad(n: int) -> int:
    return (n + 15) // 16 * 16


def _stride(n: int) -> int:
    return ((n + 15) // 16 | 1) * 16


def _saved_size(
    x: Tensor, hidden: int, weights: list[Tensor], spans: Tensor | None, mode: int, chunk: int
) -> int:
    """Elements of the saved tensor; csrc/common/cfc_scan.h says what they are."""
    batch, steps, inputs = x.shape
    if chunk < 0:
        return 0
    if chunk > 0:
        return (steps + chunk - 1) // chunk * batch * hidden
    heads = 1 if MODES[mode] == "pure" else 3 if spans is None else 4
    first = _stride(1 + inputs + _pad(hidden))
    row = first + heads * _pad(hidden)
    for matrix in weights[:-1]:
        row += _pad(matrix.shape[0]) + _stride(1 + _pad(matrix.shape[0]))
    return (steps * row + first) * batch


def planned_cells(plan: Sequence[int]) -> Iterator[tuple[int, int, int, list[int]]]:
    """(inputs, hidden, heads, the backbone's widths) of each cell of a plan."""
    at = 2
    while at < len(plan):
        inputs, hidden, heads, layers = plan[at : at + 4]
        at += 3 + layers
        yield inputs, hidden, heads, list(plan[at - layers + 1 : at])


def _packed_size(inputs: int, hidden: int, heads: int, backbone: list[int]) -> int:
    """Elements of a packed cell; csrc/common/cfc_scan.h says what they are."""
    lanes, size, width = 32, 0, inputs + hidden
    for units in backbone:
        size += (units + lanes) * (1 + width)
        width = units
    return size + heads * (hidden + lanes) * (1 + width) + 2 * hidden


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what `_backward` needs, of a call of the raw operator."""
    x, h0, weights, spans, lengths, dropout_scale, decay, *ctx.options = inputs
    y, _, saved = output
    chunk = ctx.options[-1]
    ctx.set_materialize_grads(False)
    ctx.steps, ctx.inputs = x.shape[1:]
    ctx.dtype, ctx.num_weights = y.dtype, len(weights)
    # The tape holds a copy of x, so that only x's place in autograd's graph is missing.
    kept = x if chunk > 0 else _gradients.stand_in(x)
    ctx.save_for_backward(saved, kept, h0, spans, lengths, dropout_scale, decay, *weights)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_h_last: Tensor | None, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of x, h0, time spans, decay and each of the weights, as far as they are wanted."""
    saved, kept, h0, spans, lengths, dropout_scale, decay, *weights = ctx.saved_tensors
    (batch, hidden), steps = h0.shape, ctx.steps
    mode, activation, chunk = ctx.options
    if _gradients.are_differentiated() or _gradients.are_batched(grad_y, grad_h_last):
        x = kept
        if chunk == 0:
            taped = _taped_input(saved, batch, steps, ctx.inputs, hidden).to(ctx.dtype)
            x = taped if kept is None else kept + taped
        definition = functools.partial(_defined, lengths, dropout_scale, mode, activation)
        tensors, grads = (x, h0, spans, decay, *weights), (grad_y, grad_h_last)
        return _gradients.of_definition(_OP, definition, tensors, wanted, grads)
    if grad_y is None:
        grad_y = saved.new_zeros((batch, steps, hidden), dtype=ctx.dtype)
    if grad_h_last is None:
        grad_h_last = torch.zeros_like(h0)
    wants_x, _, _, *wants_decay_and_weights = wanted
    grad_x, grad_h0, grad_weights, grad_spans, grad_decay = (
        torch.ops.ember_ext.cfc_scan_backward.default(
            grad_y,
            grad_h_last,
            saved,
            kept if chunk > 0 else None,
            weights,
            spans,
            lengths,
            dropout_scale,
            decay,
            *ctx.options,
            wants_x,
            any(wants_decay_and_weights),
        )
    )
    gradients = (grad_x, grad_h0, grad_spans, grad_decay, *grad_weights)
    return [g if wants else None for g, wants in zip(gradients, wanted, strict=True)]


def _taped_input(saved: Tensor, batch: int, steps: int, inputs: int, hidden: int) -> Tensor:
    """x, [B, T, I], from the tape, at whose end csrc/common/cfc_scan.h has the rows [1, x, h]."""
    stride = _stride(1 + inputs + _pad(hidden))
    size = (steps + 1) * batch * stride
    rows = saved[saved.shape[0] - size :].view(steps + 1, batch, stride)
    return rows[:steps, :, 1 : 1 + inputs].transpose(0, 1)


def _defined(
    lengths: Tensor | None,
    dropout_scale: Tensor | None,
    mode: int,
    activation: int,
    x: Tensor,
    h0: Tensor,
    spans: Tensor | None,
    decay: Tensor | None,
    *maps: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition with the raw operators' arguments; the final state stays in h0's dtype."""
    hidden = h0.shape[1]
    if lengths is not None:
        # Where padding is NaN or infinite, a gradient of 0 would become NaN on its way back.
        running = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = torch.where(running[:, :, None], x, 0)
        spans = None if spans is None else torch.where(running, spans, 0)

    def affine(matrix: Tensor) -> Affine:
        return Affine(matrix[:, 1:], matrix[:, 0])

    ff1, ff2, time_a, time_b = (
        affine(maps[-1][head * hidden : (head + 1) * hidden]) for head in range(4)
    )
    w_tau = amplitude = None
    if decay is not None:
        w_tau, amplitude = decay.unbind(0)
    elif spans is None:
        # Its third head is the gate's for all steps.
        time_b = Affine(torch.zeros_like(time_a.weight), torch.zeros_like(time_a.bias))
    weights = CfCWeights(
        ff1,
        ff2,
        time_a,
        time_b,
        w_tau=w_tau,
        amplitude=amplitude,
        backbone=tuple(affine(matrix) for matrix in maps[:-1]),
    )
    y, h_last = reference.cfc_scan(
        x.to(h0.dtype),
        weights,
        h0,
        timespans=1.0 if spans is None else spans,
        lengths=lengths,
        mode=MODES[mode],
        activation=ACTIVATIONS[activation],
        dropout_scale=dropout_scale,
    )
    return y.to(x.dtype), h_last


class _CfCScan(torch.autograd.Function):
    """The gradient for eager mode: a registered one takes 0.1 ms longer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        spans: Tensor | None,
        lengths: Tensor | None,
        dropout_scale: Tensor | None,
        decay: Tensor | None,
        mode: int,
        activation: int,
        chunk: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = (x, h0, weights, spans, lengths, dropout_scale, decay, mode, activation, chunk)
        output = torch.ops.ember_ext.cfc_scan_forward.default(*inputs)
        _save(ctx, inputs, output)
        y, h_last, _ = output
        return y, h_last

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_h_last: Tensor | None) -> Any:
        x, h0, spans, _, _, decay, _, _, _, *weights = ctx.needs_input_grad
        wanted = (x, h0, spans, decay, *weights)
        x, h0, spans, decay, *weights = _backward(ctx, grad_y, grad_h_last, wanted)
        return x, h0, spans, None, None, decay, None, None, None, *weights


def _register() -> None:
    """Give the operators their fake kernels and gradients."""

    @torch.library.register_fake("ember_ext::cfc_scan")
    @torch.library.register_fake("ember_ext::cfc_scan_forward")
    def _(
        x: Tensor, h0: Tensor, weights: list[Tensor], spans: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *_, mode, _, chunk = options
        hidden = h0.shape[1]
        size = _saved_size(x, hidden, weights, spans, mode, chunk)
        return (
            x.new_empty(x.shape[0], x.shape[1], hidden),
            h0.new_empty(h0.shape),
            h0.new_empty(size),
        )

    @torch.library.register_fake("ember_ext::cfc_scan_pack")
    def _(weights: list[Tensor], plan: list[int]) -> Tensor:
        return weights[0].new_empty(sum(_packed_size(*cell) for cell in planned_cells(plan)))

    @torch.library.register_fake("ember_ext::cfc_scan_packed")
    def _(
        x: Tensor,
        h: Tensor,
        spans: Tensor | None,
        lengths: Tensor | None,
        packed: Tensor,
        plan: list[int],
        watch: int,
    ) -> tuple[Tensor, Tensor]:
        *_, (_, hidden, _, _) = planned_cells(plan)
        return x.new_empty(*x.shape[:-1], hidden), h.new_empty(h.shape)

    @torch.library.register_fake("ember_ext::cfc_scan_backward")
    def _(
        grad_y: Tensor,
        grad_h_last: Tensor,
        saved: Tensor,
        x: Tensor | None,
        weights: list[Tensor],
        spans: Tensor | None,
        lengths: Tensor | None,
        dropout_scale: Tensor | None,
        decay: Tensor | None,
        mode: int,
        activation: int,
        chunk: int,
        input_gradient: bool,
        weight_gradients: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
        batch, steps, hidden = grad_y.shape
        inputs = weights[0].shape[1] - 1 - hidden
        return (
            grad_y.new_empty(batch if input_gradient else 0, steps, inputs),
            grad_h_last.new_empty(batch, hidden),
            [w.new_empty(w.shape[0] if weight_gradients else 0, w.shape[1]) for w in weights],
            grad_h_last.new_empty(0 if spans is None else batch, steps),
            grad_h_last.new_empty(2 if decay is not None and weight_gradients else 0, hidden),
        )

    def backward(ctx: Any, grad_y: Tensor | None, grad_h_last: Tensor | None, _: Any) -> Any:
        x, h0, weights, spans, _, _, decay, *_ = ctx.needs_input_grad
        # A single answer where autograd did not take the list of weights apart.
        each = weights if isinstance(weights, (list, tuple)) else [weights] * ctx.num_weights
        wanted = (x, h0, spans, decay, *each)
        x, h0, spans, decay, *weights = _backward(ctx, grad_y, grad_h_last, wanted)
        return x, h0, weights, spans, None, None, decay, None, None, None

    torch.library.register_autograd("ember_ext::cfc_scan", backward, setup_context=_save)
    _checks.forbid_double_backward("ember_ext::cfc_scan_backward", _OP)
    _gradients.batch_in_a_loop("ember_ext::cfc_scan_backward")


if _native.has("cpu"):
    _register()
