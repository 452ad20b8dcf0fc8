"""Ember: nanoGPT's Transformer with a choice of gates in its attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ember_ext.models._attention import (
    PersistentSelfAttention,
    SigmoidSelfAttention,
    UngatedSelfAttention,
)
from ember_ext.models._base import INIT_STD, MLP, LanguageModel, ModelConfig
from ember_ext.models._gates import MembraneGate
from ember_ext.nn import AttentionCache, LIFSelfAttention
from ember_ext.nn._lean import Dropout
from ember_ext.nn.lif_attention import LayerState, SelfAttention
from ember_ext.ops._checks import check_shape, fail
from ember_ext.ops._export import make_saveable
from ember_ext.reference.persistent_lif_attention import PersistenceMode, PersistenceState
from ember_ext.reference.refractory_lif_attention import RefractoryMode, RefractoryState

EmberCondition = Literal[
    "standard",
    "lif",
    "lif-fixed",
    "lif-refractory",
    "qwen-gate",
    "lif-temporal",
    "lif-persistent",
    "sigmoid",
]

_LOOKING_BACK = {"lif-refractory": "refractory_mode", "lif-persistent": "persistence_mode"}
"""Conditions whose thresholds depend on other tokens, and the fields that say on which."""

_STATES: dict[str, type[tuple[Tensor, ...]]] = {
    "lif-refractory": RefractoryState,
    "lif-persistent": PersistenceState,
}
"""What the cache of such conditions holds beside keys and values."""


@dataclass(frozen=True)
class EmberConfig(ModelConfig):
    """Sizes and variant of an :class:`~ember_ext.models.Ember`; the defaults are the paper's.

    Its other fields are those of both models: `block_size`, `vocab_size`, `n_layer`, `n_embd`,
    `dropout`, `bias` and `gate_preset`.

    Attributes:
        n_head: attention heads in a block; divides `n_embd`.
        condition: "standard" attention; "lif", a LIF gate for each head on the attention weights;
            "lif-fixed", the same with constant gates; "lif-refractory", thresholds that rise with
            the attention that a key has already drawn; "qwen-gate", a sigmoid gate on the output of
            attention; "lif-temporal", "lif" and a gate on each MLP by a membrane potential that is
            carried across layers (:class:`~ember_ext.models.MembraneGate`); "lif-persistent",
            thresholds that rise with what the head has fired in earlier layers
            (:class:`~ember_ext.models.PersistenceParameters`); or "sigmoid", a control that is
            "lif" by other operations, and differs from it by rounding.
        refractory_mode: which queries "lif-refractory" takes the load of a key from. "causal":
            those up to the present one. "look_ahead": all of them, the later ones too, as in the
            paper's code. Losses are then not those of a language model.
        persistence_mode: the same for the firing of heads under "lif-persistent".

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
    persistence_mode: PersistenceMode = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("condition", get_args(EmberCondition))
        self._check_choice("refractory_mode", get_args(RefractoryMode))
        self._check_choice("persistence_mode", get_args(PersistenceMode))
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


