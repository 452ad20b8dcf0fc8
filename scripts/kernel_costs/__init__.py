"""The cost of the CUDA kernels before any GPU has run them.

`compile_kernels` asks nvcc and ptxas for registers, shared memory and spills. `occupancy` says how
many blocks of a kernel share a multiprocessor. `WORKLOADS` are launches of typical size, with the
bytes and operations that they cannot do without. `floor_seconds` follows from these.
`kernel_costs.instructions` counts what the loops issue, and `kernel_costs.launch_times` says how
long that takes.
"""

from kernel_costs.attention_workloads import (
    attention_workloads,
    gate_workloads,
    refractory_workloads,
)
from kernel_costs.compiled import (
    ARCHITECTURES,
    LIMITS,
    Kernel,
    Limits,
    compile_kernels,
    kept_object,
    occupancy,
    parse_ptxas,
    short_name,
)
from kernel_costs.floors import GPUS, Gpu, Workload, floor_seconds
from kernel_costs.scan_workloads import LTC_NETWORKS, LTCNetwork, cfc_workloads, ltc_workloads

WORKLOADS = (
    *gate_workloads(),
    *attention_workloads(),
    *refractory_workloads(),
    *cfc_workloads(),
    *ltc_workloads(),
)

__all__ = [
    "ARCHITECTURES",
    "GPUS",
    "LIMITS",
    "LTC_NETWORKS",
    "WORKLOADS",
    "Gpu",
    "Kernel",
    "LTCNetwork",
    "Limits",
    "Workload",
    "compile_kernels",
    "floor_seconds",
    "kept_object",
    "occupancy",
    "parse_ptxas",
    "short_name",
]
