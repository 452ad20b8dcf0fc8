"""`ember_ext.nn.LTC` against `ncps.torch.LTC`; test_liquid.py has what it shares with CfC."""

from __future__ import annotations

import copy
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
    compute,
    draw_wiring,
    pair_of,
    same_everywhere,
)
from ncps.wirings import AutoNCP, FullyConnected, Random, Wiring
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

from ember_ext import _native, nn

MAPPINGS = ("affine", "linear", None)


def pair(input_size: int, units: Any, **options: Any) -> tuple[ncps.torch.LTC, nn.LTC]:
    return pair_of("LTC", input_size, units, **options)


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, Any, dict[str, Any]]:
    options: dict[str, Any] = {
        "return_sequences": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "mixed_memory": draw(st.booleans()),
        "input_mapping": draw(st.sampled_from(MAPPINGS)),
        "output_mapping": draw(st.sampled_from(MAPPINGS)),
        "ode_unfolds": draw(st.integers(1, 8)),
        "epsilon": draw(st.sampled_from([1e-8, 0.0, 0.1])),
        "implicit_param_constraints": draw(st.booleans()),
    }
    return draw(st.integers(1, 7)), draw_wiring(draw) or draw(st.integers(1, 12)), options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(network=networks(), call=calls(most_steps=7))
def test_equals_ncps(network: tuple[int, Any, dict[str, Any]], call: Call) -> None:
    inputs, units, options = network
    check_equals_ncps(*pair(inputs, units, **options), inputs, call, least_span=0.1)


SYNAPSES = [f"{side}{name}" for side in ("", "sensory_") for name in ("w", "mu", "sigma", "erev")]


@pytest.mark.parametrize("implicit", [True, False])
def test_absent_synapses_get_no_gradient(implicit: bool) -> None:
    network = nn.LTC(3, AutoNCP(14, 3), implicit_param_constraints=implicit)
    network(torch.randn(2, 4, 3))[0].square().sum().backward()
    for name in SYNAPSES:
        mask = network.rnn_cell.get_parameter(
            "sensory_sparsity_mask" if name.startswith("sensory") else "sparsity_mask"
        )
        gradient = network.rnn_cell.get_parameter(name).grad
        assert gradient is not None
        assert (gradient[mask == 0] == 0).all()
        assert (gradient[mask == 1] != 0).any()
    assert network.rnn_cell.sparsity_mask.grad is None


def test_weights_of_absent_synapses_have_no_influence() -> None:
    network = nn.LTC(3, AutoNCP(14, 3))
    x = torch.randn(2, 4, 3)
    expected, _ = network(x)
    with torch.no_grad():
        for name in SYNAPSES:
            weight = network.rnn_cell.get_parameter(name)
            mask = network.rnn_cell.get_parameter(
                "sensory_sparsity_mask" if name.startswith("sensory") else "sparsity_mask"
            )
            weight[mask == 0] = float("nan")
        assert torch.equal(network(x)[0], expected)


def change_in_place(mask: Tensor) -> None:
    with torch.no_grad():
        mask[:, ::2] = 0


def change_through_data(mask: Tensor) -> None:
    mask.data[:, ::2] = 0


def change_through_numpy(mask: Tensor) -> None:
    mask.numpy()[:, ::2] = 0


def change_to_fractions(mask: Tensor) -> None:
    mask.data.mul_(torch.linspace(-0.5, 2, mask.numel()).view(mask.shape))


