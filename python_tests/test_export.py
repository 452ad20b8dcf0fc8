"""`torch.export` of modules: any batch and length, saved, unflattened, compiled, trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from torch.export import Dim
from torch.testing import assert_close

from ember_ext.nn import LTC, CfC, LIFGate, LIFSelfAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: LIFGate(4),
    "attention": lambda: LIFSelfAttention(4, 2),
    "causal refractory": lambda: LIFSelfAttention(4, 2, refractory="causal"),
    "paper refractory": lambda: LIFSelfAttention(4, 2, refractory="paper"),
    "dense cfc": lambda: CfC(4, 6, backbone_units=8),
    "wired cfc": lambda: CfC(4, AutoNCP(9, 2)),
    "ltc": lambda: LTC(4, AutoNCP(9, 2)),
    "chunked cfc": lambda: CfC(4, 6, backbone_units=8, chunk_size=16),
}
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def any_length(maximum: int | None = 4096) -> tuple[dict[int, Any]]:
    """Of one input [B, T, C]: B and T are free."""
    return ({0: Dim("B"), 1: Dim("T", max=maximum)},)


def outputs(value: Any) -> list[Tensor]:
    """The tensors that a module returned."""
    return [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]


@every_module
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("wants_grad", [False, True], ids=["inference", "training"])
def test_takes_any_batch_and_length(
    build: Callable[[], nn.Module], strict: bool, wants_grad: bool
) -> None:
    module = build()
    with torch.set_grad_enabled(wants_grad):
        program = torch.export.export(
            module, (torch.randn(3, 5, 4),), dynamic_shapes=any_length(), strict=strict
        )
        exported = program.module()
        for batch, steps in ((1, 1), (2, 2), (1, 49), (5, 130), (1, 1025)):
            x = torch.randn(batch, steps, 4)
            assert_close(outputs(exported(x)), outputs(module(x)))
    assert {str(r.upper) for r in program.range_constraints.values()} >= {"4096"}


@pytest.mark.parametrize("kind", [CfC, LTC])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@torch.no_grad()
def test_mixed_memory_takes_any_batch_and_length(kind: type[nn.Module], strict: bool) -> None:
    """It is exported as a scan of PyTorch operators."""
    module = kind(4, 5, mixed_memory=True)
    program = torch.export.export(
        module, (torch.randn(3, 5, 4),), dynamic_shapes=any_length(), strict=strict
    )
    for batch, steps in ((1, 1), (2, 9)):
        x = torch.randn(batch, steps, 4)
        assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("kind", [CfC, LTC])
@pytest.mark.parametrize("columns", [(), (1,)], ids=["[B, T]", "[B, T, 1]"])
@torch.no_grad()
def test_states_time_spans_and_lengths(kind: type[nn.Module], columns: tuple[int, ...]) -> None:
    module = kind(4, AutoNCP(9, 2))

    def draw(batch: int, steps: int) -> dict[str, Tensor]:
        return {
            "input": torch.randn(batch, steps, 4),
            "hx": torch.randn(batch, 9),
            "timespans": torch.rand(batch, steps, *columns),
            "lengths": torch.randint(steps + 1, (batch,)),
        }

    b, t = Dim("B"), Dim("T")
    shapes = {"input": {0: b, 1: t}, "hx": {0: b}, "timespans": {0: b, 1: t}, "lengths": {0: b}}
    program = torch.export.export(module, (), draw(3, 5), dynamic_shapes=shapes)
    for batch, steps in ((2, 9), (4, 2)):
        arguments = draw(batch, steps)
        assert_close(program.module()(**arguments), module(**arguments))
