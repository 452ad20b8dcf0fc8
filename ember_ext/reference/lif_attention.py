"""LIF attention: a LIF gate between attention's softmax and its values (section 2.2 of the paper).

Everything here stores the matrix of weights, several times over. `ember_ext.lif_attention` does
not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ember_ext.reference.lif_gate import fire_mask


class AttentionSummary(NamedTuple):
    """A description of attention weights: means over queries, for each head.

    Probabilities are those before the gate. Weights are those that multiply the values, before
    dropout. A query that sees no key counts as one of zero probabilities.

    Examples::

        >>> import torch
        >>> from ember_ext import lif_attention
        >>> query, key, value = torch.zeros(3, 1, 1, 4, 8)  # equal scores
        >>> gate = torch.tensor([[0.0], [1.0], [1.0]])  # everything passes
        >>> _, summary = lif_attention(query, key, value, *gate, return_summary=True)
        >>> summary.entropy  # ln 4
        tensor([[1.3863]])
        >>> summary.load
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """

    entropy: Tensor
    """-Σ w ln w over keys, in nats, [B, H]."""
    support: Tensor
    """How many keys have a weight above 0.01, [B, H]."""
    first_token: Tensor
    """The weight of key 0, [B, H]."""
    fire_rate: Tensor
    """The fraction of visible probabilities above the threshold, [B, H]; over all pairs at once."""
    load: Tensor
    """The probability that each key draws, [B, H, Tk]."""


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
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Define the operator :func:`ember_ext.lif_attention`, with the same arguments.

    bf16 and fp16 are computed in fp32 and rounded once, at the end. Dropout needs a seed.

    Args:
        query: [B, H, Tq, D]. All arguments but the last are those of the operator.
        key: [B, G, Tk, D].
        value: [B, G, Tk, D].
        threshold: [H].
        leak: [H].
        steepness: [H].
        attn_mask: booleans, broadcastable to [B, H, Tq, Tk]. Default: None.
        dropout_p: probability of dropping a weight. Default: 0.
        is_causal: whether the last query stands at the last key. Default: False.
        scale: multiplies the scores. Default: 1 / sqrt(D).
        eps: added to the sum of a row. Default: 1e-8.
        seed: int64 scalar tensor. Default: None. With `dropout_p` above 0 it is required.
        return_weights: also return the weights before dropout. Default: False.

    Returns:
        [B, H, Tq, D] in the dtype of `query`; with `return_weights` also the weights [B, H, Tq,
        Tk], in fp32 (fp64 for fp64 input).

    Examples::

        >>> import torch
        >>> from ember_ext import reference
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16)
        >>> gate = torch.tensor([[0.1], [0.7], [9.0]]).expand(3, 4)
        >>> out, weights = reference.lif_attention(
        ...     query, key, value, *gate, is_causal=True, return_weights=True
        ... )
        >>> weights.shape
        torch.Size([2, 4, 10, 10])
        >>> torch.allclose(weights @ value, out, atol=1e-6)
        True
    """
    if attn_mask is not None:
        query, key, value = without_hidden(query, key, value, attn_mask)
    visible = visible_keys(query, key, attn_mask, is_causal)
    p = attention_probabilities(query, key, visible, scale)
    theta, lam, k = (v.to(p.dtype).view(-1, 1, 1) for v in (threshold, leak, steepness))
    w = gate_probabilities(p, theta, lam, k, eps)
    out = weighted_sum(w, value, dropout_p, seed).to(query.dtype)
    return (out, w) if return_weights else out


