"""`torch.jit.trace`: what it makes of our modules takes other inputs and needs no ember_ext."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ncps.torch
import pytest
import torch
from modules import WithLoad
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from torch.testing import assert_close

from ember_ext import _native, accelerate
from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig
from ember_ext.nn import LTC, CfC, LIFGate, LIFSelfAttention

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*deprecated:DeprecationWarning",
    "ignore:.*torch.jit.trace records the PyTorch definitions:UserWarning",
    # `import ember_ext` ignores those of its own code, and pytest takes that back.
    "ignore::torch.jit.TracerWarning",
)

MODULES: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: LIFGate(4),
    "attention": lambda: LIFSelfAttention(4, 2),
    "causal refractory": lambda: WithLoad(4, 2, refractory="causal"),
    "look-ahead refractory": lambda: WithLoad(4, 2, refractory="look_ahead"),
    "dense cfc": lambda: CfC(4, 6, backbone_units=8, backbone_layers=2),
    "pure cfc": lambda: CfC(4, 6, backbone_units=8, mode="pure", return_sequences=False),
    "wired cfc": lambda: CfC(4, AutoNCP(9, 2), batch_first=False),
    "mixed cfc": lambda: CfC(4, 6, mixed_memory=True, proj_size=3),
    "wired mixed cfc": lambda: CfC(4, AutoNCP(9, 2), mixed_memory=True),
    "ltc": lambda: LTC(4, AutoNCP(9, 2)),
    "mixed ltc": lambda: LTC(4, 5, mixed_memory=True),
}
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def outputs(value: Any) -> list[Tensor]:
    """The tensors that a module returned, however they are nested."""
    if not isinstance(value, tuple):
        return [] if value is None else [value]
    return [tensor for part in value for tensor in outputs(part)]


class Plain(nn.Module):
    """A module that returns tensors only, as a trace wants it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return tuple(outputs(self.module(*arguments)))


@every_module
@pytest.mark.parametrize("wants_grad", [False, True], ids=["inference", "training"])
def test_traces_take_any_batch_and_length(
    build: Callable[[], nn.Module], wants_grad: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = build()
    with torch.set_grad_enabled(wants_grad):
        traced = torch.jit.trace(Plain(module), (torch.randn(3, 5, 4),))
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for shape in ((3, 5, 4), (1, 1, 4), (2, 9, 4)):
        x = torch.randn(shape)
        assert_close(outputs(traced(x)), outputs(module(x)))
        assert_close(outputs(loaded(x)), outputs(module(x)))
    frozen = torch.jit.freeze(loaded.eval())
    assert_close(outputs(frozen(x)), outputs(module(x)))


@every_module
def test_traces_have_the_gradients(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = Plain(build().double())
    traced = torch.jit.trace(module, (torch.randn(3, 5, 4, dtype=torch.float64),))
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    actual, expected = (
        torch.autograd.grad(sum(y.sin().sum() for y in run(x)), leaves, materialize_grads=True)
        for run in (traced, module)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", [CfC, LTC])
def test_states_time_spans_and_lengths(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind(4, AutoNCP(9, 2))

    def draw(batch: int, steps: int) -> tuple[Tensor, ...]:
        lengths = torch.randint(steps + 1, (batch,))
        return (
            torch.randn(batch, steps, 4),
            torch.randn(batch, 9),
            torch.rand(batch, steps),
            lengths,
        )

    traced = torch.jit.trace(module, draw(3, 5))
    for shape in ((2, 9), (1, 2)):
        arguments = draw(*shape)
        x, hx, timespans, lengths = arguments
        assert_close(traced(*arguments), module(x, hx, timespans, lengths=lengths))


@pytest.mark.parametrize("mixed", [False, True])
def test_one_streaming_step(mixed: bool) -> None:
    module = CfC(4, AutoNCP(9, 2), mixed_memory=mixed)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cfc = module

        def forward(self, x: Tensor, h: Any, span: Tensor) -> Any:
            return self.cfc.step(x, h, span)

    def draw(batch: int) -> Any:
        h, c = torch.randn(batch, 9), torch.randn(batch, 9)
        return torch.randn(batch, 4), (h, c) if mixed else h, torch.rand(batch)

    traced = torch.jit.trace(Step(), draw(3))
    arguments = draw(2)
    assert_close(traced(*arguments), module.step(*arguments))


@pytest.mark.parametrize(
    "model",
    [
        Ember(EmberConfig(block_size=8, n_layer=1, n_embd=8, n_head=2, dropout=0.0)),
        LiquidEmber(
            LiquidEmberConfig(block_size=8, n_layer=1, n_embd=8, cfc_units=12, dropout=0.0)
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_language_models(model: nn.Module) -> None:
    traced = torch.jit.trace(Plain(model.eval()), (torch.randint(65, (3, 5)),))
    for shape in ((2, 8), (1, 1)):
        idx = torch.randint(65, shape)
        assert_close(outputs(traced(idx)), outputs(model(idx)))


def test_loads_without_ember_ext(tmp_path: Path) -> None:
    model = nn.Sequential(ncps.torch.CfC(4, AutoNCP(9, 2)))
    accelerate(model)
    x = torch.randn(2, 9, 4)
    torch.jit.trace(model, (torch.randn(3, 5, 4),)).save(str(tmp_path / "traced.pt"))
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = """
import sys, torch
x, expected = torch.load("expected.pt")
torch.testing.assert_close(torch.jit.load("traced.pt")(x), expected)
assert "ember_ext" not in sys.modules and "ncps" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_tracing_is_quiet() -> None:
    code = """
import warnings, torch
warnings.simplefilter("error", torch.jit.TracerWarning)
from ember_ext import nn
x = torch.randn(3, 5, 4)
for module in (nn.LIFGate(4), nn.CfC(4, 6), nn.CfC(4, 6, mixed_memory=True), nn.LTC(4, 5)):
    torch.jit.trace(module, (x,))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cells_that_are_called_refuse_other_lengths() -> None:
    """A cell with hooks is recorded step by step: another T must not come out wrong in silence."""
    module = CfC(4, 6, backbone_units=8)
    module.rnn_cell.ff1.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (torch.randn(3, 5, 4),))
        x = torch.randn(2, 5, 4)
        assert_close(traced(x), module(x))
    for steps in (4, 6):
        with pytest.raises(RuntimeError, match="Expected 5 elements in a list"):
            traced(torch.randn(2, steps, 4))


def test_says_once_that_traces_have_no_kernels() -> None:
    _native._warn.cache_clear()
    gate, x = LIFGate(4), torch.randn(2, 4)
    with pytest.warns(UserWarning, match="records the PyTorch definitions"):
        torch.jit.trace(gate, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.jit.trace(copy.deepcopy(gate), (x,))
