"""Times the LTC against ncps: `python bench/ltc_bench.py`.

Our LTC is held to ncps in fp64 before anything is timed. ncps runs at whichever of one thread and
all threads is faster. Where it would take minutes or tens of GB, for it computes synapses that do
not exist too and keeps them all, it runs fewer steps: its name says how many, and its times are
multiplied up. "its sigmoids alone" is a yardstick: a plain vectorised loop of our sigmoid, over a
buffer that stays in the cache, for as many sigmoids as the synapses that exist need. It is compiled
for the purpose from csrc/common/elementwise_math.h. A backward pass counts as another forward pass.
It is no bound: two sigmoids of the kernel share a division.

`--what` picks the measurements and `--help` lists the flags. Prints tables, and writes ltc.csv and
ltc.png, ltc_sweep.csv and ltc_sweep.png, and ltc_memory.csv into --out, where measurements of
earlier runs are kept.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ncps.torch
import torch
from ncps.wirings import AutoNCP, FullyConnected, Wiring
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ember_ext
from benchmarking import (
    Case,
    parse_options,
    peak_megabytes,
)
from ember_ext import _native
from ember_ext._command_line import at_least
from liquid import (
    MODES,
    at_best_threads,
    compare_networks,
    compare_steps,
    hundred_steps,
    measure,
    our_name,
    pass_of,
    training_call,
    write_memory,
)

NETWORKS: dict[str, tuple[Wiring, int]] = {
    "AutoNCP(19, 4)": (AutoNCP(19, 4), 20),
    "AutoNCP(32, 4)": (AutoNCP(32, 4), 20),
    "AutoNCP(64, 16)": (AutoNCP(64, 16), 20),
    "AutoNCP(192, 128)": (AutoNCP(192, 128), 128),
    "19 connected": (FullyConnected(19), 20),
    "32 connected": (FullyConnected(32), 20),
    "64 connected": (FullyConnected(64), 20),
    "192 connected": (FullyConnected(192), 128),
}
"""Each network's wiring and inputs."""
MAIN = (
    ("AutoNCP(192, 128)", 64, 256),
    ("AutoNCP(32, 4)", 32, 100),
    ("64 connected", 32, 100),
)
SWEEP = (
    *((name, batch, steps) for name in NETWORKS for batch, steps in ((1, 256), (32, 100))),
    *(("AutoNCP(32, 4)", *size) for size in ((1, 16), (1, 4096), (8, 256), (256, 64), (16, 4096))),
    *(("AutoNCP(192, 128)", *size) for size in ((1, 4096), (8, 256), (256, 16))),
)
CHUNKS = (0, 128, 64, 32, 16)
MOST_ENTRIES = {"forward": 2e8, "forward+backward": 1.2e8}
"""Entries of synapse matrices that ncps goes through in a call: a third of a second, or 2 GB."""

What = Literal["layer", "stream", "sweep", "memory"]


@dataclass
class Options:
    """What to measure, for how long, and where to write it."""

    what: tuple[What, ...] = ("layer", "stream", "memory")
    """layer: three networks and batches; stream: one row of 1000 steps, in one call and step by
    step; sweep: other networks, batches and lengths; memory: peak memory against chunk_size, on the
    CPU of a Linux machine only."""
    seconds: float = 2.0
    """How long to time each case, in seconds, and five rounds at least."""
    device: str = "cpu"
    """Where to run: on "cpu", or on "cuda", which is timed by CUDA events."""
    compare: bool = True
    """Also time ncps, which takes most of the time."""
    out: Path = Path("bench/results")


def networks(name: str, device: str) -> tuple[nn.Module, ember_ext.nn.LTC]:
    """A network of ncps, and ours with the same weights."""
    torch.manual_seed(0)
    wiring, inputs = NETWORKS[name]
    # Building a wiring twice would draw more synapses.
    theirs = ncps.torch.LTC(inputs, copy.deepcopy(wiring))
    ours = ember_ext.nn.LTC(inputs, copy.deepcopy(wiring))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device), ours.to(device)


def sigmoids(network: Any, mode: str) -> int:
    """Of one step of one row, by the synapses that exist."""
    cell = network.rnn_cell
    recurrent, sensory = (
        int(mask.sum()) for mask in (cell.sparsity_mask, cell.sensory_sparsity_mask)
    )
    return (sensory + cell._ode_unfolds * recurrent) * (1 if mode == "forward" else 2)


def entries(network: Any) -> int:
    """Of the matrices that ncps goes through in one step of one row."""
    cell = network.rnn_cell
    size = int(cell.state_size)
    return size * (int(cell.sensory_size) + int(cell._ode_unfolds) * size)


@functools.cache
def sigmoid_loop() -> Callable[[Tensor, Tensor, int], None] | None:
    """loop(from, to, times), of our own sigmoid; None without a compiler or sources."""
    header = Path(__file__).parent.parent / "csrc" / "common" / "elementwise_math.h"
    source = f"""
        #include "{header}"
        extern "C" void loop(const float* from, float* to, long n, long times) {{
          for (long k = 0; k < times; ++k) {{
            #pragma omp simd
            for (long i = 0; i < n; ++i) to[i] = ember::sigmoid(from[i]);
            asm volatile("" ::: "memory");
          }}
        }}
    """
    avx2 = ["-mavx2", "-mfma"]
    flags = {
        "avx2": avx2,
        "avx512": [*avx2, "-mavx512f", "-mavx512dq", "-mprefer-vector-width=512"],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "loop.cpp")
        path.write_text(source, encoding="utf-8")
        command = ["c++", "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp-simd"]
        command += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
        command += [*flags.get(_native.isa, []), str(path), "-o", f"{folder}/loop.so"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(f"{folder}/loop.so")

    def loop(source: Tensor, target: Tensor, times: int) -> None:
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (source, target))
        library.loop(*pointers, ctypes.c_long(len(source)), ctypes.c_long(times))

    return loop


