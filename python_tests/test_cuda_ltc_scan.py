"""The LTC scan's CUDA kernels: run on the CPU by the shim, and on a GPU with `pytest -m cuda`."""

from __future__ import annotations

import functools
from typing import Any

import cuda_shim
import cuda_shim.ltc_scan
import pytest
import torch
from torch import Tensor

import ember_ext
from ember_ext import reference
from ember_ext.ops import ltc_synapses
from ember_ext.testing import DTYPES, Sample, check_sample
from ember_ext.testing.ltc_scan import flat_ltc, ltc_samples, ltc_weights
from kernel_costs import LTC_NETWORKS, WORKLOADS, LTCNetwork, short_name

on_shim = flat_ltc(cuda_shim.ltc_scan.ltc_scan)
operator = cuda_shim.operator_fixture(on_shim, flat_ltc(ember_ext.ltc_scan))
definition = flat_ltc(reference.ltc_scan)

needs_compiler = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")


def sample(
    batch: int,
    steps: int,
    inputs: int,
    units: int,
    dtype: torch.dtype = torch.float32,
    share: float = 0.5,
    **options: Any,
) -> Sample:
    """A network with this share of all synapses, and time spans that vary."""
    generator = torch.Generator().manual_seed(batch + steps + units)
    tensors = {
        "x": torch.randn(batch, steps, inputs, generator=generator),
        "h0": torch.randn(batch, units, generator=generator),
        "timespans": 0.1 + torch.rand(batch, steps, generator=generator),
        **ltc_weights(inputs, units, generator),
    }
    masks = (torch.rand(n, units, generator=generator) < share for n in (units, inputs))
    options = ltc_synapses(*masks)._asdict() | {"ode_unfolds": 3} | options
    name = f"{[batch, steps, inputs, units]} share={share}"
    return Sample(name, {key: value.to(dtype) for key, value in tensors.items()}, options)


def results(operator: Any, one: Sample, **options: Any) -> list[Tensor]:
    """Outputs and the gradients of a weighting of theirs."""
    leaves = {name: value.detach().requires_grad_() for name, value in one.tensors.items()}
    outputs = operator(**leaves, **one.options | options)
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), weights)]


def launches_of(one: Sample, **options: Any) -> tuple[list[cuda_shim.Launch], list[Tensor]]:
    """What the shim launches for a sample forward and backward, and the results."""
    before = len(cuda_shim.operators().launches())
    values = results(on_shim, one, **options)
    return cuda_shim.operators().launches()[before:], values


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(operator: Any, dtype: torch.dtype, chunk_size: int) -> None:
    for one in ltc_samples(dtype):
        check_sample(functools.partial(operator, chunk_size=chunk_size), definition, one)


@pytest.mark.parametrize("unfolds", range(1, 9))
def test_any_number_of_solver_steps(operator: Any, unfolds: int) -> None:
    one = sample(3, 4, 3, 5, torch.float64, ode_unfolds=unfolds, outputs=4)
    check_sample(functools.partial(operator, chunk_size=unfolds % 3), definition, one)


@pytest.mark.parametrize(
    ("units", "share", "dtype"),
    [
        (11, 0.5, torch.float32),  # pieces of 4 synapses
        (64, 1.0, torch.float32),  # of 8, as many as registers hold
        (65, 1.0, torch.float32),  # more than that
        (44, 0.8, torch.float64),
        (46, 1.0, torch.float64),
        (520, 0.002, torch.float32),  # more units than threads
        (520, 0.002, torch.float16),
        (520, 0.002, torch.bfloat16),
    ],
    ids=str,
)
def test_networks_of_any_size(operator: Any, units: int, share: float, dtype: torch.dtype) -> None:
    one = sample(2, 2, 3, units, dtype, share, ode_unfolds=2)
    check_sample(operator, definition, one)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_what_fits_in_shared_memory(dtype: torch.dtype) -> None:
    """From all of a block's arrays in shared memory to none."""
    units, share = (300, 0.08) if dtype == torch.float32 else (150, 0.2)
    one = sample(1, 2, 2, units, dtype, share, ode_unfolds=1)
    used = set()
    first: list[Tensor] = []
    for limit in (227 << 10, 40 << 10, 9 << 10):
        with cuda_shim.shared_memory(limit):
            launches, values = launches_of(one)
        used.add(max(x.shared_bytes for x in launches if "backward" in x.kernel))
        first = first or values
        for a, b in zip(first, values, strict=True):
            assert torch.equal(a, b)
    assert len(used) == 3


def test_many_rows(operator: Any) -> None:
    """So many that the steps are worked on in several stretches, and sums have several parts."""
    one = sample(1100, 4, 1, 2, torch.float16, 1.0, ode_unfolds=9)
    check_sample(operator, definition, Sample(one.name, one.tensors, one.options, scale=100.0))


@needs_compiler
def test_a_chunk_takes_one_launch_of_each_scan() -> None:
    one = sample(3, 7, 2, 4)
    for chunk_size, forward, backward in ((0, 1, 1), (3, 3 + 3, 3), (7, 1 + 1, 1)):
        launches, _ = launches_of(one, chunk_size=chunk_size)
        kernels = [launch.kernel for launch in launches]
        orders = len(cuda_shim.ORDERS)
        assert sum("ltc_scan_forward" in kernel for kernel in kernels) == orders * forward
        assert sum("ltc_scan_backward" in kernel for kernel in kernels) == orders * backward


