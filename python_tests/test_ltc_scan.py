"""The LTC scan against ncps and its reference: values, gradients, chunks, edge cases, errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import ncps.torch
import ncps.wirings
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ember_ext
from ember_ext import _native, reference
from ember_ext.ops import LTCSynapses, LTCWeights, ltc_synapses
from ember_ext.ops._ltc_packing import PackedLTC, raw_arguments
from ember_ext.ops._watch import Watch, WeightsChangedError
from ember_ext.testing import DTYPES, check_sample, flat_ltc, ltc_samples, ltc_weights

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")

scan = flat_ltc(ember_ext.ltc_scan)
definition = flat_ltc(reference.ltc_scan)


def example(
    batch: int = 3, steps: int = 8, inputs: int = 4, units: int = 5, share: float = 0.6
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable fp32 arguments of `scan`, and its synapses."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "x": torch.randn(batch, steps, inputs, generator=generator),
        "h0": torch.randn(batch, units, generator=generator),
        **ltc_weights(inputs, units, generator),
        "timespans": 0.2 + torch.rand(batch, steps, generator=generator),
    }
    masks = (torch.rand(n, units, generator=generator) < share for n in (units, inputs))
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    return leaves, ltc_synapses(*masks)._asdict()


def results(
    tensors: dict[str, Tensor], operator: Callable[..., Any] = scan, **options: Any
) -> list[Tensor]:
    """Outputs of `scan` and all gradients of a weighting of theirs."""
    outputs = operator(**tensors, **options)
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(tensors.values()), weights)]


def precise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in tensors.items()}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, chunk_size: int | None) -> None:
    for sample in ltc_samples(dtype):
        check_sample(functools.partial(scan, chunk_size=chunk_size), definition, sample)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_gpu(dtype: torch.dtype) -> None:
    for sample in ltc_samples(dtype):
        check_sample(scan, definition, sample.to("cuda"))


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str, assert_matches_with: Callable[[str, str], None]) -> None:
    assert_matches_with(isa, "ltc_scan")


def test_inference_equals_training() -> None:
    for sample in ltc_samples(torch.float32):
        leaves = {k: v.clone().requires_grad_() for k, v in sample.tensors.items()}
        trained = scan(**leaves, **sample.options)
        for a, b in zip(trained, scan(**sample.tensors, **sample.options), strict=True):
            assert torch.equal(a, b), sample.name


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("spans", ["scalar", "rows"])
def test_gradcheck(spans: str, chunk_size: int) -> None:
    tensors, options = example(2, 5, 2, 4)
    tensors = precise(tensors)
    if spans == "scalar":
        tensors["timespans"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(*values: Tensor) -> Any:
        named = dict(zip(tensors, values, strict=True))
        lengths = torch.tensor([5, 3])
        return scan(**named, **options, lengths=lengths, chunk_size=chunk_size, ode_unfolds=3)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@needs_kernels
@pytest.mark.parametrize("chunk", [-1, 0, 3])
def test_opcheck(chunk: int) -> None:
    arguments = raw_example()
    operators = torch.ops.ember_ext
    torch.library.opcheck(operators.ltc_scan_forward.default, (*arguments, chunk))
    if chunk < 0:
        return
    y, h_last, saved = operators.ltc_scan_forward(*arguments, chunk)
    x, _, *rest, unfolds, _, eps = arguments
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            operators.ltc_scan_backward.default,
            (y, h_last, saved, x, *rest, unfolds, eps, chunk, *wanted),
        )
    leaves = [t.clone().requires_grad_() for t in arguments[:5]]
    torch.library.opcheck(
        operators.ltc_scan.default,
        (*leaves, *arguments[5:], chunk),
        # What is saved has no gradient.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def raw_example() -> tuple[Any, ...]:
    tensors, options = example(2, 5)
    x, h0 = tensors.pop("x").detach(), tensors.pop("h0").detach()
    spans = tensors.pop("timespans").detach()
    weights = LTCWeights(**{name: value.detach() for name, value in tensors.items()})
    lengths = torch.tensor([5, 2])
    return raw_arguments(x, weights, h0, LTCSynapses(**options), spans, lengths, 3, 1e-8, 2)


@needs_kernels
def test_raw_operators_refuse_what_would_read_out_of_bounds() -> None:
    good = raw_example()
    forward = torch.ops.ember_ext.ltc_scan_forward
    y, h_last, saved = forward(*good, 0)

    def changed(position: int, value: Any) -> tuple[Any, ...]:
        return (*good[:position], value, *good[position + 1 :])

    lists = [good[6].clone() for _ in range(4)]
    lists[0][0, 0] = 5
    lists[1][1, -1] = 5
    lists[2] = lists[2][:, [1, 0, *range(2, lists[2].shape[1])]]
    lists[3][:, 1] = lists[3][:, 0]
    for bad in (
        *(changed(6, value) for value in lists),
        changed(1, good[1][:1]),
        changed(2, good[2][:2]),
        changed(3, good[3][:, :-1]),
        changed(4, good[4].double()),
        changed(7, good[7][:, :4]),
        changed(8, good[8][:1]),
        changed(9, 0),
        changed(10, 6),
    ):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            forward(*bad, 0)
    x, _, *rest, unfolds, _, eps = good
    for outputs in ((y[:1], h_last, saved), (y, h_last[:1], saved), (y, h_last, saved[1:])):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            torch.ops.ember_ext.ltc_scan_backward(*outputs, x, *rest, unfolds, eps, 0, True, True)


def test_chunks_change_no_result() -> None:
    tensors, options = example(5, 13, 6, 18)
    lengths = torch.tensor([13, 0, 5, 12, 8])
    whole = results(tensors, **options, lengths=lengths, chunk_size=0)
    expected = results(precise(tensors), **options, lengths=lengths)
    for chunk_size in (1, 4, 13, 99, sys.maxsize):
        chunked = results(tensors, **options, lengths=lengths, chunk_size=chunk_size)
        # Only the weights' gradients are sums over steps, whose order depends on the chunk.
        for a, b in zip(whole[:4], chunked[:4], strict=True):
            assert torch.equal(a, b)
        exact = results(precise(tensors), **options, lengths=lengths, chunk_size=chunk_size)
        for a, b in zip(expected, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 5, 11])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_any_split_of_a_sequence_equals_the_whole(cut: int, batch: int) -> None:
    tensors, options = example(batch, 12, 5, 21)
    tensors = {name: value.detach() for name, value in tensors.items()}
    whole, last = scan(**tensors, **options)
    x, h0, dt = (tensors.pop(name) for name in ("x", "h0", "timespans"))
    first, h = scan(x[:, :cut], h0=h0, timespans=dt[:, :cut], **tensors, **options)
    second, h = scan(x[:, cut:], h0=h, timespans=dt[:, cut:], **tensors, **options)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(h, last)


def test_rows_do_not_depend_on_each_other() -> None:
    tensors, options = example(45, 6, 5, 21)
    tensors = {name: value.detach() for name, value in tensors.items()}
    whole = scan(**tensors, **options)
    for rows in (slice(0, 1), slice(3, 10), slice(20, 45)):
        some = {
            name: value[rows] if name in ("x", "h0", "timespans") else value
            for name, value in tensors.items()
        }
        for a, b in zip(scan(**some, **options), whole, strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("operator", [scan, definition], ids=["operator", "reference"])
def test_padding_has_no_influence_and_gets_no_gradient(
    operator: Callable[..., Any], chunk_size: int
) -> None:
    if operator is scan:
        operator = functools.partial(scan, chunk_size=chunk_size)
    tensors, options = example(18, 9, 3, 6)
    lengths = torch.arange(18) % 10
    clean = results(tensors, operator, **options, lengths=lengths)
    nan = float("nan")
    ended = torch.arange(9) >= lengths[:, None]
    padded = {
        "x": torch.where(ended[..., None], nan, tensors["x"].detach()),
        "timespans": torch.where(ended, nan, tensors["timespans"].detach()),
        # The state of a row without steps is handed on, and has no part in anything else.
        "h0": torch.where((lengths == 0)[:, None], nan, tensors["h0"].detach()),
    }
    leaves = tensors | {name: value.requires_grad_() for name, value in padded.items()}
    y, last, *gradients = results(leaves, operator, **options, lengths=lengths)
    assert torch.equal(y, clean[0])
    assert (y[ended] == 0).all()
    assert torch.equal(last[lengths > 0], clean[1][lengths > 0])
    for name, own, expected in zip(leaves, gradients, clean[2:], strict=True):
        assert torch.equal(own, expected), name
        if name in ("x", "timespans"):
            assert (own[ended] == 0).all()


@needs_kernels
def test_repeats_to_the_bit(assert_repeats: Callable[[Callable[[], list[Tensor]]], None]) -> None:
    for shape in ((67, 5, 5, 35), (150, 2, 4, 6), (1, 40, 7, 19)):
        tensors, options = example(*shape)
        assert_repeats(functools.partial(results, tensors, **options))
        assert_repeats(functools.partial(results, tensors, **options, chunk_size=2))


@needs_kernels
@pytest.mark.usefixtures("nan_filled_memory")
def test_no_result_depends_on_uninitialised_memory() -> None:
    for index, sample in enumerate(ltc_samples(torch.float32)):
        chunked = functools.partial(scan, chunk_size=2 * (index % 2))
        check_sample(chunked, definition, sample)


def test_long_sequences_keep_their_accuracy_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, options = example(2, 1024, 3, 6)
    for a, b in zip(results(tensors, **options), results(precise(tensors), **options), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max())
        )
    if not _native.has("cpu"):
        return
    monkeypatch.setattr(sys.modules["ember_ext.ops.ltc_scan"], "MAX_KEPT", 1 << 14)
    saved: list[int] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        scan(**tensors, **options)
    assert max(saved) <= tensors["x"].numel()


@needs_kernels
def test_compiles_whole_and_once_for_all_shapes() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    tensors, options = example()
    weights = {name: tensors[name] for name in LTCWeights._fields}

    def model(x: Tensor, dt: Tensor) -> Tensor:
        y, last = scan(x * 2, timespans=dt, **weights, **options)
        return y.square().sum() + last.sum()

    for backend in (count, "aot_eager"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for batch, steps in ((4, 5), (3, 7), (8, 2), (5, 11)):
            x, dt = torch.randn(batch, steps, 4, requires_grad=True), torch.rand(batch, steps) + 1
            leaves = (x, *weights.values())
            expected = torch.autograd.grad(model(x, dt), leaves)
            actual = torch.autograd.grad(compiled(x, dt), leaves)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)
    assert graphs <= 2, "one graph for the first shape, one for all others"


@needs_kernels
def test_export() -> None:
    tensors, options = example()
    weights = {name: tensors[name].detach() for name in LTCWeights._fields}

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y, _ = scan(x, **weights, **options)
            return cast(Tensor, y)

    x = tensors["x"].detach()
    exported = torch.export.export(Model(), (x,))
    called = [
        str(node.target)
        for module in exported.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    ]
    assert "ember_ext.ltc_scan_forward.default" in called
    assert torch.equal(exported.module()(x), Model()(x))


def test_autocast_rounds_nothing() -> None:
    tensors, options = example()
    expected = scan(**tensors, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = scan(**tensors, **options)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(value: float) -> None:
    tensors, options = example(35, 4, 3, 9)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    clean, _ = scan(**tensors, **options)
    tensors["x"][2, 1, 0] = value
    y, _ = scan(**tensors, **options)
    rows = torch.arange(35) != 2
    assert torch.equal(y[rows], clean[rows])
    assert torch.equal(y[2, 0], clean[2, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_denominators_may_vanish(dtype: torch.dtype) -> None:
    """Without constraints c + gleak may be 0 exactly: what ncps makes of that comes out."""
    tensors, options = example(5, 3, 2, 4)
    tensors = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    tensors["timespans"].fill_(1.0)
    tensors["cm"][:2] = 0.5
    tensors["gleak"][:2] = -3.0
    for name in ("w", "sensory_w"):
        tensors[name][:, 0] = 0.0
        tensors[name][:, 1] *= -1
    for eps in (1e-8, 0.0):
        actual = scan(**tensors, **options, eps=eps)
        expected = definition(**tensors, **options, eps=eps)
        assert not eps or expected[0][..., 0].abs().max() > 1e6
        assert eps or not expected[0].isfinite().all()
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_large_input_saturates() -> None:
    tensors, options = example(2, 6, 4, 7)
    tensors = {name: value.detach() for name, value in tensors.items()}
    tensors["x"] = 1e30 * tensors["x"]
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    for value in results(leaves, **options):
        assert value.isfinite().all()


def test_no_steps_keep_the_state() -> None:
    tensors, options = example(2, 0, 3, 4)
    y, last, *gradients = results(tensors, **options)
    assert y.shape == (2, 0, 4)
    assert torch.equal(last, tensors["h0"])
    named = dict(zip(tensors, gradients, strict=True))
    assert torch.equal(named["h0"].flatten(), torch.linspace(-1, 1, 8))
    assert (named["w"] == 0).all()


def test_only_what_is_asked_for_is_differentiated() -> None:
    tensors, options = example()
    whole = dict(zip(tensors, results(tensors, **options)[2:], strict=True))
    tensors = {name: value.detach() for name, value in tensors.items()}
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        outputs = scan(**tensors | {name: leaf}, **options)
        weights = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
        (gradient,) = torch.autograd.grad(outputs, leaf, weights)
        assert torch.equal(gradient, whole[name]), name


@needs_kernels
@pytest.mark.parametrize("batch", [1, 2, 9, 40])
@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_network(batch: int, steps: int | None, dtype: torch.dtype) -> None:
    tensors, options = example(batch, steps or 1, 6, 37, share=0.2)
    named = {name: value.detach().to(dtype) for name, value in tensors.items()}
    weights = LTCWeights(*(named[name] for name in LTCWeights._fields))
    x, h, spans = named["x"], named["h0"], named["timespans"]
    maps = {"input_map": torch.randn(2, 6, dtype=dtype), "output_map": torch.randn(2, 5).to(dtype)}
    synapses = LTCSynapses(**options)
    lengths = torch.arange(batch) % (steps + 1) if steps else None
    settings: dict[str, Any] = {"ode_unfolds": 3, "outputs": 5}
    for own_maps in ({}, maps):
        for dt in (spans, None):
            fixed = None if dt is not None else 0.7
            packed = PackedLTC(weights, synapses, **own_maps, timespan=fixed, **settings)
            u = x * maps["input_map"][0] + maps["input_map"][1] if own_maps else x
            expected, expected_last = ember_ext.ltc_scan(
                u,
                weights,
                h,
                synapses=synapses,
                timespans=0.7 if dt is None else dt,
                lengths=lengths,
                **settings,
            )
            if own_maps:
                expected = expected * maps["output_map"][0] + maps["output_map"][1]
                if lengths is not None:
                    ended = torch.arange(steps or 1) >= lengths[:, None]
                    expected = torch.where(ended[..., None], 0, expected)
            single = steps is None
            arguments = (
                x[:, 0] if single else x,
                h,
                dt if dt is None or not single else dt[:, 0],
                lengths,
            )
            y, last = packed.run(*arguments)
            torch.testing.assert_close(y, expected[:, 0] if single else expected)
            torch.testing.assert_close(last, expected_last)
    operator = torch.ops.ember_ext.ltc_scan_packed
    rest = (packed._packed, list(packed._plan), 1e-8, 0)
    torch.library.opcheck(operator.default, (x, h, spans, lengths, *rest))
    for bad in (
        (x[1:], h, spans),
        (x[..., :3], h, spans),
        (x, h[:, :4], spans),
        (x, h, spans[:, 1:]),
    ):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            operator(*bad, None, *rest)


@needs_kernels
def test_packing_is_an_operator_like_others() -> None:
    _, _, *tensors, _, _, _, _, _ = raw_example()
    counts = [index.shape[1] for index in tensors[3:]]
    plan = [4, 5, 2, *counts, 3, 1, 0]
    arguments = (*tensors, torch.randn(2, 4), None)
    # What lies between the pieces is neither written nor read.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    pack = torch.ops.ember_ext.ltc_scan_pack
    torch.library.opcheck(pack.default, (*arguments, plan), test_utils=checks)
    for bad in ([*plan[:3], 1, *plan[4:]], [*plan[:7], 1], plan[:7], [5, *plan[1:]]):
        with pytest.raises(RuntimeError, match="invalid arguments"):
            pack(*arguments, bad)


@needs_kernels
def test_a_packed_network_notices_new_weights() -> None:
    tensors, options = example(1, 1)
    named = {name: value.detach() for name, value in tensors.items()}
    weights = LTCWeights(*(named[name] for name in LTCWeights._fields))
    watch = Watch(list(weights))
    packed = PackedLTC(weights, LTCSynapses(**options), watch=watch)
    x, h = named["x"][:, 0], named["h0"]
    packed.run(x, h)
    weights.erev.data[0, 0] += 1
    with pytest.raises(WeightsChangedError, match=r"ember_ext\.ltc_scan: the weights"):
        packed.run(x, h)
    packed.run(x, h, checked=False)


@needs_kernels
def test_a_dense_network_is_the_one_where_all_synapses_exist() -> None:
    tensors, _ = example()
    masks = ltc_synapses(torch.ones(5, 5), torch.ones(4, 5))
    for a, b in zip(results(tensors), results(tensors, **masks._asdict()), strict=True):
        assert torch.equal(a, b)


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
        ({"ode_unfolds": 2**62}, ValueError, "ode_unfolds must be at most"),
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
