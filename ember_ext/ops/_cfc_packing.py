"""Weights of CfC cells as the raw operators take them, and laid out for many calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ember_ext.ops import _checks
from ember_ext.ops._cfc_checks import ACTIVATIONS, MODES, OP, Activation, Mode
from ember_ext.ops._packed import Packed
from ember_ext.ops._watch import Watch
from ember_ext.reference.cfc_scan import Affine, CfCWeights


def raw_arguments(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None,
    timespans: Tensor | float,
    lengths: Tensor | None,
    mode: str,
    activation: str,
    dropout_scale: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the raw operators, without `chunk`, for checked ones of `cfc_scan`."""
    dtype = _checks.compute_dtype(x.dtype)
    batch, steps, _ = x.shape
    if isinstance(timespans, Tensor):
        timespans = timespans.to(dtype)
    varying = isinstance(timespans, Tensor) and timespans.dim() > 0
    maps = joined_maps(weights, mode, None if varying else timespans, dtype)
    decay = spans = None
    if mode == "pure":
        decay = _decay(weights, dtype)
        if not isinstance(timespans, Tensor):
            # A product keeps the float symbolic. To fill a tensor, torch.compile would make a
            # constant of it.
            spans = (x.new_ones((), dtype=dtype) * timespans).expand(batch, steps)
        elif not varying:
            spans = timespans.expand(batch, steps)
    if varying:
        spans = timespans.reshape(batch, steps)  # type: ignore[union-attr]
    if h0 is None:
        state = x.new_zeros(batch, weights.ff1.bias.shape[0], dtype=dtype)
    else:
        state = h0.to(dtype)
    return (
        x,
        state,
        maps,
        spans,
        lengths,
        None if dropout_scale is None else dropout_scale.to(dtype),
        decay,
        MODES.index(mode),
        ACTIVATIONS.index(activation),
    )


def tensors_of(weights: CfCWeights) -> list[Tensor]:
    """All tensors of a cell."""
    leaves = torch.utils._pytree.tree_leaves(weights)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _decay(weights: CfCWeights, dtype: torch.dtype) -> Tensor:
    """w_tau and A, [2, H]."""
    assert weights.w_tau is not None
    assert weights.amplitude is not None
    return torch.stack([weights.w_tau, weights.amplitude]).to(dtype)


def joined_maps(
    weights: CfCWeights, mode: str, timespan: Tensor | float | None, dtype: torch.dtype
) -> list[Tensor]:
    """The affine maps of a cell as matrices [out, 1 + in], bias first: backbone, then all heads.

    The heads lie below each other and are masked: ff1, ff2, time_a, time_b; only ff1 in mode
    "pure". With one `timespan` for all steps, time_a and time_b come to a single head,
    Δt time_a + time_b.
    """
    maps = [_joined(affine, dtype) for affine in weights.backbone]
    return [*maps, _joined_heads(weights, mode, timespan, dtype)]


def _joined(affine: Affine, dtype: torch.dtype) -> Tensor:
    """An affine map as one matrix [out, 1 + in], the bias first."""
    return torch.cat([affine.bias.to(dtype)[:, None], affine.weight.to(dtype)], 1)


def _joined_heads(
    weights: CfCWeights, mode: str, timespan: Tensor | float | None, dtype: torch.dtype
) -> Tensor:
    """The heads below each other, [heads * H, 1 + Z]."""
    heads = [weights.ff1] if weights.ff2 is None else [weights.ff1, weights.ff2]
    if mode == "pure":
        heads = heads[:1]
    matrices = [_joined(head, dtype) for head in heads]
    if weights.mask is not None:
        mask = torch.nn.functional.pad(weights.mask.to(dtype), (1, 0), value=1.0)
        matrices = [matrix * mask for matrix in matrices]
    if mode != "pure":
        assert weights.time_a is not None
        assert weights.time_b is not None
        time_a, time_b = _joined(weights.time_a, dtype), _joined(weights.time_b, dtype)
        matrices += [time_a, time_b] if timespan is None else [timespan * time_a + time_b]
    return torch.cat(matrices)


def round_matrices(weights: CfCWeights, dtype: torch.dtype) -> CfCWeights:
    """The weights with their matrices, but not the biases, rounded to a dtype."""

    def low(affine: Affine | None) -> Affine | None:
        return None if affine is None else Affine(affine.weight.to(dtype), affine.bias)

    return weights._replace(
        ff1=Affine(weights.ff1.weight.to(dtype), weights.ff1.bias),
        ff2=low(weights.ff2),
        time_a=low(weights.time_a),
        time_b=low(weights.time_b),
        backbone=tuple(Affine(w.to(dtype), b) for w, b in weights.backbone),
    )


class PackedCells(Packed):
    """Cells stacked on each other, with their weights laid out once for many calls.

    `run` returns the last cell's states, and the final states of all cells.

    Args:
        cells: each cell's weights; a cell's input is the state of the one before.
        mode: of all cells, see `cfc_scan`.
        activation: of all backbones.
        timespan: the Δt of every step, or None if it is given with each call. Default: 1.
        watch: of all that the weights come from; begun before they are handed over here. Default:
            none.
    """

    op = OP

    def __init__(
        self,
        cells: Sequence[CfCWeights],
        *,
        mode: Mode = "default",
        activation: Activation = "lecun_tanh",
        timespan: float | None = 1.0,
        watch: Watch | None = None,
    ) -> None:
        dtype = _checks.compute_dtype(cells[0].ff1.weight.dtype)
        plan, tensors = [ACTIVATIONS.index(activation), MODES.index(mode)], []
        for weights in cells:
            maps = joined_maps(weights, mode, timespan, dtype)
            hidden = weights.ff1.bias.shape[0]
            plan += [maps[0].shape[1] - 1 - hidden, hidden, len(maps[-1]) // hidden]
            plan += [len(maps), *(len(matrix) for matrix in maps[:-1])]
            tensors += maps
            if mode == "pure":
                tensors.append(_decay(weights, dtype))
        super().__init__(
            torch.ops.ember_ext.cfc_scan_packed.default,
            torch.ops.ember_ext.cfc_scan_pack(tensors, plan),
            tuple(plan),
            dtype=dtype,
            timespan=timespan if mode == "pure" else None,
            watch=watch,
        )


def planned_cells(plan: Sequence[int]) -> Iterator[tuple[int, int, int, list[int]]]:
    """(inputs, hidden, heads, the backbone's widths) of each cell of a plan."""
    at = 2
    while at < len(plan):
        inputs, hidden, heads, layers = plan[at : at + 4]
        at += 3 + layers
        yield inputs, hidden, heads, list(plan[at - layers + 1 : at])
