"""Says where the time of a forward and backward pass goes, kernel by kernel.

`python bench/kernel_times.py` runs every operator, and PyTorch's ungated attention, GRU and LSTM,
on a GPU under torch's profiler; on a CPU it lists PyTorch's operators instead of kernels. Results
are not checked here: `python -m ember_ext` and the other benches do that. Prints a table and writes
kernels.csv into --out. `--help` lists the flags.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ncps.wirings import AutoNCP
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ember_ext
from benchmarking import Call, clock_of, copy_call, open_device, parse_options
from ember_ext._command_line import at_least, within
from ember_ext._machine import machine
from ember_ext.testing import attention_tensors, gate_parameters, refractory_tensors

INPUTS, UNITS, MOTOR = 128, 192, 128
CALLS = 5


@dataclass
class Options:
    """Where to run, how much, and where to write it."""

    device: str = "cuda"
    scale: int = 1
    """What batches and lengths are divided by, for a CPU."""
    shown: int = 8
    """How many of the slowest kernels of each pass are kept."""
    out: Path = Path("bench/results")


def gradients(function: Callable[..., Any], leaves: list[Tensor], **arguments: Any) -> Call:
    """Forward, and backward to all leaves that the first output depends on."""

    def forward() -> Tensor:
        out = function(*leaves, **arguments)
        return out if isinstance(out, Tensor) else out[0]

    grad = torch.ones_like(forward())

    def run() -> object:
        return torch.autograd.grad(forward(), leaves, grad, allow_unused=True)

    return run


def attention_passes(device: torch.device, scale: int) -> Iterator[tuple[str, Call]]:
    """LIF attention beside SDPA without a gate, and refractory attention."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens = 64 // scale, 256 // scale
    shapes = [(batch, tokens, 0.0), (batch, tokens, 0.2), (1, 4096 // scale, 0.0)]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, length, dropout_p in shapes:
            tensors = attention_tensors(rows, 6, 6, length, length, 64, dtype, generator)
            leaves = [tensor.to(device).requires_grad_() for tensor in tensors.values()]
            name = f"{list(leaves[0].shape)} {str(dtype)[6:]} dropout={dropout_p}"
            kept = {"dropout_p": dropout_p, "is_causal": True}
            yield f"lif_attention {name}", gradients(ember_ext.lif_attention, leaves, **kept)
            sdpa = gradients(F.scaled_dot_product_attention, leaves[:3], **kept)
            yield f"SDPA {name}", sdpa
        tensors = refractory_tensors(batch, 6, 6, tokens, 0, 64, dtype, generator)
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors.values()]
        name = f"{list(leaves[0].shape)} {str(dtype)[6:]}"
        operator = ember_ext.ops.refractory_lif_attention
        yield f"refractory_lif_attention {name}", gradients(operator, leaves, is_causal=True)


def gate_passes(device: torch.device, scale: int) -> Iterator[tuple[str, Call]]:
    """The LIF gate, and a copy that is bound by the memory's bandwidth."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((64 // scale, 256, 384), (64 // scale, 1024, 1024)):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            parameters = gate_parameters(shape[-1], generator).values()
            leaves = [x, *(value.to(device) for value in parameters)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            for norm in (None, "l2"):
                name = f"{list(shape)} {str(dtype)[6:]} norm={norm}"
                yield f"lif_gate {name}", gradients(ember_ext.lif_gate, leaves, norm=norm)
    copy, gigabytes = copy_call(268 / scale, device)
    yield f"copy of {gigabytes:.3g} GB read and written", copy


def recurrent_passes(device: torch.device, scale: int) -> Iterator[tuple[str, Call]]:
    """The CfC, and PyTorch's GRU and LSTM of as many units."""
    torch.manual_seed(0)
    networks: list[tuple[str, nn.Module, int, int]] = [
        ("CfC wired", ember_ext.nn.CfC(INPUTS, AutoNCP(UNITS, MOTOR)), 64, 256),
        ("CfC dense", ember_ext.nn.CfC(INPUTS, UNITS), 64, 256),
        ("CfC dense", ember_ext.nn.CfC(INPUTS, UNITS), 256, 256),
        ("CfC dense", ember_ext.nn.CfC(INPUTS, UNITS), 1, 1024),
        ("GRU", nn.GRU(INPUTS, UNITS, batch_first=True), 64, 256),
        ("LSTM", nn.LSTM(INPUTS, UNITS, batch_first=True), 64, 256),
    ]
    for name, network, batch, steps in networks:
        network.to(device)
        shape = (max(batch // scale, 1), steps // scale, INPUTS)
        x = torch.randn(shape, device=device).requires_grad_()
        parameters = [p for p in network.parameters() if p.requires_grad]

        def run(x: Tensor, *_: Tensor, network: nn.Module = network) -> Any:
            return network(x)

        yield f"{name} {list(shape)} -> {UNITS}", gradients(run, [x, *parameters])


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces and parameters."""
    return re.sub(r"^void |ember::cuda::|at::native::|\(anonymous namespace\)::|\(.*$", "", kernel)


def kernel_rows(name: str, call: Call, device: torch.device, shown: int) -> list[tuple[str, ...]]:
    """For each of the slowest kernels: pass, ms of the pass, kernel, launches and ms of a pass."""
    for _ in range(3):
        call()
    clock = clock_of(device)
    whole = 1e3 * statistics.median(clock.seconds(call) for _ in range(CALLS))
    on_gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as profiler:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize()

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=microseconds, reverse=True)
    return [
        (name, f"{whole:.3f}", short_name(event.key), f"{event.count // CALLS}",
         f"{microseconds(event) / CALLS / 1e3:.4f}")
        for event in events[:shown] if microseconds(event) > 0
    ]  # fmt: skip


def main(options: Options) -> None:
    """Run, print, write."""
    device = open_device(options.device)
    columns = ("pass", "ms of the pass", "kernel", "launches", "ms")
    table = Table(*columns, title=f"forward and backward: {machine(device)}")
    rows: list[tuple[str, ...]] = []
    for passes in (attention_passes, gate_passes, recurrent_passes):
        for name, call in passes(device, options.scale):
            found = kernel_rows(name, call, device, options.shown)
            rows += found
            for number, row in enumerate(found):
                table.add_row(*(row[:2] if number == 0 else ("", "")), *row[2:])
            table.add_section()
    Console(width=160).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "kernels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


if __name__ == "__main__":
    main(parse_options(Options, __doc__, scale=within(1, 64), shown=at_least(1)))
