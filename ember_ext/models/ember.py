"""Ember: nanoGPT's Transformer with a choice of gates in its attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ember_ext.models._attention import (
    RefractoryParameters,
    attention_probabilities,
    gate_probabilities,
)
from ember_ext.models._base import INIT_STD, MLP, LanguageModel, ModelConfig
from ember_ext.nn import LIFParameters
from ember_ext.ops._checks import check_shape, fail

EmberCondition = Literal["standard", "lif", "lif-fixed", "lif-refractory", "qwen-gate"]
RefractoryMode = Literal["causal", "paper"]


@dataclass(frozen=True)
class EmberConfig(ModelConfig):
    """Sizes and variant of an `Ember`; the defaults are the paper's.

    Attributes:
        n_head: attention heads in a block; divides n_embd.
        condition: "standard" attention; "lif", a LIF gate per head on the attention weights;
            "lif-fixed", the same with constant gates; "lif-refractory", thresholds that rise with
            the attention that a key has already drawn; "qwen-gate", a sigmoid gate on the
            attention's output.
        refractory_mode: what "lif-refractory" takes a key's load from. "causal": the queries up to
            the present one. "paper": all of them, the later ones too, as in the released code;
            losses are then not those of a language model.
    """

    n_head: int = 6
    condition: EmberCondition = "lif"
    refractory_mode: RefractoryMode = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("condition", get_args(EmberCondition))
        self._check_choice("refractory_mode", get_args(RefractoryMode))
        self._check_positive("n_head")
        if self.n_embd % self.n_head:
            self._fail("n_head", f"a divisor of n_embd = {self.n_embd}", self.n_head)


class LayerCache(NamedTuple):
    """What one attention layer keeps of the S tokens that it has seen."""

    key: Tensor
    """[B, n_head, S, head_dim]"""
    value: Tensor
    """[B, n_head, S, head_dim]"""
    loads: tuple[Tensor, Tensor] | None
    """With refractory thresholds, the attention drawn by each key so far, summed over queries:
    before the gate, [B, n_head, S], and after it, averaged over heads, [B, S]."""


class EmberState(NamedTuple):
    """The key-value cache of each block."""

    layers: tuple[LayerCache, ...]

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return self.layers[0].key.shape[2]


class Ember(LanguageModel[EmberState]):
    """The paper's Transformer (section 2.2).

    Pre-norm blocks of attention and MLP, learned positions, tied embeddings. The attention of block
    i is `blocks.{i}.attn` under every condition.

    Args:
        config: sizes and variant. Models of one random seed have equal weights under all
            conditions, and leave torch's random stream at the same place.
    """

    config: EmberConfig

    def __init__(self, config: EmberConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._init_weights(residual_std=INIT_STD / math.sqrt(2 * config.n_layer))
        if config.condition == "qwen-gate":
            self._add_qwen_gates()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, state: EmberState | None = None
    ) -> tuple[Tensor, Tensor | None, EmberState | None]:
        """See `LanguageModel.forward`; T and the state's length together reach `block_size`."""
        self._check_inputs(idx, targets)
        seen = 0 if state is None else self._check_state(state, idx.shape[0])
        x = self._embed(idx, seen)
        caches, load = [], self._no_load()
        for i, block in enumerate(self.blocks):
            x, cache, load = block(x, None if state is None else state.layers[i], load)
            caches.append(cache)
        logits, loss = self._logits_and_loss(self.ln_f(x), targets)
        return logits, loss, None if state is None else EmberState(tuple(caches))

    @property
    def context_limit(self) -> int:
        """`block_size`: there are no positions beyond it."""
        return self.config.block_size

    @property
    def incremental(self) -> bool:
        """False where thresholds depend on later tokens (`refractory_mode` "paper")."""
        return self.config.condition != "lif-refractory" or self.config.refractory_mode == "causal"

    def initial_state(self, batch_size: int) -> EmberState:
        """A cache of no tokens.

        Raises:
            ValueError: the model is not `incremental`.
        """
        if not self.incremental:
            fail(self._name, "refractory_mode", "'causal' for a model with state", "'paper'")
        c = self.config
        like = self.wte.weight
        empty = like.new_empty(batch_size, c.n_head, 0, c.n_embd // c.n_head)
        loads = None
        if c.condition == "lif-refractory":
            loads = (like.new_empty(batch_size, c.n_head, 0), like.new_empty(batch_size, 0))
        return EmberState((LayerCache(empty, empty, loads),) * c.n_layer)

    @torch.no_grad()
    def attention_weights(self, idx: Tensor, *, gated: bool = True) -> Iterator[Tensor]:
        """Yield each layer's attention weights, [B, n_head, T, T]; for analysis, in eval mode.

        Args:
            idx: tokens [B, T], as in `forward`.
            gated: True for the weights that multiply the values, False for the softmax's
                probabilities, which a LIF gate compares with θ. They differ under LIF only.
        """
        self._check_inputs(idx, None)
        x, load = self._embed(idx, 0), self._no_load()
        for block in cast("list[Block]", self.blocks):
            yield block.attn.weights(block.ln_1(x), load, gated)
            x, _, load = block(x, None, load)

    def _embed(self, idx: Tensor, seen: int) -> Tensor:
        """Token and position embeddings of `idx`, which follows `seen` tokens."""
        end = seen + idx.shape[1]
        if end > self.config.block_size:
            expected = f"at most block_size = {self.config.block_size} tokens long, state included"
            fail(self._name, "idx", expected, end)
        x: Tensor = self.drop(self.wte(idx) + self.wpe.weight[seen:end])
        return x

    def _no_load(self) -> Tensor:
        """What precedes the first layer: zeros, so that its coupling has a gradient (of 0)."""
        return self.wte.weight.new_zeros(1, 1, 1)

    def _add_qwen_gates(self) -> None:
        """Give each block its output gate without advancing torch's random stream."""
        n_embd = self.config.n_embd
        device = self.wte.weight.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            for block in cast("list[Block]", self.blocks):
                gate = nn.Linear(n_embd, n_embd, bias=False)
                nn.init.normal_(gate.weight, std=INIT_STD)
                block.attn.qwen_gate = gate

    def _check_state(self, state: EmberState, batch_size: int) -> int:
        """Return the state's length."""
        if not self.incremental:
            fail(self._name, "state", "None with refractory_mode 'paper'", type(state).__name__)
        c = self.config
        self._check_state_kind(state, EmberState)
        first = state.layers[0]
        shape = (batch_size, c.n_head, state.length, c.n_embd // c.n_head)
        check_shape(self._name, "state.layers[0].key", first.key, "[B, n_head, S, head_dim]", shape)
        if (first.loads is not None) != (c.condition == "lif-refractory"):
            got = "one of another condition"
            fail(self._name, "state", f"a state of condition {c.condition!r}", got)
        return state.length


class Block(nn.Module):
    """x += attention(norm(x)), then x += MLP(norm(x))."""

    def __init__(self, config: EmberConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config.n_embd, config.dropout, config.bias)

    def forward(
        self, x: Tensor, cache: LayerCache | None, load: Tensor
    ) -> tuple[Tensor, LayerCache | None, Tensor]:
        """Map x [B, T, n_embd] to its successor; see `SelfAttention` for the rest."""
        y, cache, load = self.attn(self.ln_1(x), cache, load)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache, load


class SelfAttention(nn.Module):
    """Causal self-attention under one of Ember's conditions.

    Attributes:
        gate: the LIF parameters, one (θ, λ, k) per head; None without LIF.
        qwen_gate: matrix of the sigmoid gate on the output; None without.
    """

    qwen_gate: nn.Linear | None

    def __init__(self, config: EmberConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.refractory_mode = config.refractory_mode
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.gate: LIFParameters | None = None
        if config.condition == "lif-refractory":
            self.gate = RefractoryParameters(config.n_head, preset=config.gate_preset)
        elif config.condition in ("lif", "lif-fixed"):
            learnable = config.condition == "lif"
            self.gate = LIFParameters(config.n_head, preset=config.gate_preset, learnable=learnable)
        self.qwen_gate = None

    def forward(
        self, x: Tensor, cache: LayerCache | None, load: Tensor
    ) -> tuple[Tensor, LayerCache | None, Tensor]:
        """Attend from x to the cached tokens and to x.

        Args:
            x: normed residual stream [B, T, n_embd].
            cache: the S tokens before x, or None.
            load: what each key drew in the previous layer, broadcastable to [B, T, S + T]; used by
                refractory thresholds only.

        Returns:
            The output [B, T, n_embd], the cache with x (None without one), and this layer's load.
        """
        query, key, value = self.qkv(x)
        if cache is not None:
            key, value = torch.cat([cache.key, key], 2), torch.cat([cache.value, value], 2)
        dropout_p = self.dropout if self.training else 0.0
        loads = None
        if self.gate is None:
            y = _causal_attention(query, key, value, dropout_p)
        else:
            past = None if cache is None else cache.loads
            p = attention_probabilities(query, key)
            w, load, loads = gate_probabilities(p, self.gate, load, past, self.refractory_mode)
            y = F.dropout(w, dropout_p) @ value
        y = y.transpose(1, 2).flatten(2)
        if self.qwen_gate is not None:
            y = y * torch.sigmoid(self.qwen_gate(x))
        y = self.resid_dropout(self.c_proj(y))
        return y, None if cache is None else LayerCache(key, value, loads), load

    def weights(self, x: Tensor, load: Tensor, gated: bool) -> Tensor:
        """The weights [B, n_head, T, T] that `forward` applies, or those before the gate."""
        query, key, _ = self.qkv(x)
        p = attention_probabilities(query, key)
        if self.gate is None or not gated:
            return p
        return gate_probabilities(p, self.gate, load, None, self.refractory_mode)[0]

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, T, n_embd], each [B, n_head, T, head_dim]."""
        query, key, value = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, 2)
        )
        return query, key, value


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Softmax attention in which the last query stands at the last key."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout_p, is_causal=True
        )
    mask = query.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p)
