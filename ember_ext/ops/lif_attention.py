"""Attention with a leaky integrate-and-fire gate after the softmax, as a fused operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ember_ext import _native, reference
from ember_ext.ops import _attention, _checks, _gradients
from ember_ext.ops._autocast import without_autocast
from ember_ext.reference.lif_attention import (
    AttentionSummary,
    attention_probabilities,
    summarize,
    visible_keys,
    without_hidden,
)

_OP = "lif_attention"


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
    is_causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
    return_summary: bool = False,
) -> Tensor | tuple[Tensor, AttentionSummary]:
    r"""Attention whose softmax probabilities pass a LIF gate.

    Each probability is gated by its size before the rows are normalised again (section 2.2 of the
    paper):

    .. math::

        p &= \operatorname{softmax}(\mathrm{scale} \cdot \mathrm{query}\,\mathrm{key}^\top), \\
        w &= p\,\bigl(f + \lambda (1 - f)\bigr), \qquad f = \sigma\bigl(k (p - \theta)\bigr), \\
        \mathrm{out} &=
            \operatorname{dropout}\Bigl(\frac{w}{\sum w + \mathrm{eps}}\Bigr)\,\mathrm{value}.

    The keywords and their defaults are those of
    :func:`torch.nn.functional.scaled_dot_product_attention`. A query that sees no key gets zeros.

    The matrix of weights is never stored, so memory grows with Tq + Tk and not with their product.
    `return_summary` describes the weights, and :func:`ember_ext.reference.lif_attention` returns
    them with `return_weights=True`. The operator is differentiable in query, key, value and the
    three parameters of the gate. It computes in fp32 (fp64 for fp64 input) and rounds once, at the
    end. The result is the same to the bit for any number of threads.

    On a GPU, 16-bit types use the matrix units, for which weights and gradients of scores are
    rounded to the dtype of `query`. fp32 rounds its factors to tf32 where PyTorch's own products
    may do so, see :func:`torch.set_float32_matmul_precision`. Under autocast query, key and value
    are rounded to autocast's dtype, unless they are fp64.

    Args:
        query: [B, H, Tq, D] in float64, float32, bfloat16 or float16; any strides.
        key: [B, G, Tk, D] in the dtype of `query`; each of its G heads serves H / G query heads.
        value: [B, G, Tk, D] in the dtype of `query`.
        threshold: :math:`\theta`, [H], finite. Like `leak` and `steepness` of any floating dtype.
        leak: :math:`\lambda`, [H], within [0, 1].
        steepness: :math:`k`, [H], finite and > 0.
        attn_mask: booleans, broadcastable to [B, H, Tq, Tk], True where a key may be seen; with
            `is_causal` both conditions must hold. A query that sees no key, and a key that no query
            sees, may hold anything, NaN too. Default: None.
        dropout_p: probability of dropping a weight, within [0, 1). The others are divided by 1 -
            dropout_p. Default: 0.
        is_causal: query i sees key j where j <= i + Tk - Tq, so the last query stands at the last
            key, as it does behind a cache. `scaled_dot_product_attention` lets the first query
            stand at the first key. Both are the same where Tq = Tk. Default: False.
        scale: multiplies the scores; finite, not 0. Default: 1 / sqrt(D).
        eps: added to the sum of a row, finite, >= 0. Default: 1e-8.
        seed: int64 scalar tensor that fixes which weights are dropped. Default: a fresh draw from
            torch's generator of the device of `query`; none without dropout.
        return_summary: also return a summary of the weights. Default: False.

    Returns:
        [B, H, Tq, D] in the dtype of `query`, laid out as [B, Tq, H, D], so that joining the heads
        copies nothing. With `return_summary` also an :class:`~ember_ext.ops.AttentionSummary`, in
        fp32 (fp64 for fp64 input) and without gradient.

    Raises:
        TypeError: an argument is not a tensor or not of a supported dtype.
        ValueError: a shape, device, value or option does not fit. The values of the three
            parameters are checked on CPU tensors only, because the check would wait for a GPU.

    Examples::

        >>> import torch
        >>> from ember_ext import lif_attention
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16)  # batch, heads, tokens, head size
        >>> threshold, leak, steepness = torch.tensor([[0.1], [0.7], [9.0]]).expand(3, 4)
        >>> out = lif_attention(query, key, value, threshold, leak, steepness, is_causal=True)
        >>> out.shape
        torch.Size([2, 4, 10, 16])

    A leak of 1 lets everything pass, which leaves plain attention::

        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> out = lif_attention(query, key, value, threshold, torch.ones(4), steepness)
        >>> torch.allclose(out, scaled_dot_product_attention(query, key, value), atol=1e-5)
        True

    The summary describes the weights of each head, which are not stored::

        >>> out, summary = lif_attention(
        ...     query, key, value, threshold, leak, steepness, return_summary=True
        ... )
        >>> summary.entropy.shape
        torch.Size([2, 4])
    """
    _attention.check_attention(_OP, query, key, value, dropout_p, scale, eps, seed)
    _attention.check_heads(_OP, query, threshold=threshold, leak=leak, steepness=steepness)
    _check_mask(query, key, attn_mask)
    query, key, value = _attention.autocast(query, key, value)
    seed = _attention.draw_seed(query, dropout_p, seed)
    scale = _attention.default_scale(query) if scale is None else scale
    if attn_mask is not None:
        query, key, value = without_hidden(query, key, value, attn_mask)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if not _native.runs(query.device.type, _OP):
        if _checks.is_readable(query):
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
    out, _, summary, load = _attention.call_kernel(
        _OP, operator, (*tensors, *options), (threshold, leak, steepness)
    )
    if not return_summary:
        return out  # type: ignore[no-any-return]
    entropy, support, first_token, fire_rate = summary.detach().unbind(0)
    return out, AttentionSummary(entropy, support, first_token, fire_rate, load.detach())


def _run_reference(
    tensors: tuple[Tensor, ...], return_summary: bool, **options: Any
) -> Tensor | tuple[Tensor, AttentionSummary]:
    query, key, _, threshold = tensors[:4]
    with without_autocast(query.device.type):
        out, w = reference.lif_attention(*tensors, **options, return_weights=True)
        out = _attention.join_heads(out)
        if not return_summary:
            return out
        with torch.no_grad():
            visible = visible_keys(query, key, options["attn_mask"], options["is_causal"])
            p = attention_probabilities(query, key, visible, options["scale"])
            return out, summarize(p, w, threshold, visible)


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


def _tf32(query: Tensor) -> bool:
    return query.is_cuda and query.dtype == torch.float32 and _allows_tf32()


def _backward_reads_out(query: Tensor) -> bool:
    """Whether the gradient's kernel takes forward's output, which saves it a sweep over the keys.

    Elsewhere the output is not kept, and may be changed in place.
    """
    return query.is_cuda and query.element_size() == 2 and query.shape[3] <= 128


@torch.compiler.assume_constant_result
def _allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _defined(masks: Sequence[Tensor | None], options: Sequence[Any], *tensors: Tensor) -> Tensor:
    """The definition with the raw operators' arguments: mask and seed, then from dropout_p on."""
    attn_mask, seed = masks
    dropout_p, is_causal, scale, eps, _ = options
    out = reference.lif_attention(
        *tensors,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        eps=eps,
        seed=seed,
    )
    assert isinstance(out, Tensor)
    return out


