"""Attention with a leaky integrate-and-fire gate after the softmax, as a fused operator."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ember_ext import _native, reference
from ember_ext.ops import _checks
from ember_ext.reference.lif_attention import (
    AttentionSummary,
    RefractoryMode,
    RefractoryState,
    attention_probabilities,
    summarize,
    visible_keys,
)

_OP = "lif_attention"
_REFRACTORY_OP = "refractory_lif_attention"
REFRACTORY_MODES = ("causal", "paper")
_PAIRS_AT_ONCE = 2**21
"""Head-query-key triples of refractory attention that are worked on at once: 8 MB a matrix."""


@overload
def lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    seed: Tensor | None = ...,
    return_summary: Literal[False] = ...,
) -> Tensor: ...


@overload
def lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    seed: Tensor | None = ...,
    return_summary: Literal[True],
) -> tuple[Tensor, AttentionSummary]: ...


def lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
    return_summary: bool = False,
) -> Tensor | tuple[Tensor, AttentionSummary]:
    """Attention whose softmax probabilities pass a LIF gate (section 2.2 of the paper).

    p = softmax(query keyᵀ scale); w = p (f + λ (1 - f)) with f = σ(k (p - θ)); the rows of w are
    divided by their sum plus eps; the result is dropout(w) value. A query that sees no key gets
    zeros. Memory grows with Tq + Tk, not with their product. Differentiable once in query, key,
    value, θ, λ and k. Computed in fp32 (fp64 for fp64 input), rounded once, at the end; the same
    bits come out for any number of threads. On a GPU 16-bit types use its matrix units, for which
    weights and gradients of scores are rounded to query's dtype; fp32 does so, rounding its factors
    to tf32, where PyTorch's own products may (`torch.set_float32_matmul_precision`).

    Under autocast query, key and value are rounded to autocast's dtype, unless they are fp64.

    Args:
        query: [B, H, Tq, D] in float64, float32, bfloat16 or float16; any strides.
        key: [B, G, Tk, D] in query's dtype; each of its G heads serves H / G query heads.
        value: [B, G, Tk, D] in query's dtype.
        threshold: θ, [H], finite. Like `leak` and `steepness` of any floating dtype.
        leak: λ, [H], within [0, 1].
        steepness: k, [H], finite and > 0.
        attn_mask: booleans, broadcastable to [B, H, Tq, Tk], True where a key may be seen; with
            `is_causal` both conditions must hold. Default: None.
        dropout_p: probability of dropping a weight, within [0, 1). The others are divided by
            1 - dropout_p. Default: 0.
        is_causal: query i sees key j where j <= i + Tk - Tq: the last query stands at the last key.
            Default: True.
        scale: multiplies the scores; finite, not 0. Default: 1 / sqrt(D).
        eps: added to the sum of a row, >= 0. Default: 1e-8.
        seed: int64 scalar tensor that fixes which weights are dropped. Default: a fresh draw from
            torch's generator of query's device; none without dropout.
        return_summary: also return a summary of the weights. Default: False.

    Returns:
        [B, H, Tq, D] in query's dtype, laid out as [B, Tq, H, D] so that joining the heads copies
        nothing; with `return_summary` also an `AttentionSummary`, in fp32 (fp64 for fp64 input) and
        without gradient.

    Raises:
        TypeError: an argument is not a tensor or not of a supported dtype.
        ValueError: a shape, device, value or option does not fit. The values of θ, λ and k are
            checked on CPU tensors only: on a GPU the check would wait for the device.
    """
    _check_attention(_OP, query, key, value, dropout_p, scale, eps, seed)
    _check_heads(_OP, query, threshold=threshold, leak=leak, steepness=steepness)
    _check_mask(query, key, attn_mask)
    query, key, value = _autocast(query, key, value)
    seed = _draw_seed(query, dropout_p, seed)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if not _native.has(query.device.type, _OP):
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            _checks.check_gate_parameters(_OP, threshold, leak, steepness)
        return _run_reference(
            (query, key, value, threshold, leak, steepness),
            return_summary,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            eps=eps,
            seed=seed,
        )
    dtype = _checks.compute_dtype(query.dtype)
    tensors = (query, key, value, threshold.to(dtype), leak.to(dtype), steepness.to(dtype))
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    operators = torch.ops.ember_ext
    operator = operators.lif_attention if needs_grad else operators.lif_attention_forward
    options = (attn_mask, seed, dropout_p, is_causal, scale, eps, _tf32(query), return_summary)
    arguments = (*tensors, *options)
    try:
        out, _, summary, load = operator(*arguments)
    except RuntimeError:
        # The kernel looks at the gates' values for free, but only Python words errors well.
        if not torch.compiler.is_compiling():
            _checks.check_gate_parameters(_OP, threshold, leak, steepness)
        raise
    if not return_summary:
        return out  # type: ignore[no-any-return]
    entropy, support, first_token, fire_rate = summary.detach().unbind(0)
    return out, AttentionSummary(entropy, support, first_token, fire_rate, load.detach())


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
    mode: RefractoryMode = "causal",
    previous_load: Tensor | None = None,
    past: RefractoryState | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, RefractoryState]:
    """Causal LIF attention in which a key that has drawn attention gets a higher threshold.

    θ_ij = θ + within · load_ij + across · previous_load_ij, where load_ij is the mean over queries
    of the probabilities p that key j draws. `mode` says over which queries: "causal", those up to
    i, so that no output depends on later tokens; "paper", all of them, as in the released code,
    which lets the future leak into the past. The loads are differentiated. Gates with these
    thresholds, this is `lif_attention` with `is_causal`.

    Runs on PyTorch's own operators, on a part of the batch at a time, and computes each part again
    in backward: the matrices of one part, and the loads, are all that is ever stored.

    Args:
        query: [B, H, T, D] in float64, float32, bfloat16 or float16.
        key: [B, G, S + T, D] in query's dtype, G a divisor of H; S tokens lie before the first
            query.
        value: as key.
        threshold: θ, [H].
        leak: λ, [H], within [0, 1].
        steepness: k, [H], > 0.
        within: [H]: how much the own load raises the threshold.
        across: [H]: how much the previous layer's does.
        mode: "causal" or "paper". Default: "causal".
        previous_load: what the previous layer returned, broadcastable to [B, T, S + T]. Default:
            none.
        past: what the call on the S tokens before returned. Default: none. In mode "paper" it must
            be None: there a sequence cannot be taken in parts.
        dropout_p: as in `lif_attention`.
        scale: as in `lif_attention`.
        eps: as in `lif_attention`.
        seed: as in `lif_attention`.

    Returns:
        The output [B, H, T, D] in query's dtype; the load of the gated weights, averaged over
        heads, for the next layer, [B, T, S + T] in mode "causal" and [B, 1, S + T] in mode "paper";
        and the sums to carry on from.

    Raises:
        TypeError: an argument is not a tensor or not of a supported dtype.
        ValueError: a shape, device, value or option does not fit.
    """
    op = _REFRACTORY_OP
    _check_attention(op, query, key, value, dropout_p, scale, eps, seed)
    heads = {"threshold": threshold, "leak": leak, "steepness": steepness}
    _check_heads(op, query, **heads, within=within, across=across)
    _check_refractory(query, key, mode, previous_load, past)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        _checks.check_gate_parameters(op, threshold, leak, steepness)
    query, key, value = _autocast(query, key, value)
    seed = _draw_seed(query, dropout_p, seed)
    batch, head_count, queries, _ = query.shape
    if previous_load is not None:
        previous_load = previous_load.expand(batch, -1, -1)

    def run(part: slice) -> tuple[Tensor, Tensor, RefractoryState]:
        return reference.refractory_lif_attention(
            query[part],
            key[part],
            value[part],
            threshold,
            leak,
            steepness,
            within,
            across,
            mode=mode,
            previous_load=None if previous_load is None else previous_load[part],
            past=None if past is None else RefractoryState(*(t[part] for t in past)),
            dropout_p=dropout_p,
            scale=scale,
            eps=eps,
            seed=seed,
            first_batch=part.start,
        )

    pairs = head_count * queries * key.shape[2]
    size = max(1, _PAIRS_AT_ONCE // max(pairs, 1))
    with torch.autocast(query.device.type, enabled=False):
        if torch.compiler.is_compiling() or batch <= size:
            return run(slice(0, batch))
        parts = [
            checkpoint(run, slice(b, b + size), use_reentrant=False, preserve_rng_state=False)
            for b in range(0, batch, size)
        ]
    outs, loads, states = zip(*parts, strict=True)
    state = RefractoryState(*(torch.cat(sums) for sums in zip(*states, strict=True)))
    return torch.cat(outs), torch.cat(loads), state


def _run_reference(
    tensors: tuple[Tensor, ...], return_summary: bool, **options: Any
) -> Tensor | tuple[Tensor, AttentionSummary]:
    query, key, _, threshold = tensors[:4]
    with torch.autocast(query.device.type, enabled=False):
        out, w = reference.lif_attention(*tensors, **options, return_weights=True)
        # Laid out as the kernels do it.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        if not return_summary:
            return out
        with torch.no_grad():
            visible = visible_keys(query, key, options["attn_mask"], options["is_causal"])
            p = attention_probabilities(query, key, visible, options["scale"])
            return out, summarize(p, w, threshold, visible)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) for t in tensors)


def _tf32(query: Tensor) -> bool:
    return query.is_cuda and query.dtype == torch.float32 and _allows_tf32()


@torch.compiler.assume_constant_result
def _allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _draw_seed(query: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)
    return seed


def _check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    scale: float | None,
    eps: float,
    seed: Tensor | None,
) -> None:
    autocast = isinstance(query, Tensor) and torch.is_autocast_enabled(query.device.type)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            _checks.fail(op, name, "[batch, heads, tokens, head size]", list(tensor.shape))
        _checks.check_device(op, name, tensor, query, "query")
        if tensor.dtype != query.dtype and not autocast:
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
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        _checks.fail(op, "scale", "finite and not 0", scale)
    if not (eps >= 0 and math.isfinite(eps)):
        _checks.fail(op, "eps", "finite and >= 0", eps)
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
            got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
            _checks.fail(op, "seed", "an int64 tensor", got, TypeError)
        _checks.check_shape(op, "seed", seed, "a scalar,", ())
        _checks.check_device(op, "seed", seed, query, "query")


def _check_heads(op: str, query: Tensor, **parameters: Tensor) -> None:
    for name, parameter in parameters.items():
        _checks.check_tensor(op, name, parameter)
        _checks.check_shape(op, name, parameter, "[H]", (query.shape[1],))
        _checks.check_device(op, name, parameter, query, "query")


def _check_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        _checks.fail(_OP, "attn_mask", "a boolean tensor, True where visible", got, TypeError)
    full = (*query.shape[:3], key.shape[2])
    fits = mask.dim() <= 4 and all(
        m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        expected = f"broadcastable to [B, H, Tq, Tk] = {list(full)}"
        _checks.fail(_OP, "attn_mask", expected, list(mask.shape))
    _checks.check_device(_OP, "attn_mask", mask, query, "query")


def _check_refractory(
    query: Tensor,
    key: Tensor,
    mode: str,
    previous_load: Tensor | None,
    past: RefractoryState | None,
) -> None:
    op = _REFRACTORY_OP
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if mode not in REFRACTORY_MODES:
        _checks.fail(op, "mode", f"one of {list(REFRACTORY_MODES)}", repr(mode))
    if keys < queries:
        _checks.fail(op, "key", f"of at least as many tokens as query = {queries}", keys)
    if previous_load is not None:
        _checks.check_tensor(op, "previous_load", previous_load)
        full = (batch, queries, keys)
        got = list(previous_load.shape)
        if len(got) != 3 or any(m not in (1, f) for m, f in zip(got, full, strict=True)):
            expected = f"broadcastable to [B, Tq, Tk] = {list(full)}"
            _checks.fail(op, "previous_load", expected, got)
        _checks.check_device(op, "previous_load", previous_load, query, "query")
    if past is not None:
        if mode == "paper":
            _checks.fail(op, "past", "None in mode 'paper'", type(past).__name__)
        earlier = keys - queries
        shape = (batch, heads, earlier)
        _checks.check_shape(op, "past.probabilities", past.probabilities, "[B, H, Tk - Tq]", shape)
        _checks.check_shape(op, "past.weights", past.weights, "[B, Tk - Tq]", (batch, earlier))


def _register() -> None:
    """Give the operators their fake kernels and gradients."""

    def like_heads_joined(query: Tensor) -> Tensor:
        batch, heads, tokens, size = query.shape
        return query.new_empty(batch, tokens, heads, size).transpose(1, 2)

    @torch.library.register_fake("ember_ext::lif_attention")
    @torch.library.register_fake("ember_ext::lif_attention_forward")
    def _(query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, *options: Any) -> Any:
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        has_summary = options[-1]
        return (
            like_heads_joined(query),
            threshold.new_empty(3, batch, heads, queries),
            threshold.new_empty((4, batch, heads) if has_summary else (0,)),
            threshold.new_empty((batch, heads, keys) if has_summary else (0,)),
        )

    @torch.library.register_fake("ember_ext::lif_attention_backward")
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
        threshold = rest[0]
        return (
            like_heads_joined(query),
            like_heads_joined(key),
            like_heads_joined(value),
            threshold.new_empty(3, threshold.shape[0]),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, mask, seed = inputs[:8]
        *ctx.options, _ = inputs[8:]
        ctx.save_for_backward(*tensors, output[1], mask, seed)

    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_query, grad_key, grad_value, grad_gates = torch.ops.ember_ext.lif_attention_backward(
            grad_out, *ctx.saved_tensors, *ctx.options
        )
        return grad_query, grad_key, grad_value, *grad_gates.unbind(0), *(None,) * 8

    torch.library.register_autograd(
        "ember_ext::lif_attention", backward, setup_context=setup_context
    )
    _checks.forbid_double_backward("ember_ext::lif_attention_backward", _OP)


if _native.has("cpu"):
    _register()
