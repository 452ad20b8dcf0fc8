"""The package as an installation: loading, fallback, what the library may link to, its report."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

import ember_ext
from ember_ext import _native

ROOT = Path(__file__).resolve().parent.parent
needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip


def library() -> Path:
    assert _native.library is not None
    return Path(_native.library._name)


@needs_kernels
def test_kernels_are_found_from_the_clone_and_from_elsewhere(tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        result = run_python("from ember_ext import _native; print(_native.isa)", cwd=folder)
        assert result.stdout.strip() in _native.isas
        assert result.stderr == ""


RELOAD = """
import importlib, ember_ext
importlib.reload(ember_ext)
print(ember_ext._native.has("cpu"), "cpu" in ember_ext._native.unavailable)
"""


@needs_kernels
def test_a_reloaded_package_keeps_its_kernels() -> None:
    result = run_python(RELOAD)
    assert result.stdout.split() == ["True", "False"]
    assert result.stderr == ""


FALLBACK = """
import sys, torch
{break_it}
import ember_ext
from ember_ext import nn, reference
gate, x = nn.LIFGate(5), torch.randn(4, 5, requires_grad=True)
y = gate(x)
assert torch.equal(y, reference.lif_gate(x, gate.threshold, gate.leak, gate.steepness, norm="l2"))
y.sum().backward()
gate(x)
"""


# torch looks at the platform when it loads this, which is later otherwise.
WINDOWS = "import torch._dynamo; sys.platform = 'win32'"
NO_LIBRARY = "import pkgutil; pkgutil.extend_path = lambda path, name: path"
OTHER_FOLDER = "import pkgutil; pkgutil.extend_path = lambda path, name: [*path, {folder!r}]"


@pytest.mark.parametrize(
    ("break_it", "reason", "advice"),
    [
        (NO_LIBRARY, "libember_ext_ops.so was not built", "pip install"),
        (
            "torch.ops.ember_ext.lif_gate = None",
            "another copy of the library is loaded",
            "pip install",
        ),
        (WINDOWS, "libember_ext_ops.dll was not built", "use WSL"),
    ],
)
def test_without_kernels_one_warning_and_the_reference(
    break_it: str, reason: str, advice: str
) -> None:
    result = run_python(FALLBACK.format(break_it=break_it))
    warnings = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 1
    assert "no compiled kernels for cpu tensors" in warnings[0]
    assert reason in warnings[0]
    assert advice in warnings[0]


BUILD_INFO = """
extern "C" const char* ember_ext_build_info() {{
  return "version={version}\\nschemas={schemas}\\ncuda=";
}}
"""
REGISTER = """
extern "C" int ember_ext_register(char* error, unsigned long size) {
  __builtin_snprintf(error, size, "the operators clash");
  return 1;
}
"""
FUNCTIONS = {name: f'extern "C" void {name}() {{}}\n' for name in _native._FUNCTIONS}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "libember_ext_ops.so: file too short"),
        ("int nothing;", "is of another version: it has no ember_ext_build_info"),
        ("int of_torch(); int call() { return of_torch(); }", "undefined symbol: .*of_torch"),
        (BUILD_INFO + REGISTER, "it has no ember_ext_unwatch"),
        (BUILD_INFO + REGISTER + "".join(FUNCTIONS.values()), "the operators clash"),
    ],
    ids=["no library", "older", "no such torch", "without a function", "not registered"],
)
def test_a_library_that_does_not_load_gives_one_warning_and_the_reference(
    tmp_path: Path, source: str | None, reason: str
) -> None:
    built = tmp_path / "libember_ext_ops.so"
    if source is None:
        built.touch()
    elif shutil.which("g++") is None:
        pytest.skip("no g++")
    else:
        schemas = hashlib.sha256((ROOT / "csrc/registration.cpp").read_bytes()).hexdigest()
        info = BUILD_INFO.format(version=ember_ext.__version__, schemas=schemas)
        command = ["g++", "-shared", "-fPIC", "-O0", "-x", "c++", "-", "-o", str(built)]
        subprocess.run(command, input=source.replace(BUILD_INFO, info), text=True, check=True)
    result = run_python(FALLBACK.format(break_it=OTHER_FOLDER.format(folder=str(tmp_path))))
    warnings = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 1
    assert re.search(f"no compiled kernels for cpu tensors.*{reason}.*pip install", warnings[0])


def test_a_library_of_another_version_is_not_used() -> None:
    code = """
