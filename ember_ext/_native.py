"""Loads the compiled operators, says whether a call is for them, and once why where it is not.

The libraries have no Python in them: one build serves every version of Python. They are called by
`ctypes`, and only to register operators. Whatever goes wrong there costs speed and not function:
`runs` then says no, and the operators run their reference.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.jit import TracerWarning as TracerWarning  # type: ignore[attr-defined]

_INSTALL_HINT = (
    "the kernels do not build on Windows: use WSL"
    if sys.platform == "win32"
    else "install ember-ext again (in a clone: `pip install --force-reinstall --no-deps .`)"
)
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

library: ctypes.PyDLL | None = None
"""The operator library of the CPU; None if it is missing. Its calls keep Python's lock."""

build_info: dict[str, str] = {}
"""How the library was built: version, torch, compiler, cuda, cuda_architectures, cuda_operators; {}
if missing."""

isas: tuple[str, ...] = {
    "x86_64": ("baseline", "avx2", "avx512"),
    "AMD64": ("baseline", "avx2", "avx512"),
    "aarch64": ("neon",),
    "arm64": ("neon",),
}.get(platform.machine(), ("baseline",))
"""The instruction sets that CPU kernels are built for on this architecture, the best one last."""

_INT = ctypes.c_int64
_INTS = ctypes.POINTER(_INT)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ember_ext_unwatch": (None, [_INT]),
    "ember_ext_unchanged": (ctypes.c_int, [_INT]),
    "ember_ext_cfc_sizes": (None, [_INT, _INT, _INT, _INT, _INTS, _INTS]),
    "ember_ext_ltc_packed_size": (_INT, [_INT, _INT, _INT, _INT]),
}
"""The functions of the CPU's library that are called directly: types of results and arguments."""

isa = ""
"""The one of `isas` that the CPU kernels use; empty if there are no kernels."""

unavailable: dict[str, str] = {}
"""Why there are no compiled kernels, for each device type ("cpu", "cuda") without them."""

_devices: set[str] = set()
_cuda_operators: set[str] = set()
_reference_uses = 0
"""How many `use_reference` contexts are open. `torch.compile` could not guard a thread-local."""


def has(device_type: str, op: str | None = None) -> bool:
    """Whether there are compiled kernels for a device type, such as "cpu" or "cuda".

    Args:
        device_type: as `torch.device.type` has it.
        op: an operator's stem, such as "lif_gate"; without it, any operator will do.
    """
    if device_type in _devices and (op is None or device_type == "cpu" or op in _cuda_operators):
        return True
    _warn_of_missing_kernels(device_type, op if device_type in _devices else None)
    return False


def runs(device_type: str, op: str) -> bool:
    """Whether a call of an operator is for its compiled kernels, and not for its reference.

    Args:
        device_type: as `torch.device.type` has it.
        op: an operator's stem, such as "lif_gate".
    """
    if wants_definition():
        return False
    if transforms_active():
        warn_once(
            f"forward-mode AD or a torch.func transform is active, for which {op} has no compiled "
            "kernels, using the slower PyTorch reference"
        )
        return False
    return has(device_type, op)


@contextmanager
def use_reference() -> Iterator[None]:
    """Run the PyTorch definitions in `ember_ext.reference` and not the compiled kernels.

    Use it for tools that work with PyTorch's own operators only, such as an exporter that does not
    know the kernels, or to check a result that you doubt. Operators and modules keep their
    arguments, checks and results, and are slower. Contexts may be nested, the context is also a
    decorator, and compiled functions follow it. :func:`~ember_ext.decelerate` turns
    accelerated modules back for good.

    The context holds for all threads of the process. If the backward pass computes something again,
    as with `torch.utils.checkpoint`, run the backward pass within the context too.

    Examples::

        >>> import torch
        >>> from ember_ext import nn, use_reference
        >>> gate, x = nn.LIFGate(8), torch.randn(4, 8)
        >>> with use_reference():
        ...     y = gate(x)
        >>> torch.allclose(y, gate(x), atol=1e-6)
        True
    """
    global _reference_uses
    _reference_uses += 1
    try:
        yield
    finally:
        _reference_uses -= 1


