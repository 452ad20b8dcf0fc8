"""Report what nvcc makes of the CUDA kernels, and the times below which they cannot run.

    python scripts/cuda_report.py                    # every architecture; takes minutes
    python scripts/cuda_report.py --arch 80 --arch 90

Needs nvcc and no GPU. Fails if a kernel spills registers or a typical launch does not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ember_ext.command_line import prepare_output
from ember_ext.testing import cuda_report


def main() -> int:
    """Print both tables and return the exit code."""
    prepare_output()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=cuda_report.ARCHITECTURES,
        help="compute capability, such as 80; may be repeated (default: all)",
    )
    architectures = parser.parse_args().arch or cuda_report.ARCHITECTURES
    sources = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
    try:
        kernels = [k for s in sources for k in cuda_report.compile_kernels(s, architectures)]
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    typical = {w.kernel: w for w in cuda_report.WORKLOADS}
    failed = False

    print(f"{'kernel':78} sm   registers  spilled  threads  shared  occupancy")
    for kernel in kernels:
        workload = typical[kernel.name]
        spilled = kernel.stack + kernel.spill_stores + kernel.spill_loads
        shared = workload.shared_on(kernel.architecture)
        share = cuda_report.occupancy(kernel, workload.threads, shared)
        failed |= share == 0 or not kernel.is_clean
        row = f"{kernel.name:78} {kernel.architecture:<4} {kernel.registers:9} {spilled:8}"
        print(f"{row} {workload.threads:8} {shared:7} {share:10.0%}")

    gpus = cuda_report.GPUS
    columns = "".join(f"{gpu.name:>16}" for gpu in gpus)
    print(f"\n{'least time, microseconds':78} {'MB':>7} {'GFLOP':>7} {'on units':>8} {columns}")
    for workload in cuda_report.WORKLOADS:
        times = "".join(f"{1e6 * cuda_report.floor_seconds(workload, g):16.1f}" for g in gpus)
        amounts = f"{workload.bytes / 1e6:7.1f} {workload.operations / 1e9:7.2f}"
        amounts += f" {workload.products / 1e9:8.2f}"
        print(f"{workload.kernel:78} {amounts} {times}   {workload.shape}")
    if failed:
        print("\nA kernel spills registers or does not fit.", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
