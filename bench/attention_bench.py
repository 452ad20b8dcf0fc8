"""Times LIF attention against its eager form and PyTorch's ungated attention.

`python bench/attention_bench.py` checks every gated contender against the fp64 reference, times
all of them in turns, and measures the memory that each needs beyond its inputs, in a process of its
own. Prints tables and writes attention.csv, attention.png and attention_memory.csv into --out.
`--sizes step` times a training step of the paper's Transformer instead. `--help` lists the flags.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ember_ext
from ember_ext import reference
from ember_ext.benchmarking import (
    Call,
    Case,
    open_device,
    plot_csv,
    relative_error,
    run_cases,
    write_csv,
)
from ember_ext.models import Ember, EmberConfig
from ember_ext.reference.lif_attention import (
    attention_probabilities,
    gate_probabilities,
    visible_keys,
)
from ember_ext.testing import attention_tensors

# [batch, heads, tokens, head size]
SHAPES = {
    "small": [(64, 6, 128, 64)],
    "main": [(64, 6, 256, 64), (1, 6, 4096, 64)],
    "long": [(8, 6, 1024, 64), (1, 6, 8192, 64)],
}
LONGEST_EAGER = 4096
GATED = ("eager", "compiled", "ember_ext")

Attention = Callable[..., Tensor]


@dataclass
class Options:
    """What to time, for how long, and where to write it."""

    device: str = "cpu"
    """Where to run: on "cpu", or on "cuda", which is timed by CUDA events."""
    seconds: float = 5.0
    """How long to time each case, in seconds."""
    sizes: Literal["small", "main", "long", "all", "step"] = "all"
    compiled: bool = True
    """Also time torch.compile of the eager form."""
    out: Path = Path("bench/results")


def eager(
    query: Tensor, key: Tensor, value: Tensor, *gates: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """LIF attention as one would write it: the reference, with PyTorch's own dropout."""
    p = attention_probabilities(query, key, visible_keys(query, key, None, True), None)
    threshold, leak, steepness = (v.view(-1, 1, 1) for v in gates)
    w = gate_probabilities(p, threshold, leak, steepness, 1e-8)
    return F.dropout(w, dropout_p) @ value