def wants_definition() -> bool:
    """Whether a call is for plain PyTorch operators: `use_reference`, `torch.jit.trace`, ONNX.

    A traced or ONNX graph runs where there is no `ember_ext`.
    """
    if _reference_uses > 0:
        return True
    if is_tracing():
        if not torch.onnx.is_in_onnx_export():
            warn_once(
                "torch.jit.trace records the PyTorch definitions, not the compiled kernels, so "
                "that its result runs without ember_ext"
            )
        return True
    # The other ONNX exporter compiles. A question at every call would take a microsecond.
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def is_tracing() -> bool:
    """Whether `torch.jit.trace`, or the ONNX exporter that uses it, is recording."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def transforms_active() -> bool:
    """Whether forward-mode AD or a `torch.func` transform, such as vmap, is active.

    The kernels' operators have a reverse-mode gradient and nothing else, and a dual tensor does not
    say that it requires one.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def warn_once(message: str) -> None:
    """Say why a call goes the slower way, the first time that this is the reason."""
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(f"ember_ext: {message}", stacklevel=4)


def _warn_of_missing_kernels(device_type: str, op: str | None) -> None:
    reason = unavailable.get(device_type, "there are none for this device type")
    if op is not None:
        reason = f"{op} has none yet"
    warn_once(
        f"no compiled kernels for {device_type} tensors, using the slower PyTorch reference: "
        f"{reason}"
    )


def _open(name: str) -> ctypes.PyDLL:
    """Open a library of the package, which registers nothing yet; OSError says what went wrong."""
    import ember_ext

    # If Python files come from a clone, the library lies in the folder of the installed package.
    file = f"lib{name}{_SUFFIX}"
    for folder in ember_ext.__path__:
        path = Path(folder, file)
        if path.is_file():
            return ctypes.PyDLL(str(path))
    raise OSError(f"{file} was not built")


def _register(opened: ctypes.PyDLL) -> None:
    message = ctypes.create_string_buffer(1024)
    register = _function(opened, "ember_ext_register")
    if register(message, ctypes.c_size_t(len(message))):
        raise OSError(message.value.decode())


def _function(opened: ctypes.PyDLL, name: str) -> Any:
    """A function of a library; OSError if the library is too old for it."""
    if not hasattr(opened, name):
        raise OSError(f"{opened._name} is of another version: it has no {name}")
    return getattr(opened, name)


def _text(opened: ctypes.PyDLL, function: str) -> str:
    """Call a function of a library that takes nothing and returns a string."""
    call = _function(opened, function)
    call.restype = ctypes.c_char_p
    return str(call().decode())


def load(version: str) -> None:
    """Load the libraries; `ember_ext/__init__.py` calls this once, with the package's version."""
    global isa, library
    try:
        opened = _open("ember_ext_ops")
        for line in _text(opened, "ember_ext_build_info").splitlines():
            name, build_info[name] = line.split("=", 1)
        if build_info["version"] != version:
            raise OSError(
                f"compiled for version {build_info['version']}, but the Python code is {version}"
            )
        # If this file is part of a clone, the installed library may be older.
        schemas = Path(__file__).parent.parent / "csrc" / "registration.cpp"
        if (
            schemas.is_file()
            and hashlib.sha256(schemas.read_bytes()).hexdigest() != build_info["schemas"]
        ):
            raise OSError("compiled from another version of csrc/registration.cpp")
        for name, (result, arguments) in _FUNCTIONS.items():
            function = _function(opened, name)
            function.restype, function.argtypes = result, arguments
        if hasattr(torch.ops.ember_ext, "lif_gate"):
            raise OSError("another copy of the library is loaded in this process")
        _register(opened)
        isa = _text(opened, "ember_ext_isa")
        library = opened
        _devices.add("cpu")
    except OSError as error:
        unavailable["cpu"] = unavailable["cuda"] = f"{error}; {_INSTALL_HINT}"
        _warn_of_missing_kernels("cpu", None)
        return
    wanted = os.environ.get("EMBER_EXT_ISA", "")
    if wanted and wanted.lower() not in isas:
        names = ", ".join(isas)
        warnings.warn(
            f"ember_ext: EMBER_EXT_ISA must be one of {names}, got {wanted}; using {isa}",
            stacklevel=2,
        )
    elif wanted and wanted.lower() != isa:
        warnings.warn(
            f"ember_ext: this machine cannot run EMBER_EXT_ISA={wanted}, using {isa}",
            stacklevel=2,
        )
    if not build_info["cuda"]:
        unavailable["cuda"] = "ember-ext was built without CUDA; see EMBER_CUDA in docs/install.md"
    elif torch.version.cuda is None:
        unavailable["cuda"] = f"this torch ({torch.__version__}) has no CUDA"
    else:
        try:
            _register(_open("ember_ext_cuda"))
            _devices.add("cuda")
            _cuda_operators.update(build_info["cuda_operators"].split())
        except OSError as error:
            unavailable["cuda"] = f"{error}; {_INSTALL_HINT}"
            _warn_of_missing_kernels("cuda", None)
