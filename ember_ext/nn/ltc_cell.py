"""An LTC cell's parameters as the operator takes them, and whether they say what it computes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import ncps.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ember_ext import _native
from ember_ext.nn._arguments import count, fail
from ember_ext.nn._cell import LiquidCell
from ember_ext.nn._plain import OURS, why_differs, why_part_differs
from ember_ext.ops import _checks
from ember_ext.ops.ltc_scan import ltc_scan, ltc_synapses
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights

_METHODS = {
    name: getattr(ncps.torch.LTCCell, name)
    for name in ("_sigmoid", "_ode_solver", "_map_inputs", "_map_outputs")
}
"""The functions that ncps' cell computes with, as imported. Someone may replace them later."""

POSITIVE = ("w", "sensory_w", "cm", "gleak")
"""The weights that an LTC cell keeps positive."""


class _Listed(NamedTuple):
    """The synapses of two masks, and copies of these to compare with."""

    masks: tuple[Tensor, Tensor]
    synapses: LTCSynapses
    binary: bool


def mapping_names(side: str, mapping: Any) -> list[str]:
    """The parameters of an "input" or "output" mapping, which is "affine", "linear" or none."""
    weight, bias = f"{side}_w", f"{side}_b"
    return [weight, bias] if mapping == "affine" else [weight] if mapping == "linear" else []


def why_ltc_cell_differs(cell: Any) -> str | None:
    """The reason why an LTC cell's weights do not tell what it computes; None if they do."""
    if reason := why_differs(cell, ncps.torch.LTCCell):
        return reason
    if not isinstance(cell, LiquidCell):
        stale: Any = cell._params
        for name, value in stale.items():
            if cell._parameters.get(name) is not value:
                return f".{name} is another one than its forward computes with"
    if name := has_own_methods(cell):
        return f" has a {name} of its own"
    positive = nn.Softplus if isinstance(cell.make_positive_fn, nn.Softplus) else nn.Identity
    return why_part_differs(cell, "make_positive_fn", positive)


def adopt(cell: Any) -> None:
    """Make an ncps cell one of ours; a subclass stays as it is."""
    if type(cell) is ncps.torch.LTCCell:
        cell.__class__ = OURS[ncps.torch.LTCCell]
        cell.__dict__.pop("_params", None)


def release(cell: Any) -> None:
    """Make one of our cells an ncps cell again; a subclass stays as it is."""
    if type(cell) is OURS[ncps.torch.LTCCell]:
        parameters = cell._params
        for name in ("_listed", "_packed"):
            cell.__dict__.pop(name, None)
        cell.__class__ = ncps.torch.LTCCell
        cell._params = parameters


def why_not_ncps(cell: Any) -> str | None:
    """The reason why ncps' cell would not compute what one of ours does; None if it would."""
    if not isinstance(cell, LiquidCell):
        return None
    if type(cell) is not OURS[ncps.torch.LTCCell]:
        return f" is a {type(cell).__name__}, which follows its parameters"
    parameters: Any = cell._params
    for name in parameters:
        if name not in cell._parameters:
            return f".{name} is computed, which ncps would not follow"
    return None


def has_own_methods(cell: Any) -> str | None:
    """Which of the functions that a cell computes with is not that of ncps; None if all are."""
    own, kind = cell.__dict__, type(cell)
    for name, method in _METHODS.items():
        if name in own or getattr(kind, name) is not method:
            return name
    return None


def compute_weight_hooks(cell: nn.Module) -> None:
    """Run what computes a cell's weights before each call, as ncps' layers never call the cell.

    That is pruning, and weight and spectral norm of the old kind.
    """
    for hook in cell._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(cell, ())


_WEIGHT_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


class Ready(NamedTuple):
    """An LTC cell's parameters as the operator takes them."""

    weights: LTCWeights
    synapses: LTCSynapses | None

    @classmethod
    def of(cls, cell: Any) -> Ready:
        """The parameters that the module has now, differentiable, and the synapses of its masks."""
        masks = _masks(cell)
        listed = _list(cell, masks)
        values = {}
        for name in LTCWeights._fields:
            value = getattr(cell, name)
            # A rounded transform of a weight would add to the error of half dtypes.
            value = value.to(_checks.compute_dtype(value.dtype))
            values[name] = cell.make_positive_fn(value) if name in POSITIVE else value
        if listed is None or not listed.binary:
            values["w"] = values["w"] * masks[0]
            values["sensory_w"] = values["sensory_w"] * masks[1]
        return cls(LTCWeights(**values), None if listed is None else listed.synapses)


