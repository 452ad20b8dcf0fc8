"""The cost of the CUDA kernels before any GPU has run them.

`compile_kernels` asks nvcc and ptxas for registers, shared memory and spills; `occupancy` says how
many blocks of a kernel share a multiprocessor; `WORKLOADS` are launches of typical size with the
bytes and operations that they cannot do without, from which `floor_seconds` follows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
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
class Gpu:
    """Rates of a data sheet: bytes a second, and operations a second.

    Those of matrix units are without sparsity; `half` is that for bf16 and fp16. `block_bytes` is
    what one multiprocessor gets from the second-level cache: 64 bytes a clock.
    """

    name: str
    architecture: int
    multiprocessors: int
    bytes: float
    fp32: float
    fp64: float
    block_bytes: float
    tf32: float
    half: float


GPUS = (
    Gpu("A100 SXM 80 GB", 80, 108, 2.039e12, 19.5e12, 9.7e12, 64 * 1.41e9, 156e12, 312e12),
    Gpu("H100 SXM", 90, 132, 3.35e12, 67e12, 34e12, 64 * 1.98e9, 494.7e12, 989.4e12),
)


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
    source: Path, architectures: Sequence[int], nvcc: str | None = None
) -> list[Kernel]:
    """Compile one .cu file and report on its kernels, by their short names.

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


@dataclass(frozen=True)
class Workload:
    """A launch of typical size.

    Attributes:
        kernel: its short name.
        shape: what it works on, in words.
        threads: of a block.
        shared_bytes: of a block; the most that it has a use for, if it is `elastic`.
        bytes: that must be read and written.
        operations: that must be done; a multiply-add counts as two, exp and a division as eight.
        fp64: whether these are in fp64.
        blocks: of the launch, where they are too few to fill a GPU.
        steps: how often a block reads what would have been in shared memory, had it fit.
        elastic: whether a block takes as much shared memory as the device has.
        products: further operations, those of products that run on matrix units.
        tf32: whether these units take tf32, not bf16 or fp16.
    """

    kernel: str
    shape: str
    threads: int
    shared_bytes: int
    bytes: float
    operations: float
    fp64: bool = False
    blocks: int | None = None
    steps: int = 0
    elastic: bool = False
    products: float = 0.0
    tf32: bool = False

    def shared_on(self, architecture: int) -> int:
        """The shared memory that a block gets there, in bytes."""
        if not self.elastic:
            return self.shared_bytes
        return min(self.shared_bytes, LIMITS[architecture].shared_per_block)


def floor_seconds(workload: Workload, gpu: Gpu) -> float:
    """The time below which a workload split into these blocks cannot go, were all parts to overlap.

    fp64's products are counted as arithmetic, not as work for matrix units.
    """
    filled = 1.0 if workload.blocks is None else min(1.0, workload.blocks / gpu.multiprocessors)
    streamed = workload.steps * (workload.shared_bytes - workload.shared_on(gpu.architecture))
    return max(
        workload.bytes / gpu.bytes,
        workload.operations / (filled * (gpu.fp64 if workload.fp64 else gpu.fp32)),
        workload.products / (filled * (gpu.tf32 if workload.tf32 else gpu.half)),
        streamed / gpu.block_bytes,
    )


_KINDS = {"double": 8, "float": 4, "__nv_bfloat16": 2, "__half": 2}
"""Element types by their names in kernels', and their sizes."""


