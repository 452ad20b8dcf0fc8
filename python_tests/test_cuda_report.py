"""The CUDA sources compile without spills, and the report's arithmetic is right."""

from __future__ import annotations

import atexit
import csv
import functools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import kernel_costs
from kernel_costs import instructions, launch_times, loops, machine_code

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
RESULTS = ROOT / "bench" / "results"
UNIT_COLUMNS = tuple(
    f"us {unit}" for unit in ("issue", "exponential", "matrix", "shared", "memory", "cache")
)

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1qPf' for 'sm_80'
ptxas info    : Function properties for _Z1qPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


# A loop over tiles, with a loop of two turns of 8 scores in it, and copies on one way around.
_TURN = """\
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
"""
SASS = f"""
//--------------------- .text._Z1kPf --------------------------
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0008*/               @P1 BRA `(.L_x_1) ;
        /*0009*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
{_TURN}        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_parses_machine_code() -> None:
    (blocks,) = machine_code.parse(SASS).values()
    assert [len(block.instructions) for block in blocks if block.instructions] == [1, 1, 1, 4, 1, 1]
    inner = next(i for i, block in enumerate(blocks) if block.count("HMMA"))
    assert machine_code.shortest_cycle(blocks, inner) == [inner]
    copies = next(i for i, block in enumerate(blocks) if block.count("LDGSTS"))
    around = [len(blocks[i].instructions) for i in machine_code.shortest_cycle(blocks, copies)]
    assert around == [1, 4, 1, 1]
    assert machine_code.shortest_cycle(blocks, 0) == []
    kinds = [machine_code.kind(instruction) for instruction in blocks[inner].instructions]
    assert kinds == ["matrix", "exponential", "shared", "other"]


def test_time_of_units() -> None:
    kinds = dict.fromkeys(machine_code.KINDS, 0.0) | {"matrix": 2.0, "exponential": 1.0}
    cost = machine_code.Cost("k", "", kinds, shared_bytes=64)
    units = machine_code.Units("toy", 10, 1e9, matrix=1024, bytes=1e12)
    seconds = machine_code.unit_seconds(cost, 1e9, 1e9, units)
    assert seconds == pytest.approx(
        {
            "issue": 1e9 * 3 / 128 / 1e10,
            "exponential": 1e9 / 16 / 1e10,
            "matrix": 1e9 * 2 * 64 / 1024 / 1e10,
            "shared": 1e9 * 64 / 128 / 1e10,
            "memory": 1e-3,
        }
    )


# A loop over rows with two ways from one norm to the other, of which one is long and seldom taken,
# and a loop within it.
ROWS = """
//--------------------- .text._Z1kPf --------------------------
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   BAR.SYNC 0x0 ;
.L_x_1:
        /*0050*/                   FFMA R1, R1, R1, R1 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   BRA.DIV UR4, `(.L_x_3) ;
.L_x_2:
        /*0080*/               @P3 STG.E.128 [R2], R4 ;
        /*0090*/               @P0 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_2) ;
"""


def test_loops_and_their_turns() -> None:
    (blocks,) = machine_code.parse(ROWS).values()
    (outer,) = loops.loop_nest(blocks)
    (inner,) = outer.children.values()
    assert loops.operations(blocks, inner.own) == {"FFMA": 1, "BRA": 1}
    assert loops.operations(blocks, outer.own)["BAR"] == 1

    def stored(block: machine_code.Block) -> bool:
        return block.count("STG") > 0

    short = loops.turn(blocks, outer, stored, lambda _: False)
    assert loops.operations(blocks, short) == {"LDG": 1, "MUFU": 1, "STG": 1, "BRA": 2}
    whole = loops.turn(blocks, outer, stored, lambda _: True)
    assert loops.operations(blocks, whole) == {
        **{"LDG": 1, "MUFU": 1, "STG": 1, "BAR": 1},
        "BRA": 3,  # with that to where lanes that have parted would meet
    }


def _sass(lines: Sequence[str]) -> str:
    """Machine code of labels and instructions, as nvdisasm writes it."""
    text = "\n".join(
        line if line.startswith(".L") else f"        /*{16 * n:04x}*/ {line} ;"
        for n, line in enumerate(lines)
    )
    return f"\n//--------------------- .text._Z1kPf --------------------------\n{text}\n"


@pytest.mark.parametrize(
    ("before", "loads"),
    [
        # Of rows in one go the loop is for those at edges.
        (["LDG.E.128 R4, [R2]", "LDG.E.128 R8, [R2]", "STS.128 [R3], R4", "STS.128 [R3], R8"], 2),
        # What the scores are made of comes in packs, too.
        (["LDG.E.128 R4, [R2]", "FADD R4, R4, R5", "STS [R3], R4"], 5),
        ([], 4),
    ],
    ids=["in one go", "by a loop, beside a pack", "by a loop"],
)
def test_how_rows_come_to_shared_memory(before: list[str], loads: int) -> None:
    """In a loop over tiles of 16 scores a thread: by four turns of a loop, or by none."""
    in_one_go = len(before) == 4
    rows = [".L_x_1:", "LDG.E R4, [R2]", "STS [R3], R4", "@P2 BRA `(.L_x_1)"]
    code = _sass(
        [
            "MOV R1, c[0x0][0x28]",
            ".L_x_0:",
            *["MUFU.EX2 R1, R1"] * 16,
            *(["@!P1 BRA `(.L_x_1)", *before, "BRA `(.L_x_2)"] if in_one_go else before),
            *rows,
            ".L_x_2:",
            *["FFMA R1, R1, R1, R1"] * 16,
            "@P3 BRA `(.L_x_2)",
            "@P0 BRA `(.L_x_0)",
            "EXIT",
        ]
    )
    (blocks,) = machine_code.parse(code).values()
    (counted,) = instructions.count({"lif_attention_forward_kernel<float, false>": blocks})
    kinds = counted.cost.kinds
    assert kinds["exponential"] == 1
    assert kinds["global"] == loads / 16
    assert kinds["arithmetic"] >= 64, "the loop of products has as many turns as there are columns"