def ungated(
    query: Tensor, key: Tensor, value: Tensor, *_: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """PyTorch's attention without a gate: less work, and the price to compare with."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)


def contenders(tokens: int, compiled: bool) -> dict[str, Attention]:
    """The functions that can be run at a length, by name."""
    functions: dict[str, Attention] = {}
    if tokens <= LONGEST_EAGER:
        functions["eager"] = eager
        if compiled:
            torch._dynamo.reset()
            functions["compiled"] = torch.compile(eager, dynamic=False)
    return functions | {"ungated SDPA": ungated, "ember_ext": ember_ext.lif_attention}


def make_call(function: Attention, leaves: list[Tensor], dropout_p: float, mode: str) -> Call:
    """A forward pass, or one with the gradients of everything that is used."""
    used = leaves[:3] if function is ungated else leaves

    def forward() -> Tensor:
        return function(*leaves, dropout_p=dropout_p)

    def both() -> object:
        out = forward()
        return torch.autograd.grad(out, used, torch.ones_like(out))

    return forward if mode == "forward" else both


def make_leaves(shape: tuple[int, int, int, int], device: str) -> list[Tensor]:
    """Random inputs, in the order in which the functions take them."""
    batch, heads, tokens, size = shape
    generator = torch.Generator().manual_seed(0)
    tensors = attention_tensors(batch, heads, heads, tokens, tokens, size, torch.float32, generator)
    return [tensor.to(device).requires_grad_() for tensor in tensors.values()]


def attention_case(
    shape: tuple[int, int, int, int], dropout_p: float, mode: str, options: Options
) -> Case:
    """The contenders for one shape and dropout."""
    batch, heads, tokens, size = shape
    leaves = make_leaves(shape, options.device)
    functions = contenders(tokens, options.compiled)

    def verify() -> dict[str, float]:
        # One head, and no more tokens than the reference has memory for in fp64.
        part = [t.detach()[:1, :1, :2048] if t.dim() == 4 else t.detach()[:1] for t in leaves]
        exact = reference.lif_attention(*(t.double() for t in part))
        errors = {
            name: relative_error(functions[name](*part), exact)
            for name in functions
            if name in GATED
        }
        for name, error in errors.items():
            assert error < 1e-5, f"{name} is off by {error:.1e}"
        return errors

    # Products of matrices under the causal mask: two forward, and backward five more.
    products = 2 if mode == "forward" else 7
    return Case(
        f"{list(shape)} dropout={dropout_p}",
        mode,
        {name: make_call(f, leaves, dropout_p, mode) for name, f in functions.items()},
        verify,
        gigaflops=products * batch * heads * tokens * tokens * size / 1e9,
    )


def attention_cases(options: Options) -> Iterator[Case]:
    """All cases of the chosen sizes."""
    for shape in chosen_shapes(options):
        for dropout_p in (0.0, 0.2) if shape[2] <= 256 else (0.0,):
            for mode in ("forward", "forward+backward"):
                yield attention_case(shape, dropout_p, mode, options)


def chosen_shapes(options: Options) -> list[tuple[int, int, int, int]]:
    """The shapes that `--sizes` asks for."""
    if options.sizes == "all":
        return [shape for shapes in SHAPES.values() for shape in shapes]
    return SHAPES[options.sizes]


def step_case(options: Options) -> Case:
    """A training step of the paper's Transformer: gated, and ungated by PyTorch's attention."""
    torch.manual_seed(0)
    idx = torch.randint(65, (64, 256), device=options.device)
    calls: dict[str, Call] = {}
    for condition in ("standard", "lif"):
        model = Ember(EmberConfig(condition=condition)).to(options.device)
        if condition == "standard":
            for block in model.blocks:
                block.attn.attend = sdpa_attend
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step(model: Ember = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            _, loss, _ = model(idx, idx)
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        calls[condition] = step
    return Case("6 layers, 6 heads, 384 wide, [64, 256]", "step", calls, lambda: {})


def sdpa_attend(
    query: Tensor, key: Tensor, value: Tensor, previous_load: Tensor | None, _: object
) -> tuple[Tensor, Tensor | None, None]:
    """What replaces `SelfAttention.attend` for plain attention with PyTorch's dropout."""
    return ungated(query, key, value, dropout_p=0.2), previous_load, None


def _resident_bytes(field: str) -> int:
    """VmRSS, the memory in use, or VmHWM, the most that ever was; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _measure_memory(
    name: str, shape: tuple[int, int, int, int], queue: multiprocessing.Queue[int]
) -> None:
    # Started first, so that threads and libraries count as there before.
    small = make_leaves((1, 1, 64, 64), "cpu")
    function = contenders(shape[2], False)[name]
    make_call(function, small, 0.0, "forward+backward")()
    leaves = make_leaves(shape, "cpu")
    before = _resident_bytes("VmRSS")
    make_call(function, leaves, 0.0, "forward+backward")()
    queue.put(_resident_bytes("VmHWM") - before)


def memory_table(options: Options, console: Console) -> None:
    """Peak memory of forward and backward beyond the inputs, on the CPU."""
    table = Table("config", "contender", "peak MB beyond the inputs")
    table.columns[2].justify = "right"
    spawn = multiprocessing.get_context("spawn")
    with (options.out / "attention_memory.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("config", "contender", "megabytes"))
        for shape in chosen_shapes(options):
            for name in contenders(shape[2], False):
                queue: multiprocessing.Queue[int] = spawn.Queue()
                process = spawn.Process(target=_measure_memory, args=(name, shape, queue))
                process.start()
                megabytes = queue.get() / 1e6
                process.join()
                writer.writerow((list(shape), name, f"{megabytes:.1f}"))
                table.add_row(f"{list(shape)}", name, f"{megabytes:.1f}")
            table.add_section()
    console.print(table)


def main(options: Options) -> None:
    """Verify, time, measure memory, print, write."""
    device = open_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [step_case(options)] if options.sizes == "step" else attention_cases(options)
    name = "attention_step" if options.sizes == "step" else "attention"
    rows = run_cases("lif_attention", cases, device=device, seconds=options.seconds)
    write_csv(rows, options.out / f"{name}.csv")
    plot_csv(options.out / f"{name}.csv", options.out / f"{name}.png")
    if device.type == "cpu" and options.sizes != "step":
        memory_table(options, Console())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