def _gate_workloads() -> Iterator[Workload]:
    batch, tokens, columns = 64, 256, 384
    elements = batch * tokens * columns
    for kind, width in _KINDS.items():
        fp64, compute = width == 8, max(width, 4)
        for normed in (True, False):
            shape = f"gate {[batch, tokens, columns]}{', l2' * normed}"
            for per_column in (True, False):
                name = f"{kind}, {str(normed).lower()}, {str(per_column).lower()}"
                units = shape + ("" if per_column else ", a unit for each token")
                parameters = 3 * compute * (columns if per_column else tokens)
                # Rows in fp64 have two warps, a block, with a norm, and those with a unit two
                # tiles. A block of several rows adds up its columns in shared memory.
                threads = 64 if fp64 and normed else 128
                adds_teams = per_column and threads == 128
                yield Workload(
                    f"lif_gate_forward_kernel<{name}>",
                    units,
                    threads,
                    2 * threads // 32 * compute if normed else 0,
                    2 * width * elements + parameters,
                    (30 if normed else 24) * elements,
                    fp64,
                )
                yield Workload(
                    f"lif_gate_backward_kernel<{name}>",
                    units,
                    threads,
                    (3 * (2 if fp64 else 4) * 32 if adds_teams else 3) * threads // 32 * compute,
                    3 * width * elements + 2 * parameters,
                    (65 if normed else 45) * elements,
                    fp64,
                )
    for compute_kind in ("double", "float"):
        # 512 blocks have left sums of their rows; 8 outputs take one.
        terms = 512 * 3 * columns
        yield Workload(
            f"lif_gate_sum_kernel<{compute_kind}>",
            f"gate {[batch, tokens, columns]}",
            256,
            256 * 8,
            _KINDS[compute_kind] * terms,
            terms,
            fp64=True,
            blocks=3 * columns // 8,
        )


_ATTENTION = (64, 6, 256, 64)
"""Batch, heads, tokens and head size of the attention workloads, which are causal."""


def attention_shared_bytes(kind: str, units: bool) -> int:
    """Shared memory of a block's products, with matrix units enough for a GPU without them too."""
    # csrc/cuda/attention_products.cuh, AttentionProducts::kBytes.
    if units:
        return 64 * (64 + 4) * 4 + 2 * 64 * (128 + 16) + 8 * 4
    return (64 + 2 * 16) * (64 + 2) * 8 if kind == "double" else (64 + 2 * 32) * (64 + 4) * 4


def _attention_workload(
    kernel: str,
    kind: str,
    units: bool,
    products: int,
    work: float,
    size: float,
    extra: int = 0,
    variant: str = "",
) -> Workload:
    """A kernel with `products` products of pairs and `work` operations for each pair; `size` bytes.

    `extra` is shared memory beyond the products', `variant` further template arguments.
    """
    batch, heads, tokens, columns = _ATTENTION
    pairs = batch * heads * tokens * (tokens + 1) / 2
    multiplied = pairs * 2 * columns * products
    return Workload(
        f"{kernel}<{kind}, {str(units).lower()}{variant}>",
        f"attention {list(_ATTENTION)}, causal",
        256,
        attention_shared_bytes(kind, units) + extra,
        size,
        pairs * work + (0 if units else multiplied),
        kind == "double",
        products=multiplied if units else 0.0,
        tf32=kind == "float",
    )


