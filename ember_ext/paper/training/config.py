"""The configuration of a training run: one flat dataclass, and the presets that fill it.

Fields are command-line flags (`n_layer` is `--n-layer`) and the keys of a run's `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import tyro

from ember_ext import _native
from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.models.ember import EmberCondition
from ember_ext.models.liquid_ember import CellName
from ember_ext.nn.lif_gate import PresetName
from ember_ext.paper.earlier import current_fields
from ember_ext.paper.records import RecordError, parse_json
from ember_ext.reference.persistent_lif_attention import PersistenceMode
from ember_ext.reference.refractory_lif_attention import RefractoryMode

Backbone = Literal["transformer", "cfc"]
Condition = EmberCondition
Preset = Literal["auto", "quick", "xs", "paper"]


class ConfigError(Exception):
    """A configuration that cannot be run; the message names the field."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's loss curve, and a few things that do not.

    The defaults are of no preset; `preset_config` is the way to one.
    """

    backbone: Backbone = "cfc"
    """The model: the paper's Transformer, or its CfC language model."""
    condition: Condition = "lif"
    """The gate under study, see `ember_ext.models.EmberConfig`; the CfC has "standard" and
    "lif"."""
    preset: Preset = "auto"
    """Sizes and length: "quick" takes minutes on a laptop, "xs" is the paper's small scale, "paper"
    its own; "auto" takes the largest that suits the device."""
    seed: int = 0
    """Decides initial weights, batches and dropout masks; equal seeds pair two conditions."""
    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one."""
    data: str | None = None
    """A UTF-8 text file to train on instead of Shakespeare."""

    n_layer: int = 2
    """Blocks."""
    n_embd: int = 128
    """Width of the residual stream."""
    n_head: int = 4
    """Attention heads (Transformer)."""
    cell: CellName = "cfc"
    """The cells of the CfC language model: closed-form, or liquid time-constant ones (CfC)."""
    cfc_units: int = 192
    """Neurons of each CfC or LTC (CfC)."""
    dropout: float = 0.0
    """Dropout probability."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    gate_preset: PresetName = "text"
    """Start and normalisation of the gates: the paper's text, or its released code."""
    refractory_mode: RefractoryMode = "causal"
    """Whether refractory thresholds look at the past only, or also at the future as published."""
    persistence_mode: PersistenceMode = "causal"
    """The same for thresholds that follow what heads have fired in earlier layers."""

    init_noise: float = 0.0
    """Relative noise on the initial weights: 1e-7 gives the same run up to rounding, to see how far
    two runs part that ought to be equal."""

    block_size: int = 128
    """Characters of a training window."""
    batch_size: int = 64
    """Windows of a step, over all processes."""
    steps: Annotated[int, tyro.conf.arg(aliases=["--max-iters"])] = 3000
    """Optimiser steps."""
    learning_rate: float = 1e-3
    """AdamW's step size."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """"cosine" falls to a tenth at the last step; the paper's is constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.99
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.1
    """On matrices only."""
    grad_clip: float = 1.0
    """Largest gradient norm."""

    eval_interval: int = 200
    """Steps between evaluations."""
    eval_iters: int = 50
    """Random batches of the paper's estimate of the training and the validation loss."""
    val_tokens: int | None = None
    """Characters, from the start of the validation text, that val_loss is measured on. Default: all
    of it, which takes long where the text is."""
    checkpoint_seconds: float = 60.0
    """Longest time between checkpoints; each evaluation writes one, too."""
    sample_length: int = 600
    """Characters of the text sample at the end."""

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            value = getattr(self, field)
            if not _fits(value, hint):
                raise ConfigError(f"{field} must be {_in_words(hint)}, got {value!r}")
        for field in ("steps", "batch_size", "eval_interval", "eval_iters"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        for field, most in _LARGEST.items():
            self._require(field, getattr(self, field) <= most, f"at most {most}")
        for field in ("n_layer", "n_embd", "n_head", "cfc_units", "block_size"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        at_least_zero = ("warmup_steps", "sample_length", "weight_decay", "init_noise")
        for field in (*at_least_zero, "checkpoint_seconds"):
            self._require(field, getattr(self, field) >= 0, "at least 0")
        if self.val_tokens is not None:
            self._require("val_tokens", self.val_tokens >= 2, "at least 2")
        for field in ("learning_rate", "grad_clip"):
            self._require(field, getattr(self, field) > 0, "above 0")
        for field in ("beta1", "beta2"):
            self._require(field, 0 <= getattr(self, field) < 1, "in [0, 1)")

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{field} must be {expected}, got {getattr(self, field)!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0)))


