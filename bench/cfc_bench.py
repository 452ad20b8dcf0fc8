"""Times the CfC against ncps, our reference, GRU and LSTM: `python bench/cfc_bench.py`.

Our CfC is held to ncps in fp64 before anything is timed. ncps runs at whichever of
one thread and all threads is faster: its threads spin when the machine is busy, which would flatter
us. "its arithmetic alone" is a yardstick: PyTorch computes as many multiply-adds as the network
has, as one matrix product of a good shape, and as many tanh and sigmoid, over a buffer that stays
in a CPU's cache (on a GPU, in its memory, which our kernels do without). It is no bound: a kernel
may multiply faster than that product. GRU and LSTM have rows of their own, whose rates can be
compared with ours.

`--what` picks the measurements and `--help` lists the flags. Prints tables, and writes cfc.csv and
cfc.png, cfc_sweep.csv and cfc_sweep.png, and cfc_memory.csv into --out, where measurements of
earlier runs are kept.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ncps.torch
import torch
from ncps.wirings import AutoNCP
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ember_ext
from benchmarking import (
    Case,
    Clock,
    parse_options,
    peak_megabytes,
    training_step,
)
from ember_ext import reference
from ember_ext._command_line import at_least
from ember_ext.models import LiquidEmber, LiquidEmberConfig
from ember_ext.nn.cfc import _weights
from liquid import (
    MODES,
    at_best_threads,
    compare_networks,
    compare_steps,
    held_to_ncps,
    hundred_steps,
    measure,
    our_name,
    pass_of,
    training_call,
    write_memory,
)

INPUTS, UNITS, MOTOR = 128, 192, 128
NETWORKS: dict[str, Any] = {
    "wired": AutoNCP(UNITS, MOTOR),
    "dense": UNITS,
    "wired 32": AutoNCP(32, 4),
    "wired 64": AutoNCP(64, 16),
    "dense 32": 32,
    "dense 64": 64,
}
MAIN_NETWORKS = ("wired", "dense")
"""Those of 192 units."""
SMALL_NETWORKS = tuple(name for name in NETWORKS if name not in MAIN_NETWORKS)
MAIN = (64, 256)
SWEEP = [(1, 16), (1, 256), (1, 4096), (8, 256), (64, 16), (256, 64), (16, 4096)]
SMALL_SWEEP = [(1, 256), (32, 100), (256, 64)]
CHUNKS = (0, 128, 64, 32, 16)
MODEL_CHUNKS = (0, 64)

What = Literal["layer", "stream", "sweep", "mixed", "model", "memory"]


@dataclass
class Options:
    """What to measure, for how long, and where to write it."""

    what: tuple[What, ...] = ("layer", "stream", "memory", "model")
    """layer: 64 rows of 256 steps, with GRU and LSTM; stream: one row, in one call and step by
    step; sweep: other batches, lengths and numbers of units; mixed: with mixed memory; model: a
    training step of LiquidEmber; memory: peak memory against chunk_size, and of the model, on the
    CPU of a Linux machine only."""
    seconds: float = 2.0
    """How long to time each case, in seconds, and five rounds at least."""
    device: str = "cpu"
    """Where to run: on "cpu", or on "cuda", which is timed by CUDA events."""
    compare: bool = True
    """Also time ncps and our reference, which take most of the time."""
    out: Path = Path("bench/results")


def cell_sizes(network: ember_ext.nn.CfC) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix product of a step, time_a and time_b folded into one."""
    sizes = []
    for cell in network._cells:
        weights, _ = _weights(cell)
        sizes += [(affine.weight.shape[1], len(affine.bias)) for affine in weights.backbone]
        sizes.append((weights.ff1.weight.shape[1], 3 * len(weights.ff1.bias)))
    return sizes


def multiply_adds(network: ember_ext.nn.CfC, mode: str) -> int:
    """Of one step of one row."""
    return sum(i * o for i, o in cell_sizes(network)) * (1 if mode == "forward" else 3)