def test_rows_of_the_model() -> None:
    kinds = dict.fromkeys(machine_code.KINDS, 0.0) | {"arithmetic": 64.0}
    kernel = "lif_gate_rows_forward_kernel<float>"
    counted = instructions.Counted(kernel, "element", machine_code.Cost(kernel, "", kinds, 0))
    gpu = machine_code.Units("toy", 10, 1e9, matrix=1024, bytes=1e12)
    elements = 64 * 1024 * 1024
    issue, memory = elements * 64 / 128 / 1e10, elements * 8 / 1e12
    _, row = launch_times.rows([counted], [gpu])
    assert (row["shape"], row["us issue"]) == ("gate [64, 1024, 1024], l2", round(1e6 * issue, 1))
    assert row["us at least"] == row["us issue"] > row["us memory"] == round(1e6 * memory, 1)
    times = {("lif_gate [64, 1024, 1024] float32 norm=l2", kernel): 2e3 * issue}
    (measured,) = launch_times.rows([counted], [gpu], times)
    assert measured["measured / at least"] == 2
    assert launch_times.rows([counted], [gpu], {}) == []


def test_the_model_is_held_to_measured_times() -> None:
    """Of what an H200 has run, by the machine code that it ran."""
    with (RESULTS / "h200" / "kernel_instructions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = launch_times.read_measured(RESULTS / "h200" / "kernels.csv")
    assert len({row["kernel"] for row in rows}) >= 20
    assert {float(row["us measured"]) for row in rows} <= {
        round(1e3 * milliseconds, 1) for milliseconds in times.values()
    }
    for row in rows:
        units = [float(row[key]) for key in row if key.startswith("us ") and key in UNIT_COLUMNS]
        assert float(row["us at least"]) == max(units)
        assert float(row["measured / at least"]) > 1, "faster than the model holds possible"


@functools.cache
def compiled(source: Path) -> tuple[list[kernel_costs.Kernel], Path]:
    """The kernels of a file, and the folder of its object files, which takes minutes to fill."""
    folder = Path(tempfile.mkdtemp(prefix="ember-cubins-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return kernel_costs.compile_kernels(source, (80, 90), keep=folder), folder


def counted_kernels(stem: str) -> list[instructions.Counted]:
    source = next(source for source in SOURCES if source.stem == stem)
    _, folder = compiled(source)
    return instructions.count(machine_code.read_cubin(kernel_costs.kept_object(folder, source, 90)))


needs_nvdisasm = pytest.mark.skipif(
    shutil.which("nvcc") is None or machine_code.find_nvdisasm() is None,
    reason="no nvcc or nvdisasm",
)


@pytest.mark.slow
@needs_nvdisasm
@pytest.mark.timeout(900)
def test_instructions_of_attention_in_16_bits() -> None:
    costs = [one for one in counted_kernels("lif_attention") if "_half_" in one.kernel]
    assert len(costs) == 6
    for element in ("__nv_bfloat16", "__half"):
        mine = [one.cost for one in costs if f"<{element}," in one.kernel]
        assert sum(cost.instructions for cost in mine) <= 110
        # Three products forward and eight backward, in which the scores are computed twice each,
        # a sum of weights, and for each 8 scores two sums of what has been rounded.
        products, sums = 3 + 8, 1 / 8 + 2 / 8
        assert sum(cost.kinds["matrix"] for cost in mine) == pytest.approx(products + sums)


@pytest.mark.slow
@needs_nvdisasm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("units", "matrix", "most"),
    [("false", 0, 1400), ("true", 24, 630)],  # 12 products of 64 columns, 32 an instruction
    ids=["fp32", "tf32"],
)
def test_instructions_of_attention_in_fp32(units: str, matrix: float, most: int) -> None:
    costs = [
        one.cost for one in counted_kernels("lif_attention") if f"<float, {units}>" in one.kernel
    ]
    assert len(costs) == 3
    assert sum(cost.instructions for cost in costs) <= most
    assert sum(cost.kinds["matrix"] for cost in costs) == matrix
    # Rows of 64 columns come by packs of four, the queries and keys of scores twice.
    assert sum(cost.kinds["global"] for cost in costs) >= (5 + 9 + 6) / 4


@pytest.mark.slow
@needs_nvdisasm
@pytest.mark.timeout(900)
def test_instructions_of_refractory_attention_in_16_bits() -> None:
    costs = [one for one in counted_kernels("refractory_lif_attention") if "_half_" in one.kernel]
    assert len(costs) == 18
    for element, parts in (("__nv_bfloat16", 1), ("__half", 2)):
        # The gradient of previous loads is for those that ask for it.
        mine = [o.cost for o in costs if f"<{element}," in o.kernel and "previous" not in o.kernel]
        assert sum(cost.instructions for cost in mine) <= 300
        # 17 products, sums of rounded weights and a test for NaN; for each 8 scores two matrix
        # instructions a sum over queries, five times of p, as two numbers, and twice of tau, and
        # two sums of what has been rounded.
        products, sums = 17 + 1 / 8 + 1 / 32, 5 * 2 * 2 / 8 + 2 * parts * 2 / 8 + 2 / 8
        assert sum(cost.kinds["matrix"] for cost in mine) == pytest.approx(products + sums)


@pytest.mark.slow
@needs_nvdisasm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "stem", ["lif_gate", "lif_attention", "refractory_lif_attention", "ltc_scan"]
)
def test_counts_are_those_of_the_table(stem: str) -> None:
    """Else `python scripts/cuda_report.py --instructions` has to be run anew."""
    with (RESULTS / "kernel_instructions.csv").open(encoding="utf-8") as file:
        table = {row["kernel"]: float(row["instructions"]) for row in csv.DictReader(file)}
    found = {row["kernel"]: row["instructions"] for row in launch_times.rows(counted_kernels(stem))}
    assert found == {
        kernel: pytest.approx(count, rel=0.05)
        for kernel, count in table.items()
        if kernel.startswith(stem)
    }


def test_parses_ptxas() -> None:
    first, second = kernel_costs.parse_ptxas(PTXAS)
    assert first == kernel_costs.Kernel("_Z1kPf", 90, 40, 8, 4, 12)
    assert not first.is_clean
    assert (second.architecture, second.registers, second.is_clean) == (80, 255, True)


def test_short_names() -> None:
    name = "void ember::cuda::k<float, true>(ember::P, ember::cuda::Q)"
    assert kernel_costs.short_name(name) == "k<float, true>"


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared", "expected"),
    [
        (80, 32, 256, 0, 1.0),  # 8 blocks, as many as there are threads for
        (80, 128, 256, 0, 0.25),  # 2 blocks for their registers
        (75, 32, 256, 40 << 10, 0.25),  # 1 block for its shared memory
        (75, 32, 256, 65 << 10, 0.0),  # too much for the block
        (90, 255, 512, 0, 0.0),  # too many registers for the block
    ],
)
def test_occupancy(
    architecture: int, registers: int, threads: int, shared: int, expected: float
) -> None:
    kernel = kernel_costs.Kernel("k", architecture, registers, 0, 0, 0)
    assert kernel_costs.occupancy(kernel, threads, shared) == expected


