"""The cells of `ember_ext.nn` against those of ncps, in loops over time that are the user's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import ncps.torch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liquid_pairs import draw_wiring
from ncps.wirings import AutoNCP, Wiring
from torch import Tensor

import ember_ext
from ember_ext import nn
from ember_ext.nn.accelerate import ACCELERATED_CELLS
from ember_ext.testing import assert_close

KINDS = [kind.__name__ for kind in ACCELERATED_CELLS]
every_cell = pytest.mark.parametrize("kind", KINDS)
INPUTS, STATES = 4, 14


def build(package: Any, kind: str, wiring: Wiring | None = None, **options: Any) -> Any:
    torch.manual_seed(2)
    wiring = AutoNCP(STATES, 3) if wiring is None else copy.deepcopy(wiring)
    if kind == "CfCCell":
        return package.CfCCell(INPUTS, wiring.units, **{"backbone_units": 9} | options)
    if kind == "WiredCfCCell":
        return package.WiredCfCCell(INPUTS, wiring, **options)
    return package.LTCCell(wiring, INPUTS, **options)


def pair(kind: str, wiring: Wiring | None = None, **options: Any) -> tuple[Any, Any]:
    theirs, ours = (build(package, kind, wiring, **options) for package in (ncps.torch, nn))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.requires_grad:
            a.data += 0.1 * torch.randn_like(a)
            b.data.copy_(a.data)
    return theirs, ours


def drive(cell: Any, x: Tensor, h: Tensor, spans: Any) -> tuple[Tensor, Tensor]:
    """A user's loop: x [B, T, C], spans for each step."""
    outputs = []
    for row, span in zip(x.unbind(1), spans, strict=True):
        y, h = cell(row, h, span)
        outputs.append(y)
    return torch.stack(outputs, 1), h


@st.composite
def cells(draw: st.DrawFn) -> tuple[str, Any, dict[str, Any]]:
    kind = draw(st.sampled_from(KINDS))
    options: dict[str, Any] = {}
    if kind == "LTCCell":
        options = {
            "input_mapping": draw(st.sampled_from(["affine", "linear", None])),
            "output_mapping": draw(st.sampled_from(["affine", "linear", None])),
            "ode_unfolds": draw(st.integers(1, 8)),
            "implicit_param_constraints": draw(st.booleans()),
        }
    else:
        options["mode"] = draw(st.sampled_from(["default", "pure", "no_gate"]))
    if kind == "CfCCell":
        options["backbone_layers"] = draw(st.integers(0, 2))
    return kind, draw_wiring(draw), options


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cell=cells(),
    batch=st.sampled_from([1, 3, 10]),
    spans=st.sampled_from(["one", "number", "rows"]),
)
def test_equals_ncps(cell: tuple[str, Any, dict[str, Any]], batch: int, spans: str) -> None:
    kind, wiring, options = cell
    theirs, ours = pair(kind, wiring, **options)
    states = ours.hidden_size if kind == "CfCCell" else ours.state_size
    torch.manual_seed(batch)
    x, h = torch.randn(batch, 3, INPUTS), torch.randn(batch, states)
    rows = 0.1 + torch.rand(3, batch, 1)
    times: Any = {"one": [1.0] * 3, "number": [0.5, 1.5, 0.5], "rows": rows.unbind(0)}[spans]

    def results(cell: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [p for p in cell.parameters() if p.requires_grad]
        inputs = [x.to(dtype).requires_grad_(), h.to(dtype).requires_grad_()]
        spans = [t.to(dtype) if isinstance(t, Tensor) else t for t in times]
        outputs = drive(cell, *inputs, spans)
        weights = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, [*leaves, *inputs], weights)
        with torch.no_grad():
            return [*outputs, *gradients, *drive(cell, *inputs, spans)]

    eager, actual = results(theirs, torch.float32), results(ours, torch.float32)
    exact, precise = (results(cell.double(), torch.float64) for cell in (theirs, ours))
    scale = max(1.0, *(float(tensor.detach().abs().max()) for tensor in exact))
    for index, (a, b, c, d) in enumerate(zip(actual, eager, exact, precise, strict=True)):
        torch.testing.assert_close(d, c, rtol=1e-10, atol=1e-10)
        assert_close(f"tensor {index}", a, b, c.detach(), scale=scale, floor_ulps=64.0)


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ember_ext":
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@every_cell
def test_a_step_is_one_operator(kind: str) -> None:
    cell = build(nn, kind)
    x, h = torch.randn(2, INPUTS), torch.zeros(2, STATES)
    with torch.no_grad():
        cell(x, h, 1.0)
        with Kernels() as kernels:
            cell(x, h, 1.0)
        assert len(kernels.calls) == 1
    with Kernels() as kernels:
        cell(x, h, 1.0)
    # A single step with gradients takes cfc_scan longer than it takes ncps.
    assert len(kernels.calls) == (kind == "LTCCell")


