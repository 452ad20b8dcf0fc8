"""How far the scans' kernels round, and whether one of their samples passes by luck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ember_ext
from ember_ext.ops import Affine, CfCWeights, LTCWeights
from ember_ext.reference import ltc_scan as reference_ltc_scan
from ember_ext.testing import OPERATORS, Registered, error_bound
from ember_ext.testing.sample import run
from ember_ext.testing.tolerance import distance

SCANS = [one for one in OPERATORS if one.name in ("cfc_scan", "ltc_scan")]


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.name)
def test_no_sample_passes_by_luck(scan: Registered) -> None:
    """A sample holds for numbers beside its own too, whose roundings are others.

    A few results may miss the bound, since eager PyTorch is sometimes exact by chance.
    """
    generator = torch.Generator().manual_seed(0)

    def nudged(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (value.double() * (1 + 1e-5 * noise)).float()

    ratios: dict[str, float] = {}
    for sample in scan.samples(torch.float32):
        for redraw in range(4):
            tensors = {name: nudged(value) for name, value in sample.tensors.items()}
            inputs = replace(sample, tensors=tensors)
            eager = run(scan.reference, inputs)
            exact = run(scan.reference, inputs, torch.float64)
            for name, value in run(scan.operator, inputs).items():
                error, bound = distance(value, exact[name]), error_bound(eager[name], exact[name])
                ratios[f"{sample.name}: {name} {redraw}"] = error / bound if bound > 0 else 0.0
    beyond = {name: ratio for name, ratio in ratios.items() if ratio > 1}
    assert len(beyond) <= 3, (len(ratios), beyond)
    assert max(ratios.values()) < 2, beyond


def test_hyperbolic_tangent() -> None:
    """A head's tanh is as good as libm's, up to where it rounds to 1."""
    x = torch.cat([torch.logspace(-30, 1, 50_000), torch.linspace(0.01, 10, 50_000)])
    x = torch.cat([x, -x, torch.zeros(2)])[:, None, None]
    one, nothing = (
        Affine(torch.ones(1, 2), torch.zeros(1)),
        Affine(torch.zeros(1, 2), torch.zeros(1)),
    )
    weights = CfCWeights(one, nothing, nothing, nothing)
    y = ember_ext.cfc_scan(x, weights, mode="no_gate")[0].flatten()  # tanh(x) + 0
    exact = x.double().tanh().flatten()
    ulp = torch.exp2(exact.abs().clamp_min(2.0**-126).log2().floor() - 23)
    assert ((y.double() - exact).abs() / ulp).max() <= 2.7
    assert y.abs().max() == 1


def test_slope_of_an_open_synapse() -> None:
    """Where a sigmoid nears 1, its slope must not come from the rounded sigmoid."""
    x = torch.linspace(-12, 12, 97)[:, None, None]
    ones, zeros, nothing = torch.ones(1), torch.zeros(1), [torch.zeros(1, 1)] * 4
    sensory = [torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), -torch.ones(1, 1)]

    def slopes(scan: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        weights = LTCWeights(ones, ones, zeros, *nothing, *sensory)
        y, _ = scan(leaf, LTCWeights(*(value.to(dtype) for value in weights)), ode_unfolds=1)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        return grad.double()

    exact = slopes(reference_ltc_scan, torch.float64)
    ours = slopes(ember_ext.ltc_scan, torch.float32)
    assert ((ours - exact) / exact).abs().max() < 8 * torch.finfo(torch.float32).eps