def replace_data(mask: Tensor) -> None:
    mask.data = torch.ones_like(mask) - mask.data


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["sparsity_mask", "sensory_sparsity_mask"])
@pytest.mark.parametrize(
    "change",
    [change_in_place, change_through_data, change_through_numpy, change_to_fractions, replace_data],
)
def test_changed_masks_are_followed(change: Any, name: str, grad: bool) -> None:
    theirs, ours = pair(4, AutoNCP(14, 3))
    x, hx = torch.randn(3, 5, 4), torch.zeros(3, 14)
    with torch.set_grad_enabled(grad):
        before, _ = ours(x)
        ours.step(x[:, 0], hx)
        for network in (theirs, ours):
            change(network.rnn_cell.get_parameter(name))
        expected, last = theirs(x)
        actual, own_last = ours(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(own_last, last)
        assert not torch.allclose(before, expected)
        torch.testing.assert_close(ours.step(x[:, 0], hx)[0], expected[:, 0])


def test_a_mask_s_own_gradient() -> None:
    theirs, ours = pair(4, AutoNCP(14, 3))
    for network in (theirs, ours):
        network.rnn_cell.sparsity_mask.requires_grad_()
    x = torch.randn(3, 5, 4)
    for a, b in zip(compute(ours, x, None, None), compute(theirs, x, None, None), strict=True):
        torch.testing.assert_close(a, b)
    gradient = torch.autograd.grad(ours(x)[0].sum(), ours.rnn_cell.sparsity_mask)[0]
    assert (gradient[ours.rnn_cell.sparsity_mask == 0] != 0).any()


def test_masks_of_another_shape() -> None:
    network = nn.LTC(4, AutoNCP(14, 3))
    network.rnn_cell.sparsity_mask = torch.nn.Parameter(torch.ones(14, 13), requires_grad=False)
    expected = r"sparsity_mask must be shaped as its weights, \[14, 14\], got \[14, 13\]"
    with pytest.raises(ValueError, match=expected):
        network(X)


@pytest.mark.parametrize("implicit", [True, False])
def test_weight_constraints(implicit: bool) -> None:
    theirs, ours = pair(4, 6, implicit_param_constraints=implicit)
    x, hx = torch.randn(3, 5, 4), torch.zeros(3, 6)
    for network in (theirs, ours):
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data -= 0.2
    with torch.no_grad():
        # Negative weights are the user's to clip: ncps computes with them, too.
        unclipped, _ = theirs(x)
        torch.testing.assert_close(ours(x)[0], unclipped)
        ours.step(x[:, 0], hx)
        for network in (theirs, ours):
            network.rnn_cell.apply_weight_constraints()
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b)
        expected, _ = theirs(x)
        torch.testing.assert_close(ours.step(x[:, 0], hx)[0], expected[:, 0])
        torch.testing.assert_close(ours(x)[0], expected)
        assert torch.allclose(unclipped, expected) == implicit


def test_constraints_of_changed_parameters() -> None:
    cell = nn.LTC(4, 6, implicit_param_constraints=False).rnn_cell
    cell.w.data -= 0.5
    prune.l1_unstructured(cell, "w", 0.5)
    parametrize.register_parametrization(cell, "gleak", Shifted())
    cell.apply_weight_constraints()
    assert (cell.w_orig >= 0).all()
    assert (cell.gleak >= 0).all()
    old = nn.LTC(4, 6, implicit_param_constraints=False).rnn_cell
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(old, "w")
    with pytest.raises(RuntimeError, match=r"nn\.LTCCell: w must be a parameter, pruned or"):
        old.apply_weight_constraints()


