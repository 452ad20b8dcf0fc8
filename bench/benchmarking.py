"""What the scripts in `bench/` share: timing, the machine's limits, tables, CSV rows and plots.

A script makes `Case`s; `run_cases` first holds our results to the exact ones, then times the
contenders of the case in turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ember_ext
from ember_ext import _native
from ember_ext._command_line import Expectation, FlagError, prepare_output, refuse_empty, require
from ember_ext._machine import machine, processor

Call = Callable[[], object]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Case:
    """One configuration that several contenders compute.

    Attributes:
        config: what is computed, for the table.
        mode: "forward" or "forward+backward".
        contenders: by name; the first is the baseline of the speed-up.
        verify: raises AssertionError if ours is wrong; returns the largest error of each contender
            that computes the same, relative to the largest entry of the exact result.
        gigabytes: of memory traffic that the work cannot do without, or 0.
        gigaflops: of arithmetic that the work cannot do without, or 0.
        dtype: of that arithmetic.
        factors: what to multiply the times of some contenders by, which do a part of the work only.
    """

    config: str
    mode: str
    contenders: dict[str, Call]
    verify: Callable[[], dict[str, float]]
    gigabytes: float = 0.0
    gigaflops: float = 0.0
    dtype: torch.dtype = torch.float32
    factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table and of the CSV file. Times are in milliseconds."""

    op: str
    config: str
    mode: str
    contender: str
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    error: float
    rate: float
    rate_unit: str
    limit_share: float
    device: str
    threads: int
    isa: str
    torch: str
    ember_ext: str
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat("T", "seconds"))


class Clock:
    """Times calls on the CPU."""

    def seconds(self, call: Call) -> float:
        """What one call takes."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class EventClock(Clock):
    """Times calls on a CUDA device, by events on its current stream.

    What is measured is the time from the first kernel to the last, waits for the host between them
    included. The host hands all of a call over before it waits.

    Args:
        cuda: `torch.cuda`, or what stands in for it.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda

    def seconds(self, call: Call) -> float:
        """What one call takes on the device."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return EventClock() if device.type == "cuda" else Clock()


def parse_options(kind: type[Options], description: str | None, **expected: Expectation) -> Options:
    """The options of a script from its command line.

    Args:
        kind: a dataclass.
        description: what `--help` opens with.
        expected: what some of its fields must be.

    Raises:
        SystemExit: a flag is unknown, or its value makes no sense.
    """
    prepare_output()
    try:
        refuse_empty(sys.argv[1:])
        options = tyro.cli(kind, description=description)
        for name, expectation in expected.items():
            require(f"--{name.replace('_', '-')}", getattr(options, name), expectation)
    except FlagError as error:
        raise SystemExit(f"error: {error}") from None
    return options


def open_device(name: str) -> torch.device:
    """The device that a script's --device names, as the current one.

    Raises:
        SystemExit: there is no such device here.
    """
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --device {name}: {reason}") from None
    return device


def time_in_turns(
    calls: dict[str, Call], clock: Clock, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call, timed one after the other, again and again.

    Args:
        calls: what to time, by name; each is called twice beforehand.
        clock: of the device that they run on.
        seconds: how long to go on.
        least: the fewest rounds.
    """
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            times[name].append(clock.seconds(call))
        rounds += 1
    return times


def copy_call(megabytes: float, device: torch.device) -> tuple[Call, float]:
    """A copy between two buffers, and the GB that it reads and writes."""
    source = torch.ones(int(megabytes * 1e6 / 4), device=device)
    target = torch.zeros_like(source)
    return (lambda: target.copy_(source)), 2 * source.numel() * 4 / 1e9