def arithmetic_alone(network: ember_ext.nn.CfC, rows: int, mode: str) -> Callable[[], None]:
    """The arithmetic of `rows` steps of one row, see the top of this file."""
    width, device = 512, next(network.parameters()).device
    height = max(1, multiply_adds(network, mode) * rows // width**2)
    left, right = (torch.randn(n, width, device=device) for n in (height, width))
    out = torch.empty_like(left)
    sigmoids = rows * network.state_size
    tanhs = rows * sum(outputs for _, outputs in cell_sizes(network)) - sigmoids
    # Of a size that stays in a CPU's cache; on a GPU, one launch for each function.
    values = torch.randn(1 << 16 if device.type == "cpu" else max(tanhs, sigmoids), device=device)
    activated = torch.empty_like(values)

    def run() -> None:
        torch.mm(left, right, out=out)
        for function, count in ((torch.tanh, tanhs), (torch.sigmoid, sigmoids)):
            for _ in range(count // len(values)):
                function(values, out=activated)
            few = count % len(values)
            function(values[:few], out=activated[:few])

    return run


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


def networks(name: str, device: str, **options: Any) -> tuple[nn.Module, ember_ext.nn.CfC]:
    """A network of ncps, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = ncps.torch.CfC(INPUTS, copy.deepcopy(NETWORKS[name]), **options)
    ours = ember_ext.nn.CfC(INPUTS, copy.deepcopy(NETWORKS[name]), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device), ours.to(device)


def cfc_case(name: str, batch: int, steps: int, mode: str, options: Options) -> Case:
    """The contenders for one network and size."""
    theirs, ours = networks(name, options.device)
    x = torch.randn(batch, steps, INPUTS, device=options.device)
    make = pass_of(mode)
    calls = {}
    if options.compare:
        calls["ncps"] = at_best_threads(make(theirs, x), options.device)
        calls["our reference"] = at_best_threads(make(Reference(ours), x), options.device)
    calls[our_name(x.device)] = make(ours, x)
    calls["its arithmetic alone"] = arithmetic_alone(ours, batch * steps, mode)

    work = multiply_adds(ours, mode) * batch * steps
    config = f"{name} [{batch}, {steps}, {INPUTS}] -> {ours.state_size}"
    verify = functools.partial(compare_networks, name, theirs, ours, x, 64)
    return Case(config, mode, calls, verify, gigaflops=2e-9 * work)


def rnn_case(kind: type[nn.RNNBase], gates: int, mode: str, device: str) -> Case:
    """A GRU or LSTM of as many units."""
    batch, steps = MAIN
    network = kind(INPUTS, UNITS, batch_first=True).to(device)
    x = torch.randn(batch, steps, INPUTS, device=device)
    make = pass_of(mode)
    macs = gates * UNITS * (INPUTS + UNITS) * batch * steps * (1 if mode == "forward" else 3)
    name = kind.__name__
    config = f"{name} [{batch}, {steps}, {INPUTS}] -> {UNITS}"
    return Case(config, mode, {name: make(network, x)}, dict, gigaflops=2e-9 * macs)


def step_case(name: str, options: Options) -> Case:
    """One streaming step of one row."""
    theirs, ours = networks(name, options.device)
    x = torch.randn(1, INPUTS, device=options.device)
    h = x.new_zeros(1, UNITS)
    products = [(x.new_ones(o, i), x.new_ones(i)) for i, o in cell_sizes(ours)]

    def bare() -> None:
        for matrix, vector in products:
            torch.mv(matrix, vector)

    calls = (
        {"ncps": hundred_steps(lambda: theirs(x[:, None], h), options.device)}
        if options.compare
        else {}
    )
    calls[our_name(x.device)] = hundred_steps(lambda: ours.step(x, h), options.device)
    calls["its products alone"] = hundred_steps(bare, options.device)

    verify = functools.partial(compare_steps, name, theirs, ours, x, h)
    return Case(f"{name}, 100 steps of [1, {INPUTS}]", "forward", calls, verify)


def mixed_case(name: str, mode: str, options: Options) -> Case:
    """With an LSTM cell between the steps."""
    theirs, ours = networks(name, options.device, mixed_memory=True)
    x = torch.randn(*MAIN, INPUTS, device=options.device)
    make = pass_of(mode)
    calls = {"ncps": at_best_threads(make(theirs, x), options.device)} if options.compare else {}
    calls[our_name(x.device)] = at_best_threads(make(ours, x), options.device)
    verify = functools.partial(compare_networks, name, theirs, ours, x, 64)
    return Case(f"{name}, mixed memory {[*MAIN, INPUTS]}", mode, calls, verify)


def language_model(kind: str, device: str, chunk_size: int | None = None) -> LiquidEmber:
    """A LiquidEmber, 4 layers of 128 and 192 units, with our CfC or with ncps', of equal weights.

    chunk_size: of our CfC; None leaves the model's.
    """
    torch.manual_seed(0)
    model = LiquidEmber(LiquidEmberConfig(n_layer=4, n_embd=MOTOR, cfc_units=UNITS))
    for block in model.blocks:
        if chunk_size is not None:
            block.cfc.chunk_size = chunk_size
        if kind == "ncps":
            theirs = ncps.torch.CfC(MOTOR, copy.deepcopy(NETWORKS["wired"]))
            theirs.load_state_dict(block.cfc.state_dict())
            block.cfc = theirs
    return model.to(device)


def model_step(kind: str, device: str, chunk_size: int | None = None) -> Callable[[], None]:
    """A training step of the language model; see `language_model`."""
    model = language_model(kind, device, chunk_size)
    return training_step(model, torch.randint(model.config.vocab_size, MAIN, device=device))


def model_case(options: Options) -> Case:
    """A training step of the language model."""
    device = options.device
    calls = {}
    if options.compare:
        calls["ncps"] = at_best_threads(model_step("ncps", device), device)
    calls[our_name(torch.device(device))] = model_step("ours", device)

    def verify() -> dict[str, float]:
        theirs, ours = (language_model(kind, device).eval() for kind in ("ncps", "ours"))
        idx = torch.randint(ours.config.vocab_size, (2, 32), device=device)
        # ncps in a model starts from a state in fp32.
        exact, *_ = language_model("ours", device).eval().double()(idx)
        name = "logits of LiquidEmber"
        return held_to_ncps(name, exact, theirs(idx)[0], ours(idx)[0])

    return Case(f"LiquidEmber 4/{MOTOR}/{UNITS} {list(MAIN)}", "training step", calls, verify)


def cases(options: Options) -> Iterator[Case]:
    """All that `options` asks for and that is timed."""
    if "layer" in options.what:
        for mode in MODES:
            for name in MAIN_NETWORKS:
                yield cfc_case(name, *MAIN, mode, options)
            yield rnn_case(nn.GRU, 3, mode, options.device)
            yield rnn_case(nn.LSTM, 4, mode, options.device)
    if "stream" in options.what:
        for name in MAIN_NETWORKS:
            yield cfc_case(name, 1, 1024, "forward", options)
            yield step_case(name, options)
    if "mixed" in options.what:
        for mode in MODES:
            for name in MAIN_NETWORKS:
                yield mixed_case(name, mode, options)
    if "model" in options.what:
        yield model_case(options)


def sweep_cases(options: Options) -> Iterator[Case]:
    """Other batches, lengths and numbers of units."""
    for batch, steps in SWEEP:
        for mode in MODES:
            for name in MAIN_NETWORKS:
                yield cfc_case(name, batch, steps, mode, options)
    for batch, steps in SMALL_SWEEP:
        for mode in MODES:
            for name in SMALL_NETWORKS:
                yield cfc_case(name, batch, steps, mode, options)


def make_training(name: str, chunk_size: int, batch: int, steps: int) -> Callable[[], Any]:
    """A forward and backward pass whose memory is to be measured."""
    network = ember_ext.nn.CfC(INPUTS, copy.deepcopy(NETWORKS[name]), chunk_size=chunk_size)
    training_call(network, torch.randn(2, 3, INPUTS))()
    return training_call(network, torch.randn(batch, steps, INPUTS))


def make_step(kind: str, chunk_size: int) -> Callable[[], Any]:
    """A training step whose memory is to be measured."""
    make_training("wired", 0, 2, 3)
    return model_step(kind, "cpu", chunk_size)


def memory_table(console: Console, path: Path) -> None:
    """Peak memory of training beyond the inputs and weights, and its time, against chunk_size."""
    columns = ("network", "chunk_size", "peak MB", "of all", "time ms", "of all")
    table = Table(*columns, title="memory of a forward and backward pass, or a training step")
    lines: list[tuple[str, ...]] = []

    def add(config: str, calls: dict[int, Callable[[], Any]], peaks: dict[int, float]) -> None:
        """Time the calls in turns, by chunk_size, and add a line for each."""
        times: dict[int, list[float]] = {chunk_size: [] for chunk_size in calls}
        for _ in range(5):
            for chunk_size, call in calls.items():
                times[chunk_size].append(Clock().seconds(call))
        best = {chunk_size: 1e3 * min(values) for chunk_size, values in times.items()}
        for chunk_size in calls:
            lines.append((
                config, str(chunk_size or "all"), f"{peaks[chunk_size]:.0f}",
                f"{peaks[chunk_size] / peaks[0]:.0%}", f"{best[chunk_size]:.0f}",
                f"{best[chunk_size] / best[0]:.2f}",
            ))  # fmt: skip

    for batch, steps, chunks in ((*MAIN, CHUNKS), (4, 4096, CHUNKS[:3])):
        for name in MAIN_NETWORKS:
            calls = {chunk: make_training(name, chunk, batch, steps) for chunk in chunks}
            peaks = {
                chunk: peak_megabytes(make_training, name, chunk, batch, steps) for chunk in chunks
            }
            add(f"{name} {[batch, steps, INPUTS]}", calls, peaks)
    model = f"LiquidEmber 4/{MOTOR}/{UNITS} {list(MAIN)}"
    peaks = {chunk: peak_megabytes(make_step, "ours", chunk) for chunk in MODEL_CHUNKS}
    add(model, {chunk: make_step("ours", chunk) for chunk in MODEL_CHUNKS}, peaks)
    theirs = peak_megabytes(make_step, "ncps", 0)
    lines.append((f"{model}, ncps", "", f"{theirs:.0f}", f"{theirs / peaks[0]:.0%}", "", ""))
    for line in lines:
        table.add_row(*line)
    console.print(table)
    write_memory(path, (*columns[:3], "peak of all", *columns[4:5], "time of all"), lines)


def main(options: Options) -> None:
    """Verify, time, print, write."""
    measure("cfc", options, cases, sweep_cases, memory_table)


if __name__ == "__main__":
    main(parse_options(Options, __doc__, seconds=at_least(0)))
