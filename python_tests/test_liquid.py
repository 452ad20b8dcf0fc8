"""What every liquid layer of `ember_ext.nn` must do, beyond its sums: see test_cfc, test_ltc."""

from __future__ import annotations

import copy
from typing import Any

import ncps.torch
import numpy as np
import pytest
import torch
from liquid_pairs import pair_of, same_everywhere
from ncps.wirings import AutoNCP
from torch import Tensor

from ember_ext import nn

LAYERS: dict[str, Any] = {"CfC": nn.CfC, "LTC": nn.LTC}
every_layer = pytest.mark.parametrize("kind", LAYERS)


X = torch.zeros(3, 8, 4)


def parameter_of(network: Any) -> tuple[Any, str]:
    """A module within a network's cell, and the name of a weight of its."""
    cell = network.rnn_cell
    if isinstance(cell, ncps.torch.LTCCell):
        return cell, "mu"
    return (cell if isinstance(cell, ncps.torch.CfCCell) else cell.layer_0).ff1, "weight"


@pytest.mark.parametrize("units", [AutoNCP(14, 3), 6], ids=["wired", "dense"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("CfC", {"mode": "default"}),
        ("CfC", {"mode": "pure"}),
        ("CfC", {"mode": "no_gate"}),
        ("LTC", {}),
        ("LTC", {"implicit_param_constraints": False, "ode_unfolds": 3}),
    ],
    ids=same_everywhere,
)
def test_time_spans_of_each_row_and_step(kind: str, units: Any, options: dict[str, Any]) -> None:
    theirs, ours = pair_of(kind, 4, units, **options)
    theirs, ours = theirs.double(), ours.double()
    # As many rows as units: where ncps is silently wrong.
    batch = ours.state_size
    x = torch.randn(batch, 5, 4, dtype=torch.float64)
    spans = 0.05 + torch.rand(batch, 5, dtype=torch.float64)
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
    ("kind", "options"),
    [
        ("CfC", {"units": AutoNCP(20, 4), "mode": "pure"}),
        (
            "CfC",
            {
                "units": 9,
                "mode": "no_gate",
                "proj_size": 2,
                "backbone_layers": 2,
                "activation": "silu",
            },
        ),
        ("LTC", {"units": 9, "input_mapping": "linear", "output_mapping": None, "ode_unfolds": 2}),
        *(
            (kind, options)
            for kind in LAYERS
            for options in (
                {"units": AutoNCP(20, 4)},
                {"units": 9},
                {"units": 9, "mixed_memory": True},
                {"units": 9, "return_sequences": False, "batch_first": False},
            )
        ),
    ],
    ids=same_everywhere,
)
def test_steps_equal_the_sequence(kind: str, options: dict[str, Any]) -> None:
    network = LAYERS[kind](5, **options)
    x, spans = torch.randn(3, 6, 5), 0.05 + torch.rand(3, 6)
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


@pytest.mark.parametrize("spans", ["none", "number", "scalar", "rows"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("CfC", {"mode": "default"}),
        ("CfC", {"mode": "pure"}),
        ("CfC", {"mode": "no_gate"}),
        ("LTC", {}),
        ("LTC", {"implicit_param_constraints": False, "output_mapping": "linear"}),
    ],
    ids=same_everywhere,
)
def test_inference_equals_training(kind: str, options: dict[str, Any], spans: str) -> None:
    x, lengths = torch.randn(3, 6, 5), torch.tensor([6, 0, 2])
    timespans = {
        "none": None,
        "number": 0.4,
        "scalar": torch.tensor(0.4),
        "rows": 0.05 + torch.rand(3, 6),
    }[spans]
    deep = {"proj_size": 2, "backbone_layers": 2, "backbone_dropout": 0.5} if kind == "CfC" else {}
    for units, more in (
        (AutoNCP(20, 4), {}),
        (9, deep),
        (9, {"return_sequences": False}),
        (9, {"mixed_memory": True}),
        (AutoNCP(20, 4), {"mixed_memory": True}),
    ):
        network = LAYERS[kind](5, units, **options | more).eval()
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            network.to(dtype)
            spans_ = timespans.to(dtype) if isinstance(timespans, Tensor) else timespans
            expected = network(x.to(dtype), timespans=spans_, lengths=lengths)
            with torch.no_grad():
                actual = network(x.to(dtype), timespans=spans_, lengths=lengths)
            for a, b in zip(actual, expected, strict=True):
                close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(a, b, **close)


