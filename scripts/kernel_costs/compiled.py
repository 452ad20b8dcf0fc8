"""The kernels as nvcc and ptxas compile them: registers, shared memory, spills and occupancy."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Limits:
    """Per multiprocessor: threads, blocks, bytes of shared memory; the latter also per block."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". All of them have
# 65536 registers a multiprocessor, given out to warps by 256.
LIMITS = {
    75: Limits(1024, 16, 64 << 10, 64 << 10),
    80: Limits(2048, 32, 164 << 10, 163 << 10),
    86: Limits(1536, 16, 100 << 10, 99 << 10),
    89: Limits(1536, 24, 100 << 10, 99 << 10),
    90: Limits(2048, 32, 228 << 10, 227 << 10),
    100: Limits(2048, 32, 228 << 10, 227 << 10),
    120: Limits(1536, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture; sizes in bytes."""

    name: str
    architecture: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def is_clean(self) -> bool:
        """Whether the kernel keeps everything in registers."""
        return self.stack == self.spill_stores == self.spill_loads == 0


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def parse_ptxas(text: str) -> list[Kernel]:
    """Read what `ptxas -v` prints. Names stay mangled."""
    kernels = []
    # The first piece is what precedes the first kernel.
    pieces = _ENTRY.split(text)[1:]
    for name, architecture, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        stack, registers = _STACK.search(body), _REGISTERS.search(body)
        if stack is None or registers is None:
            raise ValueError(f"ptxas says nothing about the registers of {name}")
        sizes = [int(size) for size in stack.groups()]
        kernels.append(Kernel(name, int(architecture), int(registers[1]), *sizes))
    return kernels


def short_name(demangled: str) -> str:
    """`void ember::cuda::k<float, true>(ember::P)` becomes `k<float, true>`."""
    return re.sub(r"^void |ember::cuda::|\(.*\)$", "", demangled)


def compile_kernels(
    source: Path,
    architectures: Sequence[int],
    nvcc: str | None = None,
    keep: Path | None = None,
) -> list[Kernel]:
    """Compile one .cu file and report on its kernels, by their short names.

    With `keep`, that folder holds the object file of each architecture afterwards, as
    `kept_object` names it.

    Raises:
        RuntimeError: there is no nvcc, or it fails.
    """
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "--threads=2", *targets, "-Xptxas=-v", "-fatbin"]
        command += [str(source), "-o", f"{folder}/out.fatbin"]
        if keep is not None:
            command += ["--keep", f"--keep-dir={keep}"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    kernels = parse_ptxas(result.stderr)
    names = subprocess.run(
        ["c++filt"], input="\n".join(k.name for k in kernels), capture_output=True, text=True
    ).stdout.splitlines()
    return [
        Kernel(
            short_name(name), k.architecture, k.registers, k.stack, k.spill_stores, k.spill_loads
        )
        for k, name in zip(kernels, names, strict=True)
    ]


def kept_object(keep: Path, source: Path, architecture: int) -> Path:
    """Where `compile_kernels` leaves what it has compiled for one of several architectures."""
    return keep / f"{source.stem}.compute_{architecture}.cubin"


def occupancy(kernel: Kernel, threads: int, shared_bytes: int) -> float:
    """The fraction of a multiprocessor's threads that are resident; 0 for a launch that fails."""
    limits = LIMITS[kernel.architecture]
    warps = (threads + 31) // 32
    registers_of_warp = (kernel.registers * 32 + 255) // 256 * 256
    # 1 KiB of a block's shared memory is the system's, from sm_80 on.
    shared = shared_bytes + (1024 if kernel.architecture >= 80 else 0)
    if shared_bytes > limits.shared_per_block:
        return 0.0
    blocks = min(
        limits.blocks,
        limits.threads // (warps * 32),
        65536 // registers_of_warp // warps,
        limits.shared // shared if shared else limits.blocks,
    )
    return blocks * warps * 32 / limits.threads
