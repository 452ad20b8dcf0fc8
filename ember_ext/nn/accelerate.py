"""`accelerate`: make every CfC inside an existing model run on this package's operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ncps.torch
from torch import nn

from ember_ext.nn._plain import why_cells_differ, why_lstm_differs
from ember_ext.nn.cfc import CfC


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; prints as one line for each CfC.

    Modules go by their name in the model, as `named_modules` has it; the model itself is "".
    """

    replaced: tuple[str, ...]
    """The modules that are now an `ember_ext.nn.CfC`."""
    left: dict[str, str]
    """The modules that stay as they were, and why."""

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: accelerated" for name in self.replaced]
        lines += [f"{name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no ncps.torch.CfC found"


def accelerate(model: nn.Module) -> Acceleration:
    """Turn every `ncps.torch.CfC` in `model` into an `ember_ext.nn.CfC`, in place.

    The modules stay the same objects, with their parameters, hooks, mode and state-dict keys, so
    optimisers and checkpoints that refer to them go on working. Calling it again changes nothing.

    Args:
        model: any module; it may itself be an `ncps.torch.CfC`.

    Returns:
        Which modules were replaced, and which were left and why: subclasses, and those whose cells
        do more than apply their own weights, such as by hooks, adapters or quantised layers. What
        is done to a cell afterwards is followed, too: then `CfC` calls it step by step.
    """
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ncps.torch.CfC) or isinstance(module, CfC):
            continue
        reason = _reason_to_leave(module)
        if reason is None:
            # CfC adds no state to the class it derives from, so the object can change class.
            module.__class__ = CfC
            replaced.append(name)
        else:
            left[name] = reason
    return Acceleration(tuple(replaced), left)


def _reason_to_leave(module: Any) -> str | None:
    if type(module) is not ncps.torch.CfC:
        return f"{type(module).__name__} is a subclass that may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    reason = why_cells_differ(module.rnn_cell)
    if reason is None and module.use_mixed:
        reason = why_lstm_differs(module.lstm)
    return reason
