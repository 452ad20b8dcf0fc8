"""Typical launches of the kernels of the CfC and the LTC."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernel_costs.floors import KINDS, Workload


def cfc_workloads() -> list[Workload]:
    """A layer of one, three or four heads: its recurrence; and for three what is none."""
    workloads = []
    batch, steps, inputs, hidden = 64, 256, 128, 192
    rows = batch * steps
    shape = f"cfc {[batch, steps, inputs]} -> {hidden}"
    for kind, width in KINDS.items():
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


def ltc_workloads() -> Iterator[Workload]:
    """The scans of all networks; what is not recurrent, of the second."""
    unfolds = 6
    for kind, width in KINDS.items():
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
        for narrow, width in KINDS.items():
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
