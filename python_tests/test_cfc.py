"""`ember_ext.nn.CfC` against `ncps.torch.CfC`: values, gradients, checkpoints, bad input."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import ncps.torch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liquid_pairs import RowByRow, compute, draw_wiring, pair_of
from ncps.wirings import AutoNCP, Random
from torch import Tensor
from torch.nn.utils import prune

from ember_ext import _native, nn
from ember_ext.testing import assert_close

MODES = ("default", "pure", "no_gate")
ACTIVATIONS = ("lecun_tanh", "tanh", "relu", "silu", "gelu")


def pair(input_size: int, units: Any, **options: Any) -> tuple[ncps.torch.CfC, nn.CfC]:
    """An ncps network and ours, with the same weights by the same seed."""
    return pair_of("CfC", input_size, units, **options)


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, Any, dict[str, Any]]:
    inputs = draw(st.integers(1, 9))
    options: dict[str, Any] = {
        "mode": draw(st.sampled_from(MODES)),
        "return_sequences": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "proj_size": draw(st.sampled_from([None, 3])),
        "mixed_memory": draw(st.booleans()),
    }
    wiring = draw_wiring(draw)
    if wiring is not None:
        return inputs, wiring, options
    options |= {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "backbone_units": draw(st.sampled_from([None, 1, 17])),
        "backbone_layers": draw(st.sampled_from([None, 0, 1, 3])),
    }
    return inputs, draw(st.integers(1, 20)), options


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    network=networks(),
    batch=st.sampled_from([None, 1, 3, 10]),
    steps=st.integers(1, 19),
    state=st.booleans(),
    spans=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 4]),
)
def test_equals_ncps(
    network: tuple[int, Any, dict[str, Any]],
    batch: int | None,
    steps: int,
    state: bool,
    spans: bool,
    chunk_size: int | None,
) -> None:
    inputs, units, options = network
    if batch is None and not options["batch_first"] and not options["return_sequences"]:
        return  # ncps leaves a dimension of size 1 in its output
    single, ours = pair(inputs, units, **options)
    theirs = RowByRow(single)
    ours.chunk_size = chunk_size
    torch.manual_seed(steps)
    rows = () if batch is None else (batch,)
    shape = (*rows, steps) if options["batch_first"] else (steps, *rows)
    x = torch.randn(*shape, inputs)
    hx = None
    if state:
        hx = tuple(torch.randn(*rows, ours.state_size) for _ in range(1 + ours.use_mixed))
    times = 3 * torch.rand(shape) if spans else None
    eager = compute(theirs, x, hx, times)
    actual = compute(ours, x, hx, times)
    # Zeros of fp32 are ncps' default state; here it is given, so that fp64 stays fp64.
    if hx is None:
        hx = tuple(torch.zeros(*rows, ours.state_size) for _ in range(1 + ours.use_mixed))
    double = tuple(h.double() for h in hx)
    times = None if times is None else times.double()
    exact = compute(theirs.double(), x.double(), double, times)
    precise = compute(ours.double(), x.double(), double, times)
    for a, b in zip(precise, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # Sums that cancel have the size of their terms for a yardstick, and all gradients sum the same
    # few; and among thousands of tensors eager is sometimes right by luck: hence a scale and a
    # wider floor.
    scale = max(1.0, *(float(tensor.detach().abs().max()) for tensor in exact))
    for index, (a, b, c) in enumerate(zip(actual, eager, exact, strict=False)):
        assert_close(f"tensor {index}", a, b, c.detach(), scale=scale, floor_ulps=64.0)


@pytest.mark.parametrize("units", [AutoNCP(14, 3), 6], ids=["wired", "dense"])
@pytest.mark.parametrize("mode", MODES)
def test_time_spans_of_each_row_and_step(units: Any, mode: str) -> None:
    theirs, ours = pair(4, units, mode=mode)
    theirs, ours = theirs.double(), ours.double()
    # As many rows as units: where ncps is silently wrong.
    batch = ours.state_size
    x = torch.randn(batch, 5, 4, dtype=torch.float64)
    spans = torch.rand(batch, 5, dtype=torch.float64)
    y, last = ours(x, timespans=spans)
    for shaped in (spans.unsqueeze(-1), spans.float().double()):
        torch.testing.assert_close(ours(x, timespans=shaped)[0], y, rtol=1e-6, atol=1e-6)
    for row in range(batch):
        zeros = torch.zeros(1, batch, dtype=torch.float64)
        expected, expected_last = theirs(x[row : row + 1], zeros, spans[row : row + 1])
        torch.testing.assert_close(y[row : row + 1], expected)
        torch.testing.assert_close(last[row : row + 1], expected_last)
    constant = torch.full((batch, 5), 0.3, dtype=torch.float64)
    for number in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        torch.testing.assert_close(ours(x, timespans=number)[0], ours(x, timespans=constant)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"units": AutoNCP(20, 4)},
        {"units": AutoNCP(20, 4), "mode": "pure"},
        {"units": 9},
        {"units": 9, "mode": "no_gate", "proj_size": 2, "backbone_layers": 2, "activation": "silu"},
        {"units": 9, "mixed_memory": True},
        {"units": 9, "return_sequences": False, "batch_first": False},
    ],
    ids=str,
)
def test_steps_equal_the_sequence(options: dict[str, Any]) -> None:
    network = nn.CfC(5, **options)
    x, spans = torch.randn(3, 6, 5), torch.rand(3, 6)
    order = (lambda t: t) if network.batch_first else (lambda t: t.transpose(0, 1))
    with torch.no_grad():
        whole, last = network(order(x), timespans=order(spans))
        hx, outputs = None, []
        for t in range(6):
            y, hx = network.step(x[:, t], hx, spans[:, t])
            outputs.append(y)
        expected = order(whole) if network.return_sequences else whole[:, None]
        actual = torch.stack(outputs, 1) if network.return_sequences else outputs[-1][:, None]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hx, last, rtol=1e-5, atol=1e-6)
        single, _ = network.step(x[0, 0], None, 0.5)
        torch.testing.assert_close(single, network.step(x[:1, 0], None, 0.5)[0][0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spans", ["none", "number", "scalar", "rows"])
def test_inference_equals_training(mode: str, spans: str) -> None:
    x, lengths = torch.randn(3, 6, 5), torch.tensor([6, 0, 2])
    timespans = {
        "none": None,
        "number": 0.4,
        "scalar": torch.tensor(0.4),
        "rows": torch.rand(3, 6),
    }[spans]
    for network in (
        nn.CfC(5, AutoNCP(20, 4), mode=mode),
        nn.CfC(5, 9, proj_size=2, backbone_layers=2, backbone_dropout=0.5, mode=mode).eval(),
        nn.CfC(5, 9, return_sequences=False, mode=mode),
        nn.CfC(5, 9, mode=mode, mixed_memory=True),
        nn.CfC(5, AutoNCP(20, 4), mode=mode, mixed_memory=True),
    ):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            network.to(dtype)
            spans_ = timespans.to(dtype) if isinstance(timespans, Tensor) else timespans
            expected = network(x.to(dtype), timespans=spans_, lengths=lengths)
            with torch.no_grad():
                actual = network(x.to(dtype), timespans=spans_, lengths=lengths)
            for a, b in zip(actual, expected, strict=True):
                close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(a, b, **close)


def test_step_notices_changed_weights() -> None:
    network = nn.CfC(3, AutoNCP(12, 2))
    x, hx = torch.randn(1, 3), torch.randn(1, 12)

    def check() -> None:
        with torch.no_grad():
            y, h = network.step(x, hx)
            expected, expected_h = network(x[:, None].to(y.dtype), hx.to(y.dtype))
        torch.testing.assert_close(y, expected[:, 0])
        torch.testing.assert_close(h, expected_h)

    check()
    torch.optim.SGD(network.parameters(), 0.5)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.5)
    network(torch.randn(2, 3, 3))[0].sum().backward()
    optimizer.step()
    check()
    network.load_state_dict({k: 0.5 * v for k, v in network.state_dict().items()})
    check()
    network.rnn_cell.layer_0.ff1.weight = torch.nn.Parameter(torch.randn(6, 9))
    check()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.rnn_cell.layer_0.ff1.weight.zero_()
    check()
    x, hx = x.double(), hx.double()
    network.double()
    check()


def test_step_is_differentiable() -> None:
    network = nn.CfC(3, 7)
    x = torch.randn(2, 3, requires_grad=True)
    y, h = network.step(x, torch.randn(2, 7))
    (y.sum() + h.sum()).backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in network.parameters())


def test_padded_batches() -> None:
    network = nn.CfC(3, AutoNCP(12, 2))
    x, lengths = torch.randn(4, 7, 3), torch.tensor([7, 2, 0, 5])
    y, last = network(x, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        own, own_last = network(x[row : row + 1, :length])
        torch.testing.assert_close(y[row, :length], own[0])
        torch.testing.assert_close(last[row], own_last[0])
        assert (y[row, length:] == 0).all()
    network.return_sequences = False
    readout, _ = network(x, lengths=lengths)
    torch.testing.assert_close(readout[3], y[3, 4])
    mixed = nn.CfC(3, 5, mixed_memory=True)
    y, (h, c) = mixed(x, lengths=lengths)
    own, (own_h, own_c) = mixed(x[1:2, :2])
    torch.testing.assert_close(
        torch.cat([y[1, 1], h[1], c[1]]), torch.cat([own[0, 1], own_h[0], own_c[0]])
    )


def test_dropout_starts_at_the_second_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    one = nn.CfC(4, 6, backbone_layers=1, backbone_dropout=0.9)
    assert torch.equal(one(x)[0], one(x)[0])
    two = nn.CfC(4, 6, backbone_layers=2, backbone_dropout=0.5)
    assert not torch.equal(two(x)[0], two(x)[0])
    two.eval()
    theirs = ncps.torch.CfC(4, 6, backbone_layers=2, backbone_dropout=0.5).eval()
    theirs.load_state_dict(two.state_dict())
    torch.testing.assert_close(two(x)[0], theirs(x)[0])


def test_dropout_with_mixed_memory() -> None:
    torch.manual_seed(0)
    options = {"mixed_memory": True, "backbone_layers": 2}
    x = torch.randn(2, 5, 4)
    half = nn.CfC(4, 6, backbone_dropout=0.5, **options)
    assert not torch.equal(half(x)[0], half(x)[0])
    ours = nn.CfC(4, 6, backbone_dropout=1.0, **options)
    theirs = ncps.torch.CfC(4, 6, backbone_dropout=1.0, **options)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert not torch.allclose(ours(x)[0], ours.eval()(x)[0])


@pytest.mark.parametrize("units", [AutoNCP(14, 3), 6], ids=["wired", "dense"])
def test_checkpoints_go_both_ways(units: Any) -> None:
    theirs, _ = pair(4, units)
    ours = nn.CfC(4, copy.deepcopy(units))
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    ncps.torch.CfC(4, copy.deepcopy(units)).load_state_dict(ours.state_dict())


def test_bfloat16_and_autocast() -> None:
    network = nn.CfC(4, AutoNCP(14, 3))
    x = torch.randn(3, 5, 4)
    y, _ = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, last = network(x)
    assert low.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, atol=0.03, rtol=0.05)
    half, last = network.bfloat16()(x.bfloat16())
    assert half.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, atol=0.03, rtol=0.05)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    network = nn.CfC(4, AutoNCP(14, 3))
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(network, fullgraph=True, backend=count)
    for batch, steps in ((4, 5), (3, 7), (8, 2)):
        x = torch.randn(batch, steps, 4)
        torch.testing.assert_close(compiled(x)[0], network(x)[0])
    assert graphs <= 2
    # Inference, where the uncompiled network packs its weights.
    with torch.no_grad():
        for batch, steps in ((4, 5), (3, 7), (8, 2), (6, 11)):
            x = torch.randn(batch, steps, 4)
            torch.testing.assert_close(compiled(x)[0], network(x)[0])
    assert graphs <= 4


SIZE = {"input_size": 4, "units": 6}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"units": 2.5}, TypeError, "units must be an integer, got float"),
        ({"input_size": -1}, ValueError, "input_size must be >= 0, got -1"),
        ({"input_size": None}, TypeError, "input_size must be an integer, got NoneType"),
        ({"units": AutoNCP(9, 2), "input_size": None}, ValueError, "units must be a wiring that"),
        ({"mode": "fast"}, ValueError, "mode must be one of .*, got 'fast'"),
        ({"activation": "sine"}, ValueError, "activation must be one of .*, got 'sine'"),
        ({"backbone_layers": -1}, ValueError, "backbone_layers must be >= 0, got -1"),
        ({"backbone_dropout": 1.5}, ValueError, r"backbone_dropout must be within \[0, 1\]"),
        ({"proj_size": "3"}, TypeError, "proj_size must be an integer, got str"),
        ({"chunk_size": -4}, ValueError, "chunk_size must be >= 0, got -4"),
        ({"units": Random(9, 3), "proj_size": 2}, ValueError, "proj_size must be None as the wir"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"ember_ext\.nn\.CfC: " + message):
        nn.CfC(**SIZE | options)


X = torch.zeros(3, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": X[0, 0]}, ValueError, r"input must be \[B, T, C\] or \[T, C\], got \[4\]"),
        ({"input": X[..., :3]}, ValueError, r"C = 4, got \[3, 8, 3\]"),
        ({"hx": torch.zeros(6)}, ValueError, r"hx must be \[B, S\] = \[3, 6\], got \[6\]"),
        ({"hx": torch.zeros(3, 6).int()}, TypeError, "hx must be of a floating dtype, got torch.i"),
        ({"hx": (torch.zeros(3, 6),) * 2}, TypeError, "hx must be a torch.Tensor, got tuple"),
        ({"timespans": torch.ones(3)}, ValueError, r"\[B, T\] = \[3, 8\] or .*, got \[3\]"),
        ({"timespans": "1"}, TypeError, "timespans must be a real number or a tensor, got str"),
        ({"timespans": -1.0}, ValueError, "timespans must be finite and >= 0"),
        ({"timespans": torch.full((3, 8), float("inf"))}, ValueError, "timespans must be finite"),
        ({"lengths": torch.tensor([1, 2, 9])}, ValueError, r"lengths must be within \[0, T\]"),
        ({"lengths": torch.tensor([1, -2, 3])}, ValueError, r"lengths must be within \[0, T\]"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must be \[B\] = \[3\], got"),
        ({"lengths": torch.ones(3)}, TypeError, "lengths must be int64 or int32, got torch.fl"),
        ({"lengths": [1, 2, 3]}, TypeError, "lengths must be a torch.Tensor, got list"),
        ({"input": X[0], "lengths": torch.tensor([1])}, ValueError, "lengths must be None for an"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_call_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, grad: bool
) -> None:
    network = nn.CfC(4, 6)
    with torch.set_grad_enabled(grad):
        network(X)
        with pytest.raises(error, match=r"ember_ext\.(nn\.CfC|cfc_scan): .*" + message):
            network(**{"input": X} | arguments)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [0, 4])
def test_bad_arguments_with_mixed_memory(grad: bool, steps: int) -> None:
    network = nn.CfC(4, 6, mixed_memory=True)
    zeros = torch.zeros(3, 6)
    with torch.set_grad_enabled(grad):
        for arguments, error, message in (
            ({"hx": zeros}, TypeError, r"hx must be a pair \(h, c\) with mixed memory, got Tensor"),
            ({"hx": (zeros, zeros[:2])}, ValueError, r"hx\[1\] must be \[B, S\] = \[3, 6\], got"),
            ({"timespans": -0.5}, ValueError, "timespans must be finite and >= 0, got -0.5"),
            ({"lengths": torch.tensor([1, 2, 9])}, ValueError, r"lengths must be within \[0, T\]"),
        ):
            with pytest.raises(error, match=message):
                network(X[:, :steps], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X,), r"input must be \[B, C\] or \[C\], got \[3, 8, 4\]"),
        ((X[:, 0, :3], torch.zeros(3, 6)), r"C = 4"),
        ((X[:, 0], torch.zeros(2, 6)), r"hx must be \[B, S\] = \[3, 6\], got \[2, 6\]"),
        ((X[:, 0], torch.zeros(3, 6), -1.0), "timespans must be finite and >= 0, got -1.0"),
        ((X[:, 0], torch.zeros(3, 6), torch.tensor([1.0, 2.0, -3.0])), "timespans must be finite"),
    ],
    ids=str,
)
def test_bad_step_arguments(arguments: tuple[Any, ...], message: str) -> None:
    network = nn.CfC(4, 6)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        network.step(*arguments)


@pytest.mark.parametrize("grad", [True, False])
def test_a_step_of_mixed_memory_needs_both_states(grad: bool) -> None:
    network = nn.CfC(4, 6, mixed_memory=True)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(TypeError, match=r"hx must be a pair \(h, c\) with mixed memory"),
    ):
        network.step(X[:, 0], torch.zeros(3, 6))


@pytest.mark.parametrize("grad", [True, False])
def test_a_step_goes_through_another_readout(grad: bool) -> None:
    network, h = nn.CfC(4, 6), torch.zeros(3, 6)
    network.fc = torch.nn.Linear(6, 2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(network.step(X[:, 0], h)[0], network(X[:, :1], h)[0][:, 0])


@pytest.mark.parametrize("units", [AutoNCP(24, 6), 10], ids=["wired", "dense"])
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_inference_follows_the_weights(units: Any, mixed_memory: bool) -> None:
    """After a fused optimiser's step, which leaves no trace in a tensor's version, too."""
    network = nn.CfC(5, units, mixed_memory=mixed_memory)
    x = torch.randn(3, 7, 5)
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, fused=True)

    def through_data() -> None:
        for parameter in trainable:
            parameter.data.add_(0.1)

    def by_step() -> torch.Tensor:
        outputs, hx = [], None
        for row in x.unbind(1):
            y, hx = network.step(row, hx)
            outputs.append(y)
        return torch.stack(outputs, 1)

    with torch.no_grad():
        by_step()
    for change in (optimizer.step, through_data, optimizer.step):
        optimizer.zero_grad()
        network(x)[0].square().mean().backward()
        with torch.no_grad():
            before, _ = network(x)
            by_step()
        change()
        expected = network(x)[0].detach()
        assert not torch.allclose(before, expected)
        with torch.no_grad():
            # `step` hears of a write through .data only from `forward`.
            streamed = by_step() if change is not through_data else None
            torch.testing.assert_close(network(x)[0], expected)
            torch.testing.assert_close(by_step() if streamed is None else streamed, expected)


SLOWER = "ignore:.*step, which is slower:UserWarning"


class LoRA(torch.nn.Module):
    """A low-rank adapter, which has the layer's weight for an attribute, as many do."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.linspace(-1, 1, base.in_features)[None])
        self.up = torch.nn.Parameter(torch.linspace(0, 1, base.out_features)[:, None])

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()  # type: ignore[no-any-return]


