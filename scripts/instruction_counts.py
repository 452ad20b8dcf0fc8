"""What the innermost loops of the CPU kernels consist of: vector and scalar instructions.

    python scripts/instruction_counts.py LIBRARY ... [--out counts.csv]

bench/results/instruction_counts.csv comes from build/*/libember_ext_ops.so and from the one that
scripts/test_aarch64.sh builds, both by gcc 12.

Takes unstripped operator libraries or object files for x86-64 or aarch64, as they lie in the build
folder, and disassembles them with binutils' objdump. In each kernel of `KERNELS` it looks for the
innermost loop that does the most of the kernel's own work. The work is counted in units that do not
depend on the instruction set: multiply-adds, or elements, which are told by what each of them needs
once. So `instructions per unit` compares instruction sets: where all code is vectors, it falls in
proportion to their width.

An instruction is "vector" if it works on several numbers at once, and "scalar" if it calculates
with a single floating-point number. The others load, store or broadcast one number, compute
addresses, or jump.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ISAS = ("baseline", "avx2", "avx512", "neon")


class Kernel(NamedTuple):
    """A loop to look for.

    Attributes:
        name: what the loop does.
        function: a pattern of the demangled names of the functions that may contain it.
        work: "multiply-add", "division" or "store": what tells how much an iteration does.
        per_unit: how many of those a unit takes.
        unit: what is counted.
    """

    name: str
    function: str
    work: str
    per_unit: float
    unit: str


KERNELS = (
    Kernel("lif_gate: forward, L2 norm",
           r"forward<float, \(ember::Norm\)2, true>", "division", 1, "element"),
    Kernel("lif_gate: backward, no norm",
           r"backward(_block)?<float, \(ember::Norm\)0, true", "division", 1, "element"),
    Kernel("attention: product", r"multiply<float, false, \d+>", "multiply-add", 1, "multiply-add"),
    Kernel("attention: product with a transposed matrix",
           r"multiply<float, true, \d+>", "multiply-add", 1, "multiply-add"),
    Kernel("attention: softmax of a row", r"softmax_row<float>", "store", 1, "weight"),
    Kernel("lif_attention: forward, gate of a row",
           r"\bforward_row<float>|(?<!refractory_)lif_attention_forward\(",
           "division", 1, "weight"),
    Kernel("lif_attention: backward, gate of a row",
           r"\)::backward_row<float>", "division", 1, "weight"),
    Kernel("cfc_scan: product of rows, three heads",
           r"\bproduct_piece<float, 3, \d+, \(.*Holds\)0>", "multiply-add", 1, "multiply-add"),
    Kernel("cfc_scan: product of one row, three heads",
           r"product_piece_of_panels<float, 3, \d+, \(.*Holds\)0>", "multiply-add", 1,
           "multiply-add"),
    Kernel("cfc_scan: cells, two tanh and a sigmoid",
           r"\bgated<false|cfc_layer|CfcLayer|heads|cells<3", "division", 3, "cell"),
    Kernel("cfc_scan: gradients of the weights",
           r"CfcWeightGradients<float>", "multiply-add", 1, "multiply-add"),
    Kernel("ltc_scan: synapses of a batch",
           r"LtcSolver<float, 2>::solve", "division", 0.5, "synapse"),
)  # fmt: skip


class Instruction(NamedTuple):
    """An instruction and where it lies."""

    address: int
    operation: str
    operands: str

    def target(self) -> int | None:
        """Where a jump within the function goes; None if it is no jump."""
        if not re.match(r"j|b$|b\.|cbn?z|tbn?z", self.operation):
            return None
        address = re.search(r"(?:^|\s)(?:0x)?([0-9a-f]+)\s+<", self.operands)
        return int(address[1], 16) if address else None


class Machine:
    """How an architecture's instructions are told apart."""

    objdump = "objdump"

    def width(self, i: Instruction) -> int:
        """The numbers that an instruction calculates, loads or stores at once; 0 if it does not."""
        raise NotImplementedError

    def is_arithmetic(self, i: Instruction) -> bool:
        """Whether an instruction calculates with floating-point numbers."""
        raise NotImplementedError

    def work(self, i: Instruction, work: str) -> int:
        """How much of a kind of work an instruction does, in fp32."""
        raise NotImplementedError


class _X86(Machine):
    def width(self, i: Instruction) -> int:
        if re.match(r"v?(broadcast|mov[sd]|insert|pinsr|unpckl|movlh|p?gather)", i.operation):
            return 0
        register = re.search(r"%([xyz])mm\d+$|%([xyz])mm\d+,[^,%]*\(", i.operands)
        if not register or not re.match(r"v|.*p[sd]$|p", i.operation):
            return 0
        if re.match(r".*(ss|sd)$", i.operation):
            return 1
        size = 8 if i.operation.endswith("pd") else 4
        return {"x": 16, "y": 32, "z": 64}[register[1] or register[2]] // size

    def is_arithmetic(self, i: Instruction) -> bool:
        pattern = r"v?(f(n?m)|add|sub|mul|div|min|max|sqrt|u?comis|cmp|cvt|round|rndscale)"
        return bool(re.match(pattern, i.operation)) and "%xmm" in i.operands

    def work(self, i: Instruction, work: str) -> int:
        pattern = {
            "multiply-add": r"v?(fn?m(add|sub)\d+|mul)[ps]s$",
            "division": r"v?div[ps]s$",
            "store": r"v?mov([au]ps|ss)$",
        }[work]
        if not re.match(pattern, i.operation):
            return 0
        if work == "store" and not re.search(r",[^,%]*\((?!%rsp)[^)]*\)$", i.operands):
            return 0
        return 1 if i.operation.endswith("ss") else self.width(i)