import ember_ext._native as native
native._devices.clear()
native.load("99.0")
assert not native.has("cpu")
"""
    if not _native.has("cpu"):
        pytest.skip("no compiled kernels")
    assert "but the Python code is 99.0" in run_python(code).stderr


@needs_kernels
def test_a_library_of_other_schemas_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/registration.cpp").write_text("// other schemas")
    shutil.copytree(ROOT / "ember_ext", tmp_path / "ember_ext")
    result = run_python("import ember_ext", cwd=tmp_path)
    assert "compiled from another version of csrc/registration.cpp" in result.stderr


@needs_kernels
def test_an_unknown_instruction_set_leaves_the_best() -> None:
    code = "from ember_ext import _native; print(_native.isa)"
    best = run_python(code, EMBER_EXT_ISA="").stdout
    result = run_python(code, EMBER_EXT_ISA="sse9")
    names = ", ".join(_native.isas)
    expected = f"must be one of {names}, got sse9; using {best.strip()}"
    assert result.stderr.count(expected) == 1
    assert result.stdout == best


@needs_kernels
def test_instruction_sets_are_named_in_letters_of_either_case() -> None:
    code = "from ember_ext import _native; print(_native.isa)"
    least = _native.isas[0]
    result = run_python(code, EMBER_EXT_ISA=least.capitalize())
    assert (result.stdout, result.stderr) == (f"{least}\n", "")


def test_every_extension_that_kernels_are_compiled_with_is_looked_for() -> None:
    lists = re.findall(r"set\(avx\w+_flags ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    extensions = set(re.findall(r"-m(\w+)", " ".join(lists))) - {"prefer"}
    assert {"avx2", "f16c", "avx512f"} <= extensions
    looked_for = (ROOT / "csrc/cpu/isa.cpp").read_text()
    for extension in extensions:
        names = f'__builtin_cpu_supports("{extension}")', f"bit_{extension.upper()}"
        assert any(name in looked_for for name in names), extension


LIBRARY = (
    "ember_ext",
    "ember_ext.models",
    "ember_ext.nn",
    "ember_ext.ops",
    "ember_ext.reference",
    "ember_ext.testing",
)
NEEDED = {"torch", "ncps", "numpy"}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def with_requirements(distribution: str, known: set[str]) -> set[str]:
    """What is known already, a distribution, and all that it requires without extras."""
    name = canonical(distribution)
    if name in known:
        return known
    known = known | {name}
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return known
    for requirement in requirements:
        if "extra ==" not in requirement:
            known = with_requirements(re.split(r"[^\w.-]", requirement)[0], known)
    return known


@needs_kernels
def test_importing_the_library_loads_what_it_needs_and_no_more() -> None:
    """That is torch, ncps, NumPy and what they require; the study of the paper stays out."""
    code = f"""
