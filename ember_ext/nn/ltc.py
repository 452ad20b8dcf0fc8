"""`LTC`: the drop-in for `ncps.torch.LTC` that runs the cell over a whole sequence at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ncps.torch
import torch
from ncps.wirings import Wiring
from torch import Tensor

from ember_ext.nn import cells as _cells  # noqa: F401  (ours take the place of ncps')
from ember_ext.nn import ltc_cell
from ember_ext.nn._arguments import check_dtype, check_sizes, count, creating_on, fail, settle
from ember_ext.nn._laid_out import LaidOut
from ember_ext.nn._laid_out_ltc import LaidOutLTC
from ember_ext.nn._liquid import Advance, LiquidLayer
from ember_ext.nn._recorded import RecordedCells
from ember_ext.nn._rows import Rows
from ember_ext.nn.ltc_cell import Ready
from ember_ext.reference.ltc_scan import ltc_cell as reference_cell


class LTC(LiquidLayer, ncps.torch.LTC):  # type: ignore[misc]
    """A liquid time-constant (LTC) network: `ncps.torch.LTC` 1.0.1, many times faster.

    Constructor, initial values, state-dict keys and results are those of ncps, so checkpoints go
    back and forth unchanged. This includes what one might not expect. Both `synapse_count` and
    `sensory_synapse_count` count the synapses between units. The masks of the wiring count as
    (frozen) parameters. Without `implicit_param_constraints` negative weights are used as they are,
    and a denominator may vanish.

    It differs from ncps where ncps fails:

    - The cell computes with the parameters that the module has, see :class:`~ember_ext.nn.LTCCell`.
      So parametrisations, pruning, `torch.func.functional_call` and `load_state_dict(assign=True)`
      have an effect.
    - `timespans` of shape [B, T] or [B, T, 1] belong to each row and step. ncps squeezes a step's
      column to [B] and divides the *units* by it. That is an error, or a wrong result where B
      equals the number of units. Numbers are accepted too.
    - Synapses that do not exist have no influence, even if their weights are infinite or NaN.
    - The default state has the dtype of the input and not always float32.
    - T = 0 returns the state unchanged.
    - Arguments are checked, with messages that say what was expected. A time span must be above 0,
      because the cell divides by it.

    A cell that does more than apply its weights, because it was pruned or hooked, or one of its
    functions was replaced, is called step by step as in ncps. A warning says once why. The cost is
    that of the synapses that exist. torch.compile, export, `torch.func` and masks that require a
    gradient compute all synapses, with a weight of zero for those that do not exist.

    :meth:`step` for streaming, `lengths` for padded batches, and `chunk_size` are additions.

    Args:
        input_size: number of input features; None for a wiring that was built.
        units: number of fully connected units, or an `ncps.wirings.Wiring`.
        return_sequences: return the output at every step and not only at the last. Default: True.
        batch_first: batched input is [B, T, C] and not [T, B, C]. Default: True.
        mixed_memory: run an LSTM cell on the state before each step. That takes several operations
            for every step, so it is slower. Default: False.
        input_mapping: "affine" (the default) scales and shifts each feature, "linear" scales it,
            and anything else leaves it as it is.
        output_mapping: the same for each motor neuron.
        ode_unfolds: solver steps in one time step, at least 1. Default: 6.
        epsilon: added to the denominator of the solver, at least 0. Default: 1e-8.
        implicit_param_constraints: keep conductances and capacitances positive by a softplus.
            Without it, `rnn_cell.apply_weight_constraints()` clips them. Default: True.
        chunk_size: time steps for which the backward pass keeps the states of the solver at once,
            see :func:`~ember_ext.ltc_scan`. It has no effect with mixed memory.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters, floating. Initial values are drawn in torch's default dtype and
            rounded. Default: torch's default dtype.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument does not fit.

    Examples::

        >>> import torch
        >>> from ncps.wirings import AutoNCP
        >>> from ember_ext import nn
        >>> model = nn.LTC(3, AutoNCP(16, 2))
        >>> x, spans = torch.randn(8, 20, 3), 0.1 + torch.rand(8, 20)
        >>> y, h = model(x, timespans=spans)
        >>> y.shape, h.shape
        (torch.Size([8, 20, 2]), torch.Size([8, 16]))
    """

    layer_name = "LTC"
    _positive_timespans = True

    def __init__(
        self,
        input_size: int | None,
        units: Any,
        return_sequences: bool = True,
        batch_first: bool = True,
        mixed_memory: bool = False,
        input_mapping: str | None = "affine",
        output_mapping: str | None = "affine",
        ode_unfolds: int = 6,
        epsilon: float = 1e-8,
        implicit_param_constraints: bool = True,
        *,
        chunk_size: int | None = None,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("LTC", dtype)
        input_size, units = check_sizes("LTC", input_size, units)
        if isinstance(units, Wiring) and units.output_dim is None:
            fail("LTC", "units", "a wiring with an output_dim", None)
        ode_unfolds, epsilon = ltc_cell.check_solver("LTC", ode_unfolds, epsilon)
        if chunk_size is not None:
            chunk_size = count("LTC", "chunk_size", chunk_size)
        with creating_on(device):
            super().__init__(
                input_size,
                units,
                return_sequences,
                batch_first,
                mixed_memory,
                input_mapping,
                output_mapping,
                ode_unfolds,
                epsilon,
                implicit_param_constraints,
            )
        ltc_cell.adopt(self.rnn_cell)
        self.chunk_size = chunk_size
        settle(self, device, dtype)

    @property
    def _features(self) -> int:
        return int(self.rnn_cell.sensory_size)

    @property
    def _span_units(self) -> int | None:
        return int(self.state_size)

    @property
    def _output_width(self) -> int:
        return ltc_cell.output_width(self.rnn_cell)

    def _run(
        self, x: Tensor, h: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run in the wider dtype of input and weights, as ncps does; see `LiquidLayer._run`."""
        return super()._run(x.to(self._dtype_for(x)), h, timespans, lengths)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, self.rnn_cell.gleak.dtype)

    def _scan_cells(
        self, x: Tensor, h0: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        cell = self.rnn_cell
        running = None
        if lengths is not None:
            running = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
            # Values beyond the end of a row must not come back as NaN in the mapping's gradient.
            x = torch.where(running, x, 0)
        u = ltc_cell.map_inputs(cell, x)
        y, h = ltc_cell.scan(cell, Ready.of(cell), u, h0, timespans, lengths, self.chunk_size)
        y = ltc_cell.map_outputs(cell, y)
        return y if running is None else torch.where(running, y, 0), h

    def _lay_out(self) -> LaidOut:
        return LaidOutLTC(self.rnn_cell, self)

    def _why_cells_differ(self) -> str | None:
        reason = ltc_cell.why_ltc_cell_differs(self.rnn_cell)
        return reason and f"rnn_cell{reason}"

    @classmethod
    def _adopt(cls, module: Any) -> None:
        super()._adopt(module)
        ltc_cell.adopt(module.rnn_cell)

    def _release(self) -> None:
        super()._release()
        ltc_cell.release(self.rnn_cell)

    def _why_not_ncps(self) -> str | None:
        reason = ltc_cell.why_not_ncps(self.rnn_cell)
        return reason and f"rnn_cell{reason}"

    def _last_output(self, h: Tensor) -> Tensor:
        return self.rnn_cell._map_outputs(h)  # type: ignore[no-any-return]

    def _step_through(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        ltc_cell.compute_weight_hooks(self.rnn_cell)
        return super()._step_through(*arguments)

    def _recorded_cells(self, x: Tensor) -> RecordedCells:
        """See `LiquidLayer._recorded_cells`; the output is yet to be mapped."""
        cell, ready = self.rnn_cell, Ready.of(self.rnn_cell)
        unfolds, eps, width = int(cell._ode_unfolds), float(cell._epsilon), self._output_width

        def step(constants: Any, u: Tensor, h: Tensor, span: Any) -> tuple[Tensor, Tensor]:
            weights, synapses = constants
            h = reference_cell(u, h, weights, span, synapses, ode_unfolds=unfolds, eps=eps)
            return h.narrow(1, 0, width), h

        return RecordedCells(step, ready, ltc_cell.map_inputs(cell, x), width)

    def _map_recorded(self, y: Tensor) -> Tensor:
        return ltc_cell.map_outputs(self.rnn_cell, y)

    def _plain_steps(
        self,
        rows: Rows,
        packed: Tensor,
        fixed: Tensor | float | None,
        spans: Sequence[Any],
    ) -> Advance:
        if spans and isinstance(spans[0], Tensor) and spans[0].dim() and spans[0].shape[-1] != 1:
            # The code of ncps handles units with time spans of their own.
            inputs = rows.split(packed)
            return lambda t, h: self.rnn_cell.forward(inputs[t], h, spans[t])
        cell, ready = self.rnn_cell, Ready.of(self.rnn_cell)
        mapped = rows.split(ltc_cell.map_inputs(cell, packed).unsqueeze(-2))

        def advance(t: int, h: Tensor) -> tuple[Tensor, Tensor]:
            y, h = ltc_cell.scan(cell, ready, mapped[t], h, spans[t])
            return ltc_cell.map_outputs(cell, y.squeeze(1)), h

        return advance
