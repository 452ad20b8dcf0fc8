"""The LIF gate's CUDA kernels: run on the CPU by the shim, and on a GPU with `pytest -m cuda`."""

from __future__ import annotations

import itertools
from typing import Any

import cuda_shim
import pytest
import torch
from torch import Tensor

from ember_ext import reference
from ember_ext.testing import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORMS = (None, "l1", "l2")


class Shim:
    """The raw operators, on the shim."""

    forward = staticmethod(cuda_shim.lif_gate_forward)
    backward = staticmethod(cuda_shim.lif_gate_backward)


class Gpu:
    """The raw operators, on a GPU."""

    @staticmethod
    def _run(name: str, *arguments: Any) -> Any:
        operator = getattr(torch.ops.ember_ext, name)
        return operator(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))

    @classmethod
    def forward(cls, *arguments: Any) -> Tensor:
        result: Tensor = cls._run("lif_gate_forward", *arguments)
        return result.cpu()

    @classmethod
    def backward(cls, *arguments: Any) -> tuple[Tensor, Tensor]:
        grad_x, grad_parameters = cls._run("lif_gate_backward", *arguments)
        return grad_x.cpu(), grad_parameters.cpu()


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return Gpu
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    return Shim


def sample(shape: tuple[int, ...], dtype: torch.dtype, unit_dim: int) -> list[Tensor]:
    """x, threshold, leak, steepness, grad_y."""
    generator = torch.Generator().manual_seed(sum(shape))
    compute = torch.promote_types(dtype, torch.float32)
    units = shape[unit_dim]

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(units, dtype=compute).uniform_(low, high, generator=generator)

    x, grad_y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [x, uniform(0.0, 1.0), uniform(0.1, 0.9), uniform(1.0, 6.0), grad_y]


def expected(
    x: Tensor,
    gate: list[Tensor],
    grad_y: Tensor,
    norm: str | None,
    unit_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """y, grad_x and grad_parameters by the reference in `dtype`."""
    compute = torch.promote_types(dtype, torch.float32)
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    parameters = [
        p.to(dtype if dtype == torch.float64 else compute, copy=True).requires_grad_() for p in gate
    ]
    y = reference.lif_gate(leaf, *parameters, norm=norm, unit_dim=unit_dim, eps=eps)
    gradients = torch.autograd.grad(y, [leaf, *parameters], grad_y.to(dtype))
    return [y.detach(), gradients[0], torch.stack(gradients[1:])]


def check(
    device: Any, inputs: list[Tensor], norm: str | None, unit_dim: int = -1, eps: float = 1e-8
) -> None:
    x, *gate, grad_y = inputs
    code = NORMS.index(norm)
    y = device.forward(x, *gate, code, unit_dim, eps)
    grad_x, grad_parameters = device.backward(grad_y, x, *gate, code, unit_dim, eps, True)
    eager = expected(x, gate, grad_y, norm, unit_dim, eps, x.dtype)
    exact = expected(x, gate, grad_y, norm, unit_dim, eps, torch.float64)
    names = ("y", "grad_x", "grad_parameters")
    for name, *values in zip(names, (y, grad_x, grad_parameters), eager, exact, strict=True):
        if norm and x.shape[-1] == 1 and name == "grad_parameters":
            continue  # y is x then, and these gradients are the rounding errors of 0
        # fp64 is compared with fp64: the reference's sums are then no better than the kernel's.
        assert_close(name, *values, floor_ulps=32 if x.dtype == torch.float64 else 4)
    without, nothing = device.backward(grad_y, x, *gate, code, unit_dim, eps, False)
    assert torch.equal(without, grad_x)
    assert nothing.shape[0] == 0


# Rows of less than a pack, of one thread, of part of a warp, of several warps; with and without
# whole packs; fewer and more rows than a block has teams.
SHAPES = ((1, 1), (300, 1), (3, 5), (7, 16), (41, 33), (2, 3, 132), (5, 515))


@pytest.mark.parametrize(("norm", "dtype"), list(itertools.product(NORMS, DTYPES)))
def test_column_units(device: Any, norm: str | None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(device, sample(shape, dtype, -1), norm)


@pytest.mark.parametrize(("norm", "dtype"), list(itertools.product(NORMS, DTYPES)))
def test_row_units(device: Any, norm: str | None, dtype: torch.dtype) -> None:
    for shape, unit_dim in (((3, 4, 2, 5), 1), ((2, 3, 40), 0), ((2, 5, 131), 1)):
        check(device, sample(shape, dtype, unit_dim), norm, unit_dim)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_longer_than_a_team_holds(device: Any, norm: str | None) -> None:
    check(device, sample((3, 2101), torch.float32, -1), norm)
    check(device, sample((2, 2, 4100), torch.float32, 1), norm, 1)


def test_many_rows_to_a_team(device: Any) -> None:
    """More rows than 512 blocks take at once."""
    check(device, sample((2200, 260), torch.float32, -1), "l2")


@pytest.mark.parametrize("norm", NORMS)
def test_extreme_rows(device: Any, norm: str | None) -> None:
    """Rows of zeros, of squares that overflow and underflow; a norm keeps all of them finite."""
    for dtype, huge in ((torch.float32, 1e30), (torch.float64, 1e300), (torch.float16, 6e4)):
        for columns in (16, 515):
            x, *rest = sample((6, columns), dtype, -1)
            x[1] = 0
            x[2] *= huge / x[2].abs().max()
            x[3] /= huge
            x[4, 0] = huge
            check(device, [x, *rest], norm)
            x[5] /= huge
            check(device, [x, *rest], norm, eps=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(device: Any, norm: str | None, value: float) -> None:
    for columns in (16, 260):
        x, *gate, grad_y = sample((5, columns), torch.float32, -1)
        code = NORMS.index(norm)
        clean = device.forward(x, *gate, code, -1, 1e-8)
        clean_grad = device.backward(grad_y, x, *gate, code, -1, 1e-8, False)[0]
        x[2, 3] = value
        y = device.forward(x, *gate, code, -1, 1e-8)
        grad = device.backward(grad_y, x, *gate, code, -1, 1e-8, False)[0]
        others = torch.arange(5) != 2
        assert torch.equal(y[others], clean[others])
        assert torch.equal(grad[others], clean_grad[others])
        assert not y[2, 3].isfinite()
        if norm:
            assert y[2].isnan().any()


def test_gate_far_from_its_threshold(device: Any) -> None:
    """Steep gates: exp(k (theta - |x|)) is far outside fp32 on either side."""
    x, threshold, leak, steepness, grad_y = sample((4, 16), torch.float32, -1)
    check(device, [x, threshold, leak, steepness * 1000, grad_y], None)
    check(device, [x, threshold + 200, leak, steepness, grad_y], "l2")


def test_every_kernel_ran() -> None:
    """Every instance that the launchers can reach was run above, with a valid configuration."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    shim = cuda_shim.operators()
    launched = {launch.kernel for launch in shim.launches()}
    assert {k for k in shim.kernels() if "lif_gate" in k} == {k for k in launched if "gate" in k}
    # The least of the supported GPUs, sm_75, has 1024 threads and 64 KiB of shared memory a block.
    for launch in shim.launches():
        assert launch.threads % 32 == 0
        assert launch.threads <= 1024
        assert launch.shared_bytes <= 48 * 1024