import sys
import {", ".join(NEEDED)}  # which load what they find, tqdm for one
before = set(sys.modules)
import {", ".join(LIBRARY)}
print(*sorted(set(sys.modules) - before))
"""
    loaded = run_python(code).stdout.split()
    assert set(LIBRARY) <= set(loaded)
    assert [name for name in loaded if name.startswith("ember_ext.paper")] == []
    allowed = {"ember-ext"}
    for distribution in NEEDED:
        allowed = with_requirements(distribution, allowed)
    assert not allowed & {"matplotlib", "rich", "tyro", "pooch", "safetensors", "scipy"}
    distributions = metadata.packages_distributions()
    for package in {name.partition(".")[0] for name in loaded}:
        owners = {canonical(owner) for owner in distributions.get(package, [])}
        assert not owners or owners & allowed, f"{package} of {owners}"


@pytest.mark.parametrize(
    "source",
    [
        source
        for source in sorted((ROOT / "ember_ext").rglob("*.py"))
        if ROOT / "ember_ext" / "paper" not in source.parents
    ],
    ids=lambda source: str(source.relative_to(ROOT / "ember_ext")),
)
def test_no_module_of_the_library_asks_for_more(source: Path) -> None:
    """Imports inside functions count too."""
    for node in ast.walk(ast.parse(source.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports by full names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package = name.partition(".")[0]
            assert package in sys.stdlib_module_names | NEEDED | {"ember_ext"}, name
            assert not name.startswith("ember_ext.paper"), name


@needs_kernels
def test_torch_symbols_are_those_of_the_oldest_torch() -> None:
    """One build serves every torch from 2.10 on, because nothing newer is asked for."""
    allowed = (Path(__file__).parent / "torch_2_10_symbols.txt").read_text().split()
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library()], capture_output=True, text=True, check=True
    )
    needed = set(re.findall(r"\bU ((?:aoti_)?torch_\w+)", listing.stdout))
    assert needed
    assert needed <= set(allowed)
    # C++ symbols of torch would tie the library to one version.
    assert not re.findall(r"\bU (_ZN?K?(?:2at|3c10|5torch)\w+)", listing.stdout)
    # Those of Python would tie the wheel, whose tag is "py3", to one version of that.
    assert not re.findall(r"\bU (_?Py\w+)", listing.stdout)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cpu").glob("*.cpp")), ids=lambda p: p.stem)
def test_kernels_of_one_instruction_set_are_not_shared_with_another(
    source: Path, tmp_path: Path
) -> None:
    """Of weak symbols with one name the linker keeps one, perhaps with instructions too new."""
    if source.stem == "isa":
        pytest.skip("built once, for every machine")
    built = tmp_path / "kernel.o"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-DEMBER_ISA=probe", "-c", source, "-o", built]
    subprocess.run(command, check=True)
    listing = subprocess.run(["nm", "-C", built], capture_output=True, text=True, check=True)
    weak = [line for line in listing.stdout.splitlines() if re.match(r"\w+ [WVu] ", line)]
    assert [line for line in weak if "ember::probe::" not in line] == []


def test_the_readme_example_runs() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    result = run_python(example[1])
    assert result.stderr == ""


def test_report_and_self_test() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ember_ext", "--no-selftest"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for line in ("ember-ext", "torch", "instruction set", "threads"):
        assert re.search(rf"^{line} +\S", result.stdout, re.MULTILINE)


def test_self_test_notices_a_wrong_operator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ember_ext import __main__, testing

    gate = next(entry for entry in testing.OPERATORS if entry.name == "lif_gate")
    wrong = gate._replace(operator=lambda **arguments: gate.operator(**arguments) * 1.001)
    for entry, good in ((gate, True), (wrong, False)):
        monkeypatch.setattr(testing, "OPERATORS", (entry,))
        assert __main__.self_test() == good
    assert "FAILED" in capsys.readouterr().out


def test_build_backend_uses_the_installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import torch

    import build_backend

    assert build_backend._installed_torch() == Path(torch.__file__).parent
    settings = build_backend._with_torch({"a": "b"})
    assert settings["cmake.define.EMBER_TORCH_DIR"] == str(Path(torch.__file__).parent)
    assert build_backend._requirements(["ninja"]) == ["ninja"]
    monkeypatch.setattr(build_backend, "_installed_torch", lambda: None)
    assert build_backend._requirements(["ninja"]) == ["ninja", "torch>=2.10"]
    assert build_backend._with_torch(None) == {}


@pytest.mark.parametrize("shared", [False, True])
def test_build_backend_looks_where_the_interpreter_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: bool
) -> None:
    """A virtual environment may share the system's packages, and then its torch."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import build_backend

    (tmp_path / "pyvenv.cfg").write_text(f"include-system-site-packages = {str(shared).lower()}\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert (site.getusersitepackages() in build_backend._site_folders()) == shared


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_build_backend_looks_in_the_active_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """`python -m build` has an environment of its own, which knows of no other."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import build_backend

    torch_folder = tmp_path / "lib/python3.14/site-packages/torch"
    torch_folder.mkdir(parents=True)
    (torch_folder / "version.py").touch()
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_backend, "_site_folders", list)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert build_backend._installed_torch() is None
    monkeypatch.setenv(variable, str(tmp_path))
    assert build_backend._installed_torch() == torch_folder


def test_an_operator_without_cuda_kernels_takes_its_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "_devices", {"cpu", "cuda"})
    monkeypatch.setattr(_native, "_cuda_operators", {"lif_gate"})
    assert _native.has("cuda", "lif_gate")
    with pytest.warns(UserWarning, match="for cuda tensors.*reference: some_scan has none yet"):
        assert not _native.has("cuda", "some_scan")
    # Said once: a second warning would be an error.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.has("cuda", "some_scan")