@every_layer
def test_step_notices_changed_weights(kind: str) -> None:
    network = LAYERS[kind](3, AutoNCP(12, 2))
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
    owner, name = parameter_of(network)
    setattr(owner, name, torch.nn.Parameter(torch.randn_like(getattr(owner, name))))
    check()
    copied = copy.deepcopy(network)
    owner, name = parameter_of(copied)
    with torch.no_grad():
        getattr(owner, name).zero_()
    check()
    x, hx = x.double(), hx.double()
    network.double()
    check()


@every_layer
def test_step_is_differentiable(kind: str) -> None:
    network = LAYERS[kind](3, 7)
    x = torch.randn(2, 3, requires_grad=True)
    y, h = network.step(x, torch.randn(2, 7))
    (y.sum() + h.sum()).backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@every_layer
def test_padded_batches(kind: str) -> None:
    network = LAYERS[kind](3, AutoNCP(12, 2))
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
    mixed = LAYERS[kind](3, 5, mixed_memory=True)
    y, (h, c) = mixed(x, lengths=lengths)
    own, (own_h, own_c) = mixed(x[1:2, :2])
    torch.testing.assert_close(
        torch.cat([y[1, 1], h[1], c[1]]), torch.cat([own[0, 1], own_h[0], own_c[0]])
    )


def hook(network: Any) -> None:
    """Have the cell called step by step."""
    network.rnn_cell.register_forward_hook(lambda *_: None)


@pytest.mark.filterwarnings("ignore:.*step, which is slower:UserWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("alter", [None, hook], ids=["plain", "hooked"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("CfC", {"units": AutoNCP(13, 3)}),
        ("CfC", {"units": 5, "mode": "pure", "proj_size": 2}),
        ("CfC", {"units": 5, "backbone_layers": 3, "backbone_dropout": 0.5}),
        ("CfC", {"units": AutoNCP(13, 3), "mixed_memory": True}),
        ("CfC", {"units": 5, "mixed_memory": True, "return_sequences": False}),
        ("LTC", {"units": AutoNCP(13, 3)}),
        ("LTC", {"units": 5, "mixed_memory": True}),
    ],
    ids=same_everywhere,
)
def test_padding_does_not_matter(
    kind: str, options: dict[str, Any], alter: Any, value: float
) -> None:
    torch.manual_seed(0)
    network = LAYERS[kind](4, **options)
    if alter is not None:
        alter(network)
    lengths = torch.tensor([5, 0, 2, 4])
    beyond = torch.arange(5) >= lengths[:, None]
    x, spans = torch.randn(4, 5, 4), 0.1 + torch.rand(4, 5)
    size = network.state_size

    def results(fill: float) -> list[Tensor]:
        torch.manual_seed(1)  # dropout
        inputs = x.masked_fill(beyond[..., None], fill).requires_grad_()
        times = spans.masked_fill(beyond, fill).requires_grad_()
        h = torch.zeros(4, size).index_fill(0, torch.tensor([1]), fill).requires_grad_()
        hx = (h, h) if network.use_mixed else h
        y, last = network(inputs, hx, times, lengths=lengths.tolist())
        last = torch.cat(last) if network.use_mixed else last
        runs = (lengths > 0).repeat(len(last) // 4)
        y = y if network.return_sequences else y[lengths > 0]
        weights = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((y.sum(), last[runs].sum()), [inputs, times, *weights])
        assert (gradients[0][beyond] == 0).all()
        assert (gradients[1][beyond] == 0).all()
        with torch.no_grad():
            torch.manual_seed(1)
            again, _ = network(inputs, hx, times, lengths=lengths.to(torch.int16))
        again = again if network.return_sequences else again[lengths > 0]
        torch.testing.assert_close(again, y)
        return [y, last[runs], *gradients]

    for clean, padded in zip(results(0.5), results(value), strict=True):
        assert torch.equal(clean, padded)


@pytest.mark.parametrize("units", [AutoNCP(14, 3), 6], ids=["wired", "dense"])
@every_layer
def test_checkpoints_go_both_ways(kind: str, units: Any) -> None:
    theirs, _ = pair_of(kind, 4, units)
    ours = LAYERS[kind](4, copy.deepcopy(units))
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    getattr(ncps.torch, kind)(4, copy.deepcopy(units)).load_state_dict(ours.state_dict())


@every_layer
def test_bfloat16_and_autocast(kind: str) -> None:
    network = LAYERS[kind](4, AutoNCP(14, 3))
    x = torch.randn(3, 5, 4)
    y, _ = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, last = network(x)
    # ncps' LTC consists of operations that autocast leaves alone.
    assert low.dtype == last.dtype == (torch.bfloat16 if kind == "CfC" else torch.float32)
    torch.testing.assert_close(low.float(), y, atol=0.03, rtol=0.05)
    half, last = network.bfloat16()(x.bfloat16())
    assert half.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, atol=0.03, rtol=0.05)


