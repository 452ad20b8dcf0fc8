"""`ember_ext.nn.CfC` against `ncps.torch.CfC`: values, gradients, checkpoints, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import ncps.torch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liquid_pairs import (
    Call,
    calls,
    check_equals_ncps,
    draw_wiring,
    pair_of,
    same_everywhere,
)
from ncps.wirings import AutoNCP, Random
from torch import Tensor
from torch.nn.utils import prune

from ember_ext import _native, nn

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
@given(network=networks(), call=calls(most_steps=19))
def test_equals_ncps(network: tuple[int, Any, dict[str, Any]], call: Call) -> None:
    inputs, units, options = network
    check_equals_ncps(*pair(inputs, units, **options), inputs, call, least_span=0.0)


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
    ids=same_everywhere,
)
def test_bad_constructor_arguments(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"ember_ext\.nn\.CfC: " + message):
        nn.CfC(**SIZE | options)


X = torch.zeros(3, 8, 4)


@pytest.mark.parametrize("grad", [True, False])
def test_a_step_goes_through_another_readout(grad: bool) -> None:
    network, h = nn.CfC(4, 6), torch.zeros(3, 6)
    network.fc = torch.nn.Linear(6, 2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(network.step(X[:, 0], h)[0], network(X[:, :1], h)[0][:, 0])


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


def test_sizes_of_numpy_s_integers() -> None:
    theirs = ncps.torch.CfC(4, np.int64(6), np.int64(2), backbone_units=np.int64(3))
    ours = nn.CfC(np.int64(4), np.int64(6), np.int64(2), backbone_units=np.int64(3))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
