"""The cost of a kernel's loops, read from its machine code.

`disassemble` compiles a .cu file for one architecture and returns the kernels' instructions in
basic blocks; `whole_tile_loops` finds the loops of attention's kernels for 16-bit types that a tile
wholly inside the mask takes, and what they issue per score; `unit_seconds` is the time that each of
a GPU's units needs for that. `kernel_costs.instructions` does this for all kernels. Needs nvcc and
nvdisasm, which the wheel nvidia-cuda-nvdisasm has, and no GPU.
"""

from __future__ import annotations

import heapq
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel_costs.compiled import short_name

KINDS = ("matrix", "exponential", "arithmetic", "shared", "global", "other")
"""Kinds of instructions: of matrix units, of the unit for exponentials and reciprocals, all other
arithmetic, of shared memory, of global memory and copies from it, and control flow."""

_KIND_OF = (
    ("matrix", r"[HI]MMA|[HQIB]GMMA"),
    ("exponential", r"MUFU"),
    ("shared", r"LDSM|LDS|STS|STSM|ATOMS"),
    ("global", r"LDGSTS|LDG|STG|LDGDEPBAR|DEPBAR|ATOM|RED|LDL|STL|LD|ST"),
    ("other", r"BRA|EXIT|BAR|NOP|WARPSYNC|BSSY|BSYNC|BRX|RET|CALL|YIELD|S2R|S2UR|CS2R|SHFL|VOTE"),
)


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    def count(self, operation: str) -> int:
        """Count the instructions of an operation, such as LDSM."""
        return sum(bool(re.match(rf"{operation}\b", i)) for i in self.instructions)


@dataclass(frozen=True)
class Cost:
    """The instructions of a thread that a loop issues per score, or another unit of its work.

    Attributes:
        kernel: its short name.
        loop: which of its loops.
        kinds: instructions by kind.
        shared_bytes: moved to and from shared memory.
    """

    kernel: str
    loop: str
    kinds: dict[str, float]
    shared_bytes: float

    @property
    def instructions(self) -> float:
        """All instructions."""
        return sum(self.kinds.values())


def kind(instruction: str) -> str:
    """The kind of an instruction, one of `KINDS`."""
    operation = re.split(r"[.\s]", instruction, maxsplit=1)[0]
    for name, pattern in _KIND_OF:
        if re.fullmatch(pattern, operation):
            return name
    return "arithmetic"


def find_nvdisasm() -> str | None:
    """The toolkit's nvdisasm, or that of its wheel, or None."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = sorted(wheel.glob("*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or (str(found[-1]) if found else None)


def parse(text: str) -> dict[str, list[Block]]:
    """Read what `nvdisasm -c` prints: blocks by the kernels' mangled names."""
    kernels = {}
    for section in re.split(r"\n//-+ \.text\.", text)[1:]:
        kernels[section.split(maxsplit=1)[0]] = _blocks(section)
    return kernels


def _blocks(section: str) -> list[Block]:
    blocks = [Block()]
    labels: dict[str, int] = {}
    targets: list[tuple[int, str | None, bool]] = []
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
            condition: str | None = found[1]
            instruction: str = found[2]
            blocks[-1].instructions.append(instruction)
            # BRA.DIV leads out of the way where lanes of a warp have parted, which these kernels'
            # do not.
            if re.match(r"(BRA|EXIT|RET|BRX)\b(?!\.DIV)", instruction):
                jump = re.search(r"\(?(\.L_\w+)\)?\s*$", instruction)
                conditional = condition is not None or " P" in instruction or "!P" in instruction
                targets.append((len(blocks) - 1, jump[1] if jump else None, conditional))
                blocks.append(Block())
    jumps = {block for block, _, conditional in targets if not conditional}
    for index, block in enumerate(blocks[:-1]):
        if index not in jumps:
            block.following.append(index + 1)
    for index, target, _ in targets:
        if target is not None and target in labels:
            blocks[index].following.append(labels[target])
    return blocks


def disassemble(
    source: Path, architecture: int, nvcc: str | None = None, nvdisasm: str | None = None
) -> dict[str, list[Block]]:
    """Compile one .cu file and return its kernels' blocks, by their short names.

    Raises:
        RuntimeError: nvcc or nvdisasm is missing or fails.
    """
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        flags = f"-std=c++17 -O3 -cubin -arch=sm_{architecture} -o".split()
        result = subprocess.run(
            [nvcc, *flags, str(cubin), str(source)], capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(result.stderr)
        return read_cubin(cubin, nvdisasm)


def read_cubin(cubin: Path, nvdisasm: str | None = None) -> dict[str, list[Block]]:
    """Return the blocks of the kernels of an object file for one architecture, by short names.

    Raises:
        RuntimeError: nvdisasm is missing or fails.
    """
    nvdisasm = nvdisasm or find_nvdisasm()
    if nvdisasm is None:
        raise RuntimeError("nvdisasm is needed: pip install nvidia-cuda-nvdisasm")
    result = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    kernels = parse(result.stdout)
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True
    ).stdout.splitlines()
    return {short_name(name): blocks for name, blocks in zip(names, kernels.values(), strict=True)}


