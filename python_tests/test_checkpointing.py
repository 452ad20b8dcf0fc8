"""Activation checkpointing and offloading: the results are those without, wherever a module is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from modules import FEATURES, First, build, every_module, trainable
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from ember_ext import _native, ops
from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.testing import OPERATORS, Registered, Sample

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")

Function = Callable[..., Any]


def reentrant(function: Function, *tensors: Tensor) -> Any:
    return checkpoint(function, *tensors, use_reentrant=True)


def recommended(function: Function, *tensors: Tensor) -> Any:
    return checkpoint(function, *tensors, use_reentrant=False)


def nested(function: Function, *tensors: Tensor) -> Any:
    return recommended(functools.partial(recommended, function), *tensors)


def selective(function: Function, *tensors: Tensor) -> Any:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = op.namespace == "ember_ext"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *tensors, use_reentrant=False, context_fn=contexts)


def offloaded(function: Function, *tensors: Tensor) -> Any:
    with save_on_cpu():
        return function(*tensors)


WAYS = (reentrant, recommended, nested, selective, offloaded)
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def outputs_and_gradients(run: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    outputs = run(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([output.sin().sum() for output in outputs]).sum()
    leaves = [t for t in tensors if t.is_leaf and t.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    gradients = [leaf.grad for leaf in leaves]
    return [output.detach() for output in outputs] + [g for g in gradients if g is not None]


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected) > 1
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to the order in which autograd adds a tensor's gradients."""
    assert len(actual) == len(expected) > 1
    torch.testing.assert_close(actual, expected)


def samples(entry: Registered) -> list[Sample]:
    return [
        sample
        for sample in entry.samples(torch.float32)
        if all(0 < t.numel() < 3000 for t in sample.tensors.values())
    ][::3]


@every_way
@pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)
def test_operators(entry: Registered, way: Function) -> None:
    for sample in samples(entry):

        def call(*tensors: Tensor, sample: Sample = sample) -> Any:
            named = dict(zip(sample.tensors, tensors, strict=True))
            return entry.operator(**named, **sample.options)

        leaves = [t.detach().clone().requires_grad_() for t in sample.tensors.values()]
        expected = outputs_and_gradients(call, leaves)
        assert_same_bits(outputs_and_gradients(functools.partial(way, call), leaves), expected)


PLACES = ("alone", "first", "last", "middle")


def block(name: str, place: str, dropout: float) -> torch.nn.Sequential:
    module = build(name, dropout)
    before, after = (torch.nn.Linear(FEATURES, FEATURES) for _ in range(2))
    parts: dict[str, list[torch.nn.Module]] = {
        "alone": [module],
        "first": [module, after],
        "last": [before, module],
        "middle": [before, torch.nn.Tanh(), module, torch.nn.Tanh(), after],
    }
    return torch.nn.Sequential(*parts[place])


def module_results(model: torch.nn.Module, run: Function) -> list[Tensor]:
    x = torch.randn(3, 5, FEATURES, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.zero_grad()
    results = outputs_and_gradients(run, [x])
    return results + [p.grad for p in trainable(model).values() if p.grad is not None]


@every_way
@pytest.mark.parametrize("place", PLACES)
@every_module
def test_modules(name: str, place: str, way: Function) -> None:
    for dropout in (0.0, 0.3):
        model = block(name, place, dropout)
        expected = module_results(model, model)
        assert_same(module_results(model, functools.partial(way, model)), expected)


@every_module
def test_sequential_and_wrapped(name: str) -> None:
    blocks = [block(name, place, 0.3) for place in PLACES]
    model = torch.nn.Sequential(*blocks)
    expected = module_results(model, model)
    parts = functools.partial(checkpoint_sequential, model, 2, use_reentrant=False)
    assert_same(module_results(model, parts), expected)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, First))
    assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
    assert_same(module_results(model, model), expected)


