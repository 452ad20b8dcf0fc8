"""The common parts of the attention operators: argument checks, autocast, seeds and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ember_ext.ops import _checks
from ember_ext.ops._autocast import autocast_dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on and they are not fp64."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(dtype) for t in tensors)


def draw_seed(query: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The seed to use: none without dropout, and a fresh one where none is given."""
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)
    return seed


def default_scale(query: Tensor) -> float:
    """1 / sqrt(D)."""
    return 1 / math.sqrt(max(query.shape[-1], 1))


def join_heads(out: Tensor) -> Tensor:
    """Lay out [B, H, T, D] as [B, T, H, D], as the kernels do, so that joining heads is free."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def empty_joined(like: Tensor) -> Tensor:
    """Like [B, H, T, D], laid out as [B, T, H, D]."""
    batch, heads, tokens, size = like.shape
    return like.new_empty(batch, tokens, heads, size).transpose(1, 2)


def call_kernel(
    op: str, operator: Callable[..., Any], arguments: tuple[Any, ...], gates: tuple[Tensor, ...]
) -> Any:
    """Call an operator of `op` whose arguments include `gates`, θ, λ and k."""
    try:
        return operator(*arguments)
    except RuntimeError:
        # The kernel checks the gates' values at no cost, and Python finds the words for an error.
        if not torch.compiler.is_compiling():
            _checks.check_gate_parameters(op, *gates)
        raise


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    scale: float | None,
    eps: float,
    seed: Tensor | None,
) -> None:
    """Check what all attention operators take, naming the operator `op` and the argument."""
    # `autocast` will convert them.
    any_dtype = (
        isinstance(query, Tensor)
        and query.dtype != torch.float64
        and autocast_dtype(query.device.type) is not None
    )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            _checks.fail(op, name, "[batch, heads, tokens, head size]", list(tensor.shape))
        _checks.check_device(op, name, tensor, query, "query")
        if tensor.dtype != query.dtype and not any_dtype:
            _checks.fail(op, name, f"of query's dtype {query.dtype}", tensor.dtype, TypeError)
    batch, heads, _, size = query.shape
    groups, keys = key.shape[1:3]
    if heads != 0 if groups == 0 else heads % groups:
        _checks.fail(op, "key", f"of G heads with G a divisor of H = {heads}", groups)
    shape = (batch, groups, keys, size)
    _checks.check_shape(op, "key", key, "[B, G, Tk, D]", shape)
    _checks.check_shape(op, "value", value, "[B, G, Tk, D]", shape)
    if not 0 <= dropout_p < 1:
        _checks.fail(op, "dropout_p", "within [0, 1)", dropout_p)
    # `torch.compile` may make a symbolic number of a float, and `math.isfinite` takes none.
    if scale is not None and not (-math.inf < scale < 0 or 0 < scale < math.inf):
        _checks.fail(op, "scale", "finite and not 0", scale)
    if not 0 <= eps < math.inf:
        _checks.fail(op, "eps", "finite and >= 0", eps)
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
            got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
            _checks.fail(op, "seed", "an int64 tensor", got, TypeError)
        if seed.dim():
            _checks.fail(op, "seed", "of no dimension", list(seed.shape))
        _checks.check_device(op, "seed", seed, query, "query")


def check_heads(op: str, query: Tensor, **parameters: Tensor) -> None:
    """Check parameters with one value for each head of `query`."""
    for name, parameter in parameters.items():
        _checks.check_tensor(op, name, parameter)
        _checks.check_shape(op, name, parameter, "[H]", (query.shape[1],))
        _checks.check_device(op, name, parameter, query, "query")
