"""Shapes of time spans that ncps broadcasts: taken where it is right, and refused elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import ncps.torch
import pytest
import torch
from liquid_pairs import pair_of
from ncps.wirings import NCP, AutoNCP, FullyConnected, Wiring
from torch import Tensor

import ember_ext
from ember_ext import _native, nn

pytestmark = pytest.mark.filterwarnings("ignore:.*step by step, which is slower:UserWarning")

UNITS: dict[str, Any] = {
    "dense": 5,
    "one": 1,
    "wired": AutoNCP(11, 3),
    "even": NCP(3, 3, 3, 2, 2, 2, 2),
    "full": FullyConnected(5),
}


def truth(theirs: Any, x: Tensor, hx: Any, spans: Tensor) -> tuple[Tensor, Tensor]:
    """ncps row by row with [B, T, 1 or H], where no dimension can be mistaken for another."""
    outputs, states = [], []
    for b in range(len(x)):
        state = tuple(h[b : b + 1] for h in hx) if theirs.use_mixed else hx[b : b + 1]
        y, last = theirs(x[b : b + 1], state, spans[b : b + 1])
        outputs.append(y)
        states.append(torch.cat(last, 1) if theirs.use_mixed else last)
    return torch.cat(outputs), torch.cat(states)


@pytest.mark.parametrize("mixed_memory", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", ["default", "pure", "no_gate"])
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_shapes_of_ncps(
    kind: str, name: str, mode: str, batch_first: bool, mixed_memory: bool
) -> None:
    if kind == "LTC" and (mode != "default" or mixed_memory or name not in ("dense", "wired")):
        return
    options = {"batch_first": True, "mixed_memory": mixed_memory}
    if kind == "CfC":
        options["mode"] = mode
    units = copy.deepcopy(UNITS[name])
    theirs, ours = (network.double() for network in pair_of(kind, 4, units, **options))
    ours.batch_first = batch_first
    order = (lambda v: v) if batch_first else (lambda v: v.transpose(0, 1))
    own = ours._span_units
    sizes = {"dense": 5, "one": 1, "wired": None, "even": 3, "full": 5}
    assert own == (ours.state_size if kind == "LTC" else sizes[name])
    generator = torch.Generator().manual_seed(0)
    for batch, steps in ((1, 4), (3, 4), (5, 4), (4, 4), (3, 1), (1, 1)):
        x = torch.randn(batch, steps, 4, generator=generator).double()
        state = torch.randn(batch, ours.state_size, generator=generator).double()
        hx = (state, state / 2) if mixed_memory else state
        for rows in {1, batch}:
            for end in (None, 1, *([] if own is None else [own])):
                shape = (rows, steps) if end is None else (rows, steps, end)
                spans = 0.1 + torch.rand(shape, generator=generator).double()
                full = (spans[..., None] if end is None else spans).expand(batch, -1, -1)
                expected, expected_last = truth(theirs, x, hx, full)
                with torch.set_grad_enabled(batch != 3):
                    y, last = ours(order(x), hx, order(spans))
                last = torch.cat(last, 1) if mixed_memory else last
                torch.testing.assert_close(order(y), expected)
                torch.testing.assert_close(last, expected_last)
        if not batch_first:
            spans = 0.1 + torch.rand(steps, generator=generator).double()
            expected, _ = truth(theirs, x, hx, spans[None, :, None].expand(batch, -1, -1))
            torch.testing.assert_close(order(ours(order(x), hx, spans)[0]), expected)
        for bad in (
            (batch + 1, steps, 1),
            (batch, steps, 9),
            (batch, steps + 1),
            (batch, steps, 0),
        ):
            with pytest.raises(ValueError, match="timespans must be a scalar"):
                ours(order(x), hx, order(torch.ones(bad)))
        first = tuple(h[0] for h in hx) if mixed_memory else hx[0]
        for end in (None, 1, *([] if own is None else [own])):
            shape = (steps,) if end is None else (steps, end)
            spans = 0.1 + torch.rand(shape, generator=generator).double()
            y, _ = ours(x[0], first, spans)
            full = (spans[..., None] if end is None else spans)[None]
            torch.testing.assert_close(y, truth(theirs, x[:1], hx, full)[0][0])


@pytest.mark.parametrize("name", ["dense", "wired", "even", "full"])
@pytest.mark.parametrize("mode", ["default", "pure"])
def test_all_that_ncps_takes_and_gets_right(name: str, mode: str) -> None:
    """Every small shape: ncps' answer where it has one that its rows give alone, or an error."""
    theirs, ours = pair_of("CfC", 2, copy.deepcopy(UNITS[name]), mode=mode)
    torch.manual_seed(0)
    taken = set()
    for batch, steps in ((1, 2), (2, 3), (3, 2), (5, 2), (2, 1)):
        x, h = torch.randn(batch, steps, 2), torch.randn(batch, ours.state_size)
        sizes = sorted({1, 2, 3, 5, batch, steps})
        for shape in [(b, t) for b in sizes for t in sizes] + [
            (b, steps, s) for b in sizes for s in sizes
        ]:
            if shape[1] != steps:  # ncps takes the first of more steps than there are
                continue
            spans = 0.1 + torch.rand(shape)
            try:
                expected, _ = theirs(x, h, spans)
                # Right is what does not depend on who else is in the batch.
                rows = spans if shape[0] == batch else spans.expand(batch, *shape[1:])
                alone = [theirs(x[b : b + 1], h[b : b + 1], rows[b : b + 1]) for b in range(batch)]
                right = expected.shape[:2] == (batch, steps) and torch.allclose(
                    expected, torch.cat([y for y, _ in alone]), atol=1e-5
                )
            except RuntimeError:
                right = False
            if right:
                taken.add(shape)
                torch.testing.assert_close(ours(x, h, spans)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(taken) > 5


def test_spans_of_units_in_every_way() -> None:
    torch.manual_seed(0)
    network = nn.CfC(3, 5, mode="default", backbone_units=6)
    x, h = torch.randn(4, 6, 3), torch.randn(4, 5)
    spans = torch.rand(4, 6, 5, requires_grad=True)
    theirs = copy.copy(network)
    theirs.__class__ = ncps.torch.CfC
    expected, _ = theirs(x, h, spans)
    y, _ = network(x, h, spans)
    torch.testing.assert_close(y, expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), spans)
    (gradient,) = torch.autograd.grad(y.square().sum(), spans)
    torch.testing.assert_close(gradient, wanted)
    _native._warn.cache_clear()
    with pytest.warns(UserWarning, match="nn.CfC goes step by step.*units have time spans"):
        network(x, h, spans)
    with torch.no_grad(), ember_ext.use_reference():
        torch.testing.assert_close(network(x, h, spans)[0], expected)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            state, outputs = h, []
            for t in range(6):
                step, state = network.step(x[:, t], state, spans[:, t])
                outputs.append(step)
            torch.testing.assert_close(torch.stack(outputs, 1), expected)
            alone, _ = network.step(x[0, 0], h[0], spans[0, 0])
            torch.testing.assert_close(alone, expected[0, 0])
            shared, _ = network.step(x[:, 0], h, spans[:1, 0])
            torch.testing.assert_close(shared, theirs(x[:, :1], h, spans[:1, :1])[0][:, 0])
            one, _ = network.step(x[:, 0], h, torch.tensor([0.3]))
            torch.testing.assert_close(one, network.step(x[:, 0], h, 0.3)[0])
    lengths = [6, 0, 2, 3]
    beyond = torch.arange(6) >= torch.tensor(lengths)[:, None]
    padded = spans.detach().masked_fill(beyond[..., None], float("nan"))
    y, _ = network(x, h, padded, lengths=lengths)
    torch.testing.assert_close(y, expected.masked_fill(beyond[..., None], 0))
    with pytest.raises(
        ValueError, match=r"timespans must be finite and >= 0, got nan at \[1, 0, 0\]"
    ):
        network(x, h, padded)


def test_wirings_of_one_width_share_spans() -> None:
    """ncps hands all layers the same spans, so they belong to a unit's place in its layer."""
    wiring: Wiring = UNITS["even"]
    theirs, ours = pair_of("CfC", 4, copy.deepcopy(wiring))
    x, spans = torch.randn(2, 3, 4), torch.rand(2, 3, 3)
    torch.testing.assert_close(ours(x, timespans=spans)[0], theirs(x, timespans=spans)[0])
