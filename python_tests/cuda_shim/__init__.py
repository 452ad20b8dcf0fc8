"""Runs the CUDA kernels of csrc/cuda on the CPU: builds them with the host compiler and calls them.

Each operator has a module here with the public operator's signature. `Shim` is the built library.
`Shim.call` copies tensors into guarded memory, runs a launcher under three orders of threads and
blocks, requires the same bits from each, and returns what it wrote. See shim.cpp for what counts
as a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import kernel_costs

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
ARCHITECTURE = 90
"""What kernels see as the one that they are compiled for, unless a test names another."""
ORDERS = ("forward", "reverse", "shuffled")

# A function's whole name, and not that of a lambda in it or of a template made from it.
_KERNEL = re.compile(r"(void )?[\w:]+_kernel(<[^()]*>)?\([^{}]*\)")

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""ember::DType."""

_FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", f"-I{HERE}", "-Wno-unknown-pragmas", "-fno-strict-aliasing"),
    # A trap needs no run-time library, which a Python process would have to preload.
    "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]
_DEVICE_FLAGS = ["-D__CUDACC__", "-include", "cuda_runtime.h", "-x", "c++"]


def compiler() -> str | None:
    """The host compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _compile(source: Path, objects: Path, architecture: int) -> Path:
    target = objects / f"{source.stem}.o"
    flags = [*_FLAGS, *_DEVICE_FLAGS, f"-D__CUDA_ARCH__={architecture}0"]
    if source.stem == "shim":
        flags = ["-std=c++17", "-O1", "-fPIC", f"-I{HERE}"]
    command = [str(compiler()), *flags, "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:4000]}")
    return target


def build(sources: Sequence[Path], architecture: int) -> Path:
    """Build a library of the shim and `sources`; kept until one of the files changes.

    Kernels see `architecture`, such as 90, as the one that they are compiled for.
    """
    inputs = [HERE / "shim.cpp", *sources]
    digest = hashlib.sha256(f"{compiler()} {_FLAGS} {sources} {architecture}".encode())
    headers = [*HERE.glob("*.h"), *SOURCES.glob("common/*"), *SOURCES.glob("cuda/*.cuh")]
    for file in [*inputs, *sorted(headers)]:
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"ember-cuda-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    # One process builds, and those that want the same library wait for it.
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _build(library, inputs, architecture)
    return library


def _build(library: Path, inputs: Sequence[Path], architecture: int) -> None:
    folder = library.parent
    with tempfile.TemporaryDirectory(dir=folder) as objects, ThreadPoolExecutor(2) as pool:
        built = [
            str(o) for o in pool.map(lambda s: _compile(s, Path(objects), architecture), inputs)
        ]
        unfinished = f"{objects}/library.so"
        link = [str(compiler()), "-shared", "-Wl,--no-undefined", "-o", unfinished, *built, "-ldl"]
        subprocess.run(link, check=True)
        os.replace(unfinished, library)


@dataclass
class Launch:
    """One launch: the kernel's full name and its configuration."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    allowed_bytes: int
    """How much shared memory the kernel may have."""
    cluster: int
    """Blocks of a cluster; 1 without clusters."""


class KernelFaultError(AssertionError):
    """A kernel did what it must not do."""


