"""`use_reference` and `decelerate`: the ways back from the kernels to plain PyTorch and ncps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import ncps.torch
import pytest
import torch
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ember_ext
from ember_ext import accelerate, decelerate, use_reference
from ember_ext.nn.accelerate import ACCELERATED
from ember_ext.testing import OPERATORS, Registered

every_operator = pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)


class Kernels(TorchDispatchMode):
    """Notes which of our compiled operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ember_ext":
            self.called.add(str(func))
        return func(*args, **(kwargs or {}))


def kernels_of(run: Callable[[], Any]) -> set[str]:
    """The compiled operators that `run` calls."""
    with Kernels() as kernels:
        run()
    return kernels.called


@every_operator
@pytest.mark.parametrize("wants_grad", [False, True])
def test_operators_run_their_definition(entry: Registered, wants_grad: bool) -> None:
    sample = next(iter(entry.samples(torch.float64)))
    tensors = {k: v.clone().requires_grad_(wants_grad) for k, v in sample.tensors.items()}

    def run() -> Any:
        return entry.operator(**tensors, **sample.options)

    has_kernels = hasattr(torch.ops.ember_ext, entry.name)
    assert bool(kernels_of(run)) == has_kernels
    with use_reference():
        assert not kernels_of(run)
        assert_close(run(), entry.reference(**tensors, **sample.options), rtol=0, atol=0)
    assert bool(kernels_of(run)) == has_kernels


MODULES: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: ember_ext.nn.LIFGate(6),
    "attention": lambda: ember_ext.nn.LIFSelfAttention(6, 2),
    "refractory": lambda: ember_ext.nn.LIFSelfAttention(6, 2, refractory="causal"),
    "dense cfc": lambda: ember_ext.nn.CfC(6, 5),
    "wired cfc": lambda: ember_ext.nn.CfC(6, AutoNCP(9, 2)),
    "mixed cfc": lambda: ember_ext.nn.CfC(6, 5, mixed_memory=True),
}
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


@every_module
@pytest.mark.parametrize("wants_grad", [False, True])
def test_modules_run_no_kernel(build: Callable[[], nn.Module], wants_grad: bool) -> None:
    module, x = build(), torch.randn(2, 3, 6)
    with torch.set_grad_enabled(wants_grad):
        expected = module(x)
        with use_reference():
            assert not kernels_of(lambda: module(x))
            assert_close(module(x), expected)
            if isinstance(module, ember_ext.nn.CfC):
                y, state = module.step(x[:, 0])
                assert not kernels_of(lambda: module.step(x[:, 0], state))
                assert_close(y, expected[0][:, 0])


def test_nests_decorates_and_ends_with_an_error() -> None:
    gate, x = ember_ext.nn.LIFGate(4), torch.randn(3, 4)

    @use_reference()
    def plain() -> set[str]:
        with use_reference():
            pass
        return kernels_of(lambda: gate(x))

    assert not plain()
    with pytest.raises(ZeroDivisionError), use_reference():
        _ = 1 / 0
    assert kernels_of(lambda: gate(x))


def test_second_derivatives() -> None:
    gate = ember_ext.nn.LIFGate(4).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with use_reference():
        assert torch.autograd.gradgradcheck(gate, (x,))


def test_compiled_functions_follow() -> None:
    torch._dynamo.reset()
    gate, x = ember_ext.nn.LIFGate(4), torch.randn(3, 4)
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    def run(x: Tensor) -> Tensor:
        return gate(x)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    expected = compiled(x)
    with use_reference():
        assert_close(compiled(x), expected)
    assert_close(compiled(x), expected)
    assert ["ember_ext" in graph for graph in graphs] == [True, False]

    def partly(x: Tensor) -> Tensor:
        with use_reference():
            y = gate(x)
        return y + gate(x)

    assert_close(torch.compile(partly, fullgraph=True, backend=backend)(x), 2 * expected)
    assert graphs[-1].count("ember_ext.lif_gate") == 1


@pytest.mark.parametrize("kind", ACCELERATED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("wired", [False, True], ids=["dense", "wired"])
def test_decelerate_undoes_accelerate(kind: type[nn.Module], mixed: bool, wired: bool) -> None:
    units = AutoNCP(9, 2) if wired else 5
    original = nn.ModuleDict({"rnn": kind(4, units, mixed_memory=mixed), "out": nn.Linear(4, 4)})
    model = copy.deepcopy(original)
    x = torch.randn(2, 3, 4)
    accelerate(model)
    with torch.no_grad():
        model["rnn"](x)  # lays the weights out
    rnn, parameters = model["rnn"], list(model.parameters())
    report = decelerate(model)
    assert report.replaced == ("rnn",)
    assert report.left == {}
    assert str(report) == f"rnn ({kind.__name__}): back to ncps"
    assert model["rnn"] is rnn
    assert type(rnn) is kind
    assert vars(rnn).keys() == vars(original["rnn"]).keys()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not kernels_of(lambda: rnn(x))
    for actual, expected in zip(rnn(x), original["rnn"](x), strict=True):
        assert_close(actual, expected, rtol=0, atol=0)
    assert b"ember_ext" not in pickle.dumps(model)
    assert decelerate(model).replaced == ()
    assert accelerate(model).replaced == ("rnn",)


def test_decelerate_takes_layers_that_were_built_here_and_leaves_subclasses() -> None:
    class Own(ember_ext.nn.CfC):
        pass

    model = nn.Sequential(ember_ext.nn.CfC(4, 5, chunk_size=2), Own(5, 3))
    x = torch.randn(2, 3, 4)
    expected = model[0](x)
    report = decelerate(model)
    assert report.replaced == ("0",)
    assert "Own is a subclass" in report.left["1"]
    assert type(model[0]) is ncps.torch.CfC
    assert_close(model[0](x), expected)
    accelerate(model)
    assert model[0].chunk_size == 2
    assert "ember_ext.nn.CfC" in str(decelerate(nn.Linear(2, 2)))
