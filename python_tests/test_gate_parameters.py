"""Raw and effective parameters of gates, and the names that earlier files have for them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import ember_ext
from ember_ext import nn
from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.nn.lif_gate import GateParameters, PresetName

PRESETS: tuple[PresetName, ...] = ("text", "released")
SMALL: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "block_size": 4, "vocab_size": 5}

GATED: dict[str, Callable[[], torch.nn.Module]] = {
    "gate": lambda: nn.LIFGate(3),
    "fixed gate": lambda: nn.LIFGate(3, learnable=False),
    "parameters": lambda: nn.LIFParameters(3),
    "refractory parameters": lambda: nn.RefractoryParameters(3),
    "attention": lambda: nn.LIFSelfAttention(6, 2),
    "refractory attention": lambda: nn.LIFSelfAttention(6, 2, refractory="causal"),
    "nested": lambda: torch.nn.Sequential(torch.nn.Sequential(nn.LIFGate(3)), torch.nn.ReLU()),
    "transformer": lambda: Ember(EmberConfig(**SMALL, n_head=2, condition="lif-refractory")),
    "cfc": lambda: LiquidEmber(LiquidEmberConfig(**SMALL, cfc_units=11)),
}
every_gated = pytest.mark.parametrize("build", GATED.values(), ids=GATED)
OWNERS = (nn.LIFGate, nn.LIFParameters, nn.RefractoryParameters)
every_owner = pytest.mark.parametrize("owner", OWNERS)


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with other values than those it starts with."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(torch.rand(tensor.shape))
    return module


def earlier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it was before raw parameters were called so."""
    return {name.replace("raw_", ""): value for name, value in state.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("learnable", [True, False])
def test_effective_values_are_what_the_operator_takes(preset: PresetName, learnable: bool) -> None:
    gate = nn.LIFGate(5, preset=preset, learnable=learnable)
    scrambled(gate)
    x = torch.randn(4, 5)
    by_hand = ember_ext.lif_gate(x, gate.threshold, gate.leak, gate.steepness, norm=gate.norm)
    assert torch.equal(by_hand, gate(x))


@pytest.mark.parametrize("preset", PRESETS)
def test_effective_values_are_transforms_of_the_raw_ones(preset: PresetName) -> None:
    gate: Any = scrambled(nn.RefractoryParameters(4, preset=preset))
    raw = gate.raw_threshold
    assert torch.equal(gate.threshold, raw if preset == "text" else 0.1 * raw.abs())
    assert torch.equal(gate.leak, gate.raw_leak.sigmoid())
    assert torch.equal(gate.steepness, softplus(gate.raw_steepness))
    assert torch.equal(gate.within, softplus(gate.raw_within))
    assert torch.equal(gate.across, gate.raw_across.sigmoid())
    assert set(dict(gate.named_parameters())) == {f"raw_{name}" for name in gate._effective}
    for name in gate._effective:
        (gradient,) = torch.autograd.grad(getattr(gate, name).sum(), getattr(gate, f"raw_{name}"))
        assert bool((gradient != 0).all())


@every_owner
@pytest.mark.parametrize("value", [0.5, torch.ones(3), torch.nn.Parameter(torch.ones(3)), None])
def test_effective_values_cannot_be_set(owner: type[GateParameters], value: Any) -> None:
    gate = owner(3)  # type: ignore[call-arg]
    before = copy.deepcopy(gate.state_dict())
    for name in gate._effective:
        message = rf"nn\.{owner.__name__}: {name} is computed from raw_{name} and cannot be set"
        with pytest.raises(AttributeError, match=message):
            setattr(gate, name, value)
        with pytest.raises(AttributeError, match=message):
            gate.register_parameter(name, torch.nn.Parameter(torch.ones(3)))
        with pytest.raises(AttributeError):
            delattr(gate, name)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


@every_gated
@pytest.mark.parametrize("assign", [False, True])
def test_earlier_state_dicts_load(build: Callable[[], torch.nn.Module], assign: bool) -> None:
    source, target = scrambled(build()), build()
    state = earlier(source.state_dict())
    kept = dict(state)
    assert target.state_dict().keys() - state.keys(), "nothing was renamed"
    target.load_state_dict(state, strict=True, assign=assign)
    assert state == kept, "the caller's dict was changed"
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    assert [name for name, _ in target.named_parameters()] == [
        name for name, _ in source.named_parameters()
    ]


@every_gated
def test_earlier_pickles_load(build: Callable[[], torch.nn.Module]) -> None:
    """Else a property would find the raw values by its own name."""
    source = scrambled(build())
    old = copy.deepcopy(source)
    for module in old.modules():
        if isinstance(module, GateParameters):
            for tensors in (module._parameters, module._buffers):
                for name in list(tensors):
                    tensors[name.removeprefix("raw_")] = tensors.pop(name)
            module.preset = "seed"  # type: ignore[assignment]
    file = io.BytesIO()
    torch.save(old, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert list(loaded.state_dict()) == list(source.state_dict())
    for module, other in zip(loaded.modules(), source.modules(), strict=True):
        if isinstance(module, nn.LIFParameters):
            assert torch.equal(module.threshold, other.threshold)  # type: ignore[arg-type]
    assert all(torch.equal(loaded.state_dict()[n], v) for n, v in source.state_dict().items())


def test_earlier_pickles_have_another_name_for_looking_ahead() -> None:
    layer = nn.LIFSelfAttention(6, 2, refractory="look_ahead")
    old = copy.deepcopy(layer)
    old.refractory = "paper"  # type: ignore[assignment]
    loaded, x = pickle.loads(pickle.dumps(old)), torch.randn(1, 4, 6)
    assert loaded.refractory == "look_ahead"
    assert torch.equal(loaded(x), layer(x))


def test_a_state_dict_of_both_kinds_is_refused() -> None:
    gate = nn.LIFGate(3)
    state = gate.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"leak"'):
        gate.load_state_dict({**state, "leak": torch.zeros(3)})
    del state["raw_leak"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"raw_leak"'):
        gate.load_state_dict(state)