_LARGEST = {
    "n_layer": 10_000,
    **dict.fromkeys(("n_embd", "n_head", "cfc_units", "block_size", "batch_size"), 2**31 - 1),
}
"""torch does not refuse a model beyond these sizes, but builds it without end."""


def _fits(value: object, hint: Any) -> bool:
    """Whether a value, which may come from a file, is of a field's type."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return value in choices
    if choices:
        return any(_fits(value, choice) for choice in choices)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is hint


def _in_words(hint: Any) -> str:
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, choices))
    if choices:
        return " or ".join(map(_in_words, choices))
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    return words.get(hint, "nothing")


_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    # These are from the authors' logs of the published text runs. The CfC has 4 layers of 256;
    # the 128 and 192 of the paper's table are its audio model.
    ("transformer", "paper"): {
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "block_size": 256,
        "steps": 2000,
        "eval_interval": 500,
    },
    ("cfc", "paper"): {
        "n_layer": 4,
        "n_embd": 256,
        "cfc_units": 384,
        "dropout": 0.1,
        "bias": True,
        "block_size": 256,
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
    },
    ("transformer", "xs"): {"dropout": 0.1},
    ("cfc", "xs"): {"dropout": 0.1, "bias": True, "learning_rate": 3e-4},
    # Minutes on two cores: short windows, a high learning rate and a schedule that brings it down.
    ("transformer", "quick"): {
        "block_size": 64,
        "batch_size": 32,
        "steps": 1500,
        "learning_rate": 3e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 50,
        "eval_interval": 250,
        "eval_iters": 10,
    },
    ("cfc", "quick"): {
        "n_embd": 96,
        "cfc_units": 144,
        "bias": True,
        "block_size": 64,
        "steps": 600,
        "learning_rate": 6e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 50,
        "eval_interval": 100,
        "eval_iters": 10,
    },
}


def preset_config(backbone: Backbone, preset: Preset = "auto", device: str = "auto") -> TrainConfig:
    """The configuration of a preset, with "auto" resolved for this machine.

    Args:
        backbone: "transformer" or "cfc".
        preset: a name, or "auto": "paper" on a GPU that has compiled kernels, else "quick".
        device: a torch device, or "auto".

    Raises:
        ConfigError: there is no such backbone, preset or device.
    """
    device = resolve_device(device)
    if preset == "auto":
        kind = torch.device(device).type
        preset = "paper" if kind != "cpu" and _native.has(kind) else "quick"
    if (backbone, preset) not in _PRESETS:
        raise ConfigError(f"there is no preset {preset!r} for backbone {backbone!r}")
    fields = _PRESETS[backbone, preset]
    return TrainConfig(backbone=backbone, preset=preset, device=device, **fields)


def resolve_device(device: str) -> str:
    """The device to run on: `device`, or for "auto" CUDA where there is one, else the CPU.

    Raises:
        ConfigError: torch does not know the device, or it is not in this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from None
    return device


def build_model(config: TrainConfig, vocab_size: int) -> Ember | LiquidEmber:
    """The model of `config`, with freshly drawn weights without `init_noise`, on the CPU.

    Raises:
        ConfigError: the model does not accept a field.
    """
    known = EmberConfig if config.backbone == "transformer" else LiquidEmberConfig
    names = {field.name for field in dataclasses.fields(known)}
    fields = {name: value for name, value in vars(config).items() if name in names}
    try:
        if config.backbone == "transformer":
            return Ember(EmberConfig(vocab_size=vocab_size, **fields))
        return LiquidEmber(LiquidEmberConfig(vocab_size=vocab_size, **fields))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        sizes = ", ".join(f"{name} {fields[name]}" for name in _LARGEST if name in fields)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"a model of {sizes} must fit the memory, got: {reason}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The fields in a JSON file, which need not be all of them.

    Raises:
        ConfigError: the file is missing, not a JSON object, or has unknown fields.
    """
    try:
        fields = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except RecordError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {fields!r:.60}")
    unknown = fields.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise ConfigError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
    return current_fields(fields)


def differing_fields(first: TrainConfig, second: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations would train differently, with both values."""
    indifferent = {"preset", "device", "data", "checkpoint_seconds", "sample_length"}
    if first.lr_schedule == second.lr_schedule == "constant":
        indifferent.add("steps")
    return {
        name: (value, getattr(second, name))
        for name, value in vars(first).items()
        if name not in indifferent and value != getattr(second, name)
    }