def some_cell(network: Any) -> Any:
    cell = network.rnn_cell
    return cell if isinstance(cell, ncps.torch.CfCCell) else cell.layer_1


def prune_time_a(network: Any) -> None:
    prune.l1_unstructured(some_cell(network).time_a, "weight", 0.5)


def normalise_time_b(network: Any) -> None:
    torch.nn.utils.weight_norm(some_cell(network).time_b)


def adapt_time_a(network: Any) -> None:
    cell = some_cell(network)
    cell.time_a = LoRA(cell.time_a).to(cell.time_a.weight)


def hook_time_a(network: Any) -> None:
    some_cell(network).time_a.register_forward_hook(lambda _module, _input, output: 3 * output)


def replace_a_forward(network: Any) -> None:
    time_b = some_cell(network).time_b
    time_b.forward = lambda x: torch.nn.functional.linear(x, time_b.weight) - 1


def replace_an_activation(network: Any) -> None:
    some_cell(network).tanh = torch.nn.Hardtanh()


def hook_the_lstm(network: Any) -> None:
    network.lstm.recurrent_map.register_forward_hook(lambda _module, _input, output: output / 2)


def advance_by_steps(network: nn.CfC, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
    outputs = []
    for row in x.unbind(1):
        y, hx = network.step(row, hx)
        outputs.append(y)
    return torch.stack(outputs, 1), hx


@pytest.mark.filterwarnings(SLOWER, "ignore:.*deprecated")
@pytest.mark.parametrize("units", [AutoNCP(14, 3), 6], ids=["wired", "dense"])
@pytest.mark.parametrize(
    ("alter", "mixed_memory"),
    [
        *itertools.product(
            (
                prune_time_a,
                normalise_time_b,
                adapt_time_a,
                hook_time_a,
                replace_a_forward,
                replace_an_activation,
            ),
            (False, True),
        ),
        (hook_the_lstm, True),
    ],
    ids=lambda value: value.__name__ if callable(value) else "mixed" * value,
)
def test_altered_layers_are_called_as_ncps_calls_them(
    alter: Any, units: Any, mixed_memory: bool
) -> None:
    theirs, ours = pair(4, units, mixed_memory=mixed_memory)
    theirs, ours = theirs.double(), ours.double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    zeros = torch.zeros(3, ours.state_size, dtype=torch.float64)
    hx = (zeros, zeros) if mixed_memory else zeros
    with torch.no_grad():
        ours(x, hx)
        plain, _ = advance_by_steps(ours, x, hx)  # lays out the weights of the plain layers
    alter(theirs)
    alter(ours)
    optimizers = [
        torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
        for network in (theirs, ours)
    ]
    for _ in range(2):
        expected, expected_last = theirs(x, hx)
        actual, last = ours(x, hx)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(last, expected_last)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, hx)[0], expected)
            torch.testing.assert_close(advance_by_steps(ours, x, hx)[0], expected)
        for output, optimizer in zip((expected, actual), optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
    assert not torch.allclose(plain, expected)
    # What ncps lacks, against ncps on each row's own steps.
    spans, lengths = torch.rand(3, 5, dtype=torch.float64), torch.tensor([5, 2, 0])
    y, _ = ours(x, hx, spans, lengths=lengths)
    row = tuple(h[:1] for h in hx) if mixed_memory else hx[:1]
    torch.testing.assert_close(y[1:2, :2], theirs(x[1:2, :2], row, spans[1:2, :2])[0])
    assert (y[1, 2:] == 0).all()


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*quantized tensor creation", SLOWER)
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_quantised_layers(mixed_memory: bool) -> None:
    theirs, ours = (
        torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear})
        for network in pair(4, 6, mixed_memory=mixed_memory)
    )
    assert type(ours) is nn.CfC
    x = torch.randn(3, 5, 4)
    _native._warn.cache_clear()
    with pytest.warns(UserWarning, match="cells step by step.*rnn_cell.ff1 is a torch.*quantized"):
        actual, _ = ours(x)
    torch.testing.assert_close(actual, theirs(x)[0])


