"""Classification of sequences: data, models, training that resumes, the study and its command."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ember_ext.paper.data.cache import sha256
from ember_ext.paper.data.packages import Package
from ember_ext.paper.sequences import (
    ClassifierConfig,
    SequenceClassifier,
    SeriesSet,
    Task,
    TaskError,
    TrainingConfig,
    TsError,
    cli,
    folder_task,
    read_ts,
    train_classifier,
    vowels,
    vowels_task,
    xor_task,
)
from ember_ext.paper.sequences import training as training_module
from ember_ext.paper.sequences.batches import FEWEST, Sampler
from ember_ext.paper.sequences.cli import ClassifyArguments, classify_main
from ember_ext.paper.sequences.models import CONTINUOUS
from ember_ext.paper.sequences.series import Scaling
from ember_ext.paper.sequences.training import evaluate, split
from ember_ext.paper.sequences.xor import xor_series
from ember_ext.paper.training import NonFiniteLossError, RunError

CELLS: tuple[Any, ...] = ("cfc", "cfc-mixed", "ltc", "gru", "lstm")

HEADER = """# a comment
@problemName Pumps
@timeStamps {stamps}
@missing true
@univariate false
@dimensions {channels}
@equalLength false
@classLabel true good bad
@data
"""


def ts(body: str, *, stamps: str = "false", channels: int = 2) -> str:
    return HEADER.format(stamps=stamps, channels=channels) + body


def noisy_series(rows: int, seed: int) -> str:
    """Lines of series of two channels; the class is the sign of the first channel's mean."""
    generator = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        label = ("good", "bad")[row % 2]
        length = int(generator.integers(2, 7))
        values = generator.normal(0.8 if label == "good" else -0.8, 0.5, (2, length))
        lines.append(":".join(",".join(f"{v:.3f}" for v in channel) for channel in values))
        lines[-1] += f":{label}\n"
    return "".join(lines)


@pytest.fixture
def pumps(tmp_path: Path) -> Path:
    """A folder with a small problem of one's own."""
    folder = tmp_path / "pumps"
    folder.mkdir()
    (folder / "Pumps_TRAIN.ts").write_text(ts(noisy_series(24, 0)))
    (folder / "Pumps_TEST.ts").write_text(ts(noisy_series(12, 1)))
    return folder


@pytest.fixture
def small() -> Task:
    return xor_task(rows=60)


def test_ts_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ts"
    path.write_text(ts("1.5,2.5,?:-1,2e1,3:good\n\n# a remark\n4:NaN:bad\n"))
    file = read_ts(path)
    assert (file.name, file.labels, file.classes) == ("Pumps", ["good", "bad"], ("good", "bad"))
    assert file.times is None
    expected = torch.tensor([[1.5, -1], [2.5, 20], [torch.nan, 3]])
    torch.testing.assert_close(file.values[0], expected, equal_nan=True)
    torch.testing.assert_close(file.values[1], torch.tensor([[4, torch.nan]]), equal_nan=True)


def test_ts_file_with_time_stamps(tmp_path: Path) -> None:
    path = tmp_path / "x.ts"
    path.write_text(ts("(0,1),(0.5,2) , (3,?):(0,5),(0.5,6),(3,7):bad\n", stamps="true"))
    file = read_ts(path)
    assert file.times is not None
    assert file.times[0].tolist() == [0, 0.5, 3]
    expected = torch.tensor([[1, 5], [2, 6], [torch.nan, 7]])
    torch.testing.assert_close(file.values[0], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ts("1:2:ugly\n"), "line 10: expected the class must be|class"),
        (ts("1:good\n"), "line 10: expected 2 channels before the class, got 1"),
        (ts("1,2:3:good\n"), r"equally many values in all channels of a series, got \[1, 2\]"),
        (ts("1,b:3,4:good\n"), "a number, or . where one is missing, got 'b'"),
        (ts("1,,2:3,4,5:good\n"), "a number, or . where one is missing, got ''"),
        (ts("inf:3:good\n"), "a finite number, got inf"),
        (ts(""), "one series or more after @data, got none"),
        ("@classLabel false\n@data\n1:good\n", "'@classLabel true' with the classes"),
        ("@classLabel true good\n1:2:good\n", "a header line or @data, got '1:2:good'"),
        ("@classLabel true good\n", "a line @data, got the end of the file"),
        ("@timeStamps maybe\n", "@timestamps true or @timestamps false, got 'maybe'"),
        ("@dimensions many\n", "a number from 1 on, got 'many'"),
        (ts("(0,1),2:(0,1),(1,2):bad\n", stamps="true"), r"pairs \(time,value\)"),
        (ts("(0,1):(1,1):bad\n", stamps="true"), "equal time stamps in all channels"),
        (ts("(1,1),(0,1):(1,1),(0,2):bad\n", stamps="true"), "time stamps that rise"),
    ],
)
def test_ts_files_that_break_the_rules(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.ts"
    path.write_text(content)
    with pytest.raises(TsError, match=message) as error:
        read_ts(path)
    assert "x.ts, line " in str(error.value)


def test_ts_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TsError, match=r"cannot read .*nowhere.ts: No such file"):
        read_ts(tmp_path / "nowhere.ts")
    (tmp_path / "x.ts").write_bytes(b"\xff\xfe@data")
    with pytest.raises(TsError, match="is not UTF-8 text"):
        read_ts(tmp_path / "x.ts")


