"""The fake kernels and gradients of the operators of `ltc_scan`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ember_ext import reference
from ember_ext.ops import _checks, _gradients
from ember_ext.ops._ltc_checks import OP
from ember_ext.ops._sizes import ltc_packed_size
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights


def register() -> None:
    """Give the operators their fake kernels and gradients."""
    _register_fakes()
    _register_gradients()


def _register_fakes() -> None:
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
        inputs, units, _, sensory, recurrent = plan[:5]
        size = ltc_packed_size(inputs, units, sensory, recurrent)
        return unit_weights.new_empty(size + maps)

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


def _register_gradients() -> None:
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
                OP,
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
    _checks.forbid_double_backward("ember_ext::ltc_scan_backward", OP)
    _gradients.batch_in_a_loop("ember_ext::ltc_scan_backward")


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