class Shifted(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - 0.1

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight + 0.1


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


X = torch.zeros(3, 8, 4)


def with_parameters(network: ncps.torch.LTC, values: dict[str, Tensor]) -> ncps.torch.LTC:
    """A copy of an ncps network that computes with other parameters."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, value in values.items():
            network.rnn_cell.get_parameter(name).copy_(value)
    return network


@pytest.mark.filterwarnings("ignore:.*step, which is slower:UserWarning")
@pytest.mark.parametrize("way", ["parametrised", "pruned", "functional", "assigned", "replaced"])
def test_computes_with_the_parameters_that_the_module_has(way: str) -> None:
    """ncps' forward reads a dict of the first ones, whatever becomes of them."""
    theirs, ours = pair(4, AutoNCP(14, 3))
    cell, x = ours.rnn_cell, torch.randn(3, 5, 4)
    call: Any = ours
    w = 2 * cell.w.detach()
    if way == "parametrised":
        parametrize.register_parametrization(cell, "w", Doubled())
    elif way == "pruned":
        prune.custom_from_mask(cell, "w", (torch.arange(14.0) >= 3).expand(14, 14))
        w = cell.w.detach()
    elif way == "functional":

        def call(x: Tensor) -> Any:
            return torch.func.functional_call(ours, {"rnn_cell.w": w}, x)

    elif way == "assigned":
        ours.load_state_dict({**ours.state_dict(), "rnn_cell.w": w}, assign=True)
    else:
        cell.w = torch.nn.Parameter(w)
    expected = with_parameters(theirs, {"w": w})
    torch.testing.assert_close(call(x)[0], expected(x)[0])
    for _ in range(2):  # graphs of earlier calls must not be gone through again
        call(x)[0].sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(call(x)[0], expected(x)[0])
    assert not torch.allclose(expected(x)[0], theirs(x)[0])
    if way == "pruned":
        with torch.no_grad():
            cell.w_orig.mul_(3)
        torch.testing.assert_close(ours(x)[0], with_parameters(theirs, {"w": 3 * w})(x)[0])


def test_ncps_forgets_parameters_that_are_assigned() -> None:
    """The fault of ncps that `LTCCell` mends: once this fails, its docstring is out of date."""
    theirs, _ = pair(4, 6)
    before = theirs(X)[0]
    other = {name: 2 * value for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(other, assign=True)
    assert torch.equal(theirs(X)[0], before)


def test_moves_to_the_meta_device_and_back() -> None:
    ours = nn.LTC(4, 6)
    state = copy.deepcopy(ours.state_dict())
    expected, _ = ours(X)
    ours.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(ours(X)[0], expected)


def sigmoid_of_its_own(cell: Any) -> None:
    cell._sigmoid = lambda v, mu, sigma: torch.relu(sigma * (v.unsqueeze(-1) - mu))


def another_positive_function(cell: Any) -> None:
    cell.make_positive_fn = torch.nn.ReLU()


def a_steeper_softplus(cell: Any) -> None:
    cell.make_positive_fn = torch.nn.Softplus(beta=3)


def outputs_of_its_own(cell: Any) -> None:
    cell._map_outputs = lambda state: 3 * state[:, :2]


def a_solver_of_its_own(cell: Any) -> None:
    solve = cell._ode_solver
    cell._ode_solver = lambda inputs, state, time: solve(inputs, state, time) + 1


def other_solver_steps(cell: Any) -> None:
    cell._ode_unfolds, cell._epsilon = 2, 0.5


def a_forward_of_its_own(cell: Any) -> None:
    forward = type(cell).forward
    cell.forward = lambda x, h, t: tuple(2 * r for r in forward(cell, x, h, t))


@pytest.mark.filterwarnings("ignore:.*step, which is slower:UserWarning")
@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize("mixed_memory", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        sigmoid_of_its_own,
        another_positive_function,
        a_steeper_softplus,
        outputs_of_its_own,
        a_solver_of_its_own,
        other_solver_steps,
        a_forward_of_its_own,
    ],
)
def test_changed_cells_are_followed(
    change: Any, mixed_memory: bool, return_sequences: bool
) -> None:
    options = {"mixed_memory": mixed_memory, "return_sequences": return_sequences}
    theirs, ours = pair(4, AutoNCP(14, 3), **options)
    x = torch.randn(3, 5, 4)
    plain, _ = ours(x)
    with torch.no_grad():
        ours.step(x[:, 0])
    for network in (theirs, ours):
        change(network.rnn_cell)
    expected, last = theirs(x)
    assert plain.shape != expected.shape or not torch.allclose(plain, expected)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            actual, own_last = ours(x)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(own_last, last)
            torch.testing.assert_close(ours.step(x[:, 0])[0], theirs(x[:, :1])[0].view(3, -1))


def test_a_changed_cell_s_last_outputs_of_padded_rows() -> None:
    ours = nn.LTC(4, AutoNCP(14, 3))
    outputs_of_its_own(ours.rnn_cell)
    x, lengths = torch.randn(3, 5, 4), torch.tensor([5, 0, 2])
    _native._warn.cache_clear()
    with pytest.warns(UserWarning, match="nn.LTC calls its cells .*: rnn_cell has a _map_outputs"):
        y, last = ours(x, lengths=lengths)
    ours.return_sequences = False
    expected = torch.stack([y[0, 4], 3 * torch.zeros(2), y[2, 1]])
    torch.testing.assert_close(ours(x, lengths=lengths)[0], expected)
    torch.testing.assert_close(3 * last[:, :2], expected)


@pytest.mark.parametrize("mixed_memory", [False, True])
def test_time_spans_must_be_positive(mixed_memory: bool) -> None:
    network = nn.LTC(4, 6, mixed_memory=mixed_memory)
    zeros = torch.zeros(3, 6)
    hx = (zeros, zeros) if mixed_memory else zeros
    message = "timespan.* must be finite and > 0, as the cell divides by it, got"
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for bad in (0.0, -1.0, float("nan"), float("inf")):
                for spans in (bad, torch.tensor(bad), torch.full((3, 8), bad)):
                    with pytest.raises(ValueError, match=message):
                        network(X, hx, spans)
                for span in (bad, torch.tensor(bad), torch.full((3,), bad)):
                    with pytest.raises(ValueError, match=message):
                        network.step(X[:, 0], hx, span)


def test_padding_may_hold_anything() -> None:
    network = nn.LTC(4, AutoNCP(14, 3))
    x, spans = torch.randn(3, 5, 4), torch.rand(3, 5) + 0.1
    lengths = torch.tensor([5, 0, 2])
    results = []
    for padding in (0.5, float("nan")):
        past = torch.arange(5) >= lengths[:, None]
        padded = x.masked_fill(past[..., None], padding).requires_grad_()
        y, last = network(padded, None, spans.masked_fill(past, padding), lengths=lengths)
        gradients = torch.autograd.grad(
            y.sum() + last.sum(), [padded, *(p for p in network.parameters() if p.requires_grad)]
        )
        assert (y[past] == 0).all()
        results.append([y, last, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


SIZE = {"input_size": 4, "units": 6}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"units": 2.5}, TypeError, "units must be an integer, got float"),
        ({"units": -2}, ValueError, "units must be >= 0, got -2"),
        ({"input_size": -1}, ValueError, "input_size must be >= 0, got -1"),
        ({"input_size": None}, TypeError, "input_size must be an integer, got NoneType"),
        ({"units": AutoNCP(9, 2), "input_size": None}, ValueError, "units must be a wiring that"),
        ({"units": Wiring(5)}, ValueError, "units must be a wiring with an output_dim, got None"),
        ({"ode_unfolds": 0}, ValueError, "ode_unfolds must be >= 1, got 0"),
        ({"ode_unfolds": -3}, ValueError, "ode_unfolds must be >= 0, got -3"),
        ({"ode_unfolds": 2.5}, TypeError, "ode_unfolds must be an integer, got float"),
        ({"epsilon": -1e-3}, ValueError, "epsilon must be finite and >= 0, got -0.001"),
        ({"epsilon": float("nan")}, ValueError, "epsilon must be finite and >= 0, got nan"),
        ({"epsilon": "1"}, TypeError, "epsilon must be a real number, got str"),
        ({"chunk_size": -4}, ValueError, "chunk_size must be >= 0, got -4"),
    ],
    ids=same_everywhere,
)
def test_bad_constructor_arguments(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"ember_ext\.nn\.LTC: " + message):
        nn.LTC(**SIZE | options)


