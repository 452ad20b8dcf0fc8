"""Shared by the benches of the liquid scans: our networks beside ncps' of the same weights."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarking import (
    Case,
    Clock,
    open_device,
    relative_error,
    run_cases,
    with_earlier,
    write_csv,
)
from ember_ext import _native
from ember_ext._machine import processor
from plots import plot_csv

MODES = ("forward", "forward+backward")


class LiquidOptions(Protocol):
    """The options that both benches have."""

    what: Any
    seconds: float
    device: str
    compare: bool
    out: Path


Options = TypeVar("Options", bound=LiquidOptions)


def our_name(device: torch.device) -> str:
    """What our contender is called: on a CPU, with its instruction set."""
    if device.type != "cpu":
        return "ember_ext"
    return f"ember_ext {_native.isa or 'reference'}"


def forward_call(network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Inference of a whole batch."""

    def run() -> Any:
        with torch.no_grad():
            return network(x)

    return run


def training_call(network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward, to the input and all weights."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for p in network.parameters() if p.requires_grad)]

    def run() -> Any:
        y, _ = network(x)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def at_best_threads(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`call` at one thread or at all, whichever is faster on a CPU."""
    if device != "cpu":
        return call
    threads = torch.get_num_threads()

    def at(count: int) -> Callable[[], Any]:
        def run() -> Any:
            torch.set_num_threads(count)
            try:
                return call()
            finally:
                torch.set_num_threads(threads)

        return run

    def best_of_two(run: Callable[[], Any]) -> float:
        return min(Clock().seconds(run) for _ in range(2))

    choices = {count: at(count) for count in {1, threads}}
    call()
    return choices[min(choices, key=lambda count: best_of_two(choices[count]))]


def pass_of(mode: str) -> Callable[[nn.Module, Tensor], Callable[[], Any]]:
    """What makes the call for a mode."""
    return forward_call if mode == "forward" else training_call


def hundred_steps(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A streaming step a hundred times, for one is too short for the clock."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(100):
                call()

    return at_best_threads(run, device)


def compare_networks(
    name: str, theirs: nn.Module, ours: Any, x: Tensor, steps: int
) -> dict[str, float]:
    """`held_to_ncps` for some rows and steps of a network's input."""
    few = x[:4, :steps]
    with torch.no_grad():
        exact, _ = copy.deepcopy(theirs).double()(few.double(), _exact_state(ours, few))
        return held_to_ncps(name, exact, theirs(few)[0], ours(few)[0])


def compare_steps(
    name: str, theirs: nn.Module, ours: Any, x: Tensor, h: Tensor
) -> dict[str, float]:
    """`held_to_ncps` for one streaming step."""
    with torch.no_grad():
        exact, _ = copy.deepcopy(theirs).double()(x[:, None].double(), h.double())
        return held_to_ncps(name, exact[:, 0], theirs(x[:, None], h)[0][:, 0], ours.step(x, h)[0])


def _exact_state(ours: Any, x: Tensor) -> Any:
    # ncps' own default state is fp32.
    zeros = x.new_zeros(len(x), ours.state_size, dtype=torch.float64)
    return (zeros, zeros) if getattr(ours, "use_mixed", False) else zeros


def held_to_ncps(name: str, exact: Tensor, theirs: Tensor, ours: Tensor) -> dict[str, float]:
    """The errors of what ncps and we computed, against what fp64 gives.

    Raises:
        AssertionError: ours is worse than twice theirs.
    """
    errors = {"ncps": relative_error(theirs, exact.detach())}
    name_of_ours = our_name(ours.device)
    errors[name_of_ours] = relative_error(ours, exact.detach())
    if not errors[name_of_ours] <= 2 * errors["ncps"] + 1e-6:
        raise AssertionError(f"{name}: {errors}")
    return errors


def write_memory(path: Path, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Write a table of peak memory, with the processor and the number of threads."""
    where = processor(torch.device("cpu")), torch.get_num_threads()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*columns, "device", "threads"))
        writer.writerows((*line, *where) for line in lines)


def measure(
    stem: str,
    options: Options,
    cases: Callable[[Options], Iterator[Case]],
    sweep_cases: Callable[[Options], Iterator[Case]],
    memory_table: Callable[[Console, Path], None],
) -> None:
    """Verify, time, print and write what the options ask for.

    Args:
        stem: of the operator's name, STEM_scan, and of the files, such as STEM_sweep.csv.
        options: what to measure.
        cases: the cases for all but "sweep" and "memory".
        sweep_cases: those for "sweep".
        memory_table: measures memory, prints it and writes it to a file.
    """
    device = open_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    what = set(options.what)
    for name, wanted, make in (
        (stem, what - {"sweep", "memory"}, cases),
        (f"{stem}_sweep", what & {"sweep"}, sweep_cases),
    ):
        if wanted:
            rows = run_cases(f"{stem}_scan", make(options), device=device, seconds=options.seconds)
            path = options.out / f"{name}.csv"
            write_csv(with_earlier(rows, path), path)
            plot_csv(path, path.with_suffix(".png"))
    if "memory" in what and device.type == "cpu":
        memory_table(Console(width=120), options.out / f"{stem}_memory.csv")
