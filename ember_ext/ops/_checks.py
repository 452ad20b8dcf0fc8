"""Argument checks shared by the operators; messages name operator, argument, expected and got."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ember_ext import _native

FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def fail(
    op: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` with the package's error text."""
    raise error(f"ember_ext.{op}: {argument} must be {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor of one of the four supported dtypes."""
    if not isinstance(value, Tensor):
        fail(op, argument, "a torch.Tensor", type(value).__name__, TypeError)
    if value.dtype not in FLOATING:
        fail(op, argument, "float64, float32, bfloat16 or float16", value.dtype, TypeError)


def check_device(op: str, argument: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Raise ValueError unless `value` is on the device of `like`."""
    if value.device != like.device:
        fail(op, argument, f"on {like_name}'s device {like.device}", value.device)


def check_shape(
    op: str, argument: str, value: Tensor, symbols: str, shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless `value` has `shape`, which `symbols` ("[B, H]") puts in words."""
    if value.shape != shape:
        fail(op, argument, f"{symbols} = {list(shape)}", list(value.shape))


def check_fits(
    op: str, argument: str, value: Tensor, symbols: str, shape: tuple[int, ...], x: Tensor
) -> None:
    """Raise unless `value` is a floating tensor, has `shape`, and is on the device of x."""
    check_tensor(op, argument, value)
    check_shape(op, argument, value, symbols, shape)
    check_device(op, argument, value, x, "x")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operator on `dtype` computes and keeps its parameters in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_readable(value: Tensor) -> bool:
    """Whether a check may look at the values: on a GPU it would wait, in a trace it cannot."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _native.is_tracing()
        and not _native.transforms_active()
        and not isinstance(value, FakeTensor)
    )


def check_gate_parameters(op: str, threshold: Tensor, leak: Tensor, steepness: Tensor) -> None:
    """Raise ValueError unless θ is finite, λ within [0, 1] and k finite and positive.

    λ may reach 0 and 1 because a sigmoid does so in floating point. Reads the values, so a CUDA
    tensor costs a synchronisation: call it where that is acceptable, or to explain a failure.
    """
    # A hook on saved tensors would see what autograd saves here.
    threshold, leak, steepness = threshold.detach(), leak.detach(), steepness.detach()
    for argument, expected, value, good in (
        ("threshold", "finite", threshold, threshold.isfinite()),
        ("leak", "within [0, 1]", leak, (leak >= 0) & (leak <= 1)),
        ("steepness", "finite and > 0", steepness, steepness.isfinite() & (steepness > 0)),
    ):
        if not bool(good.all()):
            index = int((~good).flatten().nonzero()[0])
            fail(op, argument, expected, f"{value.flatten()[index].item()} at index {index}")


def forbid_double_backward(operator: str, op: str) -> None:
    """Make differentiating a backward operator an error; torch would return zeros in silence."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"ember_ext.{op}: double backward is not implemented for the raw operators; "
            f"ember_ext.ops.{op} can be differentiated any number of times"
        )

    torch.library.register_autograd(operator, backward)
