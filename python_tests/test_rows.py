"""How layers that go step by step take a batch of sequences apart: rows leave when they end."""

from __future__ import annotations

from typing import Any

import ncps.torch
import pytest
import torch
from torch import Tensor

from ember_ext import _native, nn
from ember_ext.nn._rows import Rows


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [
        (5, None),
        (5, [5, 5, 5]),
        (5, [3, 5, 0, 1, 3]),
        (5, [1, 4]),  # no row takes the last step
        (5, [0, 0]),
        (0, [0, 0, 0]),
        (0, None),
        (4, []),
    ],
)
def test_packing(steps: int, lengths: list[int] | None) -> None:
    batch = 3 if lengths is None else len(lengths)
    ends = [steps] * batch if lengths is None else lengths
    rows = Rows(batch, steps, None if lengths is None else torch.tensor(ends, dtype=torch.int64))
    x = torch.randn(batch, steps, 2, dtype=torch.float64, requires_grad=True)
    packed = rows.pack(x)
    parts = rows.split(packed)
    assert sum(rows.counts) == sum(ends) == packed[..., 0].numel()
    if batch:
        assert [len(part) for part in parts] == [
            sum(end > t for end in ends) for t in range(max(ends))
        ]
    if sum(ends) > 0:
        beyond = torch.arange(steps) >= torch.tensor(ends)[:, None]
        y = rows.unpack(parts)
        assert torch.equal(y, x.masked_fill(beyond[..., None], 0))
        assert torch.autograd.gradcheck(lambda x: rows.unpack(rows.split(rows.pack(x))), x)

    def count(t: int, total: Tensor, calls: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert len(total) == rows.counts[t]
        return total, total + parts[t], calls + 1

    start = torch.arange(2.0 * batch, dtype=torch.float64).view(batch, 2)
    _, (totals, calls) = rows.run(count, (start, torch.zeros(batch)))
    assert calls.tolist() == ends
    for row, end in enumerate(ends):
        torch.testing.assert_close(totals[row], start[row] + x[row, :end].sum(0))


def widths_of_products(network: Any, *arguments: Any, **options: Any) -> int:
    """How many rows go through the LSTM's recurrent product, all steps together."""
    rows = 0

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal rows
            if function is torch.addmm and args[2].shape[1] == 4 * network.state_size:
                rows += len(args[1])
            return function(*args, **(kwargs or {}))

    with Count():
        network(*arguments, **options)
    return rows


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_rows_that_have_ended_cost_nothing(kind: str, grad: bool) -> None:
    network = getattr(nn, kind)(3, 5, mixed_memory=True)
    x, lengths = torch.randn(4, 6, 3), [1, 6, 0, 2]
    with torch.set_grad_enabled(grad):
        assert widths_of_products(network, x) == 4 * 6
        assert widths_of_products(network, x, lengths=lengths) == sum(lengths)


@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_a_changed_part_sees_the_whole_batch(kind: str) -> None:
    """What users put there may keep something of each row from step to step."""
    x, lengths = torch.randn(4, 6, 3), [1, 6, 0, 2]
    for part in ("lstm", "rnn_cell"):
        network = getattr(nn, kind)(3, 5, mixed_memory=True)
        module = getattr(network, part)
        plain, seen = module.forward, []

        def changed(x: Tensor, *args: Any, plain: Any = plain, seen: Any = seen) -> Any:
            seen.append(len(x))
            return plain(x, *args)

        module.forward = changed
        _native._warn.cache_clear()
        with pytest.warns(UserWarning, match="step by step|at each step"):
            y, _ = network(x, lengths=lengths)
        assert seen == [4] * 6
        assert (y[torch.arange(6) >= torch.tensor(lengths)[:, None]] == 0).all()


def test_gradients_are_those_of_each_row_alone() -> None:
    torch.manual_seed(3)
    network = nn.CfC(3, 5, mixed_memory=True, backbone_layers=2).double()
    theirs = ncps.torch.CfC(3, 5, mixed_memory=True, backbone_layers=2).double()
    theirs.load_state_dict(network.state_dict())
    x, spans = torch.randn(4, 6, 3, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    lengths = [3, 6, 1, 4]
    y, (h, c) = network(x, timespans=spans, lengths=lengths)
    (y.square().sum() + (h * c).sum()).backward()
    for row, end in enumerate(lengths):
        # ncps' units take their spans from one tensor as wide as they are.
        ts = spans[row : row + 1, :end, None].expand(-1, -1, 5)
        start = torch.zeros(1, 5, dtype=torch.float64)
        y, (h, c) = theirs(x[row : row + 1, :end], (start, start), ts)
        (y.square().sum() + (h * c).sum()).backward()
    for ours, other in zip(network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_no_row_has_a_step(kind: str) -> None:
    network = getattr(nn, kind)(3, 5, mixed_memory=True)
    h = torch.randn(4, 5, requires_grad=True)
    y, (last, _) = network(torch.randn(4, 6, 3), (h, h), lengths=[0] * 4)
    assert torch.equal(last, h)
    assert not y.any()
    (y.sum() + last.sum()).backward()
    assert torch.equal(h.grad, torch.ones(4, 5))
    assert all(not p.grad.any() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_dtypes_under_autocast_do_not_depend_on_lengths(kind: str) -> None:
    network = getattr(nn, kind)(3, 5, mixed_memory=True)
    x = torch.randn(4, 6, 3)
    dtypes = set()
    with torch.autocast("cpu", torch.bfloat16):
        for lengths in ([1, 6, 0, 2], [1, 6, 3, 2], [6] * 4, [0] * 4):
            y, (h, c) = network(x, lengths=lengths)
            dtypes.add((y.dtype, h.dtype, c.dtype))
    assert len(dtypes) == 1
