"""The grid of runs: what is planned, how it is carried out, and that no interruption changes it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
from synthetic_results import synthetic_results

from ember_ext.paper.data import CorpusError, load_text
from ember_ext.paper.reproduce import OUT_OF_TIME, reproduce_main
from ember_ext.paper.runs.executors import Job, JobState, LocalExecutor, SubmititExecutor
from ember_ext.paper.runs.grid import Grid, OutOfTime, RunStatus
from ember_ext.paper.runs.results import (
    ResultError,
    RunResult,
    read_result,
    read_results,
    select,
    write_result,
)
from ember_ext.paper.runs.suites import SUITES, VARIANTS, RunSpec, plan
from ember_ext.paper.runs.worker import GridFolder, SubmittedRun, run_to_result
from ember_ext.paper.training import (
    ConfigError,
    RunError,
    RunFolder,
    StopRequested,
    TrainConfig,
)

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parent.parent
TINY: dict[str, Any] = {
    "device": "cpu", "n_layer": 1, "n_embd": 16, "n_head": 2, "cfc_units": 24, "block_size": 16,
    "batch_size": 4, "eval_interval": 4, "eval_iters": 1, "sample_length": 5,
}  # fmt: skip
WHOLE_RESULT: dict[str, Any] = {
    "variant": "lif", "config": {"backbone": "cfc", "seed": 1}, "corpus": {"name": "plays"},
    "summary": {}, "evaluations": [{"step": 1, "val_loss": 2}],
}  # fmt: skip
TEXT = ROOT / "ember_ext" / "paper" / "data" / "lighthouse.txt"


def tiny(*variants: str, seeds: Sequence[int] = (), **changes: Any) -> list[RunSpec]:
    return plan("quick", seeds, variants, **{**TINY, "data": str(TEXT), **changes})


def test_plan_covers_every_condition_and_pairs_them() -> None:
    for suite in SUITES:
        runs = plan(suite, device="cpu")
        names = [run.name for run in runs]
        assert len(set(names)) == len(names)
        conditions = {("cfc", "standard"), ("cfc", "lif")}
        if suite != "stated":
            gates = ("standard", "lif", "lif-fixed", "lif-refractory", "qwen-gate")
            conditions |= {("transformer", gate) for gate in gates}
        if suite in ("xs", "paper"):
            added = ("lif-temporal", "lif-persistent", "sigmoid")
            conditions |= {("transformer", gate) for gate in added}
        assert {(r.config.backbone, r.config.condition) for r in runs} >= conditions
        for run in runs:
            pair = f"{run.config.backbone}-standard-seed{run.config.seed}"
            standard = vars(next(r for r in runs if r.name == pair).config)
            different = {f for f, value in vars(run.config).items() if value != standard[f]}
            assert different <= VARIANTS[run.variant].keys()


def test_stated_suite_has_the_sizes_of_the_text() -> None:
    configs = [run.config for run in plan("stated", device="cpu")]
    assert {(c.n_layer, c.n_embd, c.cfc_units, c.block_size, c.steps) for c in configs} == {
        (4, 128, 192, 256, 3000)
    }
    assert len(configs) == 9


def test_published_refractory_losses_look_ahead() -> None:
    modes = {s: {r.config.refractory_mode for r in plan(s, device="cpu")
                 if r.variant == "lif-refractory"} for s in SUITES if s != "stated"}  # fmt: skip
    assert modes == {"quick": {"causal"}, "xs": {"causal"}, "paper": {"look_ahead"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": ["liff"]}, "variant must be one of .*'lif-text'.*, got 'liff'"),
        (
            {"variants": ["qwen-gate"], "backbones": ["cfc"]},
            r"has no variant 'qwen-gate' for \['cfc'\]",
        ),
        # Others of the choice have runs.
        (
            {"variants": ["lif", "qwen-gate"], "backbones": ["cfc"]},
            r"has no variant 'qwen-gate' for \['cfc'\]: it has .*cfc: \['standard', 'lif'",
        ),
        ({"variants": ["lif", "lif-text"]}, "has no variant 'lif-text' for .*transformer.*cfc"),
        (
            {"variants": ["qwen-gate"], "backbones": ["transformer", "cfc"]},
            r"has no variant of \['qwen-gate'\] for 'cfc'",
        ),
        (
            {"suite": "stated", "backbones": ["transformer", "cfc"]},
            "'stated' has no variant for 'transformer'",
        ),
    ],
)
def test_plan_names_what_it_does_not_know(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**{"suite": "quick", "device": "cpu", **arguments})


def test_plan_leaves_out_what_another_backbone_has() -> None:
    runs = plan("quick", variants=["qwen-gate", "lif"], device="cpu")
    assert [(run.config.backbone, run.variant) for run in runs] == [
        ("transformer", "lif"), ("transformer", "qwen-gate"), ("cfc", "lif"),
    ]  # fmt: skip


def test_results_survive_their_file(tmp_path: Path) -> None:
    def result(variant: str, seed: int) -> RunResult:
        evaluations = [{"step": s, "val_loss": 2 / 3 / (s + 1), "gates": {}} for s in (0, 5)]
        config = {"backbone": "cfc", "seed": seed}
        return RunResult(variant, config, {"name": "plays"}, {"parameters": 3}, evaluations)

    for variant, seed in (("lif", 9), ("lif", 1), ("null", 1)):
        write_result(tmp_path / f"{variant}{seed}.json", result(variant, seed))
    results = read_results(tmp_path)
    assert [(r.variant, r.seed) for r in results] == [("lif", 1), ("lif", 9), ("null", 1)]
    assert list(select(results, "cfc", "lif")) == [1, 9]
    assert select(results, "transformer", "lif") == {}
    again = read_result(tmp_path / "lif9.json")
    assert (again.best(), again.final()) == (pytest.approx(1 / 9), pytest.approx(1 / 9))
    assert again.curve() == ([0, 5], [0.6666667, 0.1111111])
    write_result(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "lif9.json").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"variant": "lif"}'),
        *(
            json.dumps({**WHOLE_RESULT, **change})
            for change in (
                {"config": []},
                {"config": {"backbone": "cfc"}},
                {"config": {"backbone": "cfc", "seed": "1"}},
                {"corpus": {}},
                {"evaluations": []},
                {"evaluations": [{"step": 1}]},
                {"evaluations": [3]},
                {"version": 2},
            )
        ),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cfc-lif-seed1.json"
    path.write_text(content)
    with pytest.raises(ResultError, match=r"cfc-lif-seed1\.json is not the result of a run"):
        read_results(tmp_path)
    with pytest.raises(ResultError, match="is not a folder"):
        read_results(tmp_path / "nowhere")


def test_a_result_of_an_earlier_version_has_the_names_of_today(tmp_path: Path) -> None:
    old = {"backbone": "transformer", "seed": 1, "gate_preset": "seed", "refractory_mode": "paper"}
    content = {**WHOLE_RESULT, "variant": "lif-seed", "config": old}
    (tmp_path / "old.json").write_text(json.dumps(content))
    (result,) = read_results(tmp_path)
    assert result.name == "transformer-lif-text-seed1"
    assert result.config == {**old, "gate_preset": "text", "refractory_mode": "look_ahead"}


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures, which take seconds and are looked at elsewhere."""
    monkeypatch.setattr("ember_ext.paper.report.report.draw_figures", lambda finished: [])


