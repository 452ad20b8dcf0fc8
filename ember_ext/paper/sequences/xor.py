"""Irregularly sampled XOR: is the number of ones in a stream of bits odd?

The benchmark of Lechner and Hasani ("Learning Long-Term Dependencies in Irregularly-Sampled Time
Series", 2020), which Hasani et al. ("Closed-form continuous-time neural networks", 2022) use, too.
A stream has 2 to 31 bits. The event-based encoding has a step only where the bit changes, and one
at the end of the stream. What came between is in the time spans. The dense encoding has a step for
each bit.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from ember_ext.paper.sequences.series import SeriesSet

Encoding = Literal["event", "dense"]

SHORTEST, LONGEST = 2, 31
"""Bits of a stream; every number from the first to the second is as likely."""

TIME_UNIT = 32
"""Bits that take one unit of time, in the published benchmark."""


def xor_series(
    rows: int, seed: int, encoding: Encoding = "event", time_unit: float = TIME_UNIT
) -> SeriesSet:
    """Draw bit streams, with their parity as the class.

    Args:
        rows: how many.
        seed: equal seeds draw equal streams, in either encoding.
        encoding: "event" or "dense".
        time_unit: bits that take one unit of time.

    Returns:
        Series of one channel. The time span of a step is the number of bits since the step before,
        with its own, divided by `time_unit`.
    """
    generator = np.random.default_rng(seed)
    counts = generator.integers(SHORTEST, LONGEST, rows, endpoint=True)
    bits = generator.integers(0, 2, (rows, LONGEST))
    place = np.arange(LONGEST)
    inside = place < counts[:, None]
    labels = (bits * inside).sum(1) % 2
    steps = inside
    if encoding == "event":
        changes = np.diff(bits, axis=1, prepend=-1) != 0
        steps = inside & (changes | (place == counts[:, None] - 1))
    lengths = steps.sum(1)
    longest = int(lengths.max())
    order = np.argsort(~steps, axis=1, kind="stable")[:, :longest]
    valid = np.arange(longest) < lengths[:, None]
    spans = np.diff(order + 1, axis=1, prepend=0) / time_unit
    return SeriesSet(
        torch.from_numpy(np.take_along_axis(bits, order, 1) * valid).float()[..., None],
        torch.from_numpy(np.where(valid, spans, 1)).float(),
        torch.from_numpy(lengths),
        torch.from_numpy(labels),
    )
