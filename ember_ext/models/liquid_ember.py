"""LiquidEmber: a language model whose blocks mix tokens with a CfC, not with attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

from ncps.wirings import AutoNCP
from torch import Tensor, nn

from ember_ext.models._base import MLP, LanguageModel, ModelConfig
from ember_ext.nn import LTC, CfC, LIFGate
from ember_ext.nn._lean import Dropout
from ember_ext.ops._checks import check_shape
from ember_ext.ops._export import make_saveable

LiquidEmberCondition = Literal["standard", "lif"]
CellName = Literal["cfc", "ltc"]

WIRING_SEED = 22222
"""Every layer of every run has the same wiring, the one that ncps draws by default."""

CHUNK_SIZE = 64
"""The `chunk_size` of each CfC, which saves memory in training and costs little time."""


@dataclass(frozen=True)
class LiquidEmberConfig(ModelConfig):
    """Sizes and variant of a :class:`~ember_ext.models.LiquidEmber`.

    The defaults are those of the paper's text model.

    Its other fields are those of both models: `vocab_size`, `n_layer`, `n_embd`, `dropout`, `bias`
    and `gate_preset`, and `block_size`, which is the training window only. The model reads
    sequences of any length.

    Attributes:
        cell: "cfc", as in the paper, or "ltc" for liquid time-constant networks in place of the
            CfCs.
        cfc_units: neurons of each CfC or LTC (inter, command and motor), at least n_embd + 3.
        condition: "standard", or "lif" for a LIF gate on the output of each CfC.

    Raises:
        ValueError: a field is out of range.

    Examples::

        >>> from ember_ext.models import LiquidEmberConfig
        >>> LiquidEmberConfig(n_layer=2, n_embd=64, cfc_units=96).cell
        'cfc'
    """

    n_layer: int = 4
    n_embd: int = 256
    cell: CellName = "cfc"
    cfc_units: int = 384
    dropout: float = 0.1
    bias: bool = True
    condition: LiquidEmberCondition = "lif"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("condition", get_args(LiquidEmberCondition))
        self._check_choice("cell", get_args(CellName))
        self._check_positive("cfc_units")
        if self.cfc_units < self.n_embd + 3:
            expected = f"at least n_embd + 3 = {self.n_embd + 3}"
            self._fail("cfc_units", expected, self.cfc_units)


class LiquidEmberState(NamedTuple):
    """The hidden state of each block's CfC, [B, cfc_units].

    Examples::

        >>> from ember_ext.models import LiquidEmber, LiquidEmberConfig
        >>> model = LiquidEmber(LiquidEmberConfig(n_layer=2, n_embd=64, cfc_units=96))
        >>> [h.shape for h in model.initial_state(batch_size=3).hidden]
        [torch.Size([3, 96]), torch.Size([3, 96])]
    """

    hidden: tuple[Tensor, ...]

    def detach(self) -> LiquidEmberState:
        """Cut the state from the graph, for truncated back-propagation through time."""
        return LiquidEmberState(tuple(h.detach() for h in self.hidden))


make_saveable(LiquidEmberState)


class LiquidEmber(LanguageModel[LiquidEmberState]):
    """The paper's CfC language model (section 2.3), whose blocks mix tokens with a CfC.

    Pre-norm blocks of CfC, optional LIF gate and MLP, tied embeddings and no positions, since the
    CfC has a time of its own. The CfC of block i, or with `cell="ltc"` the LTC, is
    `blocks.{i}.cfc`. `blocks.{i}.gate` takes its output under every condition, and is an identity
    without LIF, so that hooks see the same tensor in both.

    Args:
        config: sizes and variant. Models that are built with the same random seed have equal
            weights under both conditions.

    Examples::

        >>> import torch
        >>> from ember_ext.models import LiquidEmber, LiquidEmberConfig
        >>> model = LiquidEmber(LiquidEmberConfig(n_layer=2, n_embd=64, cfc_units=96))
        >>> idx = torch.randint(65, (3, 16))
        >>> logits, loss, _ = model(idx, targets=idx.roll(-1, 1))
        >>> logits.shape
        torch.Size([3, 16, 65])

    One token at a time, with the state in hand::

        >>> state = model.initial_state(batch_size=3)
        >>> for token in idx.split(1, dim=1):
        ...     logits, _, state = model(token, state=state)
    """

    config: LiquidEmberConfig

    def __init__(self, config: LiquidEmberConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._init_weights()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, state: LiquidEmberState | None = None
    ) -> tuple[Tensor, Tensor | None, LiquidEmberState | None]:
        """Predict the next token; T may exceed `block_size`.

        Arguments and results are those of :meth:`LanguageModel.forward()
        <ember_ext.models.LanguageModel.forward>`.
        """
        self._check_inputs(idx, targets)
        if state is not None:
            self._check_state(state, idx.shape[0])
        x = self.drop(self.wte(idx))
        hidden = []
        for i, block in enumerate(self.blocks):
            x, h = block(x, None if state is None else state.hidden[i])
            hidden.append(h)
        logits, loss = self._logits_and_loss(self.ln_f(x), targets)
        return logits, loss, None if state is None else LiquidEmberState(tuple(hidden))

    def initial_state(self, batch_size: int) -> LiquidEmberState:
        """Make hidden states of zero, as at the start of every training window."""
        zeros = self.wte.weight.new_zeros(batch_size, self.config.cfc_units)
        return LiquidEmberState((zeros,) * self.config.n_layer)

    def _check_state(self, state: LiquidEmberState, batch_size: int) -> None:
        self._check_state_kind(state, LiquidEmberState)
        for i, h in enumerate(state.hidden):
            shape = (batch_size, self.config.cfc_units)
            check_shape(self._name, f"state.hidden[{i}]", h, "[B, cfc_units]", shape)


class Block(nn.Module):
    """x += dropout(gate(CfC(norm(x)))), then x += MLP(norm(x))."""

    def __init__(self, config: LiquidEmberConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        wiring = AutoNCP(config.cfc_units, config.n_embd, seed=WIRING_SEED)
        self.cfc: CfC | LTC = (
            CfC(config.n_embd, wiring, chunk_size=CHUNK_SIZE)
            if config.cell == "cfc"
            else LTC(config.n_embd, wiring)
        )
        self.gate: nn.Module = nn.Identity()
        if config.condition == "lif":
            self.gate = LIFGate(config.n_embd, preset=config.gate_preset)
        self.drop = Dropout(config.dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config.n_embd, config.dropout, config.bias)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map x [B, T, n_embd] and the CfC's state [B, cfc_units] to their successors."""
        y = self.ln_1(x)
        if h is not None and x.shape[1] == 1:
            y, h = cast("tuple[Tensor, Tensor]", self.cfc.step(y[:, 0], h))
            y = y[:, None]
        else:
            y, h = self.cfc(y, h)
        x = x + self.drop(self.gate(y))
        return x + self.mlp(self.ln_2(x)), h