def load(cell: Any) -> None:
    cell.load_state_dict(
        {k: 0.5 * v for k, v in cell.state_dict().items() if "mask" not in k}, False
    )


def assign(cell: Any) -> None:
    state = {k: 0.5 * v for k, v in cell.state_dict().items() if "mask" not in k}
    cell.load_state_dict(state, strict=False, assign=True)


def soft_update(cell: Any) -> None:
    for p in cell.parameters():
        if p.requires_grad:
            p.data.copy_(0.9 * p.data + 0.1)


def to_double_and_back(cell: Any) -> None:
    for p in cell.double().parameters():
        if p.requires_grad:
            p.data.mul_(1.5)
    cell.float()


def step_an_optimiser(cell: Any) -> None:
    trainable = [p for p in cell.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, fused=True)
    y, h = cell(torch.ones(2, INPUTS), torch.zeros(2, STATES), 1.0)
    (y.sum() + h.sum()).backward()
    optimizer.step()


@every_cell
@pytest.mark.parametrize(
    "change", [load, assign, soft_update, to_double_and_back, step_an_optimiser]
)
def test_follows_its_weights(kind: str, change: Callable[[Any], None]) -> None:
    _, ours = pair(kind)
    x, h = torch.randn(2, INPUTS), torch.randn(2, STATES)
    with torch.no_grad():
        before = ours(x, h, 1.0)
    change(ours)
    fresh = build(ncps.torch, kind)
    fresh.load_state_dict(ours.state_dict())
    expected = fresh(x, h, 1.0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x, h, 1.0), expected)
    assert not torch.allclose(before[1], expected[1])


def hook_a_layer(cell: Any) -> None:
    part = next(m for m in cell.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Softplus)))
    part.register_forward_hook(lambda _module, _input, output: 2 * output)


def replace_a_function(cell: Any) -> None:
    if isinstance(cell, ncps.torch.LTCCell):
        cell._sigmoid = lambda v, mu, sigma: torch.relu(v.unsqueeze(-1) - mu)
        return
    inner = cell if isinstance(cell, ncps.torch.CfCCell) else cell.layer_1
    inner.tanh = torch.nn.Hardtanh()


@every_cell
@pytest.mark.parametrize("change", [hook_a_layer, replace_a_function])
def test_changed_cells_run_the_code_of_ncps(kind: str, change: Callable[[Any], None]) -> None:
    options = {"implicit_param_constraints": True} if kind == "LTCCell" else {}
    theirs, ours = pair(kind, **options)
    x, h = torch.randn(2, INPUTS), torch.randn(2, STATES)
    with torch.no_grad():
        ours(x, h, 1.0)
    change(theirs)
    change(ours)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for a, b in zip(ours(x, h, 1.0), theirs(x, h, 1.0), strict=True):
                assert torch.equal(a, b)


@every_cell
def test_time_spans(kind: str) -> None:
    theirs, ours = pair(kind)
    x, h = torch.randn(STATES, INPUTS), torch.randn(STATES, STATES)
    rows = 0.1 + torch.rand(STATES)
    units = 0.1 + torch.rand(1, STATES)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for span in (2, 0.5, torch.tensor(0.5), torch.tensor([0.5]), rows.unsqueeze(1)):
                torch.testing.assert_close(ours(x, h, span), theirs(x, h, span))
            # As many rows as units, where ncps silently takes the one for the other.
            torch.testing.assert_close(ours(x, h, rows), theirs(x, h, rows.unsqueeze(1)))
            if kind != "WiredCfCCell":
                torch.testing.assert_close(ours(x, h, units), theirs(x, h, units))


@pytest.mark.parametrize("grad", [True, False])
def test_an_ltc_s_time_spans_must_be_positive(grad: bool) -> None:
    cell = build(nn, "LTCCell")
    x, h = torch.randn(3, INPUTS), torch.zeros(3, STATES)
    torch.testing.assert_close(cell(x, h), cell(x, h, 1.0))
    for bad in (0.0, -1, float("nan"), torch.tensor(0.0), torch.tensor([1.0, 0.0, 2.0])):
        message = "timespans must be finite and > 0, as the cell divides by it"
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
            cell(x, h, bad)


