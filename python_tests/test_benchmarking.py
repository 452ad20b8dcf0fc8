"""What the scripts in bench/ share, and that each of them names a device that is not there."""

from __future__ import annotations

import csv
import importlib
import os
import struct
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarking
from benchmarking import (
    Case,
    Clock,
    EventClock,
    Row,
    read_csv,
    run_cases,
    time_in_turns,
    with_earlier,
    write_csv,
)
from plots import plot_csv

ROOT = Path(__file__).parents[1]
PROFILES = [ROOT / "bench" / f"{name}.py" for name in ("kernel_times", "train_profile")]
SCRIPTS = [*sorted((ROOT / "bench").glob("*_bench.py")), *PROFILES]


class Device:
    """Stands in for torch.cuda: a stream whose time passes only as the test says."""

    def __init__(self) -> None:
        self.milliseconds = 5.0
        self.log: list[str] = []

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.device.log.append("record")
        self.at = self.device.milliseconds

    def synchronize(self) -> None:
        self.device.log.append("wait")

    def elapsed_time(self, end: _Event) -> float:
        assert self.device.log[-1] == "wait", "asked before the device was done"
        return end.at - self.at


def test_event_clock_waits_once_after_the_call() -> None:
    device = Device()

    def call() -> None:
        device.log.append("call")
        device.milliseconds += 2.5

    assert EventClock(device).seconds(call) == pytest.approx(2.5e-3)
    assert device.log == ["record", "call", "record", "wait"]


def test_each_device_has_its_clock() -> None:
    assert type(benchmarking.clock_of(torch.device("cpu"))) is Clock
    assert type(benchmarking.clock_of(torch.device("cuda", 1))) is EventClock


def test_calls_are_timed_in_turns() -> None:
    device, order = Device(), []

    def call(name: str, milliseconds: float) -> None:
        order.append(name)
        device.milliseconds += milliseconds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}
    times = time_in_turns(calls, EventClock(device), seconds=0, least=4)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 4]
    assert times["a"] == pytest.approx([1e-3] * 4)
    assert times["b"] == pytest.approx([3e-3] * 4)


def test_a_wrong_contender_is_not_timed() -> None:
    def verify() -> dict[str, float]:
        raise AssertionError("off by one")

    case = Case("c", "forward", {"ours": lambda: pytest.fail("timed")}, verify)
    with pytest.raises(AssertionError, match="off by one"):
        run_cases("op", [case], device=torch.device("cpu"), seconds=0)


def allocation(megabytes: int) -> Callable[[], object]:
    """A call that fills and frees as much memory; twice as much is freed before it."""
    torch.ones(megabytes * 500_000)
    return lambda: torch.ones(megabytes * 250_000)


def failure(how: str) -> Callable[[], object]:
    """Raise, or return a call that ends the process."""
    if how == "raise":
        raise ArithmeticError("in make")
    return lambda: os._exit(3)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_the_peak_of_a_call_is_measured() -> None:
    assert benchmarking.peak_megabytes(allocation, 200) == pytest.approx(200, abs=10)


