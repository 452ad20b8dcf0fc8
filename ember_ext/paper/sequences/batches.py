"""Which series a batch has, with a curriculum from short to long ones on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MEMORY = 100
"""About the number of batches that the running accuracy is of."""

FEWEST = 60
"""Batches between two steps of a curriculum, at least."""

LIKE = 8
"""Batches that are drawn together and sorted by length, so that each holds series of like length
and little padding."""


class Sampler:
    """Draws the batches of each epoch.

    Without a curriculum, an epoch has every series once, in random order. With one, series are
    drawn with replacement among those of at most `limit` steps. The limit starts at the fewest
    steps that a series has. It rises by one whenever the running accuracy exceeds `curriculum`, and
    the last rise was `FEWEST` batches ago or earlier.

    Args:
        lengths: the number of steps of each series, int64 [N].
        batch_size: series of a batch.
        curriculum: the running accuracy at which longer series are let in; 0 for no curriculum.

    Attributes:
        batches: how many an epoch has.
        limit: the most steps that a series may have by now.
    """

    def __init__(self, lengths: Tensor, batch_size: int, curriculum: float) -> None:
        self.batches = math.ceil(len(lengths) / batch_size)
        self._lengths = lengths
        self._size = batch_size
        self._curriculum = curriculum
        self._longest = int(lengths.max())
        self.limit = int(lengths.min()) if curriculum else self._longest
        self._running = 0.0
        self._since = 0
        self._pool = self._allowed()

    def epoch(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The rows of each batch of an epoch, int64 [B]."""
        if not self._curriculum:
            yield from torch.randperm(len(self._lengths), generator=generator).split(self._size)
            return
        for _ in range(self.batches):
            shape = (LIKE * self._size,)
            drawn = self._pool[torch.randint(len(self._pool), shape, generator=generator)]
            drawn = drawn[self._lengths[drawn].argsort()]
            # All blocks are equally likely, so all series that are allowed are, too.
            block = int(torch.randint(LIKE, (), generator=generator))
            yield drawn[block * self._size : (block + 1) * self._size]

    def learned(self, accuracy: float) -> None:
        """Take note of the accuracy in the latest batch."""
        self._running += (accuracy - self._running) / MEMORY
        self._since += 1
        ready = self._running > self._curriculum and self._since >= FEWEST
        if self._curriculum and ready and self.limit < self._longest:
            self.limit += 1
            self._since = 0
            self._pool = self._allowed()

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"limit": self.limit, "running": self._running, "since": self._since}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.limit, self._running, self._since = state["limit"], state["running"], state["since"]
        self._pool = self._allowed()

    def _allowed(self) -> Tensor:
        return torch.nonzero(self._lengths <= self.limit)[:, 0]
