"""What modules share with those of PyTorch: `device=`, `dtype=`, repr and clear errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import ncps.torch
import pytest
import torch
from ncps.wirings import AutoNCP

from ember_ext import nn
from ember_ext.nn.lif_attention import RefractoryParameters


def wiring() -> AutoNCP:
    """A new one each time: a cell's constructor builds it."""
    return AutoNCP(11, 3, seed=1)


MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "LIFParameters": lambda **f: nn.LIFParameters(3, **f),
    "RefractoryParameters": lambda **f: RefractoryParameters(3, **f),
    "LIFGate": lambda **f: nn.LIFGate(3, **f),
    "LIFGate fixed": lambda **f: nn.LIFGate(3, learnable=False, **f),
    "LIFSelfAttention": lambda **f: nn.LIFSelfAttention(6, 2, bias=True, **f),
    "LIFSelfAttention refractory": lambda **f: nn.LIFSelfAttention(6, 2, refractory="causal", **f),
    "CfC": lambda **f: nn.CfC(3, 4, backbone_units=5, proj_size=2, **f),
    "CfC pure": lambda **f: nn.CfC(3, 4, backbone_units=5, mode="pure", **f),
    "CfC wired": lambda **f: nn.CfC(3, wiring(), **f),
    "CfC mixed": lambda **f: nn.CfC(3, wiring(), mixed_memory=True, **f),
    "LTC": lambda **f: nn.LTC(3, 4, **f),
    "LTC wired": lambda **f: nn.LTC(3, wiring(), **f),
    "LTC mixed": lambda **f: nn.LTC(3, wiring(), mixed_memory=True, **f),
    "CfCCell": lambda **f: nn.CfCCell(3, 4, backbone_units=5, **f),
    "WiredCfCCell": lambda **f: nn.WiredCfCCell(3, wiring(), **f),
    "LTCCell": lambda **f: nn.LTCCell(wiring(), 3, **f),
}
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
WIDTH = {"LIFSelfAttention": 6}


def run(module: torch.nn.Module, like: torch.Tensor) -> Any:
    """What a module makes of random input, None for one that has no forward."""
    if type(module) in (nn.LIFParameters, RefractoryParameters):
        return None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, WIDTH.get(type(module).__name__, 3), generator=generator).to(like)
    if isinstance(module, (ncps.torch.CfCCell, ncps.torch.WiredCfCCell, ncps.torch.LTCCell)):
        size = module.hidden_size if isinstance(module, ncps.torch.CfCCell) else module.state_size
        return module(x[:, 0], x.new_zeros(2, size), 1.0)[0]
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def test_every_module_is_here() -> None:
    public = {
        name
        for name in nn.__all__
        if inspect.isclass(getattr(nn, name)) and issubclass(getattr(nn, name), torch.nn.Module)
    }
    assert public == {name.split()[0] for name in MODULES}


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(build: Callable[..., torch.nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = build(dtype=dtype)
    torch.manual_seed(0)
    other = build().to(dtype)
    assert module.state_dict().keys() == other.state_dict().keys()
    for name, value in module.state_dict().items():
        assert value.dtype == dtype, name
        if not isinstance(module, nn.LIFSelfAttention):  # `nn.Linear` draws in its own dtype
            assert torch.equal(value, other.state_dict()[name]), name
    assert {p.dtype for p in module.parameters()} <= {dtype}
    y = run(module, torch.empty(0, dtype=dtype))
    assert y is None or (y.dtype == dtype and y.isfinite().all())


@every_module
@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_device(build: Callable[..., torch.nn.Module], device: Any) -> None:
    module = build(device=device, dtype=torch.float64)
    state = build().state_dict()
    assert module.state_dict().keys() == state.keys()
    for name, value in module.state_dict().items():
        assert value.is_meta, name
        assert (value.shape, value.dtype) == (state[name].shape, torch.float64)
    assert all(p.is_meta for p in module.parameters())
    # What deferred initialisation does with such a module.
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    assert run(module, torch.empty(0, dtype=torch.float64)) is None or module.training


@every_module
def test_a_default_device_and_a_default_dtype(build: Callable[..., torch.nn.Module]) -> None:
    with torch.device("meta"):
        assert all(value.is_meta for value in build().state_dict().values())
        assert not any(value.is_meta for value in build(device="cpu").state_dict().values())
    state = torch.random.get_rng_state()
    build(device="meta")
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers drawn for no values"


@every_module
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int64, "dtype must be a floating dtype, got torch.int64"),
        (torch.complex64, "dtype must be a floating dtype, got torch.complex64"),
        ("float32", "dtype must be a torch.dtype, got str"),
    ],
)
def test_dtypes_that_are_none(
    build: Callable[..., torch.nn.Module], dtype: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=rf"ember_ext\.nn\.\w+: {message}"):
        build(dtype=dtype)