class HereAndNow:
    """Carries out each run as it is started, in this process."""

    jobs = 2

    def __init__(self, act: Callable[[RunSpec, Path], None]) -> None:
        self.act = act
        self.started: list[str] = []

    def start(self, spec: RunSpec, folder: Path) -> Job:
        self.started.append(spec.name)
        try:
            self.act(spec, folder)
        except Exception:
            return Finished("failed")
        return Finished("done")


@dataclasses.dataclass
class Finished:
    outcome: JobState

    def state(self) -> JobState:
        return self.outcome

    def stop(self) -> None:
        raise AssertionError("nothing is under way")

    def wait(self) -> None:
        raise AssertionError("nothing is under way")


class Watcher:
    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def update(self, statuses: Sequence[RunStatus]) -> None:
        self.seen.append([status.state for status in statuses])


def train_here(spec: RunSpec, folder: Path) -> None:
    run_to_result(spec, str(folder), threads=1)


def test_a_failing_run_is_reported_and_tried_again(tmp_path: Path) -> None:
    corpus = load_text(data=str(TEXT))
    specs = tiny("standard", "lif", backbones=["cfc"], steps=4)
    specs[0] = dataclasses.replace(
        specs[0], config=dataclasses.replace(specs[0].config, learning_rate=1e30)
    )
    folder = GridFolder(tmp_path)
    grid, watcher = Grid(folder, specs, corpus), Watcher()
    grid.run(HereAndNow(train_here), watcher)
    assert watcher.seen[-1] == ["failed", "done"]
    assert "non-finite" in grid.failures["cfc-standard-seed42"]
    assert [r.name for r in read_results(folder.results)] == ["cfc-lif-seed42"]
    assert "/" not in json.dumps(read_result(folder.result("cfc-lif-seed42")).config)

    again, executor = Grid(folder, specs, corpus), HereAndNow(train_here)
    again.run(executor, watcher)
    assert executor.started == ["cfc-standard-seed42"]


