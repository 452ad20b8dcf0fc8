"""The CfC scan against its reference: values, gradients, chunks, edge cases, errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import ember_ext
from ember_ext import _native, reference
from ember_ext.ops import Affine, CfCWeights
from ember_ext.ops._cfc_packing import PackedCells
from ember_ext.testing import DTYPES, Sample, check_sample
from ember_ext.testing.cfc_scan import cfc_samples, cfc_weights, check_padding, flat

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")

scan = flat(ember_ext.cfc_scan)
definition = flat(reference.cfc_scan)


def example(
    batch: int = 3,
    steps: int = 8,
    inputs: int = 4,
    hidden: int = 5,
    *,
    seed: int = 7,
    **options: Any,
) -> dict[str, Tensor]:
    """Differentiable fp32 arguments of `scan`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": torch.randn(batch, steps, inputs, generator=generator),
        "h0": torch.randn(batch, hidden, generator=generator),
        **cfc_weights(inputs, hidden, generator=generator, **options),
    }
    return {name: value.requires_grad_(name != "mask") for name, value in tensors.items()}


def results(
    tensors: dict[str, Tensor], operator: Callable[..., Any] = scan, **options: Any
) -> list[Tensor]:
    """Outputs of `scan` and all gradients of a weighting of theirs."""
    outputs = operator(**tensors, **options)
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outputs]
    leaves = [t for t in tensors.values() if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, chunk_size: int | None) -> None:
    for sample in cfc_samples(dtype):
        check_sample(functools.partial(scan, chunk_size=chunk_size), definition, sample)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["default", "pure", "no_gate"])
@pytest.mark.parametrize("backbone", [(), (6,), (6, 6)], ids=str)
def test_padding_does_not_matter(mode: str, backbone: tuple[int, ...], value: float) -> None:
    for operator in (
        definition,
        functools.partial(scan, chunk_size=0),
        functools.partial(scan, chunk_size=2),
    ):
        check_padding(operator, value, mode, backbone)


def test_lengths_of_any_integer_type() -> None:
    tensors = example()
    expected = scan(**tensors, lengths=torch.tensor([3, 0, 8]))
    dtypes = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16)
    for lengths in (
        [3, 0, 8],
        (np.int32(3), 0, 8),
        np.array([3, 0, 8], dtype=np.uint16),
        *(torch.tensor([3, 0, 8]).to(dtype) for dtype in dtypes),
    ):
        for actual, value in zip(scan(**tensors, lengths=lengths), expected, strict=True):
            assert torch.equal(actual, value)
    empty = {name: t[:0] if name in ("x", "h0") else t for name, t in tensors.items()}
    assert scan(**empty, lengths=[])[0].shape == (0, 8, 5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_gpu(dtype: torch.dtype) -> None:
    assert _native.has("cuda")
    for sample in cfc_samples(dtype):
        check_sample(scan, definition, sample.to("cuda"))


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str, run_with_isa: Callable[[str, str], None]) -> None:
    # Without fused multiply-adds tanh is off by up to 6.5 units in the last place.
    floor = 8.0 if isa == "baseline" else None
    code = f"""
import torch
from ember_ext import cfc_scan, reference
from ember_ext.testing import check_sample
from ember_ext.testing.cfc_scan import cfc_samples, flat
for dtype in (torch.float64, torch.float32):
    for sample in cfc_samples(dtype):
        floor = {floor} if dtype == torch.float32 else None
        check_sample(flat(cfc_scan), flat(reference.cfc_scan), sample, floor_ulps=floor)
"""
    run_with_isa(isa, code)


def test_inference_equals_training() -> None:
    for sample in cfc_samples(torch.float32):
        trained = scan(
            **{k: v.clone().requires_grad_() for k, v in sample.tensors.items()}, **sample.options
        )
        for a, b in zip(trained, scan(**sample.tensors, **sample.options), strict=True):
            assert torch.equal(a, b), sample.name


