"""What all tests share: fixtures, how many processes run them, and when GPU tests are skipped.

The whole suite runs in a process for each core, each file in one of them. A run that names files or
tests runs in one process, and so does `python -m pytest -n 0`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ember_ext import _native


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute the whole suite; this runs before pytest-xdist reads its options."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    # `lf` is missing with `-p no:cacheprovider`.
    last_failed = getattr(option, "lf", False)
    selected = option.keyword or option.markexpr or last_failed or option.usepdb
    if not whole or selected or hasattr(config, "workerinput"):
        return
    if config.pluginmanager.hasplugin("xdist") and option.numprocesses is None:
        option.numprocesses, option.maxprocesses = "auto", option.maxprocesses or 8
        # Tests of one file share what is costly to build. The order is that of the collection.
        option.dist, option.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: an address, which each process has its own of")
    if hasattr(config, "workerinput"):
        # The longest files come first, lest one process be left with one of them at the end.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without a picture of their losses, which takes longer than tiny models train."""
    monkeypatch.setattr("ember_ext.paper.training.run_folder.plot_losses", lambda *_: b"")


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_repeats() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """Check that a function returns the same bits again and with any number of threads."""

    def check(run: Callable[[], Sequence[Tensor]]) -> None:
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                results.append(run())
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)

    return check


@pytest.fixture
def run_with_isa() -> Callable[[str, str], None]:
    """Run code in a process whose kernels use an instruction set; skip where there is none such."""

    def run(isa: str, code: str) -> None:
        if isa not in _native.isas:
            pytest.skip(f"this architecture has no {isa}")
        result = subprocess.run(
            [sys.executable, "-c", f"{code}\nfrom ember_ext import _native\nprint(_native.isa)"],
            env=os.environ | {"EMBER_EXT_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        if "cannot run EMBER_EXT_ISA" in result.stderr:
            pytest.skip(f"this machine has no {isa}")
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == isa

    return run


@pytest.fixture
def assert_matches_with(
    run_with_isa: Callable[[str, str], None],
) -> Callable[[str, str], None]:
    """Hold an operator of `testing.OPERATORS` to its reference with an instruction set, in fp32."""

    def check(isa: str, name: str) -> None:
        if isa == _native.isa:
            pytest.skip("the other tests run it")
        code = f"""
import torch
from ember_ext import testing
for entry in testing.OPERATORS:
    for sample in entry.samples(torch.float32) if entry.name == "{name}" else ():
        testing.check_sample(entry.operator, entry.reference, sample)
        matched = True
assert matched
"""
        run_with_isa(isa, code)

    return check


@pytest.fixture
def counted_compile() -> Callable[[Callable[..., Any]], tuple[Callable[..., Any], list[Any]]]:
    """Compile a function as one graph; also return the list that each graph made is added to."""

    def compile(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
        torch._dynamo.reset()
        graphs: list[Any] = []

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        return torch.compile(function, fullgraph=True, backend=backend), graphs

    return compile
