"""Layers that compute what PyTorch's compute, and keep less memory for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ember_ext import _native
from ember_ext.nn._plain import why_differs
from ember_ext.ops._autocast import autocast_dtype


class Dropout(nn.Dropout):
    """PyTorch's dropout, equal to the bit, with a mask of one byte an element on the CPU as well.

    `nn.Dropout` uses this operator on CUDA; on the CPU it keeps a mask of the input's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with probability `p`, and scale the others by 1/(1-p), in training."""
        if not self.training or self.p == 0:
            return x
        return torch.native_dropout(x, self.p, True)[0]


def gelu_linear(u: Tensor, linear: nn.Linear) -> Tensor:
    """`linear(F.gelu(u))`, which keeps u but not its GELU: the backward pass computes that again.

    A `linear` that does more than apply its weight, such as one with hooks, is called, and so it is
    where plain PyTorch is wanted, as by forward-mode AD, `torch.func`, exporters and
    `use_reference`; then autograd keeps what it keeps.

    Args:
        u: [..., linear.in_features].
        linear: of any device; another layer in its place will do as well.

    Returns:
        [..., linear.out_features].
    """
    if (
        why_differs(linear, nn.Linear)
        or _native.wants_definition()
        or _native.transforms_active()
        or u.dtype != (autocast_dtype(u.device.type) or linear.weight.dtype)
    ):
        return linear(F.gelu(u))  # type: ignore[no-any-return]
    return _GELULinear.apply(u, linear.weight, linear.bias)  # type: ignore[no-any-return, no-untyped-call]


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(F.gelu(u), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, weight, _ = inputs
        ctx.save_for_backward(u, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        needs_u, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grad_rows = u.reshape(-1, u.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_u = grad_weight = grad_bias = None
        buffer = F.gelu(rows)
        if needs_weight:
            grad_weight = grad_rows.t() @ buffer
        if needs_bias:
            grad_bias = grad_rows.sum(0)
        if needs_u:
            weight = weight.to(grad.dtype)
            if torch.is_grad_enabled():  # someone differentiates this gradient
                buffer = torch.ops.aten.gelu_backward(grad_rows @ weight, rows)
            else:
                # The memory of the values of GELU, which are done with, takes both gradients.
                torch.mm(grad_rows, weight, out=buffer)
                torch.ops.aten.gelu_backward.grad_input(buffer, rows, grad_input=buffer)
            grad_u = buffer.view(u.shape)
        return grad_u, grad_weight, grad_bias