@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
@pytest.mark.parametrize("spans", ["scalar", "rows"])
def test_gradcheck(mode: str, spans: str) -> None:
    tensors = {
        name: value.detach().double()
        for name, value in example(2, 5, 2, 3, mode=mode, backbone=(3,), masked=True).items()
    }
    options = {"mask": tensors.pop("mask"), "mode": mode, "chunk_size": 2 if spans == "rows" else 0}
    shape = (2, 5, 1) if spans == "rows" else ()
    generator = torch.Generator().manual_seed(9)
    tensors["timespans"] = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    lengths = torch.tensor([5, 3])

    def call(*values: Tensor) -> Any:
        named = dict(zip(tensors, values, strict=True))
        return scan(**named, **options, lengths=lengths)

    leaves = tuple(value.requires_grad_() for value in tensors.values())
    assert torch.autograd.gradcheck(call, leaves)


@needs_kernels
@pytest.mark.parametrize("backbone", [(), (16,), (1, 33)], ids=str)
@pytest.mark.parametrize(("mode", "spans", "heads"), [(0, False, 3), (0, True, 4), (1, True, 1)])
def test_fake_kernels_know_every_size(
    mode: int, spans: bool, heads: int, backbone: tuple[int, ...]
) -> None:
    for batch, steps, inputs, hidden in ((1, 0, 1, 15), (2, 3, 0, 16), (3, 2, 31, 17)):
        widths = (inputs + hidden, *backbone)
        outs = (*backbone, heads * hidden)
        maps = [torch.zeros(out, 1 + width) for out, width in zip(outs, widths, strict=True)]
        decay = [torch.zeros(2, hidden)] if mode == 1 else []
        dt = torch.ones(batch, steps) if spans else None
        x, h0 = torch.zeros(batch, steps, inputs), torch.zeros(batch, hidden)
        rest = (dt, None, None, *(decay or [None]), mode, 0)
        plan = [0, mode, inputs, hidden, heads, len(maps), *backbone]
        operators = torch.ops.ember_ext
        for operator, arguments in (
            (operators.cfc_scan_forward, (x, h0, maps, *rest, 0)),
            (operators.cfc_scan_forward, (x, h0, maps, *rest, 2)),
            (operators.cfc_scan_pack, (maps + decay, plan)),
        ):
            real = operator(*arguments)
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = operator(*arguments)
            for a, b in zip(tree_leaves(real), tree_leaves(fake), strict=True):
                assert isinstance(b, FakeTensor)
                assert a.shape == b.shape, (operator, plan)


@needs_kernels
@pytest.mark.parametrize("chunk", [-1, 0, 3])
@pytest.mark.parametrize("spans", [False, True])
def test_opcheck(chunk: int, spans: bool) -> None:
    x, h0 = torch.randn(2, 5, 3), torch.randn(2, 4)
    weights = [torch.randn(6, 8), torch.randn(16 if spans else 12, 7)]
    dt = torch.rand(2, 5) if spans else None
    arguments = (x, h0, weights, dt, torch.tensor([5, 2]), None, None, 0, 0, chunk)
    operators = torch.ops.ember_ext
    # The saved tensor has no gradient, and padding that is not written and that nothing reads.
    partly = ("test_schema", "test_autograd_registration", "test_faketensor")
    everything = (*partly, "test_aot_dispatch_dynamic")
    utils = partly if chunk == 0 else everything
    torch.library.opcheck(operators.cfc_scan_forward.default, arguments, test_utils=utils)
    if chunk < 0:
        return
    y, h_last, saved = operators.cfc_scan_forward(*arguments)
    torch.library.opcheck(
        operators.cfc_scan_backward.default,
        (y, h_last, saved, x, weights, *arguments[3:], True, True),
    )
    leaves = [t.clone().requires_grad_() for t in (x, h0, *weights)]
    torch.library.opcheck(
        operators.cfc_scan.default,
        (leaves[0], leaves[1], leaves[2:], *arguments[3:]),
        test_utils=partly,
    )


