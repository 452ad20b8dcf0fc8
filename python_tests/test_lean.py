"""The layers that keep less than PyTorch's: equal results, and what they keep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.models._base import MLP
from ember_ext.nn._lean import Dropout, gelu_linear


def plain(u: Tensor, linear: nn.Linear) -> Tensor:
    return linear(F.gelu(u))  # type: ignore[no-any-return]


def results(function: Callable[..., Tensor], u: Tensor, linear: nn.Linear) -> list[Tensor]:
    """The output and the gradients of u and the parameters."""
    torch.manual_seed(1)
    u = u.detach().requires_grad_()
    y = function(u, linear)
    return [y, *torch.autograd.grad(y, [u, *linear.parameters()], torch.randn_like(y))]


def kept_bytes(call: Callable[[], object], *known: Tensor) -> int:
    """What autograd keeps of a call, beyond `known`."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert output is not None
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (1, 1, 1, 7), (0, 7)])
def test_gelu_linear_matches_its_two_operations(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(7, 3, bias=bias, dtype=torch.float64)
    u = torch.randn(shape, dtype=torch.float64)
    assert_close(results(gelu_linear, u, linear), results(plain, u, linear), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_gelu_linear_takes_non_contiguous_input(layout: str) -> None:
    linear = nn.Linear(6, 4, dtype=torch.float64)
    u = {
        "transposed": torch.randn(6, 5, 3, dtype=torch.float64).transpose(0, 2),
        "strided": torch.randn(3, 5, 12, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(1, 5, 6, dtype=torch.float64).expand(3, 5, 6),
    }[layout]
    assert not u.is_contiguous()
    assert_close(results(gelu_linear, u, linear), results(plain, u, linear), rtol=1e-12, atol=1e-12)


def test_gelu_linear_s_gradients() -> None:
    linear = nn.Linear(4, 3, dtype=torch.float64)
    u = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = (u, *linear.parameters())
    torch.autograd.gradcheck(lambda *_: gelu_linear(u, linear), inputs)
    torch.autograd.gradgradcheck(lambda *_: gelu_linear(u, linear), inputs)


def test_gelu_linear_computes_only_the_gradients_asked_for() -> None:
    linear = nn.Linear(4, 3)
    linear.weight.requires_grad_(False)
    u = torch.randn(2, 4)
    gelu_linear(u, linear).sum().backward()
    assert linear.weight.grad is None
    assert torch.equal(linear.bias.grad, torch.full((3,), 2.0))
    assert not gelu_linear(u, linear.requires_grad_(False)).requires_grad


def test_gelu_linear_under_autocast() -> None:
    linear, before = nn.Linear(16, 8), nn.Linear(12, 16)
    x = torch.randn(5, 12)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            y = function(before(x), linear)
        parameters = [*before.parameters(), *linear.parameters()]
        return y, *torch.autograd.grad(y.float().square().sum(), parameters)

    assert_close(run(gelu_linear), run(plain), rtol=2e-2, atol=2e-2)


def test_gelu_linear_compiles_and_transforms() -> None:
    linear = nn.Linear(4, 3)
    u = torch.randn(5, 4)
    compiled = torch.compile(gelu_linear, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, u, linear), results(plain, u, linear))
    got, expected = (
        torch.func.grad(lambda u, function=function: function(u, linear).sum())(u)
        for function in (gelu_linear, plain)
    )
    assert_close(got, expected)


def test_gelu_linear_keeps_its_input_only() -> None:
    linear = nn.Linear(64, 16)
    u = torch.randn(100, 64, requires_grad=True)
    known = (u, *linear.parameters())
    assert kept_bytes(lambda: plain(u, linear), *known) == 4 * u.numel()
    assert kept_bytes(lambda: gelu_linear(u, linear), *known) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_equals_pytorch_s(dtype: torch.dtype) -> None:
    def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
        torch.manual_seed(2)
        y = layer(x)
        return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    x = torch.randn(7, 100, dtype=dtype, requires_grad=True)
    for p in (0.1, 0.5, 1.0):
        assert_close(run(Dropout(p), x), run(nn.Dropout(p), x), rtol=0, atol=0)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x


def test_dropout_keeps_a_byte_an_element() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert kept_bytes(functools.partial(nn.Dropout(0.1), x), x) == 4 * x.numel()
    assert kept_bytes(functools.partial(Dropout(0.1), x), x) == x.numel()


def test_gelu_linear_calls_a_linear_that_does_more() -> None:
    linear, u, calls = nn.Linear(7, 3), torch.randn(5, 7), []
    handle = linear.register_forward_hook(lambda *_: calls.append("forward"))
    linear.register_full_backward_hook(lambda *_: calls.append("backward"))
    gelu_linear(u.requires_grad_(), linear).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    linear = prune.l1_unstructured(nn.Linear(7, 3), "weight", 0.5)
    for _ in range(2):  # the second step needs the mask to be applied anew
        assert_close(results(gelu_linear, u, linear), results(plain, u, linear))
        with torch.no_grad():
            linear.weight_orig.mul_(0.5)
    linear = nn.Linear(7, 3)
    linear.forward = lambda x: 2 * F.linear(x, linear.weight)  # type: ignore[method-assign]
    assert_close(gelu_linear(u, linear), plain(u, linear))
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(7, 3))
    assert_close(results(gelu_linear, u, linear), results(plain, u, linear))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "model",
    [
        Ember(EmberConfig(block_size=8, n_layer=1, n_embd=16, n_head=2)),
        LiquidEmber(LiquidEmberConfig(block_size=8, n_layer=1, n_embd=16, cfc_units=24)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_mlps_can_be_quantised(model: nn.Module) -> None:
    model.eval()
    idx = torch.randint(65, (2, 8))
    # ncps' own wired cells multiply their weights by a mask, which quantised weights cannot be.
    mlp = {
        f"{name}.{part}"
        for name, m in model.named_modules()
        if isinstance(m, MLP)
        for part in ("c_fc", "c_proj")
    }
    spec = dict.fromkeys(mlp, torch.ao.quantization.default_dynamic_qconfig)
    quantised = torch.ao.quantization.quantize_dynamic(model, spec)
    assert type(quantised) is type(model)
    with torch.no_grad():
        logits, quantised_logits = model(idx)[0], quantised(idx)[0]
    assert not torch.equal(logits, quantised_logits)
    assert_close(quantised_logits, logits, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_linear_under_autocast_takes_any_dtype(dtype: torch.dtype) -> None:
    linear = nn.Linear(16, 8)
    u = torch.randn(5, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = results(gelu_linear, u, linear), results(plain, u, linear)
    assert_close(actual, expected, rtol=2e-2, atol=2e-2)
