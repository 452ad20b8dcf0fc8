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
    ABOVE_ZERO,
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
from ember_ext.paper.runs.gathering import suite_results, take_over
from ember_ext.paper.runs.grid import Grid, OutOfTime
from ember_ext.paper.runs.results import ResultError, RunResult, read_results
from ember_ext.paper.runs.suites import SUITES, SuiteName, plan
from ember_ext.paper.runs.worker import GridFolder
from ember_ext.paper.training import ConfigError, RunError, StopRequested, resolve_device
from ember_ext.paper.training.config import Backbone

OUT_OF_TIME = 75
"""The exit code where --minutes are over and no run failed: "try again later" of sysexits.h."""


@dataclass(frozen=True)
class ReproduceArguments:
    """Run the paper's conditions over seeds; write its tables, figures and claims with verdicts.

    What is in the folder already is not run again: call it again with the same --out after any
    interruption, or with more seeds.
    """

    suite: SuiteName = "quick"
    """"quick" takes minutes, "xs" is the paper's small scale (hours), "stated" the CfC of the sizes
    that its text states (about an hour a run), "paper" what its authors trained (days on a CPU)."""
    out: Path | None = None
    """The folder. Default: runs/reproduce-SUITE."""
    seeds: tuple[int, ...] = ()
    """Default: 42 for "quick", else 42, 668 and 1337."""
    conditions: tuple[str, ...] = ()
    """Only these, of standard, lif, lif-fixed, lif-refractory, qwen-gate, lif-text (lif with the
    gate of the paper's text), null (standard again, equal up to rounding), lif-temporal and
    lif-persistent (gates that remember across layers) and sigmoid (lif by other operations)."""
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
    minutes: float | None = None
    """Stop after this time, with checkpoints, as on Ctrl-C. The same call goes on later. The exit
    code is 75 then, or 1 if a run failed. Default: until all is done."""
    drop_checkpoints: bool = False
    """Remove the checkpoints of each run once its result is written. The folder then holds only
    what is needed to go on."""
    collect: tuple[Path, ...] = ()
    """Folders of this suite whose finished results are copied here first, without checkpoints."""
    beside: tuple[str, ...] = ()
    """SUITE=FOLDER of other suites that were run, such as quick=runs/reproduce-quick. The report
    sets all sizes side by side."""
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
    command = shlex.join(["python", "scripts/reproduce.py", *_lasting(arguments)])
    try:
        return _reproduce(options, command)
    except (ConfigError, CorpusError, ResultError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _lasting(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that are about one call and change nothing that it leaves."""
    words, skipping = [], False
    for word in arguments:
        if word.startswith("--"):
            skipping = word.partition("=")[0] == "--collect"
        if not skipping and word != "--report-only":
            words.append(word)
    return words


def _check(options: ReproduceArguments) -> None:
    require("--jobs", options.jobs, at_least(1))
    require("--minutes", options.minutes, ABOVE_ZERO)
    _beside(options)
    if options.minutes is not None and options.executor != "local":
        raise ConfigError("--minutes needs --executor local; a job of Slurm has timeout_min")
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
    others = [_other_size(suite, path) for suite, path in _beside(options)]
    failures: dict[str, str] = {}
    stopped: OutOfTime | StopRequested | None = None
    with GridConsole() as console:
        note = console.console.print
        corpus = (
            None
            if options.report_only
            else load_text(data=data, notify=lambda text: note(text, markup=False))
        )
        if corpus is not None:
            specs = [dataclasses.replace(spec, corpus=corpus.sha256) for spec in specs]
        if options.collect:
            new = take_over(options.suite, folder, options.collect, corpus)
            note(f"results taken over: {len(new)}", markup=False)
        grid = Grid(folder, specs, corpus)
        if not options.report_only:
            folder.plan(names)
            folder.results.mkdir(exist_ok=True)
            try:
                grid.run(
                    _executor(options, folder, device, len(specs)),
                    console,
                    seconds=None if options.minutes is None else 60 * options.minutes,
                    drop_checkpoints=options.drop_checkpoints,
                )
            except (OutOfTime, StopRequested) as stop:
                stopped = stop
            failures = grid.failures
    for name, message in failures.items():
        print(f"{name} failed: {message}", file=sys.stderr)
    if stopped is not None:
        print(f"{stopped}; continue with: {command}")
        if isinstance(stopped, StopRequested):
            return stopped.exit_code
        return 1 if failures else OUT_OF_TIME
    context = ReportContext(
        suite=options.suite,
        planned=tuple(folder.planned_with(names)),
        failed=folder.failures() | failures,
        command=command,
    )
    report = write_report(folder.path, read_results(folder.results), context, others)
    print(f"report: {report}")
    return 1 if failures else 0


def _beside(options: ReproduceArguments) -> list[tuple[SuiteName, Path]]:
    """The suites and folders that --beside names."""
    found: dict[SuiteName, Path] = {}
    for word in options.beside:
        suite, equals, path = word.partition("=")
        if suite not in SUITES or not equals or not path:
            raise ConfigError(
                f"--beside must be SUITE=FOLDER with a suite of {list(SUITES)}, got {word!r}"
            )
        if suite == options.suite or suite in found:
            raise ConfigError(f"--beside must name other suites, each once, got {suite!r} again")
        found[suite] = Path(path)
    return list(found.items())


def _other_size(suite: SuiteName, path: Path) -> tuple[ReportContext, list[RunResult]]:
    folder = GridFolder(path)
    names = [spec.name for spec in plan(suite, device="cpu")]
    planned = tuple(folder.planned_with(names))
    return ReportContext(suite=suite, planned=planned), suite_results(suite, folder)


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
