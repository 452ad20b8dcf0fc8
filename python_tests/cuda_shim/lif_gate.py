"""The LIF gate's CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

import cuda_shim


class Params(ctypes.Structure):
    """ember::LifGateParams."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("norm", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("unit_rows", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("x", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("leak", ctypes.c_void_p),
        ("steepness", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_parameters", ctypes.c_void_p),
        ("partial_gradients", ctypes.c_void_p),
        ("thread_scratch", ctypes.c_void_p),
    )


def _describe(x: Tensor, norm: str | None, unit_dim: int, eps: float) -> Params:
    """What csrc/binding/lif_gate.cpp fills in."""
    p = Params(dtype=cuda_shim.DTYPE_CODES[x.dtype], eps=eps, units=x.shape[unit_dim])
    p.norm = (None, "l1", "l2").index(norm)
    unit, last = unit_dim % x.dim(), x.dim() - 1
    if unit == last:
        p.cols = x.shape[last]
    else:
        split = last if norm else unit + 1
        p.cols = x.shape[split:].numel()
        p.unit_rows = x.shape[unit + 1 : split].numel()
    p.rows = x.numel() // p.cols
    return p


def _behind(x: Tensor, elements: int) -> tuple[Tensor, int]:
    """x behind so many other elements, and the bytes that these take."""
    if not elements:
        return x, 0
    return torch.cat([x.new_full((elements,), float("nan")), x.flatten()]), (
        elements * x.element_size()
    )


def partial_sums(x: Tensor, norm: str | None = None) -> int:
    """How many numbers the blocks of a backward pass leave for the sums over rows."""
    count = cuda_shim.operators().library.ember_lif_gate_partial_gradients
    count.restype = ctypes.c_int64
    return int(count(ctypes.byref(_describe(x, norm, -1, 1e-8))))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        leak: Tensor,
        steepness: Tensor,
        *options: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, threshold, leak, steepness)
        ctx.architecture, ctx.x_offset, *ctx.options = options
        shim, p = cuda_shim.operators(ctx.architecture), _describe(x, *ctx.options)
        shifted, bytes_before = _behind(x, ctx.x_offset)

        def run(addresses: dict[str, int | None]) -> int:
            cuda_shim.fill(p, {**addresses, "x": (addresses["x"] or 0) + bytes_before})
            return int(shim.library.ember_lif_gate_forward(ctypes.byref(p)))

        inputs = {"x": shifted, "threshold": threshold, "leak": leak, "steepness": steepness}
        return shim.call(run, dict(inputs), {"y": x})["y"]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold, leak, steepness = ctx.saved_tensors
        shim, p = cuda_shim.operators(ctx.architecture), _describe(x, *ctx.options)
        outputs = {"grad_x": x}
        if any(ctx.needs_input_grad[1:4]):
            partials = shim.library.ember_lif_gate_partial_gradients
            partials.restype = ctypes.c_int64
            # The plan of the launch depends on which pointers are set, but not its partial sums.
            outputs["grad_parameters"] = torch.empty(3, leak.numel(), dtype=leak.dtype)
            outputs["partial_gradients"] = leak.new_empty(partials(ctypes.byref(p)))

        shifted, bytes_before = _behind(x, ctx.x_offset)

        def run(addresses: dict[str, int | None]) -> int:
            cuda_shim.fill(p, {**addresses, "x": (addresses["x"] or 0) + bytes_before})
            return int(shim.library.ember_lif_gate_backward(ctypes.byref(p)))

        inputs = {"x": shifted, "threshold": threshold, "leak": leak, "steepness": steepness}
        results = shim.call(run, {"grad_y": grad_y, **inputs}, outputs)
        parameters = results.get("grad_parameters", (None, None, None))
        return results["grad_x"], *parameters, *(None,) * 5


def lif_gate(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    norm: str | None = None,
    unit_dim: int = -1,
    eps: float = 1e-8,
    x_offset: int = 0,
    architecture: int = cuda_shim.ARCHITECTURE,
) -> Tensor:
    """As ember_ext.ops.lif_gate; x begins `x_offset` elements behind an aligned address."""
    compute = torch.promote_types(x.dtype, torch.float32)
    gate = [p.to(compute) for p in (threshold, leak, steepness)]
    return _Gate.apply(x, *gate, architecture, x_offset, norm, unit_dim, eps)  # type: ignore[no-any-return]
