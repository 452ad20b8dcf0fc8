"""`Rows`: a batch of sequences, taken apart into steps and put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Rows:
    """Which rows of a batch take each step, and in which order they do.

    With lengths, the longest rows come first, and a row leaves the batch when it has ended. So a
    step costs as much as the rows that take it, and nothing that lies behind a row's end is read.

    Args:
        batch: how many rows there are, B.
        steps: of the longest row at most, T.
        lengths: [B], int64, within [0, T]; None for all T. Their values are read.

    Attributes:
        counts: how many rows take each step, up to the last step that any row takes.
    """

    counts: Sequence[int]

    def __init__(self, batch: int, steps: int, lengths: Tensor | None) -> None:
        self._batch, self._steps = batch, steps
        self._order = self._places = None
        if lengths is None or bool((lengths == steps).all()):
            self.counts = [batch] * steps
            return
        lengths, self._order = lengths.sort(descending=True, stable=True)
        runs = torch.arange(steps, device=lengths.device)[:, None] < lengths
        self.counts = [count for count in runs.sum(1).tolist() if count > 0]
        step, place = runs.nonzero(as_tuple=True)
        self._places = self._order[place] * steps + step

    def pack(self, values: Tensor) -> Tensor:
        """The values of a sequence, [B, T, ...], with those of a step side by side.

        They are [T, B, ...] if all rows take all steps, and otherwise [N, ...], where N is the sum
        of counts.
        """
        if self._places is None:
            return values.transpose(0, 1).contiguous()
        return values.flatten(0, 1).index_select(0, self._places)

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """What `pack` returned, or what was made of it, as one tensor for each step."""
        # At once, because the gradient of each step's slice would be as large as the whole.
        if self._places is None:
            return packed.unbind()  # which refuses another number of steps in a trace
        return packed.split(self.counts) if self.counts else ()

    def unpack(self, outputs: Sequence[Tensor]) -> Tensor:
        """The outputs of one step or more as a sequence [B, T, ...], with 0 behind a row's end."""
        if self._places is None:
            return torch.stack(tuple(outputs), 1)
        packed = torch.cat(tuple(outputs))
        y = packed.new_zeros(self._batch * self._steps, *packed.shape[1:])
        y = y.index_copy(0, self._places, packed)
        return y.view(self._batch, self._steps, *packed.shape[1:])

    def run(
        self,
        step: Callable[..., tuple[Tensor, ...]],
        states: tuple[Tensor, ...],
        beyond: Tensor | None = None,
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Take all steps.

        Args:
            step: takes t and the states of the rows that take step t to their output and states.
            states: of all rows, [B, ...] each.
            beyond: [B, T], whether a row has ended before each step, for lengths that cannot be
                read. Such a row stays in the batch, where its state is kept, and its output is 0.

        Returns:
            The outputs of each step, and the states of all rows after their last steps.
        """
        states = tuple(self._sorted(state) for state in states)
        outputs, ended = [], []
        for t, count in enumerate(self.counts):
            if (leaving := states[0].shape[0] - count) > 0:
                cuts = (state.split((count, leaving)) for state in states)
                states, left = zip(*cuts, strict=True)
                ended.append(left)
            if beyond is None:
                output, *new = step(t, *states)
            else:
                stopped = beyond[:, t, None]
                # A row without steps may have any state.
                output, *new = step(t, *(state.masked_fill(stopped, 0) for state in states))
                output = output.masked_fill(stopped, 0)
                new = [torch.where(stopped, *pair) for pair in zip(states, new, strict=True)]
            states = tuple(new)
            outputs.append(output)
        # The rows that ended first are the last ones.
        parts = zip(states, *reversed(ended), strict=True)
        return outputs, tuple(self._unsorted(part) for part in parts)

    def _sorted(self, state: Tensor) -> Tensor:
        return state if self._order is None else state.index_select(0, self._order)

    def _unsorted(self, parts: Sequence[Tensor]) -> Tensor:
        if self._order is None:
            return parts[0]
        return torch.cat(tuple(parts)).index_select(0, self._order.argsort())