def test_chunks_change_no_result() -> None:
    tensors = example(5, 13, 6, 18, backbone=(9,))
    whole = results(tensors, chunk_size=0)
    precise = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
    expected = results(precise, chunk_size=0)
    for chunk_size in (1, 4, 13, 99, sys.maxsize):
        chunked = results(tensors, chunk_size=chunk_size)
        # Only the weights' gradients are sums over steps, whose order depends on the chunk.
        for a, b in zip(whole[:4], chunked[:4], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(expected, results(precise, chunk_size=chunk_size), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_any_split_of_a_sequence_equals_the_whole(cut: int) -> None:
    tensors = {name: value.detach() for name, value in example(3, 12, 5, 21).items()}
    whole, last = scan(**tensors)
    x, h0 = tensors.pop("x"), tensors.pop("h0")
    first, h = scan(x[:, :cut], h0=h0, **tensors)
    second, h = scan(x[:, cut:], h0=h, **tensors)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(h, last)


def test_padding_has_no_influence_and_gets_no_gradient() -> None:
    tensors = example(4, 9, 3, 6)
    lengths = torch.tensor([9, 0, 4, 7])
    x = tensors["x"].detach().clone()
    for row, length in enumerate(lengths):
        x[row, length:] = float("inf")
    y, last = scan(**tensors | {"x": x.requires_grad_()}, lengths=lengths)
    (gradient,) = torch.autograd.grad([y.sum() + last.sum()], x)
    for row, length in enumerate(lengths.tolist()):
        alone = {k: v[row : row + 1] if k in ("x", "h0") else v for k, v in tensors.items()}
        alone["x"] = alone["x"][:, :length]
        own, own_last = scan(**alone)
        torch.testing.assert_close(y[row, :length], own[0])
        torch.testing.assert_close(last[row], own_last[0])
        assert (y[row, length:] == 0).all()
        assert (gradient[row, length:] == 0).all()


@needs_kernels
def test_repeats_to_the_bit(assert_repeats: Callable[[Callable[[], list[Tensor]]], None]) -> None:
    for tensors in (
        example(67, 9, 5, 35, backbone=(33,)),
        example(1, 40, 7, 19),
        # Fewer rows than threads, and layers that are wide enough to be shared among those.
        example(1, 40, 70, 165, backbone=(129, 140)),
        example(2, 35, 0, 190),
    ):
        assert_repeats(functools.partial(results, tensors))
        assert_repeats(functools.partial(results, tensors, chunk_size=11))


@needs_kernels
@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
@pytest.mark.parametrize("spans", [False, True])
def test_one_row_shared_by_threads_equals_many_rows(mode: str, spans: bool) -> None:
    tensors = example(3, 70, 50, 200, mode=mode, backbone=(130,) if spans else ())
    if spans:
        tensors["timespans"] = torch.rand(3, 70).requires_grad_()
    lengths = torch.tensor([70, 33, 0])
    whole = scan(**tensors, mode=mode, lengths=lengths)
    per_row = ("x", "h0", "timespans")
    leaves = {name: tensors[name] for name in per_row if name in tensors}
    gradients = torch.autograd.grad([whole[0].square().sum() + whole[1].sum()], leaves.values())
    for row in range(3):
        one = {k: v[row : row + 1] if k in per_row else v for k, v in tensors.items()}
        alone = scan(**one, mode=mode, lengths=lengths[row : row + 1])
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0], b[row])
        own = torch.autograd.grad(
            [alone[0].square().sum() + alone[1].sum()], [one[name] for name in leaves]
        )
        for a, b in zip(own, gradients, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=1e-5, atol=1e-6)