make_saveable(EmberState, PersistenceState)


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
        block = MembraneBlock if config.condition == "lif-temporal" else Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layer))
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
        caches, carried = [], self._nothing_carried()
        for i, block in enumerate(self.blocks):
            x, cache, carried = block(x, None if state is None else state.layers[i], carried)
            caches.append(cache)
        logits, loss = self._logits_and_loss(self.ln_f(x), targets)
        return logits, loss, None if state is None else EmberState(tuple(caches))

    @property
    def context_limit(self) -> int:
        """`block_size`: there are no positions beyond it."""
        return self.config.block_size

    @property
    def incremental(self) -> bool:
        """False where thresholds depend on later tokens: in mode "look_ahead"."""
        return self._looks_ahead_by is None

    @property
    def _looks_ahead_by(self) -> str | None:
        """The field of the configuration by which thresholds depend on later tokens, if any."""
        field = _LOOKING_BACK.get(self.config.condition)
        return field if field and getattr(self.config, field) == "look_ahead" else None

    def initial_state(self, batch_size: int) -> EmberState:
        """Make a cache of no tokens.

        Raises:
            ValueError: the model is not `incremental`.
        """
        if self._looks_ahead_by is not None:
            fail(
                self._name, self._looks_ahead_by, "'causal' for a model with state", "'look_ahead'"
            )
        c = self.config
        like = self.wte.weight
        empty = like.new_empty(batch_size, c.n_head, 0, c.n_embd // c.n_head)
        loads: LayerState | None = None
        if c.condition == "lif-refractory":
            loads = RefractoryState(
                like.new_empty(batch_size, c.n_head, 0), like.new_empty(batch_size, 0)
            )
        elif c.condition == "lif-persistent":
            dtype = torch.promote_types(like.dtype, torch.float32)
            nothing = like.new_zeros(batch_size, c.n_head, dtype=dtype)
            loads = PersistenceState(nothing, nothing)
        return EmberState((AttentionCache(empty, empty, loads),) * c.n_layer)

    @torch.no_grad()
    def attention_weights(self, idx: Tensor, *, gated: bool = True) -> Iterator[Tensor]:
        """Yield the attention weights of each layer, [B, n_head, T, T], for analysis in eval mode.

        Args:
            idx: tokens [B, T], as in `forward`.
            gated: True for the weights that multiply the values, False for the probabilities of the
                softmax, which a LIF gate compares with its threshold. They are equal under
                "standard" and "qwen-gate". Default: True.
        """
        self._check_inputs(idx, None)
        x, carried = self._embed(idx, 0), self._nothing_carried()
        for block in cast("list[Block]", self.blocks):
            yield block.attn.attention_weights(block.ln_1(x), carried, gated=gated)
            x, _, carried = block(x, None, carried)

    def _embed(self, idx: Tensor, seen: int) -> Tensor:
        """Token and position embeddings of `idx`, which follows `seen` tokens."""
        end = seen + idx.shape[1]
        if end > self.config.block_size:
            expected = f"at most block_size = {self.config.block_size} tokens long, state included"
            fail(self._name, "idx", expected, end)
        x: Tensor = self.drop(self.wte(idx) + self.wpe.weight[seen:end])
        return x

    def _nothing_carried(self) -> Tensor:
        """What the first layer gets: zeros, so that its couplings have a gradient (of 0)."""
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
        if self._looks_ahead_by is not None:
            expected = f"None with {self._looks_ahead_by} 'look_ahead'"
            fail(self._name, "state", expected, type(state).__name__)
        c = self.config
        self._check_state_kind(state, EmberState)
        first = state.layers[0]
        shape = (batch_size, c.n_head, state.length, c.n_embd // c.n_head)
        check_shape(self._name, "state.layers[0].key", first.key, "[B, n_head, S, head_dim]", shape)
        if not isinstance(first.loads, _STATES.get(c.condition, type(None))):
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
        self, x: Tensor, cache: AttentionCache | None, carried: Tensor
    ) -> tuple[Tensor, AttentionCache | None, Tensor]:
        """Map x [B, T, n_embd] to its successor; see `SelfAttention` for the rest.

        `carried` is what a layer hands to the next one: the load of its keys, the trace of its
        heads or the potential of its tokens, by condition.
        """
        y, cache, carried, _ = self.attn(self.ln_1(x), cache, carried)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache, carried


class MembraneBlock(Block):
    """A block whose MLP has a gate.

    Attributes:
        membrane (MembraneGate): the gate.
    """

    def __init__(self, config: EmberConfig) -> None:
        super().__init__(config)
        self.membrane = MembraneGate()

    def forward(
        self, x: Tensor, cache: AttentionCache | None, carried: Tensor
    ) -> tuple[Tensor, AttentionCache | None, Tensor]:
        """See `Block.forward`."""
        # Attention does not know the potential, and takes it only to return a cache.
        y, cache, potential, _ = self.attn(self.ln_1(x), cache, carried)
        x = x + y
        z, potential = self.membrane(self.mlp(self.ln_2(x)), y, potential)
        return x + z, cache, potential


def _attention(config: EmberConfig) -> SelfAttention:
    c = config
    if c.condition in ("standard", "qwen-gate"):
        return UngatedSelfAttention(c.n_embd, c.n_head, dropout=c.dropout, bias=c.bias)
    if c.condition == "sigmoid":
        return SigmoidSelfAttention(
            c.n_embd, c.n_head, dropout=c.dropout, bias=c.bias, preset=c.gate_preset
        )
    if c.condition == "lif-persistent":
        return PersistentSelfAttention(
            c.n_embd,
            c.n_head,
            dropout=c.dropout,
            bias=c.bias,
            preset=c.gate_preset,
            mode=c.persistence_mode,
        )
    return LIFSelfAttention(
        c.n_embd,
        c.n_head,
        dropout=c.dropout,
        bias=c.bias,
        preset=c.gate_preset,
        learnable=c.condition != "lif-fixed",
        refractory=c.refractory_mode if c.condition == "lif-refractory" else None,
    )