@every_layer
def test_compiles_whole(kind: str) -> None:
    torch._dynamo.reset()
    network = LAYERS[kind](4, AutoNCP(14, 3))
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


@every_layer
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
        ({"timespans": -1.0}, ValueError, "timespans must be finite and >=? 0"),
        ({"timespans": torch.full((3, 8), float("inf"))}, ValueError, "timespans must be finite"),
        ({"lengths": torch.tensor([1, 2, 9])}, ValueError, r"lengths must be within \[0, T\]"),
        ({"lengths": torch.tensor([1, -2, 3])}, ValueError, r"lengths must be within \[0, T\]"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must be \[B\] = \[3\], got"),
        ({"lengths": torch.ones(3)}, TypeError, "lengths must be of an integer dtype, got"),
        ({"lengths": [1.0, 2, 3]}, TypeError, "lengths must be of an integer dtype, got"),
        ({"input": X[0], "lengths": torch.tensor([1])}, ValueError, "lengths must be None for an"),
    ],
    ids=same_everywhere,
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_call_arguments(
    kind: str, arguments: dict[str, Any], error: type[Exception], message: str, grad: bool
) -> None:
    network = LAYERS[kind](4, 6)
    with torch.set_grad_enabled(grad):
        network(X)
        with pytest.raises(
            error, match=rf"ember_ext\.(nn\.{kind}|{kind.lower()}_scan): .*{message}"
        ):
            network(**{"input": X} | arguments)


@every_layer
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [0, 4])
def test_bad_arguments_with_mixed_memory(kind: str, grad: bool, steps: int) -> None:
    network = LAYERS[kind](4, 6, mixed_memory=True)
    zeros = torch.zeros(3, 6)
    with torch.set_grad_enabled(grad):
        for arguments, error, message in (
            ({"hx": zeros}, TypeError, r"hx must be a pair \(h, c\) with mixed memory, got Tensor"),
            ({"hx": (zeros, zeros[:2])}, ValueError, r"hx\[1\] must be \[B, S\] = \[3, 6\], got"),
            ({"timespans": -0.5}, ValueError, "timespans must be finite and >=? 0.*, got -0.5"),
            ({"lengths": torch.tensor([1, 2, 9])}, ValueError, r"lengths must be within \[0, T\]"),
        ):
            with pytest.raises(error, match=message):
                network(X[:, :steps], **arguments)


@every_layer
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X,), r"input must be \[B, C\] or \[C\], got \[3, 8, 4\]"),
        ((X[:, 0, :3], torch.zeros(3, 6)), r"C = 4"),
        ((X[:, 0], torch.zeros(2, 6)), r"hx must be \[B, S\] = \[3, 6\], got \[2, 6\]"),
        ((X[:, 0], torch.zeros(3, 6), -1.0), "timespans must be finite and >=? 0.*, got -1.0"),
        ((X[:, 0], torch.zeros(3, 6), torch.tensor([1.0, 2.0, -3.0])), "timespans must be finite"),
    ],
    ids=same_everywhere,
)
def test_bad_step_arguments(kind: str, arguments: tuple[Any, ...], message: str) -> None:
    network = LAYERS[kind](4, 6)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        network.step(*arguments)


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_a_step_of_mixed_memory_needs_both_states(kind: str, grad: bool) -> None:
    network = LAYERS[kind](4, 6, mixed_memory=True)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(TypeError, match=r"hx must be a pair \(h, c\) with mixed memory"),
    ):
        network.step(X[:, 0], torch.zeros(3, 6))


