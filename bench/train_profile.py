"""Says where the time of a training step of `scripts/reproduce.py` goes, part by part.

`python bench/train_profile.py` makes steps of one run of a suite as the trainer makes them, on
random characters, under torch's profiler. Prints a table and writes train_profile.csv into --out.
`--help` lists the flags.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from benchmarking import Call, clock_of, open_device, parse_options
from ember_ext import _native
from ember_ext._command_line import at_least
from ember_ext._machine import machine, processor
from ember_ext.paper.runs.suites import SuiteName, plan
from ember_ext.paper.training import ConfigError, TrainConfig, build_model
from ember_ext.paper.training.config import Backbone

VOCABULARY = 65

PARTS = {
    "ember_ext: CfC scan": r"ember(_ext)?::.*(cfc|ltc)",
    "ember_ext: gates and attention": r"ember(_ext)?::",
    "matrix products": r"aten::(add|b|ba)?(mm|ddbmm)$|gemm|cutlass|cublas",
    "attention of PyTorch": r"scaled_dot_product|flash|efficient_attention",
    "random numbers of dropout": r"bernoulli|dropout",
    "GELU": r"gelu",
    "copies": r"aten::(copy_|cat|clone|contiguous)$|Memcpy",
    "AdamW and the gradient's norm": r"adam|foreach|norm$",
}
"""The parts of a step, and the operators or kernels of each: the first pattern that fits counts."""

REST = "the rest, mostly elementwise"


@dataclass
class Options:
    """What to profile, and where to write it."""

    suite: SuiteName = "stated"
    """The sizes."""
    backbone: Backbone = "cfc"
    condition: str = "lif"
    """A variant of the suite."""
    device: str = "cpu"
    threads: int | None = None
    """Threads of the CPU. Default: torch's."""
    steps: int = 5
    """Steps that are timed, and as many that are profiled."""
    out: Path = Path("bench/results")


def training_calls(config: TrainConfig, device: torch.device) -> tuple[Call, Call]:
    """A training step as the trainer makes it, and the loss of one batch of an evaluation."""
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY).to(device)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(config.weight_decay), lr=config.learning_rate, fused=True
    )
    shape = (config.batch_size, config.block_size)
    inputs, targets = (torch.randint(VOCABULARY, shape, device=device) for _ in range(2))

    def step() -> None:
        loss = model(inputs, targets)[1]
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        # The trainer looks at every loss.
        loss.item()

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        model(inputs, targets)[1].item()
        model.train()

    return step, evaluate


def seconds_by_part(events: Sequence[Any], device: torch.device) -> dict[str, float]:
    """The profiler's own times of all operators or kernels, added up by part."""
    parts = dict.fromkeys([*PARTS, REST], 0.0)
    for event in events:
        on_device = device.type != "cpu"
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        part = next((name for name, fit in PARTS.items() if re.search(fit, event.key)), REST)
        parts[part] += own / 1e6
    return parts


def main(options: Options) -> None:
    """Time, profile, print, write."""
    device = open_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    what = (options.suite, (), [options.condition], [options.backbone])
    try:
        spec = plan(*what, device=options.device)[0]
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    step, evaluate = training_calls(spec.config, device)
    clock, times = clock_of(device), {}
    for name, call in (("training step", step), ("evaluation batch", evaluate)):
        call()
        times[name] = statistics.median(clock.seconds(call) for _ in range(options.steps))
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(options.steps):
            step()
    parts = seconds_by_part(profiler.key_averages(), device)
    total = sum(parts.values())
    rows = [
        {
            "suite": options.suite,
            "backbone": options.backbone,
            "condition": options.condition,
            "part": part,
            "ms": f"{1e3 * seconds / options.steps:.1f}",
            "share": f"{seconds / total:.0%}",
            "device": processor(device),
            "threads": torch.get_num_threads(),
            "isa": _native.isa,
            "torch": torch.__version__,
        }
        for part, seconds in sorted(parts.items(), key=lambda item: -item[1])
        if seconds
    ]
    table = Table("part", "ms a step", "share", title=f"{spec.name}: {machine(device)}")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("part", "ms", "share")))
    Console(width=110).print(table)
    for name, seconds in times.items():
        print(f"{name}: {seconds:.3f} s (median of {options.steps}, without the profiler)")
    path = options.out / "train_profile.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main(parse_options(Options, __doc__, steps=at_least(1), threads=at_least(1)))