def test_a_wiring_for_other_inputs() -> None:
    wiring = AutoNCP(9, 2)
    wiring.build(3)
    with pytest.raises(ValueError, match="input_size must be 3, for which the wiring was built"):
        nn.LTC(4, wiring)
    assert nn.LTC(None, wiring)(torch.zeros(2, 5, 3))[0].shape == (2, 5, 2)


@pytest.mark.parametrize(
    "units", [AutoNCP(14, 3), FullyConnected(5, 2), Random(7, 3), 6], ids=same_everywhere
)
def test_properties(units: Any) -> None:
    theirs, ours = pair(4, units)
    for name in (
        "state_size",
        "sensory_size",
        "motor_size",
        "output_size",
        "synapse_count",
        "sensory_synapse_count",
    ):
        for a, b in ((theirs, ours), (theirs.rnn_cell, ours.rnn_cell)):
            assert getattr(a, name) == getattr(b, name)
    assert ours.synapse_count == ours.sensory_synapse_count
    assert ours.input_size == theirs.input_size
    assert type(ours.wiring_or_units) is type(theirs.wiring_or_units)


def test_input_of_another_dtype_is_computed_in_the_wider_one() -> None:
    theirs, ours = pair(4, 6)
    x = torch.randn(3, 5, 4)
    for other in (x.double(), x.bfloat16()):
        expected, _ = theirs(other)
        actual, _ = ours(other)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            torch.testing.assert_close(ours(other)[0], expected)


def test_sizes_of_numpy_s_numbers() -> None:
    theirs, _ = pair(4, 6)
    ours = nn.LTC(np.int64(4), np.int64(6), ode_unfolds=np.int64(6), epsilon=np.float32(1e-8))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X)[0], theirs(X)[0])


@pytest.mark.filterwarnings("ignore:.*no compiled kernels")
def test_vmap_over_ensembles() -> None:
    networks = [nn.LTC(4, AutoNCP(14, 3)) for _ in range(2)]
    x = torch.randn(3, 5, 4)
    parameters, buffers = torch.func.stack_module_state(networks)

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(networks[0], (parameters, buffers), x)[0]

    actual = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(actual, torch.stack([network(x)[0] for network in networks]))


def test_spectral_norm_of_both_kinds() -> None:
    x = torch.randn(3, 5, 4)
    new, old = nn.LTC(4, 6), nn.LTC(4, 6)
    old.load_state_dict(new.state_dict())
    torch.manual_seed(0)
    parametrizations.spectral_norm(new.rnn_cell, "mu", n_power_iterations=50)
    torch.manual_seed(0)
    torch.nn.utils.spectral_norm(old.rnn_cell, "mu", n_power_iterations=50)
    _native._warn.cache_clear()
    with pytest.warns(UserWarning, match="nn.LTC calls its cells step by step.*rnn_cell has hooks"):
        torch.testing.assert_close(old(x)[0], new(x)[0], rtol=1e-4, atol=1e-5)
