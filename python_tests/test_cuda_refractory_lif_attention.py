"""Refractory LIF attention's CUDA kernels: run by the shim, or on a GPU with `pytest -m cuda`."""

from __future__ import annotations

from typing import Any

import cuda_shim
import cuda_shim.refractory_lif_attention
import pytest
import torch

from ember_ext import reference
from ember_ext.ops import refractory_lif_attention
from ember_ext.reference.lif_attention import attention_probabilities, visible_keys
from ember_ext.testing import DTYPES, Sample, assert_close, check_sample
from ember_ext.testing.lif_attention import (
    close_gates,
    nearly_equal_keys,
    shift_scores,
    with_steep_scales,
)
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


HALF_TYPES = (torch.bfloat16, torch.float16)


def half_samples(dtype: torch.dtype, mode: str) -> list[Sample]:
    """Whole tiles and ragged ones of the kernels with scores in registers, and their limits."""
    generator = torch.Generator().manual_seed(3)
    # batch, heads, key and value heads, queries, earlier keys, head size, dropout, rows of the load
    cases = [
        (1, 2, 1, 130, 30, 64, 0.0, "rows"),  # pairs of keys are aligned, tiles whole
        (1, 2, 2, 70, 2, 128, 0.0, "row"),
        (2, 1, 1, 67, 20, 40, 0.3, "rows"),  # rows of keys at odd addresses
        (1, 2, 2, 33, 0, 96, 0.2, ""),
    ]
    result = []
    for batch, heads, groups, queries, earlier, size, dropout_p, previous in cases:
        keys = queries + earlier
        tensors = refractory_tensors(batch, heads, groups, queries, earlier, size, dtype, generator)
        options: dict[str, Any] = {"is_causal": True, "mode": mode, "dropout_p": dropout_p}
        if previous:
            rows = queries if previous == "rows" else 1
            tensors["previous_load"] = torch.rand(batch, rows, keys, generator=generator) / keys
        else:
            options["across"] = tensors.pop("across")
        if mode == "causal" and earlier:
            tensors["past_probabilities"] = torch.rand(batch, heads, earlier, generator=generator)
            tensors["past_weights"] = torch.rand(batch, earlier, generator=generator)
        if dropout_p:
            options["seed"] = torch.tensor(2**62 + 5)
        name = f"{mode} {[batch, heads, groups, queries, earlier, size]} {previous}"
        result.append(Sample(name, tensors, options, refractory_gradient_scales(tensors)))
    return result


def launched(before: int) -> list[str]:
    """The kernels with products that the shim has run since it had run `before`."""
    names = [launch.kernel for launch in cuda_shim.operators().launches()[before:]]
    return [name for name in names if "<float>" not in name]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
def test_scores_in_registers(operator: Any, dtype: torch.dtype, mode: str) -> None:
    for one in half_samples(dtype, mode):
        check_sample(operator, expected, one)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
def test_scores_of_10000(operator: Any, dtype: torch.dtype, mode: str) -> None:
    generator = torch.Generator().manual_seed(4)
    tensors = refractory_tensors(1, 1, 1, 66, 0, 64, dtype, generator)
    tensors["query"], tensors["key"] = 100 * tensors["query"], 10 * tensors["key"]
    options = {"is_causal": True, "mode": mode, "scale": -0.5, "across": tensors.pop("across")}
    # Each row sees one key only, so that the softmax has all but no gradient.
    scales = refractory_gradient_scales(tensors) | {"d query": 1.0, "d key": 1.0}
    check_sample(operator, expected, Sample("scores up to 2e4", tensors, options, scales))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