class _AArch64(Machine):
    objdump = "aarch64-linux-gnu-objdump"

    def width(self, i: Instruction) -> int:
        if re.match(r"ld1r|dup|ins|umov", i.operation):
            return 0
        if re.match(r"(ld|st)[rpu]", i.operation):
            return 4 if i.operands.startswith("q") else 0
        register = re.match(r"\{?v\d+\.(\d+)[bhsd]", i.operands)
        return int(register[1]) if register else 0

    def is_arithmetic(self, i: Instruction) -> bool:
        return i.operation[0] == "f" and i.operation != "fmov" and i.operands[0] in "sd"

    def work(self, i: Instruction, work: str) -> int:
        pattern = {
            "multiply-add": r"fml[as]$|fn?m(add|sub)$",
            "division": r"fdiv$",
            "store": r"st[rpu]$|stur$|st1$",
        }[work]
        if not re.match(pattern, i.operation) or (work == "store" and "[sp" in i.operands):
            return 0
        pair = 2 if i.operation == "stp" else 1
        return pair * (self.width(i) or int(i.operands[0] == "s"))


@dataclass
class Loop:
    """What an innermost loop consists of."""

    machine: Machine
    instructions: list[Instruction]

    def vectors(self) -> int:
        """How many of the instructions work on several numbers at once."""
        return sum(self.machine.width(i) > 1 for i in self.instructions)

    def scalars(self) -> int:
        """How many calculate with a single floating-point number."""
        wide = self.machine.width
        return sum(wide(i) <= 1 and self.machine.is_arithmetic(i) for i in self.instructions)

    def units(self, kernel: Kernel) -> float:
        """How many of a kernel's units an iteration does."""
        return sum(self.machine.work(i, kernel.work) for i in self.instructions) / kernel.per_unit


def machine_of(path: Path) -> Machine:
    """Which architecture a library or object file is for, by its ELF header."""
    header = path.read_bytes()[:20]
    machines: dict[int, type[Machine]] = {62: _X86, 183: _AArch64}
    number = int.from_bytes(header[18:20], "little")
    if header[:4] != b"\x7fELF" or number not in machines:
        sys.exit(f"error: {path} is neither for x86-64 nor for aarch64")
    return machines[number]()


def functions(path: Path, machine: Machine) -> Iterator[tuple[str, list[Instruction]]]:
    """The functions of a file, by their demangled names."""
    command = [machine.objdump, "--disassemble", "--demangle", "--no-show-raw-insn", "--wide", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        name = re.match(r"[0-9a-f]+ <(.*)>:\n", part)
        if not name:
            continue
        found = re.findall(r"^ +([0-9a-f]+):\t(\S+) *([^#\n/]*)", part, re.MULTILINE)
        yield name[1], [Instruction(int(a, 16), op, args.strip()) for a, op, args in found]


def innermost_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The parts from a jump's target to the jump that have no such part inside."""
    index = {i.address: k for k, i in enumerate(instructions)}
    parts = set()
    for end, i in enumerate(instructions):
        begin = index.get(i.target() or -1, end + 1)
        part = instructions[begin : end + 1]
        if part and not any(j.operation.startswith("ret") for j in part):
            parts.add((begin, end))
    return [
        instructions[begin : end + 1]
        for begin, end in parts
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in parts)
    ]


def find_loops(path: Path) -> dict[tuple[Kernel, str], Loop]:
    """For each kernel and instruction set in a file the loop that does most at once."""
    machine, found = machine_of(path), {}
    for name, instructions in functions(path, machine):
        isa = re.search(rf"ember::({'|'.join(ISAS)})::", name)
        wanted = [kernel for kernel in KERNELS if isa and re.search(kernel.function, name)]
        for part in innermost_loops(instructions) if wanted else ():
            loop = Loop(machine, part)
            for kernel in wanted:
                best = found.get((kernel, isa[1]))
                most = (best.units(kernel), -len(best.instructions)) if best else (0, 0)
                if (loop.units(kernel), -len(part)) > most:
                    found[kernel, isa[1]] = loop
    return found


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+", help="operator libraries or object files")
    parser.add_argument("--out", type=Path, help="where to write the table; default: the terminal")
    options = parser.parse_args()
    found: dict[tuple[Kernel, str], Loop] = {}
    for path in options.file:
        for key, loop in find_loops(path).items():
            found.setdefault(key, loop)
    rows = [
        {
            "kernel": kernel.name,
            "unit": kernel.unit,
            "isa": isa,
            "units per iteration": f"{loop.units(kernel):g}",
            "vector": loop.vectors(),
            "scalar": loop.scalars(),
            "other": len(loop.instructions) - loop.vectors() - loop.scalars(),
            "instructions per unit": f"{len(loop.instructions) / loop.units(kernel):.3f}",
            "vector per unit": f"{loop.vectors() / loop.units(kernel):.3f}",
        }
        for kernel in KERNELS
        for isa in ISAS
        if (loop := found.get((kernel, isa)))
    ]
    if not rows:
        sys.exit(
            "error: no kernel found; is the library stripped? The build folder has a whole one"
        )
    with options.out.open("w", newline="") if options.out else sys.stdout as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
