"""Runs: presets, paired random streams, resuming, stopping, and folders that must not be used."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import save_file

from ember_ext.models import Ember, LiquidEmber
from ember_ext.paper.data import Corpus, load_text
from ember_ext.paper.files import STALE_SECONDS, write_atomically
from ember_ext.paper.training import (
    ConfigError,
    NonFiniteLossError,
    RunError,
    RunFolder,
    StopRequested,
    TrainConfig,
    build_model,
    evaluate,
    load_run,
    preset_config,
    resolve_device,
    stream_text,
    train,
)
from ember_ext.paper.training import run_folder as run_folder_module
from ember_ext.paper.training import trainer as trainer_module
from ember_ext.paper.training.cli import sample_main
from ember_ext.paper.training.config import Backbone, Condition, read_config
from ember_ext.paper.training.distributed import join
from ember_ext.paper.training.plot import plot_losses
from ember_ext.paper.training.reporter import SilentReporter

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = TrainConfig(
    backbone="transformer",
    device="cpu",
    n_layer=1,
    n_head=2,
    n_embd=16,
    cfc_units=24,
    dropout=0.1,
    block_size=16,
    batch_size=4,
    steps=12,
    learning_rate=1e-2,
    eval_interval=5,
    eval_iters=2,
    sample_length=20,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread; equal counts make runs comparable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_text("lighthouse")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An undisturbed run of TINY, to compare with."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    train(TINY, corpus, folder)
    return folder


@pytest.fixture(scope="module")
def _one_step(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("one") / "run")
    train(tiny(steps=1), corpus, folder)
    return folder


@pytest.fixture
def trained(_one_step: RunFolder, folder: RunFolder) -> RunFolder:
    """A run of one step, at which a test may do damage."""
    shutil.copytree(_one_step.path, folder.path)
    return folder


def tiny(**fields: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **fields)


def curve(folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in folder.read_metrics()]


class StopAfter(SilentReporter):
    """Sends this process a signal once a step is done."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self._step, self._number = step, number

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        if step == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(("backbone", "condition"), [("transformer", "lif"), ("cfc", "lif")])
def test_run_leaves_everything_behind(
    corpus: Corpus,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    backbone: Any,
    condition: Any,
) -> None:
    monkeypatch.setattr(run_folder_module, "plot_losses", plot_losses)
    config = tiny(backbone=backbone, condition=condition, steps=6)
    summary = train(config, corpus, folder)
    assert summary == json.loads(folder.summary.read_text())
    assert summary["val_loss"] < math.log(len(corpus.vocabulary))
    assert summary["best_val_loss"] <= summary["val_loss"]
    assert summary["corpus"] == "lighthouse"
    assert summary["lif_parameters"] == {"transformer": 6, "cfc": 48}[backbone]
    assert summary["tokens_per_second"] > 0
    assert summary["matmul_precision"] == torch.get_float32_matmul_precision()
    assert summary["seconds"] > 0
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert len(folder.sample.read_text()) == 20
    evaluations = [r for r in folder.read_metrics() if r["event"] == "evaluation"]
    assert [r["step"] for r in evaluations] == [0, 5, 6]
    gates = evaluations[-1]["gates"]
    assert all(gate.keys() == {"threshold", "leak", "steepness"} for gate in gates.values())
    assert len(gates) == 1


def test_last_and_best_weights_are_both_kept(corpus: Corpus, folder: RunFolder) -> None:
    # A learning rate this high spoils the model after the first evaluation.
    summary = train(tiny(learning_rate=3.0, grad_clip=100.0), corpus, folder)
    assert summary["best_step"] < summary["steps"]
    assert summary["best_val_loss"] < summary["val_loss"]
    model, _ = load_run(folder)
    assert evaluate(model, corpus, folder.read_config())["val_loss"] == summary["best_val_loss"]


def test_evaluation_does_not_change_training(corpus: Corpus, tmp_path: Path) -> None:
    curves = []
    for interval in (3, 100):
        folder = RunFolder(tmp_path / str(interval))
        train(tiny(eval_interval=interval), corpus, folder)
        curves.append([r["loss"] for r in folder.read_metrics() if r["event"] == "step"])
    assert curves[0] == curves[1]


