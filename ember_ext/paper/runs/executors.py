"""The executors of a grid: processes of this machine, or jobs of a scheduler."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from ember_ext.paper.runs.suites import RunSpec
from ember_ext.paper.runs.worker import SubmittedRun, run_in_process
from ember_ext.paper.training.config import ConfigError

JobState = Literal["running", "done", "failed"]


class Job(Protocol):
    """A run that was started."""

    def state(self) -> JobState:
        """The state of the job."""

    def stop(self) -> None:
        """Ask it to end, with a checkpoint where there is time for one."""

    def wait(self) -> None:
        """Until it has ended, where that takes seconds only."""


class Executor(Protocol):
    """Starts runs."""

    jobs: int
    """The number of runs that may be under way at once."""

    def start(self, spec: RunSpec, folder: Path) -> Job:
        """Start or continue a run of the grid in `folder`."""


class _Process:
    def __init__(self, process: Any) -> None:
        self._process = process

    def state(self) -> JobState:
        code = self._process.exitcode
        return "running" if code is None else "failed" if code else "done"

    def stop(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.join()


class LocalExecutor:
    """Each run in a process of this machine.

    Args:
        device: what the runs are configured for; with "cuda" each gets the GPU that has the fewest.
        jobs: runs at once. Default: one per GPU, or per core on a CPU, where single-threaded runs
            side by side get more done than one run with all cores; never more than `runs`. One on
            a device that was named, such as "cuda:1".
        runs: how many runs there are.
    """

    def __init__(self, device: str, jobs: int | None, runs: int) -> None:
        if jobs is not None and jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {jobs}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        gpus = _visible_gpus() if device == "cuda" else []
        self._on_gpu: dict[str, list[Job]] = {gpu: [] for gpu in gpus}
        available = len(gpus) or (cores or 1 if device == "cpu" else 1)
        self.jobs = jobs or max(1, min(available, runs))
        self.threads = max(1, (cores or 1) // self.jobs)

    def start(self, spec: RunSpec, folder: Path) -> Job:
        """See `Executor.start`."""
        # A fresh interpreter: a copy of this one would share its thread pools.
        process = multiprocessing.get_context("spawn").Process(
            target=run_in_process, args=(spec, str(folder), self.threads), name=spec.name
        )
        environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(self.threads)}
        job = _Process(process)
        if self._on_gpu:
            gpu = min(self._on_gpu, key=lambda name: _running(self._on_gpu[name]))
            environment["CUDA_VISIBLE_DEVICES"] = gpu
            self._on_gpu[gpu].append(job)
        with _environment(environment):
            process.start()
        return job


class SubmititExecutor:
    """Each run as a job of Slurm, through submitit; all are queued at once.

    Args:
        folder: for submitit's files; every machine must see it, as it must see the grid's folder.
        options: what `submitit.AutoExecutor.update_parameters` takes, such as
            {"slurm_partition": "gpu", "timeout_min": 240}. "cluster" chooses among submitit's
            executors: "slurm", or "local" for processes of this machine. Default: "slurm".
        runs: how many runs there are.

    Raises:
        ConfigError: submitit is not installed, finds no Slurm, or does not know an option.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], runs: int) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise ConfigError('executor "slurm" needs submitit: pip install ".[cluster]"') from None
        parameters = {"cpus_per_task": 1, "name": "ember-ext", **options}
        cluster = parameters.pop("cluster", "slurm")
        self.jobs = runs
        self.threads = int(parameters["cpus_per_task"])
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, ValueError, AssertionError, TypeError) as error:
            raise ConfigError(f'executor "slurm": {error}') from None

    def start(self, spec: RunSpec, folder: Path) -> Job:
        """See `Executor.start`."""
        return _Submitted(self._executor.submit(SubmittedRun(spec, str(folder), self.threads)))


class _Submitted:
    def __init__(self, job: Any) -> None:
        self._job = job

    def state(self) -> JobState:
        if not self._job.done():
            return "running"
        return "failed" if self._job.exception() else "done"

    def stop(self) -> None:
        self._job.cancel()

    def wait(self) -> None:
        """Do nothing: the scheduler sees to it."""


def _running(jobs: list[Job]) -> int:
    return sum(job.state() == "running" for job in jobs)


def _visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES has for the GPUs of this process."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
