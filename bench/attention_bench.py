"""Times LIF attention against its eager form and PyTorch's ungated attention.

`python bench/attention_bench.py` checks every gated contender against the fp64 reference, times
all of them in turns, and measures the memory that each needs beyond its inputs, in a process of its
own. `--what refractory` does the same for refractory LIF attention, and `--what model` for one
training step of the paper's Transformer with and without gates. Prints tables and writes NAME.csv,
NAME.png (but for the model) and NAME_memory.csv into --out, with NAME attention,
refractory_attention or attention_step. `--help` lists the flags.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ember_ext
from benchmarking import (
    Call,
    Case,
    open_device,
    parse_options,
    peak_megabytes,
    relative_error,
    run_cases,
    training_step,
    with_earlier,
    write_csv,
)
from ember_ext import reference
from ember_ext._command_line import at_least, one_of
from ember_ext._machine import processor
from ember_ext.models import Ember, EmberConfig
from ember_ext.reference.lif_attention import (
    attention_probabilities,
    gate_probabilities,
    visible_keys,
)
from ember_ext.reference.refractory_lif_attention import refractory_weights
from ember_ext.testing import attention_tensors, refractory_tensors
from plots import plot_csv

Shape = tuple[int, int, int, int]
What = Literal["attention", "refractory", "model"]

SHAPES: list[Shape] = [
    (64, 4, 128, 32),
    (64, 6, 128, 64),
    (64, 6, 256, 64),
    (8, 6, 1024, 64),
    (1, 6, 4096, 64),
    (1, 6, 8192, 64),
]
"""[batch, heads, tokens, head size]"""
LONGEST_EAGER = 4096
OTHER_RESULTS = ("ungated SDPA", "plain lif_attention")
"""Contenders that compute less and are there to compare the price."""
NAMES = {
    "attention": "attention",
    "refractory": "refractory_attention",
    "model": "attention_step",
}

Contender = Callable[..., tuple[Tensor, ...]]
Leaves = dict[str, Tensor]


@dataclass
class Options:
    """What to time, for how long, and where to write it."""

    what: What = "attention"
    tokens: tuple[int, ...] = (128, 256, 1024, 4096, 8192)
    """Which lengths to time; the model has the paper's."""
    device: str = "cpu"
    """Where to run: on "cpu", or on "cuda", which is timed by CUDA events."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of query, key and value; the model trains under autocast to it."""
    seconds: float = 5.0
    """How long to time each case, in seconds; no contender is timed less than three times."""
    compiled: bool = True
    """Also time torch.compile of the eager form."""
    timing: bool = True
    memory: bool = True
    """Measure memory; on a CPU, under Linux only."""
    append: bool = False
    """Keep the rows of other cases that the files in --out hold."""
    out: Path = Path("bench/results")


def eager(
    query: Tensor, key: Tensor, value: Tensor, *gates: Tensor, dropout_p: float
) -> tuple[Tensor]:
    """LIF attention as one would write it: the reference, with PyTorch's own dropout."""
    p = attention_probabilities(query, key, visible_keys(query, key, None, True), None)
    threshold, leak, steepness = (v.view(-1, 1, 1) for v in gates)
    w = gate_probabilities(p, threshold, leak, steepness, 1e-8)
    return (F.dropout(w.to(value.dtype), dropout_p) @ value,)


def ungated(
    query: Tensor, key: Tensor, value: Tensor, *_: Tensor, dropout_p: float
) -> tuple[Tensor]:
    """PyTorch's attention without a gate: less work, and the price to compare with."""
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True)
    return (out,)


def fused(*leaves: Tensor, dropout_p: float) -> tuple[Tensor]:
    """`ember_ext.lif_attention` of the first six leaves."""
    return (ember_ext.lif_attention(*leaves[:6], dropout_p=dropout_p, is_causal=True),)