@pytest.mark.parametrize("condition", [c for c in get_args(Condition) if c != "standard"])
def test_conditions_are_paired(corpus: Corpus, tmp_path: Path, condition: Any) -> None:
    """With gates that do nothing, another condition's first loss is the standard one's."""
    first = {}
    for name in ("standard", condition):
        folder = RunFolder(tmp_path / name)
        train(tiny(condition=name, steps=1), corpus, folder)
        first[name] = next(r["loss"] for r in folder.read_metrics() if r["event"] == "step")
    # At the start attention is nearly uniform, so no gate can change much.
    assert first[condition] == pytest.approx(first["standard"], rel=1e-3)


def test_different_seeds_differ(corpus: Corpus, tmp_path: Path) -> None:
    losses = [
        train(tiny(steps=1, seed=seed), corpus, RunFolder(tmp_path / str(seed)))["val_loss"]
        for seed in (1, 2)
    ]
    assert losses[0] != losses[1]


def test_full_validation_pass_counts_each_character_once(corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = build_model(TINY, len(corpus.vocabulary)).eval()
    losses = []
    for start in range(0, len(corpus.val) - 1, TINY.block_size):
        window = corpus.val[start : start + TINY.block_size + 1]
        logits = model(window[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="none"))
    expected = torch.cat(losses)
    assert len(expected) == len(corpus.val) - 1
    assert evaluate(model, corpus, TINY)["val_loss"] == pytest.approx(expected.mean().item())
    assert model.training
    first = evaluate(model, corpus, tiny(val_tokens=40))["val_loss"]
    assert first == pytest.approx(expected[:39].mean().item())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [5, 7])
def test_signal_stops_cleanly_and_resuming_is_bit_identical(
    corpus: Corpus, whole: RunFolder, folder: RunFolder, number: signal.Signals, step: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopRequested) as stop:
        train(TINY, corpus, folder, reporter=StopAfter(step, number))
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert len([r for r in folder.read_metrics() if r["event"] == "step"]) == step
    train(TINY, corpus, folder, resume=True)
    assert curve(folder) == curve(whole)
    assert folder.best.read_bytes() == whole.best.read_bytes()
    assert folder.sample.read_text() == whole.sample.read_text()


