"""The CfC scan's CUDA kernels: run on the CPU by the shim, and on a GPU with `pytest -m cuda`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import cuda_shim
import cuda_shim.cfc_scan
import pytest
import torch
from torch import Tensor

import ember_ext
from ember_ext import reference
from ember_ext.ops._cfc_checks import MAX_CUDA_LAYERS
from ember_ext.testing import DTYPES, Sample, check_sample
from ember_ext.testing.cfc_scan import cfc_samples, cfc_weights, check_padding, flat
from kernel_costs import LIMITS, WORKLOADS, short_name

on_shim = flat(cuda_shim.cfc_scan.cfc_scan)
operator = cuda_shim.operator_fixture(on_shim, flat(ember_ext.cfc_scan))
definition = flat(reference.cfc_scan)

PURE = {"mode": "pure"}

needs_compiler = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")


def sample(
    batch: int, steps: int, inputs: int, hidden: int, dtype: torch.dtype, **options: Any
) -> Sample:
    """A default cell, or as `cfc_weights` has it, with time spans that vary."""
    generator = torch.Generator().manual_seed(batch + steps + hidden)
    tensors = {
        "x": torch.randn(batch, steps, inputs, generator=generator),
        "h0": torch.randn(batch, hidden, generator=generator),
        "timespans": torch.rand(batch, steps, generator=generator),
        **cfc_weights(inputs, hidden, generator=generator, **options),
    }
    mode = {"mode": options["mode"]} if "mode" in options else {}
    name = f"{[batch, steps, inputs, hidden]} {options}"
    return Sample(name, {key: value.to(dtype) for key, value in tensors.items()}, mode)


def results(operator: Any, one: Sample, **options: Any) -> list[Tensor]:
    """Outputs and the gradients of a weighting of theirs."""
    leaves = {name: value.detach().requires_grad_() for name, value in one.tensors.items()}
    outputs = operator(**leaves, **one.options, **options)
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), weights)]


@pytest.mark.parametrize("chunk_size", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(operator: Any, dtype: torch.dtype, chunk_size: int) -> None:
    for one in cfc_samples(dtype):
        check_sample(functools.partial(operator, chunk_size=chunk_size), definition, one)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["default", "pure", "no_gate"])
@pytest.mark.parametrize("backbone", [(), (6, 6)], ids=str)
def test_padding_does_not_matter(mode: str, backbone: tuple[int, ...], value: float) -> None:
    for chunk_size in (0, 2):
        check_padding(on_shim, value, mode, backbone, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("batch", "steps", "inputs", "hidden", "options"),
    [
        (2, 2, 3, 530, {}),  # more units than threads
        (3, 2, 2, 5, {"backbone": (2060, 40)}),  # and more than threads and their columns
        (1, 3, 2, 130, {"mode": "pure"}),
        (
            5,
            2,
            3,
            192,
            {},
        ),  # from sm_90 on four blocks hold these weights, and eight not those of 530
        (2, 2, 67, 129, {"backbone": (70,)}),  # several tiles of the other products
        (1, 1, 1, 1, {"backbone": (3,) * MAX_CUDA_LAYERS}),
    ],
    ids=str,
)
def test_wide_and_deep_cells(
    operator: Any, batch: int, steps: int, inputs: int, hidden: int, options: dict[str, Any]
) -> None:
    one = sample(batch, steps, inputs, hidden, torch.float32, **options)
    # A gradient has been rounded by every map, there and back, where eager may happen to be exact.
    maps = 1 + len(options.get("backbone", ()))
    check_sample(operator, definition, one, floor_ulps=max(4.0, 2.0 * maps))


@needs_compiler
def test_no_more_layers_than_the_operator_lets_through() -> None:
    one = sample(1, 1, 1, 1, torch.float32, backbone=(3,) * (MAX_CUDA_LAYERS + 1))
    with pytest.raises(cuda_shim.KernelFaultError, match="the launcher returned 1"):
        on_shim(**one.tensors)


def test_many_rows(operator: Any) -> None:
    """So many that the tape is walked in chunks, and that gradients are summed in parts."""
    one = sample(1100, 17, 1, 2, torch.float16)
    # The sums over 18700 rows are of either sign.
    check_sample(operator, definition, Sample(one.name, one.tensors, one.options, scale=100.0))


@needs_compiler
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_launches_are_those_of_the_report(dtype: str, heads: int) -> None:
    options = {"mode": "pure"} if heads == 1 else {}
    one = sample(1, 1, 128, 192, torch.float64 if dtype == "double" else torch.float32, **options)
    if heads == 3:
        del one.tensors["timespans"]
    typical = {w.kernel: w for w in WORKLOADS if f"_kernel<{dtype}, {heads}>" in w.kernel}
    assert len(typical) == 2
    for architecture, limits in LIMITS.items():
        before = len(cuda_shim.operators().launches())
        with cuda_shim.shared_memory(limits.shared_per_block):
            results(on_shim, one)
        seen = set()
        for launch in cuda_shim.operators().launches()[before:]:
            if workload := typical.get(short_name(launch.kernel)):
                # Every slice of the weights has equally many rows there: up to three slices, of
                # 576 columns.
                unused = workload.shared_on(architecture) - launch.shared_bytes
                assert 0 <= unused < 8 * 3 * 576
                assert launch.threads == workload.threads
                seen.add(workload.kernel)
        assert seen == set(typical)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"mode": "pure"}, {"backbone": (40, 24)}], ids=str)
def test_results_do_not_depend_on_what_fits_in_shared_memory(options: dict[str, Any]) -> None:
    """From weights and states in global memory to all of them in shared memory."""
    limits = [34 << 10, *sorted({limits.shared_per_block for limits in LIMITS.values()})]
    for dtype in (torch.float32, torch.float64):
        one = sample(5, 3, 4, 190 if options else 90, dtype, **options)
        first: list[Tensor] = []
        used = set()
        for limit in limits:
            before = len(cuda_shim.operators().launches())
            with cuda_shim.shared_memory(limit):
                values = results(on_shim, one)
            launches = cuda_shim.operators().launches()[before:]
            used.add(max(launch.shared_bytes for launch in launches))
            # The same for every shape: launches by several host threads do not interfere.
            large = [launch for launch in launches if launch.shared_bytes > 48 << 10]
            assert {launch.allowed_bytes for launch in large} <= {limit}
            first = first or values
            for a, b in zip(first, values, strict=True):
                assert torch.equal(a, b)
        assert len(used) >= 4


# Batch, steps, inputs, hidden units, KiB of a block, the blocks of a cluster forward and backward,
# and what else. Units are no multiple of a cluster's blocks, and 21 are too few for 8 of them.
CLUSTER_CASES: list[tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]]] = [
    (6, 4, 3, 37, 28, (2, 4), {}),
    (1, 1, 3, 37, 20, (4, 8), {"lengths": True}),
    (5, 3, 0, 37, 12, (4, 8), {"heads": 3, "lengths": True}),
    (5, 3, 2, 37, 23, (2, 2), {"heads": 3}),
    (3, 3, 4, 53, 12, (4, 4), {"mode": "pure", "lengths": True}),
    (1, 2, 4, 90, 17, (8, 8), {"mode": "pure"}),
    (3, 3, 2, 45, 16, (4, 8), {"backbone": (23, 23), "dropout": True, "masked": True}),
    (4, 5, 2, 21, 9, (2, 8), {"lengths": True, "mode": "no_gate"}),
    (1, 2, 2, 29, 11, (8, 8), {"backbone": (37,), "activation": "silu"}),
    (1, 1, 2, 90, 40, (8, 8), {}),  # not even 8 blocks hold these weights
]


def cluster_sample(case: Any, dtype: torch.dtype) -> Sample:
    batch, steps, inputs, hidden, _, _, options = case
    weights = {k: v for k, v in options.items() if k in ("mode", "backbone", "masked")}
    one = sample(batch, steps, inputs, hidden, dtype, **weights)
    if "activation" in options:
        one.options["activation"] = options["activation"]
    if options.get("heads") == 3:
        del one.tensors["timespans"]
    if options.get("masked"):
        one.options["mask"] = one.tensors.pop("mask")
    if options.get("dropout"):
        scale = torch.rand(batch, steps, 1, options["backbone"][0]) < 0.5
        one.options["dropout_scale"] = 2 * scale.float()
    if options.get("lengths"):
        one.options["lengths"] = (torch.arange(batch) * 3 + 1) % (steps + 1)
    return one


def recurrences(since: int) -> dict[str, set[int]]:
    """The recurrent kernels that have run since a launch, and the sizes of their clusters."""
    sizes: dict[str, set[int]] = {}
    for launch in cuda_shim.operators().launches()[since:]:
        if "ward_kernel" in launch.kernel:
            sizes.setdefault(short_name(launch.kernel), set()).add(launch.cluster)
    return sizes


@contextlib.contextmanager
def clusters(kilobytes: int, most_blocks: int = 8) -> Iterator[None]:
    """A GPU with clusters whose blocks have so much shared memory."""
    with cuda_shim.shared_memory(kilobytes << 10), cuda_shim.clusters(most_blocks):
        yield


@needs_compiler
@pytest.mark.parametrize("case", CLUSTER_CASES, ids=str)
def test_clusters_match_reference(case: Any) -> None:
    """Cells that one block cannot hold, where there are clusters."""
    *_, kilobytes, blocks, _ = case
    one = cluster_sample(case, torch.float32)
    before = len(cuda_shim.operators().launches())
    with clusters(kilobytes):
        for chunk_size in (0, 2):
            scan = functools.partial(on_shim, chunk_size=chunk_size)
            check_sample(scan, definition, one)
    for kernel, sizes in recurrences(before).items():
        assert sizes == {blocks["backward" in kernel]}, kernel


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instance_runs_in_clusters(dtype: torch.dtype) -> None:
    before = len(cuda_shim.operators().launches())
    for hidden, kilobytes, options in ((37, 29, {}), (37, 23, {"heads": 3}), (53, 14, PURE)):
        case = (3, 2, 2, hidden, 0, (), options)
        with clusters(kilobytes * (5 if dtype == torch.float64 else 3) // 3, 2):
            check_sample(on_shim, definition, cluster_sample(case, dtype))
    assert list(recurrences(before).values()) == [{2}] * 6


@needs_compiler
def test_clusters_are_for_cells_that_a_block_cannot_hold() -> None:
    """On an H100 that is a dense cell of 192 units, but not one of 96."""
    for hidden, most_blocks, size in ((96, 8, 1), (192, 8, 4), (192, 2, 2), (192, 1, 1)):
        one = sample(1, 1, 1, hidden, torch.float32)
        del one.tensors["timespans"]
        before = len(cuda_shim.operators().launches())
        with clusters(227, most_blocks):
            results(on_shim, one)
        assert list(recurrences(before).values()) == [{size}] * 2


@needs_compiler
def test_the_driver_is_asked_about_clusters_once_for_each_device() -> None:
    questions = cuda_shim.operators().library.cuda_shim_cluster_questions
    one = cluster_sample((1, 2, 2, 37, 0, (), {}), torch.float32)
    for most_blocks in (8, 2):
        asked = []
        # No other test has this device.
        with cuda_shim.shared_memory((28 << 10) + 528), cuda_shim.clusters(most_blocks):
            for _ in range(2):
                before = questions()
                results(on_shim, one)
                asked.append(questions() - before)
        assert asked[0] > 0
        assert asked[1] == 0


@needs_compiler
def test_results_in_clusters_do_not_depend_on_what_fits_in_shared_memory() -> None:
    one = sample(5, 3, 2, 37, torch.float32)
    first: list[Tensor] = []
    used = set()
    for kilobytes in (19, 21, 23, 25, 28):
        before = len(cuda_shim.operators().launches())
        with clusters(kilobytes, 2):
            values = results(on_shim, one)
        assert list(recurrences(before).values()) == [{2}] * 2
        launches = cuda_shim.operators().launches()[before:]
        used.add(max(launch.shared_bytes for launch in launches))
        first = first or values
        for a, b in zip(first, values, strict=True):
            assert torch.equal(a, b)
    assert len(used) >= 4


@needs_compiler
def test_clusters_and_splits_and_inference() -> None:
    """A sequence in pieces, and without a tape, gives the same bits in clusters, too."""
    tensors = sample(3, 5, 2, 37, torch.float32).tensors
    with clusters(28):
        trained = results(on_shim, Sample("", tensors, {}))[:2]
        whole, last = on_shim(**tensors)
        x, h, spans = (tensors.pop(name) for name in ("x", "h0", "timespans"))
        pieces = []
        for part, dt in zip(x.split(2, 1), spans.split(2, 1), strict=True):
            y, h = on_shim(x=part, h0=h, timespans=dt, **tensors)
            pieces.append(y)
    for a, b, c in zip(trained, (whole, last), (torch.cat(pieces, 1), h), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_does_not_matter_in_clusters(value: float) -> None:
    one = cluster_sample((4, 3, 2, 37, 0, (), {"lengths": True}), torch.float32)
    options = {**one.options, "chunk_size": 2}
    with clusters(29):
        clean = results(on_shim, Sample("", one.tensors, options))
        for row, length in enumerate(one.options["lengths"]):
            one.tensors["x"][row, length:] = value
            one.tensors["timespans"][row, length:] = value
        spoilt = results(on_shim, Sample("", one.tensors, options))
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)


def test_inference_equals_training(operator: Any) -> None:
    for one in cfc_samples(torch.float32):
        trained = results(operator, one)[:2]
        for a, b in zip(trained, operator(**one.tensors, **one.options), strict=True):
            assert torch.equal(a, b), one.name


def test_any_split_of_a_sequence_equals_the_whole(operator: Any) -> None:
    tensors = sample(3, 12, 5, 21, torch.float32).tensors
    whole, last = operator(**tensors)
    x, h, spans = (tensors.pop(name) for name in ("x", "h0", "timespans"))
    pieces = []
    for part, dt in zip(x.split(5, 1), spans.split(5, 1), strict=True):
        y, h = operator(x=part, h0=h, timespans=dt, **tensors)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(h, last)


def test_padding_has_no_influence_and_gets_no_gradient(operator: Any) -> None:
    one = sample(4, 9, 3, 6, torch.float32, backbone=(5,))
    lengths = torch.tensor([9, 0, 4, 7])
    clean = results(operator, one, lengths=lengths)
    for row, length in enumerate(lengths):
        one.tensors["x"][row, length:] = float("inf")
    spoilt = results(operator, one, lengths=lengths)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)
    y, _, grad_x, *_ = spoilt
    for row, length in enumerate(lengths):
        assert (y[row, length:] == 0).all()
        assert (grad_x[row, length:] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(operator: Any, value: float) -> None:
    tensors = sample(9, 4, 3, 9, torch.float32).tensors
    clean, _ = operator(**tensors)
    tensors["x"][2, 1, 0] = value
    y, _ = operator(**tensors)
    others = torch.arange(9) != 2
    assert torch.equal(y[others], clean[others])
    assert torch.equal(y[2, 0], clean[2, 0])


def test_no_steps_keep_the_state(operator: Any) -> None:
    one = sample(2, 0, 3, 4, torch.float32)
    for chunk_size in (0, 2):
        y, last, _, grad_h0, _, *grad_weights = results(operator, one, chunk_size=chunk_size)
        assert y.shape == (2, 0, 4)
        assert torch.equal(last, one.tensors["h0"])
        assert torch.equal(grad_h0, torch.linspace(-1, 1, 8).view(2, 4))
        assert all((gradient == 0).all() for gradient in grad_weights)


def test_only_what_is_asked_for_is_differentiated(operator: Any) -> None:
    one = sample(3, 4, 3, 5, torch.float32, mode="pure", backbone=(4,))
    whole = results(operator, one)[2:]
    for (name, value), expected in zip(one.tensors.items(), whole, strict=True):
        leaf = value.clone().requires_grad_()
        outputs = operator(**one.tensors | {name: leaf}, **one.options)
        weights = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
        (gradient,) = torch.autograd.grad(outputs, leaf, weights)
        assert torch.equal(gradient, expected), name


def test_every_kernel_ran() -> None:
    cuda_shim.assert_all_kernels_ran("cfc_scan")
