"""Times the CfC against ncps, our reference, GRU and LSTM: `python bench/cfc_bench.py`.

Every contender is checked against ncps in fp64 before anything is timed. ncps runs at whichever of
one thread and all threads is faster: its threads spin when the machine is busy, which would flatter
us. "the same work" is a yardstick: the same matrix products and activations without the recurrence,
as library calls over the whole sequence. GRU and LSTM have rows of their own, whose rates can be
compared with ours. Prints tables and writes cfc.csv and cfc.png into --out. `--help` lists the
flags.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ncps.torch
import torch
import tyro
from ncps.wirings import AutoNCP
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ember_ext
from ember_ext import reference
from ember_ext.benchmarking import (
    Case,
    Clock,
    clock_of,
    open_device,
    plot_csv,
    relative_error,
    run_cases,
    write_csv,
)
from ember_ext.nn.cfc import _weights

INPUTS, UNITS, MOTOR = 128, 192, 128
NETWORKS: dict[str, Any] = {"wired": AutoNCP(UNITS, MOTOR), "dense": UNITS}
MAIN = (64, 256)
SWEEP = [(1, 16), (1, 1024), (8, 256), (256, 64), (16, 4096)]


@dataclass
class Options:
    """What to time, for how long, and where to write it."""

    device: str = "cpu"
    """Where to run: on "cpu", or on "cuda", which is timed by CUDA events."""
    seconds: float = 2.0
    """How long to time each case, in seconds, and five rounds at least."""
    sizes: Literal["main", "sweep", "all"] = "main"
    """main: 64 rows of 256 steps, streaming and memory; sweep: other batches and lengths."""
    compare_ncps: bool = True
    """ncps takes most of the time."""
    out: Path = Path("bench/results")


def cell_sizes(network: ember_ext.nn.CfC) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix product of a step, time_a and time_b folded into one."""
    sizes = []
    for cell in network._cells:
        weights, _ = _weights(cell)
        sizes += [(affine.weight.shape[1], len(affine.bias)) for affine in weights.backbone]
        sizes.append((weights.ff1.weight.shape[1], 3 * len(weights.ff1.bias)))
    return sizes


def same_work(network: ember_ext.nn.CfC, rows: int, passes: int) -> Callable[[], None]:
    """The matrix products of `passes` (1 forward, 3 with backward) and the activations."""
    products = []
    device = next(network.parameters()).device
    for inputs, outputs in cell_sizes(network):
        left = torch.randn(rows, inputs, device=device)
        right = torch.randn(inputs, outputs, device=device)
        products.append((left, right, torch.empty(rows, outputs, device=device)))

    def run() -> None:
        for left, right, out in products:
            for _ in range(passes):
                torch.mm(left, right, out=out)
            # Two tanh for each sigmoid, or a backbone's tanh: one value costs about the same.
            torch.tanh(out, out=out)

    return run


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
    """`call` at one thread or at all, whichever is faster; on a GPU at all."""
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

    choices = {count: at(count) for count in {1, threads}}
    call()
    return choices[min(choices, key=lambda count: Clock().seconds(choices[count]))]


class Reference(nn.Module):
    """A network that runs our reference, sharing another's weights."""

    def __init__(self, network: ember_ext.nn.CfC) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last cell's states."""
        finals = []
        for cell in self.network._cells:
            weights, activation = _weights(cell)
            x, final = reference.cfc_scan(x, weights, mode=cell.mode, activation=activation)
            finals.append(final)
        return x, torch.cat(finals, 1)


def cfc_case(name: str, batch: int, steps: int, mode: str, options: Options) -> Case:
    """The contenders for one network and size."""
    torch.manual_seed(0)
    theirs = ncps.torch.CfC(INPUTS, copy.deepcopy(NETWORKS[name])).to(options.device)
    ours = copy.deepcopy(theirs)
    ember_ext.accelerate(ours)
    x = torch.randn(batch, steps, INPUTS).to(options.device)
    make = forward_call if mode == "forward" else training_call
    calls = {}
    if options.compare_ncps:
        calls["ncps"] = at_best_threads(make(theirs, x), options.device)
        calls["our reference"] = at_best_threads(make(Reference(ours), x), options.device)
    calls["ember_ext"] = make(ours, x)
    passes = 1 if mode == "forward" else 3
    calls["the same work"] = same_work(ours, batch * steps, passes)

    def verify() -> dict[str, float]:
        few = x[:4, :64]
        exact, _ = copy.deepcopy(theirs).double()(
            few.double(), few.new_zeros(len(few), UNITS).double()
        )
        errors = {}
        for label, network in (("ncps", theirs), ("ember_ext", ours)):
            errors[label] = relative_error(network(few)[0], exact.detach())
        if not errors["ember_ext"] <= 2 * errors["ncps"] + 1e-6:
            raise AssertionError(f"{name}: {errors}")
        return errors

    macs = sum(inputs * outputs for inputs, outputs in cell_sizes(ours)) * batch * steps
    config = f"{name} [{batch}, {steps}, {INPUTS}] -> {UNITS}"
    return Case(config, mode, calls, verify, gigaflops=2e-9 * macs * passes)


