"""`torch.compile` where floats and shapes are symbols: as one graph, for every operator and module.

A float that goes into an operator as such is compiled for each value, as with PyTorch's attention;
one that tensors are multiplied by stays a symbol.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import FEATURES, MODULES, build, every_module, trainable
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from ember_ext import _native, nn, ops
from ember_ext.models import Ember, EmberConfig

pytestmark = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")

either = pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])

GATE = [torch.full((2,), value) for value in (0.1, 0.5, 2.0)]
COUPLINGS = [torch.full((2,), 0.3)] * 2
SEED = torch.tensor(7)


def heads(query: Tensor) -> Tensor:
    return query.unflatten(2, (2, 3)).transpose(1, 2)


def attention(x: Tensor, **floats: float) -> Tensor:
    q = heads(x)
    return ops.lif_attention(q, q, q, *GATE, is_causal=True, seed=SEED, **floats)


def refractory(mode: Any, x: Tensor, **floats: float) -> Tensor:
    q = heads(x)
    options: dict[str, Any] = {"is_causal": True, "mode": mode, "seed": SEED}
    return ops.refractory_lif_attention(q, q, q, *GATE, *COUPLINGS, **options, **floats)[0]


def gate(x: Tensor, **floats: float) -> Tensor:
    return ops.lif_gate(x, *GATE, norm="l2", unit_dim=0, **floats)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "lif_gate": gate,
    "lif_attention": attention,
    "causal": functools.partial(refractory, "causal"),
    "look_ahead": functools.partial(refractory, "look_ahead"),
}

FLOATS = [
    (name, argument)
    for name in OPERATORS
    for argument in (("eps",) if name == "lif_gate" else ("eps", "scale", "dropout_p"))
]


def results(run: Callable[..., Tensor], module: torch.nn.Module | None, value: Any) -> list[Tensor]:
    x = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(1)
    y = run(x, value)
    leaves = [x, *(trainable(module).values() if module else ())]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves, materialize_grads=True)]


def assert_compiles(
    run: Callable[..., Tensor],
    values: list[Any],
    dynamic: bool | None,
    module: torch.nn.Module | None = None,
) -> int:
    """Compare results and gradients with eager mode; how many graphs that took."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for value in values:
        assert_close(results(compiled, module, value), results(run, module, value))
    return int(counter.frame_count)


@either
@pytest.mark.parametrize(("name", "argument"), FLOATS)
def test_floats_of_operators(name: str, argument: str, dynamic: bool | None) -> None:
    operator = OPERATORS[name]
    assert_compiles(lambda x, v: operator(x, **{argument: v}), [0.5, 0.6, 0.7], dynamic)


@either
@pytest.mark.parametrize("name", ["dense cfc", "pure cfc", "ltc"])
def test_time_spans(name: str, dynamic: bool | None) -> None:
    module: Any = MODULES[name](0.0)

    def run(x: Tensor, span: float) -> Tensor:
        return module(x, None, span)[0]  # type: ignore[no-any-return]

    graphs = assert_compiles(run, [0.5, 0.7, 0.9], dynamic, module)
    assert graphs <= 2


@either
def test_time_spans_of_cfc_scan_as_any_number(dynamic: bool | None) -> None:
    weights = ops.CfCWeights(*[ops.Affine(torch.randn(4, 4 + FEATURES), torch.zeros(4))] * 4)

    def run(x: Tensor, span: Any) -> Tensor:
        return ops.cfc_scan(x, weights, timespans=span)[0]

    assert assert_compiles(run, [1, 2, 3], dynamic) <= 3
    assert assert_compiles(run, [torch.tensor(0.5), torch.tensor(2.0)], dynamic) == 1


def test_time_spans_of_a_network_that_steps() -> None:
    module = nn.CfC(FEATURES, 4, mixed_memory=True)

    def run(x: Tensor, span: float) -> Tensor:
        y, state = module(x[:, :2], None, span)
        return module.step(x[:, 0], state, span)[0] + y.sum(1)

    assert_compiles(run, [0.5, 0.7, 0.9], True, module)


@pytest.mark.parametrize("name", [name for name in MODULES if "mixed" not in name])
def test_shapes(name: str) -> None:
    torch._dynamo.reset()
    module = build(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    parameters = list(trainable(module).values())
    graphs = []
    for batch, steps in ((3, 5), (7, 130)):
        x = torch.randn(batch, steps, FEATURES)
        y, expected = compiled(x), module(x)
        assert_close(y, expected)
        if parameters:
            assert_close(
                torch.autograd.grad(y.sum(), parameters, materialize_grads=True),
                torch.autograd.grad(expected.sum(), parameters, materialize_grads=True),
                rtol=1e-4,
                atol=1e-4,
            )
        graphs.append(counter.frame_count)
    # With `dynamic=True` a float that a module looks at, such as a dropout's rate, is a symbol at
    # first, and PyTorch calls the backend again when it became a constant.
    assert graphs[0] == graphs[1] <= 2


@pytest.mark.parametrize("argument", ["eps", "scale", "dropout_p"])
def test_bad_floats_are_named(argument: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, v: attention(x, **{argument: v}), fullgraph=True, dynamic=True, backend="eager"
    )
    x = torch.randn(2, 5, FEATURES)
    compiled(x, 0.5)
    for value in (float("inf"), float("nan")):
        with pytest.raises(Exception, match=f"{argument} must be"):
            compiled(x, value)


@every_module
def test_fake_tensors(name: str) -> None:
    """Nobody looks at the values of tensors that have none."""
    if name.endswith("ltc"):
        pytest.skip("which synapses there are is for its masks' values to say")
    module = build(name)
    y = module(torch.randn(2, 5, FEATURES))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = module(torch.randn(2, 5, FEATURES, requires_grad=True))
        fake.sum().backward()
    assert fake.shape == y.shape
    assert fake.dtype == y.dtype


def test_fake_time_spans_lengths_and_tokens() -> None:
    network = nn.CfC(FEATURES, 4, backbone_units=5)
    model = Ember(EmberConfig(block_size=8, n_layer=1, n_embd=8, n_head=2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, spans = torch.randn(2, 5, FEATURES), torch.rand(2, 5)
        lengths = torch.tensor([5, 2])
        assert network(x, None, spans, lengths=lengths)[0].shape == (2, 5, 4)
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        assert model(tokens, tokens)[0].shape == (2, 5, 65)