@every_cell
def test_arguments_by_name_and_of_other_dtypes(kind: str) -> None:
    theirs, ours = pair(kind)
    x, h = torch.randn(3, INPUTS), torch.randn(3, STATES)
    names = {
        "CfCCell": ("input", "hx", "ts"),
        "WiredCfCCell": ("input", "hx", "timespans"),
        "LTCCell": ("inputs", "states", "elapsed_time"),
    }[kind]
    arguments = dict(zip(names, (x, h, 0.5), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(ours(**arguments), theirs(**arguments))
        # What ncps refuses is refused, and what it promotes is promoted.
        for other in ((x.double(), h), (x, h.double()), (x[:, :3], h), (x, h[:, :5]), (x[0], h[0])):
            try:
                expected = theirs(*other, 1.0)
            except (RuntimeError, IndexError) as error:
                with pytest.raises(type(error)):
                    ours(*other, 1.0)
            else:
                torch.testing.assert_close(ours(*other, 1.0), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x, h, 1.0), theirs(x, h, 1.0), rtol=0.02, atol=0.02)
    low = ours.bfloat16()(x.bfloat16(), h.bfloat16(), 1.0)
    assert low[0].dtype == low[1].dtype == torch.bfloat16
    torch.testing.assert_close(low[1].float(), theirs(x, h, 1.0)[1], rtol=0.05, atol=0.05)


@every_cell
def test_copies_pickles_and_compiles(kind: str) -> None:
    cell = build(nn, kind)
    x, h = torch.randn(2, INPUTS), torch.randn(2, STATES)
    with torch.no_grad():
        expected = cell(x, h, 1.0)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert type(other) is type(cell)
        assert not {"_packed", "_listed", "_params"} & set(vars(other))
        with torch.no_grad():
            torch.testing.assert_close(other(x, h, 1.0), expected)
    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x, h, 1.0), expected)


class Agent(torch.nn.Module):
    """As public code has them: cells alone, in layers, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = torch.nn.ModuleDict({kind: build(ncps.torch, kind) for kind in KINDS})
        self.layers = torch.nn.ModuleList([ncps.torch.CfC(4, AutoNCP(9, 2)), ncps.torch.LTC(4, 6)])

    def forward(self, x: Tensor) -> list[Tensor]:
        h = x.new_zeros(len(x), STATES)
        outputs = [y for cell in self.cells.values() for y in cell(x, h, 0.5)]
        return outputs + [layer(x[:, None])[0] for layer in self.layers]


def test_accelerate_takes_cells_that_stand_alone() -> None:
    agent, x = Agent(), torch.randn(2, INPUTS)
    expected, keys, parts = agent(x), list(agent.state_dict()), dict(agent.named_modules())
    report = ember_ext.accelerate(agent)
    assert report.left == {}
    assert report.replaced == (*(f"cells.{kind}" for kind in KINDS), "layers.0", "layers.1")
    assert f"cells.{KINDS[0]} ({KINDS[0]}): accelerated" in str(report)
    assert dict(agent.named_modules()) == parts
    assert list(agent.state_dict()) == keys
    for kind in KINDS:
        assert type(agent.cells[kind]) is getattr(nn, kind)
    # Cells of layers and of wired cells are those of ncps, but an LTC's.
    assert type(agent.layers[0].rnn_cell) is ncps.torch.WiredCfCCell
    assert type(agent.layers[1].rnn_cell) is nn.LTCCell
    assert type(agent.cells["WiredCfCCell"].layer_0) is ncps.torch.CfCCell
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(agent(x), expected)
    assert ember_ext.accelerate(agent).replaced == ()
    assert ember_ext.decelerate(agent).replaced == report.replaced
    assert b"ember_ext" not in pickle.dumps(agent)
    for a, b in zip(agent(x), expected, strict=True):
        assert torch.equal(a, b)


@every_cell
def test_accelerate_leaves_changed_cells(kind: str) -> None:
    subclass = type("Own", (getattr(ncps.torch, kind),), {})
    changed, own = build(ncps.torch, kind), build(ncps.torch, kind)
    own.__class__ = subclass
    replace_a_function(changed)
    report = ember_ext.accelerate(torch.nn.ModuleList([changed, own]))
    assert report.replaced == ()
    assert report.left["0"].startswith("cell")
    assert report.left["1"] == "Own is a subclass that may compute something else"


@pytest.mark.parametrize("options", [{"in_features": None}], ids=str)
def test_a_wiring_that_was_not_built(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Wiring error! Unknown number of input features"):
        nn.LTCCell(AutoNCP(9, 2), **options)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("unfolds", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("6", TypeError)]
)
def test_bad_numbers_of_solver_steps(unfolds: Any, error: type[Exception], grad: bool) -> None:
    cell = build(nn, "LTCCell", ode_unfolds=unfolds)
    with torch.set_grad_enabled(grad), pytest.raises(error, match="LTCCell: ode_unfolds must be"):
        cell(torch.zeros(1, INPUTS), torch.zeros(1, STATES))