@needs_kernels
def test_threads_that_share_a_row_get_on_while_the_machine_is_busy() -> None:
    tensors = {name: value.detach() for name, value in example(1, 300, 20, 180).items()}
    expected, _ = scan(**tensors)
    threads = torch.get_num_threads()

    def run() -> bool:
        torch.set_num_threads(3)
        return all(torch.equal(scan(**tensors)[0], expected) for _ in range(5))

    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(call.result(timeout=60) for call in [pool.submit(run) for _ in range(6)])
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.usefixtures("nan_filled_memory")
def test_no_result_depends_on_uninitialised_memory() -> None:
    for index, sample in enumerate(cfc_samples(torch.float32)):
        chunked = functools.partial(scan, chunk_size=2 * (index % 2))
        check_sample(chunked, definition, sample)


def test_long_sequences_keep_their_accuracy_in_bounded_memory() -> None:
    tensors = example(2, 4096, 3, 6)
    exact = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
    for a, b in zip(results(tensors), results(exact), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max())
        )
    if not _native.has("cpu"):
        return
    saved: list[int] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        scan(**tensors)
    assert max(saved) < 2 * 4096 * 10


@needs_kernels
def test_compiles_whole_and_once_for_all_shapes() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    weights = {k: v for k, v in example(backbone=(6,)).items() if k not in ("x", "h0")}

    def model(x: Tensor, dt: Tensor) -> Tensor:
        y, last = scan(x * 2, timespans=dt, **weights)
        return y.square().sum() + last.sum()

    for backend in (count, "aot_eager"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for batch, steps in ((4, 5), (3, 7), (8, 2), (5, 11)):
            x, dt = torch.randn(batch, steps, 4, requires_grad=True), torch.rand(batch, steps)
            leaves = (x, *weights.values())
            expected = torch.autograd.grad(model(x, dt), leaves)
            actual = torch.autograd.grad(compiled(x, dt), leaves)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)
    assert graphs <= 2, "one graph for the first shape, one for all others"