@pytest.mark.parametrize("early_stop", [True, False])
@every_module
def test_with_and_without_early_stop(name: str, early_stop: bool) -> None:
    model = block(name, "middle", 0.3)
    expected = module_results(model, model)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        actual = module_results(model, functools.partial(recommended, model))
    assert_same(actual, expected)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    **{
        f"ember {condition} {mode}": lambda condition=condition, mode=mode: Ember(  # type: ignore[misc]
            EmberConfig(
                block_size=8,
                n_layer=2,
                n_embd=8,
                n_head=2,
                dropout=0.2,
                condition=condition,
                refractory_mode=mode,
                persistence_mode=mode,
            )
        )
        for condition, mode in (
            ("standard", "causal"),
            ("lif", "causal"),
            ("lif-fixed", "causal"),
            ("lif-refractory", "causal"),
            ("lif-refractory", "look_ahead"),
            ("qwen-gate", "causal"),
            ("lif-temporal", "causal"),
            ("lif-persistent", "causal"),
            ("lif-persistent", "look_ahead"),
            ("sigmoid", "causal"),
        )
    },
    "liquid ember": lambda: LiquidEmber(
        LiquidEmberConfig(
            block_size=8, n_layer=2, n_embd=8, cfc_units=12, dropout=0.2, condition="lif"
        )
    ),
}


@pytest.mark.parametrize("way", ["whole", "blocks", "reentrant blocks", "offloaded"])
@pytest.mark.parametrize("name", list(MODELS))
def test_models(name: str, way: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    idx = torch.randint(65, (2, 7))

    def loss() -> Tensor:
        return model(idx, idx)[1]  # type: ignore[no-any-return]

    def results(loss: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        value = loss()
        value.backward()
        gradients = [p.grad for p in trainable(model).values() if p.grad is not None]
        return [value.detach(), *gradients]

    expected = results(loss)
    context: Any = save_on_cpu() if way == "offloaded" else nullcontext()
    run: Callable[[], Any] = loss
    if way == "whole":
        run = functools.partial(recommended, loss)
    elif way != "offloaded":
        through = reentrant if way == "reentrant blocks" else recommended
        for part in model.blocks:  # type: ignore[union-attr]
            part.forward = functools.partial(through, part.forward)  # type: ignore[union-attr,operator]
    with context:
        actual = results(run)
    assert_same(actual, expected)


@needs_kernels
def test_selective_checkpointing_keeps_the_operators_results() -> None:
    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "ember_ext":
                calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    for name in ("gate", "attention", "refractory causal", "dense cfc"):
        model = block(name, "middle", 0.0)
        with Count():
            module_results(model, functools.partial(selective, model))
        assert len(calls) == 2, calls
        calls.clear()


@every_module
def test_what_a_hook_raises_comes_through(name: str) -> None:
    model = block(name, "middle", 0.3)
    x = torch.randn(3, 5, FEATURES)
    for error in (KeyError, ValueError, RuntimeError, AttributeError, MemoryError):
        for last in range(100):
            raised, seen = error("from the hook"), 0

            def pack(tensor: Tensor, last: int = last, raised: Exception = raised) -> Tensor:
                nonlocal seen
                seen += 1
                if seen > last:
                    raise raised
                return tensor

            caught = None
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                try:
                    model(x)
                except error as other:
                    caught = other
            if caught is None:
                break
            assert caught is raised
            # Nobody goes on to save after that.
            assert seen == last + 1
        assert last > 1


@needs_kernels
@pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)
def test_saved_tensors_are_unpacked_once(entry: Registered) -> None:
    for sample in samples(entry)[:2]:
        unpacked: list[int] = []
        packed = 0

        def pack(tensor: Tensor) -> tuple[int, Tensor]:
            nonlocal packed
            packed += 1
            return packed, tensor

        def unpack(pair: tuple[int, Tensor], unpacked: list[int] = unpacked) -> Tensor:
            unpacked.append(pair[0])
            return pair[1]

        leaves = {name: t.detach().clone().requires_grad_() for name, t in sample.tensors.items()}
        with saved_tensors_hooks(pack, unpack):
            outputs = entry.operator(**leaves, **sample.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(
            [out.sum() for out in outputs], list(leaves.values()), allow_unused=True
        )
        assert unpacked
        assert len(set(unpacked)) == len(unpacked)


@needs_kernels
@pytest.mark.parametrize("name", ["gate", "attention", "refractory look-ahead", "dense cfc", "mlp"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model = block(name, "middle", 0.0)
    expected = module_results(model, model)

    def run(x: Tensor) -> Tensor:
        return recommended(model, x) + recommended(model, x)  # type: ignore[no-any-return]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(module_results(model, compiled), module_results(model, run))
    inner = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        module_results(model, functools.partial(recommended, inner)), expected
    )


def test_bad_values_are_still_put_into_words() -> None:
    x, gate = torch.randn(2, 3, requires_grad=True), torch.tensor([0.5, 0.5, float("nan")])
    with pytest.raises(ValueError, match="threshold must be finite, got nan at index 2"):
        recommended(lambda x: ops.lif_gate(x, gate, gate.abs(), gate.abs()), x)
