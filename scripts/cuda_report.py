"""Report what nvcc makes of the CUDA kernels, and the times below which they cannot run.

    python scripts/cuda_report.py                    # every architecture; takes minutes
    python scripts/cuda_report.py --arch 80 --arch 90
    python scripts/cuda_report.py --scores           # what attention in bf16 issues per score

Needs nvcc and no GPU, and for --scores nvdisasm (pip install nvidia-cuda-nvdisasm). Fails if a
kernel spills registers or a typical launch does not fit.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import kernel_costs
from ember_ext._command_line import prepare_output
from kernel_costs import machine_code

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


def report_scores(architecture: int, out: Path) -> int:
    """Print and write what the loops of attention in 16 bits issue, and return the exit code."""
    kernels = machine_code.disassemble(SOURCES / "lif_attention.cu", architecture)
    rows = machine_code.attention_rows(machine_code.whole_tile_loops(kernels))
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    columns = ("instructions per score", *(key for key in rows[0] if key.startswith("us ")))
    print(f"{'kernel':62} {'loop':10} {'shape':18} {'gpu':14} {'; '.join(columns)}")
    for row in rows:
        numbers = " ".join(f"{row[column]:8}" for column in columns)
        print(f"{row['kernel']:62} {row['loop']:10} {row['shape']:18} {row['gpu']:14} {numbers}")
    for kind in ("__nv_bfloat16", "__half"):
        for shape in machine_code.SHAPES:
            for units in machine_code.UNITS:
                mine = [
                    row
                    for row in rows
                    if f"<{kind}," in str(row["kernel"])
                    and row["gpu"] == units.name
                    and row["shape"] == str([*shape, 64])
                ]
                count = sum(float(row["instructions per score"]) for row in mine)
                least = sum(float(row["us at least"]) for row in mine)
                line = f"{kind} {[*shape, 64]} {units.name}: {count:.1f} a score, {least:.0f} us"
                if units.name.startswith("H200"):
                    measured = sum(machine_code.MEASURED[p, shape] for p in ("forward", "backward"))
                    line += f" at least; PyTorch's ungated attention takes {1e3 * measured:.0f} us"
                print(line)
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
        "--scores", action="store_true", help="report instructions per score of attention only"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/attention_instructions.csv"),
        help="where --scores writes its table (default: %(default)s)",
    )
    options = parser.parse_args()
    architectures = options.arch or kernel_costs.ARCHITECTURES
    sources = sorted(SOURCES.glob("*.cu"))
    try:
        if options.scores:
            return report_scores((options.arch or [90])[0], options.out)
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
