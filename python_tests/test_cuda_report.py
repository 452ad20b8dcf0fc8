"""The CUDA sources compile without spills, and the report's arithmetic is right."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import kernel_costs
from kernel_costs import machine_code

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))

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


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None or machine_code.find_nvdisasm() is None,
    reason="no nvcc or nvdisasm",
)
@pytest.mark.timeout(900)
def test_instructions_of_attention_in_16_bits() -> None:
    source = next(source for source in SOURCES if source.stem == "lif_attention")
    costs = machine_code.whole_tile_loops(machine_code.disassemble(source, 90))
    assert len(costs) == 8
    for element in ("__nv_bfloat16", "__half"):
        mine = [cost for cost in costs if f"<{element}," in cost.kernel]
        assert sum(cost.instructions for cost in mine) <= 110
        # Three products forward and eight backward, in which the scores are computed twice each.
        assert sum(cost.kinds["matrix"] for cost in mine) == pytest.approx(11.125)
    assert len(machine_code.attention_rows(costs)) == 32


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.timeout(900)  # minutes of compiling on two busy cores
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_spills_and_every_typical_launch_fits(source: Path) -> None:
    kernels = kernel_costs.compile_kernels(source, (80, 90))
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