def test_a_run_that_dies_silently_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ember_ext.paper.runs.grid.RESULT_SECONDS", 0)
    grid = Grid(GridFolder(tmp_path), tiny("lif", steps=4), load_text(data=str(TEXT)))
    grid.run(HereAndNow(lambda spec, folder: None), Watcher())
    assert "ended without a result; see" in grid.failures["transformer-lif-seed42"]


def test_a_result_may_arrive_after_the_scheduler_s_word(tmp_path: Path) -> None:
    folder = GridFolder(tmp_path)
    grid = Grid(folder, tiny("lif", backbones=["cfc"], steps=4), load_text(data=str(TEXT)))

    class Late(Watcher):
        def update(self, statuses: Sequence[RunStatus]) -> None:
            super().update(statuses)
            if len(self.seen) == 1:
                train_here(statuses[0].spec, tmp_path)

    watcher = Late()
    grid.run(HereAndNow(lambda spec, folder: None), watcher)
    assert watcher.seen == [["running"], ["done"]]


def test_a_run_on_another_text_than_the_grid_s_fails_at_once(tmp_path: Path) -> None:
    (spec,) = tiny("lif", backbones=["cfc"], steps=4)
    folder = GridFolder(tmp_path)
    with pytest.raises(CorpusError, match=r"the text lighthouse.*not that of the grid"):
        train_here(dataclasses.replace(spec, corpus="0" * 64), tmp_path)
    assert "--data" in folder.error(spec.name).read_text()
    assert not folder.run(spec.name).exists()
    text = load_text(data=str(TEXT))
    train_here(dataclasses.replace(spec, corpus=text.sha256), tmp_path)
    assert folder.result(spec.name).exists()


def test_what_a_grid_does_not_understand_does_not_end_it(tmp_path: Path) -> None:
    """Of a file that another process may be writing, or that is of another version."""
    folder = GridFolder(tmp_path)
    (spec,) = tiny("lif", backbones=["cfc"], steps=4)

    def leave_odd_files(spec: RunSpec, path: Path) -> None:
        folder.run(spec.name).path.mkdir(parents=True)
        folder.run(spec.name).metrics.write_text('12\n{"loss": 1}\n"event"\n')
        folder.error(spec.name).write_bytes(b"caf\xe9")
        raise RunError

    grid = Grid(folder, [spec], load_text(data=str(TEXT)))
    grid.run(HereAndNow(leave_odd_files), Watcher())
    assert grid.failures == {spec.name: "caf\ufffd"}
    result = {**WHOLE_RESULT, "config": {**WHOLE_RESULT["config"], "momentum": 1}}
    folder.results.mkdir()
    folder.result(spec.name).write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"result of a run of this version, got .*momentum"):
        Grid(folder, [spec], None)


