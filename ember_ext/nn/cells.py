"""`CfCCell`, `WiredCfCCell` and `LTCCell`: the cells of ncps, for a loop over time of your own."""

from __future__ import annotations

from typing import Any

import ncps.torch
import torch
from ncps.wirings import Wiring
from torch import Tensor
from torch.nn.utils import parametrize

from ember_ext.nn import ltc_cell
from ember_ext.nn._arguments import check_dtype, check_is_wiring, creating_on, fail, settle
from ember_ext.nn._cell import LiquidCell, row_timespan
from ember_ext.nn._laid_out import LaidOut
from ember_ext.nn._laid_out_ltc import LaidOutLTC
from ember_ext.nn._plain import OURS, why_cells_differ
from ember_ext.nn.cfc import LaidOutCells
from ember_ext.reference.ltc_scan import LTCWeights


class _CfCSteps(LiquidCell):
    """The common part of the two CfC cells."""

    def _why_cells_differ(self) -> str | None:
        reason = why_cells_differ(self)
        return reason and reason.replace("rnn_cell", "cell", 1)

    def _lay_out(self) -> LaidOut:
        return LaidOutCells(self)


class CfCCell(_CfCSteps, ncps.torch.CfCCell):  # type: ignore[misc]
    """One time step of a closed-form continuous-time cell: `ncps.torch.CfCCell` 1.0.1.

    Constructor, initial values, state-dict keys and results are those of ncps. Without gradients a
    step on a CPU is one call of an operator. Its weights are laid out once and compared by their
    content at each step. The cell runs the code of ncps with gradients (for a single step an
    operator would take longer), on other devices, and where it was changed by hooks, adapters,
    pruning or quantisation. :class:`~ember_ext.nn.CfC` runs a sequence at once, with gradients too.

    Args:
        input_size: number of input features.
        hidden_size: number of units.
        mode: "default", "pure" or "no_gate", see :func:`~ember_ext.cfc_scan`.
        backbone_activation: "lecun_tanh" (the default), "tanh", "relu", "silu" or "gelu".
        backbone_units: width of each backbone layer. Default: 128.
        backbone_layers: number of backbone layers. Default: 1.
        backbone_dropout: dropout rate after the second and later backbone layers. Default: 0.
        sparsity_mask: NumPy array [Z, hidden_size], where Z is the width of what ff1 and ff2 take.
            Its zeros are synapses that do not exist. Default: none.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters, floating. Initial values are drawn in torch's default dtype and
            rounded. Default: torch's default dtype.

    Raises:
        TypeError: `dtype` is not a floating one.
        ValueError: an unknown mode or activation.

    Examples::

        >>> import torch
        >>> from ember_ext import nn
        >>> cell = nn.CfCCell(3, 16)
        >>> h = torch.zeros(8, 16)
        >>> for x in torch.randn(5, 8, 3):
        ...     y, h = cell(x, h, 0.1)
        >>> y.shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mode: str = "default",
        backbone_activation: str = "lecun_tanh",
        backbone_units: int = 128,
        backbone_layers: int = 1,
        backbone_dropout: float = 0.0,
        sparsity_mask: Any = None,
        *,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("CfCCell", dtype)
        with creating_on(device):
            super().__init__(
                input_size,
                hidden_size,
                mode,
                backbone_activation,
                backbone_units,
                backbone_layers,
                backbone_dropout,
                sparsity_mask,
            )
        settle(self, device, dtype)

    def forward(self, input: Tensor, hx: Tensor, ts: Tensor | float) -> tuple[Tensor, Tensor]:
        """Take one time step.

        Args:
            input: [B, C].
            hx: the state, [B, S].
            ts: time since the previous step, >= 0: a number, or a tensor that has no dimension, or
                is [B] or [B, 1]. ncps multiplies [B] along the units.

        Returns:
            The new state, twice.
        """
        ts = row_timespan(ts, input)
        return self._advance(input, hx, ts) or super().forward(input, hx, ts)

    def extra_repr(self) -> str:
        """The sizes and the mode; the backbone is a module of its own."""
        return f"{self.input_size}, {self.hidden_size}, mode={self.mode!r}"


class WiredCfCCell(_CfCSteps, ncps.torch.WiredCfCCell):  # type: ignore[misc]
    """One time step of a wired stack of CfC cells: `ncps.torch.WiredCfCCell` 1.0.1.

    It works as :class:`~ember_ext.nn.CfCCell`, for all cells of the stack at once.

    Args:
        input_size: number of input features; None for a wiring that was built.
        wiring: an `ncps.wirings.Wiring`.
        mode: "default", "pure" or "no_gate", see :func:`~ember_ext.cfc_scan`.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters, floating. Initial values are drawn in torch's default dtype and
            rounded. Default: torch's default dtype.

    Raises:
        TypeError: `wiring` is none, or `dtype` is not a floating one.
        ValueError: an unknown mode, or `input_size` is not that of the wiring.

    Examples::

        >>> import torch
        >>> from ncps.wirings import AutoNCP
        >>> from ember_ext import nn
        >>> cell = nn.WiredCfCCell(3, AutoNCP(16, 2))
        >>> y, h = cell(torch.randn(8, 3), torch.zeros(8, 16), 0.1)
        >>> y.shape, h.shape
        (torch.Size([8, 2]), torch.Size([8, 16]))
    """

    def __init__(
        self,
        input_size: int | None,
        wiring: Wiring,
        mode: str = "default",
        *,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("WiredCfCCell", dtype)
        check_is_wiring("WiredCfCCell", wiring)
        with creating_on(device):
            super().__init__(input_size, wiring, mode)
        settle(self, device, dtype)

    def forward(
        self, input: Tensor, hx: Tensor, timespans: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Take one time step.

        Args:
            input: [B, C].
            hx: the state of all neurons, [B, S].
            timespans: as for `CfCCell`.

        Returns:
            The state of the motor neurons [B, M], and the new state of all.
        """
        timespans = row_timespan(timespans, input)
        return self._advance(input, hx, timespans) or super().forward(input, hx, timespans)

    def extra_repr(self) -> str:
        """The sizes and the mode."""
        cells = [cell for cell in self.modules() if isinstance(cell, ncps.torch.CfCCell)]
        mode = f", mode={cells[0].mode!r}" if cells else ""
        wiring: Any = self._wiring
        return f"{wiring.input_dim}, {wiring.units}{mode}"