@every_layer
@pytest.mark.parametrize("units", [AutoNCP(24, 6), 10], ids=["wired", "dense"])
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_inference_follows_the_weights(kind: str, units: Any, mixed_memory: bool) -> None:
    """After a fused optimiser's step, which leaves no trace in a tensor's version, too."""
    network = LAYERS[kind](5, units, mixed_memory=mixed_memory)
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
            torch.testing.assert_close(by_step(), expected)
            torch.testing.assert_close(network(x)[0], expected)


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_integers_are_promoted_as_by_ncps(kind: str, grad: bool) -> None:
    theirs, ours = pair_of(kind, 4, 6)
    x = torch.randint(0, 3, (3, 5, 4))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.step(x[:, 0])[1], theirs(x[:, :1])[1])


@every_layer
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_time_spans_of_other_types(kind: str, grad: bool, mixed_memory: bool) -> None:
    network, x = LAYERS[kind](4, 6, mixed_memory=mixed_memory), torch.randn(3, 5, 4)
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
            with pytest.raises(
                TypeError, match=rf"nn\.{kind}: timespans must be (a real|of a real)"
            ):
                network(x, hx, bad)
            with pytest.raises(
                TypeError, match=rf"nn\.{kind}: timespan must be (a real|of a real)"
            ):
                network.step(x[:, 0], hx, bad)
        for shape in ((2,), (2, 1), (1, 3), (3, 1, 1)):
            with pytest.raises(ValueError, match=r"timespan must be a scalar, \[B\] = \[3\] or"):
                network.step(x[:, 0], hx, torch.ones(shape))
        for shape in ((), (1,)):
            network.step(x[0, 0], None, torch.ones(shape))
        with pytest.raises(ValueError, match=r"timespan must be a scalar or \[1\].*, got \[2\]"):
            network.step(x[0, 0], None, torch.ones(2))


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_mixed_memory_says_when_dtypes_differ(kind: str, grad: bool) -> None:
    network = LAYERS[kind](4, 6, mixed_memory=True)
    zeros = torch.zeros(3, 6)
    with torch.set_grad_enabled(grad):
        with pytest.raises(TypeError, match=r"input must be of the weights' dtype torch\.float32"):
            network(X.double())
        # A state is taken as the other networks take theirs.
        expected, _ = network(X, (zeros, zeros))
        y, (h, c) = network(X, (zeros.double(), zeros.bfloat16()))
    assert torch.equal(y, expected)
    assert h.dtype == c.dtype == torch.float32


@every_layer
@pytest.mark.filterwarnings("ignore:.*no compiled kernels for meta")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mixed_memory", [False, True])
def test_meta_device(kind: str, grad: bool, mixed_memory: bool) -> None:
    # Not built there: ncps takes a wiring's masks from NumPy.
    network = LAYERS[kind](4, AutoNCP(14, 3), mixed_memory=mixed_memory).to("meta")
    with torch.device("meta"), torch.set_grad_enabled(grad):
        y, _ = network(torch.empty(2, 5, 4), timespans=torch.empty(2, 5))
    assert y.shape == (2, 5, 3)
    assert y.is_meta


@every_layer
def test_weights_packed_anew_by_another_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = LAYERS[kind](4, 6, mixed_memory=True)
    expected, _ = network(X)
    packed_for = LAYERS[kind]._packed_for

    def overtaken(self: Any, *arguments: Any) -> Any:
        packed = packed_for(self, *arguments)
        self._packed = None
        return packed

    monkeypatch.setattr(LAYERS[kind], "_packed_for", overtaken)
    with torch.no_grad():
        torch.testing.assert_close(network(X)[0], expected)
