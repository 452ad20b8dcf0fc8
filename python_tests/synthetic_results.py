"""Made-up results of runs whose verdict is known, for tests of tables, figures and claims."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ember_ext.paper.runs.results import RunResult

SEEDS = (42, 668, 1337)

TRANSFORMER_VARIANTS = (
    "standard",
    "lif",
    "lif-fixed",
    "lif-refractory",
    "qwen-gate",
    "lif-text",
    "null",
)
CFC_VARIANTS = ("standard", "lif", "lif-text", "null")

LATER_VARIANTS = ("lif-temporal", "lif-persistent", "sigmoid")
"""What the paper leaves for later, and not in its tables."""

GATED = ("lif", "lif-fixed", "lif-refractory", "lif-text", *LATER_VARIANTS)


@dataclass(frozen=True)
class Effect:
    """What a variant does to the baseline's numbers.

    Attributes:
        loss: added to the loss from step `since` on.
        since: a step; before it `early` is added instead.
        early: see `since`.
        noise: sd, over runs, of what is added to the loss, growing linearly over the run.
        spread: factor on the deviation of each seed from the mean of seeds.
        entropy: attention entropy (Transformer) or own neuron entropy (CfC) of each layer at the
            end; None for a profile that is equal for all variants.
        virtual_entropy: neuron entropy of each layer through the virtual gate (CfC).
        threshold: effective θ of each layer at the end, reached linearly from .001 after `since`.
    """

    loss: float = 0.0
    since: int = 0
    early: float = 0.0
    noise: float = 0.0004
    spread: float = 1.0
    entropy: tuple[float, ...] | None = None
    virtual_entropy: tuple[float, ...] | None = None
    threshold: tuple[float, ...] | None = None


def synthetic_run(
    backbone: str = "transformer",
    variant: str = "standard",
    seed: int = 42,
    effect: Effect = Effect(),
    *,
    seed_sd: float = 0.007,
    n_layer: int = 2,
    n_head: int = 4,
    n_embd: int = 128,
    block_size: int = 128,
    steps: int = 3000,
    eval_interval: int = 200,
    **config: Any,
) -> RunResult:
    """One run; equal arguments give equal results, and runs of one seed share its deviation."""
    run_noise = np.random.default_rng([seed, zlib.crc32(variant.encode())])
    of_seed = np.random.default_rng(seed)
    deviation = seed_sd * float(of_seed.standard_normal()) * effect.spread
    drift = effect.noise * float(run_noise.standard_normal())
    window_noise = 0.003 * of_seed.standard_normal(steps // eval_interval + 2)
    evaluations = []
    for i, step in enumerate([*range(0, steps, eval_interval), steps]):
        shift = effect.loss if step >= effect.since else effect.early
        grown = step / steps
        risen = max(0, step - effect.since) / max(1, steps - effect.since)
        loss = 1.6 + 2.57 * float(np.exp(-step / 300)) + grown * (deviation + shift + drift)
        evaluations.append(
            {
                "step": step,
                "val_loss": loss,
                "val_loss_estimate": loss + float(window_noise[i]),
                "train_loss_estimate": loss - 0.1 * grown,
                "seconds": 0.1 * step,
                "gates": _gates(backbone, variant, effect, risen, n_layer, n_head, n_embd),
                **_layers(backbone, variant, effect, run_noise, grown, n_layer, n_head, block_size),
            }
        )
    per_unit = {"lif-fixed": 0, "lif-refractory": 5, "lif-persistent": 5}.get(
        variant, 3 if variant in GATED else 0
    )
    units = n_head if backbone == "transformer" else n_embd
    extra = n_layer * (
        units * per_unit + {"qwen-gate": n_embd**2, "lif-temporal": 3}.get(variant, 0)
    )
    condition = {"lif-text": "lif", "null": "standard"}.get(variant, variant)
    return RunResult(
        variant=variant,
        config={
            "backbone": backbone,
            "condition": condition,
            "preset": "xs",
            "gate_preset": "text" if variant == "lif-text" else "released",
            "refractory_mode": "causal",
            "persistence_mode": "causal",
            "seed": seed,
            "steps": steps,
            "eval_interval": eval_interval,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "cfc_units": 192,
            "block_size": block_size,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.1,
            "grad_clip": 1.0,
            "dropout": 0.1,
            "init_noise": 1e-7 if variant == "null" else 0.0,
            "device": "cpu",
            **config,
        },
        corpus={"name": "synthetic", "sha256": "0" * 64, "vocabulary": 65},
        summary={
            "parameters": 418_560 + extra,
            "trainable_parameters": 418_560 + extra,
            "lif_parameters": extra if variant != "qwen-gate" else 0,
            "seconds": 0.1 * steps,
            "device": "cpu",
            "threads": 2,
            "torch": "2.13.0",
            "ember_ext": "0.1.0",
        },
        evaluations=evaluations,
    )


def synthetic_results(
    effects: Mapping[str, Effect] | None = None,
    *,
    backbone: str = "transformer",
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    **sizes: Any,
) -> list[RunResult]:
    """A grid of one backbone: every variant (by default all of the xs suite) with every seed.

    Args:
        effects: what variants do; those not named do nothing.
        backbone: "transformer" or "cfc".
        variants: which; by default all that the backbone has.
        seeds: which.
        sizes: as `synthetic_run`.
    """
    effects = effects or {}
    if variants is None:
        variants = TRANSFORMER_VARIANTS if backbone == "transformer" else CFC_VARIANTS
    return [
        synthetic_run(backbone, variant, seed, effects.get(variant, Effect()), **sizes)
        for seed in seeds
        for variant in variants
    ]


def _gates(
    backbone: str,
    variant: str,
    effect: Effect,
    grown: float,
    n_layer: int,
    n_head: int,
    n_embd: int,
) -> dict[str, Any]:
    if variant not in GATED:
        return {}
    name = "blocks.{}.attn.gate" if backbone == "transformer" else "blocks.{}.gate"
    units = n_head if backbone == "transformer" else n_embd
    ends = effect.threshold or (0.001,) * n_layer
    start = 0.1 if variant == "lif-fixed" else 0.001
    gates = {}
    for layer in range(n_layer):
        end = 0.1 if variant == "lif-fixed" else ends[layer]
        gates[name.format(layer)] = {
            "threshold": [start + grown * (end - start)] * units,
            "leak": [0.73 if variant == "lif-text" else 0.881] * units,
            "steepness": [2.127] * units,
        }
    return gates


def _layers(
    backbone: str,
    variant: str,
    effect: Effect,
    noise: np.random.Generator,
    grown: float,
    n_layer: int,
    n_head: int,
    block_size: int,
) -> dict[str, Any]:
    def jitter(value: float) -> float:
        return value * (1 + 0.01 * float(noise.standard_normal()))

    if backbone == "transformer":
        uniform = float(np.log(np.arange(1, block_size + 1)).mean())
        ends = effect.entropy or tuple(2.0 + 0.3 * (-1) ** i for i in range(n_layer))
        entropies = [
            [
                jitter(uniform + grown * (end * (0.6 + 0.8 * head / max(1, n_head - 1)) - uniform))
                for head in range(n_head)
            ]
            for end in ends
        ]
        return {
            "attention_entropy": entropies,
            "attention_support": [[5.0] * n_head for _ in ends],
            "first_token_mass": [[0.05] * n_head for _ in ends],
        }
    own = effect.entropy or tuple(0.1 + 0.01 * (-1) ** i for i in range(n_layer))
    virtual = effect.virtual_entropy or tuple(0.1 + 0.01 * (-1) ** i for i in range(n_layer))
    gated = variant in GATED
    return {
        "fire_rate": [jitter(1 - value / 5) if gated else None for value in own],
        "neuron_entropy": [jitter(value) if gated else None for value in own],
        "virtual_fire_rate": [jitter(1 - value / 5) for value in virtual],
        "virtual_neuron_entropy": [jitter(value) for value in virtual],
        "always_on": [0.75 if gated else None for _ in own],
        "selective": [0.125 if gated else None for _ in own],
        "virtual_always_on": [0.875 for _ in virtual],
        "virtual_selective": [0.0625 for _ in virtual],
    }
