"""Whether an ncps network's parts do what ncps built them for, so that their weights say it all.

Users prune, adapt, quantise and hook layers. What such a layer computes is known only by calling
it; parametrisations (`torch.nn.utils.parametrizations`) arrive through the weight and are plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ncps.torch
from torch import nn

from ember_ext.ops._cfc_checks import Activation

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    ncps.torch.cfc_cell.LeCun: "lecun_tanh",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}
"""The layers of a backbone's activations, and their names."""

OURS: dict[type[nn.Module], type[nn.Module]] = {}
"""The cells of this package that compute what a cell of ncps does."""

_HEADS = ("ff1", "ff2", "time_a", "time_b")


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_cells_differ(cell: Any) -> str | None:
    """The reason why the weights of a `CfC.rnn_cell` do not tell what it computes, or None."""
    reason = None
    if isinstance(cell, ncps.torch.WiredCfCCell):
        reason = why_differs(cell, ncps.torch.WiredCfCCell)
        for index, layer in enumerate(() if reason else cell._layers):
            if reason := _why_cell_differs(layer):
                reason = f".layer_{index}{reason}"
                break
    else:
        reason = _why_cell_differs(cell)
    return reason and f"rnn_cell{reason}"


def why_lstm_differs(lstm: Any) -> str | None:
    """See `why_cells_differ`; this is for `CfC.lstm`, the cell of mixed memory."""
    reason = (
        why_differs(lstm, ncps.torch.lstm.LSTMCell)
        or _why_linear_differs(lstm, "input_map")
        or _why_linear_differs(lstm, "recurrent_map", bias=False)
        or why_part_differs(lstm, "tanh", nn.Tanh)
        or why_part_differs(lstm, "sigmoid", nn.Sigmoid)
    )
    return reason and f"lstm{reason}"


def why_differs(part: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """The reason why `part` does not compute what a plain `kind` does; None if it does."""
    if type(part) is not kind and type(part) is not OURS.get(kind):
        if not isinstance(part, kind):
            # The name of the module tells a quantised Linear from another.
            return f" is a {type(part).__module__}.{type(part).__name__} and no {kind.__name__}"
        if type(part).forward not in (kind.forward, OURS.get(kind, kind).forward):
            return f" is a {type(part).__name__} with a forward of its own"
    if "forward" in part.__dict__:
        return f" is a {type(part).__name__} with a forward of its own"
    return " has hooks" if _has_hooks(part) else None


def why_part_differs(owner: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    # `nn.Module.__getattr__` would take most of the time.
    reason = why_differs(owner._modules.get(name), kind)
    return reason and f".{name}{reason}"


def _why_linear_differs(owner: nn.Module, name: str, *, bias: bool = True) -> str | None:
    if reason := why_part_differs(owner, name, nn.Linear):
        return reason
    linear: Any = owner._modules[name]
    # A parametrised bias is a bias, although it is no longer among the parameters.
    if (linear._parameters.get("bias", 0) is not None) != bias:
        return f".{name} has {'no' if bias else 'a'} bias"
    return None


def _why_cell_differs(cell: Any) -> str | None:
    if reason := why_differs(cell, ncps.torch.CfCCell):
        return reason
    for head in _HEADS[:1] if cell.mode == "pure" else _HEADS:
        if reason := _why_linear_differs(cell, head):
            return reason
    if cell.mode != "pure":
        for name, kind in (("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)):
            if reason := why_part_differs(cell, name, kind):
                return reason
    backbone: Any = cell._modules.get("backbone")
    if backbone is None and cell.backbone_layers == 0:
        return None
    if reason := why_part_differs(cell, "backbone", nn.Sequential):
        return reason
    if cell.backbone_layers == 0:
        return ".backbone is not in use"
    reason = _why_backbone_differs(backbone)
    return reason and f".backbone{reason}"


def _why_backbone_differs(backbone: nn.Sequential) -> str | None:
    blocks: list[list[nn.Module]] = []
    for index, part in enumerate(backbone):
        if isinstance(part, nn.Linear):
            blocks.append([])
            reason = _why_linear_differs(backbone, str(index))
        else:
            kind = next((kind for kind in _BACKBONE_PARTS if isinstance(part, kind)), None)
            if kind is None or not blocks:
                return f".{index} is a {type(part).__name__}, which ncps does not put there"
            reason = why_part_differs(backbone, str(index), kind)
        if reason:
            return reason
        blocks[-1].append(part)
    return _why_blocks_differ(blocks)


_BACKBONE_PARTS = (*ACTIVATIONS, nn.Dropout)


def _why_blocks_differ(blocks: Sequence[Sequence[Any]]) -> str | None:
    """Every block must be a Linear, one and the same activation, and after the first a Dropout."""
    if not blocks:
        return " is empty"
    for block in blocks:
        if [type(part) in ACTIVATIONS for part in block[1:]] not in ([True], [True, False]):
            return " is not made of Linear, activation and perhaps Dropout in turns"
    activations = [block[1] for block in blocks]
    if len({type(activation) for activation in activations}) > 1:
        return " mixes activations"
    for activation in activations:
        if isinstance(activation, nn.GELU) and activation.approximate != "none":
            return f" approximates GELU by {activation.approximate}"
        has_tanh = isinstance(activation, ncps.torch.cfc_cell.LeCun)
        if has_tanh and (reason := why_part_differs(activation, "tanh", nn.Tanh)):
            return f"'s activation{reason}"
    dropouts = [block[2] if len(block) == 3 else None for block in blocks]
    if dropouts[0] is not None:
        return " has Dropout after its first layer"
    rates = {None if d is None else (d.p, d.training) for d in dropouts[1:]}
    if len(rates) > 1:
        return " has Dropouts that differ"
    if rates - {None} and len({block[0].out_features for block in blocks}) > 1:
        return " has Dropout and layers of different widths"
    return None