def test_floor_of_few_blocks() -> None:
    gpu = kernel_costs.Gpu(
        *("toy", 80, 100),
        bytes=1e12, fp32=1e13, fp64=5e12, block_bytes=1e11, tf32=2e13, half=4e13,
    )  # fmt: skip
    full = kernel_costs.Workload("k", "", 256, 1000, bytes=1e9, operations=1e11)
    assert kernel_costs.floor_seconds(full, gpu) == pytest.approx(1e-2)
    few = replace(full, blocks=25)
    assert kernel_costs.floor_seconds(few, gpu) == pytest.approx(4e-2)
    limit = kernel_costs.LIMITS[80].shared_per_block
    multiplied = replace(few, products=1e12)
    assert kernel_costs.floor_seconds(multiplied, gpu) == pytest.approx(1e-1)
    assert kernel_costs.floor_seconds(replace(multiplied, tf32=True), gpu) == pytest.approx(2e-1)
    streamed = replace(few, shared_bytes=limit + 10**5, steps=10**5, elastic=True)
    assert streamed.shared_on(80) == limit
    assert kernel_costs.floor_seconds(streamed, gpu) == pytest.approx(1e-1)
    with_clusters = replace(gpu, architecture=90)
    assert kernel_costs.floor_seconds(streamed, with_clusters) == pytest.approx(1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.timeout(900)  # minutes of compiling on two busy cores
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_spills_and_every_typical_launch_fits(source: Path) -> None:
    kernels, _ = compiled(source)
    assert [k for k in kernels if not k.is_clean] == []
    workloads = {
        w.kernel: w for w in kernel_costs.WORKLOADS if w.kernel.startswith(f"{source.stem}_")
    }
    assert {k.name for k in kernels} == set(workloads)
    for kernel in kernels:
        workload = workloads[kernel.name]
        shared = workload.shared_on(kernel.architecture)
        assert kernel_costs.occupancy(kernel, workload.threads, shared) > 0
        # The least of the supported GPUs has 64 KiB of shared memory.
        assert workload.shared_on(75) <= kernel_costs.LIMITS[75].shared_per_block