@pytest.mark.parametrize(
    ("queries", "size", "rows"), [(66, 64, 1), (66, 40, 66), (80, 64, 80), (80, 128, 1)]
)
def test_scores_far_below_0(
    operator: Any, dtype: torch.dtype, mode: str, queries: int, size: int, rows: int
) -> None:
    """The last tile's rows past the end, of zeros, have scores that are larger by far."""
    generator = torch.Generator().manual_seed(6)
    tensors = refractory_tensors(1, 2, 1, queries, 0, size, dtype, generator)
    tensors["previous_load"] = torch.rand(1, rows, queries, generator=generator) / queries
    shift_scores(tensors, -120)
    options = {"is_causal": True, "mode": mode}
    one = Sample("scores of -120", tensors, options, refractory_gradient_scales(tensors))
    check_sample(operator, expected, one)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_nan_reaches_later_queries_only(operator: Any, dtype: torch.dtype) -> None:
    """Through the loads it reaches all that come after its query, and no other head's output."""
    generator = torch.Generator().manual_seed(0)
    tensors = refractory_tensors(1, 2, 2, 80, 0, 64, dtype, generator)
    tensors["query"][0, 1, 37] = torch.nan
    out, next_load, probabilities, _ = operator(**tensors, is_causal=True)
    bad = out.isnan().any(-1)
    assert not bad[0, 0].any()
    assert not bad[0, 1, :37].any()
    assert bad[0, 1, 37:].all()
    assert not next_load[0, :37].isnan().any()
    assert next_load[0, 37:, 0].isnan().all()
    assert not probabilities[0, 0].isnan().any()
    assert probabilities[0, 1, :38].isnan().all()
    assert not probabilities[0, 1, 38:].isnan().any()


@pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_loads(dtype: torch.dtype) -> None:
    """Sums up to each block of queries, also of keys that none of them sees."""
    generator = torch.Generator().manual_seed(8)
    tensors = refractory_tensors(1, 2, 1, 130, 30, 64, dtype, generator)
    past = torch.rand(1, 2, 30, generator=generator)
    state = {"past_probabilities": past, "past_weights": torch.rand(1, 30, generator=generator)}
    tensors["query"].requires_grad_()
    flat = with_flat_state(cuda_shim.refractory_lif_attention.refractory_lif_attention)
    out = flat(**tensors, **state, is_causal=True)[0]
    saved = out.grad_fn.saved["block_loads"]

    query, key = (tensors[name].detach().double() for name in ("query", "key"))
    p = attention_probabilities(query, key, visible_keys(query, key, None, True), None)
    start = torch.nn.functional.pad(past.double(), (0, 130)).unsqueeze(2)
    sums = torch.cat((start, start + p.cumsum(2)), 2)
    block = 16 if dtype in HALF_TYPES else 64
    torch.testing.assert_close(saved, sums[:, :, :130:block].to(saved), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_which_kernels_run(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not aligned, in one pass or in both, take kernels that cope with them."""
    shim_run = cuda_shim.lif_attention.run
    one = half_samples(dtype, "causal")[2]

    def check(padded: tuple[str, ...]) -> list[bool]:
        def run_padded(shim: Any, name: str, *arguments: Any) -> Any:
            return shim_run(shim, name, *arguments, pad=1 if name.endswith(padded) else None)

        before = len(cuda_shim.operators().launches())
        with monkeypatch.context() as patch:
            if padded:
                patch.setattr(cuda_shim.lif_attention, "run", run_padded)
            flat = with_flat_state(cuda_shim.refractory_lif_attention.refractory_lif_attention)
            check_sample(flat, expected, one)
        return ["_half_" in name for name in launched(before)]

    assert all(check(()))
    assert not any(check(("_forward", "_backward")))
    forward_only = check(("_backward",))
    assert any(forward_only)
    assert not all(forward_only)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_drops_the_same_weights_as_the_cpu(operator: Any, dtype: torch.dtype) -> None:
    """With the unit matrix for values the output is the matrix of weights."""
    generator = torch.Generator().manual_seed(2)
    tensors = refractory_tensors(1, 2, 2, 72, 0, 72, dtype, generator)
    tensors["query"] = 0.1 * tensors["query"]
    tensors["value"] = torch.eye(72, dtype=dtype).expand(1, 2, 72, 72)
    options: dict[str, Any] = {"is_causal": True, "dropout_p": 0.4, "seed": torch.tensor(2**62 + 5)}
    kept = operator(**tensors, **options)[0] != 0
    assert torch.equal(
        kept, with_flat_state(refractory_lif_attention)(**tensors, **options)[0] != 0
    )


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


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("steepness", [1e3, 1e4])
def test_gradient_of_great_steepness(operator: Any, dtype: torch.dtype, steepness: float) -> None:
    """It is made of sums that are steepness * threshold times as large as what they leave."""
    generator = torch.Generator().manual_seed(1)
    tensors = refractory_tensors(1, 2, 1, 130, 0, 64, dtype, generator)
    # Two keys have half of the weight each, give or take 1 / steepness.
    key = torch.full((1, 1, 130, 64), -2.5)
    key[:, :, :2] *= -1
    key[:, :, 1] += 1e-3 * torch.randn(64, generator=generator)
    tensors["key"] = key.to(dtype)
    tensors["query"] = (1 + 160 / steepness * tensors["query"].float()).to(dtype)
    values = {"steepness": steepness, "threshold": 0.45, "within": 0.1}
    tensors |= {name: torch.full((2,), value) for name, value in values.items()}
    options = {"is_causal": True, "across": tensors.pop("across")}
    one = Sample("steep", tensors, options)
    value, eager = (run(of, one)["d steepness"] for of in (operator, expected))
    exact = run(expected, one, torch.float64)["d steepness"]
    terms = 0.45 * steepness * float(exact.abs().max())
    assert terms > 0.1
    assert_close("d steepness", value, eager, exact, scale=terms)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_gates_that_are_steps(operator: Any, dtype: torch.dtype) -> None:
    """Their exponents are rounded by more than the exponent of any number."""
    generator = torch.Generator().manual_seed(10)
    for steepness in (1e9, 1e12):
        tensors = refractory_tensors(1, 2, 2, 40, 0, 64, dtype, generator)
        tensors["steepness"] = torch.full((2,), steepness)
        options = {"is_causal": True, "across": tensors.pop("across")}
        scales = refractory_gradient_scales(tensors)
        check_sample(operator, expected, Sample(f"k={steepness}", tensors, options, scales))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "size", "within", "across"),
    [
        ("causal", 64, 0.1, 0.0),
        ("causal", 128, 0.1, 0.2),
        ("look_ahead", 64, 0.1, 0.0),
        ("causal", 60, 0.1, 0.2),
        ("look_ahead", 256, 0.1, 0.0),
    ],
)
def test_nearly_equal_keys(
    operator: Any, dtype: torch.dtype, mode: str, size: int, within: float, across: float
) -> None:
    """The gradient of a query is one of differences between keys, which may be small."""
    generator = torch.Generator().manual_seed(9)
    for steepness in (1e2, 1e3, 1e4):
        tensors = refractory_tensors(1, 2, 1, 70, 3, size, dtype, generator)
        options: dict[str, Any] = {"is_causal": True, "mode": mode}
        options |= nearly_equal_keys(tensors, steepness, generator)
        # The loads are about 1 / 3 from the first query on.
        tensors["threshold"] -= (within + across) / 3
        tensors |= {"within": torch.full((2,), within), "across": torch.full((2,), across)}
        if mode == "causal":
            tensors |= {
                "past_probabilities": torch.ones(1, 2, 3),
                "past_weights": torch.ones(1, 3),
            }
        if across:
            load = 1 / 3 + torch.randn(1, 70, 73, generator=generator) / steepness
            tensors["previous_load"] = load
        else:
            options["across"] = tensors.pop("across")
        name = f"{mode} {size} k={steepness} within={within} across={across}"
        one = with_steep_scales(expected, Sample(name, tensors, options))
        check_sample(operator, expected, one)


def test_repeats_bit_by_bit(operator: Any) -> None:
    one = next(s for s in samples(torch.float32) if s.tensors["query"].shape[2] == 101)
    for repeated in (one, half_samples(torch.bfloat16, "causal")[2]):
        first, second = run(operator, repeated), run(operator, repeated)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("refractory_lif_attention", as_reported=True)