def series_of(lengths: list[int], channels: int = 1) -> SeriesSet:
    values = [torch.arange(1.0, n + 1)[:, None].expand(-1, channels) for n in lengths]
    return SeriesSet.of(values, [i % 2 for i in range(len(lengths))])


def test_dropped_steps_keep_the_times_of_those_that_stay() -> None:
    whole = series_of([9, 2, 1, 20])
    part = whole.drop_steps(0.5, seed=3)
    assert part.lengths.tolist() == [5, 1, 1, 10]
    for x, spans, length in zip(part.x, part.timespans, part.lengths.tolist(), strict=True):
        # Every value is its own time, so the sum of spans must be it.
        torch.testing.assert_close(spans[:length].cumsum(0), x[:length, 0])
        assert (x[length:] == 0).all()
        assert (spans[length:] == 1).all()
    again, other = whole.drop_steps(0.5, seed=3), whole.drop_steps(0.5, seed=4)
    assert torch.equal(part.x, again.x)
    assert not torch.equal(part.x, other.x)
    none = whole.drop_steps(0.0, seed=3)
    assert torch.equal(none.x, whole.x)
    assert torch.equal(none.timespans, whole.timespans)
    assert whole.drop_steps(0.999, 0).lengths.tolist() == [1, 1, 1, 1]
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="below 1, got"):
            whole.drop_steps(wrong, 0)


def test_dropping_hits_every_step_alike() -> None:
    kept = torch.zeros(6)
    for seed in range(300):
        part = series_of([6]).drop_steps(0.5, seed)
        kept[part.x[0, :, 0].long() - 1] += 1
    assert kept.sum() == 900
    assert (kept - 150).abs().max() < 45  # five standard deviations


def test_scaling_is_that_of_the_training_set() -> None:
    train = SeriesSet.of([torch.tensor([[0.0, 5], [2, 5]]), torch.tensor([[4.0, 5]])], [0, 1])
    scaling = Scaling.of(train)
    assert scaling.mean.tolist() == [2, 5]
    assert not scaling.mask
    scaled = scaling.apply(train)
    assert scaled.x[:, :, 1].abs().max() == 0
    assert scaled.x[1, 1].tolist() == [0, 0]  # padding stays 0
    steps = torch.cat([scaled.x[0, :, 0], scaled.x[1, :1, 0]])
    torch.testing.assert_close(steps.std(correction=0), torch.tensor(1.0))


def test_missing_values_become_the_mean_and_a_mask() -> None:
    nan = torch.nan
    train = SeriesSet.of([torch.tensor([[1.0, nan], [3, 2]]), torch.tensor([[nan, 4]])], [0, 1])
    scaling = Scaling.of(train)
    assert (scaling.mask, scaling.channels) == (True, 4)
    x = scaling.apply(train).x
    assert x[0].tolist() == [[-1, 0, 1, 0], [1, -1, 1, 1]]
    assert x[1].tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]


def bits_of(series: SeriesSet, row: int, unit: float) -> list[int]:
    """The stream that events stand for, by their definition: a bit holds until the next event."""
    bits: list[int] = []
    for t in range(int(series.lengths[row])):
        span = round(float(series.timespans[row, t]) * unit)
        bits += [bits[-1] if bits else 0] * (span - 1) + [int(series.x[row, t, 0])]
    return bits


