"""`CfC`: the drop-in for `ncps.torch.CfC` that runs each cell over a whole sequence at once.

A wired CfC is a stack of cells: a neuron of the inter, command or motor layer sees the previous
layer's states and its own layer's past. So the whole sequence of one layer can be computed before
the next layer starts: three scans instead of three cells per time step.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, SupportsIndex

import ncps.torch
import torch
from ncps.wirings import Wiring
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ember_ext import _native
from ember_ext.nn._plain import ACTIVATIONS as ACTIVATION_LAYERS
from ember_ext.nn._plain import why_cells_differ, why_lstm_differs
from ember_ext.ops._autocast import autocast_dtype
from ember_ext.ops.cfc_scan import (
    ACTIVATIONS,
    MODES,
    Activation,
    PackedCells,
    as_timespans,
    cfc_scan,
    check_lengths,
    check_timespans,
    joined_maps,
)
from ember_ext.reference.cfc_scan import Affine, CfCWeights, activate

Hidden = Tensor | tuple[Tensor, Tensor]
"""[B, S], or with mixed memory a pair (h, c) of such; S = `state_size`."""


class CfC(ncps.torch.CfC):  # type: ignore[misc]
    """A closed-form continuous-time network: `ncps.torch.CfC` 1.0.1, many times faster.

    Constructor, initial values, state-dict keys and results are those of ncps, so checkpoints
    go back and forth unchanged. What ncps does and one might not expect is kept: a wiring's mask
    covers the input weights of ff1 and ff2, and neither time_a, time_b nor the recurrent weights;
    it counts as a (frozen) parameter; `activation` has no effect on a wired network; dropout
    starts at the second backbone layer.

    Differences to ncps, where ncps fails:
        - `timespans` of shape [B, T] or [B, T, 1] belong to each row and step. ncps squeezes a
          step's column to [B] and multiplies it along the *units*: an error, or a wrong result
          where B equals the number of units. Numbers are accepted too.
        - The default state has the input's dtype and not always float32.
        - T = 0 returns the state unchanged.
        - Arguments are checked, with messages that say what was expected.

    Where a cell's layer does more than apply its weights, because it was pruned, adapted, quantised
    or hooked, the cell is called step by step as in ncps, and a warning says once for which layer.

    Additions: `step` for streaming, `lengths` for padded batches, and `chunk_size`.

    Args:
        input_size: number of input features; None for a wiring that was built.
        units: number of hidden units, or an `ncps.wirings.Wiring`.
        proj_size: width of a linear layer on the output. Default: no such layer.
        return_sequences: return the output at every step and not only at the last. Default: True.
        batch_first: batched input is [B, T, C] and not [T, B, C]. Default: True.
        mixed_memory: run an LSTM cell on the state before each step. That takes several operations
            for every step, so it is much slower than without. Default: False.
        mode: "default", "pure" or "no_gate", see `ember_ext.ops.cfc_scan`.
        activation: of the backbone: "lecun_tanh" (the default), "tanh", "relu", "silu" or "gelu".
        backbone_units: width of each backbone layer. Default: 128. Not for wirings, like the next
            two.
        backbone_layers: number of backbone layers. Default: 1.
        backbone_dropout: dropout rate after the second and later backbone layers. Default: 0.
        chunk_size: time steps whose activations are kept at once for the backward pass: with 256
            steps, 64 take about half the memory and 1.1 to 1.4 times the time;
            `ember_ext.ops.cfc_scan` has more figures. Of no effect with mixed memory. Default: all,
            up to 1024 steps.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument does not fit.
    """

    chunk_size: int | None = None
    _packed: _Packed | None = None

    def __init__(
        self,
        input_size: int | None,
        units: Any,
        proj_size: int | None = None,
        return_sequences: bool = True,
        batch_first: bool = True,
        mixed_memory: bool = False,
        mode: str = "default",
        activation: str = "lecun_tanh",
        backbone_units: int | None = None,
        backbone_layers: int | None = None,
        backbone_dropout: float | None = None,
        *,
        chunk_size: int | None = None,
    ) -> None:
        if isinstance(units, Wiring):
            if input_size is None and not units.is_built():
                _fail("units", "a wiring that was built, or input_size given", "neither")
            if units.is_built() and input_size not in (None, units.input_dim):
                expected = f"{units.input_dim}, for which the wiring was built"
                _fail("input_size", expected, input_size)
        else:
            units = _count("units", units)
            if activation not in ACTIVATIONS:
                _fail("activation", f"one of {list(ACTIVATIONS)}", repr(activation))
        if mode not in MODES:
            _fail("mode", f"one of {list(MODES)}", repr(mode))
        if input_size is not None or not isinstance(units, Wiring):
            input_size = _count("input_size", input_size)
        proj_size, backbone_units, backbone_layers, chunk_size = (
            None if count is None else _count(name, count)
            for name, count in (
                ("proj_size", proj_size),
                ("backbone_units", backbone_units),
                ("backbone_layers", backbone_layers),
                ("chunk_size", chunk_size),
            )
        )
        if backbone_dropout is not None and not 0 <= backbone_dropout <= 1:
            _fail("backbone_dropout", "within [0, 1]", backbone_dropout)
        super().__init__(
            input_size,
            units,
            proj_size,
            return_sequences,
            batch_first,
            mixed_memory,
            mode,
            activation,
            backbone_units,
            backbone_layers,
            backbone_dropout,
        )
        if proj_size is not None and self._output_width != self.output_size:
            expected = (
                f"None as the wiring's {self.output_size} outputs are not a layer of their own"
            )
            _fail("proj_size", expected, proj_size)
        self.chunk_size = chunk_size

    @property
    def _cells(self) -> Sequence[Any]:
        cell = self.rnn_cell
        return [cell] if isinstance(cell, ncps.torch.CfCCell) else list(cell._layers)

    @property
    def _output_width(self) -> int:
        return int(self._cells[-1].hidden_size)

    @property
    def _layer_sizes(self) -> list[int]:
        return [int(cell.hidden_size) for cell in self._cells]

    def forward(
        self,
        input: Tensor,
        hx: Hidden | None = None,
        timespans: Tensor | float | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Hidden]:
        """Run the network over a sequence.

        Args:
            input: [B, T, C], or [T, B, C] without `batch_first`, or [T, C] for a single sequence.
            hx: initial state, [B, S], or [S] for a single sequence; with mixed memory a pair of
                such. Default: zeros.
            timespans: time since the previous step, ≥ 0: a number, or a tensor shaped as the input
                without C, or with C = 1. Default: 1.
            lengths: [B], integers: row b ends after `lengths[b]` steps. Its state is frozen from
                there on and its outputs are zero before `proj_size`'s layer. Default: all T.

        Returns:
            The output, shaped as the input with C the number of motor neurons (or units, or
            `proj_size`), or without T if `return_sequences` is False; and the state after each
            row's last step, shaped as `hx`.
        """
        batched = self._check_input(input)
        x = input if batched else input.unsqueeze(0)
        if batched and not self.batch_first:
            x = x.transpose(0, 1)
        h, c = self._initial_state(x, hx, batched)
        spans = self._batch_major_timespans(timespans, x, batched)
        if lengths is not None and not batched:
            _fail("lengths", "None for an unbatched sequence", "a tensor")
        if c is None:
            result = None
            if not torch.is_grad_enabled():
                self._forget_packed()
                result = self._run_packed(x, h, spans, lengths)
            y, h = result or self._scan(x, h, spans, lengths)
        else:
            y, h, c = self._step_through(x, h, c, spans, lengths)
        if not self.return_sequences:
            readout = self.fc(h[:, h.shape[1] - self._output_width :])
        else:
            readout = self.fc(y)
            if batched and not self.batch_first:
                readout = readout.transpose(0, 1)
        if not batched:
            readout, h = readout.squeeze(0), h.squeeze(0)
            c = None if c is None else c.squeeze(0)
        return readout, h if c is None else (h, c)

    def step(
        self, input: Tensor, hx: Hidden | None = None, timespan: Tensor | float | None = 1.0
    ) -> tuple[Tensor, Hidden]:
        """One time step, for streaming: `forward` on a sequence of length 1, without its dimension.

        Without gradients the weights are laid out once for many steps, and again after an optimiser
        or any operation has changed them, or a layer was replaced or hooked. Only what leaves no
        trace goes unnoticed until the next call of `forward` without gradients: a write past
        autograd, through NumPy or `.data`, another `.data`, or a layer whose `forward` is replaced.

        Args:
            input: [B, C], or [C] for a single sequence.
            hx: the state, as `forward` takes and returns it. Default: zeros.
            timespan: time since the previous step, ≥ 0: a number, a tensor of no dimension, [B] or
                [B, 1], without B for a single sequence. Default: 1.

        Returns:
            The output [B, units] (or motor neurons, or `proj_size`), and the new state.
        """
        batched = input.dim() == 2
        if not batched and input.dim() != 1:
            _fail("input", "[B, C] or [C]", list(input.shape))
        span = timespan if type(timespan) is float else self._step_timespan(timespan, input)
        if batched and isinstance(hx, Tensor) and not (self.use_mixed or torch.is_grad_enabled()):
            result = self._run_packed(input, hx, span)
            if result is not None:
                return self.fc(result[0]), result[1]
        time_dim = 1 if batched and self.batch_first else 0
        if isinstance(span, Tensor) and span.dim() > 0:
            span = span.reshape(input.shape[:-1]).unsqueeze(time_dim)
        y, hx = self.forward(input.unsqueeze(time_dim), hx, span)
        return (y.squeeze(time_dim) if self.return_sequences else y), hx

    def _run_packed(
        self, x: Tensor, h: Tensor, timespans: Tensor | float, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Motor output and final state, by weights packed before; None where `_scan` must do it.

        x is [B, T, C], or [B, C] for a single step. Arguments that `_scan` would complain about are
        left to it.
        """
        packed = self._packed_for(x, h)
        return None if packed is None else packed.run(x, h, timespans, lengths)

    def _packed_for(self, x: Tensor, h: Tensor) -> _Packed | None:
        """The packed weights, if they can take x and h: another thread may pack anew meanwhile."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or _native.transforms_active():
            return None
        packed = self._packed
        if packed is None or not packed.is_current():
            inference = any(tensor.is_inference() for tensor in self.rnn_cell.parameters())
            # An inference tensor does not say when it changes.
            if inference or not _native.has("cpu") or self._calls_cells():
                return None
            packed = self._packed = _Packed(self)
        if packed.dropouts and any(dropout.training for dropout in packed.dropouts):
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        if x.dtype != packed.dtype or h.dtype != packed.dtype:
            return None
        if x.shape[-1] != packed.inputs or h.shape != (x.shape[0], packed.state):
            return None
        return packed

    def _forget_packed(self) -> None:
        """Have the weights laid out anew: not every change of theirs leaves a trace."""
        if not torch.compiler.is_compiling():
            self._packed = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None  # other tensors may come to sit in the same parameters
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def _scan(
        self, x: Tensor, h0: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stack of scans: motor output [B, T, M] and final state [B, S]."""
        if self._calls_cells():
            y, h, _ = self._step_through(x, h0, None, timespans, lengths)
            return y, h
        finals = []
        for cell, h in zip(self._cells, h0.split(self._layer_sizes, 1), strict=True):
            weights, activation = _weights(cell)
            x, final = cfc_scan(
                x,
                weights,
                h,
                timespans=timespans,
                lengths=lengths,
                mode=cell.mode,
                activation=activation,
                dropout_scale=_dropout_scale(cell, x),
                chunk_size=self.chunk_size,
            )
            finals.append(final)
        return x, finals[0] if len(finals) == 1 else torch.cat(finals, 1)

    def _calls_cells(self) -> bool:
        """Whether the cells must be called at each step: they do more than apply their weights."""
        reason = why_cells_differ(self.rnn_cell)
        if reason is not None:
            _native.warn_once(f"nn.CfC calls its cells step by step, which is slower: {reason}")
        return reason is not None

    def _step_through(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        timespans: Tensor | float,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `_scan`, step by step; with c, the LSTM comes before the cells and ties them."""
        check_timespans(timespans, x)
        check_lengths(lengths, x)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype)
        if x.dtype != dtype and autocast_dtype(x.device.type) is None:
            _fail("input", f"of the weights' dtype {dtype}", x.dtype, TypeError)
        h, c = h.to(x.dtype), None if c is None else c.to(x.dtype)
        # Taken apart at once: the gradient of one step's slice is as large as the whole.
        inputs = x.unbind(1)
        if isinstance(timespans, Tensor):
            timespans = timespans.to(dtype)
        varying = isinstance(timespans, Tensor) and timespans.dim() > 0
        spans = timespans.unbind(1) if varying else (timespans,) * len(inputs)  # type: ignore[union-attr]
        advance = self._cells_step(x, inputs, spans, None if varying else timespans)
        remember = None if c is None else self._lstm_step(x, inputs)
        outputs = []
        for t in range(len(inputs)):
            mixed, new_c = (h, c) if remember is None else remember(t, h, c)
            value, new_h = advance(t, mixed)
            if lengths is not None:
                running = (t < lengths)[:, None]
                new_h = torch.where(running, new_h, h)
                new_c = None if c is None else torch.where(running, new_c, c)  # type: ignore[arg-type]
                value = torch.where(running, value, 0)
            h, c = new_h, new_c
            outputs.append(value)
        y = torch.stack(outputs, 1) if outputs else x.new_empty(x.shape[0], 0, self._output_width)
        return y, h, c

    def _lstm_step(self, x: Tensor, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """What takes step t of the LSTM from h and c to the next ones, [B, S] each."""
        reason = why_lstm_differs(self.lstm)
        if reason is not None:
            _native.warn_once(f"nn.CfC calls its LSTM at each step, which is slower: {reason}")
            return lambda t, h, c: self.lstm(inputs[t], (h, c))
        # The input's part of the LSTM has no recurrence. Its cell adds 1 to the third gate.
        size = int(self.state_size)
        offset = nn.functional.pad(x.new_ones(size), (2 * size, size))
        bias = self.lstm.input_map.bias + offset
        gates = nn.functional.linear(x, self.lstm.input_map.weight, bias).unbind(1)
        recurrent = self.lstm.recurrent_map.weight.t()
        return lambda t, h, c: _lstm(torch.addmm(gates[t], h, recurrent), c)

    def _cells_step(
        self,
        x: Tensor,
        inputs: Sequence[Tensor],
        spans: Sequence[Tensor | float],
        fixed: Tensor | float | None,
    ) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        """What takes step t of the cells from a state [B, S] to the output and the next state.

        Args:
            x: the input, [B, T, C].
            inputs: x at each step.
            spans: the time span of each step: a number, a tensor of no dimension, or [B, 1].
            fixed: that of all steps, or None if they vary.
        """
        if not torch.is_grad_enabled() and inputs:
            self._forget_packed()
            zeros = x.new_zeros(x.shape[0], int(self.state_size))
            packed = self._packed_for(inputs[0], zeros)
            # Nothing changes between the steps, so that the answer holds for all of them.
            if packed is not None and packed.run(inputs[0], zeros, spans[0], None) is not None:
                return lambda t, h: packed.run(inputs[t], h, spans[t], None)  # type: ignore[return-value]
        if self._calls_cells():
            return lambda t, h: self.rnn_cell.forward(inputs[t], h, spans[t])
        cells = [
            _step_by_step(cell, x if i == 0 else None, fixed, _dropout_scale(cell, x))
            for i, cell in enumerate(self._cells)
        ]

        def advance(t: int, h: Tensor) -> tuple[Tensor, Tensor]:
            value, states = inputs[t], []
            for run, part in zip(cells, h.split(self._layer_sizes, 1), strict=True):
                value = run(t, value, part, spans[t])
                states.append(value)
            return value, states[0] if len(states) == 1 else torch.cat(states, 1)

        return advance

    def _check_input(self, input: Tensor) -> bool:
        """Whether `input` is batched."""
        if not isinstance(input, Tensor):
            _fail("input", "a torch.Tensor", type(input).__name__, TypeError)
        layout = "[B, T, C]" if self.batch_first else "[T, B, C]"
        if input.dim() not in (2, 3):
            _fail("input", f"{layout} or [T, C]", list(input.shape))
        features = int(self._cells[0].input_size)
        if input.shape[-1] != features:
            _fail("input", f"{layout} or [T, C] with C = {features}", list(input.shape))
        return input.dim() == 3

    def _initial_state(
        self, x: Tensor, hx: Hidden | None, batched: bool
    ) -> tuple[Tensor, Tensor | None]:
        batch, size = x.shape[0], int(self.state_size)
        if hx is None:
            zeros = x.new_zeros(batch, size)
            return zeros, zeros if self.use_mixed else None
        if self.use_mixed:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                _fail("hx", "a pair (h, c) with mixed memory", type(hx).__name__, TypeError)
            h, c = hx
            return self._check_state("hx[0]", h, x, batched), self._check_state(
                "hx[1]", c, x, batched
            )
        return self._check_state("hx", hx, x, batched), None

    def _check_state(self, name: str, h: object, x: Tensor, batched: bool) -> Tensor:
        if not isinstance(h, Tensor):
            _fail(name, "a torch.Tensor", type(h).__name__, TypeError)
        if not h.is_floating_point():
            _fail(name, "of a floating dtype", h.dtype, TypeError)
        size = int(self.state_size)
        shape = (x.shape[0], size) if batched else (size,)
        symbols = "[B, S]" if batched else "[S]"
        if h.shape != shape:
            _fail(name, f"{symbols} = {list(shape)}", list(h.shape))
        return h if batched else h.unsqueeze(0)

    def _step_timespan(self, timespan: Tensor | float | None, input: Tensor) -> Tensor | float:
        """`timespan` as a float, or a floating tensor of no dimension, [B] or [B, 1]."""
        timespan = as_timespans("nn.CfC", "timespan", timespan, input.dtype)
        rows = input.shape[:-1]
        if isinstance(timespan, Tensor) and timespan.shape not in ((), rows, (*rows, 1)):
            expected = f"a scalar, [B] = {list(rows)} or [B, 1]" if rows else "a scalar or [1]"
            _fail("timespan", expected, list(timespan.shape))
        return timespan

    def _batch_major_timespans(
        self, timespans: Tensor | float | None, x: Tensor, batched: bool
    ) -> Tensor | float:
        """`timespans` as a float, a floating tensor of no dimension, or one of [B, T, 1]."""
        timespans = as_timespans("nn.CfC", "timespans", timespans, x.dtype)
        if not isinstance(timespans, Tensor) or timespans.dim() == 0:
            return timespans
        batch, steps = x.shape[:2]
        shape: tuple[int, ...] = (batch, steps) if self.batch_first else (steps, batch)
        symbols = "[B, T]" if self.batch_first else "[T, B]"
        if not batched:
            shape, symbols = (steps,), "[T]"
        if timespans.shape not in (shape, (*shape, 1)):
            expected = f"a scalar, {symbols} = {list(shape)} or the same with a last dimension 1"
            _fail("timespans", expected, list(timespans.shape))
        spans = timespans.reshape(shape)
        if not batched:
            spans = spans.unsqueeze(0)
        elif not self.batch_first:
            spans = spans.transpose(0, 1)
        return spans.unsqueeze(-1)


class _OptimizerSteps:
    """Counts the steps of all optimisers: fused ones change weights without a new version."""

    count = 0

    @classmethod
    def add(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.add)


class _Packed:
    """A network's weights laid out for inference, and what tells whether they still are its own."""

    def __init__(self, network: CfC) -> None:
        modules = list(network.rnn_cell.modules())
        self._sources = [
            (owned, name, value, value._version)
            for module in modules
            for owned in (module._parameters, module._buffers)
            for name, value in owned.items()
            if value is not None
        ]
        self._children = [(m._modules, dict(m._modules)) for m in modules if m._modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._optimizer_steps = _OptimizerSteps.count
        self._cells = network._cells
        self._fixed: tuple[float, PackedCells] | None = None
        self._varying: PackedCells | None = None
        self.inputs, self.state = int(self._cells[0].input_size), int(network.state_size)
        self.dtype = self._cells[0].ff1.weight.dtype
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]

    def is_current(self) -> bool:
        """Whether the cells have these parts still, without hooks, and the parts these weights.

        Every tensor must be the same object, unchanged since as far as autograd can tell. Where its
        memory lies would take as long to ask as all the rest.
        """
        if self._optimizer_steps != _OptimizerSteps.count or any(self._hooks):
            return False
        for children, known in self._children:
            if children != known:
                return False
        try:
            for owned, name, value, version in self._sources:
                if owned[name] is not value or value._version != version:
                    return False
        except KeyError:  # pruned or parametrised: the weight goes by another name
            return False
        return True

    def run(
        self, x: Tensor, h: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """As `PackedCells.run`, or None if a time span or a length is not a good one."""
        if lengths is not None:
            if not isinstance(lengths, Tensor) or lengths.shape != x.shape[:1]:
                return None
            if lengths.dtype not in (torch.int32, torch.int64) or lengths.device != x.device:
                return None
            if not bool(((lengths >= 0) & (lengths <= x.shape[1])).all()):
                return None
            lengths = lengths.to(torch.int64)
        if isinstance(timespans, Tensor):
            shape = x.shape[:-1]
            if not bool(((timespans >= 0) & timespans.isfinite()).all()):
                return None
            timespans = timespans.detach().reshape(() if timespans.numel() == 1 else shape)
            timespans = timespans.expand(shape)
        else:
            # Weights for a single time span are a quarter less work, and a copy: one is kept.
            if self._fixed is None and 0 <= timespans < math.inf:
                self._fixed = timespans, self._pack(timespans)
            if self._fixed is not None and self._fixed[0] == timespans:
                return self._fixed[1].run(x, h, None, lengths)
            if not 0 <= timespans < math.inf:
                return None
            timespans = h.new_full(x.shape[:-1], timespans)
        if self._varying is None:
            self._varying = self._pack(None)
        return self._varying.run(x, h, timespans, lengths)

    def _pack(self, timespan: float | None) -> PackedCells:
        with torch.no_grad():
            cells, activations = zip(*map(_weights, self._cells), strict=True)
            return PackedCells(
                cells, mode=self._cells[0].mode, activation=activations[0], timespan=timespan
            )


def _lstm(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Output and memory of ncps' LSTM cell from its gates before activation, [B, 4 S].

    The gates are value, write, keep and read, and 1 was added to keep.
    """
    size = c.shape[1]
    value, gates = z.split((size, 3 * size), 1)
    write, keep, read = torch.sigmoid(gates).chunk(3, 1)
    c = torch.addcmul(c * keep, torch.tanh(value), write)
    return torch.tanh(c) * read, c


def _step_by_step(
    cell: Any, x: Tensor | None, timespan: Tensor | float | None, scale: Tensor | None
) -> Callable[[int, Tensor, Tensor, Any], Tensor]:
    """A cell as a function of t, its input [B, I], its state [B, H] and the time span [B, 1].

    As `reference.cfc_cell`, by as few operations a step as can be: masks, the joining of the
    weights, and the product with the input are done for all steps at once.

    Args:
        cell: an ncps cell.
        x: its input at all steps, [B, T, I], where that is known, which is used then.
        timespan: of all steps, or None if each has its own.
        scale: dropout of the backbone, [B, T, layers - 1, U], or None.
    """
    weights, activation = _weights(cell)
    hidden, mode = int(cell.hidden_size), cell.mode
    first, *maps = joined_maps(weights, mode, timespan, weights.ff1.weight.dtype)
    biases, matrices = (
        zip(*((m[:, 0], m[:, 1:].t()) for m in maps), strict=True) if maps else ((), ())
    )
    bias, matrix = first[:, 0], first[:, 1:].t()
    products: Sequence[Tensor] = ()
    if x is not None:
        products = nn.functional.linear(x, matrix[: x.shape[2]].t(), bias).unbind(1)
        matrix = matrix[x.shape[2] :]
    scales = None if scale is None else scale.unbind(1)

    def run(t: int, value: Tensor, h: Tensor, span: Any) -> Tensor:
        if products:
            z = torch.addmm(products[t], h, matrix)
        else:
            z = torch.addmm(bias, torch.cat((value, h), 1), matrix)
        for layer, affine in enumerate(zip(biases, matrices, strict=True)):
            z = activate(z, activation)
            if scales is not None and layer > 0:
                z = z * scales[t][:, layer - 1]
            z = torch.addmm(affine[0], z, affine[1])
        if mode == "pure":
            decay = torch.exp(-span * (weights.w_tau.abs() + z.abs()))  # type: ignore[union-attr]
            return weights.amplitude - weights.amplitude * decay * z  # type: ignore[operator]
        both, gate = z.split((2 * hidden, z.shape[1] - 2 * hidden), 1)
        if timespan is None:
            time_a, time_b = gate.chunk(2, 1)
            gate = torch.addcmul(time_b, time_a, span)
        gate = torch.sigmoid(gate)
        ff1, ff2 = torch.tanh(both).chunk(2, 1)
        if mode == "no_gate":
            return torch.addcmul(ff1, gate, ff2)
        return torch.lerp(ff1, ff2, gate)

    return run


def _weights(cell: Any) -> tuple[CfCWeights, Activation]:
    """The parameters of an ncps cell, and the name of its backbone's activation."""
    backbone: list[Affine] = []
    activation: Activation = "lecun_tanh"
    for layer in () if cell.backbone is None else cell.backbone:
        if isinstance(layer, nn.Linear):
            backbone.append(Affine(layer.weight, layer.bias))
        elif type(layer) in ACTIVATION_LAYERS:
            activation = ACTIVATION_LAYERS[type(layer)]
    pure = cell.mode == "pure"

    def head(name: str) -> Affine | None:
        return None if pure else Affine(getattr(cell, name).weight, getattr(cell, name).bias)

    weights = CfCWeights(
        ff1=Affine(cell.ff1.weight, cell.ff1.bias),
        ff2=head("ff2"),
        time_a=head("time_a"),
        time_b=head("time_b"),
        mask=cell.sparsity_mask,
        w_tau=cell.w_tau.flatten() if pure else None,
        amplitude=cell.A.flatten() if pure else None,
        backbone=tuple(backbone),
    )
    return weights, activation


def _dropout_scale(cell: Any, x: Tensor) -> Tensor | None:
    """Fresh dropout of a cell's backbone, [B, T, layers - 1, U], if it has any and trains."""
    layers = () if cell.backbone is None else cell.backbone
    dropouts = [layer for layer in layers if isinstance(layer, nn.Dropout)]
    if not dropouts or not dropouts[0].training:
        return None
    units = cell.ff1.weight.shape[1]
    ones = x.new_ones(x.shape[0], x.shape[1], len(dropouts), units)
    return nn.functional.dropout(ones, dropouts[0].p)


def _count(argument: str, value: Any) -> int:
    """`value` as an int, of NumPy's integers, too."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        _fail(argument, "an integer", type(value).__name__, TypeError)
    count = operator.index(value)
    if count < 0:
        _fail(argument, ">= 0", count)
    return count


def _fail(
    argument: str, expected: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    raise error(f"ember_ext.nn.CfC: {argument} must be {expected}, got {got}")
