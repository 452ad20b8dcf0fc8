"""`FlopCounterMode` counts for operators and modules what their definitions' products come to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ncps.torch
import ncps.wirings
import pytest
import torch
from modules import FEATURES, build
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ember_ext import _native, nn, ops
from ember_ext.testing import OPERATORS, Registered, Sample

pytestmark = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def passes(operator: Callable[..., Any], sample: Sample, **options: Any) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in sample.tensors.items()}
    outputs: list[Tensor] = []

    def forward() -> None:
        result = operator(**leaves, **sample.options, **options)
        outputs.extend(result if isinstance(result, tuple) else (result,))

    ahead = flops(forward)
    total = torch.stack([output.sum() for output in outputs]).sum()
    return ahead, flops(
        lambda: torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    )


def samples(entry: Registered) -> list[Sample]:
    return [
        sample
        for sample in entry.samples(torch.float32)
        if all(t.numel() for t in sample.tensors.values())
    ]


@pytest.mark.parametrize("entry", OPERATORS[:3], ids=lambda entry: entry.name)
def test_attention_and_gate(entry: Registered) -> None:
    for sample in samples(entry):
        ahead, back = passes(entry.reference, sample)
        actual = passes(entry.operator, sample)
        # The kernel's backward pass computes the scores once more: one of forward's two products.
        assert actual == (ahead, back + ahead // 2)
        assert (ahead > 0) == (entry.name != "lif_gate")
        with torch.no_grad():
            run = functools.partial(entry.operator, **sample.tensors, **sample.options)
            assert flops(run) == ahead


def test_cfc_scan() -> None:
    (entry,) = (entry for entry in OPERATORS if entry.name == "cfc_scan")
    compared = 0
    for sample in samples(entry):
        ahead, back = passes(entry.reference, sample)
        one_span = "timespans" not in sample.tensors and sample.options.get("mode") != "pure"
        if one_span:
            # time_a and time_b come to one map, which the steps share.
            batch, steps, _ = sample.tensors["x"].shape
            spared = 2 * batch * steps * sample.tensors["time_a_weight"].numel()
            ahead, back = ahead - spared, back - 2 * spared
        assert passes(entry.operator, sample) == (ahead, back)
        assert passes(entry.operator, sample, chunk_size=2) == (ahead, back + ahead)
        compared += ahead > 0
    assert compared > 10


def test_without_gradients_of_the_weights() -> None:
    x = torch.randn(2, 5, 4, requires_grad=True)
    affines = [ops.Affine(torch.randn(3, 7), torch.randn(3)) for _ in range(4)]
    y, _ = ops.cfc_scan(x, ops.CfCWeights(*affines))
    assert flops(lambda: torch.autograd.grad(y.sum(), x)) == 2 * 2 * 5 * 9 * 7


@pytest.mark.parametrize("wired", [False, True])
@pytest.mark.parametrize("mode", ["default", "pure"])
def test_cfc_counts_what_ncps_counts(mode: str, wired: bool) -> None:
    units: Any = ncps.wirings.AutoNCP(12, 4) if wired else 9
    options = {} if wired else {"backbone_units": 7, "backbone_layers": 2}
    ours = nn.CfC(5, units, mode=mode, **options)
    theirs = ncps.torch.CfC(5, units, mode=mode, **options)
    x, spans = torch.randn(3, 4, 5), torch.rand(3, 4, 1) + 0.1
    wanted = flops(
        lambda: [theirs(row[None], None, s[None]) for row, s in zip(x, spans, strict=True)]
    )
    assert flops(lambda: ours(x, None, spans)) == wanted > 0
    with torch.no_grad():
        assert flops(lambda: ours(x, None, spans)) == wanted
        state = torch.zeros(3, int(ours.state_size))
        assert flops(lambda: ours.step(x[:, 0], state, spans[:, 0])) == wanted // 4


def test_modules_are_told_apart() -> None:
    module = build("attention")
    with FlopCounterMode(display=False, depth=None) as counter:
        module(torch.randn(2, 5, FEATURES))
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.ember_ext.lif_attention] == 2 * 2 * 2 * 2 * 5 * 5 * FEATURES // 2