def test_a_run_of_an_earlier_version_goes_on_bit_identically(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Other names for raw parameters, a refractory mode and a preset of gates; no field `cell`."""
    config = tiny(condition="lif-refractory", refractory_mode="look_ahead", gate_preset="text")
    whole, earlier = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "earlier")
    train(config, corpus, whole)
    with pytest.raises(StopRequested):
        train(config, corpus, earlier, reporter=StopAfter(7, signal.SIGINT))
    for path in (earlier.last, earlier.best):
        with safetensors.safe_open(path, framework="pt") as file:
            names, header = file.keys(), file.metadata()
            tensors = {name.replace(".raw_", "."): file.get_tensor(name) for name in names}
        assert tensors.keys() - names, "nothing was renamed"
        safetensors.torch.save_file(tensors, path, header)
    fields = json.loads(earlier.config.read_text())
    old = {**fields, "refractory_mode": "paper", "gate_preset": "seed"}
    assert old.pop("cell") == "cfc"
    earlier.config.write_text(json.dumps(old))
    assert earlier.read_config() == whole.read_config()
    train(config, corpus, earlier, resume=True)
    assert curve(earlier) == curve(whole)
    assert earlier.best.read_bytes() == whole.best.read_bytes()


def test_resuming_a_finished_run_changes_nothing(corpus: Corpus, trained: RunFolder) -> None:
    summary = json.loads(trained.summary.read_text())
    before = trained.metrics.read_bytes()
    assert train(tiny(steps=1), corpus, trained, resume=True) == summary
    assert trained.metrics.read_bytes() == before


def test_more_steps_continue_a_finished_run(
    corpus: Corpus, whole: RunFolder, folder: RunFolder
) -> None:
    train(tiny(steps=10), corpus, folder)
    train(TINY, corpus, folder, resume=True)
    assert curve(folder) == curve(whole)
    assert folder.read_config() == TINY
    with pytest.raises(ConfigError, match=f"steps must be at least {TINY.steps}, .*, got 10"):
        train(tiny(steps=10), corpus, folder, resume=True)
    assert folder.read_config() == TINY


SCRIPT = """
import sys
from ember_ext.paper.data import load_text
from ember_ext.paper.training import RunFolder, train
from test_training import tiny
config = tiny(steps=30, checkpoint_seconds=0.0)
train(config, load_text("lighthouse"), RunFolder(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


def start_process(folder: Path, mode: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    path = f"{root}:{root / 'python_tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), mode], env=environment, stderr=subprocess.PIPE
    )


def test_killed_at_any_moment_and_resumed_is_bit_identical(corpus: Corpus, tmp_path: Path) -> None:
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    mode = "start"
    for size in (1_500, 4_000):
        process = start_process(killed.path, mode)
        deadline = time.monotonic() + 60
        while not (killed.metrics.exists() and killed.metrics.stat().st_size > size):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
        mode = "resume"
    config = tiny(steps=30, checkpoint_seconds=0.0)
    train(config, corpus, killed, resume=True)
    train(config, corpus, whole)
    assert curve(killed) == curve(whole)
    assert killed.best.read_bytes() == whole.best.read_bytes()


def test_killed_before_the_first_checkpoint(corpus: Corpus, folder: RunFolder) -> None:
    folder.create(TINY, corpus)
    folder.metrics.write_text('{"event": "st')
    train(TINY, corpus, folder, resume=True)
    assert folder.summary.exists()


def test_non_finite_loss_keeps_the_checkpoint(
    corpus: Corpus, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(SilentReporter):
        def step(self, step: int, loss: float, tokens_per_second: float) -> None:
            if step == 7:
                with torch.no_grad():
                    models[0].blocks[0].mlp.c_fc.weight[0, 0] = math.nan

    models: list[Ember] = []

    def keep(config: TrainConfig, vocab_size: int) -> Ember | LiquidEmber:
        model = build_model(config, vocab_size)
        assert isinstance(model, Ember)
        models.append(model)
        return model

    monkeypatch.setattr(trainer_module, "build_model", keep)
    with pytest.raises(
        NonFiniteLossError, match=r"step 7, learning rate 0\.01.*gradient: .*last good checkpoint"
    ):
        train(TINY, corpus, folder, reporter=Poisoned())
    monkeypatch.undo()
    assert math.isfinite(train(TINY, corpus, folder, resume=True)["val_loss"])


def test_full_disk_keeps_the_last_checkpoint(
    corpus: Corpus, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(steps=5), corpus, folder)
    checkpoint = folder.last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(checkpoint) // 2, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*: .* is intact"):
            train(TINY, corpus, folder, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert folder.last.read_bytes() == checkpoint
    assert not list(folder.path.glob(".*.part"))
    train(TINY, corpus, folder, resume=True)


def test_metrics_on_a_full_disk(
    corpus: Corpus, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.create(TINY, corpus)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left"):
        folder.append({"event": "step"})


def test_folder_of_another_configuration(corpus: Corpus, trained: RunFolder) -> None:
    other = tiny(steps=1, seed=9, n_embd=32)
    with pytest.raises(
        RunError, match=r"another configuration: seed is 0 there and 9 here, n_embd"
    ):
        train(other, corpus, trained, resume=True)
    with pytest.raises(RunError, match="corpus is 'lighthouse' there and 'other' here"):
        train(tiny(steps=1), Corpus.of("other", "To be, or not.\n" * 30), trained, resume=True)
    with pytest.raises(RunError, match="holds a run already"):
        train(tiny(steps=1), corpus, trained)


def test_folder_without_a_run(corpus: Corpus, folder: RunFolder) -> None:
    with pytest.raises(RunError, match="holds no run"):
        train(TINY, corpus, folder, resume=True)
    with pytest.raises(RunError, match="holds no run"):
        load_run(folder)
    folder.create(TINY, corpus)
    with pytest.raises(RunError, match="no trained weights yet"):
        load_run(folder)


@pytest.mark.parametrize("name", ["last", "config", "corpus", "metrics"])
def test_damaged_folder(corpus: Corpus, trained: RunFolder, name: str) -> None:
    path: Path = getattr(trained, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=path.name):
        train(tiny(steps=1), corpus, trained, resume=True)


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensors(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        header = dict(file.metadata())
    change(tensors, header)
    save_file(tensors, path, header)


def rename_progress(tensors: dict[str, Any], header: dict[str, str]) -> None:
    progress = json.loads(header["progress"])
    progress["steps"] = progress.pop("step")
    header["progress"] = json.dumps(progress)


def spoil_progress(tensors: dict[str, Any], header: dict[str, str]) -> None:
    header["progress"] = json.dumps({**json.loads(header["progress"]), "step": "many"})


def narrow_weights(tensors: dict[str, Any], header: dict[str, str]) -> None:
    tensors["model.wte.weight"] = tensors["model.wte.weight"].half()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config", lambda c: c.pop("beta2"), "all fields of a run, got one without beta2"),
        ("config", lambda c: c.update(momentum=1), "unknown fields: momentum"),
        ("config", lambda c: c.update(steps="many"), "steps must be an integer, got 'many'"),
        ("corpus", lambda c: c.pop("sha256"), "fields name, sha256, .* got one that lacks sha256"),
        ("corpus", lambda c: c.update(sha256=3), "sha256 must be a text, got 3"),
        ("corpus", lambda c: c.update(sha256="ab"), "64 hexadecimal digits, got 'ab'"),
        ("corpus", lambda c: c.update(characters="ba"), "distinct and in code-point order"),
        ("last", lambda t, h: h.pop("progress"), r"must have progress, got \[\]"),
        (
            "last",
            rename_progress,
            "progress must have .* that lacks step and has the unknown steps",
        ),
        ("last", spoil_progress, "step must be an integer, got 'many'"),
        ("last", lambda t, h: h.update(progress="{"), "expected JSON"),
        ("last", lambda t, h: h.update(progress="[]"), r"progress must be an object, got \[\]"),
        ("last", narrow_weights, r"model.wte.weight must be float32 .*, got float16"),
        (
            "last",
            lambda t, h: t.pop("optimizer.exp_avg.wte.weight"),
            r"optimizer.exp_avg.wte.weight must be float32 \[.*\], got no such tensor",
        ),
        (
            "last",
            lambda t, h: t.update({"optimizer.exp_avg.other": torch.zeros(3)}),
            r"optimizer.exp_avg.other must be no such tensor, got float32 \[3\]",
        ),
    ],
)
def test_a_file_that_lacks_something_is_named(
    corpus: Corpus, trained: RunFolder, name: str, change: Any, message: str
) -> None:
    path: Path = getattr(trained, name)
    (change_tensors if name == "last" else change_json)(path, change)
    before = {file.name: file.read_bytes() for file in trained.path.iterdir()}
    with pytest.raises(RunError, match=rf"{path.name}.*{message}"):
        train(tiny(steps=2), corpus, trained, resume=True)
    assert {file.name: file.read_bytes() for file in trained.path.iterdir()} == before


@pytest.mark.parametrize("name", ["config", "corpus"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, "\xff"])
def test_json_of_a_run_that_is_something_else(
    corpus: Corpus, folder: RunFolder, name: str, content: str
) -> None:
    folder.create(TINY, corpus)
    path: Path = getattr(folder, name)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=path.name):
        train(TINY, corpus, folder, resume=True)
    with pytest.raises(RunError, match=path.name):
        load_run(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7", "line 3 must be an object, got 7"),
        ('{"event": "step"}', "line 3 must have the fields event, step"),
        ('{"event": "pause", "step": 1}', "line 3: event must be 'step' or 'evaluation'"),
        ('{"event": "step", "step": 1}', "line 3 must have the fields loss"),
        ('{"event": "st', "line 3: expected JSON"),
    ],
)
def test_metrics_that_are_damaged(trained: RunFolder, line: str, message: str) -> None:
    lines = trained.metrics.read_text().splitlines()
    trained.metrics.write_text("\n".join([*lines[:2], line]) + "\n")
    with pytest.raises(RunError, match=rf"metrics.jsonl is damaged: {message}"):
        trained.read_metrics()
    trained.metrics.unlink()
    with pytest.raises(RunError, match=r"metrics.jsonl is damaged: it cannot be read"):
        trained.read_metrics()


@pytest.mark.parametrize(
    ("backbone", "condition"),
    [(b, c) for b in get_args(Backbone) for c in get_args(Condition) if b != "cfc" or c == "lif"],
)
def test_every_model_goes_on_from_its_checkpoint(
    corpus: Corpus, folder: RunFolder, backbone: Any, condition: Any
) -> None:
    config = tiny(backbone=backbone, condition=condition, sample_length=0)
    for steps in (0, 1, 2):
        folder_config = dataclasses.replace(config, steps=max(1, steps))
        if steps == 0:
            folder.create(folder_config, corpus)
        train(folder_config, corpus, folder, resume=True)
    assert len([r for r in folder.read_metrics() if r["event"] == "step"]) == 2


def test_what_a_killed_writer_left_is_removed(corpus: Corpus, trained: RunFolder) -> None:
    left = trained.path / ".last.safetensors.0123456789abcdef.part"
    left.write_bytes(b"half a checkpoint")
    train(tiny(steps=2), corpus, trained, resume=True)
    assert not list(trained.path.glob(".*.part"))


def test_writing_removes_only_what_is_old_and_of_the_same_file(tmp_path: Path) -> None:
    def part(name: str, age: float) -> Path:
        path = tmp_path / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    path = tmp_path / "a[1].json"
    old = part(".a[1].json.0123456789abcdef.part", 2 * STALE_SECONDS)
    kept = [
        part(".a[1].json.1123456789abcdef.part", 60),
        part(".a1.json.0123456789abcdef.part", 2 * STALE_SECONDS),
    ]
    write_atomically(path, b"{}")
    assert not old.exists()
    assert all(other.exists() for other in kept)
    assert path.read_bytes() == b"{}"


def test_a_new_name_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file's folder, and in that of each folder that was made for it."""
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), sync(file))[1],
    )
    write_atomically(tmp_path / "a" / "b" / "file", b"content")
    (part, *folders) = synced
    assert part.endswith(".part")
    assert sorted(folders) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


