"""The kinds of attention that only :class:`~ember_ext.models.Ember` has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ember_ext.models._gates import PersistenceParameters
from ember_ext.nn.lif_attention import LayerState, SelfAttention, causal_probabilities
from ember_ext.nn.lif_gate import LIFParameters, PresetName
from ember_ext.ops import _attention, lif_attention
from ember_ext.ops._autocast import without_autocast
from ember_ext.ops._checks import fail
from ember_ext.reference.persistent_lif_attention import (
    PersistenceMode,
    PersistenceState,
    persistent_weights,
)

_UNITS_AT_ONCE = 64
"""The columns of dropout's mask that one call of the operator computes: its head size there."""


class UngatedSelfAttention(SelfAttention):
    """Causal softmax attention, by PyTorch's own kernel where no weight is dropped.

    With dropout it is LIF attention with gates that pass everything (λ = 1): PyTorch's kernel draws
    its masks in a way of its own, and conditions of one seed are to drop the same weights.

    Attributes:
        qwen_gate: matrix of a sigmoid gate on the output; None without.
    """

    qwen_gate: nn.Linear | None

    def __init__(self, n_embd: int, n_head: int, *, dropout: float, bias: bool) -> None:
        super().__init__(n_embd, n_head, dropout=dropout, bias=bias)
        self.qwen_gate = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_load: Tensor | None,
        past: LayerState | None,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """See `SelfAttention.attend`."""
        if self.dropout_p > 0:
            zero, one = query.new_zeros(self.n_head), query.new_ones(self.n_head)
            y = lif_attention(
                query, key, value, zero, one, one, dropout_p=self.dropout_p, is_causal=True
            )
        else:
            y = _causal_attention(query, key, value)
        return y, previous_load, None

    def gate_output(self, y: Tensor, x: Tensor) -> Tensor:
        """Apply Qwen's gate, if there is one."""
        return y if self.qwen_gate is None else y * torch.sigmoid(self.qwen_gate(x))


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention in which the last query stands at the last key."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = query.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(query, key, value, mask)


class StoredSelfAttention(SelfAttention):
    """Attention in plain PyTorch, for gates that no operator has.

    It stores the matrix of weights. In training, the backward pass keeps some eight matrices of B *
    n_head * T * T numbers for each layer.

    Attributes:
        gate (LIFParameters): the gates.
    """

    gate: LIFParameters

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_load: Tensor | None,
        past: LayerState | None,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """See `SelfAttention.attend`."""
        query, key, value = _attention.autocast(query, key, value)
        with without_autocast(query.device.type):
            w, load, state = self.weigh(query, key, previous_load, past)
            if self.dropout_p > 0:
                w = w.masked_fill(_dropped(w, self.dropout_p), 0)
            y = (w @ value.to(w.dtype) / (1 - self.dropout_p)).to(query.dtype)
        return y, load, state

    def weights(
        self, query: Tensor, key: Tensor, previous_load: Tensor | None, past: LayerState | None
    ) -> Tensor:
        """See `SelfAttention.weights`."""
        return self.weigh(query, key, previous_load, past)[0]

    def weigh(
        self, query: Tensor, key: Tensor, previous_load: Tensor | None, past: LayerState | None
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """The weights before dropout [B, n_head, T, S + T], and `attend`'s other two results."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"n_head={self.n_head}, dropout={self.dropout}"


@torch.no_grad()
def _dropped(weights: Tensor, dropout_p: float) -> Tensor:
    """Which of the causal weights [B, H, T, S + T] dropout drops: those that LIF attention drops.

    The operator draws them, much faster than its definition in plain PyTorch. Where the values are
    unit vectors, its output is the weights, and here all that are not dropped are above 0. Hidden
    weights count as dropped.
    """
    batch, heads, queries, keys = weights.shape
    seed = _attention.draw_seed(weights, dropout_p, None)
    open_gates = weights.new_tensor([[0.0], [1.0], [1.0]]).expand(3, heads)
    columns = []
    for units in torch.eye(keys, dtype=weights.dtype, device=weights.device).split(
        _UNITS_AT_ONCE, 1
    ):
        size = units.shape[1]
        columns.append(
            lif_attention(
                weights.new_zeros(batch, heads, queries, size),
                weights.new_zeros(batch, 1, keys, size),
                units.expand(batch, 1, keys, size),
                *open_gates,
                dropout_p=dropout_p,
                is_causal=True,
                seed=seed,
            )
            == 0
        )
    return torch.cat(columns, -1)


class SigmoidSelfAttention(StoredSelfAttention):
    r"""Causal attention with the paper's sigmoid control on its weights.

    A probability p is multiplied by :math:`\mathrm{floor} + (1 - \mathrm{floor})\,
    \sigma(\mathrm{slope} (p - \mathrm{centre}))`, and the rows are normalised again. With the leak
    as the floor, the threshold as the centre and the steepness as the slope this is the LIF gate by
    other operations. So it differs from LIF by rounding only, and shows how far that takes two
    runs. Its parameters have the names of the LIF gate's.
    """

    def __init__(
        self, n_embd: int, n_head: int, *, dropout: float, bias: bool, preset: PresetName
    ) -> None:
        super().__init__(n_embd, n_head, dropout=dropout, bias=bias)
        self.gate = LIFParameters(n_head, preset=preset)

    def weigh(
        self, query: Tensor, key: Tensor, previous_load: Tensor | None, past: LayerState | None
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """See `StoredSelfAttention.weigh`."""
        p = causal_probabilities(query, key)
        centre, floor, slope = (v.to(p.dtype).view(-1, 1, 1) for v in self.gate._values())
        w = p * (floor + (1 - floor) * torch.sigmoid(slope * (p - centre)))
        return w / (w.sum(-1, keepdim=True) + 1e-8), previous_load, None


class PersistentSelfAttention(StoredSelfAttention):
    """Causal attention with LIF gates whose thresholds follow the head's firing in earlier layers.

    What `SelfAttention` calls a load is here the trace of the heads, [B, n_head, T, 1]; see
    `ember_ext.reference.persistent_lif_attention`.

    Attributes:
        gate (PersistenceParameters): the gates.
        mode: "causal" or "look_ahead".
    """

    gate: PersistenceParameters

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        dropout: float,
        bias: bool,
        preset: PresetName,
        mode: PersistenceMode,
    ) -> None:
        super().__init__(n_embd, n_head, dropout=dropout, bias=bias)
        self.gate = PersistenceParameters(n_head, preset=preset)
        self.mode = mode

    def weigh(
        self, query: Tensor, key: Tensor, previous_load: Tensor | None, past: LayerState | None
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """See `StoredSelfAttention.weigh`."""
        if key.shape[2] > query.shape[2] and not isinstance(past, PersistenceState):
            expected = "the PersistenceState of the cached tokens, which thresholds follow"
            fail("models.Ember", "cache.loads", expected, type(past).__name__)
        threshold, leak, steepness, persistence, coupling = self.gate._values()
        # Nobody reads the trace of the last layer. Its persistence gets a gradient of 0 this way,
        # which checkpoints of optimisers and distributed training want of every parameter.
        threshold = threshold + 0 * persistence
        return persistent_weights(
            query,
            key,
            threshold,
            leak,
            steepness,
            persistence,
            coupling,
            mode=self.mode,
            trace=previous_load,
            past=past if isinstance(past, PersistenceState) else None,
        )

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"{super().extra_repr()}, mode={self.mode!r}"
