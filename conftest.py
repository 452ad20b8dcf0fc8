"""The code blocks of README.md and docs/, and the examples in docstrings, are tests.

The blocks of a page run in order, as one program, in an empty folder. Each docstring is a program
of its own. A comment above a block says why it cannot run here, and its test is skipped:

    <!-- skip: next "needs an NVIDIA GPU" -->
"""

from __future__ import annotations

import doctest
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Spinning threads of a test and of the processes that it starts would fight for the cores. torch
# reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes of pytest-xdist share the cores, with two threads each at least: what threads do to each
# other is tested, too.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // workers)))

import pytest
from _pytest._code.code import Traceback
from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.doctest import NUMBER, DocTestRunner
from sybil.example import NotEvaluated
from sybil.integration.pytest import SybilItem
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | NUMBER


class Docstrings(PythonDocStringDocument):
    """The docstrings of a module, whose examples get none of the module's names."""

    def import_document(self, example: Example) -> None:
        """Do not import the module: a reader who copies an example has no such names either."""
        self.pop_evaluator(self.import_document)
        raise NotEvaluated


def docstring_program(document: Document) -> Iterator[Region]:
    """Find the examples of one docstring, as one region."""
    examples = doctest.DocTestParser().get_examples(document.text)
    if examples:
        yield Region(0, len(document.text), examples, run_docstring)


def run_docstring(example: Example) -> str:
    """Run the examples of one docstring, and return what differs from it."""
    import torch

    torch.manual_seed(0)
    output: list[str] = []
    program = doctest.DocTest(
        example.parsed, {"__name__": "__main__"}, example.path, example.path, example.line, None
    )
    DocTestRunner(DOCTEST_OPTIONS).run(program, out=output.append)
    return "".join(output)


def enter_folder(namespace: dict[str, Any]) -> None:
    """Start a page in an empty folder, with one seed for every page."""
    import torch

    torch.manual_seed(0)
    namespace["_folder"] = folder = TemporaryDirectory()
    namespace["_before"] = Path.cwd()
    os.chdir(folder.name)


def leave_folder(namespace: dict[str, Any]) -> None:
    """Undo `enter_folder`."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


PAGES = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=DOCTEST_OPTIONS), SkipParser()],
    patterns=["*.md"],
    setup=enter_folder,
    teardown=leave_folder,
)
DOCSTRINGS = Sybil(
    parsers=[docstring_program], patterns=["*.py"], document_types={".py": Docstrings}
)

_collect_page = PAGES.pytest()
_collect_docstrings = DOCSTRINGS.pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the documented files, as pytest does with those of tests."""
    place = file_path.relative_to(Path(__file__).parent)
    if place.name == "README.md" or place.parts[0] == "docs":
        return _collect_page(file_path, parent)
    if place.parts[0] == "ember_ext":
        return _collect_docstrings(file_path, parent)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore what PyTorch's exporters say about their own age: a page is no place to answer it."""
    for item in items:
        if isinstance(item, SybilItem):
            for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
            item.add_marker(pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"))
            # sybil's own filter raises an error of pytest where an exception has a cause.
            item._traceback_filter = _whole_traceback  # type: ignore[method-assign]


def _whole_traceback(excinfo: pytest.ExceptionInfo[BaseException]) -> Traceback:
    return excinfo.traceback
