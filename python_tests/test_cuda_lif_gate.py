"""The LIF gate's CUDA kernels: run on the CPU by the shim, and on a GPU with `pytest -m cuda`."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import cuda_shim
import cuda_shim.lif_gate
import pytest
import torch
from torch import Tensor

import ember_ext
import kernel_costs
from ember_ext import reference
from ember_ext.testing import DTYPES, Sample, check_sample, gate_samples
from ember_ext.testing.lif_gate import gate_parameters

operator = cuda_shim.operator_fixture(cuda_shim.lif_gate.lif_gate, ember_ext.lif_gate)

NORMS = (None, "l1", "l2")


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Sample:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    units = gate_parameters(shape[options.get("unit_dim", -1)], generator)
    scale = 1.0 if shape[-1] == 1 else 0.0
    return Sample(f"{list(shape)} {options}", {"x": x, **units}, options, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(operator: Any, dtype: torch.dtype) -> None:
    for one in gate_samples(dtype):
        if one.tensors["x"].numel():
            check_sample(operator, reference.lif_gate, one)


# Rows of less than a pack, of part of a warp, of several warps and of more than a team holds; with
# whole packs, which gate_samples() has few of; fewer and more rows than a block has teams, and than
# its threads take at once.
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_of_team(operator: Any, dtype: torch.dtype, norm: str | None) -> None:
    for shape, unit_dim in (
        ((300, 1), -1),
        ((41, 16), -1),
        ((70, 132), -1),
        ((5, 516), -1),
        ((2, 2100), -1),
        ((2, 2, 2100), 1),
        ((2, 3, 40), 0),
    ):
        check_sample(
            operator, reference.lif_gate, sample(shape, dtype, norm=norm, unit_dim=unit_dim)
        )


# Rows of whole vectors also of 16-bit types: fewer lanes than a warp has, warps that are no power
# of two, more columns than backward holds in fp32, and as many as it holds at most.
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_in_registers(operator: Any, dtype: torch.dtype, norm: str) -> None:
    for shape in ((70, 24), (3, 776), (2, 2056), (1, 4096)):
        check_sample(operator, reference.lif_gate, sample(shape, dtype, norm=norm))


@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.float64, 260), (torch.bfloat16, 264)], ids=str
)
def test_many_rows_to_a_team(operator: Any, dtype: torch.dtype, columns: int) -> None:
    """More rows than 1024 blocks take at once."""
    check_sample(operator, reference.lif_gate, sample((2060, columns), dtype, norm="l2"))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_sum_takes_in_more_than_32_rows(dtype: torch.dtype, norm: str) -> None:
    """32 equal terms, one after the other, err by up to 4 epsilon in fp32, and 64 by up to 8."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    rows = 1 << 22
    for columns in (1024, 2048, 4096):  # a row takes a block
        x = torch.empty(1, dtype=dtype).expand(rows, columns)
        sums = cuda_shim.lif_gate.partial_sums(x, norm) // (3 * columns)
        assert sums >= rows // 32


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [("double", [torch.float64]), ("float", [torch.float32, torch.bfloat16, torch.float16])],
)
def test_the_report_s_launch_adds_up_as_many_sums(kind: str, dtypes: list[torch.dtype]) -> None:
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    kernel = f"lif_gate_sum_kernel<{kind}>"
    workload = next(w for w in kernel_costs.WORKLOADS if w.kernel == kernel)
    assert workload.shape == "gate [64, 256, 384], l2"
    for dtype in dtypes:
        x = torch.empty(1, dtype=dtype).expand(64 * 256, 384)
        assert workload.operations == cuda_shim.lif_gate.partial_sums(x, "l2")


def test_rows_without_asynchronous_copies() -> None:
    """GPUs of sm_75 have none."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    operator = functools.partial(cuda_shim.lif_gate.lif_gate, architecture=75)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((70, 24), (5, 264)):
            check_sample(operator, reference.lif_gate, sample(shape, dtype, norm="l2"))


def without_offset(*, x_offset: int, **arguments: Any) -> Tensor:
    return reference.lif_gate(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    """Such as those of a slice; they cannot be accessed by 16 bytes."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    for shape, norm in (((5, 264), "l2"), ((3, 40), "l1"), ((9, 40), None)):
        one = sample(shape, dtype, norm=norm)
        shifted = replace(one, options={**one.options, "x_offset": 1})
        check_sample(cuda_shim.lif_gate.lif_gate, without_offset, shifted)


@pytest.mark.parametrize("norm", NORMS)
def test_extreme_rows(operator: Any, norm: str | None) -> None:
    """Rows of zeros, of squares that overflow and underflow; a norm keeps all of them finite."""
    for dtype, huge in ((torch.float32, 1e30), (torch.float64, 1e300), (torch.float16, 6e4)):
        for columns in (16, 515, 520):
            one = sample((6, columns), dtype, norm=norm)
            x = one.tensors["x"]
            x[1] = 0
            x[2] *= huge / x[2].abs().max()
            x[3] /= huge
            x[4, 0] = huge
            check_sample(operator, reference.lif_gate, one)
            x[5] /= huge
            check_sample(
                operator, reference.lif_gate, replace(one, options={"eps": 0, **one.options})
            )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(operator: Any, norm: str | None, value: float) -> None:
    for columns in (16, 260):
        one = sample((5, columns), norm=norm)
        x = one.tensors.pop("x").requires_grad_()
        clean = operator(x=x, **one.tensors, **one.options)
        (clean_grad,) = torch.autograd.grad(clean.sum(), x)
        spoilt = x.detach().clone()
        spoilt[2, 3] = value
        spoilt.requires_grad_()
        y = operator(x=spoilt, **one.tensors, **one.options)
        (grad,) = torch.autograd.grad(y.sum(), spoilt)
        others = torch.arange(5) != 2
        assert torch.equal(y[others], clean[others])
        assert torch.equal(grad[others], clean_grad[others])
        assert not y[2, 3].isfinite()
        assert norm is None or y[2].isnan().any()


def test_gate_far_from_its_threshold(operator: Any) -> None:
    """Steep gates: exp(k (theta - |x|)) is far outside fp32 on either side."""
    one = replace(sample((4, 16)), scale=1.0)
    one.tensors["steepness"] *= 1000
    check_sample(operator, reference.lif_gate, one)
    one.tensors["threshold"] += 200
    check_sample(operator, reference.lif_gate, replace(one, options={"norm": "l2"}))


def test_without_parameter_gradients(operator: Any) -> None:
    one = sample((9, 33), norm="l2")
    x = one.tensors.pop("x").requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in one.tensors.items()}
    (without,) = torch.autograd.grad(operator(x=x, **one.tensors, norm="l2").sum(), x)
    (grad_x, *_) = torch.autograd.grad(
        operator(x=x, **leaves, norm="l2").sum(), [x, *leaves.values()]
    )
    assert torch.equal(without, grad_x)


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("lif_gate")