def test_results_of_another_configuration_are_refused(tmp_path: Path) -> None:
    corpus = load_text(data=str(TEXT))
    Grid(GridFolder(tmp_path), tiny("lif", backbones=["cfc"], steps=4), corpus).run(
        HereAndNow(train_here), Watcher()
    )
    longer = tiny("lif", backbones=["cfc"], steps=4, batch_size=3)
    with pytest.raises(ConfigError, match=r"batch_size was 4 and is 3.*--out"):
        Grid(GridFolder(tmp_path), longer, corpus)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text() + "more")
    with pytest.raises(ConfigError, match=r"corpus was 'lighthouse.*' and is 'other"):
        Grid(GridFolder(tmp_path), tiny("lif", steps=4), load_text(data=str(other)))


GRID_SCRIPT = """
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from test_reproduction import HELD_AT, TEXT, Watcher, tiny
from ember_ext.paper.data import load_text
from ember_ext.paper.runs import grid as module
from ember_ext.paper.runs.executors import LocalExecutor
from ember_ext.paper.runs.worker import GridFolder
from ember_ext.paper.training.trainer import _Training

folder, how = GridFolder(Path(sys.argv[1])), sys.argv[2]
specs = tiny("lif", steps=40)
update = _Training._update

def marker(name):
    return folder.path / f"{name} before the {how}"

def held_update(self):
    if self.progress.step == HELD_AT:
        marker(self.folder.path.name).touch()
        while not self.signals.received:
            time.sleep(0.01)
    update(self)

def all_held():
    return all(marker(spec.name).exists() for spec in specs)

class Killer(Watcher):
    def update(self, statuses):
        if all_held():
            for child in multiprocessing.active_children():
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)

# The runs' processes read this file, too.
if how in ("power cut", "time limit"):
    _Training._update = held_update

if __name__ == "__main__":
    grid = module.Grid(folder, specs, load_text(data=str(TEXT)))
    watcher, options = Watcher(), {}
    if how == "power cut":
        watcher = Killer()
    elif how == "time limit":
        clock = SimpleNamespace(monotonic=lambda: 60.0 * all_held(), sleep=time.sleep)
        module.time, options["seconds"] = clock, 60
    elif how == "to the end":
        options["drop_checkpoints"] = True
    try:
        grid.run(LocalExecutor("cpu", 2, len(specs)), watcher, **options)
    except module.OutOfTime as stop:
        sys.exit(f"{stop}")
    assert not grid.failures, grid.failures
"""

HELD_AT = 30
"""The step before which the runs of that script wait to be cut off."""


