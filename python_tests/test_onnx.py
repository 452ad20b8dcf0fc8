"""ONNX: both exporters take our modules as they are, and onnxruntime computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import ncps.torch
import onnxruntime
import pytest
import torch
from modules import WithLoad
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from torch.export import Dim
from torch.testing import assert_close

from ember_ext import accelerate, use_reference
from ember_ext.nn import LTC, CfC, LIFGate, LIFSelfAttention

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:DeprecationWarning",
    "ignore:.*deprecated:FutureWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:.*legacy TorchScript-based ONNX:DeprecationWarning",
    "ignore:.*axis name:UserWarning",
    "ignore:.*Dim:UserWarning",
    "ignore:.*training mode:UserWarning",
)


def accelerated_cfc(*arguments: Any, **options: Any) -> nn.Module:
    model = ncps.torch.CfC(*arguments, **options)
    accelerate(model)
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: LIFGate(4),
    "l1 gate": lambda: LIFGate(4, norm="l1", preset="released"),
    "attention": lambda: LIFSelfAttention(4, 2),
    "causal refractory": lambda: WithLoad(4, 2, refractory="causal"),
    "look-ahead refractory": lambda: WithLoad(4, 2, refractory="look_ahead"),
    "dense cfc": lambda: accelerated_cfc(4, 6, backbone_units=8, backbone_layers=2),
    "pure cfc": lambda: CfC(4, 6, backbone_units=8, mode="pure", return_sequences=False),
    "wired cfc": lambda: accelerated_cfc(4, AutoNCP(9, 2)),
    "mixed cfc": lambda: CfC(4, 6, backbone_units=8, mixed_memory=True, proj_size=3),
    "ltc": lambda: LTC(4, AutoNCP(9, 2)),
    "mixed ltc": lambda: LTC(4, 5, mixed_memory=True),
}


def outputs(value: Any) -> list[Tensor]:
    """The tensors that a module returned, however they are nested."""
    if not isinstance(value, tuple):
        return [] if value is None else [value]
    return [tensor for part in value for tensor in outputs(part)]


def export(
    module: nn.Module, arguments: tuple[Tensor, ...], axes: tuple[dict[int, str], ...], new: bool
) -> onnxruntime.InferenceSession:
    """An ONNX runtime's session of `module`, by the newer exporter or the older one.

    Args:
        module: in eval mode.
        arguments: of its call.
        axes: the dimensions of each argument that are free, and their names.
        new: the exporter.
    """
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        if new:
            dims = {name: Dim(name) for free in axes for name in free.values()}
            shapes = tuple({d: dims[name] for d, name in free.items()} for free in axes)
            program = torch.onnx.export(
                module, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            program.save(file)
        else:
            names = [f"input{i}" for i in range(len(arguments))]
            torch.onnx.export(
                module,
                arguments,
                file,
                dynamo=False,
                input_names=names,
                dynamic_axes=dict(zip(names, axes, strict=True)),
            )
    return onnxruntime.InferenceSession(file.getvalue())


def check(
    session: onnxruntime.InferenceSession, module: nn.Module, arguments: tuple[Tensor, ...]
) -> None:
    """That the session computes what the module does, first output and state."""
    inputs = {i.name: v.numpy() for i, v in zip(session.get_inputs(), arguments, strict=True)}
    actual = [torch.from_numpy(value) for value in session.run(None, inputs)]
    with torch.no_grad():
        expected = outputs(module(*arguments))
    assert len(actual) == len(expected)
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)


SHAPES = ((3, 5, 4), (1, 1, 4), (2, 9, 4))
ANY_LENGTH = ({0: "batch", 1: "steps"},)


@pytest.mark.parametrize("name", MODULES)
def test_older_exporter(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    # This exporter fixes the length of attention's causal mask.
    fixed_length = isinstance(module, LIFSelfAttention)
    axes = ({0: "batch"},) if fixed_length else ANY_LENGTH
    session = export(module, (torch.randn(3, 5, 4),), axes, new=False)
    for shape in [(1, 5, 4), (7, 5, 4)] if fixed_length else SHAPES:
        check(session, module, (torch.randn(shape),))


@pytest.mark.parametrize("name", ["gate", "causal refractory", "dense cfc"])
def test_newer_exporter(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    session = export(module, (torch.randn(3, 5, 4),), ANY_LENGTH, new=True)
    for shape in SHAPES:
        check(session, module, (torch.randn(shape),))


class Step(nn.Module):
    """One step of a stream."""

    def __init__(self, cfc: nn.Module) -> None:
        super().__init__()
        self.cfc = cfc

    def forward(self, x: Tensor, h: Tensor, span: Tensor) -> Any:
        return self.cfc.step(x, h, span)


@pytest.mark.parametrize("new", [False, True], ids=["older", "newer"])
def test_one_streaming_step(new: bool) -> None:
    torch.manual_seed(0)
    module = Step(accelerated_cfc(4, AutoNCP(9, 2))).eval()

    def draw(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 4), torch.randn(batch, 9), torch.rand(batch, 1)

    session = export(module, draw(3), ({0: "batch"},) * 3, new)
    for batch in (3, 1, 8):
        check(session, module, draw(batch))


def test_an_exported_definition_becomes_onnx() -> None:
    gate = LIFGate(4).eval()
    with use_reference():
        program = torch.export.export(gate, (torch.randn(3, 4),))
    assert not any("ember_ext" in str(node.target) for node in program.graph.nodes)
    with contextlib.redirect_stdout(io.StringIO()):
        file = io.BytesIO()
        torch.onnx.export(program, verbose=False).save(file)
    check(onnxruntime.InferenceSession(file.getvalue()), gate, (torch.randn(3, 4),))
