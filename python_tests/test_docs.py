"""What the documentation names exists; `conftest.py` in the root runs its code blocks."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sybil.example import SybilFailure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
LIBRARY = ["ember_ext", "ember_ext.nn", "ember_ext.ops", "ember_ext.reference", "ember_ext.models"]
PUBLIC_MODULES = [*LIBRARY, "ember_ext.testing"]
PUBLIC_MODULES += ["ember_ext.paper.data", "ember_ext.paper.sequences", "ember_ext.paper.training"]
COMMAND_PREFIXES = ("torchrun", "python", "pip", "uv")


def shell_commands() -> Iterator[tuple[str, str]]:
    """Each command in the shell blocks and tables of all pages, with its page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"`((?:python|pip|torchrun) [^`\n]*)`", text)
        for line in lines:
            for command in re.split(r"&&|;", line):
                yield str(page.relative_to(ROOT)), command.strip()


def arguments(command: str) -> list[str]:
    """Words of a shell command without its comment, and without variables before it."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    return words


def help_of(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code in (0, None)
    return str(capsys.readouterr().out)


def commands_by_script() -> dict[str, list[tuple[str, list[str]]]]:
    scripts: dict[str, list[tuple[str, list[str]]]] = {}
    for page, command in shell_commands():
        words = arguments(command)
        for index, word in enumerate(words):
            if word.endswith(".py") and words[0] in ("python", "torchrun"):
                scripts.setdefault(word, []).append((page, words[index + 1 :]))
    return scripts


SCRIPTS = commands_by_script()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_the_flags_that_pages_use(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / script
    assert path.is_file(), f"{SCRIPTS[script][0][0]} names {script}"
    flags = {
        (word.partition("=")[0], page)
        for page, words in SCRIPTS[script]
        for word in words
        if word.startswith("--")
    }
    if not flags - {(flag, page) for flag, page in flags if flag == "--help"}:
        return
    known = set(re.findall(r"--[a-z0-9][a-z0-9-]*", help_of(path, monkeypatch, capsys)))
    for flag, page in flags:
        assert flag in known, f"{page}: {script} has no {flag}"


def test_pip_lines_name_extras_that_exist() -> None:
    found = 0
    for page, command in shell_commands():
        if not re.match(r"(uv )?pip install", command):
            continue
        for extras in re.findall(r"(?:\.|ember-ext|ember_ext)\[([a-z,-]+)\]", command):
            for extra in extras.split(","):
                assert extra in EXTRAS, f"{page}: no extra {extra}"
                found += 1
    assert found


def test_modules_that_pages_run_exist() -> None:
    for page, command in shell_commands():
        words = arguments(command)
        if words[:2] == ["python", "-m"] and words[2].startswith("ember_ext"):
            name = words[2]
            assert (ROOT / name.replace(".", "/")).exists(), f"{page}: {command}"


def documented() -> dict[int, set[str]]:
    """What the pages of the API reference describe: the object's id, with the names it is under."""
    names: dict[int, set[str]] = {}
    module = ""
    for page in sorted((DOCS / "api").glob("*.md")):
        for directive, name in re.findall(
            r"^\.\. (currentmodule|auto(?:function|class|data|exception)|py:data):: ([\w.]+)",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            if directive == "currentmodule":
                module = name
            else:
                thing = getattr(importlib.import_module(module), name)
                names.setdefault(id(thing), set()).add(f"{module}.{name}")
    return names


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_reference_has_every_public_name(module: str) -> None:
    described = documented()
    imported = importlib.import_module(module)
    missing = [
        name
        for name in imported.__all__
        if name != "__version__"
        and not inspect.ismodule(getattr(imported, name))
        and id(getattr(imported, name)) not in described
    ]
    assert not missing, f"{module} has {missing}, which docs/api does not"


def test_every_public_name_of_the_library_has_an_example() -> None:
    """The examples are tests themselves, see `conftest.py` in the root."""
    missing = []
    for module in LIBRARY:
        imported = importlib.import_module(module)
        for name in imported.__all__:
            thing = getattr(imported, name)
            if callable(thing) and not re.search(r"Examples::\n\n *>>> ", thing.__doc__ or ""):
                missing.append(f"{module}.{name}")
    assert not missing


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = {"index"}
    for page in PAGES[1:]:
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```$",
            page.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        ):
            folder = page.parent.relative_to(DOCS)
            listed |= {
                (folder / line).as_posix() for line in block.splitlines() if line and line[0] != ":"
            }
    assert listed == {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES[1:]}


def test_files_of_an_operator_are_where_the_page_says() -> None:
    text = (DOCS / "adding_an_operator.md").read_text(encoding="utf-8")
    files = re.findall(r"^\|[^|]*\| `(\S*<op>\S*)` \|", text, re.MULTILINE)
    assert len(files) > 8
    for file in files:
        assert (ROOT / file.replace("<op>", "lif_gate")).is_file(), file


def test_files_that_pages_name_exist() -> None:
    found = 0
    folders = "bench|csrc|docs|ember_ext|python_tests|scripts"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"
            found += 1
    assert found


def test_tests_that_pages_name_exist() -> None:
    found = set()
    for page in PAGES:
        for name in re.findall(r"\btest_\w+\.py\b", page.read_text(encoding="utf-8")):
            assert (ROOT / "python_tests" / name).is_file(), f"{page.relative_to(ROOT)}: {name}"
            found.add(name)
    assert len(found) > 10


FOREIGN_MESSAGES = ("compiler", "CMAKE_CXX_COMPILER", "undefined symbol", "GLIBCXX", "kernel image")


def test_messages_that_the_installation_page_explains_are_those_of_the_code() -> None:
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "ember_ext").rglob("*.py")]
    # Texts are broken over lines in the code, and have names put in.
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    terms = re.findall(r"^(`.*`)\n: ", page, re.MULTILINE)
    messages = [m for term in terms for m in re.findall(r"`` ?(.+?) ?``|`([^`]+)`", term)]
    checked = 0
    for message in ("".join(pair) for pair in messages):
        if any(word in message for word in FOREIGN_MESSAGES) or message in ("nvcc",):
            continue
        for part in message.split("...: "):
            words = part.split(" ...")[0].strip(".").replace("libember_ext_ops.so", "{file}")
            assert re.sub(r"for (cpu|cuda) tensors", "", words).strip() in code, message
            checked += 1
    assert checked > 8


def load_conftest() -> ModuleType:
    """The root's conftest.py, under a name of its own: there is another one in this folder."""
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wrong_examples_fail(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        'LEAK = 1\ndef f():\n    """F.\n\n    >>> 1 + 1\n    {}\n    """\n'
        'def g():\n    """G.\n\n    >>> LEAK\n    1\n    """\n'
    )
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == {}\n```\n")
    conftest = load_conftest()

    def outcomes(sybil: Any, file: Path, right: int) -> list[bool]:
        file.write_text(file.read_text().replace("{}", str(right)))
        good = []
        for example in sybil.parse(file).examples():
            try:
                example.evaluate()
                good.append(True)
            except (SybilFailure, AssertionError):
                good.append(False)
        return good

    templates = source.read_text(), page.read_text()
    # A name of the module is no name of an example, which a reader copies without the module.
    assert outcomes(conftest.DOCSTRINGS, source, 2) == [True, False]
    assert outcomes(conftest.PAGES, page, 1) == [True, True]
    source.write_text(templates[0])
    page.write_text(templates[1])
    assert outcomes(conftest.DOCSTRINGS, source, 3) == [False, False]
    assert outcomes(conftest.PAGES, page, 2) == [True, False]