def without_hidden(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in place of queries that see no key, and of keys and values that no query sees.

    These are padding, which may hold NaN, and a weight of 0 does not silence that.
    """
    heads, groups = query.shape[1], key.shape[1]
    mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    seen = mask.any(-2)
    if groups != heads and seen.shape[1] > 1:
        seen = seen.unflatten(1, (groups, heads // groups)).any(2)
    seen = seen.unsqueeze(-1)
    sees = mask.any(-1, keepdim=True)
    return torch.where(sees, query, 0), torch.where(seen, key, 0), torch.where(seen, value, 0)


def visible_keys(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """Which keys each query may see, broadcastable to [B, H, Tq, Tk]; None for all.

    With `is_causal` the last query stands at the last key.
    """
    visible = attn_mask
    if is_causal:
        queries, keys = query.shape[-2], key.shape[-2]
        last = torch.arange(keys - queries, keys, device=query.device)
        causal = torch.arange(keys, device=query.device) <= last[:, None]
        visible = causal if visible is None else visible & causal
    return visible


def attention_probabilities(
    query: Tensor, key: Tensor, visible: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(query keyᵀ scale) over the visible keys; all zero for a query that sees none."""
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    key = key.to(compute_dtype).repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    scores = (query.to(compute_dtype) * scale) @ key.transpose(-2, -1)
    if visible is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~visible, torch.finfo(compute_dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0)


def _serve_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat each of the G heads of [B, G, T, D] for the query heads that it serves."""
    groups = tensor.shape[1]
    if groups == heads:
        return tensor
    return tensor.repeat_interleave(heads // max(groups, 1), 1)


def gate_probabilities(
    p: Tensor, threshold: Tensor, leak: Tensor, steepness: Tensor, eps: float
) -> Tensor:
    """w = p (f + λ (1 - f)) with f = σ(k (p - θ)), divided by its row's sum plus eps."""
    return gate_fired(p, fire_mask(p, threshold, steepness), leak, eps)


def gate_fired(p: Tensor, fire: Tensor, leak: Tensor, eps: float) -> Tensor:
    """The weights of `gate_probabilities`, given f."""
    w = p * (fire + leak * (1 - fire))
    return w / (w.sum(-1, keepdim=True) + eps)


def weighted_sum(w: Tensor, value: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dropout(w) value for w [B, H, Tq, Tk] and value [B, G, Tk, D], in the dtype of w."""
    value = _serve_heads(value.to(w.dtype), w.shape[1])
    if dropout_p > 0:
        assert seed is not None
        w = w * dropout_keep(seed, w.shape, dropout_p) / (1 - dropout_p)
    return w @ value


def summarize(p: Tensor, w: Tensor, threshold: Tensor, visible: Tensor | None) -> AttentionSummary:
    """Describe attention by its probabilities and its weights, [B, H, Tq, Tk] each."""
    queries, keys = max(p.shape[-2], 1), p.shape[-1]
    above = p > threshold.to(p.dtype).view(-1, 1, 1)
    pairs = torch.ones_like(above)
    if visible is not None:
        above, pairs = above & visible, pairs & visible
    first = w[..., 0].sum(-1) if keys else w.new_zeros(w.shape[:2])
    return AttentionSummary(
        entropy=-torch.special.xlogy(w, w).sum((-2, -1)) / queries,
        support=(w > 0.01).sum((-2, -1)).to(w.dtype) / queries,
        first_token=first / queries,
        fire_rate=above.sum((-2, -1)).to(w.dtype) / pairs.sum((-2, -1)).clamp(min=1),
        load=p.sum(-2) / queries,
    )


def dropout_keep(seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """Which of the weights [B, H, Tq, Tk] = `shape` dropout keeps.

    That depends on the seed and on a weight's own place (b, h, i, j) and on nothing else, so every
    implementation and every way of splitting the work drops the same weights.
    """
    batch, heads, queries, keys = shape
    device = seed.device
    words = philox(
        seed,
        torch.arange((keys + 3) // 4, device=device),
        torch.arange(queries, device=device).view(-1, 1),
        torch.arange(heads, device=device).view(-1, 1, 1),
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
    )
    bits = torch.stack(words, -1).flatten(-2)[..., :keys]
    return bits >= min(int(dropout_p * 2**32 + 0.5), 2**32 - 1)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., 2011): four 32-bit words per counter, as int64.

    Args:
        seed: int64 scalar, the key: low word first.
        c0: first word of the counter, int64 within [0, 2³²), like the others broadcastable.
        c1: the second.
        c2: the third.
        c3: the fourth.
    """
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    for _ in range(10):
        # Products of two 32-bit words may wrap around in int64; their bits stay the same.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
