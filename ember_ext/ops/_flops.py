"""The formulas of the operators for `torch.utils.flop_counter.FlopCounterMode`.

As in torch's own formulas, products of matrices count, 2 m n k each, and nothing else does; a mask
saves nothing, and a backward pass counts what it computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ember_ext.ops._cfc_packing import planned_cells

Shape = Sequence[int]


def _attention_products(query: Shape, key: Shape, count: int) -> int:
    """Count the operations of `count` products between all queries and all keys."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * size * count


def _cfc_products(rows: int, weights: Iterable[Shape]) -> int:
    """Count the operations of maps [out, 1 + in], bias first, applied to `rows` rows."""
    return 2 * rows * sum(out * (width - 1) for out, width in weights)


def register() -> None:
    """Tell torch the formulas, once."""
    operators = torch.ops.ember_ext

    @register_flop_formula(
        [
            operators.lif_attention,
            operators.lif_attention_forward,
            operators.refractory_lif_attention,
            operators.refractory_lif_attention_forward,
        ]
    )
    def _(query: Shape, key: Shape, *_: Any, **__: Any) -> int:
        return _attention_products(query, key, 2)

    # The scores again, then the gradients of weights, values, queries and keys.
    @register_flop_formula(operators.lif_attention_backward)
    def _(grad_out: Shape, query: Shape, key: Shape, *_: Any, **__: Any) -> int:
        return _attention_products(query, key, 5)

    @register_flop_formula(operators.refractory_lif_attention_backward)
    def _(*arguments: Any, **_: Any) -> int:
        query, key = arguments[4:6]
        return _attention_products(query, key, 5)

    @register_flop_formula([operators.cfc_scan, operators.cfc_scan_forward])
    def _(x: Shape, h0: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
        return _cfc_products(x[0] * x[1], weights)

    @register_flop_formula(operators.cfc_scan_backward)
    def _(
        grad_y: Shape,
        grad_h_last: Shape,
        saved: Shape,
        x: Shape | None,
        weights: Sequence[Shape],
        *options: Any,
        **_: Any,
    ) -> int:
        chunk, _, weight_gradients = options[-3:]
        passes = 1 + int(bool(weight_gradients)) + int(chunk > 0)
        return passes * _cfc_products(grad_y[0] * grad_y[1], weights)

    @register_flop_formula(operators.cfc_scan_packed)
    def _(
        x: Shape,
        h: Shape,
        timespans: Shape | None,
        lengths: Shape | None,
        packed: Shape,
        plan: Sequence[int],
        *_: Any,
        **__: Any,
    ) -> int:
        weights = []
        for inputs, hidden, heads, backbone in planned_cells(plan):
            widths = [inputs + hidden, *backbone]
            outs = [*backbone, heads * hidden]
            weights += [(out, 1 + width) for out, width in zip(outs, widths, strict=True)]
        rows = x[0] if len(x) == 2 else x[0] * x[1]
        return _cfc_products(rows, weights)

    without_matrix_products = ("lif_gate", "ltc_scan")

    @register_flop_formula(
        [
            getattr(operators, stem + suffix)
            for stem in without_matrix_products
            for suffix in ("", "_forward", "_backward")
        ]
    )
    def _(*_: Any, **__: Any) -> int:
        return 0
