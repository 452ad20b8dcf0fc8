"""LIF attention's CUDA kernels: run on the CPU by the shim, and on a GPU with `pytest -m cuda`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cuda_shim
import cuda_shim.lif_attention
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ember_ext import reference
from ember_ext.ops import lif_attention
from ember_ext.reference.lif_attention import (
    attention_probabilities,
    dropout_keep,
    gate_probabilities,
    summarize,
    visible_keys,
)
from ember_ext.testing import DTYPES, Sample, assert_close, attention_samples, check_sample
from ember_ext.testing.lif_attention import (
    attention_tensors,
    close_gates,
    gradient_scales,
    nearly_equal_keys,
    shift_scores,
    with_steep_scales,
)
from ember_ext.testing.sample import run

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


HALF_TYPES = (torch.bfloat16, torch.float16)


def half_samples(dtype: torch.dtype) -> list[Sample]:
    """Whole tiles and ragged ones of the kernels with scores in registers, and their limits."""
    generator = torch.Generator().manual_seed(3)
    # batch, heads, key and value heads, queries, keys, head size, causal, dropout
    cases = [
        (1, 2, 1, 130, 130, 64, True, 0.0),
        (1, 2, 2, 129, 65, 128, False, 0.0),
        (2, 2, 1, 65, 100, 128, True, 0.3),
        (1, 2, 1, 150, 70, 40, True, 0.0),
        (1, 1, 1, 33, 200, 64, False, 0.2),
        (1, 2, 2, 70, 131, 96, True, 0.0),
    ]
    result = []
    for shape in cases:
        *sizes, causal, dropout_p = shape
        batch, heads, _, queries, keys, _ = sizes
        tensors = attention_tensors(*sizes, dtype, generator)  # type: ignore[arg-type]
        options: dict[str, Any] = {"is_causal": causal, "dropout_p": dropout_p}
        if dropout_p:
            options["seed"] = torch.tensor(7)
        result.append(Sample(f"{shape}", tensors, options, gradient_scales(tensors)))
        mask = torch.rand(batch, heads, queries, keys, generator=generator) < 0.6
        mask[:, :, queries // 3] = False
        if keys < 100:
            masked = f"{shape}, masked"
            result.append(Sample(masked, tensors, {**options, "attn_mask": mask}, result[-1].scale))
    tensors = dict(tensors)
    tensors["query"] = 100 * tensors["query"]
    tensors["key"] = 10 * tensors["key"]
    # Each row sees one key only, so that the softmax has all but no gradient.
    scales = gradient_scales(tensors) | {"d query": 1.0, "d key": 1.0}
    result.append(Sample("scores up to 2e4", tensors, {"is_causal": True, "scale": -0.5}, scales))
    return result


class TF32Products(TorchDispatchMode):
    """Products of fp32 matrices rounded to tf32, as eager PyTorch may compute them on a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = tuple(self.round(t) if t.dtype == torch.float32 else t for t in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def round(values: Tensor) -> Tensor:
        """To the nearest number with 10 bits of fraction."""
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allow tf32 to the kernel, and give it to the reference in fp32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    with TF32Products():
        yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(operator: Any, dtype: torch.dtype) -> None:
    for one in samples(dtype):
        check_sample(operator, reference.lif_attention, one)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_scores_in_registers(operator: Any, dtype: torch.dtype) -> None:
    for one in half_samples(dtype):
        check_sample(operator, reference.lif_attention, one)


@pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    """They take other kernels, which need not end in the same bits."""
    operator = functools.partial(cuda_shim.lif_attention.lif_attention, pad=1)
    before = len(cuda_shim.operators().launches())
    for one in half_samples(dtype)[:2]:
        check_sample(operator, reference.lif_attention, one)
    launches = cuda_shim.operators().launches()[before:]
    assert launches
    assert not any("_half_" in launch.kernel for launch in launches)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_nan_stays_in_its_row_of_whole_tiles(operator: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = attention_tensors(1, 2, 2, 130, 200, 64, dtype, generator)
    tensors["query"][0, 1, 117] = torch.nan
    bad = operator(**tensors, is_causal=False).isnan().any(-1)
    assert bad[0, 1, 117]
    assert bad.sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(operator: Any, dtype: torch.dtype) -> None:
    tensors = attention_tensors(1, 2, 2, 70, 70, 16, dtype, torch.Generator().manual_seed(0))
    tensors["query"][0, 1, 17] = torch.nan
    bad = operator(**tensors, is_causal=True).isnan().any(-1)
    assert bad[0, 1, 17]
    assert bad.sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summary(operator: Any, dtype: torch.dtype) -> None:
    without_columns = [
        one
        for one in attention_samples(dtype)
        if one.tensors["query"].shape[3] == 0 and len(one.tensors["query"])
    ]
    assert without_columns
    for one in [*samples(dtype), *without_columns]:
        _, summary = operator(**one.tensors, **one.options, return_summary=True)
        expected = []
        for precision in (dtype, torch.float64):
            t = {name: value.to(precision) for name, value in one.tensors.items()}
            visible = visible_keys(
                t["query"],
                t["key"],
                one.options.get("attn_mask"),
                one.options["is_causal"],
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


@pytest.mark.usefixtures("tf32")
def test_tf32_matches_reference_in_tf32(operator: Any) -> None:
    # In units of tf32, which has as many bits of fraction as fp16.
    floor = 4 * torch.finfo(torch.float16).eps / torch.finfo(torch.float32).eps
    for one in samples(torch.float32):
        check_sample(operator, reference.lif_attention, one, floor_ulps=floor)
        operator(**one.tensors, **one.options, return_summary=True)


@pytest.mark.usefixtures("tf32")
def test_tf32_rounds_to_the_nearest(operator: Any) -> None:
    """Cut off instead, factors are too small throughout, here of all inputs by one in the last bit.

    Rounding errors of weights and of gradients of scores have either sign, and cancel.
    """
    generator = torch.Generator().manual_seed(4)
    tensors = attention_tensors(1, 2, 1, 70, 100, 72, torch.float32, generator)
    tensors["value"] = tensors["value"].abs()
    tensors["grad_out"] = torch.rand(1, 2, 70, 72, generator=generator)
    factors = ("query", "key", "value", "grad_out")
    exact = {name: value.double() for name, value in tensors.items()}
    for name in factors:
        cut = tensors[name].view(torch.int32) & ~0x1FFF
        tensors[name] = (cut | 0x1800).view(torch.float32)
        exact[name] = (cut + 0x2000).view(torch.float32).double()

    def results(function: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: t.clone().requires_grad_() for name, t in given.items()}
        grad_out = inputs.pop("grad_out").detach()
        out = function(**inputs, is_causal=True)
        gradients = torch.autograd.grad(out, [inputs[name] for name in factors[:3]], grad_out)
        return {"out": out, **dict(zip(factors, gradients, strict=False))}

    expected = results(reference.lif_attention, exact)
    for name, got in results(operator, tensors).items():
        size = (got.double() * expected[name]).sum() / expected[name].square().sum()
        assert size.item() == pytest.approx(1, abs=1e-4), name


@pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpus_without_matrix_units_for_a_type(dtype: torch.dtype) -> None:
    """sm_75, whose matrix units take fp16 only."""
    operator = functools.partial(cuda_shim.lif_attention.lif_attention, architecture=75)
    for one in samples(dtype)[:4]:
        check_sample(operator, reference.lif_attention, one)


@pytest.mark.parametrize(("values", "others"), [(1e4, 1e-2), (1e-5, 1.0)])
def test_gradients_outside_the_range_of_fp16(operator: Any, values: float, others: float) -> None:
    """Gradients of scores that fp16 cannot hold, or coarsely, though it holds those of inputs."""
    one = next(s for s in samples(torch.float16) if s.tensors["query"].shape == (3, 2, 64, 64))
    tensors = dict(one.tensors)
    for name, factor in (("query", others), ("key", others), ("value", values)):
        tensors[name] = tensors[name] * factor
    check_sample(operator, reference.lif_attention, replace(one, tensors=tensors))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shift", [-30.0, -120.0])
@pytest.mark.parametrize(
    ("queries", "keys", "size", "causal"),
    [(40, 70, 64, False), (66, 70, 128, False), (66, 66, 64, True)],
)
def test_scores_far_below_0(
    operator: Any,
    dtype: torch.dtype,
    shift: float,
    queries: int,
    keys: int,
    size: int,
    causal: bool,
) -> None:
    """The last tile's rows past the end, of zeros, have scores that are larger by far."""
    generator = torch.Generator().manual_seed(6)
    tensors = attention_tensors(1, 2, 1, queries, keys, size, dtype, generator)
    shift_scores(tensors, shift)
    options = {"is_causal": causal}
    one = Sample(f"scores of {shift}", tensors, options, gradient_scales(tensors))
    check_sample(operator, reference.lif_attention, one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("steepness", "threshold"), [(50.0, 0.5), (20.0, 0.8)])
def test_gates_that_open_for_some_rows_only(
    operator: Any, dtype: torch.dtype, steepness: float, threshold: float
) -> None:
    """The first query has one probability, 1; the weights of others are down to 1e-11 of its."""
    generator = torch.Generator().manual_seed(5)
    tensors = attention_tensors(1, 2, 2, 70, 70, 8, dtype, generator)
    close_gates(tensors, steepness, threshold)
    exact = {name: value.double() for name, value in tensors.items()}
    expected = reference.lif_attention(**exact, is_causal=True, eps=0.0)
    eager = reference.lif_attention(**tensors, is_causal=True, eps=0.0)
    assert_close("out", operator(**tensors, is_causal=True, eps=0.0), eager, expected)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_gates_that_are_steps(operator: Any, dtype: torch.dtype) -> None:
    """Their exponents are rounded by more than the exponent of any number."""
    generator = torch.Generator().manual_seed(10)
    for steepness in (1e9, 1e12):
        tensors = attention_tensors(1, 2, 2, 40, 40, 64, dtype, generator)
        tensors["steepness"] = torch.full((2,), steepness)
        scales = gradient_scales(tensors)
        one = Sample(f"k={steepness}", tensors, {"is_causal": True}, scales)
        check_sample(operator, reference.lif_attention, one)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128, 60, 256])
def test_nearly_equal_keys(operator: Any, dtype: torch.dtype, size: int) -> None:
    """The gradient of a query is one of differences between keys, which may be small."""
    generator = torch.Generator().manual_seed(9)
    for steepness in (1e1, 1e2, 1e3, 1e4):
        tensors = attention_tensors(1, 2, 1, 70, 73, size, dtype, generator)
        options = {"is_causal": True, **nearly_equal_keys(tensors, steepness, generator)}
        one = Sample(f"{size} k={steepness}", tensors, options)
        one = with_steep_scales(reference.lif_attention, one)
        check_sample(operator, reference.lif_attention, one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drops_the_same_weights_as_the_cpu(operator: Any, dtype: torch.dtype) -> None:
    """With the unit matrix for values the output is the matrix of weights."""
    generator = torch.Generator().manual_seed(2)
    for tokens in (70, 72):  # of which the latter are whole pieces, for some kernels
        tensors = attention_tensors(2, 3, 3, tokens, tokens, tokens, dtype, generator)
        tensors["value"] = torch.eye(tokens, dtype=dtype).expand(2, 3, tokens, tokens)
        options = {"is_causal": False, "dropout_p": 0.4, "seed": torch.tensor(2**62 + 5)}
        kept = operator(**tensors, **options) != 0
        assert torch.equal(kept, lif_attention(**tensors, **options) != 0)
        assert torch.equal(kept, dropout_keep(options["seed"], kept.shape, 0.4))


def test_repeats_bit_by_bit(operator: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one = next(s for s in samples(dtype) if s.tensors["query"].shape == (2, 4, 65, 33))
        one = half_samples(dtype)[2] if dtype == torch.bfloat16 else one
        first, second = run(operator, one), run(operator, one)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("lif_attention", as_reported=True)