def test_autocast_rounds_matrices_and_keeps_the_rest() -> None:
    tensors = {name: value.detach() for name, value in example(4, 6, 5, 9).items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual, last = scan(**tensors)
        double, _ = scan(**{name: value.double() for name, value in tensors.items()})
    rounded = {
        name: value.bfloat16() if name == "x" or name.endswith("_weight") else value
        for name, value in tensors.items()
    }
    expected, expected_last = scan(**rounded)
    assert actual.dtype == last.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert torch.equal(actual, expected)
    assert torch.equal(last, expected_last)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(value: float) -> None:
    tensors = {name: value.detach() for name, value in example(5, 4, 3, 9).items()}
    clean, _ = scan(**tensors)
    tensors["x"][2, 1, 0] = value
    y, _ = scan(**tensors)
    rows = [0, 1, 3, 4]
    assert torch.equal(y[rows], clean[rows])
    assert torch.equal(y[2, 0], clean[2, 0])


def test_no_steps_keep_the_state() -> None:
    tensors = example(2, 0, 3, 4)
    y, last = scan(**tensors)
    assert y.shape == (2, 0, 4)
    assert torch.equal(last, tensors["h0"])
    (gradient,) = torch.autograd.grad(last.sum(), tensors["h0"])
    assert torch.equal(gradient, torch.ones(2, 4))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_no_units(chunk_size: int) -> None:
    """Nothing comes out, and so nothing has a gradient."""
    tensors = example(2, 3, 4, 0, backbone=(5, 6))
    y, last, *gradients = results(tensors, chunk_size=chunk_size)
    assert y.shape == (2, 3, 0)
    assert last.shape == (2, 0)
    for gradient in gradients:
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silu_goes_to_zero_far_below_it(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    u = torch.tensor([-largest, -1e30, -1000.0, -88.5, -87.0, -1.0, 0.0, 5.0], dtype=dtype)
    tensors = {
        name: value.detach().to(dtype)
        for name, value in example(len(u), 1, 1, 1, backbone=(1,)).items()
    }
    tensors |= {"x": u.view(-1, 1, 1), "backbone0_bias": torch.zeros(1, dtype=dtype)}
    tensors["backbone0_weight"] = torch.tensor([[1.0, 0.0]], dtype=dtype)
    one = Sample("silu", tensors, {"activation": "silu"}, scale=5.0)
    check_sample(scan, definition, one)
    y, _ = scan(**one.tensors, **one.options)
    assert torch.equal(y[0], y[1])


def test_large_input_saturates() -> None:
    tensors = {name: value.detach() for name, value in example(2, 6, 4, 7).items()}
    tensors["x"] = 1e30 * tensors["x"]
    for value in results({name: value.requires_grad_() for name, value in tensors.items()}):
        assert value.isfinite().all()


@pytest.mark.parametrize("span", [3600.0, 1e6])
@pytest.mark.parametrize("by_step", [False, True])
def test_gates_saturate_over_long_time_spans(span: float, by_step: bool) -> None:
    """What is left of a closed gate's slope would be multiplied by the time span."""
    tensors = example(hidden=7, seed=0)  # every gate is closed or open by far
    precise = {name: value.detach().double() for name, value in tensors.items()}
    spans = torch.full((3, 8, 1), span) if by_step else torch.tensor(span)
    actual = results(tensors, timespans=spans)
    expected = results(
        {name: value.requires_grad_() for name, value in precise.items()},
        definition,
        timespans=spans.double(),
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_is_differentiated() -> None:
    tensors = {name: value.detach() for name, value in example().items()}
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        y, _ = scan(**tensors | {name: leaf})
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        assert gradient.abs().sum() > 0


BATCH, STEPS = 3, 8


def with_weights(**changes: object) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    heads = [Affine(torch.randn(5, 9, generator=generator), torch.zeros(5)) for _ in range(4)]
    return {"weights": CfCWeights(*heads)._replace(**changes)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, 4)}, ValueError, r"x must be \[B, T, I\], got \[3, 4\]"),
        ({"x": torch.ones(3, 8, 4).int()}, TypeError, "x must be float64, .*, got torch.int32"),
        ({"h0": torch.ones(5, 3)}, ValueError, r"h0 must be \[B, H\] = \[3, 5\], got \[5, 3\]"),
        ({"h0": torch.ones(3, 5).long()}, TypeError, "h0 must be float64"),
        ({"h0": torch.ones(3, 5, device="meta")}, ValueError, "h0 must be on x's device cpu"),
        ({"weights": None}, TypeError, "weights must be a CfCWeights, got NoneType"),
        (with_weights(ff2=None), ValueError, "weights.ff2 must be given in mode 'default'"),
        ({"mode": "pure"}, ValueError, "weights.w_tau must be given in mode 'pure'"),
        (
            with_weights(ff1=Affine(torch.ones(5, 8), torch.ones(5))),
            ValueError,
            r"weights.ff1.weight must be \[H, Z\] = \[5, 9\], got \[5, 8\]",
        ),
        (with_weights(ff1=(torch.ones(5, 9), torch.ones(5))), TypeError, "ff1 must be an Affine"),
        (with_weights(time_a=[]), TypeError, "weights.time_a must be an Affine, got list"),
        (
            with_weights(ff1=Affine(torch.ones(5, 9), None)),
            TypeError,
            "weights.ff1.bias must be a torch.Tensor, got NoneType",
        ),
        (
            with_weights(backbone=(Affine(torch.ones(5, 9), torch.tensor(1.0)),)),
            ValueError,
            r"weights.backbone\[0\].bias must be \[out\], got \[\]",
        ),
        (
            with_weights(backbone=((torch.ones(5, 9), torch.ones(5)),)),
            TypeError,
            r"weights.backbone\[0\] must be an Affine, got tuple",
        ),
        (with_weights(mask=torch.ones(9, 5)), ValueError, r"weights.mask must be \[H, Z\] ="),
        ({"mode": "fast"}, ValueError, "mode must be .*, got 'fast'"),
        ({"activation": "sine"}, ValueError, "activation must be one of .*, got 'sine'"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be None or an integer >= 0, got -1"),
        ({"chunk_size": 2.5}, ValueError, "chunk_size must be .*, got 2.5"),
        ({"timespans": -0.5}, ValueError, "timespans must be finite and >= 0, got -0.5"),
        ({"timespans": float("nan")}, ValueError, "timespans must be finite and >= 0, got nan"),
        ({"timespans": "1"}, TypeError, "timespans must be a real number or a tensor, got str"),
        ({"timespans": True}, TypeError, "timespans must be a real number or a tensor, got bool"),
        ({"timespans": 1j}, TypeError, "timespans must be a real number or a tensor, got complex"),
        ({"timespans": torch.ones(3, 8).bool()}, TypeError, "timespans must be of a real dtype"),
        ({"timespans": torch.ones(8, 3)}, ValueError, r"= \[3, 8\], got \[8, 3\]"),
        ({"timespans": torch.ones(3, 8, 5)}, ValueError, r"got \[3, 8, 5\]"),
        ({"timespans": -torch.ones(3, 8)}, ValueError, r">= 0, got -1.0 at \[0, 0\]"),
        ({"lengths": [3.0, 4, 5]}, TypeError, "lengths must be of an integer dtype, got torch.fl"),
        ({"lengths": "345"}, TypeError, "lengths must be a tensor, an array or a list of integers"),
        (
            {"lengths": torch.ones(3)},
            TypeError,
            "lengths must be of an integer dtype, got torch.fl",
        ),
        ({"lengths": torch.ones(3).bool()}, TypeError, "of an integer dtype, got torch.bool"),
        ({"lengths": torch.ones(2).long()}, ValueError, r"lengths must be \[B\] = \[3\]"),
        ({"lengths": torch.tensor([1, 9, 2])}, ValueError, r"\[0, 8\], got 9 at index 1"),
        ({"lengths": torch.tensor([1, -1, 2])}, ValueError, "got -1 at index 1"),
        ({"dropout_scale": torch.ones(3, 8, 1, 4)}, ValueError, "dropout_scale must be None"),
        (
            with_weights(
                backbone=(
                    Affine(torch.ones(3, 9), torch.ones(3)),
                    Affine(torch.ones(9, 3), torch.ones(9)),
                )
            )
            | {"dropout_scale": torch.ones(3, 8, 1, 3)},
            ValueError,
            r"weights.backbone must be of one width U with dropout_scale, got \[3, 9\]",
        ),
    ],
    ids=str,
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.randn(BATCH, STEPS, 4), **with_weights()}
    with pytest.raises(error, match=r"ember_ext\.cfc_scan: .*" + message):
        ember_ext.cfc_scan(**arguments | changes)


