"""What the loops of every kernel issue for each unit of their work.

`count` finds the loops in machine code, and returns what they issue per score, element, or synapse.
Kernels in fp64 are not counted, nor those that add up what others leave.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kernel_costs import LIMITS, WORKLOADS, machine_code
from kernel_costs.loops import Loop, loop_nest, operations, turn
from kernel_costs.machine_code import (
    KINDS,
    Block,
    Cost,
    shared_bytes,
)


@dataclass(frozen=True)
class Counted:
    """What a kernel issues per unit of its work: a score, an element, a synapse, a unit.

    Attributes:
        kernel: its short name.
        unit: of the work.
        cost: of a unit.
    """

    kernel: str
    unit: str
    cost: Cost


def _tally(blocks: Sequence[Block], turns: Sequence[tuple[float, Sequence[int]]]) -> Counter[str]:
    """Instructions by kind, and the bytes of shared memory, of blocks that run so many times."""
    counts: Counter[str] = Counter()
    for times, indices in turns:
        for index in indices:
            for instruction in blocks[index].instructions:
                counts[machine_code.kind(instruction)] += times  # type: ignore[assignment]
                counts["bytes"] += times * shared_bytes(instruction)  # type: ignore[assignment]
    return counts


def _counted(kernel: str, unit: str, counts: Mapping[str, float], units: float) -> Counted:
    kinds = {k: counts.get(k, 0) / units for k in KINDS}
    return Counted(kernel, unit, Cost(kernel, "", kinds, counts.get("bytes", 0) / units))


def _has(block: Block, pattern: str) -> bool:
    return any(re.match(pattern, instruction) for instruction in block.instructions)


def _exponentials(blocks: Sequence[Block], indices: Sequence[int] | frozenset[int]) -> int:
    return sum(i.startswith("MUFU.EX2") for n in indices for i in blocks[n].instructions)


def _gate(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """The loop over rows. A norm's sums that may have overflowed take another way, seldom."""
    rows = "rows" in kernel
    wide = r"(LDG|STG)\.E\.(64|128)|LDGSTS"

    def required(block: Block) -> bool:
        return _has(block, rf"MUFU\.EX2|{wide}")

    found: list[tuple[int, Counter[str]]] = []
    for root in loop_nest(blocks):
        for loop in root.nest():
            if _exponentials(blocks, loop.own) >= 8 and any(
                _has(blocks[i], wide) for i in loop.own
            ):
                counts = _tally(blocks, [(1, turn(blocks, loop, required, lambda _: False))])
                # Those of the l2 norm square instead of taking magnitudes: more multiply-adds.
                found.append((operations(blocks, loop.own)["FFMA"], counts))
    if found:
        elements = 8 if rows and "backward" in kernel else 16
        yield _counted(kernel, "element", max(found, key=lambda f: f[0])[1], elements)


_MULTIPLY_ADDS = {"16816": 64, "1688": 32, "1684": 16}
"""Of a thread, in a product of matrix units by its name."""


def _multiply_adds(blocks: Sequence[Block], indices: frozenset[int]) -> int:
    found = 0
    for index in indices:
        for instruction in blocks[index].instructions:
            if product := re.match(r"HMMA\.(\d+)", instruction):
                found += _MULTIPLY_ADDS[product[1]]
            else:
                found += instruction.startswith("FFMA")
    return found