@pytest.mark.parametrize("unit", [1.0, 32.0])
def test_events_stand_for_the_streams_of_the_dense_encoding(unit: float) -> None:
    dense, event = (xor_series(300, 7, e, unit) for e in ("dense", "event"))  # type: ignore[arg-type]
    assert torch.equal(dense.labels, event.labels)
    assert {*dense.lengths.tolist()} == set(range(2, 32))
    for row in range(300):
        bits = bits_of(dense, row, unit)
        assert bits == bits_of(event, row, unit)
        assert sum(bits) % 2 == int(dense.labels[row])
        steps = event.x[row, : int(event.lengths[row]), 0]
        # Two events are alike only at the end of the stream.
        assert (steps.diff()[:-1] != 0).all()
    assert float(dense.labels.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert event.lengths.float().mean() < 0.65 * dense.lengths.float().mean()


def test_sets_of_xor_are_reproducible_and_distinct() -> None:
    task, again = xor_task(rows=50), xor_task(rows=50)
    assert torch.equal(task.train.x, again.train.x)
    assert len(task.test) == 5
    assert not torch.equal(xor_series(50, 1).x, xor_series(50, 2).x[:, : task.train.x.shape[1]])
    with pytest.raises(TaskError, match="--rows must be at least 10, got 9"):
        xor_task(rows=9)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_has_no_influence_and_time_spans_have(cell: Any, pooling: Any, gate: bool) -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(3, 4, cell, units=6, layers=2, gate=gate, pooling=pooling)
    model = SequenceClassifier(config)
    x, spans, lengths = torch.randn(3, 5, 3), torch.rand(3, 5) + 0.1, torch.tensor([5, 2, 3])
    logits = model(x, spans, lengths)
    assert logits.shape == (3, 4)
    alone = [model(x[i : i + 1, :n], spans[i : i + 1, :n], lengths[i : i + 1])
             for i, n in enumerate(lengths.tolist())]  # fmt: skip
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-6)
    x2, spans2 = x.clone(), spans.clone()
    x2[1, 2:], spans2[1, 2:] = 7, 9
    torch.testing.assert_close(model(x2, spans2, lengths)[1], logits[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(model(x, 2 * spans, lengths), logits, atol=1e-6)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bias" not in name:
            assert parameter.grad is not None, name


def test_gates_leave_all_other_weights_as_they_are() -> None:
    for cell in CELLS:
        states: list[dict[str, Tensor]] = []
        for gate in (False, True):
            config = ClassifierConfig(2, 3, cell, units=5, gate=gate)
            states.append(training_module.initial_model(config, 1).state_dict())
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), name
        assert {name.split(".")[0] for name in states[1].keys() - states[0].keys()} == {"gates"}


def test_events_at_one_time_are_no_error_of_an_ltc() -> None:
    model = SequenceClassifier(ClassifierConfig(1, 2, "ltc", units=4))
    assert model(torch.randn(1, 3, 1), torch.zeros(1, 3), torch.tensor([3])).isfinite().all()


def test_an_epoch_has_every_series_once_and_a_curriculum_begins_with_short_ones() -> None:
    lengths = torch.tensor([4, 2, 3, 2, 5, 4, 3])
    plain = Sampler(lengths, 3, curriculum=0.0)
    batches = list(plain.epoch(torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert sorted(torch.cat(batches).tolist()) == list(range(7))
    sampler = Sampler(lengths, 3, curriculum=0.8)
    generator = torch.Generator().manual_seed(0)
    assert set(torch.cat(list(sampler.epoch(generator))).tolist()) <= {1, 3}
    for _ in range(1000):
        sampler.learned(0.79)
    assert sampler.limit == 2
    for _ in range(3 * FEWEST):
        sampler.learned(1.0)
    assert sampler.limit == 5
    for _ in range(3 * FEWEST):
        sampler.learned(1.0)
    assert sampler.limit == 5
    drawn = torch.cat([b for _ in range(50) for b in sampler.epoch(generator)])
    counts = drawn.bincount(minlength=7)
    assert counts.min() > 0.5 * counts.float().mean()
    other = Sampler(lengths, 3, curriculum=0.8)
    other.restore(json.loads(json.dumps(sampler.state())))
    one, two = (list(s.epoch(torch.Generator().manual_seed(1))) for s in (sampler, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_split_is_by_class_and_loses_nothing() -> None:
    series = series_of([3] * 21)
    train, aside = split(series, 0.2, seed=0)
    assert (len(train), len(aside)) == (17, 4)
    assert aside.labels.bincount().tolist() == [2, 2]
    with pytest.raises(ValueError, match="class 0 must have two series or more"):
        split(series_of([3]), 0.5, seed=0)


def test_confusion_and_loss_are_those_of_the_logits() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor, timespans: Tensor, lengths: Tensor) -> Tensor:
            return torch.stack([x[:, 0, 0], -x[:, 0, 0]], 1)

    values = [torch.tensor([[v]]) for v in (1.0, -1.0, -2.0)]
    series = SeriesSet.of(values, [0, 0, 1])
    loss, confusion = evaluate(Fixed(), series, 2)
    assert confusion == [[1, 1], [0, 1]]
    expected = np.mean([np.log1p(np.exp(m)) for m in (-2.0, 2.0, -4.0)])
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns(cell: Any, pumps: Path) -> None:
    task = folder_task(pumps)
    config = TrainingConfig(epochs=25, batch_size=8, learning_rate=0.02)
    model = ClassifierConfig(task.train.channels, 2, cell, units=8, backbone_units=8, gate=True)
    outcome = train_classifier(task, model, config)
    assert outcome.accuracy > 0.8
    assert outcome.updates == 75
    assert outcome.curve[0][0] > outcome.curve[-1][0]
    assert sum(map(sum, outcome.confusion)) == 12


@pytest.mark.parametrize("curriculum", [0.0, 0.6])
def test_a_stopped_run_goes_on_with_the_same_bits(
    tmp_path: Path, small: Task, curriculum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ClassifierConfig(1, 2, "cfc", units=6, backbone_units=6, dropout=0.3, gate=True)
    config = TrainingConfig(epochs=6, batch_size=16, curriculum=curriculum, seed=5)
    undisturbed = train_classifier(small, model, config)
    monkeypatch.setattr(training_module, "CHECKPOINT_SECONDS", -1.0)
    folder = tmp_path / "run"
    run_epoch = training_module._Training._run_epoch
    count = 0

    def stop_later(self: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr(training_module._Training, "_run_epoch", stop_later)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(small, model, config, folder=folder)
    assert (folder / "last.safetensors").exists()
    said: list[str] = []
    resumed = train_classifier(small, model, config, folder=folder, notify=said.append)
    assert said[0] == "going on after epoch 3"
    assert (resumed.curve, resumed.loss) == (undisturbed.curve, undisturbed.loss)
    assert resumed.confusion == undisturbed.confusion
    assert not (folder / "last.safetensors").exists()
    # Finished: the outcome is read and nothing is trained.
    monkeypatch.setattr(training_module._Training, "run", None)
    said.clear()
    assert train_classifier(small, model, config, folder=folder, notify=said.append) == resumed
    assert said == [f"finished earlier, on {resumed.machine}"]
    assert json.loads((folder / "run.json").read_text())["machine"] == resumed.machine


def test_a_folder_of_another_run_is_refused(tmp_path: Path, small: Task) -> None:
    model = ClassifierConfig(1, 2, "gru", units=4)
    config = TrainingConfig(epochs=1)
    train_classifier(small, model, config, folder=tmp_path)
    other = TrainingConfig(epochs=1, seed=1)
    with pytest.raises(RunError, match="holds another run, which differs in seed"):
        train_classifier(small, model, other, folder=tmp_path)
    (tmp_path / "outcome.json").write_text("{")
    with pytest.raises(RunError, match=r"outcome.json: expected JSON"):
        train_classifier(small, model, config, folder=tmp_path)
    (tmp_path / "outcome.json").unlink()
    (tmp_path / "last.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match=r"last.safetensors is damaged"):
        train_classifier(small, model, config, folder=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(small: Task) -> None:
    series = SeriesSet(small.train.x * torch.inf, small.train.timespans, small.train.lengths,
                       small.train.labels)  # fmt: skip
    task = Task("broken", series, small.test, small.classes)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan after 0 updates.*--learning-rate"):
        train_classifier(task, ClassifierConfig(1, 2, "gru", units=4), TrainingConfig(epochs=1))


def test_validation_does_not_touch_the_test_set(small: Task) -> None:
    nothing = Task("no test", small.train, None, small.classes)  # type: ignore[arg-type]
    model, config = ClassifierConfig(1, 2, "gru", units=4), TrainingConfig(1, validation=0.25)
    outcome = train_classifier(nothing, model, config)
    assert outcome.tested == "validation"
    assert sum(map(sum, outcome.confusion)) == pytest.approx(15, abs=1)


def test_own_data_with_time_stamps(tmp_path: Path) -> None:
    train = "(0,1),(1,2),(4,3):good\n(10,1),(12,2):bad\n"
    for part in ("TRAIN", "TEST"):
        (tmp_path / f"P_{part}.ts").write_text(ts(train, stamps="true", channels=1))
    task = folder_task(tmp_path / "P_TEST.ts")
    # The mean gap, (1 + 3 + 2) / 3, is the unit; a first step has the span of one.
    torch.testing.assert_close(task.train.timespans, torch.tensor([[1, 0.5, 1.5], [1, 1, 1]]))
    assert task.name == "P"


def change(folder: Path, part: str, old: str, new: str) -> None:
    path = folder / f"Pumps_{part}.ts"
    path.write_text(path.read_text().replace(old, new))


def test_data_that_do_not_fit_together(pumps: Path) -> None:
    change(pumps, "TEST", "good", "ugly")
    with pytest.raises(TaskError, match="classes must be among good, bad, got ugly, bad"):
        folder_task(pumps)
    body = "1,2:good\n"
    (pumps / "Pumps_TEST.ts").write_text(ts(body, channels=1))
    with pytest.raises(TaskError, match=r"it must have 2 channels as Pumps_TRAIN.ts has, got 1"):
        folder_task(pumps)
    (pumps / "Pumps_TEST.ts").unlink()
    with pytest.raises(TaskError, match=r"cannot read .*Pumps_TEST.ts: No such file"):
        folder_task(pumps)
    (pumps / "Other_TRAIN.ts").touch()
    with pytest.raises(TaskError, match=r"one file \*_TRAIN.ts, got Other_TRAIN.ts, Pumps_TRAIN"):
        folder_task(pumps)
    with pytest.raises(TaskError, match=r"cannot read --data .*nowhere: No such file or folder"):
        folder_task(pumps / "nowhere")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip configured to see one folder with a wheel of two data files; an empty cache."""
    contents = {"JapaneseVowels_TRAIN.ts": ts(noisy_series(8, 0)).encode(),
                "JapaneseVowels_TEST.ts": ts(noisy_series(4, 1)).encode()}  # fmt: skip
    wheel = tmp_path / "index" / "aeon-9.9-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in contents.items():
            archive.writestr(f"{vowels.FOLDER_IN_PACKAGE}/{file}", content)
        archive.writestr("aeon-9.9.dist-info/METADATA",
                         "Metadata-Version: 2.1\nName: aeon\nVersion: 9.9\n"
                         "Requires-Python: >=99\n")  # fmt: skip
        archive.writestr("aeon-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    package = Package("aeon", "9.9", sha256(wheel.read_bytes()), wheel.name)
    monkeypatch.setattr(vowels, "PACKAGE", package)
    monkeypatch.setattr(vowels, "SHA256", {file: sha256(c) for file, c in contents.items()})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("EMBER_EXT_CACHE", str(tmp_path / "cache"))
    return wheel


def test_vowels_are_fetched_once_and_checked(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert len(vowels_task(notify=said.append).train) == 8
    assert said == ["fetching JapaneseVowels from the package aeon 9.9"]
    index.unlink()
    assert len(vowels_task(notify=said.append).test) == 4
    assert len(said) == 1
    monkeypatch.setattr(vowels, "SHA256", dict.fromkeys(vowels.SHA256, "0" * 64))
    with pytest.raises(TaskError, match=r"no JapaneseVowels: .* cannot fetch aeon 9.9.*--data"):
        vowels_task(notify=said.append)


def test_vowels_of_another_content(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vowels, "SHA256", dict.fromkeys(vowels.SHA256, "0" * 64))
    with pytest.raises(TaskError, match=r"TRAIN.ts in aeon-9.9.* has an unexpected checksum"):
        vowels_task()


def test_a_damaged_file_is_not_used_if_the_cache_cannot_be_written(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vowels_task()
    file = tmp_path / "cache" / "JapaneseVowels_TRAIN.ts"
    file.write_text(ts(noisy_series(20, 5)))

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ember_ext.paper.data.cache.write_atomically", refuse)
    with pytest.raises(TaskError, match=r"cannot keep JapaneseVowels_TRAIN.ts: .*EMBER_EXT_CACHE"):
        vowels_task()


def test_classify_own_data(
    pumps: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pumps.parent)
    flags = ["--data", str(pumps), "--cell", "gru", "--gate", "--drop", "0.3", "--epochs", "2"]
    assert classify_main(flags) == 0
    output = capsys.readouterr().out
    assert "Pumps: 24 series to train with, 12 to test with, 2 channels, 2 classes" in output
    accuracy = re.search(r"test accuracy  [\d.]+% \((\d+) of 12\)", output)
    assert accuracy is not None
    folder = pumps.parent / "runs" / "Pumps-gru-gate-drop0.3-seed0"
    outcome = json.loads((folder / "outcome.json").read_text())
    assert round(12 * outcome["accuracy"]) == int(accuracy[1])
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert classify_main([*flags, "--learning-rate", "0.1"]) == 1
    assert "differs in learning_rate" in capsys.readouterr().err
    change(pumps, "TRAIN", "-0", "-1")
    assert classify_main(flags) == 1
    assert "holds another run, which differs in data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "cannot read --data nowhere: No such file or folder"),
        (["--drop", "1"], "--drop must be from 0 on and below 1, got 1.0"),
        (["--drop", "-0.5"], "--drop must be from 0 on and below 1, got -0.5"),
        (["--drop", "nan"], "--drop must be from 0 on and below 1, got nan"),
        (["--task", "xor", "--drop", "0.5"], "--drop must be 0 with --task xor, got 0.5"),
        (["--task", "xor", "--data", "x"], "--data must be left out with a single run of --task"),
        (["--study", "--data", "x"], "--data must be left out with --study of --task vowels"),
        (["--study", "--times", "--task", "xor"], "--study must be left out with --times"),
        (
            ["--study", "--cells", "cfc-mixed"],
            "--cells must be among cfc, ltc, gru, lstm with --task vowels, got cfc-mixed",
        ),
        (
            ["--seed", str(2**63)],
            "--seed must be from -2**62 to 2**63 - 1, got 9223372036854775808",
        ),
        (["--study", "--out", "/dev/null/x"], "--out must be a folder that can be written, got"),
        (["--task", "xor", "--times", "--out", "/dev/null"], "--out must be a folder that can be"),
        (["--times"], "--times must come with --task xor, got --task vowels"),
        (["--epochs", "0"], "--epochs must be finite and at least 1, got 0"),
        (["--units", "0"], "--units must be finite and at least 1, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be finite and above 0, got 0"),
        (["--validation", "1"], "--validation must be from 0 on and below 1, got 1"),
        (["--rows", "9", "--task", "xor"], "--rows must be from 10 to 10000000, got 9"),
        (["--device", "toaster", "--task", "xor", "--rows", "10"], "device 'toaster' cannot be"),
        (["--out", ""], "--out must not be empty, got ''"),
    ],
)
def test_errors_are_one_clear_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert classify_main(flags) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


VALUES = {"--cell": ["cfc"], "--gate": [], "--pooling": ["last"], "--encoding": ["event"],
          "--cells": ["gru"], "--out": ["/dev/null/x"], "--device": ["cpu"], "--study": [],
          "--times": [], "--data": ["x"], "--task": ["xor"], "--rows": ["10"]}  # fmt: skip
"""A value of each flag; of the others 1 or 0.5. Many are the default: they count as given, too."""

SHARES = ("--drop", "--dropout", "--curriculum", "--noise", "--validation")


@pytest.mark.parametrize(
    ("mode", "flag"),
    [
        (mode, f"--{field.name.replace('_', '-')}")
        for mode in (["--study"], ["--study", "--task", "xor"], ["--task", "xor", "--times"], [])
        for field in dataclasses.fields(ClassifyArguments)
        if field.name not in ("task", "out", "threads", "data")
        and (field.name not in ("study", "times") or f"--{field.name}" in mode)
    ],
)
def test_a_flag_has_an_effect_or_is_an_error(
    mode: list[str], flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = {"--epochs", "--device", "--cells", "--seeds", "--study"}
    runs = {"--cell", "--gate", "--drop", "--seed", "--epochs", "--units", "--layers", "--pooling",
            "--dropout", "--batch-size", "--learning-rate", "--weight-decay", "--curriculum",
            "--noise", "--validation", "--device"}  # fmt: skip
    used = {"": runs, "--study": studies, "--study xor": studies | {"--rows"},
            "xor --times": {"--rows", "--times"}}  # fmt: skip
    kind = " ".join(mode).replace("--task ", "")
    monkeypatch.setattr(cli, "_run", lambda options: None)
    value = VALUES.get(flag, ["0.5"] if flag in SHARES else ["1"])
    code = classify_main([*mode, flag, *value] if flag not in mode else mode)
    error = capsys.readouterr().err
    assert code == (0 if flag in used[kind] else 1), error
    if code:
        assert error.startswith(f"error: {flag} must be left out with ")
        assert "where it has no effect" in error


@pytest.mark.parametrize("flags", [["--cell", "rnn"], ["--task", "mnist"], ["--speed", "1"]])
def test_unknown_flag_values(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        classify_main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_single_run_needs_no_extra(pumps: Path) -> None:
    flags = ["--data", str(pumps), "--cell", "lstm", "--epochs", "1", "--out", str(pumps / "run")]
    code = (
        "import sys\n"
        "sys.modules.update(scipy=None, jinja2=None)\n"
        "from ember_ext.paper.sequences.cli import classify_main\n"
        f"assert classify_main({flags}) == 0\n"
        "assert classify_main(['--study']) == 1"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert 'a study needs scipy; install it with: pip install ".[paper]"' in run.stderr


@pytest.fixture
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr("ember_ext.paper.figures.style.PNG_DPI", 20)


@pytest.mark.usefixtures("coarse_pictures")
def test_study_of_xor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "xor", "--study", "--rows", "20", "--epochs", "1", "--seeds", "3"]
    assert classify_main([*flags, "--out", str(tmp_path)]) == 0
    assert "15/15 xor-lstm-seed2: " in capsys.readouterr().out
    results = sorted((tmp_path / "results").glob("*.json"))
    assert len(results) == 15
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == ["CfC", "CfC, mixed memory", "LTC", "GRU", "LSTM"]
    assert rows[0]["published"] == "99.42 ± 0.42"
    ours = [json.loads((tmp_path / "results" / f"xor-cfc-seed{s}.json").read_text())
            for s in range(3)]  # fmt: skip
    mean = np.mean([100 * result["outcome"]["accuracy"] for result in ours])
    assert float(rows[0]["accuracy"]) == pytest.approx(mean, abs=0.006)
    table, picture = ((tmp_path / n).read_bytes() for n in ("table.csv", "accuracy.png"))
    # Called again it trains nothing, and writes the same.
    assert classify_main([*flags, "--out", str(tmp_path)]) == 0
    assert "xor-" not in capsys.readouterr().out
    assert (tmp_path / "table.csv").read_bytes() == table
    assert (tmp_path / "accuracy.png").read_bytes() == picture
    # What is missing is made.
    results[0].unlink()
    assert classify_main([*flags, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(" %") == 1
    results[0].write_text("{}")
    assert classify_main([*flags, "--out", str(tmp_path)]) == 1
    assert "is not the result of a run" in capsys.readouterr().err


@pytest.mark.usefixtures("coarse_pictures")
def test_a_study_refuses_results_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--task", "xor", "--study", "--seeds", "1", "--out", str(tmp_path)]
    flags = [*common, "--cells", "gru", "--epochs", "1", "--rows", "20"]
    assert classify_main(flags) == 0
    table = (tmp_path / "table.csv").read_bytes()
    capsys.readouterr()
    # Also what is not asked for counts in the table.
    for cell in ("gru", "lstm"):
        assert classify_main([*common, "--cells", cell, "--epochs", "2", "--rows", "30"]) == 1
        error = capsys.readouterr().err
        assert "xor-gru-seed0.json is of another configuration" in error
        assert "(epochs was 1 and is 2, rows was 20 and is 30): choose another --out" in error
    assert (tmp_path / "table.csv").read_bytes() == table
    path = tmp_path / "results" / "xor-gru-seed0.json"
    copy = path.with_name("xor-gru-seed1.json")
    copy.write_bytes(path.read_bytes())
    assert classify_main(flags) == 1
    assert "must be named after its run xor-gru-seed0" in capsys.readouterr().err
    # A result of another task in the folder is none of this one.
    content = json.loads(copy.read_text()) | {"task": "vowels", "seed": 1}
    copy.unlink()
    copy.with_name("vowels-gru-seed1.json").write_text(json.dumps(content))
    assert classify_main(flags) == 0
    assert (tmp_path / "table.csv").read_bytes() == table


@pytest.mark.usefixtures("coarse_pictures")
def test_a_study_leaves_runs_to_others_and_fails_on_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    flags = ["--task", "xor", "--study", "--seeds", "1", "--epochs", "1", "--rows", "20",
             "--cells", "gru", "--out", str(tmp_path)]  # fmt: skip
    runs = tmp_path / "runs"
    runs.mkdir()
    with FileLock(runs / "xor-gru-seed0.lock"):
        assert classify_main(flags) == 0
    assert "xor-gru-seed0 is left to the process that trains it" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    (runs / "xor-gru-seed0").mkdir()
    (runs / "xor-gru-seed0" / "run.json").write_text("{}")
    assert classify_main(flags) == 1
    assert "holds another run" in capsys.readouterr().err
    (runs / "xor-gru-seed0" / "run.json").unlink()
    assert classify_main(flags) == 0
    assert list(runs.iterdir()) == []


@pytest.mark.parametrize("task", ["vowels", "xor"])
def test_committed_tables_are_those_of_the_committed_results(task: Any) -> None:
    pytest.importorskip("scipy")
    from scipy import stats

    from ember_ext.paper.sequences.results import read_results, select
    from ember_ext.paper.sequences.study import StudyFolder, read_study
    from ember_ext.paper.sequences.summary import as_csv, comparisons, table

    folder = Path(__file__).parents[1] / "bench" / "results" / "sequences" / task
    results = read_results(folder / "results", task)
    # They have the settings that the study has today.
    assert read_study(task, StudyFolder(folder)) == results != []
    rows = table(task, results)
    assert as_csv(rows) == (folder / "table.csv").read_bytes()
    compared = comparisons(task, results)
    assert as_csv(compared) == (folder / "comparisons.csv").read_bytes()
    # docs/sequences.md says how many seeds there are.
    assert {row["seeds"] for row in rows} == {"10" if task == "vowels" else "5"}
    if task == "xor":
        gru, cfc = ([r.accuracy for r in select(results, c, False, 0.0)] for c in ("gru", "cfc"))
        row = next(row for row in compared if row["comparison"] == "GRU − CfC")
        assert row["p"] == f"{stats.ttest_rel(gru, cfc).pvalue:.3f}".lstrip("0")
    for result in results:
        assert sum(map(sum, result.outcome["confusion"])) == (370 if task == "vowels" else 10_000)


@pytest.mark.usefixtures("coarse_pictures")
def test_study_of_vowels(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    flags = ["--study", "--epochs", "1", "--seeds", "1", "--out", str(out)]
    assert classify_main(flags) == 0
    names = {path.stem for path in (out / "results").glob("*.json")}
    assert len(names) == 16
    assert {"vowels-cfc-seed0", "vowels-lstm-gate-drop0.5-seed0"} <= names
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    gated = [row for row in rows if row["gate"] == "LIF"]
    assert len(gated) == 8
    assert all(row["effect"][0] in "+-" for row in gated)


def test_times_compare_equal_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    from ember_ext.paper.sequences import timing

    monkeypatch.setattr(timing, "ROUNDS", 1)
    flags = ["--task", "xor", "--times", "--rows", "40", "--out", str(tmp_path)]
    assert classify_main(flags) == 0
    lines = (tmp_path / "times.csv").read_text().splitlines()
    assert lines[0].startswith("cell,units,ember-ext,ncps,speedup")
    assert len(lines) == 1 + len(CONTINUOUS)
    model = training_module.initial_model(ClassifierConfig(1, 2, "cfc", units=4), 0)
    theirs = timing.as_ncps(model)
    assert not any(type(m).__module__.startswith("ember_ext.nn.cfc") for m in theirs.modules())
    series = xor_series(8, 0)
    torch.testing.assert_close(
        *(m(series.x, series.timespans, series.lengths) for m in (model, theirs)),
        rtol=1e-4,
        atol=1e-6,
    )
