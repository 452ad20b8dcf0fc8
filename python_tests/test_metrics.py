"""The paper's measures against cases that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.models.ember import EmberCondition
from ember_ext.nn.lif_gate import LIFParameters
from ember_ext.paper.training.metrics import (
    _firing,
    attention_entropy,
    attention_support,
    collect_metrics,
    fire_rate,
    first_token_mass,
    neuron_entropy,
)

SIZES: dict[str, Any] = {"block_size": 12, "vocab_size": 11, "n_layer": 2, "n_embd": 16}


def uniform_attention(length: int) -> torch.Tensor:
    visible = torch.ones(length, length).tril()
    return visible / visible.sum(-1, keepdim=True)


@pytest.mark.parametrize(("length", "expected"), [(256, 4.560), (128, 3.878)])
def test_entropy_of_uniform_attention(length: int, expected: float) -> None:
    entropy = attention_entropy(uniform_attention(length).expand(2, 3, -1, -1))
    assert entropy.tolist() == pytest.approx([expected] * 3, abs=5e-4)


def test_support_and_first_token_of_uniform_attention() -> None:
    weights = uniform_attention(256).expand(2, 3, -1, -1)
    # A row of i keys has i weights of 1/i, which are above 0.01 up to the 99th.
    assert attention_support(weights).tolist() == pytest.approx([sum(range(1, 100)) / 256] * 3)
    harmonic = sum(1 / i for i in range(1, 257))
    assert first_token_mass(weights).tolist() == pytest.approx([harmonic / 256] * 3)


def test_pointing_attention() -> None:
    weights = torch.eye(5).expand(1, 2, 5, 5)
    assert attention_entropy(weights).tolist() == [0.0, 0.0]
    assert attention_support(weights).tolist() == [1.0, 1.0]
    assert first_token_mass(weights).tolist() == pytest.approx([0.2, 0.2])


def test_fire_rate_and_entropy_of_neurons() -> None:
    always, never = torch.full((8, 5), 0.9), torch.full((8, 5), 0.1)
    half = torch.cat((always[:4], never[:4]))
    firing = torch.stack((always, never, half), dim=-1)
    assert fire_rate(firing).tolist() == [1.0, 0.0, 0.5]
    assert neuron_entropy(firing).tolist() == pytest.approx([0, 0, math.log(2)], abs=1e-6)


def test_neuron_entropy_of_even_spread() -> None:
    firing = torch.linspace(0, 1, 1000)[:, None]
    assert neuron_entropy(firing).item() == pytest.approx(math.log(10), abs=1e-4)


COUPLINGS = {
    "lif-refractory": {"within", "across"},
    "lif-persistent": {"persistence", "coupling"},
}


@pytest.mark.parametrize("condition", get_args(EmberCondition))
def test_transformer_metrics(condition: Any) -> None:
    torch.manual_seed(0)
    model = Ember(EmberConfig(n_head=4, condition=condition, **SIZES)).eval()
    metrics = collect_metrics(model, torch.randint(11, (3, 12)), "text")
    torch.manual_seed(1)
    windows = torch.randint(11, (3, 12))
    measured = collect_metrics(model, windows, "text")["attention_entropy"]
    at_once = [attention_entropy(weights) for weights in model.attention_weights(windows)]
    torch.testing.assert_close(torch.tensor(measured), torch.stack(at_once))
    gated = condition not in ("standard", "qwen-gate")
    assert len(metrics["gates"]) == (2 if gated else 0)
    for gate in metrics["gates"].values():
        couplings = COUPLINGS.get(condition, set())
        assert gate.keys() == {"threshold", "leak", "steepness"} | couplings
        assert all(len(values) == 4 for values in gate.values())
    assert ("membranes" in metrics) == (condition == "lif-temporal")
    for name, gate in metrics.get("membranes", {}).items():
        assert gate["leak"] == model.get_submodule(name).leak.tolist()
        assert gate.keys() == {"threshold", "leak", "steepness"}
    # Weights this small leave attention nearly uniform.
    uniform = attention_entropy(uniform_attention(12)[None, None]).item()
    for layer in metrics["attention_entropy"]:
        assert layer == pytest.approx([uniform] * 4, rel=1e-2)
    for layer in metrics["attention_support"]:
        assert layer == pytest.approx([6.5] * 4)
    for layer in metrics["first_token_mass"]:
        assert layer == pytest.approx([sum(1 / i for i in range(1, 13)) / 12] * 4, rel=1e-2)


@pytest.mark.parametrize("condition", ["standard", "lif"])
def test_cfc_metrics_use_one_virtual_gate_for_all(condition: Any) -> None:
    torch.manual_seed(0)
    config = LiquidEmberConfig(cfc_units=24, condition=condition, gate_preset="released", **SIZES)
    model = LiquidEmber(config).eval()
    metrics = collect_metrics(model, torch.randint(11, (3, 12)), "released")
    assert all(0 <= rate <= 1 for rate in metrics["virtual_fire_rate"])
    if condition == "standard":
        assert metrics["fire_rate"] == metrics["neuron_entropy"] == [None, None]
        assert metrics["always_on"] == metrics["selective"] == [None, None]
        return
    # A gate that has not learned yet is the virtual one.
    for measure in ("fire_rate", "neuron_entropy", "always_on", "selective"):
        assert metrics[measure] == metrics[f"virtual_{measure}"]
    with torch.no_grad():
        for gate in model.gates().values():
            gate.raw_threshold.fill_(1e6)
    after = collect_metrics(model, torch.randint(11, (3, 12)), "released")
    assert after["fire_rate"] == after["always_on"] == [0.0, 0.0]
    assert after["selective"] == [1.0, 1.0]


def test_shares_of_always_on_and_selective_neurons() -> None:
    gate = LIFParameters(5, preset="released")
    # The gate's θ is 0.001. Of 100 characters, neurons fire at 100, 96, 95, 50 and 49.
    x = torch.zeros(4, 25, 5)
    for neuron, characters in enumerate((100, 96, 95, 50, 49)):
        x.view(100, 5)[:characters, neuron] = -0.5
    firing = _firing(x, gate)
    assert firing["fire_rate"] == pytest.approx((100 + 96 + 95 + 50 + 49) / 500)
    assert firing["always_on"] == pytest.approx(2 / 5)
    assert firing["selective"] == pytest.approx(1 / 5)


def test_measuring_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = LiquidEmber(LiquidEmberConfig(cfc_units=24, **SIZES)).eval()
    windows = torch.randint(11, (3, 12))
    before = model(windows)[0]
    collect_metrics(model, windows, "text")
    assert torch.equal(model(windows)[0], before)
    assert not any(module._forward_pre_hooks for module in model.modules())
