"""`accelerate` and `decelerate`: swap ncps' layers for this package's inside a model, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import ncps.torch
from torch import nn

from ember_ext.nn._cell import LiquidCell
from ember_ext.nn._liquid import LiquidLayer
from ember_ext.nn._packing import Packing
from ember_ext.nn._plain import why_lstm_differs
from ember_ext.nn.cells import CfCCell, LTCCell, WiredCfCCell
from ember_ext.nn.cfc import CfC
from ember_ext.nn.ltc import LTC

ACCELERATED: dict[type[nn.Module], type[LiquidLayer]] = {
    ncps.torch.CfC: CfC,
    ncps.torch.LTC: LTC,
}
"""The layers of ncps that `accelerate` knows, and what takes their place.

A `LiquidLayer` adds no state to the class that it derives from, so an object can change class.
"""

ACCELERATED_CELLS: dict[type[nn.Module], type[LiquidCell]] = {
    ncps.torch.CfCCell: CfCCell,
    ncps.torch.LTCCell: LTCCell,
    ncps.torch.WiredCfCCell: WiredCfCCell,
}
"""The same of cells that stand alone; those of a layer or of a wired cell go with it."""

_EVERY_KIND: dict[type[nn.Module], Any] = {**ACCELERATED, **ACCELERATED_CELLS}


@dataclass(frozen=True)
class _Exchange:
    """A report of what was done to a model's layers; prints as one line for each.

    Modules go by their name in the model, as `named_modules` has it; the model itself is "".
    """

    replaced: tuple[str, ...]
    """The modules whose class is another now."""
    left: dict[str, str]
    """The modules that stay as they were, and why."""
    kinds: dict[str, str]
    """The name of each module's class, such as "CfC"."""

    _verb: ClassVar[str]
    _kinds: ClassVar[str]

    def __str__(self) -> str:
        ends = dict.fromkeys(self.replaced, self._verb)
        ends |= {name: f"left, {why}" for name, why in self.left.items()}
        lines = [
            f"{name or '(the model)'} ({self.kinds[name]}): {end}" for name, end in ends.items()
        ]
        return "\n".join(lines) or f"no {self._kinds} found"


@dataclass(frozen=True)
class Acceleration(_Exchange):
    """A report of :func:`~ember_ext.accelerate`; prints as one line for each layer.

    Attributes:
        replaced: the names in the model of the modules that are of `ember_ext.nn` now, as
            `named_modules` has them; the model itself is "".
        left: the modules of ncps that stay as they were, and why.
        kinds: the name of the class of each of these modules, such as "LTC".

    Examples::

        >>> import torch
        >>> from ncps.torch import CfC
        >>> from ember_ext import accelerate
        >>> report = accelerate(torch.nn.ModuleDict({"memory": CfC(3, 16)}))
        >>> report.replaced, report.left
        (('memory',), {})
        >>> print(report)
        memory (CfC): accelerated
    """

    _verb = "accelerated"
    _kinds = " or ".join(f"ncps.torch.{kind.__name__}" for kind in _EVERY_KIND)


@dataclass(frozen=True)
class Deceleration(_Exchange):
    """A report of :func:`~ember_ext.decelerate`; prints as one line for each layer.

    Attributes:
        replaced: the names in the model of the modules that are of ncps again, as `named_modules`
            has them; the model itself is "".
        left: the modules of `ember_ext.nn` that stay as they were, and why.
        kinds: the name of the class of each of these modules, such as "LTC".

    Examples::

        >>> from ember_ext import decelerate, nn
        >>> print(decelerate(nn.CfC(3, 16)))
        (the model) (CfC): back to ncps
    """

    _verb = "back to ncps"
    _kinds = " or ".join(f"ember_ext.nn.{kind.__name__}" for kind in _EVERY_KIND.values())