def test_dropout_has_no_gradient_and_says_so() -> None:
    weights = cfc_weights(4, 5, backbone=(6, 6), generator=torch.Generator().manual_seed(0))
    scale = torch.ones(2, 3, 1, 6, requires_grad=True)
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"cfc_scan: dropout_scale must be detached"):
        scan(x, **weights, dropout_scale=scale)
    with torch.no_grad():
        y, _ = scan(x, **weights, dropout_scale=scale)
    assert torch.equal(scan(x, **weights, dropout_scale=scale.detach())[0], y)


@pytest.mark.parametrize("spans", [np.float32(2), np.int64(2), 2, torch.tensor(2)], ids=repr)
def test_time_spans_of_other_types(spans: Any) -> None:
    weights = cfc_weights(4, 5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4)
    y, _ = scan(x, **weights, timespans=2.0)
    assert torch.equal(scan(x, **weights, timespans=spans)[0], y)
    many = torch.full((2, 3), 2)
    torch.testing.assert_close(scan(x, **weights, timespans=many)[0], y)


@needs_kernels
def test_raw_operators_refuse_what_would_read_out_of_bounds() -> None:
    x, h0 = torch.randn(2, 5, 3), torch.randn(2, 4)
    rest = (None, None, None, None, 0, 0, 0)
    operators = torch.ops.ember_ext
    for bad in (
        (x, h0[:1], [torch.randn(12, 8)]),
        (x, h0, [torch.randn(12, 7)]),
        (x, h0, []),
        (x, h0, [torch.randn(11, 8)]),
    ):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            operators.cfc_scan_forward(*bad, *rest)
    maps = [torch.randn(3, 8), torch.randn(6, 4), torch.randn(12, 7)]
    with pytest.raises(RuntimeError, match="invalid arguments"):
        operators.cfc_scan_forward(x, h0, maps, None, None, torch.ones(2, 5, 1, 3), *rest[3:])
    weights = [torch.randn(12, 8)]
    y, h, saved = operators.cfc_scan_forward(x, h0, weights, *rest)
    with pytest.raises(RuntimeError, match="invalid arguments"):
        operators.cfc_scan_backward(y, h, saved[:-1], None, weights, *rest, True, True)


