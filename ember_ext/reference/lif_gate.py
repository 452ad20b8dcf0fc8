"""The leaky integrate-and-fire gate, as defined in section 2.1 of the paper."""

from __future__ import annotations

import torch
from torch import Tensor


def fire_mask(u: Tensor, threshold: Tensor, steepness: Tensor) -> Tensor:
    """f = σ(k (u - θ)): how strongly an input of magnitude `u` >= 0 fires."""
    return torch.sigmoid(steepness * (u - threshold))


def lif_gate(
    x: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    norm: str | None = None,
    unit_dim: int = -1,
    eps: float = 1e-8,
) -> Tensor:
    """Define the operator :func:`ember_ext.lif_gate`, with the same arguments.

    bf16 and fp16 are computed in fp32 and rounded once, at the end.

    Examples::

        >>> import torch
        >>> from ember_ext import lif_gate, reference
        >>> x, gate = torch.randn(4, 3), torch.tensor([[0.1], [0.7], [9.0]]).expand(3, 3)
        >>> torch.allclose(lif_gate(x, *gate), reference.lif_gate(x, *gate), atol=1e-6)
        True
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    units = [1] * x.dim()
    units[unit_dim] = -1
    theta, lam, k = (p.to(compute_dtype).view(units) for p in (threshold, leak, steepness))
    u = x.to(compute_dtype)
    fire = fire_mask(u.abs(), theta, k)
    y = u * (fire + lam * (1 - fire))
    if norm is not None:
        y = y * _norm_ratio(u, y, 1 if norm == "l1" else 2, eps)
    return y.to(x.dtype)


def _norm_ratio(x: Tensor, y: Tensor, order: int, eps: float) -> Tensor:
    """‖x‖ / (‖y‖ + eps) over the last dimension; 0, its limit, for a row of zeros."""
    # The row is divided by its largest entry before both norms, so that 1e30² cannot overflow.
    scale = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(1)
    zero = scale == 0
    scale = torch.where(zero, 1, scale)
    # The inner `where` keeps the square root's infinite slope at 0 out of the graph.
    x_norm, y_norm = (
        torch.linalg.vector_norm(torch.where(zero, 1, v / scale), order, -1, keepdim=True)
        for v in (x, y)
    )
    return torch.where(zero, 0, x_norm / (y_norm + eps / scale))