def _tiles(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """Attention by tiles of 64 x 64 scores, 16 of a thread's 256, and heads of 64 columns.

    Products run through inner loops over columns, or through all of them in one go, after these
    were brought to shared memory: all columns at once in 16 bits, halves in fp32.
    """
    scores, columns = 16, 64
    wide = "<float" in kernel
    vector = r"LDG\.E\.(64|128)"

    def turns(loop: Loop) -> float:
        """How often an inner loop runs around for a tile."""
        found = operations(blocks, loop.own)
        multiply_adds = _multiply_adds(blocks, loop.own)
        if multiply_adds >= 8 and not found["MUFU"]:
            return scores * columns / multiply_adds
        if any(turns(child) for child in loop.children.values()):
            return 2 if wide else 1
        if found["LDG"] and found["STS"] and loop.head not in at_edges:
            return 4 if wide else 2
        return 0

    def required(block: Block) -> bool:
        return _has(block, rf"MUFU|BAR|STS|HMMA|{vector}")

    def brings_rows(block: Block) -> bool:
        """Whether it loads packs of rows and stores them, one after the other."""
        packs = sum(bool(re.match(r"LDG\.E\.128", i)) for i in block.instructions)
        return packs >= 2 and block.count("STS") >= packs

    # Where rows inside the matrix come without a loop, those with a loop are for its edges.
    loops = [loop for root in loop_nest(blocks) for loop in root.nest()]
    at_edges = {
        child.head
        for loop in loops
        if any(brings_rows(blocks[i]) for i in loop.own)
        for child in loop.children.values()
    }
    total: Counter[str] = Counter()
    for root in loop_nest(blocks):
        for loop in root.nest():
            if operations(blocks, loop.own)["MUFU"] < scores or not loop.children:
                continue
            for part in loop.nest():
                times = 1 if part is loop else turns(part)
                if times:
                    path = turn(blocks, part, required, lambda child: turns(child) > 0)
                    total += _tally(blocks, [(times, path)])
    if total:
        # Threads of a warp read the same rows of a tile: how many bytes move is not to be seen.
        yield _counted(kernel, "score", {**total, "bytes": 0}, scores)


def _half_scores(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """Attention with scores in registers."""
    total: Counter[str] = Counter()
    for cost in machine_code.whole_tile_loops({kernel: list(blocks)}):
        total += Counter({**cost.kinds, "bytes": cost.shared_bytes})
    if total:
        yield _counted(kernel, "score", total, 1)


_REFRACTORY_TURNS = {
    "rows": (32, 32),
    "loads": (32, 32),
    "out": (21, 8),
    "weights": (49, 32),
    "delta": (20, 8),
    "backward_keys": (38, 8),
    "backward_queries": (40, 8),
    "means": (16, 8),
    "previous": (40, 16),
}
"""Of refractory attention's kernels with scores in registers: how many matrix instructions and
scores of a thread a turn of the loop for whole tiles has in causal mode, for results of bf16."""


def _refractory_scores(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """Refractory attention with scores in registers, of which a thread has 32 a tile."""
    found = re.fullmatch(r"refractory_lif_attention_half_(\w+)_kernel<(\w+), 64.*>", kernel)
    assert found is not None
    products, scores = _REFRACTORY_TURNS[found[1]]
    if found[2] == "__half" and found[1] in ("backward_keys", "backward_queries"):
        products += 2  # what enters c is two numbers

    def required(block: Block) -> bool:
        # A loop without tests has no selections of scores.
        return _has(block, r"HMMA|MOVM|LDGSTS") and operations([block], [0])["FSEL"] < 4

    ways: list[tuple[int, Counter[str]]] = []
    for root in loop_nest(blocks):
        for loop in root.nest():
            inside = turn(blocks, loop, required, lambda _: False)
            if operations(blocks, inside)["HMMA"] != products:
                continue
            turns: list[tuple[float, Sequence[int]]] = [(32 / scores, inside)]
            around = next(
                (o for r in loop_nest(blocks) for o in r.nest() if loop.head in o.children), None
            )
            if scores == 8 and around is not None:
                only = functools.partial(_is_loop, loop.head)
                turns.append((1, turn(blocks, around, required, only)))
            counts = _tally(blocks, turns)
            ways.append((sum(counts[k] for k in KINDS), counts))
    if ways:
        yield _counted(kernel, "score", min(ways, key=lambda way: way[0])[1], 32)


def _is_loop(head: int, loop: Loop) -> bool:
    return loop.head == head


def _products(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """The CfC's products outside the recurrence, 16 columns at a time of 4 x 4 sums a thread."""
    for root in loop_nest(blocks):
        for loop in root.children.values():
            multiply_adds = operations(blocks, loop.own)["FFMA"]
            if multiply_adds < 16:
                continue
            around = turn(blocks, root, lambda b: _has(b, "BAR|STS"), lambda _: True)
            inner = turn(blocks, loop, lambda _: True, lambda _: True)
            counts = _tally(blocks, [(1, around), (256 / multiply_adds, inner)])
            yield _counted(kernel, "multiply-add", {**counts, "bytes": 0}, 256)
            return


def _synapses(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """The LTC's recurrent synapses, 8 of a thread in registers, or 4 a turn from memory."""
    best: tuple[int, Counter[str]] | None = None
    for root in loop_nest(blocks):
        for loop in root.nest():
            path = turn(blocks, loop, lambda b: _has(b, r"MUFU\.EX2|BAR"), lambda _: False)
            exponentials = _exponentials(blocks, path)
            if exponentials in ((8,) if "true" in kernel else (2, 4)) and (
                best is None or exponentials >= best[0]
            ):
                best = exponentials, _tally(blocks, [(1, path)])
    if best:
        yield _counted(kernel, "synapse and solver step", best[1], best[0])


CFC_UNITS, CFC_BACKBONE = 192, 128
"""Units of the CfC whose steps are counted, and of its backbone, which has one layer."""


def cfc_weights(kernel: str) -> tuple[float, float]:
    """The bytes of the recurrent weights in fp32, and the share that shared memory of sm_90 has."""
    whole = 4.0 * CFC_BACKBONE * CFC_UNITS * (1 + int(kernel[-2]))
    workload = next(w for w in WORKLOADS if w.kernel == kernel)
    beside = workload.shared_bytes - 4 * CFC_UNITS * CFC_UNITS * int(kernel[-2])
    return whole, min(1.0, (LIMITS[90].shared_per_block - beside) / whole)


def _cells(kernel: str, blocks: Sequence[Block]) -> Iterator[Counted]:
    """The CfC's step: products with the weights in shared memory and in the second-level cache.

    A block has four rows and 512 threads. In products a thread has four columns and a slice of
    what they are summed over; beside them it has one and a half units of a row.
    """
    rows, outputs = 4, int(kernel[-2]) * CFC_UNITS
    # The backbone's layer comes before the heads, and in backward after them.
    products = [(CFC_BACKBONE, CFC_UNITS), (outputs, CFC_BACKBONE)]
    if "backward" in kernel:
        products = [(CFC_BACKBONE, outputs), (CFC_UNITS, CFC_BACKBONE)]
    if not any(workload.kernel == kernel for workload in WORKLOADS):
        return
    _, held = cfc_weights(kernel)

    def multiplies(loop: Loop) -> bool:
        return not loop.children and operations(blocks, loop.own)["FFMA"] >= 32

    def cell(loop: Loop) -> bool:
        own = operations(blocks, loop.own)
        return own["BAR"] > 0 and own["FFMA"] < 32 and any(map(multiplies, loop.nest()))

    # Of loops around each other, as over rows, steps and layers, those are the innermost.
    found = [loop for root in loop_nest(blocks) for loop in root.nest() if cell(loop)]
    parts = sorted(
        (f for f in found if not any(f is not g and g.body < f.body for g in found)),
        key=lambda loop: loop.head,
    )
    if len(parts) != len(products):
        return
    turns: list[tuple[float, Sequence[int]]] = []
    sizes = zip(products, parts, (CFC_BACKBONE, CFC_UNITS), strict=True)
    for (columns, depth), part, units in sizes:
        lanes = columns // 4
        slices = min(512 // lanes, 8)
        for loop in part.nest():
            path = turn(blocks, loop, lambda b: _has(b, "BAR|STG|MUFU|FFMA"), lambda _: True)
            own = operations(blocks, loop.own)
            if multiplies(loop):
                share = 1 - held if own["LDG"] else held
                times = share * 4 * rows * -(-depth // slices) / own["FFMA"] * lanes * slices
            elif loop is part or any(map(multiplies, loop.nest())):
                times = 512.0
            elif own["MUFU"] or own["STG"] or own["LDG"]:
                times = float(rows * units)
            elif own["LDS"]:  # over slices
                times = float(rows * units * (slices - 1))
            else:  # over the other blocks of a cluster, which is not what is counted
                continue
            turns.append((times, path))
    counts = _tally(blocks, turns)
    # Lanes read the same rows; how many bytes move is not to be seen.
    unit = "unit and step of a row"
    yield _counted(kernel, unit, {**counts, "bytes": 0}, rows * CFC_UNITS)


_FAMILIES: tuple[tuple[str, Callable[[str, Sequence[Block]], Iterator[Counted]]], ...] = (
    (r"lif_gate_(rows_)?(forward|backward)_kernel<(float|__\w+).*>", _gate),
    (r"lif_attention_half_\w+_kernel<\w+, 64>", _half_scores),
    (r"lif_attention_(forward|backward_queries|backward_keys)_kernel<(float|__\w+), \w+>", _tiles),
    (r"refractory_lif_attention_half_\w+_kernel<\w+, 64.*>", _refractory_scores),
    (r"refractory_lif_attention_(?!half)\w+_kernel<(float|__\w+), \w+.*>", _tiles),
    (r"cfc_scan_(forward|backward)_kernel<(float|__\w+), \d>", _cells),
    (r"cfc_scan_product_kernel<float, .*>", _products),
    (r"ltc_scan_(forward|backward)_kernel<(float|__\w+), \w+>", _synapses),
)


def count(kernels: Mapping[str, Sequence[Block]]) -> list[Counted]:
    """Count what the kernels issue for each unit of their work."""
    found: list[Counted] = []
    for kernel, blocks in kernels.items():
        for pattern, family in _FAMILIES:
            if re.fullmatch(pattern, kernel):
                found += family(kernel, blocks)
                break
    return sorted(found, key=lambda one: one.kernel)
