"""Launches of typical size, and the times below which a GPU cannot finish them."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_costs.compiled import LIMITS


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
    # A cluster of them may take the place of a block that has too little shared memory.
    cluster = 8 if workload.elastic and gpu.architecture >= 90 else 1
    blocks = None if workload.blocks is None else cluster * workload.blocks
    filled = 1.0 if blocks is None else min(1.0, blocks / gpu.multiprocessors)
    held = min(workload.shared_bytes, cluster * workload.shared_on(gpu.architecture))
    streamed = workload.steps * (workload.shared_bytes - held) / cluster
    return max(
        workload.bytes / gpu.bytes,
        workload.operations / (filled * (gpu.fp64 if workload.fp64 else gpu.fp32)),
        workload.products / (filled * (gpu.tf32 if workload.tf32 else gpu.half)),
        streamed / gpu.block_bytes,
    )


KINDS = {"double": 8, "float": 4, "__nv_bfloat16": 2, "__half": 2}
"""Element types by their names in kernels', and their sizes."""
