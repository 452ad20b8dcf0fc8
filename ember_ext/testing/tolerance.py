"""The tolerance rule: a kernel may err at most twice as far as eager PyTorch does, plus a floor.

Errors are measured against the reference in fp64, relative to the largest entry of the exact
result, tensor by tensor. Nothing in the environment relaxes the rule.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distance(value: Tensor, exact: Tensor) -> float:
    """Largest |value - exact|, with NaN and infinities required to agree in place and sign."""
    value, exact = value.detach().double(), exact.detach().double()
    if value.shape != exact.shape:
        raise AssertionError(f"shape {list(value.shape)}, expected {list(exact.shape)}")
    special = ~exact.isfinite()
    if not torch.equal(special, ~value.isfinite()) or not torch.allclose(
        value[special], exact[special], equal_nan=True
    ):
        return float("inf")
    difference = (value - exact)[~special].abs()
    return float(difference.max()) if difference.numel() else 0.0


def error_bound(
    eager: Tensor, exact: Tensor, *, floor_ulps: float | None = None, scale: float = 0.0
) -> float:
    """Twice eager's error plus a floor.

    The floor is `floor_ulps` units in the last place of the largest exact entry, or of `scale` if
    that is larger. Default: 4, and 32 for fp64, where the "exact" result is rounded no less than
    eager.
    """
    if floor_ulps is None:
        floor_ulps = 32.0 if eager.dtype == torch.float64 else 4.0
    finite = exact[exact.isfinite()]
    scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    floor = floor_ulps * torch.finfo(eager.dtype).eps * scale
    eager_error = distance(eager, exact)
    # Where eager itself overflows, only the floor counts.
    return floor + (2 * eager_error if eager_error != float("inf") else 0.0)


def assert_close(
    name: str,
    value: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    floor_ulps: float | None = None,
    scale: float = 0.0,
) -> None:
    """Raise AssertionError unless `value` obeys the tolerance rule.

    Args:
        name: what the tensor is, for the message.
        value: the kernel's result.
        eager: the reference's result in `value`'s dtype.
        exact: the reference's result in fp64 on the same (exactly converted) inputs.
        floor_ulps: see `error_bound`.
        scale: see `error_bound`.
    """
    if value.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype {value.dtype}, expected {eager.dtype}")
    error = distance(value, exact)
    bound = error_bound(eager, exact, floor_ulps=floor_ulps, scale=scale)
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3g} exceeds the bound {bound:.3g}")
