"""The command line of `scripts/reproduce.py`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ember_ext._command_line import (
    FlagError,
    at_least,
    prepare_output,
    refuse_empty,
    require,
    require_distinct,
)
from ember_ext.paper.data import CorpusError, load_text
from ember_ext.paper.report import ReportContext, write_report
from ember_ext.paper.runs.console import GridConsole
from ember_ext.paper.runs.executors import Executor, LocalExecutor, SubmititExecutor
from ember_ext.paper.runs.grid import Grid
from ember_ext.paper.runs.results import ResultError, read_results
from ember_ext.paper.runs.suites import SuiteName, plan
from ember_ext.paper.runs.worker import GridFolder
from ember_ext.paper.training import ConfigError, RunError, StopRequested, resolve_device
from ember_ext.paper.training.config import Backbone


@dataclass(frozen=True)
class ReproduceArguments:
    """Run the paper's conditions over seeds; write its tables, figures and claims with verdicts.

    What is in the folder already is not run again: call it again with the same --out after any
    interruption, or with more seeds.
    """

    suite: SuiteName = "quick"
    """"quick" takes minutes, "xs" is the paper's small scale (hours), "stated" the CfC of the sizes
    that its text states (an hour a run), "paper" what its authors trained (days on a CPU)."""
    out: Path | None = None
    """The folder. Default: runs/reproduce-SUITE."""
    seeds: tuple[int, ...] = ()
    """Default: 42 for "quick", else 42, 668 and 1337."""
    conditions: tuple[str, ...] = ()
    """Only these, of standard, lif, lif-fixed, lif-refractory, qwen-gate, lif-text (lif with the
    gate of the paper's text) and null (standard again, equal up to rounding)."""
    backbones: tuple[Backbone, ...] = ()
    """Only these."""
    jobs: int | None = None
    """Runs at once on this machine. Default: one per GPU, or per core."""
    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one."""
    data: Path | None = None
    """A UTF-8 text file to train on instead of Shakespeare."""
    executor: Literal["local", "slurm"] = "local"
    """Processes of this machine, or jobs of Slurm (needs the extra "cluster")."""
    slurm: tuple[str, ...] = ()
    """NAME=VALUE options for submitit, such as slurm_partition=gpu timeout_min=240."""
    report_only: bool = False
    """Draw the report from what is there, and train nothing."""


def reproduce_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/reproduce.py`; returns its exit code: 1 if a run failed."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    prepare_output()
    try:
        refuse_empty(arguments)
        options = tyro.cli(ReproduceArguments, args=arguments, prog="reproduce.py")
        _check(options)
    except (ConfigError, FlagError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = [word for word in arguments if word != "--report-only"]
    command = shlex.join(["python", "scripts/reproduce.py", *words])
    try:
        return _reproduce(options, command)
    except StopRequested as stop:
        print(f"{stop}; continue with: {command}")
        return stop.exit_code
    except (ConfigError, CorpusError, ResultError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(options: ReproduceArguments) -> None:
    require("--jobs", options.jobs, at_least(1))
    require_distinct("--seeds", options.seeds)
    require_distinct("--conditions", options.conditions)
    require_distinct("--backbones", options.backbones)
    if options.slurm and options.executor != "slurm":
        raise ConfigError("slurm options need --executor slurm")
    _slurm_options(options.slurm)


def _reproduce(options: ReproduceArguments, command: str) -> int:
    folder = GridFolder(options.out or Path("runs", f"reproduce-{options.suite}"))
    # Slurm's machines have devices of their own, which each run looks for when it starts.
    local = options.executor == "local"
    device = resolve_device(options.device) if local else options.device
    data = None if options.data is None else str(options.data.resolve())
    specs = plan(
        options.suite,
        options.seeds,
        options.conditions,
        options.backbones,
        device=device,
        data=data,
    )
    names = [spec.name for spec in specs]
    failures: dict[str, str] = {}
    with GridConsole() as console:
        note = console.console.print
        corpus = (
            None
            if options.report_only
            else load_text(data=data, notify=lambda text: note(text, markup=False))
        )
        if corpus is not None:
            specs = [dataclasses.replace(spec, corpus=corpus.sha256) for spec in specs]
        grid = Grid(folder, specs, corpus)
        if not options.report_only:
            folder.plan(names)
            folder.results.mkdir(exist_ok=True)
            grid.run(_executor(options, folder, device, len(specs)), console)
            failures = grid.failures
    for name, message in failures.items():
        print(f"{name} failed: {message}", file=sys.stderr)
    context = ReportContext(
        suite=options.suite,
        planned=tuple(folder.planned_with(names)),
        failed=folder.failures() | failures,
        command=command,
    )
    report = write_report(folder.path, read_results(folder.results), context)
    print(f"report: {report}")
    return 1 if failures else 0


def _executor(options: ReproduceArguments, folder: GridFolder, device: str, runs: int) -> Executor:
    if options.executor == "slurm":
        return SubmititExecutor(folder.path / "slurm", _slurm_options(options.slurm), runs)
    return LocalExecutor(device, options.jobs, runs)


def _slurm_options(pairs: Sequence[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--slurm must be NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
