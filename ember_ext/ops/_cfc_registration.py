"""The fake kernels and gradients of the operators of `cfc_scan`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ember_ext import reference
from ember_ext.ops import _checks, _gradients
from ember_ext.ops._cfc_checks import ACTIVATIONS, MODES, OP
from ember_ext.ops._cfc_packing import planned_cells
from ember_ext.ops._sizes import cfc_sizes
from ember_ext.reference.cfc_scan import Affine, CfCWeights


def register() -> None:
    """Give the operators their fake kernels and gradients."""
    _register_fakes()
    _register_gradients()


def _register_fakes() -> None:
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
        return weights[0].new_empty(sum(cfc_sizes(*cell).packed for cell in planned_cells(plan)))

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
    sizes = cfc_sizes(inputs, hidden, heads, [matrix.shape[0] for matrix in weights[:-1]])
    return (steps * sizes.step + sizes.row) * batch


def _register_gradients() -> None:
    def backward(ctx: Any, grad_y: Tensor | None, grad_h_last: Tensor | None, _: Any) -> Any:
        x, h0, weights, spans, _, _, decay, *_ = ctx.needs_input_grad
        # A single answer where autograd did not take the list of weights apart.
        each = weights if isinstance(weights, (list, tuple)) else [weights] * ctx.num_weights
        wanted = (x, h0, spans, decay, *each)
        x, h0, spans, decay, *weights = _backward(ctx, grad_y, grad_h_last, wanted)
        return x, h0, weights, spans, None, None, decay, None, None, None

    torch.library.register_autograd("ember_ext::cfc_scan", backward, setup_context=_save)
    _checks.forbid_double_backward("ember_ext::cfc_scan_backward", OP)
    _gradients.batch_in_a_loop("ember_ext::cfc_scan_backward")


class CfCScan(torch.autograd.Function):
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
        return _gradients.of_definition(OP, definition, tensors, wanted, grads)
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
    stride = cfc_sizes(inputs, hidden, 3, ()).row
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