def _attention_workloads() -> Iterator[Workload]:
    batch, heads, tokens, columns = _ATTENTION
    for kind, units in (
        ("double", False),
        ("float", False),
        ("float", True),
        ("__nv_bfloat16", True),
        ("__half", True),
    ):
        array = batch * heads * tokens * columns * _KINDS[kind]
        # A gate and two exponentials, or one and a logarithm, are about 40 operations.
        # Forward computes scores twice, backward's first kernel scores and grad_out values twice.
        for name, products, arrays in (
            ("forward", 3, 4),
            ("backward_queries", 5, 5),
            ("backward_keys", 4, 6),
            ("summary", 1, 2),
        ):
            yield _attention_workload(
                f"lif_attention_{name}_kernel", kind, units, products, 40, arrays * array
            )

    yield from _half_workloads()
    partials = batch * heads * (tokens // 64)
    yield from _sums("lif_attention_sum_gates_kernel", 3 * partials, heads)
    yield from _sums("lif_attention_sum_summary_kernel", 6 * partials, batch * heads)


def _half_workloads() -> Iterator[Workload]:
    """The kernels for 16-bit types whose scores stay in registers, for heads of 64 and 128."""
    batch, heads, tokens, _ = _ATTENTION
    pairs = batch * heads * tokens * (tokens + 1) / 2
    for columns, rows, in_registers in ((64, 64, True), (128, 16, False)):
        # csrc/cuda/half_scores.cuh, half_shared_bytes(): four tiles, and rows that are kept.
        tiles, kept = 4 * rows * 2 * columns, 0 if in_registers else 64 * 2 * columns
        array = batch * heads * tokens * columns * 2
        for name, products, work, arrays, shared in (
            ("forward", 3, 35, 4, tiles + kept),
            ("backward_queries", 4, 45, 7, tiles + 2 * kept + 64 * 4),
            ("backward_keys", 4, 40, 6, tiles + 2 * kept + 2 * rows * 16),
        ):
            for kind in ("__nv_bfloat16", "__half"):
                yield Workload(
                    f"lif_attention_half_{name}_kernel<{kind}, {columns}>",
                    f"attention {[batch, heads, tokens, columns]}, causal",
                    128,
                    shared,
                    arrays * array,
                    pairs * work,
                    products=pairs * 2 * columns * products,
                )


def _sums(kernel: str, terms: int, blocks: int) -> Iterator[Workload]:
    """A kernel that adds up numbers in fp64 over blocks, for each type of its result."""
    for compute in ("double", "float"):
        yield Workload(
            f"{kernel}<{compute}>",
            f"attention {list(_ATTENTION)}, causal",
            256,
            3 * 8 * 8,
            8 * terms,
            terms,
            fp64=True,
            blocks=blocks,
        )


def _refractory_workloads() -> Iterator[Workload]:
    batch, heads, tokens, columns = _ATTENTION
    tiles = tokens // 64
    for kind, width in _KINDS.items():
        units, compute = width == 2, max(width, 4)
        array = batch * heads * tokens * columns * width
        # One number for each pair of tokens of a batch entry, and for each tile of queries.
        square = batch * tokens * tokens * compute
        sums = batch * heads * tiles * tokens * compute
        # fp64 makes the gradients of keys and of values in turn.
        keys = (
            [
                ("backward_keys", 3, 5, 1, ", true, false"),
                ("backward_keys", 2, 4, 0, ", false, true"),
            ]
            if kind == "double"
            else [("backward_keys", 4, 6, 1, ", true, true")]
        )
        for name, products, arrays, squares, variant in (
            ("rows", 2, 2, 0, ""),
            ("out", 2, 4, 0, ""),
            ("weights", 1, 2, 1, ""),
            ("backward_rows", 4, 4, 1, ""),
            ("backward_queries", 4, 5, 1, ""),
            *keys,
            ("previous", 2, 4, 3, ""),
        ):
            extra = 17 * 64 * compute
            if name == "backward_keys":
                extra = 64 * 64 * compute if units else 0  # p, which waits there
            yield _attention_workload(
                f"refractory_lif_attention_{name}_kernel",
                kind,
                units,
                products,
                80,
                arrays * array + squares * square + sums,
                extra,
                variant,
            )

    # A thread for each key, of all heads or of the batch, or a block for 32.
    pairs = batch * heads
    for name, blocks, shared, elements in (
        ("scan", pairs * tokens // 256, 0, 2 * pairs * tiles * tokens),
        ("backward_scan", pairs * tokens // 256, 0, 2 * pairs * tiles * tokens),
        ("next_load", batch * tokens // 32, 256, 2 * batch * tokens * tokens),
        ("above", batch * tokens // 32, 256, 2 * batch * tokens * tokens),
        ("sum_previous", batch * tokens // 256, 0, batch * tiles * tokens),
    ):
        for kind in ("double", "float"):
            yield Workload(
                f"refractory_lif_attention_{name}_kernel<{kind}>",
                f"attention {list(_ATTENTION)}, causal",
                256,
                shared * _KINDS[kind],
                elements * _KINDS[kind],
                elements,
                kind == "double",
                blocks=blocks,
            )
    yield from _sums("refractory_lif_attention_sum_gates_kernel", 5 * pairs * tiles, heads)


def _cfc_workloads() -> list[Workload]:
    """A layer of one, three or four heads: its recurrence; and for three what is none."""
    workloads = []
    batch, steps, inputs, hidden = 64, 256, 128, 192
    rows = batch * steps
    shape = f"cfc {[batch, steps, inputs]} -> {hidden}"
    for kind, width in _KINDS.items():
        compute, c, fp64 = max(width, 4), "double" if width == 8 else "float", width == 8
        block_rows, threads = 16 // compute, 512
        for heads in (1, 3, 4):
            outputs = heads * hidden
            weights = hidden * outputs * compute
            # The products' results or what is kept of them, the states, and y or its gradient.
            scan_bytes = rows * (2 * outputs * compute + hidden * (compute + width)) + weights
            # Two tanh and a sigmoid forward, or a tanh and an exponential; their slopes backward.
            for name, columns, vectors, cell in (
                ("forward", outputs, 2 * hidden, 60 if heads > 1 else 30),
                ("backward", hidden, hidden + outputs, 30),
            ):
                # A thread has four columns; what slices exchange is padded against bank conflicts.
                lanes = columns // 4
                slices, stride = min(threads // lanes, 8), (lanes + 5) // 8 * 8 + 2
                values = slices * 4 * stride + threads // 32 + vectors
                workloads.append(
                    Workload(
                        f"cfc_scan_{name}_kernel<{kind}, {heads}>",
                        shape,
                        threads,
                        values * block_rows * compute + weights,
                        scan_bytes,
                        rows * (2 * hidden * outputs + cell * hidden),
                        fp64,
                        blocks=batch // block_rows,
                        steps=steps,
                        elastic=True,
                    )
                )
        workloads.append(
            Workload(
                f"cfc_scan_input_kernel<{kind}>",
                shape,
                256,
                0,
                rows * (inputs * width + (1 + inputs) * compute),
                rows * inputs,
                fp64,
            )
        )
        outputs = 3 * hidden
        gradient = outputs * (1 + inputs + hidden)
        # The weight's gradient is made in ten parts.
        for name, amount, adds in (
            ("pack", 2 * hidden * outputs, 0),
            ("sum", 11 * gradient, 10 * gradient),
        ):
            kernel = f"cfc_scan_{name}_kernel<{c}>"
            moved = float(amount * compute)
            workloads.append(Workload(kernel, shape, 256, 0, moved, adds, fp64=True))
        shared = 2 * 16 * (64 + 16 // compute) * compute
        products = {
            f"{c}, {c}, true, true": (rows, outputs, 1 + inputs, compute),
            f"{c}, {kind}, true, false": (rows, inputs, outputs, width),
            f"{c}, {c}, false, false": (outputs, 1 + inputs + hidden, rows, compute),
        }
        for arguments, (m, n, depth, out) in products.items():
            kernel = f"cfc_scan_product_kernel<{arguments}>"
            moved = (m + n) * depth * compute + m * n * out
            workloads.append(Workload(kernel, shape, 256, shared, moved, 2 * m * n * depth, fp64))
    # Kernels of the compute type alone have come up for each type that is computed in it.
    return list({workload.kernel: workload for workload in workloads}.values())


@dataclass(frozen=True)
class LTCNetwork:
    """A liquid time-constant network and its input, with the usual six solver steps."""

    name: str
    batch: int
    steps: int
    inputs: int
    units: int
    recurrent: int
    sensory: int
    """Synapses of either kind."""

    def pieces(self, fp64: bool) -> tuple[int, bool]:
        """The number of pieces of the recurrent synapses, and whether registers hold them."""
        # csrc/cuda/ltc_scan.cu, piece_size_of.
        sizes = (4, 8, max(16, self.recurrent // 2048))
        for size in sizes:
            pieces = self.recurrent // size + self.units
            if self.recurrent == self.units**2:
                pieces = self.units * -(-self.units // size)
            if size <= 8 and pieces <= (256 if fp64 else 512):
                return pieces, True
        return pieces, False


LTC_NETWORKS = (
    LTCNetwork("AutoNCP(32, 4)", 32, 100, 20, 32, 117, 160),
    LTCNetwork("AutoNCP(192, 128)", 64, 256, 128, 192, 2028, 2432),
    LTCNetwork("192 units, dense", 64, 256, 128, 192, 192 * 192, 128 * 192),
)


def _ltc_workloads() -> Iterator[Workload]:
    """The scans of all networks; what is not recurrent, of the second."""
    unfolds = 6
    for kind, width in _KINDS.items():
        compute, fp64 = max(width, 4), width == 8
        for network in LTC_NETWORKS:
            pieces, held = network.pieces(fp64)
            units, synapses = network.units, network.recurrent
            cells = network.batch * network.steps
            threads = (256 if fp64 else 512) if not held else -(-pieces // 32) * 32
            shape = f"ltc {[network.batch, network.steps, network.inputs]}, {network.name}"
            # What the sensory synapses add to, the states that are kept, and y.
            moved = cells * units * (2 * compute + unfolds * compute + width)
            # What a unit's values take, and what each synapse contributes.
            vectors = -(-((5 + 7 + 16 // compute) * units + pieces) // 2) * 2
            vectors += synapses if held else 0
            # A sigmoid is an exponential, a division and three more operations.
            for name, values, amount, work in (
                ("forward", 4 * units + 2 * pieces, moved, 24),
                ("backward", vectors, moved + cells * units * 2 * unfolds * compute, 30),
            ):
                yield Workload(
                    f"ltc_scan_{name}_kernel<{kind}, {str(held).lower()}>",
                    shape,
                    threads,
                    values * compute,
                    amount,
                    cells * unfolds * synapses * work,
                    fp64,
                    blocks=network.batch,
                )
    yield from _ltc_gradient_workloads(LTC_NETWORKS[1], unfolds)


def _ltc_gradient_workloads(network: LTCNetwork, unfolds: int) -> Iterator[Workload]:
    cells, units, inputs = network.batch * network.steps, network.units, network.inputs
    shape = f"ltc {[network.batch, network.steps, inputs]}, {network.name}"
    for kind, compute in (("double", 8), ("float", 4)):
        fp64 = compute == 8
        for narrow, width in _KINDS.items():
            if (width == 8) != fp64:
                continue
            for arguments in dict.fromkeys((f"{narrow}, {kind}", f"{kind}, {narrow}")):
                elements = cells * inputs
                yield Workload(
                    f"ltc_scan_transpose_kernel<{arguments}>",
                    shape,
                    128,
                    32 * 33 * compute,
                    elements * (width + compute),
                    elements,
                )
        columns, gradients = cells * unfolds, 4 * network.recurrent + 3 * units
        for name, shared, values, work in (
            ("list", 0, 12 * network.recurrent, 0),
            ("sensory", 0, cells * (inputs + 2 * units), 24 * cells * network.sensory),
            ("input", 0, cells * (2 * inputs + 2 * units), 28 * cells * network.sensory),
            ("weights", 0, 3 * columns * units, 32 * columns * network.recurrent),
            ("units", 12 * compute, 3 * cells * units, 3 * cells * units),
            ("timespans", 0, cells * units, 2 * cells * units),
            ("sum", 0, 17 * gradients, 16 * gradients),
            ("synapse_gradients", 0, 4 * network.recurrent, 4 * network.recurrent),
            ("unit_gradients", 0, 3 * units, 3 * units),
        ):
            kernel = f"ltc_scan_{name}_kernel<{kind}>"
            yield Workload(kernel, shape, 128, shared, values * compute, work, fp64)


WORKLOADS = (
    *_gate_workloads(),
    *_attention_workloads(),
    *_refractory_workloads(),
    *_cfc_workloads(),
    *_ltc_workloads(),
)
