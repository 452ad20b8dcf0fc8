"""AOTInductor: a compiled model runs with `import ember_ext` alone, and in C++ without Python."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import ember_ext
from ember_ext import _native

EXAMPLE = Path(__file__).parents[1] / "scripts" / "examples" / "aoti"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
    pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels"),
]


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aoti_export", EXAMPLE / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    example().package(str(path))
    return path


def constant_rows(steps: int) -> Tensor:
    """The input of main.cpp."""
    return (torch.arange(2) + 1).mul(0.1).view(2, 1, 1).expand(2, steps, 4).contiguous()


def test_runs_where_only_ember_ext_is_imported(package: Path, tmp_path: Path) -> None:
    model = example().make()
    x = torch.randn(5, 1500, 4)
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = f"""
import torch
{{}}
x, expected = torch.load("expected.pt")
model = torch._inductor.aoti_load_package({str(package)!r})
torch.testing.assert_close(model(x), expected)
"""
    run = [sys.executable, "-c", code.format("import ember_ext")]
    subprocess.run(run, cwd=tmp_path, check=True)
    without = subprocess.run(
        [sys.executable, "-c", code.format("")],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert without.returncode != 0
    assert "ember_ext::cfc_scan_forward" in without.stderr


def test_runs_in_cpp(package: Path, tmp_path: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    includes = [torch_dir / "include", torch_dir / "include/torch/csrc/api/include"]
    program = tmp_path / "aoti_example"
    libraries = [path for folder in ember_ext.__path__ for path in Path(folder).glob("lib*ops.so")]
    command = ["g++", "-std=c++20", "-O0", str(EXAMPLE / "main.cpp"), "-o", str(program)]
    command += [argument for folder in includes for argument in ("-isystem", str(folder))]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    command += [f"-L{torch_dir / 'lib'}", f"-Wl,-rpath,{torch_dir / 'lib'}", "-Wl,--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run(command, check=True)
    run = [str(program), str(libraries[0]), str(package)]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    model = example().make()
    for line, steps in zip(lines, (1, 5, 2000), strict=True):
        assert line.startswith(f"{steps} steps: ")
        with torch.no_grad():
            expected = model(constant_rows(steps))[0].abs().sum().item()
        assert float(line.split()[-1]) == pytest.approx(expected, rel=1e-4)
    missing = subprocess.run([str(program), "nowhere.so", str(package)], check=False)
    assert missing.returncode == 1