def shortest_cycle(blocks: Sequence[Block], through: int) -> list[int]:
    """The way from a block back to itself with the fewest instructions, the block first.

    Empty if there is none.
    """
    best: dict[int, int] = {}
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, through, ())]
    while queue:
        cost, index, path = heapq.heappop(queue)
        if index == through and path:
            return list(path)
        if best.get(index, cost + 1) <= cost:
            continue
        if path:
            best[index] = cost
        cost += len(blocks[index].instructions)
        for following in blocks[index].following:
            heapq.heappush(queue, (cost, following, (*path, index)))
    return []


_LOOPS = {
    "forward": (("maxima", 1, 1), ("weights", 2, 2)),
    "backward_queries": (("gradients", 4, 2),),
    "backward_keys": (("gradients", 4, 2.25),),
}
"""Of each kernel its loops in order: name, products of a score, and tensors brought per tile, of
which the rows that queries leave to keys are a quarter."""


def whole_tile_loops(kernels: dict[str, list[Block]]) -> list[Cost]:
    """Measure what the kernels for 16-bit types and heads of 64 issue per score of a whole tile.

    A thread has 32 of a tile's 64 x 64 scores. It takes them at once, or 8 at a time in a loop
    without tests within the loop over tiles. The cost of a tile is that of the shortest way once
    around, and of the copies for the next tile.
    """
    costs = []
    for kernel, blocks in kernels.items():
        found = re.fullmatch(r"lif_attention_half_(\w+)_kernel<\w+, 64>", kernel)
        if found is None:
            continue
        # A loop without tests has neither comparisons nor selections of scores, of which there
        # would be 8.
        plain = [
            i
            for i, block in enumerate(blocks)
            if block.count("HMMA") >= 16 and block.count("FSEL") < 8 and shortest_cycle(blocks, i)
        ]
        for (name, products, tensors), index in zip(_LOOPS[found[1]], plain, strict=False):
            costs.append(_cost(kernel, name, blocks, index, products, tensors))
    return costs


def _cost(
    kernel: str, loop: str, blocks: list[Block], index: int, products: int, tensors: float
) -> Cost:
    inner = shortest_cycle(blocks, index)
    # One product of 8 scores takes 8 instructions; a product with ones is none of these.
    per_turn = 8 * round(sum(blocks[i].count("HMMA") for i in inner) / (8.5 * products))
    turns = 32 // per_turn
    counts: Counter[str] = Counter()
    shared = 0.0

    def add(path: Sequence[int], times: float) -> None:
        nonlocal shared
        for i in path:
            for instruction in blocks[i].instructions:
                counts[kind(instruction)] += times  # type: ignore[assignment]
                shared += times * shared_bytes(instruction)

    add(inner, turns)
    if turns > 1:
        # Around the inner loop: from what follows it to what leads to it.
        outer = list(blocks)
        outer[index] = Block(
            blocks[index].instructions, [f for f in blocks[index].following if f not in inner]
        )
        add(shortest_cycle(outer, index)[1:], 1)
    copies = [block for block in blocks if block.count("LDGSTS") >= 4]
    cheapest = min(copies, key=lambda block: len(block.instructions) / block.count("LDGSTS"))
    add([blocks.index(cheapest)], 4 * tensors / cheapest.count("LDGSTS"))
    return Cost(kernel, loop, {k: counts[k] / 32 for k in KINDS}, shared / 32)


def shared_bytes(instruction: str) -> int:
    """The bytes of shared memory that a thread moves by an instruction."""
    if re.match(r"LDSM", instruction) or re.match(r"LDGSTS", instruction):
        return 16
    if match := re.match(r"(?:LDS|STS)(?:\.\w+)*?\.(64|128)\b", instruction):
        return int(match[1]) // 8
    # A load that never runs separates copies from what precedes them.
    if re.match(r"LDS\b", instruction):
        return 0 if "RZ" in instruction else 4
    return 4 if re.match(r"STS\b", instruction) else 0


@dataclass(frozen=True)
class Units:
    """Per multiprocessor and clock: what a GPU's units do, from its data sheet.

    Attributes:
        name: of the GPU.
        multiprocessors: how many there are.
        clock: in Hz, boosted.
        matrix: multiply-adds of bf16 or fp16.
        bytes: of memory, per second, of the whole GPU.
    """

    name: str
    multiprocessors: int
    clock: float
    matrix: float
    bytes: float


UNITS = (
    Units("A100 SXM 80 GB", 108, 1.41e9, 1024, 2.039e12),
    Units("H200 SXM", 132, 1.98e9, 2048, 4.8e12),
)


def unit_seconds(cost: Cost, scores: float, size: float, units: Units) -> dict[str, float]:
    """The time that each unit needs for a loop over scores, and memory for `size` bytes.

    All multiprocessors are taken to be busy all the time: four instructions of a warp a clock, 16
    exponentials, 128 bytes of shared memory, and m16n8k16 as 2048 multiply-adds.
    """
    clocks = units.multiprocessors * units.clock
    return {
        "issue": scores * cost.instructions / (4 * 32) / clocks,
        "exponential": scores * cost.kinds["exponential"] / 16 / clocks,
        "matrix": scores * cost.kinds["matrix"] * 2048 / 32 / units.matrix / clocks,
        "shared": scores * cost.shared_bytes / 128 / clocks,
        "memory": size / units.bytes,
    }


SHAPES = ((64, 6, 256), (1, 6, 4096))
"""Batch, heads and tokens of causal attention with heads of 64 columns."""
