"""Ember: nanoGPT's Transformer with a choice of gates in its attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ember_ext.models._base import INIT_STD, MLP, LanguageModel, ModelConfig
from ember_ext.nn import AttentionCache, LIFSelfAttention
from ember_ext.nn._lean import Dropout
from ember_ext.nn.lif_attention import SelfAttention
from ember_ext.ops import lif_attention
from ember_ext.ops._checks import check_shape, fail
from ember_ext.ops._export import make_saveable
from ember_ext.reference.refractory_lif_attention import RefractoryMode, RefractoryState

EmberCondition = Literal["standard", "lif", "lif-fixed", "lif-refractory", "qwen-gate"]


@dataclass(frozen=True)
class EmberConfig(ModelConfig):
    """Sizes and variant of an :class:`~ember_ext.models.Ember`; the defaults are the paper's.

    Its other fields are those of both models: `block_size`, `vocab_size`, `n_layer`, `n_embd`,
    `dropout`, `bias` and `gate_preset`.

    Attributes:
        n_head: attention heads in a block; divides `n_embd`.
        condition: "standard" attention; "lif", a LIF gate for each head on the attention weights;
            "lif-fixed", the same with constant gates; "lif-refractory", thresholds that rise with
            the attention that a key has already drawn; or "qwen-gate", a sigmoid gate on the output
            of attention.
        refractory_mode: which queries "lif-refractory" takes the load of a key from. "causal":
            those up to the present one. "look_ahead": all of them, the later ones too, as in the
            paper's code. Losses are then not those of a language model.

    Raises:
        ValueError: a field is out of range.

    Examples::

        >>> from ember_ext.models import EmberConfig
        >>> EmberConfig(n_layer=2, n_embd=64, n_head=4).condition
        'lif'
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


class EmberState(NamedTuple):
    """The key-value cache of each block.

    Examples::

        >>> from ember_ext.models import Ember, EmberConfig
        >>> model = Ember(EmberConfig(n_layer=2, n_embd=64, n_head=4))
        >>> state = model.initial_state(batch_size=3)
        >>> state.length, len(state.layers)
        (0, 2)
    """

    layers: tuple[AttentionCache, ...]

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return self.layers[0].key.shape[2]


make_saveable(EmberState)


class Ember(LanguageModel[EmberState]):
    """The paper's Transformer (section 2.2): nanoGPT's, with a choice of gates in its attention.

    Pre-norm blocks of attention and MLP, learned positions, tied embeddings. The attention of block
    i is `blocks.{i}.attn` under every condition.

    Args:
        config: sizes and variant. Models that are built with the same random seed have equal
            weights under all conditions, and leave torch's random stream at the same place.

    Examples::

        >>> import torch
        >>> from ember_ext.models import Ember, EmberConfig
        >>> model = Ember(EmberConfig(n_layer=2, n_embd=64, n_head=4, vocab_size=65))
        >>> idx = torch.randint(65, (3, 16))
        >>> logits, loss, _ = model(idx, targets=idx.roll(-1, 1))
        >>> logits.shape
        torch.Size([3, 16, 65])
        >>> model.generate(idx, max_new_tokens=4).shape
        torch.Size([3, 20])
    """

    config: EmberConfig

    def __init__(self, config: EmberConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._init_weights(residual_std=INIT_STD / math.sqrt(2 * config.n_layer))
        if config.condition == "qwen-gate":
            self._add_qwen_gates()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, state: EmberState | None = None
    ) -> tuple[Tensor, Tensor | None, EmberState | None]:
        """Predict the next token; T and the state's length together may reach `block_size`.

        Arguments and results are those of :meth:`LanguageModel.forward()
        <ember_ext.models.LanguageModel.forward>`.
        """
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
        """False where thresholds depend on later tokens (`refractory_mode` "look_ahead")."""
        return self.config.condition != "lif-refractory" or self.config.refractory_mode == "causal"

    def initial_state(self, batch_size: int) -> EmberState:
        """Make a cache of no tokens.

        Raises:
            ValueError: the model is not `incremental`.
        """
        if not self.incremental:
            fail(self._name, "refractory_mode", "'causal' for a model with state", "'look_ahead'")
        c = self.config
        like = self.wte.weight
        empty = like.new_empty(batch_size, c.n_head, 0, c.n_embd // c.n_head)
        loads = None
        if c.condition == "lif-refractory":
            loads = RefractoryState(
                like.new_empty(batch_size, c.n_head, 0), like.new_empty(batch_size, 0)
            )
        return EmberState((AttentionCache(empty, empty, loads),) * c.n_layer)

    @torch.no_grad()
    def attention_weights(self, idx: Tensor, *, gated: bool = True) -> Iterator[Tensor]:
        """Yield the attention weights of each layer, [B, n_head, T, T], for analysis in eval mode.

        Args:
            idx: tokens [B, T], as in `forward`.
            gated: True for the weights that multiply the values, False for the probabilities of the
                softmax, which a LIF gate compares with its threshold. They differ under LIF only.
                Default: True.
        """
        self._check_inputs(idx, None)
        x, load = self._embed(idx, 0), self._no_load()
        for block in cast("list[Block]", self.blocks):
            yield block.attn.attention_weights(block.ln_1(x), load, gated=gated)
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
        """The load before the first layer: zeros, so that its coupling has a gradient (of 0)."""
        return self.wte.weight.new_zeros(1, 1, 1)

    def _add_qwen_gates(self) -> None:
        """Give each block its output gate without advancing torch's random stream."""
        n_embd = self.config.n_embd
        device = self.wte.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for block in cast("list[Block]", self.blocks):
                gate = nn.Linear(n_embd, n_embd, bias=False)
                nn.init.normal_(gate.weight, std=INIT_STD)
                cast("UngatedSelfAttention", block.attn).qwen_gate = gate

    def _check_state(self, state: EmberState, batch_size: int) -> int:
        """Return the state's length."""
        if not self.incremental:
            fail(
                self._name, "state", "None with refractory_mode 'look_ahead'", type(state).__name__
            )
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
        self.attn = _attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config.n_embd, config.dropout, config.bias)

    def forward(
        self, x: Tensor, cache: AttentionCache | None, load: Tensor
    ) -> tuple[Tensor, AttentionCache | None, Tensor]:
        """Map x [B, T, n_embd] to its successor; see `SelfAttention` for the rest."""
        y, cache, load, _ = self.attn(self.ln_1(x), cache, load)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache, load


def _attention(config: EmberConfig) -> SelfAttention:
    c = config
    if c.condition in ("standard", "qwen-gate"):
        return UngatedSelfAttention(c.n_embd, c.n_head, dropout=c.dropout, bias=c.bias)
    return LIFSelfAttention(
        c.n_embd,
        c.n_head,
        dropout=c.dropout,
        bias=c.bias,
        preset=c.gate_preset,
        learnable=c.condition != "lif-fixed",
        refractory=c.refractory_mode if c.condition == "lif-refractory" else None,
    )


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
        past: RefractoryState | None,
    ) -> tuple[Tensor, Tensor | None, RefractoryState | None]:
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
