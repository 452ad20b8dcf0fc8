"""Causal LIF attention whose thresholds follow the attention that keys have drawn, fused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _attention, _checks, _gradients
from ember_ext.ops._autocast import without_autocast
from ember_ext.reference.refractory_lif_attention import (
    RefractoryMode,
    RefractoryState,
    require_causal,
)

_OP = "refractory_lif_attention"
_MODES = ("causal", "look_ahead")
_BLOCK = {"cpu": 48, "cuda": 64}
"""Queries from one saved load of the keys to the next: those that are worked on together."""
_WARP_BLOCK = 16
"""The same of 16-bit types on CUDA, where each warp works by itself."""


def refractory_lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    within: Tensor,
    across: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    mode: RefractoryMode = "causal",
    previous_load: Tensor | None = None,
    past: RefractoryState | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, RefractoryState]:
    r"""Causal LIF attention in which a key that has drawn attention gets a higher threshold.

    The threshold of query i at key j is

    .. math::

        \theta_{ij} = \theta + \mathrm{within} \cdot \mathrm{load}_{ij}
            + \mathrm{across} \cdot \mathrm{previous\_load}_{ij},

    where the load is the mean, over queries, of the probabilities p that key j draws. `mode` says
    which queries these are. In mode "causal" they are those up to i, so that no output depends on
    later tokens. In mode "look_ahead" they are all queries, as in the paper's code, so the future
    leaks into the past. In both modes no query sees a later key, and the loads are differentiated.
    For given thresholds the rest is :func:`~ember_ext.lif_attention` with `is_causal`.

    The operator is differentiable in all tensors but the seed, `past` included, and in all results.
    Mode "causal" works on one strip of queries at a time, and keeps the loads and the sums over
    queries at every 48th query (on a GPU at every 64th). Mode "look_ahead" keeps one head's matrix
    for each thread, and two in the backward pass. Both compute in fp32 (fp64 for fp64 input) and
    round once, at the end. The result is the same to the bit for any number of threads. Autocast
    works as in `lif_attention`.

    Args:
        query: [B, H, T, D] in float64, float32, bfloat16 or float16.
        key: [B, G, S + T, D] in the dtype of `query`, G a divisor of H; S tokens lie before the
            first query.
        value: as `key`.
        threshold: :math:`\theta`, [H], finite. Like the four below of any floating dtype.
        leak: :math:`\lambda`, [H], within [0, 1].
        steepness: :math:`k`, [H], finite and > 0.
        within: [H]: how much the load of this layer raises the threshold.
        across: [H]: how much the load of the previous layer does.
        dropout_p: as in `lif_attention`.
        is_causal: must be True. `lif_attention` is not causal by default, so a caller has to say
            it. Default: False.
        scale: as in `lif_attention`.
        mode: "causal" or "look_ahead". Default: "causal".
        previous_load: what the previous layer returned, [B, T, S + T], where each dimension may be
            1. Default: none.
        past: the :class:`~ember_ext.ops.RefractoryState` that the call on the S tokens before
            returned. It must be None in mode "look_ahead", which cannot take a sequence in parts.
            Default: none.
        eps: as in `lif_attention`.
        seed: as in `lif_attention`.

    Returns:
        The output [B, H, T, D] in the dtype of `query`, laid out as [B, T, H, D]; the load of the
        gated weights, averaged over heads, for the next layer, [B, T, S + T] in mode "causal" and
        [B, 1, S + T] in mode "look_ahead"; and the sums to carry on from. Load and sums are in fp32
        (fp64 for fp64 input).

    Raises:
        TypeError: an argument is not a tensor or not of a supported dtype.
        ValueError: a shape, device, value or option does not fit, or `is_causal` is not True. The
            values of threshold, leak and steepness are checked on CPU tensors only, because the
            check would wait for a GPU.

    Examples::

        >>> import torch
        >>> from ember_ext import refractory_lif_attention
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16)
        >>> gates = torch.tensor([[0.1], [0.7], [9.0], [0.2], [0.1]]).expand(5, 4)
        >>> whole, load, state = refractory_lif_attention(query, key, value, *gates, is_causal=True)
        >>> load.shape
        torch.Size([2, 10, 10])

    The sums that a call returns carry a sequence on::

        >>> _, _, past = refractory_lif_attention(
        ...     query[:, :, :6], key[:, :, :6], value[:, :, :6], *gates, is_causal=True
        ... )
        >>> rest, _, _ = refractory_lif_attention(
        ...     query[:, :, 6:], key, value, *gates, is_causal=True, past=past
        ... )
        >>> torch.allclose(rest, whole[:, :, 6:], atol=1e-5)
        True
    """
    _attention.check_attention(_OP, query, key, value, dropout_p, scale, eps, seed)
    heads = {"threshold": threshold, "leak": leak, "steepness": steepness}
    _attention.check_heads(_OP, query, **heads, within=within, across=across)
    require_causal(is_causal)
    _check_loads(query, key, mode, previous_load, past)
    query, key, value = _attention.autocast(query, key, value)
    seed = _attention.draw_seed(query, dropout_p, seed)
    scale = _attention.default_scale(query) if scale is None else scale
    device = query.device.type
    # Without heads a kernel has no pairs to work on, and `past` still has to be handed on.
    if query.shape[1] == 0 or not _native.runs(device, _OP):
        if _checks.is_readable(query):
            _checks.check_gate_parameters(_OP, threshold, leak, steepness)
        with without_autocast(device):
            out, load, state = reference.refractory_lif_attention(
                query,
                key,
                value,
                threshold,
                leak,
                steepness,
                within,
                across,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                mode=mode,
                previous_load=previous_load,
                past=past,
                eps=eps,
                seed=seed,
            )
        return _attention.join_heads(out), load, state
    dtype = _checks.compute_dtype(query.dtype)
    per_head = (t.to(dtype) for t in (threshold, leak, steepness, within, across))
    if previous_load is not None:
        previous_load = previous_load.to(dtype).expand(query.shape[0], -1, key.shape[2])
    sums = (None, None) if past is None else tuple(t.to(dtype) for t in past)
    tensors = (query, key, value, *per_head, previous_load, *sums)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    operators = torch.ops.ember_ext
    operator = (
        operators.refractory_lif_attention
        if needs_grad
        else operators.refractory_lif_attention_forward
    )
    block = _WARP_BLOCK if device == "cuda" and query.element_size() == 2 else _BLOCK[device]
    arguments = (*tensors, seed, dropout_p, mode == "look_ahead", scale, eps, block)
    out, load, probabilities, weights, _, _ = _attention.call_kernel(
        _OP, operator, arguments, (threshold, leak, steepness)
    )
    return out, load, RefractoryState(probabilities, weights)


def _check_loads(
    query: Tensor,
    key: Tensor,
    mode: str,
    previous_load: Tensor | None,
    past: RefractoryState | None,
) -> None:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if mode not in _MODES:
        _checks.fail(_OP, "mode", f"one of {list(_MODES)}", repr(mode))
    if keys < queries:
        _checks.fail(_OP, "key", f"of at least as many tokens as query = {queries}", keys)
    if previous_load is not None:
        _checks.check_tensor(_OP, "previous_load", previous_load)
        full = (batch, queries, keys)
        got = list(previous_load.shape)
        if len(got) != 3 or any(m not in (1, f) for m, f in zip(got, full, strict=True)):
            expected = f"[B, Tq, Tk] = {list(full)}, or 1 in any place"
            _checks.fail(_OP, "previous_load", expected, got)
        _checks.check_device(_OP, "previous_load", previous_load, query, "query")
    if past is not None:
        if not isinstance(past, RefractoryState):
            _checks.fail(_OP, "past", "a RefractoryState", type(past).__name__, TypeError)
        if mode == "look_ahead":
            _checks.fail(_OP, "past", "None in mode 'look_ahead'", type(past).__name__)
        earlier = keys - queries
        sums = (
            ("past.probabilities", past.probabilities, "[B, H, Tk - Tq]", (batch, heads, earlier)),
            ("past.weights", past.weights, "[B, Tk - Tq]", (batch, earlier)),
        )
        for name, value, symbols, shape in sums:
            _checks.check_tensor(_OP, name, value)
            _checks.check_shape(_OP, name, value, symbols, shape)
            _checks.check_device(_OP, name, value, query, "query")


def _defined(
    seed: Tensor | None, options: Sequence[Any], *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """The definition with the raw operators' arguments, `options` from dropout_p on."""
    *per_token_and_head, previous_load, probabilities, weights = tensors
    dropout_p, look_ahead, scale, eps, _ = options
    past = None
    if probabilities is not None and weights is not None:
        past = RefractoryState(probabilities, weights)
    out, load, state = reference.refractory_lif_attention(
        *per_token_and_head,  # type: ignore[arg-type]
        dropout_p=dropout_p,
        is_causal=True,
        scale=scale,
        mode="look_ahead" if look_ahead else "causal",
        previous_load=previous_load,
        past=past,
        eps=eps,
        seed=seed,
    )
    return out, load, *state