@needs_compiler
@pytest.mark.parametrize("network", LTC_NETWORKS, ids=lambda network: network.name)
def test_launches_are_those_of_the_report(network: LTCNetwork) -> None:
    one = sample(1, 1, 2, network.units, torch.float16, ode_unfolds=1)
    order = torch.randperm(network.units**2, generator=torch.Generator().manual_seed(0))
    mask = (order < network.recurrent).view(network.units, network.units)
    one.options["recurrent"] = ltc_synapses(mask, mask[:2]).recurrent
    launches, _ = launches_of(one)
    typical = {w.kernel: w for w in WORKLOADS if network.name in w.shape and "ward" in w.kernel}
    seen = set()
    for launch in launches:
        if workload := typical.get(short_name(launch.kernel)):
            assert (launch.threads, launch.shared_bytes) == (
                workload.threads,
                workload.shared_bytes,
            )
            seen.add(workload.kernel)
    assert seen == {kernel for kernel in typical if "<__half" in kernel}


def test_inference_equals_training(operator: Any) -> None:
    for one in ltc_samples(torch.float32):
        trained = results(operator, one)[:2]
        for a, b in zip(trained, operator(**one.tensors, **one.options), strict=True):
            assert torch.equal(a, b), one.name


def test_any_split_of_a_sequence_equals_the_whole(operator: Any) -> None:
    one = sample(3, 12, 5, 21)
    tensors = dict(one.tensors)
    whole, last = operator(**tensors, **one.options)
    x, h, spans = (tensors.pop(name) for name in ("x", "h0", "timespans"))
    pieces = []
    for part, dt in zip(x.split(5, 1), spans.split(5, 1), strict=True):
        y, h = operator(x=part, h0=h, timespans=dt, **tensors, **one.options)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(h, last)


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_what_lies_beyond_a_row_has_no_influence(operator: Any, chunk_size: int) -> None:
    one = sample(4, 9, 3, 6)
    lengths = torch.tensor([9, 0, 4, 7])
    run = functools.partial(results, operator, lengths=lengths, chunk_size=chunk_size)
    clean = run(one)
    for row, length in enumerate(lengths):
        one.tensors["x"][row, length:] = float("nan")
        one.tensors["timespans"][row, length:] = float("nan")
    spoilt = run(one)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)
    y, last, grad_x, grad_h0, grad_timespans, *_ = spoilt
    assert torch.equal(last[1], one.tensors["h0"][1])
    assert torch.equal(grad_h0[1], torch.linspace(-1, 1, last.numel()).view(last.shape)[1])
    for row, length in enumerate(lengths):
        for value in (y, grad_x, grad_timespans):
            assert (value[row, length:] == 0).all()


def test_absent_synapses_have_no_influence_and_a_gradient_of_zero(operator: Any) -> None:
    one = sample(3, 4, 5, 6, share=0.3)
    clean = results(operator, one)
    absent = {}
    for prefix, name in (("", "recurrent"), ("sensory_", "sensory")):
        source, target, _ = one.options[name]
        for weight in ("w", "mu", "sigma", "erev"):
            mask = torch.ones_like(one.tensors[prefix + weight], dtype=torch.bool)
            mask[source, target] = False
            one.tensors[prefix + weight][mask] = float("nan")
            absent[prefix + weight] = mask
    spoilt = results(operator, one)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)
    named = dict(zip(one.tensors, spoilt[2:], strict=True))
    for name, mask in absent.items():
        assert (named[name][mask] == 0).all()
        assert (named[name][~mask] != 0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(operator: Any, value: float) -> None:
    one = sample(9, 4, 3, 9)
    clean, _ = operator(**one.tensors, **one.options)
    one.tensors["x"][2, 1, 0] = value
    y, _ = operator(**one.tensors, **one.options)
    others = torch.arange(9) != 2
    assert torch.equal(y[others], clean[others])
    assert torch.equal(y[2, 0], clean[2, 0])


def test_large_potentials_saturate(operator: Any) -> None:
    """Of open and closed synapses nothing comes back, however large what would multiply it."""
    one = sample(2, 3, 4, 7)
    one.tensors["x"] *= 1e30
    check_sample(operator, definition, Sample(one.name, one.tensors, one.options, scale=1.0))


def test_no_steps_keep_the_state(operator: Any) -> None:
    one = sample(2, 0, 3, 4)
    for chunk_size in (0, 2):
        y, last, _, grad_h0, _, *grad_weights = results(operator, one, chunk_size=chunk_size)
        assert y.shape == (2, 0, 4)
        assert torch.equal(last, one.tensors["h0"])
        assert torch.equal(grad_h0, torch.linspace(-1, 1, 8).view(2, 4))
        assert all((gradient == 0).all() for gradient in grad_weights)


def test_only_what_is_asked_for_is_differentiated(operator: Any) -> None:
    one = sample(3, 4, 3, 5)
    whole = results(operator, one)[2:]
    for (name, value), expected in zip(one.tensors.items(), whole, strict=True):
        leaf = value.clone().requires_grad_()
        outputs = operator(**one.tensors | {name: leaf}, **one.options)
        weights = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
        (gradient,) = torch.autograd.grad(outputs, leaf, weights)
        assert torch.equal(gradient, expected), name


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("ltc_scan")
