"""Typical launches of the kernels of gates and of attention."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_costs.floors import KINDS, Workload


def gate_workloads() -> Iterator[Workload]:
    """Launches of the gate's kernels, with and without a norm."""
    batch, tokens, columns = 64, 256, 384
    elements = batch * tokens * columns
    for kind, width in KINDS.items():
        fp64, compute = width == 8, max(width, 4)
        for normed in (True, False):
            shape = f"gate {[batch, tokens, columns]}{', l2' * normed}"
            for per_column in (True, False):
                name = f"{kind}, {str(normed).lower()}, {str(per_column).lower()}"
                units = shape + ("" if per_column else ", a unit for each token")
                parameters = 3 * compute * (columns if per_column else tokens)
                # Rows in fp64 have two warps, a block, with a norm, and those with a unit two
                # tiles. A block of several rows adds up its columns in shared memory.
                threads = 64 if fp64 and normed else 128
                adds_teams = per_column and threads == 128
                yield Workload(
                    f"lif_gate_forward_kernel<{name}>",
                    units,
                    threads,
                    2 * threads // 32 * compute if normed else 0,
                    2 * width * elements + parameters,
                    (30 if normed else 24) * elements,
                    fp64,
                )
                yield Workload(
                    f"lif_gate_backward_kernel<{name}>",
                    units,
                    threads,
                    (3 * (2 if fp64 else 4) * 32 if adds_teams else 3) * threads // 32 * compute,
                    3 * width * elements + 2 * parameters,
                    (65 if normed else 45) * elements,
                    fp64,
                )
    for kind in ("float", "__nv_bfloat16", "__half"):
        width = KINDS[kind]
        for name, held, arrays, work in (("forward", 16, 1, 20), ("backward", 8, 2, 45)):
            # csrc/cuda/lif_gate.cu, rows_plan_for(); lif_gate_rows.cuh, lif_gate_rows_shared().
            lanes = -(-columns // held)
            threads = 128 if lanes <= 32 else -(-lanes // 32) * 32
            yield Workload(
                f"lif_gate_rows_{name}_kernel<{kind}>",
                f"gate {[batch, tokens, columns]}, l2",
                threads,
                threads // 32 * 12 * 4 + threads * 3 * held * arrays * width,
                (1 + arrays) * width * elements + 12 * columns,
                work * elements,
            )
    for compute_kind in ("double", "float"):
        # 1024 blocks have left sums of their 16 rows; 8 outputs take one.
        terms = 1024 * 3 * columns
        yield Workload(
            f"lif_gate_sum_kernel<{compute_kind}>",
            f"gate {[batch, tokens, columns]}, l2",
            256,
            256 * 8,
            KINDS[compute_kind] * terms,
            terms,
            fp64=True,
            blocks=3 * columns // 8,
        )


_ATTENTION = (64, 6, 256, 64)
"""Batch, heads, tokens and head size of the attention workloads, which are causal."""


def attention_shared_bytes(kind: str, units: bool) -> int:
    """Shared memory of a block's products, with matrix units enough for a GPU without them too."""
    # csrc/cuda/attention_products.cuh, AttentionProducts::kBytes.
    if units:
        return 64 * (64 + 4) * 4 + 2 * 64 * (128 + 16) + 8 * 4
    return (64 + 2 * 16) * (64 + 2) * 8 if kind == "double" else (64 + 2 * 32) * (64 + 4) * 4


def _attention_workload(
    kernel: str,
    kind: str,
    units: bool,
    products: int,
    work: float,
    size: float,
    extra: int = 0,
    variant: str = "",
) -> Workload:
    """A kernel with `products` products of pairs and `work` operations for each pair; `size` bytes.

    `extra` is shared memory beyond the products', `variant` further template arguments.
    """
    batch, heads, tokens, columns = _ATTENTION
    pairs = batch * heads * tokens * (tokens + 1) / 2
    multiplied = pairs * 2 * columns * products
    return Workload(
        f"{kernel}<{kind}, {str(units).lower()}{variant}>",
        f"attention {list(_ATTENTION)}, causal",
        256,
        attention_shared_bytes(kind, units) + extra,
        size,
        pairs * work + (0 if units else multiplied),
        kind == "double",
        products=multiplied if units else 0.0,
        tf32=kind == "float",
    )


def _parts(kind: str) -> int:
    """How many products more a gradient of the query takes: 16 bits hold its factors in parts."""
    return 1 if KINDS[kind] == 2 else 0


def attention_workloads() -> Iterator[Workload]:
    """Launches of the kernels of LIF attention, for every dtype."""
    batch, heads, tokens, columns = _ATTENTION
    for kind, units in (
        ("double", False),
        ("float", False),
        ("float", True),
        ("__nv_bfloat16", True),
        ("__half", True),
    ):
        array = batch * heads * tokens * columns * KINDS[kind]
        # A gate and two exponentials, or one and a logarithm, are about 40 operations.
        # Forward computes scores twice, backward's first kernel scores and grad_out values twice.
        for name, products, arrays in (
            ("forward", 3, 4),
            ("backward_queries", 5 + _parts(kind), 5),
            ("backward_keys", 4, 6),
            ("summary", 1, 2),
        ):
            yield _attention_workload(
                f"lif_attention_{name}_kernel", kind, units, products, 40, arrays * array
            )

    yield from _half_workloads()
    partials = batch * heads * (tokens // 64)
    yield from _sums("lif_attention_sum_gates_kernel", 3 * partials, heads)
    yield from _sums("lif_attention_sum_summary_kernel", 6 * partials, batch * heads)


def _half_workloads() -> Iterator[Workload]:
    """The kernels for 16-bit types whose scores stay in registers, for heads of 64 and 128."""
    batch, heads, tokens, _ = _ATTENTION
    pairs = batch * heads * tokens * (tokens + 1) / 2
    for columns, rows, in_registers in ((64, 64, True), (128, 16, False)):
        # csrc/cuda/half_scores.cuh, half_shared_bytes(): four tiles, and rows that are kept.
        tiles, kept = 4 * rows * 2 * columns, 0 if in_registers else 64 * 2 * columns
        array = batch * heads * tokens * columns * 2
        for name, products, work, arrays, shared in (
            ("forward", 3, 35, 4, tiles + kept),
            ("backward_queries", 4, 45, 7, tiles + 2 * kept + 64 * 4),
            ("backward_keys", 4, 40, 6, tiles + 2 * kept + 2 * rows * 16),
        ):
            for kind in ("__nv_bfloat16", "__half"):
                yield Workload(
                    f"lif_attention_half_{name}_kernel<{kind}, {columns}>",
                    f"attention {[batch, heads, tokens, columns]}, causal",
                    128,
                    shared,
                    arrays * array,
                    pairs * work,
                    products=pairs * 2 * columns * products,
                )


def _sums(kernel: str, terms: int, blocks: int) -> Iterator[Workload]:
    """A kernel that adds up numbers in fp64 over blocks, for each type of its result."""
    for compute in ("double", "float"):
        yield Workload(
            f"{kernel}<{compute}>",
            f"attention {list(_ATTENTION)}, causal",
            256,
            3 * 8 * 8,
            8 * terms,
            terms,
            fp64=True,
            blocks=blocks,
        )


def refractory_workloads() -> Iterator[Workload]:
    """Launches of the kernels of refractory LIF attention."""
    batch, heads, tokens, columns = _ATTENTION
    tiles = tokens // 64
    for kind, width in KINDS.items():
        units, compute = width == 2, max(width, 4)
        array = batch * heads * tokens * columns * width
        # One number for each pair of tokens of a batch entry, and for each tile of queries.
        square = batch * tokens * tokens * compute
        sums = batch * heads * tiles * tokens * compute
        # fp64 makes the gradients of keys and of values in turn.
        keys = (
            [
                ("backward_keys", 3, 5, 1, ", true, false"),
                ("backward_keys", 2, 4, 0, ", false, true"),
            ]
            if kind == "double"
            else [("backward_keys", 4, 6, 1, ", true, true")]
        )
        for name, products, arrays, squares, variant in (
            ("rows", 2, 2, 0, ""),
            ("out", 2, 4, 0, ""),
            ("weights", 1, 2, 1, ""),
            ("backward_rows", 4, 4, 1, ""),
            ("backward_queries", 4 + _parts(kind), 5, 1, ""),
            *keys,
            ("previous", 2, 4, 3, ""),
        ):
            extra = 17 * 64 * compute
            if name == "backward_keys":
                extra = 64 * 64 * compute if units else 0  # p, which waits there
            yield _attention_workload(
                f"refractory_lif_attention_{name}_kernel",
                kind,
                units,
                products,
                80,
                arrays * array + squares * square + sums,
                extra,
                variant,
            )

    yield from _refractory_half_workloads()

    # A thread for each key, of all heads or of the batch, or a block for 32.
    pairs = batch * heads
    for name, blocks, shared, elements in (
        ("scan", pairs * tokens // 256, 0, 2 * pairs * tiles * tokens),
        ("backward_scan", pairs * tokens // 256, 0, 2 * pairs * tiles * tokens),
        ("next_load", batch * tokens // 32, 256, 2 * batch * tokens * tokens),
        ("above", batch * tokens // 32, 256, 2 * batch * tokens * tokens),
        ("sum_previous", batch * tokens // 256, 0, batch * tiles * tokens),
    ):
        for kind in ("double", "float"):
            yield Workload(
                f"refractory_lif_attention_{name}_kernel<{kind}>",
                f"attention {list(_ATTENTION)}, causal",
                256,
                shared * KINDS[kind],
                elements * KINDS[kind],
                elements,
                kind == "double",
                blocks=blocks,
            )
    yield from _sums("refractory_lif_attention_sum_gates_kernel", 5 * pairs * tiles, heads)


def _refractory_half_workloads() -> Iterator[Workload]:
    """Refractory attention's kernels for 16-bit types whose scores stay in registers."""
    batch, heads, tokens, _ = _ATTENTION
    pairs = batch * heads * tokens * (tokens + 1) / 2
    square = batch * tokens * tokens * 4
    # The keys' loads, or c, where each 16 queries begin, and what backward knows of each query.
    blocks = batch * heads * tokens // 16 * tokens * 4
    of_rows = batch * heads * tokens * 16
    for columns, rows, in_registers in ((64, 64, True), (128, 16, False)):
        # csrc/cuda/refractory_half.cuh and half_scores.cuh, where shared memory is laid out.
        tile, tile_of_64 = rows * 2 * columns, 64 * 2 * columns
        kept = 0 if in_registers else tile_of_64
        array = batch * heads * tokens * columns * 2
        # Of 128 columns there are not the registers for two results at once.
        of_keys = 4 * tile + 2 * kept + 2 * rows * (16 + 8)
        kernels: list[tuple[str, int, int, float, int, str]] = [
            ("rows", 1, 8, 2 * array, 2 * tile + tile_of_64, ""),
            ("loads", 1, 8, 2 * array + blocks, 2 * tile + tile_of_64 + 2 * rows * 8, ""),
            ("out", 2, 40, 4 * array + blocks, 4 * tile + kept, ""),
            ("weights", 1, 40, 2 * array + blocks + square, 2 * tile_of_64, ""),
            ("delta", 2, 50, 4 * array + blocks + square + of_rows, 4 * tile + 2 * kept, ""),
            ("means", 2, 12, 5 * array, 2 * tile + tile_of_64 + 2 * rows * 16, ""),
            ("previous", 2, 50, 4 * array + blocks + 3 * square, 3 * tile_of_64, ""),
        ]
        of_queries, pairs_read = 4 * tile + 2 * kept, 2 * blocks + square
        kernels += (
            [
                ("backward_keys", 4, 65, 7 * array + pairs_read, of_keys, ", true, true"),
                ("backward_queries", 4, 65, 5 * array + pairs_read, of_queries, ", true, true"),
            ]
            if in_registers
            else [
                ("backward_keys", 3, 60, 6 * array + pairs_read, of_keys, ", true, false"),
                ("backward_keys", 2, 40, 4 * array + blocks, of_keys, ", false, true"),
                ("backward_queries", 2, 60, 4 * array + pairs_read, of_queries, ", true, false"),
                ("backward_queries", 3, 60, 5 * array + pairs_read, of_queries, ", false, true"),
            ]
        )
        for name, products, work, size, shared, variant in kernels:
            arguments = f"{columns}{variant}"
            for kind in ("__nv_bfloat16", "__half"):
                yield Workload(
                    f"refractory_lif_attention_half_{name}_kernel<{kind}, {arguments}>",
                    f"attention {[batch, heads, tokens, columns]}, causal",
                    128,
                    shared,
                    size,
                    pairs * work,
                    products=pairs * 2 * columns * products,
                )
