"""`torch.export` of modules: any batch and length, saved, unflattened, compiled, trained."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import ncps.torch
import pytest
import torch
from modules import WithLoad
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import ember_ext
from ember_ext import accelerate
from ember_ext.nn import (
    LTC,
    AttentionCache,
    CfC,
    CfCCell,
    LIFGate,
    LIFSelfAttention,
    LTCCell,
    WiredCfCCell,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: LIFGate(4),
    "attention": lambda: LIFSelfAttention(4, 2),
    "causal refractory": lambda: WithLoad(4, 2, refractory="causal"),
    "look-ahead refractory": lambda: WithLoad(4, 2, refractory="look_ahead"),
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


@pytest.fixture(scope="module")
def sequence() -> tuple[nn.Module, ExportedProgram]:
    """A model of several layers, and the same exported."""
    torch.manual_seed(0)
    model = nn.Sequential(LIFGate(4), CfC(4, AutoNCP(9, 2))).eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 5, 4),), dynamic_shapes=any_length())
    return model, program


def save_and_load(program: ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    "reopen",
    [
        save_and_load,
        torch.export.unflatten,
        lambda program: program.run_decompositions().module(),
        lambda program: torch.compile(program.module(), backend="aot_eager"),
    ],
    ids=["saved", "unflattened", "decomposed", "compiled"],
)
@torch.no_grad()
def test_what_is_done_to_exported_programs(
    reopen: Callable[[ExportedProgram], Any], sequence: tuple[nn.Module, ExportedProgram]
) -> None:
    model, program = sequence
    module = reopen(program)
    for shape in ((2, 9, 4), (4, 130, 4)):
        x = torch.randn(shape)
        assert_close(module(x), model(x))


NAMED_TUPLES = [
    kind
    for module in (ember_ext.ops, ember_ext.nn, ember_ext.models)
    for kind in map(vars(module).get, module.__all__)
    if isinstance(kind, type) and issubclass(kind, tuple)
]


@pytest.mark.parametrize("kind", NAMED_TUPLES)
def test_programs_with_named_tuples_are_saved(kind: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, value: Any) -> Any:
            return tree_map(lambda x: 2 * x, value)

    value = kind(*torch.randn(len(kind._fields), 3).unbind())
    program = torch.export.export(Doubled(), (value,))
    doubled = save_and_load(program)(value)
    assert type(doubled) is kind
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled, value, strict=True))
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is kind


@torch.no_grad()
@pytest.mark.parametrize("refractory", [None, "causal"])
def test_a_step_of_attention_with_a_cache_is_saved(refractory: Any) -> None:
    layer = LIFSelfAttention(4, 2, refractory=refractory).eval()
    empty = torch.empty(3, 2, 0, 2)
    loads = None
    if refractory:
        loads = ember_ext.ops.RefractoryState(torch.empty(3, 2, 0), torch.empty(3, 0))
    x = torch.randn(3, 9, 4)
    cache = layer(x[:, :8], AttentionCache(empty, empty, loads)).cache
    program = torch.export.export(layer, (x[:, 8:], cache))
    actual, expected = save_and_load(program)(x[:, 8:], cache), layer(x[:, 8:], cache)
    assert type(actual) is type(expected)
    assert_close(actual.output, expected.output)
    assert_close(actual.cache.key, expected.cache.key)
    assert_close(expected.output, layer(x)[:, 8:])


def test_fx_takes_the_modules_as_leaves() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return isinstance(m, CfC | LIFGate) or super().is_leaf_module(m, qualified_name)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cfc, self.gate = CfC(4, 6), LIFGate(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.cfc(x)[0])

    model, x = Model(), torch.randn(2, 3, 4)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*calls its cells:UserWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.ao")
def test_dynamic_int8_quantisation_computes_what_ncps_does() -> None:
    torch.manual_seed(0)
    original = ncps.torch.CfC(4, 6).eval()
    accelerated = copy.deepcopy(original)
    accelerate(accelerated)
    x = torch.randn(2, 3, 4)
    actual, expected = (
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x)[0]
        for model in (accelerated, original)
    )
    assert (expected - original(x)[0]).abs().max() > 1e-4
    assert_close(actual, expected)


def test_torch_package(sequence: tuple[nn.Module, ExportedProgram]) -> None:
    model, _ = sequence
    file = io.BytesIO()
    with torch.package.PackageExporter(file) as exporter:
        exporter.extern(["ember_ext.**", "ncps.**", "torch.**", "numpy.**"])
        exporter.save_pickle("model", "model.pkl", model)
    file.seek(0)
    loaded = torch.package.PackageImporter(file).load_pickle("model", "model.pkl")
    x = torch.randn(2, 3, 4)
    assert_close(loaded(x), model(x))


CELLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cfc": (lambda: CfCCell(4, 6), 6),
    "wired cfc": (lambda: WiredCfCCell(4, AutoNCP(9, 2)), 9),
    "ltc": (lambda: LTCCell(AutoNCP(9, 2), 4), 9),
}


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*PyTorch definitions")
@pytest.mark.parametrize("name", CELLS)
@torch.no_grad()
def test_cells_take_any_batch(name: str) -> None:
    build, units = CELLS[name]
    cell = build()

    def draw(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 4), torch.randn(batch, units), torch.rand(batch, 1)

    exported = torch.export.export(cell, draw(3), dynamic_shapes=({0: Dim("B")},) * 3).module()
    traced = torch.jit.trace(cell, draw(3))
    assert "ember_ext::" not in str(traced.inlined_graph)
    for batch in (1, 5):
        arguments = draw(batch)
        assert_close(exported(*arguments), cell(*arguments))
        assert_close(traced(*arguments), cell(*arguments))
