"""Windows of a token sequence: random ones to train on, all of them in order to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def random_batch(
    tokens: Tensor, batch_size: int, block_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Windows at uniformly random places.

    Args:
        tokens: int64 [N] with N > block_size.
        batch_size: number of windows, B.
        block_size: tokens of a window, T.
        generator: the stream that the places are drawn from.

    Returns:
        Inputs and targets, int64 [B, T] each; the targets are the inputs one token later.
    """
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(block_size + 1)]
    return windows[:, :-1], windows[:, 1:]


def every_batch(
    tokens: Tensor, batch_size: int, block_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All windows once, side by side, so that every token but the first is predicted once.

    Args:
        tokens: int64 [N] with N ≥ 2.
        batch_size: most windows of a batch.
        block_size: tokens of a window, T.

    Yields:
        Inputs and targets, int64 [≤ batch_size, T]; the last pair is [1, < T] where block_size
        does not divide N - 1.
    """
    whole = (len(tokens) - 1) // block_size * block_size
    inputs = torch.split(tokens[:whole].view(-1, block_size), batch_size)
    targets = torch.split(tokens[1 : whole + 1].view(-1, block_size), batch_size)
    if whole:
        yield from zip(inputs, targets, strict=True)
    if whole < len(tokens) - 1:
        yield tokens[None, whole:-1], tokens[None, whole + 1 :]
