"""The LIF gate against its reference: values, gradients, edge cases, compilation, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ember_ext
from ember_ext import _native, nn, reference
from ember_ext.testing import DTYPES, Sample, check_sample, gate_parameters, gate_samples

NORMS = (None, "l1", "l2")
needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")


def parameters(units: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    theta, lam, k = gate_parameters(units, torch.Generator().manual_seed(3)).values()
    return theta.to(dtype), lam.to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype) -> None:
    for sample in gate_samples(dtype):
        check_sample(ember_ext.lif_gate, reference.lif_gate, sample)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_gpu(dtype: torch.dtype) -> None:
    assert _native.has("cuda")
    for sample in gate_samples(dtype):
        check_sample(ember_ext.lif_gate, reference.lif_gate, sample.to("cuda"))


def test_many_rows_keep_their_accuracy() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20_011, 24, generator=generator)
    sample = Sample("many rows", {"x": x, **gate_parameters(24, generator)}, {"norm": "l2"})
    check_sample(ember_ext.lif_gate, reference.lif_gate, sample)


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str, run_with_isa: Callable[[str, str], None]) -> None:
    code = """
import torch
from ember_ext import lif_gate, reference
from ember_ext.testing import DTYPES, check_sample, gate_samples
for dtype in DTYPES:
    for sample in gate_samples(dtype):
        check_sample(lif_gate, reference.lif_gate, sample)
"""
    run_with_isa(isa, code)


EDGES = """
import torch
from ember_ext import lif_gate, reference
from ember_ext.testing.tolerance import assert_close

