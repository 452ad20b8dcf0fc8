"""The leaky integrate-and-fire gate as a fused operator."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _checks, _gradients

Norm = Literal["l1", "l2"]

_OP = "lif_gate"
_NORM_CODES: dict[str | None, int] = {None: 0, "l1": 1, "l2": 2}
_NORMS: tuple[Norm | None, ...] = (None, "l1", "l2")


def lif_gate(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    norm: Norm | None = None,
    unit_dim: int = -1,
    eps: float = 1e-8,
) -> Tensor:
    r"""Gate activations by their magnitude: the leaky integrate-and-fire (LIF) gate.

    The gate fires where an activation is large, and lets a part of the others leak through (section
    2.1 of the paper):

    .. math::

        y = x\,\bigl(f + \lambda (1 - f)\bigr), \qquad
        f = \sigma\bigl(k (\lvert x \rvert - \theta)\bigr).

    With a `norm`, each row of y (its last dimension) is multiplied by :math:`\lVert x \rVert /
    (\lVert y \rVert + \mathrm{eps})`, so that it keeps the norm that it had in x. A row of zeros
    stays zero and gets a gradient of zero.

    The gate is differentiable in all four tensors. Sums over a row are computed in fp32 (fp64 for
    fp64 input), and their squares neither overflow nor underflow. The result is the same to the bit
    for any number of threads. :class:`~ember_ext.nn.LIFGate` has the parameters as a module.

    Args:
        x: any shape with at least one dimension; float64, float32, bfloat16 or float16. It is
            copied once unless it is contiguous.
        threshold: :math:`\theta`, shape [x.shape[unit_dim]], finite. Like `leak` and `steepness` it
            may have any floating dtype, and is used in fp32 (fp64 if `x` is), under autocast too.
        leak: :math:`\lambda`, shape as `threshold`, within [0, 1].
        steepness: :math:`k`, shape as `threshold`, finite and > 0.
        norm: "l1", "l2" or None: the norm of each row that the gate preserves. Default: None.
        unit_dim: the dimension of `x` along which the three parameters vary. Default: the last.
        eps: added to the norm of y, finite, >= 0. Default: 1e-8.

    Returns:
        y, contiguous, with the shape and dtype of `x`.

    Raises:
        TypeError: an argument is not of a supported type or dtype.
        ValueError: a shape, device, value or option does not fit. The values of the three
            parameters are checked on CPU tensors only, because the check would wait for a GPU.

    Examples::

        >>> import torch
        >>> from ember_ext import lif_gate
        >>> x = torch.tensor([[0.1, -0.2, 3.0]])
        >>> threshold, leak, steepness = torch.tensor([[1.0], [0.5], [8.0]]).expand(3, 3)
        >>> lif_gate(x, threshold, leak, steepness)
        tensor([[ 0.0500, -0.1002,  3.0000]])
        >>> y = lif_gate(x, threshold, leak, steepness, norm="l2")
        >>> torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
        True
    """
    try:
        if not 0 <= eps < math.inf:
            _checks.fail(_OP, "eps", "finite and >= 0", eps)
        norm_code = _NORM_CODES[norm]
        has_kernels = _native.runs(x.device.type, _OP)
        dtype = _checks.compute_dtype(x.dtype)
        fit = threshold.dtype == leak.dtype == steepness.dtype == dtype
    except (AttributeError, KeyError, TypeError):
        _check(x, threshold, leak, steepness, norm, unit_dim, eps)
        raise
    # The kernel refuses everything else at no cost.
    if not (fit and has_kernels) or torch.compiler.is_compiling():
        _check(x, threshold, leak, steepness, norm, unit_dim, eps)
    if not has_kernels:
        if _checks.is_readable(x):
            _checks.check_gate_parameters(_OP, threshold, leak, steepness)
        y = reference.lif_gate(x, threshold, leak, steepness, norm=norm, unit_dim=unit_dim, eps=eps)
        return y.contiguous()
    if not fit:
        threshold, leak, steepness = threshold.to(dtype), leak.to(dtype), steepness.to(dtype)
    arguments = (x, threshold, leak, steepness, norm_code, unit_dim, eps)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or threshold.requires_grad or leak.requires_grad or steepness.requires_grad
    )
    if not needs_grad:
        return _forward(*arguments)
    if torch.compiler.is_compiling():
        return torch.ops.ember_ext.lif_gate.default(*arguments)  # type: ignore[no-any-return]
    return _LIFGate.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def _forward(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    norm: int,
    unit_dim: int,
    eps: float,
) -> Tensor:
    # Only the kernel may run in here, because we cannot explain the errors of a hook or a mode.
    try:
        return torch.ops.ember_ext.lif_gate_forward.default(  # type: ignore[no-any-return]
            x, threshold, leak, steepness, norm, unit_dim, eps
        )
    except RuntimeError:
        # The kernel checks the values at no cost, and Python finds the words for an error.
        if not torch.compiler.is_compiling():
            _check(x, threshold, leak, steepness, _NORMS[norm], unit_dim, eps)
            _checks.check_gate_parameters(_OP, threshold, leak, steepness)
        raise


def _check(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    norm: str | None,
    unit_dim: int,
    eps: float,
) -> None:
    _checks.check_tensor(_OP, "x", x)
    check_norm(_OP, norm)
    dims = x.dim()
    if dims == 0:
        _checks.fail(_OP, "x", "of at least one dimension", "a scalar")
    if not isinstance(unit_dim, int):
        _checks.fail(_OP, "unit_dim", "an integer", repr(unit_dim), TypeError)
    if not -dims <= unit_dim < dims:
        _checks.fail(_OP, "unit_dim", f"within [{-dims}, {dims - 1}]", unit_dim)
    units = x.shape[unit_dim]
    for name, parameter in (("threshold", threshold), ("leak", leak), ("steepness", steepness)):
        _checks.check_tensor(_OP, name, parameter)
        if parameter.dim() != 1 or parameter.shape[0] != units:
            _checks.fail(_OP, name, f"[x.shape[{unit_dim}]] = [{units}]", list(parameter.shape))
        _checks.check_device(_OP, name, parameter, x, "x")
    if not isinstance(eps, (int, float)):
        _checks.fail(_OP, "eps", "a number", repr(eps), TypeError)


def check_norm(op: str, norm: object) -> None:
    """Raise ValueError unless `norm` is one that the gate can keep."""
    if norm not in _NORMS:
        _checks.fail(op, "norm", "None, 'l1' or 'l2'", repr(norm))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm, ctx.unit_dim, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if _gradients.are_differentiated():
        options = {"norm": _NORMS[ctx.norm], "unit_dim": ctx.unit_dim, "eps": ctx.eps}
        definition = functools.partial(reference.lif_gate, **options)
        wanted = ctx.needs_input_grad[:4]
        return *_gradients.of_definition(_OP, definition, tensors, wanted, (grad_y,)), *(None,) * 3
    parameter_gradients = any(ctx.needs_input_grad[1:4])
    grad_x, grad_parameters = torch.ops.ember_ext.lif_gate_backward.default(
        grad_y, *tensors, ctx.norm, ctx.unit_dim, ctx.eps, parameter_gradients
    )
    gradients = grad_parameters.unbind(0) if parameter_gradients else (None, None, None)
    return grad_x, *gradients, None, None, None


class _LIFGate(torch.autograd.Function):
    """The gradient for eager mode, at a third of what a registered one costs per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    backward = staticmethod(_backward)


if _native.has("cpu"):

    @torch.library.register_fake("ember_ext::lif_gate")
    @torch.library.register_fake("ember_ext::lif_gate_forward")
    def _(x: Tensor, threshold: Tensor, leak: Tensor, steepness: Tensor, *_: Any) -> Tensor:
        # A meta tensor among real ones comes here, and not to the kernel's own check.
        for name, value in (("threshold", threshold), ("leak", leak), ("steepness", steepness)):
            _checks.check_device(_OP, name, value, x, "x")
        return x.new_empty(x.shape)

    @torch.library.register_fake("ember_ext::lif_gate_backward")
    def _(grad_y: Tensor, x: Tensor, threshold: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        rows = 3 if options[-1] else 0
        return x.new_empty(x.shape), threshold.new_empty((rows, threshold.shape[0]))

    torch.library.register_autograd("ember_ext::lif_gate", _backward, setup_context=_setup_context)
    _checks.forbid_double_backward("ember_ext::lif_gate_backward", _OP)
    _gradients.batch_in_a_loop("ember_ext::lif_gate_backward")