def _register() -> None:
    """Give the operators their fake kernels and gradients."""

    @torch.library.register_fake("ember_ext::refractory_lif_attention")
    @torch.library.register_fake("ember_ext::refractory_lif_attention_forward")
    def _(query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, *rest: Any) -> Any:
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        look_ahead, _, _, block = rest[-4:]
        rows = 1 if look_ahead else queries
        blocks = 1 if look_ahead else (queries + block - 1) // block
        return (
            _attention.empty_joined(query),
            threshold.new_empty(batch, rows, keys),
            threshold.new_empty(batch, heads, keys),
            threshold.new_empty(batch, keys),
            threshold.new_empty(3, batch, heads, queries),
            threshold.new_empty(batch * heads * blocks * keys),
        )

    @torch.library.register_fake("ember_ext::refractory_lif_attention_backward")
    def _(*arguments: Any) -> Any:
        query, key, value, threshold = arguments[4:8]
        previous_load = arguments[14]
        wants_previous, wants_past = arguments[-2:]
        batch, heads, queries, _ = query.shape
        earlier = key.shape[2] - queries
        return (
            _attention.empty_joined(query),
            _attention.empty_joined(key),
            _attention.empty_joined(value),
            threshold.new_empty(5, heads),
            threshold.new_empty(previous_load.shape if wants_previous else (0,)),
            threshold.new_empty((batch, heads, earlier) if wants_past else (0,)),
            threshold.new_empty((batch, earlier) if wants_past else (0,)),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[12:]
        ctx.save_for_backward(*inputs[:12], *output[4:])
        # Mostly nobody uses the last layer's load and the sums.
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_out: Tensor | None, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if _gradients.are_differentiated():
            definition = functools.partial(_defined, saved[11], ctx.options)
            tensors, wanted = saved[:11], ctx.needs_input_grad[:11]
            return *_gradients.of_definition(
                _OP, definition, tensors, wanted, (grad_out, *grads[:3])
            ), *(None,) * 6
        *tensors, previous_load, _, _, seed, row_stats, block_loads = saved
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[0])
        wants_previous = ctx.needs_input_grad[8]
        wants_past = ctx.needs_input_grad[9] or ctx.needs_input_grad[10]
        grad_query, grad_key, grad_value, grad_gates, *grad_loads = (
            torch.ops.ember_ext.refractory_lif_attention_backward(
                grad_out,
                *grads[:3],
                *tensors,
                row_stats,
                block_loads,
                previous_load,
                seed,
                *ctx.options,
                wants_previous,
                wants_past,
            )
        )
        wanted = (wants_previous, wants_past, wants_past)
        loads = (g if wants else None for g, wants in zip(grad_loads, wanted, strict=True))
        return grad_query, grad_key, grad_value, *grad_gates.unbind(0), *loads, *(None,) * 6

    torch.library.register_autograd(
        "ember_ext::refractory_lif_attention", backward, setup_context=setup_context
    )
    _checks.forbid_double_backward("ember_ext::refractory_lif_attention_backward", _OP)
    _gradients.batch_in_a_loop("ember_ext::refractory_lif_attention_backward")


if _native.has("cpu"):
    _register()