def sigmoids_alone(count: int, device: str) -> Callable[[], Any] | None:
    """As many sigmoids as the synapses need, on all threads; None where there is no such loop."""
    loop = sigmoid_loop() if device == "cpu" else None
    if loop is None:
        return None
    threads, size = torch.get_num_threads(), 4096
    buffers = [(torch.randn(size), torch.empty(size)) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)
    times = max(1, round(count / size / threads))
    return lambda: list(pool.map(lambda pair: loop(*pair, times), buffers))


def ltc_case(name: str, batch: int, steps: int, mode: str, options: Options) -> Case:
    """The contenders for one network and size."""
    theirs, ours = networks(name, options.device)
    inputs = NETWORKS[name][1]
    x = torch.randn(batch, steps, inputs, device=options.device)
    make = pass_of(mode)
    calls: dict[str, Callable[[], Any]] = {}
    factors: dict[str, float] = {}
    if options.compare:
        few = min(steps, max(1, int(MOST_ENTRIES[mode] / (entries(ours) * batch))))
        contender = "ncps" if few == steps else f"ncps, by {few} of the steps"
        factors[contender] = steps / few
        calls[contender] = at_best_threads(make(theirs, x[:, :few]), options.device)
    calls[our_name(x.device)] = make(ours, x)
    count = sigmoids(ours, mode) * batch * steps
    alone = sigmoids_alone(count, options.device)
    if alone:
        calls["its sigmoids alone"] = alone
    config = f"{name} {[batch, steps, inputs]}"
    verify = functools.partial(compare_networks, name, theirs, ours, x, 16)
    return Case(config, mode, calls, verify, factors=factors)


def step_case(name: str, options: Options) -> Case:
    """One streaming step of one row."""
    theirs, ours = networks(name, options.device)
    x = torch.randn(1, NETWORKS[name][1], device=options.device)
    h = x.new_zeros(1, ours.state_size)
    tiny = ember_ext.nn.LTC(1, 1, ode_unfolds=1).to(options.device)
    nothing, none = x[:, :1], h[:, :1]

    calls = (
        {"ncps": hundred_steps(lambda: theirs(x[:, None], h), options.device)}
        if options.compare
        else {}
    )
    calls[our_name(x.device)] = hundred_steps(lambda: ours.step(x, h), options.device)
    calls["a step of one unit"] = hundred_steps(lambda: tiny.step(nothing, none), options.device)

    verify = functools.partial(compare_steps, name, theirs, ours, x, h)
    return Case(f"{name}, 100 steps of [1, {x.shape[1]}]", "forward", calls, verify)


def cases(options: Options) -> Iterator[Case]:
    """All that `options` asks for and that is timed."""
    if "layer" in options.what:
        for mode in MODES:
            for size in MAIN:
                yield ltc_case(*size, mode, options)
    if "stream" in options.what:
        yield ltc_case("AutoNCP(32, 4)", 1, 1000, "forward", options)
        for name in ("AutoNCP(19, 4)", "AutoNCP(32, 4)", "AutoNCP(192, 128)"):
            yield step_case(name, options)


def sweep_cases(options: Options) -> Iterator[Case]:
    """Other networks, batches and lengths."""
    for mode in MODES:
        for size in SWEEP:
            yield ltc_case(*size, mode, options)


def make_training(kind: str, steps: int, chunk_size: int) -> Callable[[], Any]:
    """A forward and backward pass of the largest network whose memory is to be measured."""
    name, batch, _ = MAIN[0]
    theirs, ours = networks(name, "cpu")
    ours.chunk_size = chunk_size
    network = theirs if kind == "ncps" else ours
    inputs = NETWORKS[name][1]
    training_call(network, torch.randn(2, 3, inputs))()
    return training_call(network, torch.randn(batch, steps, inputs))


def memory_table(console: Console, path: Path) -> None:
    """Peak memory of training beyond the inputs and weights, and its time, against chunk_size."""
    columns = ("network", "chunk_size", "peak MB", "of ncps")
    table = Table(*columns, title="memory of a forward and backward pass")
    name, batch, steps = MAIN[0]
    few = (2, 6)
    first, last = (peak_megabytes(make_training, "ncps", count, 0) for count in few)
    # It grows by the same with every step.
    theirs = first + (last - first) / (few[1] - few[0]) * (steps - few[0])
    config = f"{name} [{batch}, {steps}]"
    lines = [(f"{config}, ncps, by {few[0]} and {few[1]} steps", "", f"{theirs:.0f}", "100 %")]
    for chunk in CHUNKS:
        peak = peak_megabytes(make_training, "ours", steps, chunk)
        lines.append((config, str(chunk or "all"), f"{peak:.0f}", f"{peak / theirs:.2%}"))
    for line in lines:
        table.add_row(*line)
    console.print(table)
    write_memory(path, columns, lines)


def main(options: Options) -> None:
    """Verify, time, print, write."""
    measure("ltc", options, cases, sweep_cases, memory_table)


if __name__ == "__main__":
    main(parse_options(Options, __doc__, seconds=at_least(0)))
