"""LIF attention's CUDA kernels: run on the CPU by the shim, and on a GPU with `pytest -m cuda`."""

from __future__ import annotations

from typing import Any

import cuda_shim
import cuda_shim.lif_attention
import pytest
import torch

from ember_ext import reference
from ember_ext.ops import lif_attention
from ember_ext.reference.lif_attention import (
    attention_probabilities,
    gate_probabilities,
    summarize,
    visible_keys,
)
from ember_ext.testing import DTYPES, Sample, assert_close, attention_samples, check_sample

operator = cuda_shim.operator_fixture(cuda_shim.lif_attention.lif_attention, lif_attention)


def samples(dtype: torch.dtype) -> list[Sample]:
    """Those with work for a kernel; of the longest ones fp32 has to be enough."""
    pairs_at_most = 10**6 if dtype == torch.float32 else 10**4
    return [
        one
        for one in attention_samples(dtype)
        if all(one.tensors[name].numel() for name in ("query", "key"))
        and one.tensors["query"].shape[2] * one.tensors["key"].shape[2] <= pairs_at_most
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(operator: Any, dtype: torch.dtype) -> None:
    for one in samples(dtype):
        check_sample(operator, reference.lif_attention, one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summary(operator: Any, dtype: torch.dtype) -> None:
    for one in samples(dtype):
        _, summary = operator(**one.tensors, **one.options, return_summary=True)
        expected = []
        for precision in (dtype, torch.float64):
            t = {name: value.to(precision) for name, value in one.tensors.items()}
            visible = visible_keys(
                t["query"],
                t["key"],
                one.options.get("attn_mask"),
                one.options.get("is_causal", True),
            )
            p = attention_probabilities(t["query"], t["key"], visible, one.options.get("scale"))
            compute = torch.promote_types(precision, torch.float32)
            gate = [one.tensors[n].to(compute) for n in ("threshold", "leak", "steepness")]
            theta, lam, k = (v.view(-1, 1, 1) for v in gate)
            w = gate_probabilities(p, theta, lam, k, one.options.get("eps", 1e-8))
            expected.append(summarize(p, w, gate[0], visible))
        for name, *values in zip(summary._fields, summary, *expected, strict=True):
            # A probability within rounding of a cut may count on either side of it.
            scale = 1e5 if name in ("support", "fire_rate") else 1.0
            assert_close(f"{one}: {name}", *values, scale=scale)


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("lif_attention")
