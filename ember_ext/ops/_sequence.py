"""The common parts of the operators over sequences: time spans, lengths and chunks.

`op` names the operator or module in error messages.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ember_ext.ops import _checks

MAX_UNCHUNKED = 1024
"""The longest sequence whose activations are all kept by default."""
DEFAULT_CHUNK = 128


def as_timespans(op: str, argument: str, timespans: object, dtype: torch.dtype) -> Tensor | float:
    """Time spans as a float (1 for None), or as a tensor of a floating dtype.

    Args:
        op: for the error.
        argument: for the error.
        timespans: a real number, of NumPy's, too; a tensor of a floating or integer dtype; or None.
        dtype: of the input; integers are converted to what is computed in then.

    Raises:
        TypeError: anything else, such as a boolean or complex number.
    """
    if timespans is None:
        return 1.0
    if isinstance(timespans, Tensor):
        if timespans.is_floating_point():
            return timespans
        if timespans.is_complex() or timespans.dtype == torch.bool:
            _checks.fail(op, argument, "of a real dtype", timespans.dtype, TypeError)
        return timespans.to(_checks.compute_dtype(dtype))
    if isinstance(timespans, bool) or not isinstance(timespans, Real):
        got = type(timespans).__name__
        _checks.fail(op, argument, "a real number or a tensor", got, TypeError)
    return float(timespans)


def check_timespans(
    op: str,
    timespans: Tensor | float,
    x: Tensor,
    *,
    positive: bool = False,
    lengths: Tensor | None = None,
    units: int = 1,
) -> None:
    """Raise unless `timespans`, from `as_timespans`, fit x, [B, T, I], and are finite and >= 0.

    Args:
        op: for the error.
        timespans: of every step.
        x: input.
        positive: whether a time span of 0 is an error, too: for cells that divide by it.
        lengths: of the rows, checked before; time spans beyond them may have any value.
        units: the last dimension that time spans may have.
    """
    batch, steps, _ = x.shape
    expected = "finite and > 0, as the cell divides by it" if positive else "finite and >= 0"
    if not isinstance(timespans, Tensor):
        # `torch.compile` may make a symbolic number of a float, and `math.isfinite` takes none.
        if not (0 < timespans < math.inf if positive else 0 <= timespans < math.inf):
            _checks.fail(op, "timespans", expected, timespans)
        return
    _checks.check_tensor(op, "timespans", timespans)
    _checks.check_device(op, "timespans", timespans, x, "x")
    if timespans.shape not in ((), (batch, steps), (batch, steps, units)):
        shapes = f"a scalar, [B, T] or [B, T, 1] with [B, T] = {[batch, steps]}"
        _checks.fail(op, "timespans", shapes, list(timespans.shape))
    if _checks.is_readable(timespans):
        timespans = timespans.detach()
        good = (timespans > 0 if positive else timespans >= 0) & timespans.isfinite()
        if bool(good.all()):
            return
        if lengths is not None and timespans.dim() and _checks.is_readable(lengths):
            beyond = torch.arange(steps) >= lengths[:, None]
            timespans = timespans.reshape(batch, steps, units)
            good = good.reshape(batch, steps, units) | beyond[..., None]
            if bool(good.all()):
                return
        index = (~good).nonzero()[0].tolist()
        got = f"{timespans[tuple(index)].item()} at {index}"
        _checks.fail(op, "timespans", expected, got)


def as_lengths(op: str, lengths: object, x: Tensor) -> Tensor | None:
    """Lengths of the rows of x, [B, T, I], as int64 [B], or None.

    Args:
        op: for the error.
        lengths: integers within [0, T] of any dtype: a tensor, an array, or a sequence; or None.
        x: input.

    Raises:
        TypeError: they are not integers.
        ValueError: there are not B of them, on x's device and within [0, T].
    """
    if lengths is None:
        return None
    batch, steps, _ = x.shape
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths, device=x.device)
        except (TypeError, ValueError, RuntimeError):
            got = type(lengths).__name__
            _checks.fail(op, "lengths", "a tensor, an array or a list of integers", got, TypeError)
        if lengths.numel() == 0:
            lengths = lengths.to(torch.int64)  # an empty list has no integers to tell its dtype
    dtype = lengths.dtype
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        _checks.fail(op, "lengths", "of an integer dtype", dtype, TypeError)
    _checks.check_shape(op, "lengths", lengths, "[B]", (batch,))
    _checks.check_device(op, "lengths", lengths, x, "x")
    lengths = lengths.to(torch.int64)
    if _checks.is_readable(lengths):
        good = (lengths >= 0) & (lengths <= steps)
        if not bool(good.all()):
            index = int((~good).nonzero()[0])
            got = f"{lengths[index].item()} at index {index}"
            _checks.fail(op, "lengths", f"within [0, T] = [0, {steps}]", got)
    return lengths


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """Raise unless `chunk_size` is None or an integer >= 0."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 0):
        _checks.fail(op, "chunk_size", "None or an integer >= 0", repr(chunk_size))


def chunk_to_keep(chunk_size: int | None, steps: int) -> int:
    """Steps whose activations are kept at once for the backward pass; 0 for all of them."""
    if chunk_size is not None:
        return chunk_size
    return 0 if is_known(steps <= MAX_UNCHUNKED) else DEFAULT_CHUNK


def is_known(condition: bool) -> bool:
    """Whether a condition on sizes holds; in an export, for all sizes that it is made for.

    There, to ask for its truth would bind what is exported to one side of it.
    """
    return statically_known_true(condition) if torch.compiler.is_exporting() else bool(condition)