def _masks(cell: Any) -> tuple[Tensor, Tensor]:
    masks = cell.sparsity_mask, cell.sensory_sparsity_mask
    for name, mask, weight in zip(
        ("sparsity_mask", "sensory_sparsity_mask"), masks, (cell.w, cell.sensory_w), strict=True
    ):
        if mask.shape != weight.shape:
            fail("LTCCell", name, f"shaped as its weights, {list(weight.shape)}", list(mask.shape))
    return masks


def _list(cell: Any, masks: tuple[Tensor, Tensor]) -> _Listed | None:
    """The synapses that the masks do not rule out, or None where all have to be computed.

    Users change masks, also past autograd, so they are compared with what was listed. A trace
    cannot look at them, and a mask's own gradient needs the synapses that do not exist.
    """
    for mask in masks:
        if type(mask) not in (Tensor, nn.Parameter) or mask.device.type not in ("cpu", "cuda"):
            return None
        if mask.requires_grad and torch.is_grad_enabled():
            return None
        if mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or _native.transforms_active()
    ):
        return None
    known: _Listed | None = cell.__dict__.get("_listed")
    if known is not None and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(known.masks, masks, strict=True)
    ):
        return known
    with torch.no_grad():
        exist = tuple(mask != 0 for mask in masks)
        # A mask of zeros and ones needs no multiplication; any other mask weighs its synapses.
        binary = all(bool((mask == e).all()) for mask, e in zip(masks, exist, strict=True))
        copies = masks[0].detach().clone(), masks[1].detach().clone()
        listed = _Listed(copies, ltc_synapses(*exist), binary)
    if isinstance(cell, LiquidCell):
        cell.__dict__["_listed"] = listed
    return listed


def check_solver(layer: str, ode_unfolds: Any, epsilon: Any) -> tuple[int, float]:
    """`ode_unfolds` and `epsilon`, or an error that says what they must be."""
    ode_unfolds = count(layer, "ode_unfolds", ode_unfolds)
    if ode_unfolds < 1:
        fail(layer, "ode_unfolds", ">= 1", ode_unfolds)
    if not isinstance(epsilon, Real):
        fail(layer, "epsilon", "a real number", type(epsilon).__name__, TypeError)
    epsilon = float(epsilon)
    if not 0 <= epsilon < math.inf:
        fail(layer, "epsilon", "finite and >= 0", epsilon)
    return ode_unfolds, epsilon


def map_inputs(cell: Any, x: Tensor) -> Tensor:
    """A cell's input mapping of x, [..., I]."""
    return mapped(x, *mapping(cell, "input"))


def map_outputs(cell: Any, y: Tensor) -> Tensor:
    """A cell's output mapping of the states of its motor neurons, [..., M]."""
    return mapped(y, *mapping(cell, "output"))


def mapping(cell: Any, side: str) -> list[Tensor]:
    """The weight and the bias of a cell's input or output mapping, or the first of them, or none.

    Args:
        cell: an LTC cell.
        side: "input" or "output".
    """
    names = mapping_names(side, getattr(cell, f"_{side}_mapping"))
    return [getattr(cell, name) for name in names]


def mapped(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x times the weight, plus the bias, where there are such."""
    if bias is not None:
        return torch.addcmul(bias, x, weight)  # type: ignore[arg-type]
    return x if weight is None else x * weight


def output_width(cell: Any) -> int:
    """Width of a cell's output, M."""
    return min(int(cell.motor_size), int(cell.state_size))


def scan(
    cell: Any,
    ready: Ready,
    u: Tensor,
    h0: Tensor,
    timespans: Tensor | float,
    lengths: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A cell over a sequence: the states of its motor neurons [B, T, M] and the final state [B, S].

    Args:
        cell: an LTC cell of ncps or ours.
        ready: its parameters.
        u: mapped input, [B, T, I].
        h0: initial state, [B, S].
        timespans: as `ltc_scan` takes them.
        lengths: as `ltc_scan` takes them.
        chunk_size: as `ltc_scan` takes it.
    """
    ode_unfolds, eps = check_solver("LTCCell", cell._ode_unfolds, cell._epsilon)
    return ltc_scan(
        u,
        ready.weights,
        h0,
        synapses=ready.synapses,
        timespans=timespans,
        lengths=lengths,
        ode_unfolds=ode_unfolds,
        eps=eps,
        outputs=output_width(cell),
        chunk_size=chunk_size,
    )