def eager_refractory(
    query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Refractory LIF attention as one would write it."""
    *gates, previous_load = rest
    w, load, _ = refractory_weights(query, key, *gates, previous_load=previous_load)
    return F.dropout(w.to(value.dtype), dropout_p) @ value, load


def fused_refractory(*leaves: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """`ember_ext.ops.refractory_lif_attention`, without the sums to carry on from."""
    *tensors, previous_load = leaves
    out, load, _ = ember_ext.ops.refractory_lif_attention(
        *tensors, previous_load=previous_load, dropout_p=dropout_p, is_causal=True
    )
    return out, load


def exact_results(what: What, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """What the contenders' results are compared with."""
    doubles = [leaf.double() for leaf in leaves]
    if what == "refractory":
        *tensors, previous_load = doubles
        return reference.refractory_lif_attention(
            *tensors, previous_load=previous_load, is_causal=True
        )[:2]
    out = reference.lif_attention(*doubles, is_causal=True)
    assert isinstance(out, Tensor)
    return (out,)


def contenders(what: What, tokens: int, compiled: bool) -> dict[str, Contender]:
    """The functions that can be run at a length, by name."""
    plain = eager if what == "attention" else eager_refractory
    functions: dict[str, Contender] = {}
    if tokens <= LONGEST_EAGER:
        functions["eager"] = plain
        if compiled:
            torch._dynamo.reset()
            functions["compiled"] = torch.compile(plain, dynamic=False)
    if what == "refractory":
        return functions | {"plain lif_attention": fused, "ember_ext": fused_refractory}
    return functions | {"ungated SDPA": ungated, "ember_ext": fused}


def make_call(function: Contender, leaves: list[Tensor], dropout_p: float, mode: str) -> Call:
    """A forward pass, or one with the gradients of everything that is used."""

    def forward() -> tuple[Tensor, ...]:
        return function(*leaves, dropout_p=dropout_p)

    def both() -> object:
        outputs = forward()
        ones = [torch.ones_like(out) for out in outputs]
        return torch.autograd.grad(outputs, leaves, ones, allow_unused=True)

    return forward if mode == "forward" else both


def make_leaves(what: What, shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs, in the order in which the functions take them."""
    batch, heads, tokens, size = shape
    generator = torch.Generator().manual_seed(0)
    if what == "refractory":
        tensors = refractory_tensors(batch, heads, heads, tokens, 0, size, dtype, generator)
        tensors["previous_load"] = torch.rand(batch, tokens, tokens, generator=generator) / tokens
    else:
        tensors = attention_tensors(batch, heads, heads, tokens, tokens, size, dtype, generator)
    return [tensor.to(device).requires_grad_() for tensor in tensors.values()]


def part_of(leaf: Tensor, tokens: int) -> Tensor:
    """What one head of the first batch entry sees of a leaf, and no more tokens than `tokens`."""
    leaf = leaf.detach()
    if leaf.dim() == 4:
        return leaf[:1, :1, :tokens]
    return leaf[:1, :tokens, :tokens] if leaf.dim() == 3 else leaf[:1]


def attention_case(what: What, shape: Shape, dropout_p: float, mode: str, options: Options) -> Case:
    """The contenders for one shape and dropout."""
    batch, heads, tokens, size = shape
    dtype = getattr(torch, options.dtype)
    leaves = make_leaves(what, shape, options.device, dtype)
    functions = contenders(what, tokens, options.compiled)
    plain = eager if what == "attention" else eager_refractory

    def verify() -> dict[str, float]:
        part = [part_of(leaf, 2048) for leaf in leaves]
        exact = exact_results(what, part)

        def error(function: Contender) -> float:
            return max(map(relative_error, function(*part, dropout_p=0.0), exact))

        bound = max(1e-5, 2 * error(plain) if dtype != torch.float32 else 0.0)
        errors: dict[str, float] = {}
        for name in (name for name in functions if name not in OTHER_RESULTS):
            errors[name] = error(functions[name])
            assert errors[name] < bound, (
                f"{name} is off by {errors[name]:.1e}, more than {bound:.1e}"
            )
        return errors

    # Products of matrices under the causal mask: two forward, and backward five more.
    products = 2 if mode == "forward" else 7
    return Case(
        f"{list(shape)} dropout={dropout_p}" + (f" {options.dtype}" * (dtype != torch.float32)),
        mode,
        {name: make_call(f, leaves, dropout_p, mode) for name, f in functions.items()},
        verify,
        gigaflops=products * batch * heads * tokens * tokens * size / 1e9,
        dtype=dtype,
    )


def attention_cases(options: Options) -> Iterator[Case]:
    """All cases of the chosen lengths."""
    for shape in chosen_shapes(options):
        for dropout_p in (0.0, 0.2) if shape[2] <= 256 else (0.0,):
            for mode in ("forward", "forward+backward"):
                yield attention_case(options.what, shape, dropout_p, mode, options)


def chosen_shapes(options: Options) -> list[Shape]:
    """The shapes of the chosen lengths."""
    return [shape for shape in SHAPES if shape[2] in options.tokens]


MODEL_CONTENDERS = ("standard with SDPA", "lif", "lif-refractory")


def make_model(contender: str, device: str, fused: bool = False) -> Ember:
    """The paper's Transformer, with the gates of a condition; without any by SDPA, or `fused`."""
    torch.manual_seed(0)
    condition: Any = "standard" if contender == MODEL_CONTENDERS[0] else contender
    model = Ember(EmberConfig(condition=condition)).to(device)
    if condition == "standard" and not fused:
        for block in model.blocks:
            block.attn.attend = functools.partial(sdpa_attend, block.attn)
    return model


def make_step(contender: str, device: str, dtype: torch.dtype) -> Call:
    """One training step of `make_model`."""
    idx = torch.randint(65, (64, 256), device=device)
    return training_step(make_model(contender, device), idx, dtype)


def sdpa_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous_load: Tensor | None,
    _: object,
) -> tuple[Tensor, Tensor | None, None]:
    """What replaces `SelfAttention.attend` for plain attention with PyTorch's dropout."""
    dropout_p = 0.2 if module.training else 0.0
    return ungated(query, key, value, dropout_p=dropout_p)[0], previous_load, None


def model_case(options: Options) -> Case:
    """One training step: gated, and ungated by PyTorch's attention."""
    dtype = getattr(torch, options.dtype)
    calls = {name: make_step(name, options.device, dtype) for name in MODEL_CONTENDERS}

    def verify() -> dict[str, float]:
        idx = torch.randint(65, (1, 64), device=options.device)
        errors: dict[str, float] = {}
        for name in MODEL_CONTENDERS:
            exact = make_model(name, options.device, fused=True).eval().double()(idx)[0]
            with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
                logits = make_model(name, options.device).eval()(idx)[0]
            errors[name] = relative_error(logits, exact.detach())
            # Under autocast, held to what it costs the model without gates.
            bound = max(1e-5, 2 * errors[MODEL_CONTENDERS[0]] if dtype != torch.float32 else 0.0)
            assert errors[name] < bound, f"{name} is off by {errors[name]:.1e}, not {bound:.1e}"
        return errors

    config = "6 layers, 6 heads, 384 wide, [64, 256]"
    if dtype != torch.float32:
        config += f" autocast to {options.dtype}"
    return Case(config, "step", calls, verify)


def make_measured(
    what: What, name: str, shape: Shape | None, device: str, dtype: torch.dtype
) -> Call:
    """A step of the model, or forward and backward of a shape, whose memory is to be measured."""
    small = make_leaves("attention", (1, 1, 64, 64), device, dtype)
    make_call(eager, small, 0.0, "forward+backward")()
    if shape is None:
        return make_step(name, device, dtype)
    function = contenders(what, shape[2], False)[name]
    return make_call(function, make_leaves(what, shape, device, dtype), 0.0, "forward+backward")


def memory_table(options: Options, path: Path, console: Console) -> None:
    """Peak memory: of forward and backward beyond the inputs, or of a model's step."""
    beyond = "model" if options.what == "model" else "inputs"
    table = Table("config", "contender", f"peak MB beyond the {beyond}")
    table.columns[2].justify = "right"
    shapes = [None] if options.what == "model" else chosen_shapes(options)
    rows: list[tuple[str, ...]] = []
    where = processor(torch.device(options.device)), str(torch.get_num_threads())
    for shape in shapes:
        names = MODEL_CONTENDERS
        if shape is not None:
            names = tuple(contenders(options.what, shape[2], False))
        config = "training step" if shape is None else f"{list(shape)}"
        config += f" {options.dtype}" * (options.dtype != "float32")
        for name in names:
            dtype = getattr(torch, options.dtype)
            peak = peak_megabytes(make_measured, options.what, name, shape, options.device, dtype)
            rows.append((config, name, f"{peak:.1f}", *where))
            table.add_row(*rows[-1][:3])
        table.add_section()
    console.print(table)
    kept: list[tuple[str, ...]] = []
    if options.append and path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            measured = {(*row[:2], row[3]) for row in rows}
            earlier = [tuple(row) for row in csv.reader(file)][1:]
            kept = [row for row in earlier if (*row[:2], row[3]) not in measured]
    columns = ("config", "contender", "megabytes", "device", "threads")
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *kept, *rows])


def main(options: Options) -> None:
    """Verify, time, measure memory, print, write."""
    device = open_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    name = NAMES[options.what]
    if options.timing:
        cases = iter([model_case(options)]) if options.what == "model" else attention_cases(options)
        rows = run_cases(name, cases, device=device, seconds=options.seconds, least=3)
        path = options.out / f"{name}.csv"
        if options.append:
            rows = with_earlier(rows, path)
        if options.what == "model":
            write_csv(rows, path)
        else:
            shapes = [f"{list(shape)}" for shape in SHAPES]
            rows.sort(key=lambda row: shapes.index(row.config.split(" dropout")[0]))
            write_csv(rows, path)
            plot_csv(path, path.with_suffix(".png"))
    if options.memory:
        memory_table(options, options.out / f"{name}_memory.csv", Console())


if __name__ == "__main__":
    lengths = sorted({shape[2] for shape in SHAPES})
    main(parse_options(Options, __doc__, seconds=at_least(0), tokens=one_of(*lengths)))
