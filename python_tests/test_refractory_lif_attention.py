"""Refractory LIF attention against its reference: values, gradients, modes, state, errors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ember_ext import _native, ops, reference
from ember_ext.nn.lif_attention import RefractoryParameters
from ember_ext.ops import RefractoryState, lif_attention
from ember_ext.reference.lif_attention import attention_probabilities, visible_keys
from ember_ext.testing import (
    DTYPES,
    Sample,
    check_sample,
    refractory_samples,
    refractory_tensors,
    with_flat_state,
)
from ember_ext.testing.refractory_lif_attention import refractory_gradient_scales

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")
both_modes = pytest.mark.parametrize("mode", ["causal", "look_ahead"])

refractory_lif_attention = functools.partial(ops.refractory_lif_attention, is_causal=True)
flat = with_flat_state(refractory_lif_attention)
flat_reference = with_flat_state(
    functools.partial(reference.refractory_lif_attention, is_causal=True)
)


def tensors(
    batch: int = 3,
    queries: int = 9,
    earlier: int = 0,
    size: int = 4,
    heads: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (batch, heads, heads, queries, earlier, size)
    values = refractory_tensors(*shapes, torch.float32, generator)
    return {name: value.to(dtype) for name, value in values.items()}


def with_loads(values: dict[str, Tensor], mode: str, past: bool = True) -> dict[str, Tensor]:
    """The values with a previous load for each query and, in mode "causal", a state."""
    generator = torch.Generator().manual_seed(4)
    batch, heads, queries, _ = values["query"].shape
    keys = values["key"].shape[2]
    loads = {"previous_load": torch.rand(batch, queries, keys, generator=generator)}
    if mode == "causal" and past:
        earlier = keys - queries
        loads["past_probabilities"] = torch.rand(batch, heads, earlier, generator=generator)
        loads["past_weights"] = torch.rand(batch, earlier, generator=generator)
    return values | {name: load.to(values["query"].dtype) for name, load in loads.items()}


def gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    return torch.autograd.grad(outputs, list(leaves.values()), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype) -> None:
    for sample in refractory_samples(dtype):
        check_sample(flat, flat_reference, sample)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_gpu(dtype: torch.dtype) -> None:
    for sample in refractory_samples(dtype):
        check_sample(flat, flat_reference, sample.to("cuda"))


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, assert_matches_with: Callable[[str, str], None]) -> None:
    assert_matches_with(isa, "refractory_lif_attention")


@both_modes
def test_any_strides(mode: str) -> None:
    values = with_loads(tensors(2, 60, 5, dtype=torch.float32), mode)
    strided = {
        name: value.transpose(-1, -2).contiguous().transpose(-1, -2) if value.dim() > 1 else value
        for name, value in values.items()
    }
    assert not any(value.is_contiguous() for value in strided.values() if value.dim() > 2)
    scales = refractory_gradient_scales(strided)
    check_sample(flat, flat_reference, Sample("strided", strided, {"mode": mode}, scales))
    for actual, expected in zip(flat(**strided), flat(**values), strict=True):
        assert torch.equal(actual, expected)


@both_modes
def test_long_sequence(mode: str) -> None:
    values = tensors(1, 1100, 100, 8, dtype=torch.float32)
    options = {"mode": mode, "dropout_p": 0.1, "seed": torch.tensor(7), "across": values["across"]}
    del values["across"]
    scales = refractory_gradient_scales(values)
    check_sample(flat, flat_reference, Sample("long", values, options, scales))


@both_modes
def test_gradcheck(mode: str) -> None:
    values = with_loads(tensors(1, 4, 2, 3), mode)
    names = list(values)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return flat(
            **dict(zip(names, leaves, strict=True)), mode=mode, dropout_p=0.3, seed=torch.tensor(11)
        )

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in values.values()])


@both_modes
@pytest.mark.parametrize("result", [0, 1, 2, 3])
def test_gradients_of_one_result_alone(mode: str, result: int) -> None:
    values = with_loads(tensors(2, 7, 3), mode)

    def alone(operator: Callable[..., tuple[Tensor, ...]]) -> list[Tensor | None]:
        leaves = [value.detach().requires_grad_() for value in values.values()]
        out = operator(**dict(zip(values, leaves, strict=True)), mode=mode)[result]
        return list(torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True))

    for actual, expected in zip(alone(flat), alone(flat_reference), strict=True):
        # The reference leaves out what its graph does not reach, the kernel writes zeros.
        torch.testing.assert_close(
            actual, torch.zeros_like(actual) if expected is None else expected
        )


@needs_kernels
@both_modes
@pytest.mark.parametrize(("extras", "expanded"), [(False, False), (True, False), (True, True)])
def test_opcheck(mode: str, extras: bool, expanded: bool) -> None:
    look_ahead = mode == "look_ahead"
    values = tensors(2, 7, 3)
    loads: list[Tensor | None] = [None, None, None]
    if extras:
        given = with_loads(values, mode)
        names = ("previous_load", "past_probabilities", "past_weights")
        loads = [given.get(name) for name in names]
        if expanded:
            loads[0] = given["previous_load"][:1, :1].expand(2, 7, -1)
    leaves = [value.requires_grad_() for value in values.values()]
    seed = torch.tensor(5) if extras else None
    options = (0.2 if extras else 0.0, look_ahead, 0.5, 1e-8, 3)
    operators = torch.ops.ember_ext
    torch.library.opcheck(
        operators.refractory_lif_attention.default, (*leaves, *loads, seed, *options)
    )
    detached = [leaf.detach() for leaf in leaves]
    arguments = (*detached, *loads, seed, *options)
    torch.library.opcheck(operators.refractory_lif_attention_forward.default, arguments)
    *outputs, row_stats, block_loads = operators.refractory_lif_attention_forward(*arguments)
    grads = [torch.randn_like(out) if extras or i == 0 else None for i, out in enumerate(outputs)]
    torch.library.opcheck(
        operators.refractory_lif_attention_backward.default,
        (
            *grads,
            *detached,
            row_stats,
            block_loads,
            loads[0],
            seed,
            *options,
            loads[0] is not None,
            loads[1] is not None,
        ),
    )


@needs_kernels
@both_modes
def test_compiles_without_recompiling_for_new_sizes(
    mode: str,
    counted_compile: Callable[[Callable[..., Any]], tuple[Callable[..., Any], list[Any]]],
) -> None:
    compiled, graphs = counted_compile(flat)
    for i, (batch, queries) in enumerate([(2, 7), (3, 9), (4, 11), (5, 13)]):
        values = with_loads(tensors(batch, queries, dtype=torch.float32), mode, past=False)
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        actual, expected = compiled(**leaves, mode=mode), flat(**leaves, mode=mode)
        results = (*actual, *gradients(actual, leaves))
        for a, b in zip(results, (*expected, *gradients(expected, leaves)), strict=True):
            assert torch.equal(a, b)
        if i >= 1:
            assert len(graphs) <= 2


@needs_kernels
@both_modes
@pytest.mark.parametrize(("batch", "queries"), [(2, 150), (17, 60)])
def test_repeats_to_the_bit(
    mode: str,
    batch: int,
    queries: int,
    assert_repeats: Callable[[Callable[[], list[Tensor]]], None],
) -> None:
    # Few batch entries work in step, many one by one.
    values = with_loads(tensors(batch, queries, 3, 8, 3, torch.float32), mode)
    leaves = {name: value.requires_grad_() for name, value in values.items()}

    def run() -> list[Tensor]:
        outputs = flat(**leaves, mode=mode, dropout_p=0.1, seed=torch.tensor(1))
        return [*outputs, *gradients(outputs, leaves)]

    assert_repeats(run)


@needs_kernels
@pytest.mark.usefixtures("nan_filled_memory")
def test_no_result_depends_on_uninitialised_memory() -> None:
    for sample in refractory_samples(torch.float32):
        check_sample(flat, flat_reference, sample)


@needs_kernels
@both_modes
def test_block_length_does_not_matter(mode: str) -> None:
    values = with_loads(tensors(2, 50, 7), mode)
    names = ("previous_load", "past_probabilities", "past_weights")
    loads = [values.pop(name, None) for name in names]
    forward = torch.ops.ember_ext.refractory_lif_attention_forward
    results = [
        forward(*values.values(), *loads, None, 0.0, mode == "look_ahead", 0.5, 1e-8, block)[:4]
        for block in (1, 7, 48, 1000)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_inputs_and_keeps_the_gates(dtype: torch.dtype) -> None:
    values = tensors(queries=20, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        actual = flat(**values)
    low = {n: v.to(dtype) if v.dim() == 4 else v for n, v in values.items()}
    assert [out.dtype for out in actual] == [dtype, *[torch.float32] * 3]
    for a, b in zip(actual, flat(**low), strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", dtype):
        assert flat(**tensors())[0].dtype == torch.float64


# What the modes mean.


def two_layers(values: dict[str, Tensor], mode: Any) -> Tensor:
    """Two layers, the second of which sees the first one's load."""
    out, load, _ = refractory_lif_attention(**values, mode=mode)
    values = values | {"query": out}
    return refractory_lif_attention(**values, mode=mode, previous_load=load)[0]