class LTCCell(LiquidCell, ncps.torch.LTCCell):  # type: ignore[misc]
    """One time step of a liquid time-constant network: `ncps.torch.LTCCell` 1.0.1.

    Constructor, initial values, state-dict keys and results are those of ncps. A step is one call
    of an operator. Without gradients on a CPU its weights are laid out once and compared by their
    content at each step. A cell that was hooked or pruned, or one of whose functions was replaced,
    runs the code of ncps. :class:`~ember_ext.nn.LTC` runs a sequence at once.

    ncps keeps its parameters twice: as those of the module, and in a dict that its `forward` reads.
    Whatever replaces a parameter of the module does not reach that dict:
    `torch.func.functional_call`, parametrisations, pruning, `load_state_dict(assign=True)`, and a
    move to the meta device. This cell computes with the parameters that the module has.

    Args:
        wiring: an `ncps.wirings.Wiring`.
        in_features: number of input features; None for a wiring that was built.
        input_mapping: "affine" (the default) scales and shifts each feature, "linear" scales it,
            and anything else leaves it as it is.
        output_mapping: the same for each motor neuron.
        ode_unfolds: solver steps in one time step. Default: 6.
        epsilon: added to the denominator of the solver. Default: 1e-8.
        implicit_param_constraints: keep conductances and capacitances positive by a softplus.
            Without it, :meth:`apply_weight_constraints` clips them. Default: False, unlike that of
            `LTC`; both defaults are those of ncps.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters, floating. Initial values are drawn in torch's default dtype and
            rounded. Default: torch's default dtype.

    Raises:
        TypeError: `wiring` is none, or `dtype` is not a floating one.
        ValueError: the number of inputs of the wiring is not known.

    Examples::

        >>> import torch
        >>> from ncps.wirings import AutoNCP
        >>> from ember_ext import nn
        >>> cell = nn.LTCCell(AutoNCP(16, 2), 3)
        >>> y, h = cell(torch.randn(8, 3), torch.zeros(8, 16), 0.1)
        >>> y.shape, h.shape
        (torch.Size([8, 2]), torch.Size([8, 16]))
    """

    def __init__(
        self,
        wiring: Wiring,
        in_features: int | None = None,
        input_mapping: str | None = "affine",
        output_mapping: str | None = "affine",
        ode_unfolds: int = 6,
        epsilon: float = 1e-8,
        implicit_param_constraints: bool = False,
        *,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("LTCCell", dtype)
        check_is_wiring("LTCCell", wiring)
        with creating_on(device):
            super().__init__(
                wiring,
                in_features,
                input_mapping,
                output_mapping,
                ode_unfolds,
                epsilon,
                implicit_param_constraints,
            )
        settle(self, device, dtype)

    @property
    def _params(self) -> dict[str, Tensor]:
        names = [
            *LTCWeights._fields,
            "sparsity_mask",
            "sensory_sparsity_mask",
            *ltc_cell.mapping_names("input", self._input_mapping),
        ]
        names += ltc_cell.mapping_names("output", self._output_mapping)
        # The constructor asks before it has made them.
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @_params.setter
    def _params(self, _: dict[str, Tensor]) -> None:
        """The constructor of ncps' cell sets this to a dict of its own, which is not needed."""

    def forward(
        self, inputs: Tensor, states: Tensor, elapsed_time: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one time step.

        Args:
            inputs: [B, C].
            states: the state of all neurons, [B, S].
            elapsed_time: time since the previous step, > 0: a number, or a tensor that has no
                dimension, or is [B] or [B, 1]. ncps divides the units by [B]. Default: 1.

        Returns:
            The output of the motor neurons [B, M], and the new state of all.
        """
        span = row_timespan(elapsed_time, inputs)
        return self._advance(inputs, states, span) or super().forward(inputs, states, span)

    def _why_cells_differ(self) -> str | None:
        reason = ltc_cell.why_ltc_cell_differs(self)
        return reason and f"cell{reason}"

    def _lay_out(self) -> LaidOut:
        return LaidOutLTC(self)

    def extra_repr(self) -> str:
        """The sizes and the options."""
        return (
            f"{self.sensory_size}, {self.state_size}, input_mapping={self._input_mapping!r}, "
            f"output_mapping={self._output_mapping!r}, ode_unfolds={self._ode_unfolds}, "
            f"epsilon={self._epsilon}"
        )

    @classmethod
    def _adopt(cls, module: Any) -> None:
        ltc_cell.adopt(module)

    def _release(self) -> None:
        ltc_cell.release(self)

    def _why_not_ncps(self) -> str | None:
        reason = ltc_cell.why_not_ncps(self)
        return reason and f"cell{reason}"

    def _takes(self, x: Tensor, h: Tensor) -> bool:
        cell: Any = self
        sizes = (int(cell.sensory_size), int(cell.state_size))
        return (x.shape[1], h.shape[1]) == sizes and x.dtype == h.dtype == cell.gleak.dtype

    def _scan(self, x: Tensor, h: Tensor, timespan: Tensor | float) -> tuple[Tensor, Tensor]:
        y, h = ltc_cell.scan(
            self, ltc_cell.Ready.of(self), ltc_cell.map_inputs(self, x), h, timespan
        )
        return ltc_cell.map_outputs(self, y), h

    def apply_weight_constraints(self) -> None:
        """Set negative entries of `w`, `sensory_w`, `cm` and `gleak` to zero, in place.

        Call it after each step of an optimiser. It does nothing to a cell with
        `implicit_param_constraints`, whose `forward` makes them positive.

        Raises:
            RuntimeError: hooks compute one of them, such as those of weight_norm.
        """
        if self._implicit_param_constraints:
            return
        clip: Any = self._clip
        for name in ltc_cell.POSITIVE:
            if parametrize.is_parametrized(self, name):
                setattr(self, name, clip(getattr(self, name)).detach())
                continue
            own = name if name in self._parameters else f"{name}_orig"
            parameter = self._parameters.get(own)
            if parameter is None:
                expected = "a parameter, pruned or parametrised or neither"
                fail("LTCCell", name, expected, "no parameter", RuntimeError)
            parameter.data = clip(parameter.data)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_listed", None)
        return state


OURS[ncps.torch.CfCCell] = CfCCell
OURS[ncps.torch.LTCCell] = LTCCell
OURS[ncps.torch.WiredCfCCell] = WiredCfCCell