def test_dropouts_of_their_own_mode() -> None:
    """Dropout is for the layers to know: a network in eval mode may have one that trains."""
    theirs, ours = pair(4, 6, backbone_layers=2, backbone_dropout=1.0)
    x = torch.randn(2, 5, 4)
    for network in (theirs, ours):
        network.eval().rnn_cell.backbone[-1].train()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours(x)[0], theirs(x)[0])
            torch.testing.assert_close(ours.step(x[:, 0], torch.zeros(2, 6))[0], theirs(x)[0][:, 0])


@pytest.mark.filterwarnings(SLOWER)
def test_step_notices_new_parts() -> None:
    network = nn.CfC(3, 7, backbone_units=5)
    x, hx = torch.randn(2, 3), torch.zeros(2, 7)
    with torch.no_grad():
        for change in (
            lambda: setattr(network.rnn_cell.ff1, "weight", torch.nn.Parameter(torch.ones(7, 5))),
            lambda: setattr(network.rnn_cell, "ff2", torch.nn.Linear(5, 7)),
            lambda: network.rnn_cell.backbone.__setitem__(1, torch.nn.LeakyReLU()),
        ):
            before, _ = network.step(x, hx)
            change()
            after, _ = network.step(x, hx)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(after, network(x[:, None], hx)[0][:, 0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_time_spans_of_other_types(grad: bool, mixed_memory: bool) -> None:
    network, x = nn.CfC(4, 6, mixed_memory=mixed_memory), torch.randn(3, 5, 4)
    hx = (torch.zeros(3, 6),) * 2 if mixed_memory else torch.zeros(3, 6)
    with torch.set_grad_enabled(grad):
        expected, stepped = network(x, hx, 2.0)[0], network.step(x[:, 0], hx, 2.0)[0]
        for spans in (2, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor(2.0)):
            torch.testing.assert_close(network(x, hx, spans)[0], expected)
            torch.testing.assert_close(network.step(x[:, 0], hx, spans)[0], stepped)
        torch.testing.assert_close(network(x, hx, torch.full((3, 5), 2))[0], expected)
        for shape in ((3,), (3, 1)):
            torch.testing.assert_close(network.step(x[:, 0], hx, torch.full(shape, 2))[0], stepped)
        default = network.step(x[:, 0], hx)[0]
        assert torch.equal(network.step(x[:, 0], hx, None)[0], default)
        assert torch.equal(network.step(x[:, 0], hx, 1)[0], default)
        for bad in (True, 1j, "1", torch.tensor(True), torch.tensor(1j)):
            with pytest.raises(TypeError, match=r"nn\.CfC: timespans must be (a real|of a real)"):
                network(x, hx, bad)
            with pytest.raises(TypeError, match=r"nn\.CfC: timespan must be (a real|of a real)"):
                network.step(x[:, 0], hx, bad)
        for shape in ((1,), (1, 1), (1, 3), (3, 1, 1)):
            with pytest.raises(ValueError, match=r"timespan must be a scalar, \[B\] = \[3\] or"):
                network.step(x[:, 0], hx, torch.ones(shape))
        for shape in ((), (1,)):
            network.step(x[0, 0], None, torch.ones(shape))
        with pytest.raises(ValueError, match=r"timespan must be a scalar or \[1\], got \[2\]"):
            network.step(x[0, 0], None, torch.ones(2))


def test_sizes_of_numpy_s_integers() -> None:
    theirs = ncps.torch.CfC(4, np.int64(6), np.int64(2), backbone_units=np.int64(3))
    ours = nn.CfC(np.int64(4), np.int64(6), np.int64(2), backbone_units=np.int64(3))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_mixed_memory_says_when_dtypes_differ(grad: bool) -> None:
    network = nn.CfC(4, 6, mixed_memory=True)
    zeros = torch.zeros(3, 6)
    with torch.set_grad_enabled(grad):
        with pytest.raises(TypeError, match=r"input must be of the weights' dtype torch\.float32"):
            network(X.double())
        # A state is taken as the other networks take theirs.
        expected, _ = network(X, (zeros, zeros))
        y, (h, c) = network(X, (zeros.double(), zeros.bfloat16()))
    assert torch.equal(y, expected)
    assert h.dtype == c.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*no compiled kernels for meta")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_meta_device(grad: bool, mixed_memory: bool) -> None:
    # Not built there: ncps takes a wiring's masks from NumPy.
    network = nn.CfC(4, AutoNCP(14, 3), mixed_memory=mixed_memory).to("meta")
    with torch.device("meta"), torch.set_grad_enabled(grad):
        y, _ = network(torch.empty(2, 5, 4), timespans=torch.empty(2, 5))
    assert y.shape == (2, 5, 3)
    assert y.is_meta


def test_weights_packed_anew_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.CfC(4, 6, mixed_memory=True)
    expected, _ = network(X)
    packed_for = nn.CfC._packed_for

    def overtaken(self: nn.CfC, *arguments: Any) -> Any:
        packed = packed_for(self, *arguments)
        self._forget_packed()
        return packed

    monkeypatch.setattr(nn.CfC, "_packed_for", overtaken)
    with torch.no_grad():
        torch.testing.assert_close(network(X)[0], expected)