def checkpoint_step(folder: RunFolder) -> int:
    with safetensors.safe_open(folder.last, "pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


def numbers(folder: Path) -> dict[str, Any]:
    """What results say, without times."""
    results = {}
    for r in read_results(folder / "results"):
        for record in r.evaluations:
            del record["seconds"]
        summary = {k: v for k, v in r.summary.items() if k not in ("seconds", "tokens_per_second")}
        results[r.name] = (r.config, r.corpus, summary, r.evaluations)
    return results


@pytest.mark.slow
def test_no_way_of_cutting_a_grid_off_changes_anything(tmp_path: Path) -> None:
    script = tmp_path / "grid.py"
    script.write_text(GRID_SCRIPT)
    path = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))

    def start(how: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(disturbed.path), how],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )

    undisturbed, disturbed = (
        GridFolder(tmp_path / "undisturbed"),
        GridFolder(tmp_path / "disturbed"),
    )
    specs = tiny("lif", steps=40)
    grid = Grid(undisturbed, specs, load_text(data=str(TEXT)))
    grid.run(HereAndNow(train_here), Watcher())

    # All processes die at once, as in a machine that is taken away.
    cut = start("power cut")
    assert cut.wait() == -signal.SIGKILL, cut.stderr and cut.stderr.read()
    steps = [checkpoint_step(disturbed.run(spec.name)) for spec in specs]
    assert steps == [HELD_AT - HELD_AT % TINY["eval_interval"]] * 2
    late = start("time limit")
    late.wait()
    assert late.stderr is not None
    assert late.stderr.read().endswith("stopped after 1 min 0 s\n")
    assert [checkpoint_step(disturbed.run(spec.name)) for spec in specs] == [HELD_AT + 1] * 2
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start("disturbed")
        # Some way into a run, wherever that is.
        before = sum(p.stat().st_size for p in disturbed.path.glob("runs/*/metrics.jsonl"))
        while process.poll() is None:
            size = sum(p.stat().st_size for p in disturbed.path.glob("runs/*/metrics.jsonl"))
            if size > before:
                break
            time.sleep(0.01)
        time.sleep(random.random() / 4)
        process.send_signal(number)
        process.wait()
    last = start("to the end")
    assert last.wait() == 0, last.stderr and last.stderr.read()
    assert numbers(disturbed.path) == numbers(undisturbed.path)
    assert len(numbers(disturbed.path)) == 2
    assert not list(disturbed.path.glob("runs/*/*.safetensors"))
    assert all(disturbed.run(spec.name).summary.exists() for spec in specs)


def test_a_grid_stops_when_its_time_is_over(tmp_path: Path) -> None:
    """Before a run is started, or while one is under way, which is stopped like on a signal."""
    folder, corpus = GridFolder(tmp_path), load_text(data=str(TEXT))
    specs = tiny("lif", "standard", backbones=["cfc"], steps=4)

    class Endless:
        jobs = 1
        stopped = 0

        def start(self, spec: RunSpec, path: Path) -> Job:
            return self

        def state(self) -> JobState:
            return "running"

        def stop(self) -> None:
            self.stopped += 1

        def wait(self) -> None:
            assert self.stopped == 1

    executor = Endless()
    grid = Grid(folder, specs, corpus)
    with pytest.raises(OutOfTime, match="stopped after 0 min 0 s"):
        grid.run(executor, Watcher(), seconds=1e-9)
    assert executor.stopped == 0
    with pytest.raises(OutOfTime):
        grid.run(executor, Watcher(), seconds=0.01)
    assert executor.stopped == 1
    # Time that suffices is no limit.
    Grid(folder, specs, corpus).run(HereAndNow(train_here), Watcher(), seconds=1e9)
    assert len(read_results(folder.results)) == 2


def test_checkpoints_go_only_once_there_is_a_result(tmp_path: Path) -> None:
    folder, corpus = GridFolder(tmp_path), load_text(data=str(TEXT))
    bad, good = tiny("standard", "lif", backbones=["cfc"], steps=8)
    bad = dataclasses.replace(bad, config=dataclasses.replace(bad.config, learning_rate=1e30))
    Grid(folder, [bad, good], corpus).run(HereAndNow(train_here), Watcher(), drop_checkpoints=True)
    assert not folder.run(good.name).last.exists()
    assert not folder.run(good.name).best.exists()
    assert folder.run(good.name).metrics.exists()
    assert folder.run(bad.name).last.exists()
    # Those of runs that were finished before go, too.
    (other,) = tiny("lif", seeds=[7], backbones=["cfc"], steps=4)
    Grid(folder, [other], corpus).run(HereAndNow(train_here), Watcher())
    assert folder.run(other.name).last.exists()
    Grid(folder, [other], corpus).run(HereAndNow(train_here), Watcher(), drop_checkpoints=True)
    assert not folder.run(other.name).last.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be finite and above 0, got 0.0"),
        (["--minutes", "nan"], "--minutes must be finite and above 0, got nan"),
        (["--minutes", "5", "--executor", "slurm"], "--minutes needs --executor local"),
    ],
)
def test_limits_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce_main(arguments) == 1
    assert message in capsys.readouterr().err