def matmul_call(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None
) -> tuple[Call, float]:
    """A square matrix product, by default of a size that fills the device, and its GFLOP."""
    size = size or (4096 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2 * size**3 / 1e9


def training_step(model: nn.Module, idx: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    """A step of AdamW on a language model that predicts `idx`, [B, T], from itself.

    With another dtype than fp32, under autocast to it, without a scaler of gradients.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
            _, loss, _ = model(idx, idx)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest |value - exact|, relative to the largest |exact|."""
    scale = float(exact.abs().max()) or 1.0
    return float((value.detach().double() - exact).abs().max()) / scale


def _keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the kernel.

    Otherwise whichever contender's result ends up at the top of the heap pays for paging it in
    anew at every call: 10 ms for 25 MB, three times what the gate takes.
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def run_cases(
    op: str, cases: Iterable[Case], *, device: torch.device, seconds: float, least: int = 5
) -> list[Row]:
    """Verify and time each case, print the table, and return its rows.

    The limit of a case is measured in the same turns: a copy of as many bytes, or a matrix product.

    Args:
        op: the operator, for the table's title.
        cases: made one by one, so that each may hold large tensors.
        device: where they run.
        seconds: how long to time each case.
        least: the fewest times that each contender is timed.

    Raises:
        AssertionError: our result is not the exact one; it is not timed then.
    """
    _keep_freed_memory()
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("config", "mode", "contender", "ms", "20-80 %", "speed-up", "rate", "of limit",
                  "error", title=f"{op}: {machine(device)}")  # fmt: skip
    for column in table.columns[3:]:
        column.justify = "right"
    rows: list[Row] = []
    for case in cases:
        errors = case.verify()
        for row in _time_case(op, case, errors, device, seconds, least):
            rows.append(row)
            first = row.contender == next(iter(case.contenders))
            what = (row.config, row.mode) if first else ("", "")
            table.add_row(
                *what, row.contender, f"{row.median_ms:.3g}",
                f"{row.low_ms:.3g}-{row.high_ms:.3g}", f"{row.speedup:.2f}",
                f"{row.rate:.3g} {row.rate_unit}",
                f"{row.limit_share:.0%}" if row.limit_share else "", f"{row.error:.1e}",
            )  # fmt: skip
        table.add_section()
        console.print(f"verified and timed: {case.config} {case.mode}")
    console.print(table)
    return rows


def _time_case(
    op: str,
    case: Case,
    errors: dict[str, float],
    device: torch.device,
    seconds: float,
    least: int,
) -> Iterator[Row]:
    limit: tuple[Call, float] | None = None
    unit = ""
    if case.gigabytes:
        limit, unit = copy_call(case.gigabytes * 500, device), "GB/s"
    elif case.gigaflops:
        limit, unit = matmul_call(device, case.dtype), "GFLOP/s"
    calls = case.contenders | ({"limit": limit[0]} if limit else {})
    times = time_in_turns(calls, clock_of(device), seconds, least)
    for name, factor in case.factors.items():
        times[name] = [factor * seconds for seconds in times[name]]
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = medians[next(iter(case.contenders))]
    for name in case.contenders:
        low, _, _, high = statistics.quantiles(times[name], n=5)
        rate = (case.gigabytes or case.gigaflops) / medians[name]
        share = rate * medians["limit"] / limit[1] if limit else 0.0
        yield Row(
            op, case.config, case.mode, name, 1e3 * medians[name], 1e3 * low, 1e3 * high,
            baseline / medians[name], errors.get(name, 0.0), rate, unit, share, processor(device),
            torch.get_num_threads(), _native.isa, torch.__version__, ember_ext.__version__,
        )  # fmt: skip


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` wrote."""
    types = get_type_hints(Row)
    with path.open(encoding="utf-8", newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    return [Row(**{name: types[name](value) for name, value in line.items()}) for line in lines]


def with_earlier(rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows that a file has of other measurements or devices, if any, and then `rows`."""

    def key(row: Row) -> tuple[str, str, str, str]:
        return row.config, row.mode, row.contender, row.device

    measured = {key(row) for row in rows}
    earlier = read_csv(path) if path.exists() else []
    return [*(row for row in earlier if key(row) not in measured), *rows]


def _resident_bytes(field: str) -> int:
    """VmRSS, this process's memory in use, or VmHWM, the most that ever was; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _measure_peak(make: Callable[..., Call], arguments: tuple[Any, ...]) -> int:
    call = make(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - allocated
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def peak_megabytes(make: Callable[..., Call], *arguments: Any) -> float:
    """How far a call drives the memory of a fresh process, beyond what it had before.

    Where `make` uses a GPU, what torch allocates there; else of the process, on Linux only. What a
    script calls at its top level runs in that process too, so a script must call this under
    `if __name__ == "__main__"`.

    Args:
        make: a function of a module, which returns the call; what it allocates, and what it runs
            so that threads and libraries are there, does not count.
        arguments: of `make`; pickled, like `make`.

    Raises:
        Exception: whatever `make` or the call raises.
        BrokenProcessPool: the process died.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as fresh:
        return fresh.submit(_measure_peak, make, arguments).result() / 1e6


BAR_INCHES = 0.14
TITLE_INCHES = 0.25
AXIS_INCHES = 0.5
LEGEND_INCHES = 0.85


def plot_csv(path: Path, image: Path) -> None:
    """Draw the times of a CSV file that `write_csv` wrote as grouped bars, one panel per mode.

    Only those of the device that comes last: times of two devices do not compare. The picture is
    made to be read at 8 inches of width, that of a README's column.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ours = [name for name in names if name.startswith("ember_ext")]
    contenders = [name for name in names if name not in ours] + ours
    # Okabe and Ito's colours can be told apart with any colour vision; the blues are ours.
    others = ("#999999", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442")
    colours = dict(zip(contenders, cycle(others), strict=False))
    colours |= dict(zip(ours, cycle(("#0072B2", "#56B4E9")), strict=False))
    panels = [_Panel.of([row for row in rows if row["mode"] == mode], contenders) for mode in modes]
    # The first mode on the left, all others below one another on the right.
    columns = [column for column in (panels[:1], panels[1:]) if column]
    height = LEGEND_INCHES + max(sum(panel.inches for panel in column) for column in columns)
    figure = plt.figure(figsize=(8, height), dpi=200)
    for place, column in enumerate(columns):
        top = height - LEGEND_INCHES
        for panel in column:
            left, width = 0.05 + 4 * place, 8 / len(columns) - 0.25
            bottom = top - TITLE_INCHES - panel.lines * BAR_INCHES
            axis = figure.add_axes(
                (left / 8, bottom / height, width / 8, panel.lines * BAR_INCHES / height)
            )
            panel.draw(axis, colours)
            top -= panel.inches
    first = rows[0]
    figure.legend(
        [Rectangle((0, 0), 1, 1, color=colours[name]) for name in contenders], contenders,
        title=f"{first['op']} on {first['device']}, {first['threads']} threads",
        ncols=min(4, len(contenders)), loc="upper center", fontsize=8, title_fontsize=9,
    )  # fmt: skip
    figure.savefig(image)
    plt.close(figure)


@dataclass(frozen=True)
class _Panel:
    """The bars of one mode: those of a configuration below its name.

    Attributes:
        mode: its name.
        names: configurations, each with the place of its name.
        bars: rows of the CSV file, each with its place.
        lines: how many of the height of a bar all takes.
    """

    mode: str
    names: list[tuple[str, float]]
    bars: list[tuple[dict[str, str], float]]
    lines: float

    @classmethod
    def of(cls, rows: Sequence[dict[str, str]], contenders: Sequence[str]) -> _Panel:
        names: list[tuple[str, float]] = []
        bars: list[tuple[dict[str, str], float]] = []
        place = 0.0
        for config in dict.fromkeys(row["config"] for row in rows):
            names.append((config, place))
            group = [row for row in rows if row["config"] == config]
            for row in sorted(group, key=lambda row: contenders.index(row["contender"])):
                place += 1
                bars.append((row, place))
            place += 1.5
        return cls(rows[0]["mode"], names, bars, place)

    @property
    def inches(self) -> float:
        """Its height, title and axis included."""
        return TITLE_INCHES + self.lines * BAR_INCHES + AXIS_INCHES

    def draw(self, axis: Any, colours: Mapping[str, str]) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        for row, place in self.bars:
            median, low, high = (float(row[key]) for key in ("median_ms", "low_ms", "high_ms"))
            axis.barh(
                place, median, 1.0, color=colours[row["contender"]],
                xerr=[[max(0.0, median - low)], [max(0.0, high - median)]],
                error_kw={"linewidth": 0.8},
            )  # fmt: skip
            axis.annotate(
                f" {float(row['speedup']):.1f}x", (max(median, high), place), va="center",
                fontsize=7,
            )  # fmt: skip
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        # Labels of more decades would run into each other.
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=7)
        axis.margins(x=0.18)
        axis.set_ylim(self.lines - 0.7, -0.7)
        axis.set_yticks([])
        for name, place in self.names:
            axis.annotate(
                name, (0, place), xycoords=("axes fraction", "data"), va="center", fontsize=7.5,
                xytext=(3, 0), textcoords="offset points",
            )  # fmt: skip
        axis.set_title(self.mode, fontsize=9)
        axis.set_xlabel("milliseconds (median, 20-80 %)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
