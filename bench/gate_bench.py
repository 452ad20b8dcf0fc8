"""Times the LIF gate against its reference, eager and compiled: `python bench/gate_bench.py`.

The fused gate is held to the fp64 reference before anything is timed. Prints a table and writes
gate.csv and gate.png into --out. `--help` lists the flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import ember_ext
from benchmarking import (
    Call,
    Case,
    open_device,
    parse_options,
    relative_error,
    run_cases,
    write_csv,
)
from ember_ext import reference
from ember_ext._command_line import at_least
from ember_ext.testing import Sample, check_sample, gate_parameters
from plots import plot_csv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAIN_SHAPE = (64, 256, 384)
SHAPES = {
    "small": [(1, 128)],
    "main": [MAIN_SHAPE],
    "large": [MAIN_SHAPE, (64, 256, 128), (16, 1000, 513)],
    # More than a GPU's cache holds.
    "huge": [(64, 1024, 1024)],
}


@dataclass
class Options:
    """What to time, for how long, and where to write it."""

    device: str = "cpu"
    """Where to run: on "cpu", or on "cuda", which is timed by CUDA events."""
    seconds: float = 1.0
    """How long to time each case, in seconds."""
    sizes: Literal["small", "main", "large", "huge", "all"] = "all"
    """"all" is without "huge", which is for GPUs."""
    compiled: bool = True
    """Also time torch.compile of the reference."""
    out: Path = Path("bench/results")


def gate_case(
    shape: tuple[int, ...], dtype: torch.dtype, norm: str | None, mode: str, options: Options
) -> Case:
    """The contenders for one shape, dtype, norm and mode."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    tensors = {"x": x, **gate_parameters(shape[-1], generator)}
    sample = Sample(f"{list(shape)}", tensors, {"norm": norm}).to(options.device)
    leaves = [t.requires_grad_(mode != "forward") for t in sample.tensors.values()]
    grad_y = torch.randn(shape, generator=generator).to(sample.tensors["x"])
    functions: dict[str, Callable[..., Tensor]] = {"eager reference": reference.lif_gate}
    if options.compiled:
        torch._dynamo.reset()
        functions["compiled reference"] = torch.compile(reference.lif_gate, dynamic=False)
    functions["ember_ext"] = ember_ext.lif_gate

    def call(function: Callable[..., Tensor]) -> Call:
        def forward() -> Tensor:
            return function(*leaves, norm=norm)

        def both() -> object:
            return torch.autograd.grad(forward(), leaves, grad_y)

        return forward if mode == "forward" else both

    def verify() -> dict[str, float]:
        exact = reference.lif_gate(*(t.detach().double() for t in leaves), norm=norm)
        check_sample(ember_ext.lif_gate, reference.lif_gate, sample)
        return {
            name: relative_error(function(*leaves, norm=norm), exact)
            for name, function in functions.items()
        }

    # The tensors of x's size that have to be read or written: x, y; and grad_y, x, grad_x.
    passes = 2 if mode == "forward" else 5
    return Case(
        f"{list(shape)} {str(dtype)[6:]} norm={norm}",
        mode,
        {name: call(function) for name, function in functions.items()},
        verify,
        gigabytes=passes * x.numel() * x.element_size() / 1e9,
    )


def main(options: Options) -> None:
    """Verify, time, print, write."""
    device = open_device(options.device)
    sizes = SHAPES["small"] + SHAPES["large"] if options.sizes == "all" else SHAPES[options.sizes]
    cases = (
        gate_case(shape, dtype, norm, mode, options)
        for shape in sizes
        for dtype in DTYPES
        if dtype == torch.float32 or shape in (MAIN_SHAPE, *SHAPES["huge"])
        for norm in (None, "l2")
        for mode in ("forward", "forward+backward")
    )
    rows = run_cases("lif_gate", cases, device=device, seconds=options.seconds)
    write_csv(rows, options.out / "gate.csv")
    plot_csv(options.out / "gate.csv", options.out / "gate.png")
    print(f"Wrote {options.out / 'gate.csv'} and {options.out / 'gate.png'}")


if __name__ == "__main__":
    main(parse_options(Options, __doc__, seconds=at_least(0)))
