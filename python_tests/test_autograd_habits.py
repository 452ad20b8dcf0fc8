"""What people do with autograd besides: anomalies, hooks, accumulation, and graphs used twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from modules import FEATURES, MODULES, build, every_module, trainable
from torch import Tensor
from torch.testing import assert_close

from ember_ext import ops
from ember_ext.testing import OPERATORS, Registered, Sample

pytestmark = pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled:UserWarning",
    "ignore:.*no compiled kernels for meta tensors:UserWarning",
)

every_operator = pytest.mark.parametrize("entry", OPERATORS, ids=lambda entry: entry.name)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def sample_of(entry: Registered) -> Sample:
    return next(
        sample
        for sample in entry.samples(torch.float32)
        if all(0 < t.numel() < 3000 and t.shape[-1] > 1 for t in sample.tensors.values())
    )


def loss(entry: Registered, tensors: dict[str, Tensor], sample: Sample) -> Tensor:
    outputs = entry.operator(**tensors, **sample.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([output.sin().sum() for output in outputs]).sum()


@every_operator
def test_graphs_used_twice_and_accumulation(entry: Registered) -> None:
    sample = sample_of(entry)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in sample.tensors.items()}
    value = loss(entry, leaves, sample)
    value.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves.values() if leaf.grad is not None]
    value.backward()
    assert len(first) == len(leaves)
    for leaf, gradient in zip(leaves.values(), first, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.usefixtures("deterministic")
@every_operator
def test_anomaly_mode_and_deterministic_algorithms(entry: Registered) -> None:
    sample = sample_of(entry)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in sample.tensors.items()}
    with torch.autograd.detect_anomaly():
        gradients = torch.autograd.grad(loss(entry, leaves, sample), list(leaves.values()))
    assert all(bool(g.isfinite().all()) for g in gradients)


@every_operator
def test_hooks_on_tensors_and_inference_tensors(entry: Registered) -> None:
    sample = sample_of(entry)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in sample.tensors.items()}
    expected = torch.autograd.grad(loss(entry, leaves, sample), list(leaves.values()))
    inner = {name: leaf * 1 for name, leaf in leaves.items()}
    for tensor in inner.values():
        tensor.register_hook(lambda gradient: 2 * gradient)
    doubled = torch.autograd.grad(loss(entry, inner, sample), list(leaves.values()))
    for a, b in zip(doubled, expected, strict=True):
        assert torch.equal(a, 2 * b)
    with torch.inference_mode():
        inside = loss(entry, sample.tensors, sample)
        made = {name: t.clone() for name, t in sample.tensors.items()}
    # Made in inference mode, used outside of it, with and without gradients.
    with torch.no_grad():
        assert torch.equal(loss(entry, made, sample), inside)
    assert torch.equal(loss(entry, made, sample), inside)


@every_module
def test_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        module = build(name)
        y = module(torch.randn(2, 5, FEATURES))
        assert y.is_meta
        assert y.shape == (2, 5, FEATURES)
        if trainable(module):
            y.sum().backward()
        assert all(p.is_meta for p in module.parameters())


def test_a_default_device_is_for_new_tensors_only() -> None:
    """Operators make theirs where their arguments are."""
    gate = [torch.full((2,), value) for value in (0.1, 0.5, 2.0)]
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    network, x = MODULES["dense cfc"](0.0), torch.randn(2, 5, FEATURES)
    expected = ops.lif_attention(query, query, query, *gate, is_causal=True), network(x)[0]
    with torch.device("meta"):
        actual = ops.lif_attention(query, query, query, *gate, is_causal=True), network(x)[0]
        (slope,) = torch.autograd.grad(actual[0].sin().sum(), query)
    assert slope.device.type == "cpu"
    assert_close(actual, expected)
