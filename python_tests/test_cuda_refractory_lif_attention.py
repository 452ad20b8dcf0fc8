"""Refractory LIF attention's CUDA kernels: run by the shim, or on a GPU with `pytest -m cuda`."""

from __future__ import annotations

from typing import Any

import cuda_shim
import cuda_shim.refractory_lif_attention
import pytest
import torch

from ember_ext import reference
from ember_ext.ops import refractory_lif_attention
from ember_ext.testing import DTYPES, Sample, assert_close, check_sample
from ember_ext.testing.lif_attention import close_gates
from ember_ext.testing.refractory_lif_attention import (
    refractory_gradient_scales,
    refractory_samples,
    refractory_tensors,
    with_flat_state,
)
from ember_ext.testing.sample import run

operator = cuda_shim.operator_fixture(
    with_flat_state(cuda_shim.refractory_lif_attention.refractory_lif_attention),
    with_flat_state(refractory_lif_attention),
)
expected = with_flat_state(reference.refractory_lif_attention)


def samples(dtype: torch.dtype) -> list[Sample]:
    """Those with work for a kernel, the first entries of their batch."""
    found = []
    for one in refractory_samples(dtype):
        if not one.tensors["query"].shape[0] * one.tensors["query"].shape[1]:
            continue
        if one.tensors["query"].shape[2] and one.tensors["query"].shape[0] <= 3:
            found.append(one)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(operator: Any, dtype: torch.dtype) -> None:
    for one in samples(dtype):
        check_sample(operator, expected, one)


@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
def test_several_tiles(operator: Any, mode: str) -> None:
    """Sums over three tiles of queries and four of keys, with earlier keys of their own."""
    generator = torch.Generator().manual_seed(7)
    tensors = refractory_tensors(1, 2, 1, 150, 60, 70, torch.float32, generator)
    tensors["previous_load"] = torch.rand(1, 150, 210, generator=generator) / 210
    if mode == "causal":
        tensors["past_probabilities"] = 2 * torch.rand(1, 2, 60, generator=generator)
        tensors["past_weights"] = 2 * torch.rand(1, 60, generator=generator)
    options = {"is_causal": True, "mode": mode, "dropout_p": 0.3, "seed": torch.tensor(3)}
    one = Sample(f"tiles {mode}", tensors, options, refractory_gradient_scales(tensors))
    check_sample(operator, expected, one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
@pytest.mark.parametrize(("steepness", "threshold"), [(50.0, 0.5), (20.0, 0.8)])
def test_gates_that_open_for_some_rows_only(
    operator: Any, dtype: torch.dtype, mode: str, steepness: float, threshold: float
) -> None:
    """The first query has one probability, 1; the weights of others are down to 1e-11 of its."""
    generator = torch.Generator().manual_seed(5)
    tensors = refractory_tensors(1, 2, 2, 70, 0, 8, dtype, generator)
    close_gates(tensors, steepness, threshold)
    tensors["within"] = 0.1 * tensors["within"]
    exact = {name: value.double() for name, value in tensors.items()}
    options: dict[str, Any] = {"is_causal": True, "mode": mode, "eps": 0.0}
    out, eager = (run(**tensors, **options)[0] for run in (operator, expected))
    assert_close("out", out, eager, expected(**exact, **options)[0])


def test_repeats_bit_by_bit(operator: Any) -> None:
    one = next(s for s in samples(torch.float32) if s.tensors["query"].shape[2] == 101)
    first, second = run(operator, one), run(operator, one)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("refractory_lif_attention", as_reported=True)
