"""The common parts of both language models: checks, loss, generation, optimiser groups, counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ember_ext.nn._lean import Dropout, gelu_linear
from ember_ext.nn.lif_gate import GateParameters, LIFParameters, PresetName
from ember_ext.ops._checks import fail, is_readable

State = TypeVar("State")

INIT_STD = 0.02
"""Standard deviation of every initial weight (nanoGPT's)."""


@dataclass(frozen=True)
class ModelConfig:
    """The fields that both models have, by nanoGPT's names.

    Attributes:
        block_size: tokens in a training window.
        vocab_size: number of distinct tokens.
        n_layer: number of blocks.
        n_embd: width of the residual stream.
        dropout: dropout probability, in [0, 1).
        bias: whether linear layers and LayerNorms have biases. A CfC's own layers always do.
        gate_preset: initial values and normalisation of the LIF gates, "text" or "released".

    Raises:
        ValueError: a field is out of range.
    """

    block_size: int = 256
    vocab_size: int = 65
    n_layer: int = 6
    n_embd: int = 384
    dropout: float = 0.2
    bias: bool = False
    gate_preset: PresetName = "text"

    def __post_init__(self) -> None:
        for field in ("block_size", "vocab_size", "n_layer", "n_embd"):
            self._check_positive(field)
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            self._fail("dropout", "in [0, 1)", repr(self.dropout))
        self._check_choice("gate_preset", get_args(PresetName))

    def _check_positive(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or value < 1:
            self._fail(field, "a positive integer", value)

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            self._fail(field, "one of " + ", ".join(map(repr, choices)), repr(value))

    def _fail(self, field: str, expected: str, got: object) -> None:
        fail(f"models.{type(self).__name__}", field, expected, got)


class LanguageModel(nn.Module, ABC, Generic[State]):
    """The methods that both language models have in common.

    It is a model of token sequences that can also be advanced a few tokens at a time. Subclasses
    embed tokens with `wte`, whose weight is the output layer too, and define `forward` and
    `initial_state`.

    Examples::

        >>> import torch
        >>> from ember_ext.models import Ember, EmberConfig, LanguageModel
        >>> model: LanguageModel = Ember(EmberConfig(n_layer=2, n_embd=64, n_head=4))
        >>> model.num_parameters(), model.num_lif_parameters()
        (119192, 24)
        >>> prompt = torch.randint(65, (1, 5))
        >>> len(list(model.stream(prompt, max_new_tokens=3)))
        3
    """

    config: ModelConfig
    wte: nn.Embedding

    @abstractmethod
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """Predict the next token at every position.

        Args:
            idx: tokens [B, T], int64.
            targets: the token that follows each of `idx`, [B, T], int64; -1 is not counted.
                Default: none.
            state: what came before `idx`, from `initial_state` or an earlier call. It is
                differentiable and never written to, so one state can be continued in several ways.
                Default: none.

        Returns:
            The logits [B, T, vocab_size]; the mean cross-entropy in nats, or None without
            `targets`; and the state after `idx`, or None if no state was passed.

        Raises:
            ValueError: a shape is wrong, the batch is empty, there are too many tokens, or one of
                them is outside the vocabulary. Tokens are looked at on the CPU only, because the
                check would wait for a GPU.
            TypeError: `idx` or `targets` is not an int64 tensor, or `state` is another model's.
        """

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """Make the state before the first token, on the model's device and in its dtype."""

    @property
    def context_limit(self) -> int | None:
        """How many tokens the model can look at, the state's included; None for any number."""
        return None

    @property
    def incremental(self) -> bool:
        """Whether advancing a state gives what one forward pass over the whole sequence gives."""
        return True

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row of `idx`, and return prompt and continuation, [B, T + max_new_tokens].

        See :meth:`stream` for the arguments.
        """
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, generator)
        return torch.cat([idx, *tokens], dim=1)

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue each row of `idx`, in evaluation mode, one token at a time.

        The state is carried from token to token. A model with a `context_limit` sees the last
        `context_limit` tokens once the text is longer than that. The position of every token then
        changes with each step, so nothing cached stays valid, and each step is a full forward pass.

        Args:
            idx: the prompt [B, T], int64, T >= 1.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 takes the likeliest token. Default: 1.
            top_k: sample among this many likeliest tokens only. Default: all.
            generator: source of randomness, on the model's device. Default: torch's global one.

        Yields:
            The next token of each row, [B, 1], `max_new_tokens` times.

        Raises:
            TypeError: as `forward` for `idx`. All errors come with the first token.
            ValueError: as `forward` for `idx`; `max_new_tokens` or `temperature` is negative,
                `temperature` is infinite, or `top_k` is below 1.
        """
        name = f"{self._name}.generate"
        if max_new_tokens < 0:
            fail(name, "max_new_tokens", "≥ 0", max_new_tokens)
        if not (temperature >= 0 and math.isfinite(temperature)):
            fail(name, "temperature", "finite and ≥ 0", temperature)
        if top_k is not None and top_k < 1:
            fail(name, "top_k", "≥ 1 or None", top_k)
        self._check_tokens("idx", idx)

        state = self.initial_state(idx.shape[0]) if self.incremental else None
        seen = 0
        for _ in range(max_new_tokens):
            limit = self.context_limit
            if limit is not None and idx.shape[1] > limit:
                state, seen = None, idx.shape[1] - limit
            logits, state = self._evaluate(idx[:, seen:], state)
            if state is not None:
                seen = idx.shape[1]
            token = _sample(logits[:, -1], temperature, top_k, generator)
            idx = torch.cat([idx, token], dim=1)
            yield token

    @torch.no_grad()
    def _evaluate(self, idx: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        """One forward pass in evaluation mode: logits and state."""
        # Parts of a model that is in training mode may be frozen in evaluation mode.
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            logits, _, state = self(idx, state=state)
        finally:
            for module in training:
                module.training = True
        return logits, state

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Group the parameters for AdamW: only matrices decay.

        Gains, biases and the parameters of gates do not.
        """
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {
                "params": [weight for weight in trainable if weight.dim() >= 2],
                "weight_decay": weight_decay,
            },
            {"params": [weight for weight in trainable if weight.dim() < 2], "weight_decay": 0.0},
        ]

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Count the parameters, by default with the CfCs' frozen 0/1 masks, as the paper does."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def gates(self) -> dict[str, LIFParameters]:
        """Find every LIF gate, by its module name and in order of depth."""
        return {name: m for name, m in self.named_modules() if isinstance(m, LIFParameters)}

    def num_lif_parameters(self) -> int:
        """Count the learnable parameters that the LIF mechanism adds."""
        gates = (module for module in self.modules() if isinstance(module, GateParameters))
        return sum(p.numel() for gate in gates for p in gate.parameters())

    @property
    def _name(self) -> str:
        return f"models.{type(self).__name__}"

    def _init_weights(self, residual_std: float = INIT_STD) -> None:
        """Draw all weights from N(0, 0.02), those of `c_proj` with `residual_std`; zero biases."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual_std if name.endswith(".c_proj") else INIT_STD
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _logits_and_loss(self, x: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(x, self.wte.weight)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def _check_inputs(self, idx: Tensor, targets: Tensor | None) -> None:
        self._check_tokens("idx", idx)
        if targets is not None:
            self._check_tokens("targets", targets, lowest=-1)
            if targets.shape != idx.shape:
                fail(
                    self._name, "targets", f"of idx's shape {list(idx.shape)}", list(targets.shape)
                )

    def _check_state_kind(self, state: tuple[tuple[Any, ...]], kind: type) -> None:
        if not isinstance(state, kind):
            fail(self._name, "state", f"a {kind.__name__}", type(state).__name__, TypeError)
        if len(state[0]) != self.config.n_layer:
            fail(self._name, "state", f"of n_layer = {self.config.n_layer} layers", len(state[0]))

    def _check_tokens(self, argument: str, tokens: Tensor, lowest: int = 0) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            fail(self._name, argument, "an int64 tensor", got, TypeError)
        if tokens.dim() != 2 or tokens.numel() == 0:
            fail(self._name, argument, "[B, T] with B, T ≥ 1", list(tokens.shape))
        if is_readable(tokens):
            smallest, largest = (int(v) for v in tokens.aminmax())
            if smallest < lowest or largest >= self.config.vocab_size:
                expected = f"within [{lowest}, {self.config.vocab_size})"
                fail(self._name, argument, expected, f"[{smallest}, {largest}]")


class MLP(nn.Module):
    """Two linear layers, four times as wide in between, with exact GELU."""

    def __init__(self, n_embd: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n_embd] to the same shape."""
        return self.dropout(gelu_linear(self.c_fc(x), self.c_proj))  # type: ignore[no-any-return]


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row of `logits` [B, V]; returns [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