class Shim:
    """A built library."""

    def __init__(self, sources: Sequence[Path], architecture: int = ARCHITECTURE) -> None:
        self.path = build(sources, architecture)
        self.library = ctypes.CDLL(str(self.path))
        self.library.cuda_shim_allocate.restype = ctypes.c_void_p
        self.library.cuda_shim_allocate.argtypes = [ctypes.c_size_t]
        self.library.cuda_shim_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library.cuda_shim_error.restype = ctypes.c_char_p
        self.library.cuda_shim_launches.restype = ctypes.c_char_p

    def call(
        self,
        run: Callable[[dict[str, int | None]], int],
        inputs: dict[str, Tensor | None],
        outputs: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Call `run` with an address for each name, once for each order of threads.

        Args:
            run: calls a launcher and returns its status. None stands for a null pointer.
            inputs: what the launcher reads.
            outputs: for shape and dtype only; kernels find NaN there.

        Returns:
            What the launcher wrote, by the names of `outputs`.

        Raises:
            KernelFaultError: the shim found a fault, or the order of threads changed a result.
        """
        first: dict[str, Tensor] = {}
        for order, name in enumerate(ORDERS):
            results = self._call(order, run, inputs, outputs)
            first = first or results
            for key, value in results.items():
                if not torch.equal(_bits(value), _bits(first[key])):
                    raise KernelFaultError(f"{key} depends on the order of threads ({name})")
        return first

    def _call(
        self,
        order: int,
        run: Callable[[dict[str, int | None]], int],
        inputs: dict[str, Tensor | None],
        outputs: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        arrays: dict[str, tuple[int, int]] = {}
        addresses: dict[str, int | None] = {}
        for key, tensor in {**inputs, **outputs}.items():
            if tensor is None:
                addresses[key] = None
                continue
            tensor = tensor.contiguous()
            size = tensor.numel() * tensor.element_size()
            addresses[key] = self.library.cuda_shim_allocate(size)
            arrays[key] = (int(addresses[key] or 0), size)
            if key in inputs:
                ctypes.memmove(arrays[key][0], tensor.data_ptr(), size)
        self.library.cuda_shim_reset(order, 1)
        status = run(addresses)
        error = self.library.cuda_shim_error().decode()
        results = {}
        for key, like in outputs.items():
            results[key] = torch.empty_like(like, memory_format=torch.contiguous_format)
            ctypes.memmove(results[key].data_ptr(), *arrays[key])
        damaged = [k for k, array in arrays.items() if self.library.cuda_shim_free(*array)]
        if damaged and not error:
            error = f"write in front of {', '.join(damaged)}"
        if error or status:
            raise KernelFaultError(error or f"the launcher returned {status}")
        return results

    def launches(self) -> list[Launch]:
        """Every launch so far."""
        lines = self.library.cuda_shim_launches().decode().splitlines()
        fields = [line.split("\t") for line in lines]
        return [Launch(kernel, *map(int, numbers)) for kernel, *numbers in fields]

    def kernels(self) -> set[str]:
        """The full names of all kernels that the launchers can launch."""
        table = subprocess.run(
            ["nm", "-DC", "--defined-only", str(self.path)], capture_output=True, text=True
        )
        names = {line.split(maxsplit=2)[2] for line in table.stdout.splitlines()}
        return {name for name in names if _KERNEL.fullmatch(name)}


def _bits(value: Tensor) -> Tensor:
    return value.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()])


def operators(architecture: int = ARCHITECTURE) -> Shim:
    """The launchers of all operators, their kernels compiled for an architecture."""
    return _operators(architecture)


@functools.cache
def _operators(architecture: int) -> Shim:
    return Shim([HERE / "entry.cpp", *sorted(SOURCES.glob("cuda/*.cu"))], architecture)


@contextlib.contextmanager
def shared_memory(bytes_of_block: int) -> Iterator[None]:
    """Let blocks have more or less shared memory than those of sm_75."""
    limit = operators().library.cuda_shim_limit_shared
    limit(bytes_of_block)
    try:
        yield
    finally:
        limit(64 << 10)


@contextlib.contextmanager
def clusters(most_blocks: int) -> Iterator[None]:
    """Let clusters of up to so many blocks run, as from sm_90 on."""
    limit = operators().library.cuda_shim_limit_clusters
    limit(most_blocks)
    try:
        yield
    finally:
        limit(1)


def fill(params: ctypes.Structure, addresses: dict[str, int | None]) -> None:
    """Set the pointers of a parameter structure."""
    for key, address in addresses.items():
        setattr(params, key, address)


def _to_cpu(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.cpu()
    values = [_to_cpu(value) for value in result]
    return type(result)(*values) if hasattr(result, "_fields") else tuple(values)


def operator_fixture(shim_operator: Callable[..., Any], public_operator: Callable[..., Any]) -> Any:
    """A fixture with both ways to run an operator's CUDA kernels: on the shim, and on a GPU.

    Both take CPU tensors and the public operator's arguments, and are differentiable. The GPU is
    used with `pytest -m cuda`.
    """

    def on_gpu(**arguments: Any) -> Any:
        moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return _to_cpu(public_operator(**moved))

    @pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.cuda)])
    def operator(request: pytest.FixtureRequest) -> Callable[..., Any]:
        if request.param == "gpu":
            return on_gpu
        if compiler() is None:
            pytest.skip("no C++ compiler")
        return shim_operator

    return operator


def assert_all_kernels_ran(op: str, *, as_reported: bool = False) -> None:
    """Require that the shim ran every instance of an operator's kernels, each as a GPU would.

    Args:
        op: the operator's stem.
        as_reported: whether launches take the same for all shapes, which then is what
            `kernel_costs.WORKLOADS` says.
    """
    if compiler() is None:
        pytest.skip("no C++ compiler")
    launches = [launch for launch in operators().launches() if f"::{op}_" in launch.kernel]
    kernels = {kernel for kernel in operators().kernels() if f"::{op}_" in kernel}
    assert kernels
    if not launches:
        pytest.skip("looks at what the other tests have run")
    assert kernels - {launch.kernel for launch in launches} == set()
    for launch in launches:
        assert launch.threads % 32 == 0
        # The shim holds them to the shared memory of sm_75, of which it has the least.
        assert launch.threads <= 1024
    if as_reported:
        workloads = {w.kernel: w for w in kernel_costs.WORKLOADS}
        for launch in launches:
            workload = workloads[kernel_costs.short_name(launch.kernel)]
            assert launch.threads == workload.threads, launch
            assert launch.shared_bytes == workload.shared_bytes, launch
