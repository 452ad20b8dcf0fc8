"""The LTC scan against ncps and its reference: values, gradients, chunks, edge cases, errors."""

from __future__ import annotations

from typing import Any

import ncps.torch
import ncps.wirings
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ember_ext
from ember_ext import reference
from ember_ext.ops import LTCSynapses, LTCWeights, ltc_synapses
from ember_ext.testing import DTYPES, check_sample, flat_ltc, ltc_samples, ltc_weights

scan = flat_ltc(ember_ext.ltc_scan)
definition = flat_ltc(reference.ltc_scan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype) -> None:
    for sample in ltc_samples(dtype):
        check_sample(scan, definition, sample)


def ncps_cell(wiring: ncps.wirings.Wiring, **options: Any) -> nn.Module:
    """A cell of ncps in fp64, none of whose parameters has its initial 0 or 1."""
    cell: nn.Module = ncps.torch.LTCCell(wiring, None, **options).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return cell


def by_ncps(cell: Any, x: Tensor, h: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x.shape[1]):
        # A time span of its own for each row is what a cell takes; ncps.torch.LTC squeezes it.
        y, h = cell(x[:, t], h, 1.0 if spans is None else spans[:, t : t + 1])
        outputs.append(y)
    return torch.stack(outputs, 1), h


def by_definition(
    operator: Any, cell: Any, x: Tensor, h: Tensor, spans: Tensor | None
) -> tuple[Tensor, Tensor]:
    positive = cell.make_positive_fn
    own = {name: getattr(cell, name) for name in LTCWeights._fields}
    for name in ("cm", "gleak", "w", "sensory_w"):
        own[name] = positive(own[name])
    if hasattr(cell, "input_w"):
        x = x * cell.input_w
    if hasattr(cell, "input_b"):
        x = x + cell.input_b
    y, h = operator(
        x,
        LTCWeights(**own),
        h,
        synapses=ltc_synapses(cell.sparsity_mask, cell.sensory_sparsity_mask),
        timespans=1.0 if spans is None else spans,
        ode_unfolds=cell._ode_unfolds,
        eps=cell._epsilon,
        outputs=cell.motor_size,
    )
    if hasattr(cell, "output_w"):
        y = y * cell.output_w
    if hasattr(cell, "output_b"):
        y = y + cell.output_b
    return y, h


WIRINGS = (
    lambda units, motor, seed: ncps.wirings.AutoNCP(units + 4, motor, seed=seed + 1),
    lambda units, motor, seed: ncps.wirings.FullyConnected(units, motor, erev_init_seed=seed),
    lambda units, motor, seed: ncps.wirings.Random(units, motor, 0.5, random_seed=seed + 1),
)


