"""What analysis reads from runs: checks, roles, depth, crossovers and the noise floor."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_results import Effect, synthetic_results, synthetic_run

from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.paper.claims.verdicts import claims
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import (
    ResultError,
    RunResult,
    read_results,
    write_result,
)
from ember_ext.paper.statistics.comparisons import (
    LOSS_MEASURES,
    best_loss,
    compare,
    extra_parameters,
    final_full_loss,
    measure_noise,
    noise_curve,
)
from ember_ext.paper.statistics.crossover import find_crossover, find_crossovers
from ember_ext.paper.statistics.depth import (
    ALWAYS_ON,
    ATTENTION_ENTROPY,
    FIRE_RATE,
    NEURON_ENTROPY,
    THRESHOLD,
    VIRTUAL_NEURON_ENTROPY,
    depth_profile,
    depth_profiles,
    layer_values,
    threshold_trajectories,
)
from ember_ext.paper.statistics.heads import (
    GateUnit,
    gate_units,
    gatherer_cut_off,
    head_role,
    head_roles,
    role_counts,
    uniform_entropy,
    uniform_first_token_mass,
    uniform_support,
)
from ember_ext.paper.tables.catalogue import tables
from ember_ext.paper.training.metrics import collect_metrics


def with_losses(run: RunResult, losses: list[float]) -> RunResult:
    """The run with other losses, evaluated every 200 steps."""
    evaluations = [
        {**record, "step": 200 * i, "val_loss": loss, "val_loss_estimate": loss}
        for i, (record, loss) in enumerate(zip(run.evaluations, losses, strict=False))
    ]
    config = {**run.config, "steps": 200 * (len(losses) - 1)}
    return dataclasses.replace(run, config=config, evaluations=evaluations)


def test_grid_pairs_common_seeds_only() -> None:
    runs = synthetic_results(variants=("standard",), seeds=(7, 3, 5))
    runs += synthetic_results(variants=("lif",), seeds=(5, 9, 3))
    finished = FinishedRuns(runs)
    assert [run.seed for run in finished.runs("transformer", "standard")] == [3, 5, 7]
    pairs = finished.pairs("transformer", "lif")
    assert [(p.base.seed, p.other.seed) for p in pairs] == [(3, 3), (5, 5)]
    assert [(p.base.variant, p.other.variant) for p in pairs] == [("standard", "lif")] * 2
    assert finished.pairs("cfc", "lif") == []
    assert finished.backbones == ["transformer"]


def change_record(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["evaluations"][3].__setitem__(key, value)


def change_config(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["config"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_record("val_loss_estimate", math.nan), "val_loss_estimate must be a finite"),
        (change_record("val_loss", math.inf), "val_loss must be a finite"),
        (change_record("val_loss", None), "val_loss must be a finite"),
        (change_record("step", 0), "steps of evaluations must rise, got 0 after 400"),
        (change_record("attention_entropy", [[1.0] * 4]), "one entry for each of 2 layers"),
        (change_record("attention_entropy", [[1.0] * 4, [1.0] * 3]), "must hold finite numbers"),
        (change_record("gates", None), "gates must be one for each of 2 layers"),
        (change_record("gates", {"a": {}, "b": {}}), "threshold of a must hold 4 numbers"),
        (lambda content: content["evaluations"].pop(), "last evaluation is at 2800 of 3000"),
        (lambda content: content["evaluations"].clear(), "no evaluations"),
        (lambda content: content["summary"].pop("parameters"), "no number 'parameters'"),
        (change_config("seed", None), "no number 'seed'"),
        (change_config("backbone", "mlp"), "backbone must be one of"),
        (change_config("learning_rate", 0.1), "learning_rate must be 0.001 as in"),
        (change_config("gate_preset", "text"), "gate_preset must be that of"),
        (lambda content: content["corpus"].__setitem__("sha256", "1"), "corpus must be that of"),
    ],
)
def test_damaged_results_are_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    runs = synthetic_results(variants=("standard", "lif"))
    content = copy.deepcopy(dataclasses.asdict(runs[3]))
    change(content)
    damaged = [*runs[:3], RunResult(**content), *runs[4:]]
    for analyse in (FinishedRuns, tables, claims):
        with pytest.raises(ResultError, match=message) as caught:
            analyse(damaged)
        assert "lif" in str(caught.value)


def test_two_results_of_one_run_are_refused() -> None:
    run = synthetic_run()
    with pytest.raises(ResultError, match="transformer-standard-seed42: there are two results"):
        FinishedRuns([run, run])


def test_device_and_path_may_differ() -> None:
    runs = synthetic_results(variants=("standard", "lif"), seeds=(1,))
    runs += synthetic_results(variants=("standard", "lif"), seeds=(2,), device="cuda", data="a.txt")
    assert len(FinishedRuns(runs).pairs("transformer", "lif")) == 2


def test_comparison_is_paired() -> None:
    """Seeds differ by far more than the effect, which pairs show all the same."""
    effects = {"standard": Effect(noise=2e-5), "lif": Effect(loss=-0.003, noise=2e-5)}
    finished = FinishedRuns(synthetic_results(effects, seed_sd=0.05))
    comparison = compare(finished, "transformer", "lif")
    assert comparison is not None
    assert comparison.difference == pytest.approx(-0.003, abs=1e-4)
    assert comparison.base.sd is not None
    assert comparison.base.sd > 0.005
    assert comparison.t_p is not None
    assert comparison.t_p < 1e-3
    assert compare(finished, "cfc", "lif") is None


def test_best_and_final_loss_are_told_apart() -> None:
    run = with_losses(synthetic_run(), [3.0, 1.0, 2.0])
    values = [measure(run) for measure in LOSS_MEASURES.values()]
    assert values == [1.0, 2.0, 1.0, 2.0]
    assert list(LOSS_MEASURES)[1] == "final, estimate"


def test_noise_floor_of_null_pairs() -> None:
    base = synthetic_run(seed=1), synthetic_run(seed=2)
    losses = [[3.0, 2.0, 1.0], [3.0, 2.5, 1.5]]
    others = [[3.0, 2.1, 1.03], [3.0, 2.4, 1.46]]
    runs = [with_losses(run, curve) for run, curve in zip(base, losses, strict=True)]
    runs += [
        with_losses(synthetic_run(variant="null", seed=seed), curve)
        for seed, curve in zip((1, 2), others, strict=True)
    ]
    finished = FinishedRuns(runs)
    floor = measure_noise(finished, "transformer", final_full_loss)
    assert floor is not None
    assert floor.rms == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2))
    assert floor.maximum == pytest.approx(0.04)
    assert measure_noise(finished, "transformer", best_loss) == floor
    curve = noise_curve(finished, "transformer")
    assert curve is not None
    assert curve.steps == (0, 200, 400)
    assert curve.rms == pytest.approx((0, 0.1, floor.rms))
    assert curve.maximum == pytest.approx((0, 0.1, 0.04))
    assert measure_noise(finished, "cfc") is None
    assert noise_curve(finished, "cfc") is None


def test_support_and_first_token_mass_of_uniform_attention() -> None:
    assert uniform_support(256) == pytest.approx(19.34, abs=5e-3)
    assert uniform_support(7) == 4  # 1 to 7 keys, all in use
    assert uniform_first_token_mass(256) == pytest.approx(0.0239, abs=5e-5)
    assert uniform_first_token_mass(3) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_uniform_entropy_and_the_cut_off_that_follows() -> None:
    assert uniform_entropy(256) == pytest.approx(4.560, abs=5e-4)
    assert uniform_entropy(128) == pytest.approx(3.878, abs=5e-4)
    assert gatherer_cut_off(256) == pytest.approx(3.5, abs=5e-4)
    assert gatherer_cut_off(128) == pytest.approx(2.977, abs=5e-4)


@pytest.mark.parametrize(
    ("entropy", "block_size", "role"),
    [
        (0.0, 256, "pointer"),
        (0.0999, 256, "pointer"),
        (0.1, 256, "focuser"),
        (0.999, 256, "focuser"),
        (1.0, 256, "mixed"),
        (3.49, 256, "mixed"),
        (3.51, 256, "gatherer"),
        (3.1, 256, "mixed"),
        (3.1, 128, "gatherer"),
    ],
)
def test_head_roles(entropy: float, block_size: int, role: str) -> None:
    assert head_role(entropy, block_size) == role


def test_roles_are_counted_by_layer() -> None:
    run = synthetic_run(block_size=256)
    run.evaluations[-1]["attention_entropy"] = [[0.01, 0.05, 0.5, 4.0], [2.0, 2.0, 4.2, 0.9]]
    assert head_roles(run)[1] == ["mixed", "mixed", "gatherer", "focuser"]
    counts = role_counts(run)
    assert counts[0] == {"pointer": 2, "focuser": 1, "gatherer": 1}
    assert counts[1] == {"mixed": 2, "gatherer": 1, "focuser": 1}


@pytest.mark.parametrize(
    ("threshold", "leak", "steepness", "contrast", "label", "deviates"),
    [
        # The start, the fixed control and the strongest head of the published runs.
        (0.001, 0.881, 2.127, 1.050, "pass-through", False),
        (0.1, 0.881, 2.127, 1.054, "mild", True),
        (0.147, 0.654, 3.31, 1.25, "selective", True),
        (0.01, 0.881, 2.127, 1.050, "moderate", False),
        (-0.2, 0.73, 2.127, 1.10, "pass-through", True),
    ],
)
def test_gate_units(
    threshold: float, leak: float, steepness: float, contrast: float, label: str, deviates: bool
) -> None:
    unit = GateUnit(0, 0, threshold, leak, steepness)
    assert unit.contrast == pytest.approx(contrast, abs=6e-3)
    assert (unit.label, unit.deviates) == (label, deviates)


def test_contrast_survives_extreme_gates() -> None:
    assert GateUnit(0, 0, 5.0, 0.5, 1e4).contrast == 1.0
    assert GateUnit(0, 0, 0.5, 0.25, 1e4).contrast == pytest.approx(4.0)


def test_gates_by_layer_and_evaluation() -> None:
    run = synthetic_run(variant="lif", effect=Effect(threshold=(0.02, 0.2)))
    units = gate_units(run)
    assert [(u.layer, u.index) for u in units] == [(i, j) for i in range(2) for j in range(4)]
    assert [u.threshold for u in units[3:5]] == pytest.approx([0.02, 0.2])
    assert gate_units(run, 0)[5].threshold == pytest.approx(0.001)
    assert gate_units(synthetic_run()) == []


def test_depth_profiles() -> None:
    runs = synthetic_results({"lif": Effect(entropy=(1.0, 2.0, 3.0, 3.5))}, n_layer=4)
    finished = FinishedRuns(runs)
    profiles = depth_profiles(finished, "transformer", ATTENTION_ENTROPY)
    assert profiles["lif"].mean == pytest.approx((1.0, 2.0, 3.0, 3.5), rel=0.02)
    assert profiles["lif"].mean_spearman == pytest.approx(1)
    assert profiles["lif"].rises == pytest.approx([2.5] * 3, rel=0.05)
    assert profiles["lif"].sd is not None
    assert profiles["standard"].mean_spearman != pytest.approx(1)
    assert depth_profiles(finished, "transformer", FIRE_RATE) == {}
    assert set(depth_profiles(finished, "transformer", THRESHOLD)) == {
        "lif",
        "lif-fixed",
        "lif-refractory",
        "lif-text",
    }


def test_depth_of_a_single_shallow_run() -> None:
    profile = depth_profile([synthetic_run("cfc", "lif")], NEURON_ENTROPY)
    assert profile is not None
    assert profile.sd is None
    assert profile.mean_spearman is None
    assert depth_profile([], NEURON_ENTROPY) is None


def test_depth_of_thresholds_is_of_their_size() -> None:
    run = synthetic_run(variant="lif")
    gates = run.evaluations[-1]["gates"]
    gates["blocks.0.attn.gate"]["threshold"] = [0.5, -0.5, 0.4, -0.4]
    assert layer_values(run, THRESHOLD) == pytest.approx([0.45, 0.001])


def test_no_depth_profile_of_a_measure_that_a_run_lacks() -> None:
    runs = [synthetic_run("cfc", "lif", seed) for seed in (1, 2)]
    assert depth_profile(runs, ALWAYS_ON) is not None
    del runs[1].evaluations[-1]["always_on"]
    assert depth_profile(runs, ALWAYS_ON) is None


def test_baseline_has_virtual_firing_only() -> None:
    run = synthetic_run("cfc", "standard")
    assert layer_values(run, NEURON_ENTROPY) is None
    assert layer_values(run, THRESHOLD) is None
    values = layer_values(run, VIRTUAL_NEURON_ENTROPY)
    assert values is not None
    assert len(values) == 2


def test_threshold_trajectories() -> None:
    run = synthetic_run(variant="lif", effect=Effect(threshold=(0.001, 0.031)))
    steps, theta = threshold_trajectories(run)
    assert steps == list(range(0, 3001, 200))
    assert theta.shape[:2] == (16, 2)
    layers = theta.mean(2).T
    assert layers[0] == pytest.approx([0.001] * 16)
    assert layers[1] == pytest.approx([0.001 + 0.03 * i / 15 for i in range(16)])


@pytest.mark.parametrize(
    ("other", "first", "persistent"),
    [
        ([3.0, 2.0, 1.0, 0.5], None, None),
        ([2.9, 1.9, 0.9, 0.4], 200, 200),
        ([2.9, 2.0, 1.0, 0.5], None, None),  # step 0 alone
        ([2.9, 2.1, 0.9, 0.6], 400, None),
        ([3.1, 1.9, 1.1, 0.4], 200, 600),
        ([3.1, 1.9, 0.9, 0.6], 200, None),
        ([3.1, 2.1, 0.9, 0.4], 400, 400),
    ],
)
def test_crossover(other: list[float], first: int | None, persistent: int | None) -> None:
    base = with_losses(synthetic_run(), [3.0, 2.0, 1.0, 0.5])
    found = find_crossover(base, with_losses(synthetic_run(variant="lif"), other))
    assert (found.seed, found.first, found.persistent) == (42, first, persistent)


def test_crossovers_over_seeds() -> None:
    effects = {"lif": Effect(loss=-0.02, early=0.02, since=1600, noise=1e-4)}
    finished = FinishedRuns(synthetic_results(effects))
    summary = find_crossovers(finished.pairs("transformer", "lif"))
    assert summary.persistent is not None
    assert (summary.persistent.n, summary.persistent.mean, summary.persistent.sd) == (3, 1600, 0)
    assert find_crossovers([]).persistent is None


def test_null_pairs_cross_as_well() -> None:
    """The published rule finds a crossover between curves that differ by nothing but chance."""
    finished = FinishedRuns(synthetic_results(seeds=range(12)))
    summary = find_crossovers(finished.pairs("transformer", "null"))
    assert sum(c.first is not None for c in summary.crossovers) >= 3


def test_extra_parameters() -> None:
    finished = FinishedRuns(synthetic_results())
    assert extra_parameters(finished, "transformer", "lif") == 24
    assert extra_parameters(finished, "transformer", "qwen-gate") == 2 * 128**2
    assert extra_parameters(finished, "cfc", "lif") is None


def real_run(variant: str) -> RunResult:
    """A run of a tiny untrained model, measured as training does."""
    backbone, condition = variant.split("-", 1)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_size": 12, "vocab_size": 11, "n_layer": 2, "n_embd": 16}
    sizes |= {"condition": condition, "gate_preset": "released"}
    model: Ember | LiquidEmber
    if backbone == "transformer":
        model = Ember(EmberConfig(n_head=2, **sizes))
    else:
        model = LiquidEmber(LiquidEmberConfig(cfc_units=24, **sizes))
    model.eval()
    windows = torch.randint(11, (3, 12))
    metrics = collect_metrics(model, windows, "released")
    losses = {"val_loss": 3.0, "val_loss_estimate": 3.0, "train_loss_estimate": 3.0}
    config = {**sizes, "n_head": 2, "backbone": backbone, "seed": 0}
    made_up = synthetic_run(backbone).config
    config = {**made_up, **config, "steps": 1, "eval_interval": 1}
    summary = {
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(trainable_only=True),
        "lif_parameters": model.num_lif_parameters(),
    }
    evaluations = [{"step": step, "seconds": 0.0, **losses, **metrics} for step in (0, 1)]
    return RunResult(condition, config, {"name": "x", "sha256": "y"}, summary, evaluations)


def test_measures_of_real_models_are_understood(tmp_path: Path) -> None:
    variants = [
        *(f"transformer-{c}" for c in ("standard", "lif", "lif-fixed", "lif-refractory")),
        "transformer-qwen-gate",
        "cfc-standard",
        "cfc-lif",
    ]
    for variant in variants:
        run = real_run(variant)
        write_result(tmp_path / f"{run.name}.json", run)
    results = read_results(tmp_path)
    assert len(results) == 7
    finished = FinishedRuns(results)
    assert extra_parameters(finished, "transformer", "lif") == 2 * 2 * 3
    assert extra_parameters(finished, "cfc", "lif") == 2 * 16 * 3
    assert [table.number for table in tables(results) if not table.rows] == ["S2"]
    assert {claim.verdict for claim in claims(results)} == {"not testable at this scale"}


def test_order_does_not_matter() -> None:
    results = synthetic_results(variants=("standard", "lif", "null"))
    results += synthetic_results(variants=("standard", "lif"), backbone="cfc")
    assert tables(results) == tables(results[::-1])
    assert claims(results) == claims(results[::-1])
