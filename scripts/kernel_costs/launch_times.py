"""How long launches of typical shape take each part of a GPU, from what their loops issue.

`rows` computes these times beside the counts, and beside them the measured time where one is given.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_costs import WORKLOADS, machine_code
from kernel_costs.floors import KINDS as WIDTHS
from kernel_costs.instructions import CFC_BACKBONE, CFC_UNITS, Counted, cfc_weights
from kernel_costs.machine_code import KINDS, UNITS, Units, unit_seconds
from kernel_costs.scan_workloads import LTC_NETWORKS

DTYPES = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}


@dataclass(frozen=True)
class Launch:
    """A launch of typical shape.

    Attributes:
        shape: in words.
        work: how many units.
        size: bytes of memory that are read and written.
        passes: its name in bench/kernel_times.py, or "".
        blocks: of the launch, where they are too few to fill a GPU.
        cached: bytes that each multiprocessor reads from the second-level cache.
    """

    shape: str
    work: float
    size: float
    passes: str = ""
    blocks: int | None = None
    cached: float = 0.0


def _gate_launches(counted: Counted, kernels: Mapping[str, object]) -> Iterator[Launch]:
    name_of = re.fullmatch(
        r"lif_gate_(rows_)?(\w+)_kernel<(\w+)(?:, (\w+), (\w+))?>", counted.kernel
    )
    assert name_of is not None
    rows, name, kind, normed, per_column = name_of.groups()
    norm = "l2" if rows or normed == "true" else None
    shapes = [(64, 256, 384), (64, 1024, 1024)]
    if per_column == "false":
        shapes = shapes[:1]
    elif not rows and norm and f"lif_gate_rows_{name}_kernel<{kind}>" in kernels:
        # What rows of whole vectors do not take.
        shapes = [(64, 1024, 1020)] if kind != "float" else []
    for shape in shapes:
        elements = shape[0] * shape[1] * shape[2]
        size = (2 if name == "forward" else 3) * WIDTHS[kind] * elements
        words = f"gate {list(shape)}, {norm or 'no norm'}"
        if per_column == "false":
            yield Launch(f"{words}, a unit for each token", elements, size)
        else:
            passes = f"lif_gate {list(shape)} {DTYPES[kind]} norm={norm}"
            yield Launch(words, elements, size, passes)


_ARRAYS = {
    "forward": 4,
    "backward_queries": 5,
    "backward_keys": 6,
    "half_forward": 4,
    "half_backward_queries": 7,
    "half_backward_keys": 6,
}
"""Arrays of tokens x columns that a kernel of attention reads or writes, once each."""


def _scores(batch: int, heads: int, tokens: int) -> float:
    """Scores of causal attention in tiles that have at least one."""
    tiles = tokens // 64
    return batch * heads * tiles * (tiles + 1) / 2 * 64 * 64


def _attention_launches(counted: Counted, _: Mapping[str, object]) -> Iterator[Launch]:
    name, kind = re.findall(r"lif_attention_(\w+)_kernel<(\w+)", counted.kernel)[0]
    for batch, heads, tokens in machine_code.SHAPES:
        shape = [batch, heads, tokens, 64]
        size = _ARRAYS[name] * batch * heads * tokens * 64 * WIDTHS[kind]
        passes = f"lif_attention {shape} {DTYPES[kind]} dropout=0.0"
        yield Launch(f"attention {shape}, causal", _scores(batch, heads, tokens), size, passes)


def _refractory_launches(counted: Counted, _: Mapping[str, object]) -> Iterator[Launch]:
    kind = re.findall(r"<(\w+)", counted.kernel)[0]
    for workload in WORKLOADS:
        if workload.kernel == counted.kernel:
            passes = f"refractory_lif_attention [64, 6, 256, 64] {DTYPES[kind]}"
            yield Launch(workload.shape, _scores(64, 6, 256), workload.bytes, passes)


def _cfc_launches(counted: Counted, _: Mapping[str, object]) -> Iterator[Launch]:
    for workload in WORKLOADS:
        if workload.kernel != counted.kernel:
            continue
        if "product" in counted.kernel:
            yield Launch(workload.shape, workload.operations / 2, workload.bytes)
        else:
            weights, held = cfc_weights(counted.kernel)
            yield Launch(
                f"{workload.shape}, with a backbone of {CFC_BACKBONE}",
                64 * 256 * CFC_UNITS,
                workload.bytes,
                "CfC dense [64, 256, 128] -> 192",
                workload.blocks,
                workload.steps * weights * (1 - held),
            )


def _ltc_launches(counted: Counted, _: Mapping[str, object]) -> Iterator[Launch]:
    for workload in WORKLOADS:
        if workload.kernel == counted.kernel:
            network = next(n for n in LTC_NETWORKS if workload.shape.endswith(n.name))
            work = network.batch * network.steps * 6 * network.recurrent
            yield Launch(workload.shape, work, workload.bytes, blocks=workload.blocks)


_LAUNCHES = (
    ("lif_gate", _gate_launches),
    ("lif_attention", _attention_launches),
    ("refractory", _refractory_launches),
    ("cfc", _cfc_launches),
    ("ltc", _ltc_launches),
)


def read_measured(path: Path) -> dict[tuple[str, str], float]:
    """Read what bench/kernel_times.py has written: milliseconds by pass and kernel."""
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["pass"], row["kernel"]): float(row["ms"]) for row in csv.DictReader(file)}


def rows(
    counted: Sequence[Counted],
    units: Sequence[Units] = UNITS,
    measured: Mapping[tuple[str, str], float] | None = None,
) -> list[dict[str, str | float]]:
    """What the loops issue, and what each GPU needs for it, for typical shapes.

    With `measured`, only what has been measured, beside its time.
    """
    kernels = {c.kernel: None for c in counted}
    table: list[dict[str, str | float]] = []
    for one in counted:
        launches = next(f for name, f in _LAUNCHES if one.kernel.startswith(name))
        for launch in launches(one, kernels):
            took = (measured or {}).get((launch.passes, one.kernel))
            if measured is not None and took is None:
                continue
            for gpu in units:
                filled = min(1.0, (launch.blocks or gpu.multiprocessors) / gpu.multiprocessors)
                seconds = unit_seconds(one.cost, launch.work / filled, launch.size, gpu)
                # 64 bytes a clock.
                seconds["cache"] = launch.cached / 64 / gpu.clock
                least = max(seconds.values())
                row: dict[str, str | float] = {
                    "kernel": one.kernel,
                    "unit": one.unit,
                    "shape": launch.shape,
                    "gpu": gpu.name,
                    "instructions": round(one.cost.instructions, 1),
                }
                row |= {kind: round(one.cost.kinds[kind], 2) for kind in KINDS}
                row |= {f"us {unit}": round(1e6 * s, 1) for unit, s in seconds.items()}
                row["us at least"] = round(1e6 * least, 1)
                if took is not None:
                    row["us measured"] = round(1e3 * took, 1)
                    row["measured / at least"] = round(took / 1e3 / least, 2)
                table.append(row)
    return table
