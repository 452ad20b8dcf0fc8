"""What the tests of `nn.CfC` and `nn.LTC` share: pairs of networks, ncps' and ours."""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import ncps.torch
import torch
from hypothesis import strategies as st
from ncps.wirings import NCP, AutoNCP, FullyConnected, Random, Wiring
from torch import Tensor

from ember_ext import nn
from ember_ext.testing import assert_close


def same_everywhere(value: object) -> str:
    """Name a parameter without the address of its wiring, which differs between processes."""
    return re.sub(r" object at 0x\w+", "", str(value))


def pair_of(kind: str, input_size: int, units: Any, **options: Any) -> tuple[Any, Any]:
    """An ncps network and ours, with the same weights by the same seed.

    Args:
        kind: the class' name in both packages.
        input_size: number of features.
        units: number of units, or a wiring.
        options: of both constructors.
    """
    networks = []
    for package in (ncps.torch, nn):
        torch.manual_seed(3)
        # Building draws from the wiring's own generator.
        networks.append(getattr(package, kind)(input_size, copy.deepcopy(units), **options))
    theirs, ours = networks
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    # ncps starts the biases small and w_tau at 0, where |w_tau| has its kink.
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
            q.data.copy_(p.data)
    return theirs, ours


def draw_wiring(draw: st.DrawFn) -> Wiring | None:
    """A wiring, or None for a number of units."""
    kind = draw(st.sampled_from(["dense", "auto", "ncp", "full", "random"]))
    if kind == "dense":
        return None
    seed = draw(st.integers(0, 999))
    if kind == "auto":
        motor = draw(st.integers(1, 5))
        units = draw(st.integers(motor + 3, 24))
        return AutoNCP(units, motor, draw(st.sampled_from([0.1, 0.5, 0.8])), seed)
    if kind == "ncp":
        return NCP(5, 4, 2, 3, 2, 2, 2, seed)
    if kind == "full":
        return FullyConnected(draw(st.integers(1, 9)))
    return Random(draw(st.integers(2, 9)), sparsity_level=0.5, random_seed=seed)


class RowByRow(torch.nn.Module):
    """An ncps network on one row at a time: time spans of several rows it gets silently wrong."""

    def __init__(self, network: ncps.torch.CfC) -> None:
        super().__init__()
        self.network = network
        self.use_mixed = network.use_mixed

    def forward(self, x: Tensor, hx: Any, spans: Tensor | None) -> tuple[Tensor, Any]:
        if spans is None or x.dim() == 2:
            return self.network(x, hx, spans)  # type: ignore[no-any-return]
        dim = 0 if self.network.batch_first else 1
        outputs, states = [], []
        for row in range(x.shape[dim]):
            state = hx
            if hx is not None:
                state = tuple(h[row : row + 1] for h in hx) if self.use_mixed else hx[row : row + 1]
            y, last = self.network(x.narrow(dim, row, 1), state, spans.narrow(dim, row, 1))
            outputs.append(y)
            states.append(last if self.use_mixed else (last,))
        joined = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        y = torch.cat(outputs, dim if self.network.return_sequences else 0)
        return y, joined if self.use_mixed else joined[0]


def compute(network: torch.nn.Module, x: Tensor, hx: Any, spans: Tensor | None) -> list[Tensor]:
    """Output, final state and every gradient, ours and ncps' alike."""
    x = x.clone().requires_grad_()
    hx = None if hx is None else tuple(h.clone().requires_grad_() for h in hx)
    spans = None if spans is None else spans.clone().requires_grad_()
    initial = hx if hx is None or network.use_mixed else hx[0]
    y, last = network(x, initial, spans)
    outputs = [y, *(last if isinstance(last, tuple) else (last,))]
    leaves = [p for p in network.parameters() if p.requires_grad] + [x]
    leaves += ([] if spans is None else [spans]) + list(hx or ())
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


class Call(NamedTuple):
    """How a layer is called: rows (None for no batch), steps, and what it is given."""

    batch: int | None
    steps: int
    state: bool
    spans: bool
    chunk_size: int | None


@st.composite
def calls(draw: st.DrawFn, most_steps: int) -> Call:
    """Calls of up to so many steps."""
    return Call(
        draw(st.sampled_from([None, 1, 3, 10])),
        draw(st.integers(1, most_steps)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([None, 1, 4])),
    )


def check_equals_ncps(single: Any, ours: Any, inputs: int, call: Call, least_span: float) -> None:
    """Outputs and gradients of a pair of layers: equal in fp64, and as near to it in fp32.

    Args:
        single: the layer of ncps.
        ours: ours, with the same weights.
        inputs: number of features.
        call: how both are called.
        least_span: the shortest time span.
    """
    batch, steps, state, spans, ours.chunk_size = call
    if batch is None and not ours.batch_first and not ours.return_sequences:
        return  # ncps leaves a dimension of size 1 in its output
    theirs = RowByRow(single)
    torch.manual_seed(steps)
    rows = () if batch is None else (batch,)
    shape = (*rows, steps) if ours.batch_first else (steps, *rows)
    x = torch.randn(*shape, inputs)
    states = tuple(torch.randn(*rows, ours.state_size) for _ in range(1 + ours.use_mixed))
    hx = states if state else None
    times = least_span + 3 * torch.rand(shape) if spans else None
    eager = compute(theirs, x, hx, times)
    actual = compute(ours, x, hx, times)
    # Zeros of fp32 are ncps' default state; here it is given, so that fp64 stays fp64.
    double = tuple((h if state else torch.zeros_like(h)).double() for h in states)
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
