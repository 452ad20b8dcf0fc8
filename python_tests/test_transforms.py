"""Forward-mode AD and `torch.func`: operators and modules do what the references do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ncps.wirings import AutoNCP
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vmap
from torch.testing import assert_close

from ember_ext import _native, nn
from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.models._base import MLP
from ember_ext.testing import OPERATORS, Registered, Sample

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.func transform is active:UserWarning",
    # `linearize` itself.
    "ignore:.*torch.jit.script. is deprecated:DeprecationWarning",
    "ignore:Attempted to insert a get_attr Node:UserWarning",
)

every_operator = pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)

Function = Callable[..., tuple[Tensor, ...]]


def cases(entry: Registered) -> list[Sample]:
    """Two samples in fp64, of unlike options."""
    samples = [
        sample
        for sample in entry.samples(torch.float64)
        if all(0 < t.numel() < 1000 and t.is_contiguous() for t in sample.tensors.values())
    ]
    return [samples[0], samples[-1]]


def functions(entry: Registered, sample: Sample) -> tuple[Function, Function, tuple[Tensor, ...]]:
    """The operator and its reference as functions of the sample's tensors, and these."""

    def bind(operator: Callable[..., Any]) -> Function:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(sample.tensors, tensors, strict=True))
            outputs = operator(**named, **sample.options)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return call

    return bind(entry.operator), bind(entry.reference), tuple(sample.tensors.values())


def gradients(function: Function, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The gradients of the outputs' sum of squares in all tensors, by `torch.func`."""

    def loss(*tensors: Tensor) -> Tensor:
        return torch.stack([out.square().sum() for out in function(*tensors)]).sum()

    return grad(loss, tuple(range(len(tensors))))


@every_operator
def test_operators_under_transforms(entry: Registered) -> None:
    for sample in cases(entry):
        operator, definition, tensors = functions(entry, sample)
        tangents = tuple(map(torch.ones_like, tensors))
        outputs, expected = jvp(definition, tensors, tangents)
        assert expected[0].abs().max() > 0
        assert_close(jvp(operator, tensors, tangents), (outputs, expected))
        assert_close(linearize(operator, *tensors)[1](*tangents), expected)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, tensors, tangents)
            assert_close([forward_ad.unpack_dual(o).tangent for o in operator(*duals)], [*expected])
        slopes = gradients(definition, tensors)(*tensors)
        assert_close(gradients(operator, tensors)(*tensors), slopes)
        twice = tuple(torch.stack([t, t]) for t in tensors)
        for batched, single in (
            (vmap(operator)(*twice), outputs),
            (vmap(gradients(operator, tensors))(*twice), slopes),
        ):
            assert_close(batched, tuple(torch.stack([t, t]) for t in single))


@every_operator
def test_forward_and_reverse_jacobians_agree(entry: Registered) -> None:
    operator, _, tensors = functions(entry, cases(entry)[-1])

    def some(x: Tensor) -> Tensor:
        return operator(x, *tensors[1:])[0].flatten()[-5:]

    forward = jacfwd(some)(tensors[0])
    assert forward.abs().max() > 0
    assert_close(forward, jacrev(some)(tensors[0]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LIFGate(6),
        lambda: nn.LIFSelfAttention(6, 2),
        lambda: nn.LIFSelfAttention(6, 2, refractory="causal"),
        lambda: nn.CfC(6, 5, backbone_units=7),
        lambda: nn.CfC(6, AutoNCP(9, 2)),
        lambda: nn.CfC(6, 5, mixed_memory=True),
        lambda: MLP(6, 0.0, True),
    ],
    ids=["gate", "attention", "refractory", "dense cfc", "wired cfc", "mixed cfc", "mlp"],
)
def test_modules_under_transforms(build: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module = build().double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        run(x)  # a CfC lays its weights out here
        tangent, step = torch.randn_like(x), 1e-5
        slope = (run(x + step * tangent) - run(x - step * tangent)) / (2 * step)
        y, actual = jvp(run, (x,), (tangent,))
    assert_close(actual, slope, rtol=1e-6, atol=1e-8)
    assert_close(y, run(x))

    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        y = functional_call(module, parameters, (row[None],))
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    per_row = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, row in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        assert_close([per_row[name][index] for name in parameters], list(expected))


@pytest.mark.parametrize(
    "model",
    [
        Ember(EmberConfig(block_size=8, n_layer=1, n_embd=8, n_head=2, dropout=0.0)),
        LiquidEmber(
            LiquidEmberConfig(block_size=8, n_layer=1, n_embd=8, cfc_units=12, dropout=0.0)
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_gradients_row_by_row(model: Ember | LiquidEmber) -> None:
    model.double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    idx = torch.randint(65, (3, 6))

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        _, loss, _ = functional_call(model, parameters, (row[None], row[None]))
        return loss  # type: ignore[no-any-return]

    per_row = vmap(grad(loss), in_dims=(None, 0))(parameters, idx)
    for index, row in enumerate(idx):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        assert_close([per_row[name][index] for name in parameters], list(expected))


def test_compiled_transforms() -> None:
    torch._dynamo.reset()
    gate, x = nn.LIFGate(5), torch.randn(3, 5)

    def tangent(x: Tensor) -> Tensor:
        return jvp(gate, (x,), (torch.ones_like(x),))[1]

    expected = tangent(x)
    assert expected.abs().max() > 0
    assert_close(torch.compile(tangent, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.filterwarnings("default")
def test_the_detour_is_announced_once() -> None:
    _native._warn.cache_clear()
    gate, x = nn.LIFGate(5), torch.randn(3, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            jvp(gate, (x,), (x,))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert messages[0].startswith("ember_ext: forward-mode AD or a torch.func transform is active")