@linux
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", ArithmeticError, "in make"),
        ("exit", BrokenProcessPool, "terminated abruptly"),
    ],
)
def test_a_measured_process_that_fails_says_so(
    how: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        benchmarking.peak_megabytes(failure, how)


@pytest.mark.cuda
def test_events_time_a_gpu() -> None:
    device = benchmarking.open_device("cuda")
    call, _ = benchmarking.matmul_call(device)
    call()
    assert 0 < EventClock().seconds(call) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_a_device_that_is_not_there_is_named(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(script.parent))
    bench = importlib.import_module(script.stem)
    with pytest.raises(SystemExit, match=r"^error: --device cuda: [^\n]+$"):
        bench.main(bench.Options(device="cuda", out=tmp_path / "results"))
    assert not (tmp_path / "results").exists()


def test_the_contenders_of_the_cfc_bench_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("cfc_bench")
    for mode in ("forward", "forward+backward"):
        case = bench.cfc_case("wired", 2, 3, mode, bench.Options())
        assert set(case.verify()) == {"ncps", bench.our_name(torch.device("cpu"))}
        for call in case.contenders.values():
            call()


@pytest.mark.parametrize("name", ["wired 32", "dense 64"])
def test_the_contenders_of_the_cfc_bench_of_fewer_units_agree(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("cfc_bench")
    case = bench.cfc_case(name, 2, 3, "forward", bench.Options())
    assert case.config.endswith(f"-> {name.split()[1]}")
    case.verify()
    for call in case.contenders.values():
        call()


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_the_contenders_of_the_ltc_bench_agree(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("ltc_bench")
    monkeypatch.setitem(bench.MOST_ENTRIES, mode, 20_000)
    case = bench.ltc_case("AutoNCP(19, 4)", 2, 10, mode, bench.Options())
    assert set(case.verify()) == {"ncps", bench.our_name(torch.device("cpu"))}
    few = int(20_000 / 2 / (20 * 19 + 6 * 19 * 19))
    assert case.factors == {f"ncps, by {few} of the steps": 10 / few}
    for call in case.contenders.values():
        call()
    _, network = bench.networks("AutoNCP(19, 4)", "cpu")
    wiring = network.rnn_cell._wiring
    exist = abs(wiring.sensory_adjacency_matrix).sum() + 6 * abs(wiring.adjacency_matrix).sum()
    assert bench.sigmoids(network, "forward") == exist
    step = bench.step_case("AutoNCP(19, 4)", bench.Options())
    step.verify()
    for call in step.contenders.values():
        call()


def test_times_of_a_part_of_the_work_are_multiplied_up() -> None:
    case = Case("c", "forward", {"a": lambda: None, "b": lambda: None}, dict, factors={"a": 1e6})
    first, second = run_cases("op", [case], device=torch.device("cpu"), seconds=0.0)
    assert first.median_ms > 1e3 * second.median_ms
    assert second.speedup > 1e3


@pytest.mark.parametrize("what", ["attention", "refractory"])
def test_the_contenders_of_the_attention_bench_agree_in_bf16(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("attention_bench")
    options = bench.Options(what=what, dtype="bfloat16", compiled=False)
    case = bench.attention_case(what, (1, 2, 40, 8), 0.1, "forward+backward", options)
    assert case.dtype == torch.bfloat16
    assert 0 < case.verify()["ember_ext"] < 0.02
    for call in case.contenders.values():
        call()


def test_kernel_times_name_what_a_pass_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("kernel_times")
    bench.main(bench.Options(device="cpu", scale=64, shown=3, out=tmp_path))
    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ran = {row["pass"].split(" [")[0] + ": " + row["kernel"] for row in rows}
    for operator in ("lif_attention", "refractory_lif_attention", "lif_gate"):
        assert f"{operator}: ember_ext::{operator}_backward" in ran
    assert "CfC dense: ember_ext::cfc_scan_backward" in ran
    assert all(float(row["ms"]) > 0 and float(row["ms of the pass"]) > 0 for row in rows)
    name = "void ember::cuda::k<float, true>(ember::P, ember::cuda::Q)"
    assert bench.short_name(name) == "k<float, true>"


def test_a_training_step_is_told_apart_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("train_profile")
    bench.main(bench.Options(suite="quick", steps=1, out=tmp_path))
    with (tmp_path / "train_profile.csv").open(newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    found = {"ember_ext: CfC scan", "ember_ext: gates and attention", "matrix products", "GELU"}
    assert found <= rows.keys()
    assert all(float(row["ms"]) > 0 for row in rows.values() if row["share"] != "0%")
    assert sum(int(row["share"][:-1]) for row in rows.values()) == pytest.approx(100, abs=len(rows))
    assert "evaluation batch: " in capsys.readouterr().out
    # A kernel's name, and an operator that no part lists.
    parts = bench.seconds_by_part(
        [
            SimpleNamespace(key="void ember::cuda::cfc_forward<8>()", self_device_time_total=2e6),
            SimpleNamespace(key="vectorized_elementwise_kernel", self_device_time_total=1e6),
        ],
        torch.device("cuda"),
    )
    assert {name: time for name, time in parts.items() if time} == {
        "ember_ext: CfC scan": 2,
        bench.REST: 1,
    }
    with pytest.raises(SystemExit, match="error: variant must be one of"):
        bench.main(bench.Options(condition="lift", out=tmp_path))


def test_rows_of_other_measurements_are_kept(tmp_path: Path) -> None:
    def row(contender: str, device: str, milliseconds: float) -> Row:
        software = ("avx2", "2.13.0", "0.1.0")
        times = (milliseconds, milliseconds, milliseconds)
        return Row("op", "c", "forward", contender, *times, 1.0, 0.0, 0.0, "", 0.0, device, 2,
                   *software)  # fmt: skip

    path = tmp_path / "op.csv"
    first = [row("a", "one CPU", 1.0), row("b", "one CPU", 2.0), row("a", "another", 3.0)]
    write_csv(with_earlier(first, path), path)
    again = row("a", "one CPU", 4.0)
    write_csv(with_earlier([again], path), path)
    assert read_csv(path) == [first[1], first[2], again]
    plot_csv(path, tmp_path / "op.png")
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_several_modes_grows_with_the_dots_of_its_longest_column(tmp_path: Path) -> None:
    def inches(cases: list[tuple[str, str]]) -> list[float]:
        software = ("one CPU", 2, "avx2", "2.13.0", "0.1.0")
        rows = [
            Row("op", config, mode, contender, 1.0, 0.9, 1.2, 1.0, 0.0, 0.0, "", 0.0, *software)
            for mode, config in cases
            for contender in ("eager", "ember_ext")
        ]
        write_csv(rows, tmp_path / "op.csv")
        plot_csv(tmp_path / "op.csv", tmp_path / "op.png")
        header = (tmp_path / "op.png").read_bytes()[16:24]
        return [pixels / 200 for pixels in struct.unpack(">II", header)]

    one = inches([("forward", "a")])
    assert one[0] == 8
    assert inches([("forward", "a"), ("backward", "a")]) == one
    assert inches([("forward", "a"), ("forward", "b")])[1] > one[1]
    # All modes but the first share a column.
    assert inches([("forward", "a"), ("backward", "a"), ("step", "a")])[1] > one[1]