def rnn_case(
    kind: type[nn.RNNBase], gates: int, batch: int, steps: int, mode: str, device: str
) -> Case:
    """A GRU or LSTM of as many units."""
    network = kind(INPUTS, UNITS, batch_first=True).to(device)
    x = torch.randn(batch, steps, INPUTS).to(device)
    make = forward_call if mode == "forward" else training_call
    macs = gates * UNITS * (INPUTS + UNITS) * batch * steps * (1 if mode == "forward" else 3)
    name = kind.__name__
    config = f"{name} [{batch}, {steps}, {INPUTS}] -> {UNITS}"
    return Case(config, mode, {name: make(network, x)}, dict, gigaflops=2e-9 * macs)


def step_case(name: str, device: str) -> Case:
    """One streaming step of one row."""
    torch.manual_seed(0)
    theirs = ncps.torch.CfC(INPUTS, copy.deepcopy(NETWORKS[name])).to(device)
    ours = copy.deepcopy(theirs)
    ember_ext.accelerate(ours)
    x, h = torch.randn(1, INPUTS).to(device), torch.zeros(1, UNITS, device=device)
    products = [(x.new_ones(o, i), x.new_ones(i)) for i, o in cell_sizes(ours)]

    def bare() -> None:
        for matrix, vector in products:
            torch.mv(matrix, vector)

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        # A single step is too short for the clock.
        def run() -> None:
            with torch.no_grad():
                for _ in range(100):
                    call()

        return at_best_threads(run, device)

    calls = {
        "ncps": repeated(lambda: theirs(x[:, None], h)),
        "ember_ext": repeated(lambda: ours.step(x, h)),
        "its products alone": repeated(bare),
    }
    return Case(f"{name}, 100 steps of [1, {INPUTS}]", "forward", calls, dict)


def cases(options: Options) -> Iterator[Case]:
    """All that `options` asks for."""
    shapes = {"main": [MAIN], "sweep": SWEEP, "all": [MAIN, *SWEEP]}[options.sizes]
    for batch, steps in shapes:
        for mode in ("forward", "forward+backward"):
            for name in NETWORKS:
                yield cfc_case(name, batch, steps, mode, options)
            yield rnn_case(nn.GRU, 3, batch, steps, mode, options.device)
            yield rnn_case(nn.LSTM, 4, batch, steps, mode, options.device)
    if options.sizes != "sweep":
        for name in NETWORKS:
            yield step_case(name, options.device)


def memory_table(batch: int, steps: int, device: torch.device) -> Table:
    """What forward leaves for backward, and how long both take, against chunk_size."""
    columns = ("network", "chunk_size", "saved MB", "of all", "forward+backward ms", "of all")
    table = Table(*columns, title=f"memory, {[batch, steps, INPUTS]}")
    x = torch.randn(batch, steps, INPUTS).to(device)
    for name in NETWORKS:
        network = ember_ext.nn.CfC(INPUTS, copy.deepcopy(NETWORKS[name])).to(device)
        # At the border a chunk's tape is needed again: what counts is the peak of both.
        whole: tuple[float, float] | None = None
        for chunk_size in (0, 128, 32, 16):
            network.chunk_size = chunk_size
            call = training_call(network, x)
            milliseconds = min(clock_of(device).seconds(call) for _ in range(4)) * 1e3
            saved = _saved_megabytes(lambda network=network: network(x))
            if chunk_size and whole:
                saved += whole[0] * min(1.0, chunk_size / steps)
            whole = whole or (saved, milliseconds)
            table.add_row(
                name, str(chunk_size or "all"), f"{saved:.0f}", f"{saved / whole[0]:.0%}",
                f"{milliseconds:.0f}", f"{milliseconds / whole[1]:.2f}",
            )  # fmt: skip
    return table


def _saved_megabytes(call: Callable[[], Any]) -> float:
    total = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal total
        total += value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        call()
    return total / 1e6


def main(options: Options) -> None:
    """Verify, time, print, write."""
    device = open_device(options.device)
    rows = run_cases("cfc_scan", cases(options), device=device, seconds=options.seconds)
    if options.sizes != "sweep":
        Console(width=120).print(memory_table(*MAIN, device))
    write_csv(rows, options.out / "cfc.csv")
    plot_csv(options.out / "cfc.csv", options.out / "cfc.png")
    print(f"Wrote {options.out / 'cfc.csv'} and {options.out / 'cfc.png'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