@pytest.mark.cuda
def test_raw_operators_refuse_tensors_of_another_device() -> None:
    x, h0, weights = torch.randn(2, 5, 3), torch.randn(2, 4), [torch.randn(12, 8)]
    rest = (None, None, None, None, 0, 0, 0)
    for bad in ((x.cuda(), h0, weights), (x, h0.cuda(), weights), (x, h0, [weights[0].cuda()])):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            torch.ops.ember_ext.cfc_scan_forward(*bad, *rest)


@needs_kernels
@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("mode", ["default", "pure"])
def test_packed_cells(mode: str, steps: int | None, spans: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    cells = []
    for inputs, hidden, backbone in ((4, 5, (6, 3)), (5, 19, ()), (19, 2, (33,))):
        tensors = cfc_weights(inputs, hidden, mode=mode, backbone=backbone, generator=generator)
        cells.append(flat(lambda _, weights: weights)(torch.empty(0), **tensors))
    packed = PackedCells(cells, mode=mode, timespan=None if spans else 0.5)
    x = torch.randn(3, steps or 1, 4, generator=generator)
    h = torch.randn(3, 26, generator=generator)
    dt = torch.rand(3, steps or 1, generator=generator) if spans else None
    lengths = torch.tensor([steps, 0, 2]) if steps else None
    expected, lasts = x, []
    for cell, state in zip(cells, h.split([5, 19, 2], 1), strict=True):
        expected, last = reference.cfc_scan(
            expected, cell, state, timespans=0.5 if dt is None else dt, mode=mode, lengths=lengths
        )
        lasts.append(last)
    if steps is None:
        x, expected, dt = x[:, 0], expected[:, 0], None if dt is None else dt[:, 0]
    y, last = packed.run(x, h, dt, lengths)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, torch.cat(lasts, 1))
    if dt is None and mode == "pure":
        dt = torch.full(x.shape[:-1], 0.5)
    operators, plan = torch.ops.ember_ext, list(packed._plan)
    torch.library.opcheck(
        operators.cfc_scan_packed.default, (x, h, dt, lengths, packed._packed, plan, 0)
    )
    for bad in ((x[:2], h), (x[..., :3], h), (x, h[:, :4])):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            packed.run(*bad, dt, lengths)


@needs_kernels
def test_packing_is_an_operator_like_others() -> None:
    # A cell with a backbone of two layers, and one without, four heads each.
    plan = [0, 0, 4, 5, 4, 3, 6, 3, 5, 7, 4, 1]
    weights = [torch.randn(6, 10), torch.randn(3, 7), torch.randn(20, 4), torch.randn(28, 13)]
    # What lies between the weights is neither written nor read.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    packed = torch.ops.ember_ext.cfc_scan_pack
    torch.library.opcheck(packed.default, (weights, plan), test_utils=checks)
    for bad in (weights[:3], [torch.randn(6, 9), *weights[1:]]):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            packed(bad, plan)
