"""A set of labelled series of different lengths, with the time spans between their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeriesSet:
    """N labelled series, padded to the length T of the longest.

    Beyond the end of a series its values are 0 and its time spans 1.

    Attributes:
        x: values, float32 [N, T, C]. NaN where a value is missing.
        timespans: time since the step before, float32 [N, T]; of the first step, the time since
            recording began.
        lengths: int64 [N], each at least 1.
        labels: the class of each series, int64 [N].
    """

    x: Tensor
    timespans: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C."""
        return int(self.x.shape[2])

    @classmethod
    def of(
        cls,
        values: Sequence[Tensor],
        labels: Sequence[int],
        timespans: Sequence[Tensor] | None = None,
    ) -> SeriesSet:
        """Pad some series.

        Args:
            values: a tensor [T_i, C] for each series, with one step at least.
            labels: the class of each.
            timespans: a tensor [T_i] for each. Default: 1 everywhere.

        Raises:
            ValueError: the numbers of series, steps or channels do not fit together.
        """
        counts = [len(series) for series in values]
        if not counts or min(counts) == 0 or len({series.shape[1] for series in values}) != 1:
            shapes = [list(series.shape) for series in values[:3]]
            raise ValueError(
                f"values must be series [T, C] of one or more steps and of equal C, got {shapes}"
            )
        spans = [torch.ones(count) for count in counts] if timespans is None else timespans
        if len(labels) != len(counts) or [len(span) for span in spans] != counts:
            raise ValueError(
                f"labels and timespans must be for {len(counts)} series of "
                f"{counts[:3]} and so on steps, got {len(labels)} labels and time spans of "
                f"{[len(span) for span in spans][:3]} and so on"
            )
        return cls(
            torch.nn.utils.rnn.pad_sequence([v.float() for v in values], batch_first=True),
            torch.nn.utils.rnn.pad_sequence([s.float() for s in spans], True, 1.0),
            torch.tensor(counts),
            torch.tensor(labels),
        )

    def subset(self, rows: Tensor) -> SeriesSet:
        """Some of the series, int64 [M], cut to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        return SeriesSet(
            self.x[rows, :longest], self.timespans[rows, :longest], lengths, self.labels[rows]
        )

    def to(self, device: torch.device) -> SeriesSet:
        """The same on another device."""
        fields = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return SeriesSet(**fields)

    def drop_steps(self, fraction: float, seed: int) -> SeriesSet:
        """Take away a fraction of each series' steps, chosen at random.

        The time span of a step that stays is the sum of its own and of those of the dropped steps
        before it, so the times of all steps stay what they were.

        Args:
            fraction: of the steps, from 0 on and below 1. Each series loses this fraction rounded
                to a whole number of steps, and keeps one step at least.
            seed: equal seeds drop equal steps.

        Raises:
            ValueError: `fraction` is out of range.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction must be from 0 on and below 1, got {fraction}")
        generator = torch.Generator().manual_seed(seed)
        rows, steps = self.timespans.shape
        lengths = (self.lengths - (fraction * self.lengths).round().long()).clamp(min=1)
        noise = torch.rand(rows, steps, generator=generator)
        beyond = torch.arange(steps) >= self.lengths[:, None]
        # The steps with the smallest noise stay, in the order of time.
        rank = noise.masked_fill(beyond, 2).argsort(1).argsort(1)
        kept = rank < lengths[:, None]
        longest = int(lengths.max())
        order = (~kept).long().argsort(dim=1, stable=True)[:, :longest]
        times = self.timespans.cumsum(1).gather(1, order)
        x = self.x.gather(1, order[..., None].expand(-1, -1, self.channels))
        spans = times.diff(dim=1, prepend=times.new_zeros(rows, 1))
        padding = torch.arange(longest) >= lengths[:, None]
        return SeriesSet(
            x.masked_fill(padding[..., None], 0),
            spans.masked_fill(padding, 1),
            lengths,
            self.labels,
        )


@dataclass(frozen=True)
class Scaling:
    """Brings each channel to mean 0 and standard deviation 1, and fills in missing values.

    Attributes:
        mean: of each channel [C], over the steps of the training set.
        sd: standard deviations [C]; 1 where a channel is constant.
        mask: whether a mask of the values that are there is added, as C further channels; so it is
            if the training set has missing values.
    """

    mean: Tensor
    sd: Tensor
    mask: bool

    @classmethod
    def of(cls, series: SeriesSet) -> Scaling:
        """The scaling of a training set."""
        steps = series.x[torch.arange(series.x.shape[1]) < series.lengths[:, None]]
        there = ~steps.isnan()
        count = there.sum(0).clamp(min=1)
        mean = steps.nan_to_num(0).sum(0) / count
        sd = ((steps - mean).nan_to_num(0).square().sum(0) / count).sqrt()
        return cls(mean, torch.where(sd > 0, sd, 1.0), not bool(there.all()))

    @property
    def channels(self) -> int:
        """The channels that come out."""
        return len(self.mean) * (2 if self.mask else 1)

    def apply(self, series: SeriesSet) -> SeriesSet:
        """The series as a model takes them, a missing value as its channel's mean."""
        valid = (torch.arange(series.x.shape[1]) < series.lengths[:, None])[..., None]
        x = ((series.x - self.mean) / self.sd).nan_to_num(0) * valid
        if self.mask:
            x = torch.cat([x, (~series.x.isnan() & valid).float()], 2)
        return dataclasses.replace(series, x=x)
