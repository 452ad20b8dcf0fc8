"""Which runs make up the paper: variants of both backbones, at four scales, over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ember_ext.paper.training.config import (
    Backbone,
    ConfigError,
    Preset,
    TrainConfig,
    preset_config,
)

SuiteName = Literal["quick", "xs", "stated", "paper"]

SEEDS = (42, 668, 1337)
"""The paper's."""

VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"condition": "standard"},
    "lif": {"condition": "lif"},
    "lif-fixed": {"condition": "lif-fixed"},
    "lif-refractory": {"condition": "lif-refractory"},
    "qwen-gate": {"condition": "qwen-gate"},
    # The gate of the paper's text, where the others are those of its released code.
    "lif-text": {"condition": "lif", "gate_preset": "text"},
    # Standard once more, equal up to rounding, shows how far two runs part for no reason.
    "null": {"condition": "standard", "init_noise": 1e-7},
    # What section 6.3 of the paper leaves for later: gates that remember across layers.
    "lif-temporal": {"condition": "lif-temporal"},
    "lif-persistent": {"condition": "lif-persistent"},
    # LIF once more, by other operations, shows the same.
    "sigmoid": {"condition": "sigmoid"},
}
"""The variants that are trained, and the fields of `TrainConfig` that define them."""

_TRANSFORMER = tuple(VARIANTS)
_QUICK = ("standard", "lif", "lif-fixed", "lif-refractory", "qwen-gate", "null")
_CFC = ("standard", "lif", "lif-text", "null")


@dataclass(frozen=True)
class Suite:
    """A grid of runs.

    Attributes:
        preset: sizes and lengths, as `train.py --preset`.
        variants: what is trained, for each backbone, in the order of running.
        changes: fields that differ from the preset, for each backbone.
        seeds: those of a full grid.
    """

    preset: Preset
    variants: Mapping[Backbone, tuple[str, ...]]
    changes: Mapping[Backbone, Mapping[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS


_GATE = {"gate_preset": "released"}

SUITES: dict[SuiteName, Suite] = {
    "quick": Suite(
        "quick",
        {
            "transformer": _QUICK,
            "cfc": tuple(v for v in _CFC if v != "lif-text"),
        },
        {"transformer": {**_GATE, "steps": 1000}, "cfc": _GATE},
        seeds=SEEDS[:1],
    ),
    "xs": Suite(
        "xs",
        {"transformer": _TRANSFORMER, "cfc": _CFC},
        {"transformer": _GATE, "cfc": _GATE},
    ),
    # The paper's text gives its CfC 4 layers of 128 with 192 units. Its authors never trained that
    # on text: what they ran is in "paper".
    "stated": Suite(
        "paper",
        {"cfc": ("standard", "lif", "null")},
        {"cfc": {**_GATE, "n_embd": 128, "cfc_units": 192}},
    ),
    # The published refractory losses come from thresholds that look ahead.
    "paper": Suite(
        "paper",
        {"transformer": _TRANSFORMER, "cfc": _CFC},
        {"transformer": {**_GATE, "refractory_mode": "look_ahead"}, "cfc": _GATE},
    ),
}


@dataclass(frozen=True)
class RunSpec:
    """One run of a suite.

    Attributes:
        variant: its name among those of a backbone.
        config: what to train.
        corpus: SHA-256 of the text that it must be trained on. Default: any.
    """

    variant: str
    config: TrainConfig
    corpus: str | None = None

    @property
    def name(self) -> str:
        """The name of its folder and of its result."""
        return f"{self.config.backbone}-{self.variant}-seed{self.config.seed}"


def plan(
    suite: SuiteName,
    seeds: Sequence[int] = (),
    variants: Sequence[str] = (),
    backbones: Sequence[Backbone] = (),
    **changes: Any,
) -> list[RunSpec]:
    """The runs of a suite, seed by seed, so that a grid that is cut short still has whole pairs.

    Args:
        suite: its name.
        seeds: other seeds than the suite's.
        variants: only these.
        backbones: only these.
        changes: fields of every `TrainConfig`, such as device (default: "auto") and data.

    Raises:
        ConfigError: an unknown variant, one that none of the chosen backbones has, or a named
            backbone of which nothing would be run.
    """
    chosen = SUITES[suite]
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"variant must be one of {list(VARIANTS)}, got {variant!r}")
    _check_choice(suite, variants, backbones)
    runs = []
    for seed in seeds or chosen.seeds:
        for backbone in backbones or get_args(Backbone):
            # The machine of the runs may have a device that this one lacks.
            config = preset_config(backbone, chosen.preset, "cpu")
            for variant in chosen.variants.get(backbone, ()):
                if variants and variant not in variants:
                    continue
                fields = {
                    **chosen.changes.get(backbone, {}),
                    **VARIANTS[variant],
                    "seed": seed,
                    "device": "auto",
                    **changes,
                }
                runs.append(RunSpec(variant, dataclasses.replace(config, **fields)))
    return runs


def _check_choice(suite: SuiteName, variants: Sequence[str], backbones: Sequence[Backbone]) -> None:
    """Require that every variant and every backbone that is named has a run.

    Raises:
        ConfigError: one has none.
    """
    has = SUITES[suite].variants
    there = ", ".join(f"{backbone}: {list(names)}" for backbone, names in has.items())
    among = list(backbones or get_args(Backbone))
    for variant in variants:
        if not any(variant in has.get(backbone, ()) for backbone in among):
            raise ConfigError(
                f"suite {suite!r} has no variant {variant!r} for {among}: it has {there}"
            )
    for backbone in backbones:
        names = has.get(backbone, ())
        if not names or (variants and not set(variants) & set(names)):
            wanted = f"variant of {list(variants)}" if variants else "variant"
            raise ConfigError(f"suite {suite!r} has no {wanted} for {backbone!r}: it has {there}")