def test_out_of_time_has_an_exit_code_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--minutes", "1e-9", "--jobs", "1", "--data", str(TEXT), "--out", str(tmp_path)]
    assert reproduce_main(arguments) == OUT_OF_TIME == 75
    said = capsys.readouterr().out
    assert f"continue with: python scripts/reproduce.py {shlex.join(arguments)}" in said
    assert json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize(
    ("stop", "code"),
    [(OutOfTime(60), 1), (StopRequested(signal.SIGTERM), 143), (StopRequested(signal.SIGINT), 130)],
)
def test_a_failure_is_told_however_a_call_ends(
    stop: Exception,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run fails, and the call is stopped before the next one."""

    def run(self: Grid, *_: Any, **__: Any) -> None:
        self.statuses[0].state, self.statuses[0].message = "failed", "the disk is full"
        raise stop

    monkeypatch.setattr(Grid, "run", run)
    arguments = ["--data", str(TEXT), "--out", str(tmp_path), "--minutes", "1"]
    assert reproduce_main(arguments) == code
    said = capsys.readouterr()
    assert "transformer-standard-seed42 failed: the disk is full\n" in said.err
    assert f"{stop}; continue with: python scripts/reproduce.py --data" in said.out


def test_jobs_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert LocalExecutor("cpu", None, 100).jobs == cores
    assert LocalExecutor("cpu", None, 1).threads == cores
    assert LocalExecutor("cpu", 3 * cores, 100).threads == 1
    assert LocalExecutor("cuda:1", None, 100).jobs == 1
    with pytest.raises(ConfigError, match="jobs must be at least 1, got 0"):
        LocalExecutor("cpu", 0, 1)


class FakeProcess:
    """A process that ends when told to."""

    def __init__(self) -> None:
        self.exitcode: int | None = None
        self.gpu = ""

    def start(self) -> None:
        self.gpu = os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_run_gets_the_gpu_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processes: list[FakeProcess] = []

    def create(**arguments: Any) -> FakeProcess:
        processes.append(FakeProcess())
        return processes[-1]

    context = SimpleNamespace(Process=create)
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    executor = LocalExecutor("cuda", None, 100)
    assert executor.jobs == 2
    spec = tiny("lif")[0]
    for ended in (None, None, 1, 2, 0):
        if ended is not None:
            processes[ended].exitcode = 0
        executor.start(spec, tmp_path)
    assert [process.gpu for process in processes] == ["4", "7", "7", "7", "4"]


def test_a_scheduler_s_runs_look_for_their_device_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine that submits may have no GPU."""
    seen: list[RunSpec] = []

    def executor(*arguments: Any) -> HereAndNow:
        return HereAndNow(lambda spec, folder: seen.append(spec))

    monkeypatch.setattr("ember_ext.paper.reproduce.SubmititExecutor", executor)
    monkeypatch.setattr("ember_ext.paper.reproduce.write_report", lambda *arguments: None)
    monkeypatch.setattr("ember_ext.paper.runs.grid.RESULT_SECONDS", 0)
    arguments = ["--conditions", "lif", "--executor", "slurm", "--data", str(TEXT)]
    for device in ("cuda", "auto"):
        out = str(tmp_path / device)
        assert reproduce_main([*arguments, "--device", device, "--out", out]) == 1
    assert [spec.config.device for spec in seen] == ["cuda", "cuda", "auto", "auto"]
    assert {spec.corpus for spec in seen} == {load_text(data=str(TEXT)).sha256}


def test_null_differs_from_standard_by_rounding_only(tmp_path: Path) -> None:
    folder = GridFolder(tmp_path)
    specs = tiny("standard", "null", backbones=["transformer"], steps=4)
    Grid(folder, specs, load_text(data=str(TEXT))).run(HereAndNow(train_here), Watcher())
    null, standard = read_results(folder.results)
    assert null.final() == pytest.approx(standard.final(), rel=1e-5)
    assert TrainConfig(**null.config).init_noise > 0
    assert null.evaluations != standard.evaluations


def test_jobs_of_a_scheduler(tmp_path: Path) -> None:
    """submitit's executor for this machine takes the way of a job on Slurm, but for the queue."""
    good, bad = tiny("lif", "standard", backbones=["cfc"], steps=4)[::-1]
    bad = dataclasses.replace(bad, config=dataclasses.replace(bad.config, learning_rate=1e30))
    folder = GridFolder(tmp_path / "grid")
    grid = Grid(folder, [good, bad], load_text(data=str(TEXT)))
    executor = SubmititExecutor(tmp_path / "slurm", {"cluster": "local", "timeout_min": 5}, 2)
    grid.run(executor, Watcher())
    assert "non-finite" in grid.failures["cfc-standard-seed42"]
    assert [result.variant for result in read_results(folder.results)] == ["lif"]


def test_a_job_out_of_time_is_queued_again() -> None:
    spec = tiny("lif")[0]
    rest = SubmittedRun(spec, "grid", 2).checkpoint().function
    assert isinstance(rest, SubmittedRun)
    assert rest.arguments == (spec, "grid", 2)


def test_scheduler_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'executor "slurm": .*no_such_option'):
        SubmititExecutor(tmp_path, {"cluster": "local", "no_such_option": 1}, 1)
    with pytest.raises(ConfigError, match=r'executor "slurm": .*nowhere'):
        SubmititExecutor(tmp_path, {"cluster": "nowhere"}, 1)