@every_module
def test_modules_on_a_gpu(build: Callable[..., torch.nn.Module]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    module = build(device="cuda")
    assert all(value.is_cuda for value in module.state_dict().values())
    y = run(module, torch.empty(0, device="cuda"))
    assert y is None or y.is_cuda


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_accelerate_keeps_device_and_dtype(device: str, dtype: torch.dtype) -> None:
    layers = [ncps.torch.CfC(3, wiring()), ncps.torch.LTC(3, wiring()), ncps.torch.CfCCell(3, 4)]
    if device == "meta":
        del layers[1]  # an LTC of ncps loses its parameters on the way there
    model = torch.nn.ModuleList(layers).to(device, dtype)
    before = {name: (p, p.device, p.dtype) for name, p in model.named_parameters()}
    for change in (nn.accelerate, nn.decelerate):
        assert len(change(model).replaced) == len(layers)
        for name, p in model.named_parameters():
            assert (p.device, p.dtype) == before[name][1:]
            assert p is before[name][0]


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (nn.LIFGate(3, norm="l1", unit_dim=1), ["norm='l1'", "unit_dim=1", "preset='text'"]),
        (nn.LIFSelfAttention(6, 2, dropout=0.5), ["n_head=2", "dropout=0.5", "refractory=None"]),
        (nn.CfC(3, 4, mode="pure", chunk_size=7), ["CfC(\n  3, 4, mode='pure', chunk_size=7\n"]),
        (nn.CfC(3, wiring(), mixed_memory=True), ["CfC(\n  3, 11, mixed_memory=True\n"]),
        (nn.LTC(3, 4, ode_unfolds=2, batch_first=False), ["3, 4, batch_first=False", "unfolds=2"]),
        (nn.CfCCell(3, 4, "no_gate"), ["3, 4, mode='no_gate'"]),
        (nn.WiredCfCCell(3, wiring(), "pure"), ["3, 11, mode='pure'"]),
        (nn.LTCCell(wiring(), 3, "linear"), ["3, 11, input_mapping='linear'", "unfolds=6"]),
        (nn.LTC(3, 4).streamer(), ["Streamer of LTC(\n  3, 4\n"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_module_prints_tells_its_settings(module: Any, settings: list[str]) -> None:
    text = repr(module)
    assert all(setting in text for setting in settings), text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.accelerate(None), "accelerate: model must be a torch.nn.Module, got NoneType"),
        (
            lambda: nn.accelerate(ncps.torch.CfC),
            "model must be a torch.nn.Module, got the class CfC",
        ),
        (lambda: nn.decelerate(3), "decelerate: model must be a torch.nn.Module, got int"),
        (
            lambda: nn.WiredCfCCell(wiring(), 3),
            "nn.WiredCfCCell: wiring must be an ncps.wirings.Wi",
        ),
        (
            lambda: nn.LTCCell(3, wiring()),
            "nn.LTCCell: wiring must be an ncps.wirings.Wiring, got int",
        ),
        (
            lambda: nn.LIFSelfAttention(6, 2.0),
            "nn.LIFSelfAttention: n_head must be an integer, got",
        ),
        (
            lambda: nn.LIFSelfAttention("6", 2),
            "nn.LIFSelfAttention: n_embd must be an integer, got",
        ),
        (lambda: nn.Streamer(torch.nn.Linear(3, 4)), "nn.Streamer: layer must be .*, got Linear"),
    ],
)
def test_arguments_of_another_kind_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"^ember_ext\..*{message}"):
        call()