@both_modes
@pytest.mark.parametrize("batch", [3, 17])
def test_only_one_mode_looks_ahead(mode: str, batch: int) -> None:
    values = tensors(batch, 100)
    before = two_layers(values, mode)
    changed = {name: value.clone() for name, value in values.items()}
    for name in ("query", "key", "value"):
        changed[name][:, :, 66:] += torch.randn(batch, 2, 34, 4, dtype=torch.float64)
    difference = (two_layers(changed, mode) - before)[:, :, :66].abs().max()
    assert difference == 0 if mode == "causal" else difference > 1e-6


@both_modes
def test_load_is_what_it_says(mode: Any) -> None:
    values = tensors()
    _, load, state = refractory_lif_attention(**values, mode=mode)
    visible = visible_keys(values["query"], values["key"], None, True)
    p = attention_probabilities(values["query"], values["key"], visible, None)
    torch.testing.assert_close(state.probabilities, p.sum(2))
    assert load.shape == ((3, 9, 9) if mode == "causal" else (3, 1, 9))
    last = load[:, -1]
    torch.testing.assert_close(last, state.weights / 9)
    torch.testing.assert_close(last.sum(-1), torch.ones(3, dtype=torch.float64))


def test_parameters_can_be_filled_anew() -> None:
    gate = RefractoryParameters(3)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.fill_(9)
    gate.reset_parameters()
    assert before.keys() >= {"raw_within", "raw_across"}
    for name, value in gate.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_couplings_it_is_lif_attention() -> None:
    values = tensors()
    values["within"] = values["across"] = torch.zeros(2, dtype=torch.float64)
    load = torch.rand(3, 9, 9, dtype=torch.float64)
    out, _, _ = refractory_lif_attention(**values, previous_load=load)
    del values["within"], values["across"]
    torch.testing.assert_close(out, lif_attention(**values, is_causal=True))


