r"""Report what nvcc makes of the CUDA kernels, and the times below which they cannot run.

    python scripts/cuda_report.py                    # every architecture; takes minutes
    python scripts/cuda_report.py --arch 80 --arch 90
    python scripts/cuda_report.py --instructions     # what the kernels' loops issue, for sm_90

Needs nvcc and no GPU, and for --instructions nvdisasm (pip install nvidia-cuda-nvdisasm). Fails if
a kernel spills registers or a typical launch does not fit.

bench/results/kernel_instructions.csv is what --instructions writes. The file of that name in
bench/results/h200 compares the model with measured times. It is of the sources that were measured:

    git archive 8b4f471 csrc/cuda csrc/common | tar -x -C OLD
    python scripts/cuda_report.py --instructions --sources OLD/csrc/cuda \
        --measured bench/results/h200/kernels.csv --out bench/results/h200/kernel_instructions.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import kernel_costs
from ember_ext._command_line import prepare_output
from kernel_costs import instructions, launch_times, machine_code

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


def report_instructions(
    sources: list[Path], architecture: int, measured: Path | None, out: Path
) -> int:
    """Print and write what the kernels' loops issue, and return the exit code."""
    times = None if measured is None else launch_times.read_measured(measured)
    gpus = machine_code.UNITS if times is None else machine_code.UNITS[-1:]
    kernels = {}
    for source in sources:
        kernels |= machine_code.disassemble(source, architecture)
    counted = instructions.count(kernels)
    rows = launch_times.rows(counted, gpus, times)
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    columns = [key for key in rows[0] if key not in ("kernel", "shape", "gpu", "unit")]
    print(f"{'kernel':72} {'unit':24} {'shape':46} {'gpu':14} {'; '.join(columns)}")
    for row in rows:
        numbers = " ".join(f"{row[column]:8}" for column in columns)
        words = f"{row['kernel']:72} {row['unit']:24} {row['shape']:46} {row['gpu']:14}"
        print(f"{words} {numbers}")
    left = sorted(set(kernels) - {one.kernel for one in counted})
    print(f"not counted: {'; '.join(left)}")
    print(f"{out} written")
    return 0


def main() -> int:
    """Print both tables and return the exit code."""
    prepare_output()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=kernel_costs.ARCHITECTURES,
        help="compute capability, such as 80; may be repeated (default: all)",
    )
    parser.add_argument(
        "--instructions", action="store_true", help="report what loops issue per unit of their work"
    )
    parser.add_argument(
        "--sources",
        type=Path,
        default=SOURCES,
        help="folder of the .cu files (default: this one's)",
    )
    parser.add_argument(
        "--measured", type=Path, help="with --instructions: kernels.csv of bench/kernel_times.py"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/kernel_instructions.csv"),
        help="where --instructions writes its table (default: %(default)s)",
    )
    options = parser.parse_args()
    architectures = options.arch or kernel_costs.ARCHITECTURES
    sources = sorted(options.sources.glob("*.cu"))
    try:
        if options.instructions:
            architecture = (options.arch or [90])[0]
            return report_instructions(sources, architecture, options.measured, options.out)
        kernels = [k for s in sources for k in kernel_costs.compile_kernels(s, architectures)]
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    typical = {w.kernel: w for w in kernel_costs.WORKLOADS}
    failed = False

    print(f"{'kernel':78} sm   registers  spilled  threads  shared  occupancy")
    for kernel in kernels:
        workload = typical[kernel.name]
        spilled = kernel.stack + kernel.spill_stores + kernel.spill_loads
        shared = workload.shared_on(kernel.architecture)
        share = kernel_costs.occupancy(kernel, workload.threads, shared)
        failed |= share == 0 or not kernel.is_clean
        row = f"{kernel.name:78} {kernel.architecture:<4} {kernel.registers:9} {spilled:8}"
        print(f"{row} {workload.threads:8} {shared:7} {share:10.0%}")

    gpus = kernel_costs.GPUS
    columns = "".join(f"{gpu.name:>16}" for gpu in gpus)
    print(f"\n{'least time, microseconds':78} {'MB':>7} {'GFLOP':>7} {'on units':>8} {columns}")
    for workload in kernel_costs.WORKLOADS:
        times = "".join(f"{1e6 * kernel_costs.floor_seconds(workload, g):16.1f}" for g in gpus)
        amounts = f"{workload.bytes / 1e6:7.1f} {workload.operations / 1e9:7.2f}"
        amounts += f" {workload.products / 1e9:8.2f}"
        print(f"{workload.kernel:78} {amounts} {times}   {workload.shape}")
    if failed:
        print("\nA kernel spills registers or does not fit.", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