@settings(max_examples=40, deadline=None)
@given(
    build=st.sampled_from(WIRINGS),
    shape=st.tuples(*(st.integers(1, n) for n in (4, 4, 6, 9))),
    motor=st.integers(1, 3),
    mapping=st.sampled_from(["affine", "linear", "none"]),
    unfolds=st.integers(1, 8),
    implicit=st.booleans(),
    varying=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_ncps(
    build: Any,
    shape: tuple[int, int, int, int],
    motor: int,
    mapping: str,
    unfolds: int,
    implicit: bool,
    varying: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, steps, inputs, units = shape
    wiring = build(units + motor, motor, seed)
    wiring.build(inputs)
    options = {"input_mapping": mapping, "output_mapping": mapping, "ode_unfolds": unfolds}
    cell = ncps_cell(wiring, implicit_param_constraints=implicit, **options)
    x = torch.randn(batch, steps, inputs, dtype=torch.float64, requires_grad=True)
    h = torch.randn(batch, wiring.units, dtype=torch.float64, requires_grad=True)
    spans = (0.1 + torch.rand(batch, steps, dtype=torch.float64)).requires_grad_()
    leaves = [x, h, *([spans] if varying else []), *cell.parameters()]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    expected = by_ncps(cell, x, h, spans if varying else None)
    weights = [torch.randn_like(value) for value in expected]
    slopes = torch.autograd.grad(expected, leaves, weights, allow_unused=True)
    for operator in (reference.ltc_scan, ember_ext.ltc_scan):
        actual = by_definition(operator, cell, x, h, spans if varying else None)
        own = torch.autograd.grad(actual, leaves, weights, allow_unused=True)
        for a, b in zip((*actual, *own), (*expected, *slopes), strict=True):
            if b is None:
                assert a is None
                continue
            bound = 1e-10 * max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=bound)


def test_absent_synapses_have_no_influence_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = ltc_weights(4, 9, generator)
    masks = {
        name: (torch.rand(sources, 9, generator=generator) < 0.4).float()
        for name, sources in (("mask", 9), ("sensory_mask", 4))
    }
    x = torch.randn(3, 5, 4, generator=generator)
    synapses = ltc_synapses(**masks)._asdict()
    expected = scan(x, **weights, **synapses)
    for name, value in weights.items():
        if value.dim() == 2:
            mask = masks["sensory_mask" if name.startswith("sensory") else "mask"]
            weights[name] = torch.where(mask == 1, value, float("nan"))
        weights[name].requires_grad_()
    actual = scan(x, **weights, **synapses)
    assert torch.equal(actual[0], expected[0])
    gradients = torch.autograd.grad(actual[0].square().sum(), list(weights.values()))
    for (name, value), gradient in zip(weights.items(), gradients, strict=True):
        if value.dim() == 2:
            assert (gradient[value.isnan()] == 0).all(), name
            assert gradient[~value.isnan()].isfinite().all(), name


BATCH, STEPS, INPUTS, UNITS = 3, 8, 4, 5
WEIGHTS = LTCWeights(**ltc_weights(INPUTS, UNITS, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, 4)}, ValueError, r"x must be \[B, T, I\], got \[3, 4\]"),
        ({"x": torch.ones(3, 8, 4).int()}, TypeError, "x must be float64, .*, got torch.int32"),
        ({"h0": torch.ones(5, 3)}, ValueError, r"h0 must be \[B, S\] = \[3, 5\], got \[5, 3\]"),
        ({"h0": torch.ones(3, 5, device="meta")}, ValueError, "h0 must be on x's device cpu"),
        ({"weights": None}, TypeError, "weights must be an LTCWeights, got NoneType"),
        (
            {"weights": WEIGHTS._replace(sensory_mu=torch.ones(5, 4))},
            ValueError,
            r"weights.sensory_mu must be \[I, S\] = \[4, 5\], got \[5, 4\]",
        ),
        (
            {"weights": WEIGHTS._replace(erev=torch.ones(5, 4))},
            ValueError,
            r"weights.erev must be \[S, S\] = \[5, 5\], got \[5, 4\]",
        ),
        ({"weights": WEIGHTS._replace(cm=torch.ones(()))}, ValueError, r"cm must be \[S\], got"),
        ({"synapses": torch.ones(5, 5)}, TypeError, "synapses must be None or an LTCSynapses"),
        (
            {"synapses": LTCSynapses(torch.ones(3, 2), torch.ones(3, 2))},
            TypeError,
            "synapses.recurrent must be an int64 tensor, got torch.float32",
        ),
        (
            {"synapses": LTCSynapses(torch.ones(2, 3).long(), torch.ones(3, 2).long())},
            ValueError,
            r"synapses.recurrent must be \[3, E\], got \[2, 3\]",
        ),
        ({"ode_unfolds": 0}, ValueError, "ode_unfolds must be an integer >= 1, got 0"),
        ({"ode_unfolds": 2.5}, ValueError, "ode_unfolds must be an integer >= 1, got 2.5"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0, got -1.0"),
        ({"outputs": 6}, ValueError, r"outputs must be within \[0, S\] = \[0, 5\], got 6"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be None or an integer >= 0, got -1"),
        (
            {"timespans": 0.0},
            ValueError,
            "timespans must be finite and > 0, as the cell divides by it, got 0.0",
        ),
        ({"timespans": -0.5}, ValueError, "timespans must be finite and > 0"),
        ({"timespans": float("nan")}, ValueError, "timespans must be finite and > 0, .*got nan"),
        ({"timespans": float("inf")}, ValueError, "timespans must be finite and > 0, .*got inf"),
        ({"timespans": torch.zeros(3, 8)}, ValueError, r"> 0, .*, got 0.0 at \[0, 0\]"),
        ({"timespans": torch.ones(8, 3)}, ValueError, r"= \[3, 8\], got \[8, 3\]"),
        ({"lengths": torch.tensor([1, 9, 2])}, ValueError, r"\[0, 8\], got 9 at index 1"),
    ],
    ids=str,
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.randn(BATCH, STEPS, INPUTS), "weights": WEIGHTS}
    with pytest.raises(error, match=r"ember_ext\.ltc_scan: .*" + message):
        ember_ext.ltc_scan(**arguments | changes)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ((None, torch.ones(4, 5)), TypeError, "mask must be a torch.Tensor, got NoneType"),
        ((torch.ones(5, 4), torch.ones(4, 5)), ValueError, r"mask must be \[S, S\], got \[5, 4\]"),
        (
            (torch.ones(5, 5), torch.ones(5, 4)),
            ValueError,
            r"sensory_mask must be \[I, S\] with S = 5, got \[5, 4\]",
        ),
        (
            (-torch.ones(5, 5), torch.ones(4, 5)),
            ValueError,
            r"mask must be of zeros and ones, got -1.0 at \[0, 0\]",
        ),
        (
            (torch.ones(5, 5), torch.full((4, 5), float("nan"))),
            ValueError,
            "sensory_mask must be of zeros and ones, got nan",
        ),
    ],
    ids=str,
)
def test_bad_masks(masks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"ember_ext\.ltc_synapses: " + message):
        ltc_synapses(*masks)
