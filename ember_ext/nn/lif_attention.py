"""Causal self-attention with a LIF gate per head (section 2.2 of the paper), ready for a cache."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext import ops
from ember_ext.nn._arguments import check_dtype, count
from ember_ext.nn._lean import Dropout
from ember_ext.nn.lif_gate import LIFParameters, PresetName
from ember_ext.ops._checks import fail
from ember_ext.ops._export import make_saveable
from ember_ext.reference.lif_attention import (
    attention_probabilities,
    gate_probabilities,
    visible_keys,
)
from ember_ext.reference.persistent_lif_attention import PersistenceState
from ember_ext.reference.refractory_lif_attention import (
    RefractoryMode,
    RefractoryState,
    refractory_weights,
)

LayerState = RefractoryState | PersistenceState
"""What thresholds need to know of the tokens before."""

REFRACTORY_RAW = -2.0
"""Initial raw strength of the refractory couplings: 0.127 within a layer, 0.119 across layers."""


class RefractoryParameters(LIFParameters):
    r"""The parameters of LIF gates whose threshold rises with the attention that a key has drawn.

    The threshold of a key is

    .. math::

        \theta + \mathrm{within} \cdot \mathrm{load}
            + \mathrm{across} \cdot \mathrm{load\ of\ the\ previous\ layer}.

    As in :class:`~ember_ext.nn.LIFParameters`, raw values are learnt, and the properties `within`
    and `across` are the effective ones: a softplus and a sigmoid of them.

    Args:
        num_units: number of heads.
        preset: as for `LIFParameters`.
        learnable: as for `LIFParameters`; the couplings are always learnt.
        device: as for `LIFParameters`.
        dtype: as for `LIFParameters`.

    Attributes:
        raw_within (Tensor): [num_units].
        raw_across (Tensor): [num_units].

    Examples::

        >>> from ember_ext import nn
        >>> gates = nn.RefractoryParameters(2)
        >>> gates.within
        tensor([0.1269, 0.1269], grad_fn=<SoftplusBackward0>)
    """

    _effective = (*LIFParameters._effective, "within", "across")

    def __init__(
        self,
        num_units: int,
        *,
        preset: PresetName = "text",
        learnable: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_units, preset=preset, learnable=learnable, device=device, dtype=dtype)
        self.raw_within = nn.Parameter(torch.empty(num_units, device=device, dtype=dtype))
        self.raw_across = nn.Parameter(torch.empty(num_units, device=device, dtype=dtype))
        self._reset_couplings()

    def reset_parameters(self) -> None:
        """Fill the raw values with the constants of the preset. This draws no random numbers."""
        super().reset_parameters()
        if "raw_across" in self._parameters:  # not yet when the gate's own values are filled first
            self._reset_couplings()

    def _reset_couplings(self) -> None:
        for raw in (self.raw_within, self.raw_across):
            nn.init.constant_(raw, REFRACTORY_RAW)

    def _values(self) -> tuple[Tensor, ...]:
        return *super()._values(), F.softplus(self.raw_within), torch.sigmoid(self.raw_across)

    @property
    def within(self) -> Tensor:
        """The effective coupling within a layer, [num_units], above 0; differentiable."""
        return self._values()[3]

    @property
    def across(self) -> Tensor:
        """The effective coupling across layers, [num_units], within (0, 1); differentiable."""
        return self._values()[4]


class AttentionCache(NamedTuple):
    """The keys and values of the S tokens that one attention layer has seen.

    A layer returns it as a field of :class:`~ember_ext.nn.AttentionOutput`. An empty one begins a
    sequence.

    Examples::

        >>> import torch
        >>> from ember_ext import nn
        >>> layer = nn.LIFSelfAttention(12, 3)
        >>> empty = torch.empty(2, 3, 0, 4)  # batch, heads, no tokens, head size
        >>> out = layer(torch.randn(2, 5, 12), nn.AttentionCache(empty, empty, None))
        >>> out.cache.key.shape
        torch.Size([2, 3, 5, 4])
    """

    key: Tensor
    """[B, n_head, S, head_dim]"""
    value: Tensor
    """[B, n_head, S, head_dim]"""
    loads: LayerState | None
    """With refractory thresholds, the attention drawn by each key so far: an
    `ember_ext.ops.RefractoryState`, whose sums are of no elements where S = 0. With persistent
    heads, an `ember_ext.models.PersistenceState`."""


class AttentionOutput(NamedTuple):
    """The results of an attention layer, where more than its output was asked for.

    Examples::

        >>> import torch
        >>> from ember_ext import nn
        >>> layer, x = nn.LIFSelfAttention(12, 3), torch.randn(2, 5, 12)
        >>> output, cache, load, weights = layer(x, need_weights=True)
        >>> cache is None, weights.shape
        (True, torch.Size([2, 3, 5, 5]))
    """

    output: Tensor
    """[B, T, n_embd]"""
    cache: AttentionCache | None
    """The cache that was given, with the tokens of this call added; None if none was given."""
    load: Tensor | None
    """The attention that each key has drawn in this layer, for the next one: [B, T, S + T] or
    [B, 1, S + T] with refractory thresholds, and else what was given as `previous_load`."""
    weights: Tensor | None
    """The gated weights before dropout, [B, n_head, T, S + T]; None unless `need_weights`."""


make_saveable(AttentionCache, AttentionOutput)


def causal_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """The softmax of causal attention, [B, n_head, T, S + T]."""
    return attention_probabilities(query, key, visible_keys(query, key, None, True), None)


class SelfAttention(nn.Module):
    """The surroundings of any causal self-attention: projections, heads, dropout and the cache.

    Args:
        n_embd: width of the input and the output.
        n_head: number of heads, a divisor of n_embd.
        dropout: probability of dropping an attention weight, and an output. Default: 0.
        bias: whether the projections have biases. Default: False.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters, floating. Default: torch's default dtype.

    Attributes:
        c_attn: input to queries, keys and values, each [n_embd] with the heads side by side.
        c_proj: joined heads to output.

    Raises:
        ValueError: n_head does not divide n_embd, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        n_embd, n_head = count(name, "n_embd", n_embd), count(name, "n_head", n_head)
        if n_head < 1 or n_embd % n_head:
            fail(f"nn.{name}", "n_head", f"a divisor of n_embd = {n_embd}", n_head)
        if not 0 <= dropout < 1:
            fail(f"nn.{name}", "dropout", "within [0, 1)", dropout)
        check_dtype(name, dtype)
        self.n_head = n_head
        self.dropout = dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias, device=device, dtype=dtype)
        self.resid_dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        cache: AttentionCache | None = None,
        previous_load: Tensor | None = None,
        # Not keyword-only: the older ONNX exporter hands defaults on by position.
        need_load: bool = False,
        need_weights: bool = False,
    ) -> Tensor | AttentionOutput:
        """Attend from `x` to the cached tokens and to `x`.

        Args:
            x: [B, T, n_embd].
            cache: the S tokens before `x`. Default: none.
            previous_load: the load that the layer below returned, [B, T, S + T], where each
                dimension may be 1. Refractory thresholds use it, and other layers hand it on.
                Default: none.
            need_load: return the load of this layer even if no `previous_load` is given. Default:
                False.
            need_weights: return the weights too. They take memory of T (S + T) numbers for each
                head, and are computed a second time for it. Default: False.

        Returns:
            The output alone, [B, T, n_embd], if none of the other arguments is given. Otherwise an
            :class:`~ember_ext.nn.AttentionOutput` of the output, the cache, the load and the
            weights.

        Raises:
            TypeError: `x` is not a tensor, or `cache` not an `AttentionCache`.
            ValueError: `x` or the cache has another shape, or lacks the loads that refractory
                thresholds need.
        """
        self._check_input(x)
        query, key, value = self.qkv(x)
        past = None
        if cache is not None:
            self._check_cache(cache, key)
            key, value = torch.cat([cache.key, key], 2), torch.cat([cache.value, value], 2)
            past = cache.loads
        y, load, loads = self.attend(query, key, value, previous_load, past)
        y = self.resid_dropout(self.c_proj(self.gate_output(y.transpose(1, 2).flatten(2), x)))
        if cache is None and previous_load is None and not (need_load or need_weights):
            return y  # type: ignore[no-any-return]
        return AttentionOutput(
            y,
            None if cache is None else AttentionCache(key, value, loads),
            load if need_load or previous_load is not None else None,
            self.weights(query, key, previous_load, past) if need_weights else None,
        )

    def attention_weights(
        self, x: Tensor, previous_load: Tensor | None = None, *, gated: bool = True
    ) -> Tensor:
        """Compute the weights that :meth:`forward` applies to `x` without a cache, before dropout.

        Args:
            x: [B, T, n_embd].
            previous_load: as for `forward`.
            gated: False for the probabilities of the softmax, before the gate. Default: True.

        Returns:
            [B, n_head, T, T], in fp32 (fp64 for fp64 input).
        """
        self._check_input(x)
        query, key, _ = self.qkv(x)
        if gated:
            return self.weights(query, key, previous_load, None)
        return causal_probabilities(query, key)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_load: Tensor | None,
        past: LayerState | None,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """Attention of each head, [B, n_head, T, head_dim]; this layer's load; its running sums."""
        raise NotImplementedError

    def gate_output(self, y: Tensor, x: Tensor) -> Tensor:
        """Change the joined heads y, given the input x; both [B, T, n_embd]."""
        return y

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        previous_load: Tensor | None,
        past: LayerState | None,
    ) -> Tensor:
        """The weights of `attend` before dropout, [B, n_head, T, S + T]."""
        return causal_probabilities(query, key)

    def _check_cache(self, cache: object, key: Tensor) -> None:
        if not isinstance(cache, AttentionCache):
            kind = type(cache).__name__
            fail(f"nn.{type(self).__name__}", "cache", "an AttentionCache", kind, TypeError)
        batch, heads, _, size = key.shape
        seen = cache.key.shape[2] if cache.key.dim() == 4 else "S"
        for field in ("key", "value"):
            got = list(getattr(cache, field).shape)
            if got != [batch, heads, seen, size]:
                expected = f"[B, n_head, S, head_dim] = [{batch}, {heads}, {seen}, {size}]"
                fail(f"nn.{type(self).__name__}", f"cache.{field}", expected, got)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, T, n_embd], each [B, n_head, T, head_dim]."""
        query, key, value = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, 2)
        )
        return query, key, value

    def _check_input(self, x: object) -> None:
        op = f"nn.{type(self).__name__}"
        if not isinstance(x, Tensor):
            fail(op, "x", "a torch.Tensor", type(x).__name__, TypeError)
        n_embd = self.c_proj.out_features
        if x.dim() != 3 or x.shape[2] != n_embd:
            fail(op, "x", f"[B, T, n_embd] with n_embd = {n_embd}", list(x.shape))

    @property
    def dropout_p(self) -> float:
        """The probability of dropping a weight: 0 in eval mode."""
        return self.dropout if self.training else 0.0


class LIFSelfAttention(SelfAttention):
    """Causal self-attention with LIF gates: :func:`~ember_ext.lif_attention` as a layer.

    Args:
        n_embd: width of the input and the output.
        n_head: number of heads, a divisor of `n_embd`; each has a gate of its own.
        dropout: probability of dropping an attention weight, and an output. Default: 0.
        bias: whether the projections have biases. Default: False.
        preset: initial values of the gates, see :class:`~ember_ext.nn.LIFParameters`. Default:
            "text".
        learnable: with False the gates are the paper's fixed control. Default: True.
        refractory: "causal" or "look_ahead" for thresholds that rise with the attention that a key
            has drawn, see :func:`~ember_ext.refractory_lif_attention`. With "look_ahead" outputs
            depend on later tokens, and no cache can be continued. Default: None.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters, floating. Default: torch's default dtype.

    Attributes:
        gate (LIFParameters): the gates, with `refractory`
            :class:`~ember_ext.nn.RefractoryParameters`.

    Shape:
        Input and output are [B, T, n_embd]; see :meth:`forward` for what else can be asked for.

    Raises:
        TypeError: `n_embd` or `n_head` is not an integer, or `dtype` not a floating one.
        ValueError: `n_head` does not divide `n_embd`, `dropout` is outside [0, 1), or an unknown
            preset or refractory mode.

    Examples::

        >>> import torch
        >>> from ember_ext import nn
        >>> attention = nn.LIFSelfAttention(32, 4)
        >>> x = torch.randn(2, 10, 32)
        >>> y = attention(x)
        >>> y.shape
        torch.Size([2, 10, 32])

    Token by token, with a cache::

        >>> empty = torch.empty(2, 4, 0, 8)
        >>> cache, outputs = nn.AttentionCache(empty, empty, None), []
        >>> for token in x.split(1, dim=1):
        ...     output, cache, _, _ = attention(token, cache)
        ...     outputs.append(output)
        >>> torch.allclose(torch.cat(outputs, dim=1), y, atol=1e-6)
        True
    """

    gate: LIFParameters

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        preset: PresetName = "text",
        learnable: bool = True,
        refractory: RefractoryMode | None = None,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(n_embd, n_head, dropout=dropout, bias=bias, device=device, dtype=dtype)
        if refractory not in (None, "causal", "look_ahead"):
            expected = "None, 'causal' or 'look_ahead'"
            fail("nn.LIFSelfAttention", "refractory", expected, repr(refractory))
        self.refractory = refractory
        parameters = LIFParameters if refractory is None else RefractoryParameters
        self.gate = parameters(
            n_head, preset=preset, learnable=learnable, device=device, dtype=dtype
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_load: Tensor | None,
        past: LayerState | None,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """See `SelfAttention.attend`."""
        gates = self.gate._values()
        if not isinstance(self.gate, RefractoryParameters):
            y = ops.lif_attention(
                query, key, value, *gates, dropout_p=self.dropout_p, is_causal=True
            )
            return y, previous_load, None
        assert self.refractory is not None
        if past is None and key.shape[2] > query.shape[2]:
            if self.refractory == "look_ahead":
                fail("nn.LIFSelfAttention", "cache", "None with refractory='look_ahead'", "a cache")
            expected = "the RefractoryState of the cached tokens, whose loads thresholds follow"
            fail("nn.LIFSelfAttention", "cache.loads", expected, None)
        return ops.refractory_lif_attention(
            query,
            key,
            value,
            *gates,
            dropout_p=self.dropout_p,
            is_causal=True,
            mode=self.refractory,
            previous_load=previous_load,
            past=cast("RefractoryState | None", past),  # the operator looks
        )

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        previous_load: Tensor | None,
        past: LayerState | None,
    ) -> Tensor:
        """See `SelfAttention.weights`."""
        gates = self.gate._values()
        if not isinstance(self.gate, RefractoryParameters):
            p = causal_probabilities(query, key)
            threshold, leak, steepness = (v.to(p.dtype).view(-1, 1, 1) for v in gates)
            return gate_probabilities(p, threshold, leak, steepness, 1e-8)
        assert self.refractory is not None
        w, _, _ = refractory_weights(
            query,
            key,
            *gates,
            mode=self.refractory,
            previous_load=previous_load,
            past=cast("RefractoryState | None", past),
        )
        return w

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.__dict__.get("refractory") == "paper":  # its name in earlier versions
            self.refractory = "look_ahead"

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"n_head={self.n_head}, dropout={self.dropout}, refractory={self.refractory!r}"