def accelerate(model: nn.Module) -> Acceleration:
    """Turn every CfC, LTC and cell of ncps in `model` into that of `ember_ext.nn`, in place.

    The modules stay the same objects, with their parameters, hooks, mode and state-dict keys, so
    optimisers and checkpoints that refer to them go on working. Device and dtype stay as they are.
    A second call changes nothing, and :func:`~ember_ext.decelerate` undoes the first.

    Args:
        model: any module; it may itself be one of them.

    Returns:
        An :class:`~ember_ext.nn.Acceleration`: which modules were replaced, and which were left and
        why. Subclasses are left, and so are modules whose cells do more than apply their own
        weights, such as by hooks, adapters or quantised layers. A cell that is changed afterwards
        is followed too: its layer then calls it step by step.

    Raises:
        TypeError: `model` is not a module.

    Examples::

        >>> import torch
        >>> from ncps.torch import CfC
        >>> from ncps.wirings import AutoNCP
        >>> from ember_ext import accelerate
        >>> model = torch.nn.ModuleDict({"memory": CfC(3, AutoNCP(16, 2))})
        >>> x = torch.randn(8, 20, 3)
        >>> before, _ = model["memory"](x)
        >>> print(accelerate(model))
        memory (CfC): accelerated
        >>> after, _ = model["memory"](x)
        >>> torch.allclose(before, after, atol=1e-5)
        True
    """
    _check_model("accelerate", model)
    replaced: list[str] = []
    left: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, module in _named_modules(model):
        kind = next((kind for kind in _EVERY_KIND if isinstance(module, kind)), None)
        if kind is None or isinstance(module, Packing):
            continue
        kinds[name] = kind.__name__
        reason = _reason_to_leave(module, kind)
        if reason is None:
            _EVERY_KIND[kind]._adopt(module)
            replaced.append(name)
        else:
            left[name] = reason
    return Acceleration(tuple(replaced), left, kinds)


def decelerate(model: nn.Module) -> Deceleration:
    """Turn every CfC, LTC and cell of `ember_ext.nn` in `model` into that of ncps, in place.

    This undoes :func:`~ember_ext.accelerate`. It also works for layers of `ember_ext.nn`. The
    modules stay the same objects, with their parameters, hooks and state-dict keys. The model then
    needs ncps and no `ember_ext`, even if it is pickled and loaded elsewhere. It has lost what our
    classes add, such as `step`. :func:`~ember_ext.use_reference` keeps that, and runs the
    definitions within a context.

    Args:
        model: any module; it may itself be one of them.

    Returns:
        A :class:`~ember_ext.nn.Deceleration`: which modules were replaced, and which were left and
        why. Subclasses are left, and so are LTCs and LTC cells with parametrised or pruned weights,
        which those of ncps would not follow.

    Raises:
        TypeError: `model` is not a module.

    Examples::

        >>> from ember_ext import decelerate, nn
        >>> model = nn.LTC(3, 16)
        >>> print(decelerate(model))
        (the model) (LTC): back to ncps
        >>> type(model).__module__
        'ncps.torch.ltc'
    """
    _check_model("decelerate", model)
    replaced: list[str] = []
    left: dict[str, str] = {}
    kinds: dict[str, str] = {}
    originals = {ours: kind for kind, ours in _EVERY_KIND.items()}
    for name, module in _named_modules(model):
        if not isinstance(module, Packing):
            continue
        kinds[name] = next(kind.__name__ for kind in _EVERY_KIND if isinstance(module, kind))
        original = originals.get(type(module))
        if original is None:
            left[name] = f"{type(module).__name__} is a subclass that may compute something else"
            continue
        if reason := module._why_not_ncps():
            left[name] = reason
            continue
        module._release()
        module.__class__ = original  # type: ignore[assignment]
        replaced.append(name)
    return Deceleration(tuple(replaced), left, kinds)


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"ember_ext.{function}: model must be a torch.nn.Module, got {got}")


def _reason_to_leave(module: Any, kind: type[nn.Module]) -> str | None:
    if type(module) is not kind:
        return f"{type(module).__name__} is a subclass that may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    reason: str | None = _EVERY_KIND[kind]._why_cells_differ(module)
    if reason is None and kind in ACCELERATED and module.use_mixed:
        reason = why_lstm_differs(module.lstm)
    return reason


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, without the cells that lie within a layer or cell of ncps'."""
    within: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in within:
            continue
        kinds: Any = tuple(_EVERY_KIND)
        if isinstance(module, kinds):
            cell = module._modules.get("rnn_cell", module)
            within.update(() if cell is None else map(id, cell.modules()))
        yield name, module