def _register() -> None:
    """Give the operators their fake kernels and gradients."""

    @torch.library.register_fake("ember_ext::lif_attention")
    @torch.library.register_fake("ember_ext::lif_attention_forward")
    def _(query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, *options: Any) -> Any:
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        has_summary = options[-1]
        return (
            _attention.empty_joined(query),
            threshold.new_empty(3, batch, heads, queries),
            threshold.new_empty((4, batch, heads) if has_summary else (0,)),
            threshold.new_empty((batch, heads, keys) if has_summary else (0,)),
        )

    @torch.library.register_fake("ember_ext::lif_attention_backward")
    def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
        threshold = rest[0]
        return (
            _attention.empty_joined(query),
            _attention.empty_joined(key),
            _attention.empty_joined(value),
            threshold.new_empty(3, threshold.shape[0]),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, mask, seed = inputs[:8]
        *ctx.options, _ = inputs[8:]
        out = output[0] if _backward_reads_out(tensors[0]) else None
        ctx.save_for_backward(*tensors, out, output[1], mask, seed)

    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if _gradients.are_differentiated():
            definition = functools.partial(_defined, saved[8:], ctx.options)
            tensors, wanted = saved[:6], ctx.needs_input_grad[:6]
            gradients = _gradients.of_definition(_OP, definition, tensors, wanted, (grad_out,))
            return *gradients, *(None,) * 8
        grad_query, grad_key, grad_value, grad_gates = torch.ops.ember_ext.lif_attention_backward(
            grad_out, *saved, *ctx.options
        )
        return grad_query, grad_key, grad_value, *grad_gates.unbind(0), *(None,) * 8

    torch.library.register_autograd(
        "ember_ext::lif_attention", backward, setup_context=setup_context
    )
    _checks.forbid_double_backward("ember_ext::lif_attention_backward", _OP)
    _gradients.batch_in_a_loop("ember_ext::lif_attention_backward")


if _native.has("cpu"):
    _register()