@pytest.mark.parametrize("backbone", ["transformer", "cfc"])
def test_a_run_that_diverges_is_diagnosed(corpus: Corpus, folder: RunFolder, backbone: Any) -> None:
    """Also where it is an operator that notices, since no steepness is left."""
    with pytest.raises(NonFiniteLossError, match=r"learning rate 1e\+09.*last good checkpoint is"):
        train(tiny(backbone=backbone, learning_rate=1e9, checkpoint_seconds=0.0), corpus, folder)
    with safetensors.safe_open(folder.last, framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 0
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("threshold", "leak", "steepness") for value in (math.nan, math.inf)]
    + [("steepness", -1e9)],
)
def test_spoilt_gates_are_diagnosed_and_not_saved(
    corpus: Corpus, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    class Spoiling(SilentReporter):
        def step(self, step: int, loss: float, tokens_per_second: float) -> None:
            if step == 3:
                with torch.no_grad():
                    getattr(next(iter(models[0].gates().values())), f"raw_{name}").fill_(value)

    models: list[Any] = []
    monkeypatch.setattr(
        trainer_module,
        "build_model",
        lambda *arguments: models.append(build_model(*arguments)) or models[0],
    )
    config = tiny(checkpoint_seconds=0.0)
    with pytest.raises(NonFiniteLossError, match=rf"{name}.* after 3 steps"):
        train(config, corpus, folder, reporter=Spoiling())
    monkeypatch.undo()
    assert train(config, corpus, folder, resume=True)["steps"] == config.steps


def test_an_error_of_good_weights_stays_what_it_is(
    corpus: Corpus, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("not of the weights")

    monkeypatch.setattr(trainer_module, "evaluate", broken)
    with pytest.raises(ValueError, match="not of the weights"):
        train(TINY, corpus, folder)


def test_checkpoint_of_another_model(corpus: Corpus, tmp_path: Path) -> None:
    small, large = RunFolder(tmp_path / "small"), RunFolder(tmp_path / "large")
    train(tiny(steps=1), corpus, small)
    train(tiny(steps=1, n_embd=32), corpus, large)
    large.last.replace(small.last)
    with pytest.raises(RunError, match="weights of another model"):
        train(tiny(steps=1), corpus, small, resume=True)


def test_unwritable_folder(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        train(TINY, corpus, RunFolder(tmp_path / "file" / "run"))


def test_text_shorter_than_a_window(corpus: Corpus, folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="block_size 500 needs a validation text"):
        train(tiny(block_size=500), corpus, folder)
    assert not folder.exists()


@pytest.mark.parametrize("backbone", ["transformer", "cfc"])
@pytest.mark.parametrize("preset", ["quick", "xs", "paper"])
def test_presets_build(backbone: Any, preset: Any) -> None:
    model = build_model(preset_config(backbone, preset, "cpu"), 65)
    if preset == "paper":
        # The published sizes, plus the gates.
        expected = {"transformer": 10_745_088 + 108, "cfc": 4_344_884 + 3_072}[backbone]
        assert model.num_parameters() == expected


def test_auto_preset_suits_the_device() -> None:
    assert preset_config("cfc", "auto", "cpu").preset == "quick"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("steps", 0), ("learning_rate", 0.0), ("beta2", 1.0), ("weight_decay", -1.0)),
        *(("val_tokens", 1), ("checkpoint_seconds", -1.0), ("dropout", 1.0), ("n_layer", 10**9)),
        *(
            (size, value)
            for size in ("n_layer", "n_embd", "n_head", "cfc_units", "block_size")
            for value in (0, -3, 2**31)
        ),
    ],
)
def test_config_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        tiny(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", "many", "steps must be an integer, got 'many'"),
        ("steps", 10.5, "steps must be an integer, got 10.5"),
        ("seed", True, "seed must be an integer, got True"),
        ("dropout", None, "dropout must be a finite number, got None"),
        ("learning_rate", math.inf, "learning_rate must be a finite number, got inf"),
        ("bias", "no", "bias must be true or false, got 'no'"),
        ("data", 3, "data must be a text or nothing, got 3"),
        ("lr_schedule", "linear", "lr_schedule must be one of 'constant', 'cosine', got 'linear'"),
    ],
)
def test_config_of_another_type(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny(**{field: value})
    assert tiny(learning_rate=1, data=None).learning_rate == 1


def test_condition_of_the_other_backbone() -> None:
    with pytest.raises(ConfigError, match="condition must be one of 'standard', 'lif'"):
        build_model(tiny(backbone="cfc", condition="qwen-gate"), 65)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "not JSON"), ("[]", "object"), ('{"sede": 1}', "unknown.*sede")],
)
def test_bad_config_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_learning_rate_schedule() -> None:
    config = tiny(steps=110, warmup_steps=10, lr_schedule="cosine", learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert tiny().learning_rate_at(10**6) == TINY.learning_rate


def test_stream_text(trained: RunFolder) -> None:
    model, vocabulary = load_run(trained)
    pieces = list(stream_text(model, vocabulary, prompt="Keeper:\n", length=40, seed=3))
    assert len(pieces) == 40
    again = stream_text(model, vocabulary, prompt="Keeper:\n", length=40, seed=3)
    assert list(again) == pieces
    with pytest.raises(ValueError, match="not in the vocabulary: 'é'"):
        list(stream_text(model, vocabulary, prompt="é"))
    with pytest.raises(ValueError, match="at least one character"):
        list(stream_text(model, vocabulary, prompt=""))


def test_a_text_without_line_breaks(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    one_line = Corpus.of("one line", "the lamp is lit and the sea is calm " * 30)
    train(tiny(steps=1), one_line, folder)
    assert len(folder.sample.read_text()) == 20
    assert sample_main([str(folder.path), "--length", "5", "--device", "cpu"]) == 0
    assert re.fullmatch(r" [a-z ]{5}\n", capsys.readouterr().out)


def test_the_default_device_is_looked_for(corpus: Corpus, folder: RunFolder) -> None:
    assert TrainConfig().device == "auto"
    train(tiny(device="auto", steps=1), corpus, folder)
    assert folder.read_config().device == resolve_device("auto")


def test_processes_load_the_checkpoint_once_the_folder_is_theirs(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had it before may write another while they wait."""
    early, late = RunFolder(tmp_path / "early"), RunFolder(tmp_path / "late")
    train(tiny(steps=2), corpus, early)
    train(tiny(steps=4), corpus, late)

    claim = RunFolder.claim

    @contextmanager
    def claim_late(folder: RunFolder) -> Iterator[None]:
        with claim(folder):
            for name in ("last", "metrics"):
                getattr(early, name).write_bytes(getattr(late, name).read_bytes())
            yield

    monkeypatch.setattr(RunFolder, "claim", claim_late)
    assert train(tiny(steps=6), corpus, early, resume=True)["steps"] == 6
    steps = [r["step"] for r in early.read_metrics() if r["event"] == "step"]
    assert steps == list(range(6))


def test_processes_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on resuming, from a file that names the GPU of one of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    assert [join(device)[1] for device in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert chosen == ["cuda:1", "nccl", "cuda:1", "nccl", "gloo"]
