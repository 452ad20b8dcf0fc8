"""`LiquidLayer`: what every liquid layer of ncps does around its cells.

Arguments, the order of batch and time, hidden states, mixed memory, streaming, and the calling of
changed cells. A layer says what its cells are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from ember_ext import _native
from ember_ext.nn import _arguments
from ember_ext.nn._arguments import Hidden
from ember_ext.nn._mixed_memory import memory_step
from ember_ext.nn._packing import Packing
from ember_ext.nn._plain import why_lstm_differs
from ember_ext.nn._recorded import RecordedCells, record
from ember_ext.nn._rows import Rows
from ember_ext.nn._streamer import Streamer
from ember_ext.ops import _checks
from ember_ext.ops._autocast import autocast_dtype
from ember_ext.ops._sequence import as_lengths, check_timespans
from ember_ext.reference.time_loop import records_loops

Advance = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Takes step t of the cells from a state [B, S] to their output [B, M] and the next state."""


class LiquidLayer(Packing):
    """A recurrent layer with ncps' calling convention, to be mixed into a module of ncps.

    It adds no state to that module, so that an instance of it can change class.
    """

    layer_name: ClassVar[str]
    """The class' name in `ember_ext.nn`, for messages."""
    _positive_timespans: ClassVar[bool] = False
    """Whether a time span of 0 is an error."""

    batch_first: bool
    return_sequences: bool
    use_mixed: bool
    state_size: int
    rnn_cell: Any
    lstm: Any
    input_size: int | None
    wiring_or_units: Any
    chunk_size: int | None = None

    @property
    def _features(self) -> int:
        """Width of the input, C."""
        raise NotImplementedError

    @property
    def _span_units(self) -> int | None:
        """How many time spans a step may have, one for each unit of every cell; None if none."""
        return None

    @property
    def _output_width(self) -> int:
        """Width of the cells' output, M."""
        raise NotImplementedError

    def _scan_cells(
        self, x: Tensor, h0: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The cells over the whole sequence, by the operator: output [B, T, M] and final state."""
        raise NotImplementedError

    def _plain_steps(
        self,
        rows: Rows,
        packed: Tensor,
        fixed: Tensor | float | None,
        spans: Sequence[Any],
    ) -> Advance:
        """The cells step by step, in plain PyTorch; arguments as for `_steps`."""
        raise NotImplementedError

    def _recorded_cells(self, x: Tensor) -> RecordedCells:
        """The cells as a loop over x, [B, T, C], can have them."""
        raise NotImplementedError

    def _map_recorded(self, y: Tensor) -> Tensor:
        """The cells' output from what a recorded loop returned, [B, T, M]."""
        return y

    def _why_cells_differ(self) -> str | None:
        """The reason why the cells' weights do not tell what they compute; None if they do."""
        raise NotImplementedError

    def _last_output(self, h: Tensor) -> Tensor:
        """The cells' output [B, M] in a state [B, S]."""
        raise NotImplementedError

    def _read_out(self, y: Tensor) -> Tensor:
        """The layer's output from the cells', [..., M]."""
        return y

    def _settings(self) -> list[tuple[str, object, object]]:
        """The name, the value and the default of each option that modules within do not show."""
        return [
            ("return_sequences", self.return_sequences, True),
            ("batch_first", self.batch_first, True),
            ("mixed_memory", self.use_mixed, False),
            ("chunk_size", self.chunk_size, None),
        ]

    def extra_repr(self) -> str:
        """The sizes, and the options that differ from their defaults."""
        inputs = self.wiring_or_units.input_dim if self.input_size is None else self.input_size
        options = [f"{name}={v!r}" for name, v, default in self._settings() if v != default]
        return ", ".join([f"{inputs}, {self.state_size}", *options])

    def forward(
        self,
        input: Tensor,
        hx: Hidden | None = None,
        timespans: Tensor | float | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Hidden]:
        """Run the network over a sequence.

        Args:
            input: [B, T, C], or [T, B, C] without `batch_first`, or [T, C] for a single sequence.
            hx: initial state, [B, S], or [S] for a single sequence; with mixed memory a pair of
                such. Default: zeros.
            timespans: time since the previous step, >= 0, for an LTC > 0. It is a number, or a
                tensor shaped as the input without C, or with C = 1. B = 1 stands for all rows
                alike. A span for each unit goes step by step. Default: 1.
            lengths: [B], integers of any kind: row b ends after `lengths[b]` steps. Its state is
                frozen from there on, and its outputs are zero before the output layer. The input
                and the time spans may hold anything there. Default: all T.

        Returns:
            The output, shaped as the input with C the number of motor neurons (or units, or
            `proj_size`), or without T if `return_sequences` is False; and the state after each
            row's last step, shaped as `hx`.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: a shape or a value does not fit.
        """
        layer = self.layer_name
        batched = _arguments.check_input(layer, input, self._features, self.batch_first)
        x = input if batched else input.unsqueeze(0)
        if batched and not self.batch_first:
            x = x.transpose(0, 1)
        if not (x.is_floating_point() or self.use_mixed):
            x = x.to(self._weights_dtype(x))  # as ncps, by promotion
        h, c = _arguments.initial_state(
            layer, x, hx, size=int(self.state_size), mixed=self.use_mixed, batched=batched
        )
        spans = _arguments.batch_major_timespans(
            layer,
            timespans,
            x,
            batched=batched,
            batch_first=self.batch_first,
            units=self._span_units,
        )
        if lengths is not None and not batched:
            got = type(lengths).__name__
            _arguments.fail(layer, "lengths", "None for an unbatched sequence", got)
        lengths = as_lengths(f"nn.{layer}", lengths, x)
        if c is None:
            y, h = self._run(x, h, spans, lengths)
        else:
            y, h, c = self._step_through(x, h, c, spans, lengths)
        if not self.return_sequences:
            readout = self._read_out(self._output_at_end(y, h, lengths))
        else:
            readout = self._read_out(y)
            if batched and not self.batch_first:
                readout = readout.transpose(0, 1)
        if not batched:
            readout, h = readout.squeeze(0), h.squeeze(0)
            c = None if c is None else c.squeeze(0)
        return readout, h if c is None else (h, c)

    def step(
        self, input: Tensor, hx: Hidden | None = None, timespan: Tensor | float | None = 1.0
    ) -> tuple[Tensor, Hidden]:
        """Take one time step: `forward` on a sequence of length 1, without its dimension.

        Without gradients the weights are laid out once for many steps. Each step compares them with
        what was laid out, so it follows every change of them at once, whoever makes it: an
        optimiser, a soft update through ``.data``, or another process.

        Args:
            input: [B, C], or [C] for a single sequence.
            hx: the state, as `forward` takes and returns it. Default: zeros.
            timespan: time since the previous step, >= 0: a number, or a tensor that has no
                dimension, or is [B] or [B, 1], without B for a single sequence. B = 1 stands for
                all rows alike. Default: 1.

        Returns:
            The output [B, units] (or motor neurons, or `proj_size`), and the new state.
        """
        batched = input.dim() == 2
        if not batched and input.dim() != 1:
            _arguments.fail(self.layer_name, "input", "[B, C] or [C]", list(input.shape))
        span, of_units = timespan, False
        if type(span) is not float:
            span = _arguments.step_timespan(self.layer_name, timespan, input, self._span_units)
            of_units = isinstance(span, Tensor) and span.dim() > 1
        if (
            batched
            and not of_units
            and isinstance(hx, Tensor)
            and not (self.use_mixed or torch.is_grad_enabled())
        ):
            result = self._run_packed(input, hx, span)
            if result is not None:
                return self._read_out(result[0]), result[1]
        time_dim = 1 if batched and self.batch_first else 0
        if isinstance(span, Tensor) and span.dim() > 0:
            span = span.unsqueeze(time_dim)
        y, hx = self.forward(input.unsqueeze(time_dim), hx, span)
        return (y.squeeze(time_dim) if self.return_sequences else y), hx

    def streamer(self) -> Streamer:
        """Copy this layer for streaming, to take steps that do not look for changed weights.

        Use it where weights stay as they are, such as on a robot. :meth:`step` is always current.
        """
        return Streamer(self)

    def _run(
        self, x: Tensor, h: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cells' output [B, T, M] and final state [B, S], by the fastest way that there is."""
        if _spans_of_units(timespans):
            _native.warn_once(
                f"nn.{self.layer_name} goes step by step, which is slower: units have time spans "
                "of their own"
            )
            y, h, _ = self._step_through(x, h, None, timespans, lengths)
            return y, h
        if not torch.is_grad_enabled():
            # The operator reports arguments that do not fit.
            result = self._run_packed(x, h, timespans, lengths)
            if result is not None:
                return result
        if self._calls_cells():
            y, h, _ = self._step_through(x, h, None, timespans, lengths)
            return y, h
        return self._scan_cells(x, h, timespans, lengths)

    def _output_at_end(self, y: Tensor, h: Tensor, lengths: Tensor | None) -> Tensor:
        """The cells' output [B, M] at each row's last step, from all outputs and the final state.

        A cell that was changed may return an output that its state does not tell.
        """
        if y.shape[1] == 0 or self._why_cells_differ() is None:
            return self._last_output(h)
        if lengths is None:
            return y[:, -1]
        last = y[torch.arange(y.shape[0], device=y.device), (lengths - 1).clamp(min=0)]
        return torch.where((lengths > 0)[:, None], last, self._last_output(h))

    def _calls_cells(self) -> bool:
        """Whether the cells must be called at each step: they do more than apply their weights."""
        reason = self._why_cells_differ()
        if reason is not None:
            _native.warn_once(
                f"nn.{self.layer_name} calls its cells step by step, which is slower: {reason}"
            )
        return reason is not None

    def _step_through(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        timespans: Tensor | float,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run as `_run`, step by step; with c, the LSTM comes before the cells and ties them."""
        layer = f"nn.{self.layer_name}"
        check_timespans(
            layer,
            timespans,
            x,
            positive=self._positive_timespans,
            lengths=lengths,
            units=timespans.shape[-1] if _spans_of_units(timespans) else 1,  # type: ignore[union-attr]
        )
        dtype = self._weights_dtype(x)
        if x.dtype != dtype and autocast_dtype(x.device.type) is None:
            expected = f"of the weights' dtype {dtype}"
            _arguments.fail(self.layer_name, "input", expected, x.dtype, TypeError)
        h, c = h.to(x.dtype), None if c is None else c.to(x.dtype)
        if isinstance(timespans, Tensor):
            timespans = timespans.to(dtype)
        records = c is not None and self._records_steps(x)
        leaves = lengths is not None and not records and self._lets_rows_leave(lengths)
        beyond = None
        if lengths is not None and not leaves:
            beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            # Values beyond the end of a row must not come back as NaN in a gradient.
            x = x.masked_fill(beyond[..., None], 0)
            if isinstance(timespans, Tensor) and timespans.dim() > 0:
                timespans = timespans.masked_fill(beyond[..., None], 1)
        if c is not None and records:
            y, h, last_c = record(self._recorded_cells(x), self.lstm, x, h, c, timespans, lengths)
            y = self._map_recorded(y)
            return y if beyond is None else y.masked_fill(beyond[..., None], 0), h, last_c
        rows = Rows(x.shape[0], x.shape[1], lengths if leaves else None)
        packed = rows.pack(x)
        varying = isinstance(timespans, Tensor) and timespans.dim() > 0
        spans = rows.split(rows.pack(timespans)) if varying else repeat(timespans, len(rows.counts))  # type: ignore[arg-type]
        advance = self._steps(rows, packed, None if varying else timespans, tuple(spans))
        remember = None if c is None else memory_step(self.layer_name, self.lstm, packed, rows)

        def step(t: int, h: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...]:
            if remember is None or c is None:
                return advance(t, h)
            mixed, c = remember(t, h, c)
            return *advance(t, mixed), c

        outputs, states = rows.run(step, (h,) if c is None else (h, c), beyond)
        if lengths is not None:
            # Under autocast a row without steps has a wider state than the others.
            states = tuple(s.to(torch.promote_types(s.dtype, x.dtype)) for s in states)
        y = rows.unpack(outputs) if outputs else x.new_zeros(*x.shape[:2], self._output_width)
        return y, states[0], None if c is None else states[1]

    def _lets_rows_leave(self, lengths: Tensor) -> bool:
        """Whether rows may leave the batch of the steps when they end.

        A cell that is called may count on a batch that stays the same. Without any step there would
        be nothing for gradients to come through.
        """
        if not _checks.is_readable(lengths) or not bool(lengths.any()):
            return False
        return not (self._calls_cells() or (self.use_mixed and why_lstm_differs(self.lstm)))

    def _weights_dtype(self, x: Tensor) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype)

    def _records_steps(self, x: Tensor) -> bool:
        """Whether the steps on x, [B, T, C], are recorded as a loop, and what they do is known."""
        return records_loops(x) and not (self._calls_cells() or why_lstm_differs(self.lstm))

    def _steps(
        self,
        rows: Rows,
        packed: Tensor,
        fixed: Tensor | float | None,
        spans: Sequence[Tensor | float],
    ) -> Advance:
        """The cells step by step, by the fastest way that there is.

        Args:
            rows: which rows take each step.
            packed: the input, as `rows` packs it, [..., C].
            fixed: the time span of all steps, or None if they vary.
            spans: the time span of each step: a number, a tensor of no dimension, or one for each
                of its rows, [B, 1] or, one for each unit, [B, H].
        """
        inputs = rows.split(packed)
        if not torch.is_grad_enabled() and inputs and not _spans_of_units(spans[0]):
            zeros = packed.new_zeros(inputs[0].shape[0], int(self.state_size))
            if self._run_packed(inputs[0], zeros, spans[0]) is not None:
                # The check at the first step holds for all of them.
                laid_out = self._packed_for(inputs[0], zeros)
                if laid_out is not None:
                    run = functools.partial(laid_out.run, checked=False)
                    return lambda t, h: run(inputs[t], h, spans[t])  # type: ignore[return-value]
        if self._calls_cells():
            return lambda t, h: self.rnn_cell.forward(inputs[t], h, spans[t])
        return self._plain_steps(rows, packed, fixed, spans)


def _spans_of_units(timespans: Tensor | float) -> bool:
    """Whether time spans, [..., 1 or units], differ from unit to unit."""
    return isinstance(timespans, Tensor) and timespans.dim() > 1 and timespans.shape[-1] != 1
