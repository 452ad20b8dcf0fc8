"""The common parts of the backward passes: how they are differentiated and how batched.

The kernels compute gradients, and no derivatives of these. A backward pass that is to be
differentiated runs the operator's definition instead, which autograd can follow any number of
times: `are_differentiated` says when, `of_definition` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ember_ext import _native
from ember_ext.ops._autocast import without_autocast


def are_differentiated() -> bool:
    """Whether the gradients that a backward pass computes may themselves be differentiated.

    Autograd enables gradients there for `create_graph=True`; forward-mode AD makes no such request.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def are_batched(*gradients: Tensor | None) -> bool:
    """Whether a backward pass runs for many gradients at once, by `is_grads_batched=True`.

    That calls an operator for one after the other, unless it takes or returns a list of tensors.
    """
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


def of_definition(
    op: str,
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a definition, which are part of autograd's graph as far as that is recorded.

    Args:
        op: the operator, for the warning.
        definition: takes `tensors` and returns what the operator does.
        tensors: the operator's inputs, as the backward pass finds them saved.
        wanted: which of them need a gradient.
        grad_outputs: the gradient of each result; None where there is none.

    Returns:
        For each of `tensors` its gradient, zeros where nothing depends on it, or None if it was not
        wanted.
    """
    wish = "differentiated again" if are_differentiated() else "taken for a batch of vectors"
    _native.warn_once(
        f"a gradient of {op} is to be {wish}, for which it has no compiled kernels, using the "
        "slower PyTorch reference"
    )
    create_graph = torch.is_grad_enabled()
    device = next(t for t in tensors if t is not None).device.type
    with torch.enable_grad(), without_autocast(device):
        # If one input is computed from another, its gradient must not count for both.
        inputs = [
            _alias(t) if t is not None and wants else t
            for t, wants in zip(tensors, wanted, strict=True)
        ]
        outputs = definition(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        reached = [
            (output, grad)
            for output, grad in zip(outputs, grad_outputs, strict=True)
            if grad is not None and output.requires_grad
        ]
        gradients = iter(
            torch.autograd.grad(
                [output for output, _ in reached],
                [t for t, wants in zip(inputs, wanted, strict=True) if t is not None and wants],
                [grad for _, grad in reached],
                create_graph=create_graph,
                materialize_grads=True,
            )
            if reached
            else ()
        )
    return [
        next(gradients, torch.zeros_like(t)) if t is not None and wants else None
        for t, wants in zip(inputs, wanted, strict=True)
    ]


def _alias(tensor: Tensor) -> Tensor:
    """A view that is part of the graph; of a tensor frozen since the forward pass, a new leaf."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def stand_in(tensor: Tensor) -> Tensor | None:
    """Zeros shaped as `tensor` and in its place in autograd's graph, of one element's memory.

    A forward pass that keeps a tensor's values elsewhere saves this in its stead: values and
    stand-in add up to a tensor whose gradients reach the original. None for a tensor that needs no
    gradient.
    """
    if not tensor.requires_grad:
        return None
    with torch.enable_grad():
        return _StandIn.apply(tensor)  # type: ignore[no-any-return, no-untyped-call]


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def batch_in_a_loop(operator: str) -> None:
    """Let `torch.func.vmap` call an operator once for each of the batch.

    torch's own fallback does the same, but not for operators with lists of tensors.
    """
    packet = getattr(torch.ops, operator.split("::")[0])
    overload = getattr(packet, operator.split("::")[1]).default

    def call(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        leaves, structure = pytree.tree_flatten(arguments)
        dims = pytree.tree_leaves(in_dims)
        if info.batch_size == 0:
            # A call on an empty batch tells the shapes of the results.
            leaves = [
                leaf if dim is None else leaf.new_zeros(leaf.movedim(dim, 0).shape[1:])
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            dims = [None] * len(dims)
        results = []
        for index in range(max(info.batch_size, 1)):
            one = [
                leaf if dim is None else leaf.select(dim, index)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            results.append(overload(*pytree.tree_unflatten(one, structure)))
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts)[: info.batch_size], *results)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    torch.library.register_vmap(operator, call)