def gradients(function, tensors, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    # Of three bits, so that every dtype has the same.
    grad_y = (1 + torch.arange(y.numel()) % 4).view(y.shape).to(y.dtype) / 4
    return (y.detach(), *torch.autograd.grad(y, leaves, grad_y))

# Gates that are all shut and leak nothing: what is left is the direction of what passes.
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for norm in ("l1", "l2"):
        for eps in (0.0, 1e-8):
            for lengths in ((101.0, 201.0), (101.0, 101.5), (300.0, 301.0), (2.0, 401.0)):
                for columns in (2, 37):
                    x = torch.linspace(-1, 1, 3 * columns).view(3, columns).to(dtype)
                    compute = torch.promote_types(dtype, torch.float32)
                    theta = torch.linspace(*lengths, columns, dtype=compute)
                    gates = (theta, torch.zeros(columns, dtype=compute),
                             torch.ones(columns, dtype=compute))
                    options = {"norm": norm, "eps": eps}
                    ours = gradients(lif_gate, (x, *gates), **options)
                    exact = gradients(reference.lif_gate, [t.double() for t in (x, *gates)],
                                      **options)
                    # All but what reaches the leak, which is as large as e^301. What no number of
                    # the dtype can say is rounded as torch rounds it.
                    for i in (0, 1, 2, 4):
                        # The terms of gradients cancel: each is about y, or times theta.
                        scale = 3 * float(exact[0].abs().max())
                        scale *= lengths[1] if i == 4 else float(i > 0)
                        assert_close(f"{i} {dtype} {options} {lengths}", ours[i],
                                     exact[i].to(ours[i].dtype), exact[i], scale=scale)

# Also where single gates are shut in every unit of a row.
x = torch.tensor([[1.0, -1.0], [1e20, -1e20]])
rows = (torch.tensor([120.0, 2e20]), torch.zeros(2), torch.tensor([1.0, 5e-19]))
for norm in ("l1", "l2"):
    ours = gradients(lif_gate, (x, *rows), norm=norm, unit_dim=0, eps=0.0)
    exact = gradients(reference.lif_gate, [t.double() for t in (x, *rows)], norm=norm, unit_dim=0,
                      eps=0.0)
    assert torch.allclose(ours[0].double(), exact[0], rtol=1e-5)
    assert torch.allclose(ours[1].double(), exact[1], rtol=1e-5, atol=1e-6)

# Equal terms, whose roundings do not cancel.
for columns in (512, 5000):
    for value in (0.1, 0.27, 0.61, 0.78):
        x = torch.full((40, columns), value)
        gates = [torch.full((columns,), v) for v in (0.3, 0.4, 2.0)]
        for norm in ("l1", "l2", None):
            ours = gradients(lif_gate, (x, *gates), norm=norm)
            exact = gradients(reference.lif_gate, [t.double() for t in (x, *gates)], norm=norm)
            assert_close("y", ours[0], exact[0].float(), exact[0])
            for i in (2, 3, 4) if norm is None else ():
                assert_close(f"gradient {i}", ours[i], exact[i].float(), exact[i])

# Where subnormal numbers count as 0, those of fp16 do not, for they are none of fp32.
if torch.set_flush_denormal(True):
    halves = torch.arange(2**16).to(torch.int16).view(torch.float16)
    numbers = ~halves.isnan()
    units = torch.ones(2**16)
    for leak in (0.0, 1.0):
        y = lif_gate(halves, -100 * units, leak * units, units)
        assert torch.equal(y[numbers].view(torch.int16), halves[numbers].view(torch.int16))
        assert bool(y[~numbers].isnan().all())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        shut = torch.full((7,), 1e4, dtype=torch.promote_types(dtype, torch.float32))
        y = lif_gate(torch.ones(2, 7, dtype=dtype), shut, torch.full_like(shut, 0.75),
                     torch.ones_like(shut))
        assert torch.equal(y, torch.full_like(y, 0.75))
    torch.set_flush_denormal(False)
"""


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
def test_edges_of_the_number_range_with_every_instruction_set(
    isa: str, run_with_isa: Callable[[str, str], None]
) -> None:
    run_with_isa(isa, EDGES)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("unit_dim", [-1, 1])
def test_gradcheck(norm: nn.lif_gate.Norm | None, unit_dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # Away from 0, where |x| has a kink.
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    x = (x.sign() * (x.abs() + 0.1)).requires_grad_()
    gate = [p.requires_grad_() for p in parameters(x.shape[unit_dim], torch.float64)]

    def gated(*tensors: Tensor) -> Tensor:
        return ember_ext.lif_gate(*tensors, norm=norm, unit_dim=unit_dim)

    assert torch.autograd.gradcheck(gated, (x, *gate))


@needs_kernels
@pytest.mark.parametrize("norm", [0, 2])
def test_opcheck(norm: int) -> None:
    x = torch.randn(4, 6, 5, requires_grad=True)
    gate = [p.requires_grad_() for p in parameters(6)]
    arguments = (x, *gate, norm, 1, 1e-8)
    operators = torch.ops.ember_ext
    torch.library.opcheck(operators.lif_gate.default, arguments)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(operators.lif_gate_forward.default, detached)
    for parameter_gradients in (True, False):
        torch.library.opcheck(
            operators.lif_gate_backward.default,
            (torch.randn(4, 6, 5), *detached, parameter_gradients),
        )


@pytest.mark.parametrize("norm", NORMS)
def test_norm_is_kept(norm: nn.lif_gate.Norm | None) -> None:
    x = torch.randn(50, 33)
    y = ember_ext.lif_gate(x, *parameters(33), norm=norm)
    for order, name in ((1, "l1"), (2, "l2")):
        kept = torch.allclose(x.norm(order, -1), y.norm(order, -1), rtol=1e-5)
        assert kept == (norm == name)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e19, 1e30, 3e38])
def test_extreme_rows_stay_finite(norm: nn.lif_gate.Norm, scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(3, 40, generator=generator) * scale
    x.requires_grad_()
    gate = parameters(40)
    for eps in (0.0, 1e-8):
        y = ember_ext.lif_gate(x, *gate, norm=norm, eps=eps)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all()
        exact = reference.lif_gate(x.double(), *(p.double() for p in gate), norm=norm, eps=eps)
        # Results below the normal numbers keep no more than their absolute accuracy.
        torch.testing.assert_close(y, exact.float(), rtol=4e-6, atol=1e-44)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_zero_rows_stay_zero_without_gradient(norm: nn.lif_gate.Norm) -> None:
    x = torch.randn(4, 9)
    x[2] = 0
    x.requires_grad_()
    gate = [p.requires_grad_() for p in parameters(9)]
    y = ember_ext.lif_gate(x, *gate, norm=norm)
    gradient, *_ = torch.autograd.grad(y, (x, *gate), torch.ones_like(y))
    assert (y[2] == 0).all()
    assert (gradient[2] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(norm: nn.lif_gate.Norm | None, value: float) -> None:
    x = torch.randn(5, 20)
    clean = ember_ext.lif_gate(x, *parameters(20), norm=norm)
    x[3, 7] = value
    y = ember_ext.lif_gate(x, *parameters(20), norm=norm)
    rows = [0, 1, 2, 4]
    assert torch.equal(y[rows], clean[rows])
    assert not y[3, 7].isfinite()


def test_a_row_of_nan_is_not_taken_for_zeros() -> None:
    x = torch.full((1, 6), float("nan"))
    assert ember_ext.lif_gate(x, *parameters(6), norm="l2").isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_to_the_bit(
    dtype: torch.dtype, assert_repeats: Callable[[Callable[[], list[Tensor]]], None]
) -> None:
    x = torch.randn(700, 123, dtype=dtype, requires_grad=True)
    gate = [p.requires_grad_() for p in parameters(123)]

    def run() -> list[Tensor]:
        y = ember_ext.lif_gate(x, *gate, norm="l2")
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, *gate))]

    assert_repeats(run)


@needs_kernels
@pytest.mark.usefixtures("nan_filled_memory")
def test_no_result_depends_on_uninitialised_memory() -> None:
    for sample in gate_samples(torch.float32):
        check_sample(ember_ext.lif_gate, reference.lif_gate, sample)


@needs_kernels
def test_compiles_whole_and_once_for_all_shapes() -> None:
    torch._dynamo.reset()
    gate = [p.requires_grad_() for p in parameters(16)]
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    def model(x: Tensor) -> Tensor:
        return ember_ext.lif_gate(x * 2, *gate, norm="l2").square()

    for backend in (count, "aot_eager"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for shape in ((4, 5, 16), (3, 7, 16), (8, 2, 16), (5, 11, 16)):
            x = torch.randn(shape, requires_grad=True)
            expected = torch.autograd.grad(model(x).sum(), (x, *gate))
            actual = torch.autograd.grad(compiled(x).sum(), (x, *gate))
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)
    assert graphs <= 2, "one graph for the first shape, one for all others"


@needs_kernels
def test_exports() -> None:
    module = nn.LIFGate(12)
    x = torch.randn(3, 12)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))
    assert "ember_ext.lif_gate" in str(program.graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_dtype_and_values_alone(dtype: torch.dtype) -> None:
    x = torch.randn(6, 10, dtype=dtype)
    expected = ember_ext.lif_gate(x, *parameters(10), norm="l2")
    with torch.autocast("cpu", torch.bfloat16):
        actual = ember_ext.lif_gate(x, *parameters(10), norm="l2")
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_parameters_of_any_dtype_get_their_gradient() -> None:
    gate = [p.to(torch.bfloat16).requires_grad_() for p in parameters(10)]
    ember_ext.lif_gate(torch.randn(4, 10), *gate).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in gate)


def arguments(**changes: object) -> dict[str, object]:
    theta, lam, k = parameters(3)
    return {"x": torch.randn(2, 3), "threshold": theta, "leak": lam, "steepness": k} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(2, 3).int()}, TypeError, "x must be float64, .*, got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be of at least one dimension"),
        ({"threshold": torch.ones(4)}, ValueError, r"threshold must be \[x.shape\[-1\]\] = \[3\]"),
        ({"leak": torch.ones(3, 1)}, ValueError, r"leak must be .* = \[3\], got \[3, 1\]"),
        ({"steepness": torch.ones(3).long()}, TypeError, "steepness must be float64"),
        ({"steepness": None}, TypeError, "steepness must be a torch.Tensor"),
        ({"threshold": torch.ones(3, device="meta")}, ValueError, "threshold must be on x's dev"),
        ({"norm": "l3"}, ValueError, "norm must be None, 'l1' or 'l2', got 'l3'"),
        ({"norm": ["l1"]}, ValueError, r"norm must be None, 'l1' or 'l2', got \['l1'\]"),
        ({"unit_dim": 1.0}, TypeError, "unit_dim must be an integer, got 1.0"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
        ({"unit_dim": 2}, ValueError, r"unit_dim must be within \[-2, 1\], got 2"),
        ({"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and >= 0, got nan"),
        ({"eps": float("inf")}, ValueError, "eps must be finite and >= 0, got inf"),
        ({"threshold": torch.tensor([0, float("nan"), 0])}, ValueError, "finite, got nan at ind"),
        ({"leak": torch.tensor([0.5, 1.5, 0.5])}, ValueError, r"within \[0, 1\], got 1.5 at in"),
        ({"leak": torch.full((3,), -0.5)}, ValueError, r"leak must be within \[0, 1\], got -0.5"),
        ({"steepness": torch.tensor([1.0, 1, 0])}, ValueError, "> 0, got 0.0 at index 2"),
        ({"steepness": torch.full((3,), float("inf"))}, ValueError, "finite and > 0, got inf"),
    ],
    ids=str,
)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"ember_ext\.lif_gate: .*" + message):
        ember_ext.lif_gate(**arguments(**changes))


@needs_kernels
def test_raw_operators_refuse_what_would_read_out_of_bounds() -> None:
    x, gate = torch.randn(2, 3), parameters(3)
    with pytest.raises(RuntimeError, match="invalid arguments"):
        torch.ops.ember_ext.lif_gate_forward(x, *parameters(2), 0, -1, 1e-8)
    with pytest.raises(RuntimeError, match="invalid arguments"):
        torch.ops.ember_ext.lif_gate_backward(torch.randn(2, 2), x, *gate, 0, -1, 1e-8, True)


def test_module_presets() -> None:
    seed, released = nn.LIFGate(5), nn.LIFGate(5, preset="released")
    for gate, theta, lam, norm in ((seed, 0.0, 0.731, "l2"), (released, 0.001, 0.881, None)):
        values = [p[0].item() for p in (gate.threshold, gate.leak, gate.steepness)]
        assert values == pytest.approx([theta, lam, 2.127], abs=1e-3)
        assert gate.norm == norm
        assert sum(p.numel() for p in gate.parameters()) == 15


def test_fixed_module_has_buffers_only() -> None:
    gate = nn.LIFGate(4, preset="released", learnable=False)
    assert not list(gate.parameters())
    assert set(gate.state_dict()) == {"raw_threshold", "raw_leak", "raw_steepness"}
    assert gate.threshold.tolist() == pytest.approx([0.1] * 4)


def test_module_learns_and_loads() -> None:
    gate = nn.LIFGate(6, unit_dim=1, norm="l1")
    x = torch.randn(2, 6, 3)
    gate(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())
    other = nn.LIFGate(6, unit_dim=1, norm="l1")
    with torch.no_grad():
        gate.raw_leak += 1
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(x), gate(x))


def test_module_errors() -> None:
    with pytest.raises(ValueError, match=r"ember_ext\.nn\.LIFGate: preset must be one of"):
        nn.LIFGate(3, preset="published")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nn\.LIFGate: norm must be None, 'l1' or 'l2', got 'l3'"):
        nn.LIFGate(3, norm="l3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nn\.LIFGate: num_units must be an integer, got float"):
        nn.LIFGate(3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_units must be >= 0"):
        nn.LIFGate(-1)
