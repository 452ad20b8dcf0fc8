"""scripts/instruction_counts.py tells code of vectors from code of single numbers."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "instruction_counts.py"
SOURCE = """
namespace ember { namespace ISA {
template <typename C> void softmax_row(long n, const C* x, C* y) {
  for (long i = 0; i < n; ++i) y[i] = x[i] * x[i] + C(1);
}
template void softmax_row<float>(long, const float*, float*);
}}
"""


@pytest.mark.parametrize(
    ("compiler", "isa", "flags", "lanes"),
    [
        ("x86_64-linux-gnu-g++", "baseline", (), 4),
        ("x86_64-linux-gnu-g++", "avx2", ("-mavx2", "-mfma"), 8),
        ("aarch64-linux-gnu-g++", "neon", (), 4),
    ],
)
def test_vectors_are_told_from_scalars(
    compiler: str, isa: str, flags: tuple[str, ...], lanes: int, tmp_path: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    (tmp_path / "loop.cpp").write_text(SOURCE.replace("ISA", isa))
    for option, width in (("-ftree-vectorize", lanes), ("-fno-tree-vectorize", 1)):
        command = [compiler, "-O3", option, *flags, "-c", "loop.cpp", "-o", "loop.o"]
        subprocess.run(command, cwd=tmp_path, check=True)
        subprocess.run(
            [sys.executable, SCRIPT, "loop.o", "--out", "counts.csv"], cwd=tmp_path, check=True
        )
        with (tmp_path / "counts.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row["isa"] == isa
        assert float(row["units per iteration"]) == width
        assert (int(row["vector"]) > 0) == (width > 1)
        assert (int(row["scalar"]) > 0) == (width == 1)
        counts = sum(int(row[kind]) for kind in ("vector", "scalar", "other"))
        assert float(row["instructions per unit"]) == pytest.approx(counts / width, abs=1e-3)