@both_modes
def test_drops_the_weights_that_lif_attention_drops(mode: Any) -> None:
    values = tensors(17, 60)
    values["within"] = values["across"] = torch.zeros(2, dtype=torch.float64)
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor(3)}
    out, _, _ = refractory_lif_attention(**values, mode=mode, **options)
    del values["within"], values["across"]
    torch.testing.assert_close(out, lif_attention(**values, is_causal=True, **options))


def test_any_split_gives_the_whole_and_its_gradients() -> None:
    values = tensors(2, 60)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    out, load, state = refractory_lif_attention(**leaves)
    outs, loads, past = [], [], None
    borders = [0, 1, 50, 53, 60]
    for first, end in itertools.pairwise(borders):
        part = leaves | {"query": leaves["query"][:, :, first:end]}
        part |= {name: leaves[name][:, :, :end] for name in ("key", "value")}
        piece, piece_load, past = refractory_lif_attention(**part, past=past)
        outs.append(piece)
        loads.append(torch.nn.functional.pad(piece_load, (0, 60 - end)))
    assert past is not None
    whole, pieces = (out, load, *state), (torch.cat(outs, 2), torch.cat(loads, 1), *past)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(pieces, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(a, b)


# Extremes.


@both_modes
def test_without_heads_the_past_is_kept(mode: Any) -> None:
    query, key = torch.ones(2, 0, 3, 5), torch.ones(2, 0, 3 if mode == "look_ahead" else 7, 5)
    gates = [torch.ones(0)] * 5
    past = None
    if mode == "causal":
        past = RefractoryState(torch.ones(2, 0, 4), torch.rand(2, 4).requires_grad_())
    out, load, state = refractory_lif_attention(query, key, key, *gates, mode=mode, past=past)
    expected = reference.refractory_lif_attention(
        query, key, key, *gates, is_causal=True, mode=mode, past=past
    )
    for value, exact in zip(
        (out, load, *state), (expected[0], expected[1], *expected[2]), strict=True
    ):
        assert torch.equal(value, exact)
    if past is not None:
        assert torch.equal(state.weights[:, :4], past.weights)
        (grad,) = torch.autograd.grad(state.weights.sum(), past.weights)
        assert torch.equal(grad, torch.ones(2, 4))


@both_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_large_scores(mode: str, dtype: torch.dtype, scale: float) -> None:
    """Up to scores of 1e4 either way, with probabilities down to 0."""
    values = tensors(1, 40, size=8, dtype=torch.float32)
    values["query"] *= scale / 3
    values = {n: v.to(dtype) if v.dim() == 4 else v for n, v in values.items()}
    values["previous_load"] = torch.rand(1, 40, 40)
    scales = dict.fromkeys((f"d {name}" for name in values), 10.0)
    check_sample(flat, flat_reference, Sample(f"{scale}", values, {"mode": mode}, scales))


@both_modes
def test_tiny_probabilities_keep_their_gradients(mode: str) -> None:
    """A key of probability 1e-30 with a value of 1e30 counts as much as the others."""
    values = tensors(1, 1, 1, 1, 1, torch.float32)
    values["query"] = torch.ones(1, 1, 1, 1)
    values["key"] = torch.tensor([0.0, -69.0]).view(1, 1, 2, 1)
    values["value"] = torch.tensor([1.0, 1e30]).view(1, 1, 2, 1)
    values["previous_load"] = torch.full((1, 1, 2), 0.3)

    def run(operator: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        outputs = operator(**leaves, mode=mode)
        return [*outputs, *gradients(outputs, leaves)]

    exact = run(flat_reference, torch.float64)
    for actual, expected in zip(run(flat, torch.float32), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_nan_reaches_no_earlier_query() -> None:
    values = tensors(2, 60)
    values["query"][0, 1, 17] = math.nan
    out, load, _ = refractory_lif_attention(**values)
    bad = out.isnan().any(-1)
    assert bad[0, 1, 17]
    assert not bad[:, :, :17].any()
    assert not bad[1].any()
    assert not bad[0, 0].any()
    assert not load[:, :17].isnan().any()


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"is_causal": False}, ValueError, "is_causal must be True"),
        (
            {"mode": "other"},
            ValueError,
            "mode must be one of ['causal', 'look_ahead'], got 'other'",
        ),
        ({"within": torch.zeros(3)}, ValueError, "within must be [H] = [2], got [3]"),
        ({"across": torch.zeros(1)}, ValueError, "across must be [H] = [2], got [1]"),
        ({"across": 0.5}, TypeError, "across must be a torch.Tensor, got float"),
        ({"within": torch.ones(2).int()}, TypeError, "within must be float64, float32,"),
        ({"threshold": torch.zeros(3)}, ValueError, "threshold must be [H] = [2], got [3]"),
        ({"threshold": torch.tensor([0.0, math.inf])}, ValueError, "threshold must be finite"),
        ({"leak": torch.tensor([0.5, 1.5])}, ValueError, "leak must be within [0, 1], got 1.5"),
        ({"steepness": torch.zeros(2)}, ValueError, "steepness must be finite and > 0, got 0.0"),
        ({"key": torch.zeros(3, 2, 5, 4).double()}, ValueError, "value must be [B, G, Tk, D]"),
        (
            dict.fromkeys(("key", "value"), torch.zeros(3, 2, 5, 4).double()),
            ValueError,
            "key must be of at least as many tokens as query = 9, got 5",
        ),
        (
            dict.fromkeys(("key", "value"), torch.zeros(3, 3, 9, 4).double()),
            ValueError,
            "key must be of G heads with G a divisor of H = 2, got 3",
        ),
        ({"query": torch.zeros(3, 2, 9)}, ValueError, "query must be [batch, heads, tokens, head"),
        ({"previous_load": 1.0}, TypeError, "previous_load must be a torch.Tensor, got float"),
        (
            {"previous_load": torch.zeros(3, 2, 9)},
            ValueError,
            "previous_load must be [B, Tq, Tk] = [3, 9, 9], or 1 in any place, got [3, 2, 9]",
        ),
        ({"previous_load": torch.zeros(9, 9)}, ValueError, "or 1 in any place, got [9, 9]"),
        (
            {"previous_load": torch.zeros(1, 1, 1, device="meta")},
            ValueError,
            "previous_load must be on query's device cpu, got meta",
        ),
        ({"past": 1}, TypeError, "past must be a RefractoryState, got int"),
        (
            {
                "past": RefractoryState(torch.zeros(3, 2, 0), torch.zeros(3, 0)),
                "mode": "look_ahead",
            },
            ValueError,
            "past must be None in mode 'look_ahead'",
        ),
        (
            {"past": RefractoryState(torch.zeros(3, 2, 1), torch.zeros(3, 0))},
            ValueError,
            "past.probabilities must be [B, H, Tk - Tq] = [3, 2, 0], got [3, 2, 1]",
        ),
        (
            {"past": RefractoryState(torch.zeros(3, 2, 0), torch.zeros(3, 1))},
            ValueError,
            "past.weights must be [B, Tk - Tq] = [3, 0], got [3, 1]",
        ),
        (
            {"past": RefractoryState(torch.zeros(3, 2, 0).long(), torch.zeros(3, 0))},
            TypeError,
            "past.probabilities must be float64, float32,",
        ),
        (
            {"past": RefractoryState(torch.zeros(3, 2, 0), torch.zeros(3, 0, device="meta"))},
            ValueError,
            "past.weights must be on query's device cpu, got meta",
        ),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be within [0, 1), got 1.0"),
        ({"scale": 0.0}, ValueError, "scale must be finite and not 0, got 0.0"),
        ({"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        ({"seed": 3, "dropout_p": 0.1}, TypeError, "seed must be an int64 tensor, got int"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        refractory_lif_attention(**(tensors() | change))
    assert str(caught.value).startswith("ember_ext.refractory_lif_attention: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("package", [ops, reference])
@both_modes
def test_callers_say_that_attention_is_causal(package: Any, mode: Any) -> None:
    """Attention is not causal by default, and refractory thresholds are defined for causal only."""
    values = tensors()
    with pytest.raises(ValueError, match=r"ember_ext\.refractory_lif_attention: is_causal must be"):
        package.refractory_lif_attention(**values, mode=mode)
