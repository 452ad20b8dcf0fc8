"""The arguments of a liquid layer's call: input, hidden state and time spans.

ncps takes them batched or not, with the batch or the time first. The operators take [B, T, I] and
[B, S]. `layer` is the layer's class name, for error messages.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any, NoReturn, SupportsIndex

import torch
from ncps.wirings import Wiring
from torch import Tensor, nn

from ember_ext.ops._sequence import as_timespans

Hidden = Tensor | tuple[Tensor, Tensor]
"""[B, S], or with mixed memory a pair (h, c) of such; S is the layer's `state_size`."""


def fail(
    layer: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` with the package's error text."""
    raise error(f"ember_ext.nn.{layer}: {argument} must be {expected}, got {got}")


def count(layer: str, argument: str, value: Any) -> int:
    """`value`, an integer of Python's or NumPy's, as an int >= 0."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        fail(layer, argument, "an integer", type(value).__name__, TypeError)
    number = operator.index(value)
    if number < 0:
        fail(layer, argument, ">= 0", number)
    return number


def check_sizes(layer: str, inputs: Any, units: Any) -> tuple[int | None, Any]:
    """A liquid layer's `input_size` and `units`, numbers or a wiring; raise unless they fit.

    The number of inputs is None where a wiring, which was built, has it.
    """
    is_wiring = isinstance(units, Wiring)
    if not is_wiring:
        units = count(layer, "units", units)
    elif inputs is None and not units.is_built():
        fail(layer, "units", "a wiring that was built, or input_size given", "neither")
    elif units.is_built() and inputs not in (None, units.input_dim):
        expected = f"{units.input_dim}, for which the wiring was built"
        fail(layer, "input_size", expected, inputs)
    if inputs is not None or not is_wiring:
        inputs = count(layer, "input_size", inputs)
    return inputs, units


def check_dtype(layer: str, dtype: object) -> None:
    """Raise unless `dtype`, of a module's parameters, is None or a floating dtype."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        fail(layer, "dtype", "a torch.dtype", type(dtype).__name__, TypeError)
    if not dtype.is_floating_point:
        fail(layer, "dtype", "a floating dtype", dtype, TypeError)


def check_is_wiring(layer: str, wiring: object) -> None:
    """Raise unless `wiring` is one of ncps."""
    if not isinstance(wiring, Wiring):
        fail(layer, "wiring", "an ncps.wirings.Wiring", type(wiring).__name__, TypeError)


def creating_on(device: torch.types.Device) -> contextlib.AbstractContextManager[Any]:
    """A context in which ncps' constructors, which take no device, create most of their tensors."""
    return contextlib.nullcontext() if device is None else torch.device(device)


def settle(module: nn.Module, device: torch.types.Device, dtype: torch.dtype | None) -> None:
    """Move what a constructor of ncps has made to the device and the dtype that were asked for.

    ncps creates wirings' masks on the CPU even where another device is torch's default.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if dtype is not None or any(p.device != device for p in module.parameters()):
        module.to(device=device, dtype=dtype)


def check_input(layer: str, input: Tensor, features: int, batch_first: bool) -> bool:
    """Whether `input` is batched. Raises unless it has `features` columns."""
    if not isinstance(input, Tensor):
        fail(layer, "input", "a torch.Tensor", type(input).__name__, TypeError)
    layout = "[B, T, C]" if batch_first else "[T, B, C]"
    if input.dim() not in (2, 3):
        fail(layer, "input", f"{layout} or [T, C]", list(input.shape))
    if input.shape[-1] != features:
        fail(layer, "input", f"{layout} or [T, C] with C = {features}", list(input.shape))
    return input.dim() == 3


def initial_state(
    layer: str, x: Tensor, hx: Hidden | None, *, size: int, mixed: bool, batched: bool
) -> tuple[Tensor, Tensor | None]:
    """The hidden state, and the memory's state if the layer is `mixed`, each [B, S].

    Args:
        layer: for the error.
        x: the input, [B, T, I].
        hx: the state as the user gave it; None for zeros.
        size: S.
        mixed: whether the layer has a memory.
        batched: whether the state should have a batch dimension.
    """
    if hx is None:
        zeros = x.new_zeros(x.shape[0], size)
        return zeros, zeros if mixed else None
    if mixed:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            fail(layer, "hx", "a pair (h, c) with mixed memory", type(hx).__name__, TypeError)
        h, c = (
            _batched_state(layer, f"hx[{i}]", state, x, size, batched) for i, state in enumerate(hx)
        )
        return h, c
    return _batched_state(layer, "hx", hx, x, size, batched), None


def _batched_state(layer: str, name: str, h: object, x: Tensor, size: int, batched: bool) -> Tensor:
    if not isinstance(h, Tensor):
        fail(layer, name, "a torch.Tensor", type(h).__name__, TypeError)
    if not h.is_floating_point():
        fail(layer, name, "of a floating dtype", h.dtype, TypeError)
    shape = (x.shape[0], size) if batched else (size,)
    symbols = "[B, S]" if batched else "[S]"
    if h.shape != shape:
        fail(layer, name, f"{symbols} = {list(shape)}", list(h.shape))
    return h if batched else h.unsqueeze(0)


def step_timespan(
    layer: str, timespan: Tensor | float | None, input: Tensor, units: int | None
) -> Tensor | float:
    """The time span of one step: a float, or a floating tensor of no dimension, [B], or [B, units].

    Args:
        layer: for the error.
        timespan: as the user gave it.
        input: the step's input, [B, C] or [C].
        units: as for `batch_major_timespans`.
    """
    timespan = as_timespans(f"nn.{layer}", "timespan", timespan, input.dtype)
    if not isinstance(timespan, Tensor) or timespan.dim() == 0:
        return timespan
    rows = tuple(input.shape[:-1])
    leads = [rows, (1,)] if rows else [()]
    if timespan.shape in [(*lead, units) for lead in leads] and units != 1:
        return timespan.expand(*rows, units)  # type: ignore[arg-type]
    if timespan.shape not in [(*lead, *end) for lead in leads for end in ((), (1,))]:
        expected = "a scalar or [1]"
        if rows:
            expected = f"a scalar, [B] = {list(rows)} or [1], or with a last dimension 1"
        fail(layer, "timespan", expected + _or_units(units), list(timespan.shape))
    return timespan.reshape(-1).expand(rows) if rows else timespan.reshape(())


def _or_units(units: int | None) -> str:
    return "" if units in (None, 1) else f" or H = {units}"


def batch_major_timespans(
    layer: str,
    timespans: Tensor | float | None,
    x: Tensor,
    *,
    batched: bool,
    batch_first: bool,
    units: int | None,
) -> Tensor | float:
    """Time spans as a float, a floating tensor of no dimension, or one of [B, T, 1 or units].

    Args:
        layer: for the error.
        timespans: as the user gave them.
        x: the input, [B, T, I].
        batched: whether the input had a batch dimension.
        batch_first: whether that was the first.
        units: how many spans a step may have, one for each unit of every cell; None if it may not.
    """
    timespans = as_timespans(f"nn.{layer}", "timespans", timespans, x.dtype)
    if not isinstance(timespans, Tensor) or timespans.dim() == 0:
        return timespans
    batch, steps = x.shape[:2]
    # The spans of a single row serve all rows, as in ncps.
    leads: list[tuple[int, ...]] = [(batch, steps), (1, steps)]
    symbols = f"[B, T] = {[batch, steps]} or [1, T]"
    if not batched:
        leads, symbols = [(steps,)], f"[T] = {[steps]}"
    elif not batch_first:
        leads, symbols = [(steps, batch), (steps, 1)], f"[T, B] = {[steps, batch]} or [T, 1]"
    # This is no dict, because the sizes of an export or a trace have no hash.
    shapes = [(lead, lead) for lead in leads]
    shapes += [((*lead, end), lead) for lead in leads for end in (1, units) if end is not None]
    if batched and not batch_first:
        shapes.append(((steps,), (steps, 1)))
    lead = next((lead for shape, lead in shapes if timespans.shape == shape), None)
    if lead is None:
        expected = f"a scalar, {symbols}, or with a last dimension 1{_or_units(units)}"
        fail(layer, "timespans", expected, list(timespans.shape))
    spans = timespans.reshape(*lead, 1 if timespans.dim() <= len(lead) else timespans.shape[-1])
    if not batched:
        spans = spans.unsqueeze(0)
    elif not batch_first:
        spans = spans.transpose(0, 1)
    return spans.expand(batch, -1, -1)