@pytest.mark.usefixtures("no_figures")
def test_a_report_counts_what_earlier_calls_planned(tmp_path: Path) -> None:
    folder = GridFolder(tmp_path)
    for result in synthetic_results(seeds=[42], variants=("standard", "lif")):
        write_result(folder.result(result.name), result)
    failed = "transformer-null-seed7"
    folder.plan(["transformer-lif-seed7", failed])
    folder.plan(["transformer-lif-seed42", "transformer-lif-seed7"])
    folder.error(failed).parent.mkdir(parents=True)
    folder.error(failed).write_text("the disk is full\n")
    assert folder.failures() == {failed: "the disk is full"}

    arguments = ["--suite", "xs", "--seeds", "42", "--conditions", "qwen-gate"]
    assert reproduce_main([*arguments, "--report-only", "--out", str(tmp_path)]) == 0
    planned = ["transformer-lif-seed7", failed, "transformer-lif-seed42"]
    assert folder.planned == planned
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["planned"] == [*planned, "transformer-qwen-gate-seed42"]
    assert "the disk is full" in (tmp_path / "report.md").read_text()

    for damaged in ("{", '{"lif": 1}', "[1]", "3"):
        (tmp_path / "plan.json").write_text(damaged)
        with pytest.raises(RunError, match=r"plan\.json is not a list of the names of runs: "):
            folder.planned  # noqa: B018


def test_a_report_of_another_suite_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = synthetic_results(seeds=[42], variants=("standard",))
    write_result(GridFolder(tmp_path).result(result.name), result)
    arguments = ["--suite", "paper", "--report-only", "--out", str(tmp_path)]
    assert reproduce_main(arguments) == 1
    assert "is of another configuration (n_layer was 2 and is 6" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_grid_whose_runs_all_fail_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short to train on, " * 9)
    out = tmp_path / "grid"
    arguments = ["--conditions", "standard", "--backbones", "cfc", "--data", str(text)]
    assert reproduce_main([*arguments, "--out", str(out)]) == 1
    assert "cfc-standard-seed42 failed: block_size 64 needs" in capsys.readouterr().err
    assert "block\\_size 64 needs" in (out / "report.md").read_text()


def test_a_report_on_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce_main(["--report-only", "--out", str(tmp_path / "nowhere")]) == 1
    assert "nowhere/results is not a folder of results" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
