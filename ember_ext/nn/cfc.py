"""`CfC`: the drop-in for `ncps.torch.CfC` that runs each cell over a whole sequence at once.

A wired CfC is a stack of cells: a neuron of the inter, command or motor layer sees the previous
layer's states and its own layer's past. So the whole sequence of one layer can be computed before
the next layer starts: three scans instead of three cells per time step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ncps.torch
import torch
from ncps.wirings import Wiring
from torch import Tensor, nn

from ember_ext.nn._arguments import check_dtype, check_sizes, count, creating_on, fail, settle
from ember_ext.nn._laid_out import LaidOut
from ember_ext.nn._liquid import Advance, LiquidLayer
from ember_ext.nn._plain import ACTIVATIONS as ACTIVATION_LAYERS
from ember_ext.nn._plain import why_cells_differ, why_differs
from ember_ext.nn._recorded import RecordedCells
from ember_ext.nn._rows import Rows
from ember_ext.ops._cfc_checks import ACTIVATIONS, MODES, Activation
from ember_ext.ops._cfc_packing import PackedCells, joined_maps, tensors_of
from ember_ext.ops.cfc_scan import cfc_scan
from ember_ext.reference.cfc_scan import Affine, CfCWeights, activate, cfc_cell


class CfC(LiquidLayer, ncps.torch.CfC):  # type: ignore[misc]
    """A closed-form continuous-time (CfC) network: `ncps.torch.CfC` 1.0.1, many times faster.

    Constructor, initial values, state-dict keys and results are those of ncps, so checkpoints go
    back and forth unchanged. This includes what one might not expect. The mask of a wiring covers
    the input weights of ff1 and ff2, but neither time_a and time_b nor the recurrent weights, and
    it counts as a (frozen) parameter. `activation` has no effect on a wired network. Dropout starts
    at the second backbone layer.

    It differs from ncps where ncps fails:

    - `timespans` of shape [B, T] or [B, T, 1] belong to each row and step. ncps squeezes a step's
      column to [B] and multiplies it along the *units*. That is an error, or a wrong result where B
      equals the number of units.
    - `timespans` may be a number. All shapes that ncps computes rightly are taken too: [1, T] or
      [1, T, 1] for all rows, [T, 1] or [T] with the time first, and [B, T, H] or [1, T, H] with a
      span for each unit where all cells have H of them. The last go step by step.
    - The default state has the dtype of the input and not always float32.
    - T = 0 returns the state unchanged.
    - Arguments are checked, with messages that say what was expected.

    A cell whose layers do more than apply their weights, because they were pruned, adapted,
    quantised or hooked, is called step by step as in ncps. A warning says once for which layer.

    :meth:`step` for streaming, `lengths` for padded batches, and `chunk_size` are additions.

    Args:
        input_size: number of input features; None for a wiring that was built.
        units: number of hidden units, or an `ncps.wirings.Wiring`.
        proj_size: width of a linear layer on the output. Default: no such layer.
        return_sequences: return the output at every step and not only at the last. Default: True.
        batch_first: batched input is [B, T, C] and not [T, B, C]. Default: True.
        mixed_memory: run an LSTM cell on the state before each step. That takes several operations
            for every step, so it is much slower. Default: False.
        mode: "default", "pure" or "no_gate", see :func:`~ember_ext.cfc_scan`.
        activation: of the backbone: "lecun_tanh" (the default), "tanh", "relu", "silu" or "gelu".
        backbone_units: width of each backbone layer. Default: 128. Not for wirings, like the next
            two.
        backbone_layers: number of backbone layers. Default: 1.
        backbone_dropout: dropout rate after the second and later backbone layers. Default: 0.
        chunk_size: time steps whose activations are kept at once for the backward pass. It computes
            those of other chunks again, which saves memory and costs time. It has no effect with
            mixed memory. Default: all, up to 1024 steps.
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
        >>> model = nn.CfC(3, AutoNCP(16, 2))
        >>> x, spans = torch.randn(8, 20, 3), torch.rand(8, 20)
        >>> y, h = model(x, timespans=spans)
        >>> y.shape, h.shape
        (torch.Size([8, 20, 2]), torch.Size([8, 16]))

    One step at a time::

        >>> state = None
        >>> with torch.no_grad():
        ...     for t in range(20):
        ...         output, state = model.step(x[:, t], state, spans[:, t])
        >>> torch.allclose(state, h, atol=1e-5)
        True

    Padded rows end after their own lengths::

        >>> y, h = model(x, timespans=spans, lengths=[20, 3, 5, 7, 11, 13, 17, 19])
        >>> bool((y[1, 3:] == 0).all())
        True
    """

    layer_name = "CfC"

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
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("CfC", dtype)
        input_size, units = check_sizes("CfC", input_size, units)
        if not isinstance(units, Wiring) and activation not in ACTIVATIONS:
            fail("CfC", "activation", f"one of {list(ACTIVATIONS)}", repr(activation))
        if mode not in MODES:
            fail("CfC", "mode", f"one of {list(MODES)}", repr(mode))
        proj_size, backbone_units, backbone_layers, chunk_size = (
            None if value is None else count("CfC", name, value)
            for name, value in (
                ("proj_size", proj_size),
                ("backbone_units", backbone_units),
                ("backbone_layers", backbone_layers),
                ("chunk_size", chunk_size),
            )
        )
        if backbone_dropout is not None and not 0 <= backbone_dropout <= 1:
            fail("CfC", "backbone_dropout", "within [0, 1]", backbone_dropout)
        with creating_on(device):
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
            fail("CfC", "proj_size", expected, proj_size)
        self.chunk_size = chunk_size
        for cell in self._cells:
            if cell.sparsity_mask is not None:
                # The mask of ncps is a transposed view, and FSDP takes contiguous parameters only.
                cell.sparsity_mask.data = cell.sparsity_mask.data.contiguous()
        settle(self, device, dtype)

    @property
    def _cells(self) -> Sequence[Any]:
        return cells_of(self.rnn_cell)

    @property
    def _features(self) -> int:
        return int(self._cells[0].input_size)

    @property
    def _span_units(self) -> int | None:
        # ncps hands the same spans to every cell, so all cells must have the same width.
        sizes = set(self._layer_sizes)
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def _output_width(self) -> int:
        return int(self._cells[-1].hidden_size)

    @property
    def _layer_sizes(self) -> list[int]:
        return [int(cell.hidden_size) for cell in self._cells]

    def _scan_cells(
        self, x: Tensor, h0: Tensor, timespans: Tensor | float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan the cells, one scan for each cell of the stack; see `LiquidLayer._scan_cells`."""
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

    def _lay_out(self) -> LaidOut:
        return LaidOutCells(self.rnn_cell, self)

    def _why_cells_differ(self) -> str | None:
        return why_cells_differ(self.rnn_cell)

    def _last_output(self, h: Tensor) -> Tensor:
        return h[:, h.shape[1] - self._output_width :]

    def _settings(self) -> list[tuple[str, object, object]]:
        cells = [cell for cell in self.modules() if isinstance(cell, ncps.torch.CfCCell)]
        return [("mode", cell.mode, "default") for cell in cells[:1]] + super()._settings()

    def _read_out(self, y: Tensor) -> Tensor:
        # A call of the module would take as long as a good part of a small network's step.
        if why_differs(self._modules.get("fc"), nn.Identity) is None:
            return y
        return self.fc(y)  # type: ignore[no-any-return, operator]

    def _recorded_cells(self, x: Tensor) -> RecordedCells:
        """See `LiquidLayer._recorded_cells`."""
        cells, sizes = self._cells, self._layer_sizes
        options = [(cell.mode, _weights(cell)[1]) for cell in cells]

        def step(constants: Any, now: Any, h: Tensor, span: Any) -> tuple[Tensor, Tensor]:
            value, scales = now
            states = []
            for weights, (mode, activation), scale, part in zip(
                constants, options, scales, h.split(sizes, 1), strict=True
            ):
                value = cfc_cell(
                    value,
                    part,
                    weights,
                    span,
                    mode=mode,
                    activation=activation,
                    dropout_scale=scale,
                )
                states.append(value)
            return value, torch.cat(states, 1)

        return RecordedCells(
            step,
            tuple(_weights(cell)[0] for cell in cells),
            (x, tuple(_dropout_scale(cell, x) for cell in cells)),
            self._output_width,
        )

    def _plain_steps(
        self,
        rows: Rows,
        packed: Tensor,
        fixed: Tensor | float | None,
        spans: Sequence[Any],
    ) -> Advance:
        inputs = rows.split(packed)
        cells = [
            _step_by_step(cell, rows, None if i else packed, fixed, _dropout_scale(cell, packed))
            for i, cell in enumerate(self._cells)
        ]

        def advance(t: int, h: Tensor) -> tuple[Tensor, Tensor]:
            value, states = inputs[t], []
            for run, part in zip(cells, h.split(self._layer_sizes, 1), strict=True):
                value = run(t, value, part, spans[t])
                states.append(value)
            return value, states[0] if len(states) == 1 else torch.cat(states, 1)

        return advance


def cells_of(cell: Any) -> list[Any]:
    """The cells that lie behind each other in a `CfC.rnn_cell`."""
    return [cell] if isinstance(cell, ncps.torch.CfCCell) else list(cell._layers)


class LaidOutCells(LaidOut):
    """The cells of a `CfC`, laid out.

    Args:
        network: a cell, or a stack of such.
        owner: the layer whose `rnn_cell` that is; None for one of its own.
    """

    def __init__(self, network: Any, owner: CfC | None = None) -> None:
        self._cells = cells_of(network)
        tensors = []
        for cell in self._cells:
            weights, _ = _weights(cell)
            if cell.mode == "pure":  # not as views
                weights = weights._replace(w_tau=cell.w_tau, amplitude=cell.A)
            tensors += tensors_of(weights)
        super().__init__(
            owner,
            "rnn_cell",
            [network, *self._cells],
            tensors,
            inputs=int(self._cells[0].input_size),
            state=sum(int(cell.hidden_size) for cell in self._cells),
            dtype=self._cells[0].ff1.weight.dtype,
        )
        # Settings of a cell that decide what it computes, and are neither tensors nor modules.
        self._settings = [
            (cell.__dict__, cell.mode, cell.backbone_layers, cell.__dict__.get("sparsity_mask"))
            for cell in self._cells
        ]
        self._layers = network.__dict__.get("_layers", self._cells)

    def is_current(self) -> bool:
        """See `LaidOut.is_current`."""
        if self._layers != self._cells:
            return False
        for own, mode, layers, mask in self._settings:
            if own["mode"] != mode or own["backbone_layers"] != layers:
                return False
            if own.get("sparsity_mask") is not mask:
                return False
        return super().is_current()

    def lay_out(self, timespan: float | None) -> PackedCells:
        """See `LaidOut.lay_out`."""
        with torch.no_grad():
            cells, activations = zip(*map(_weights, self._cells), strict=True)
            return PackedCells(
                cells,
                mode=self._cells[0].mode,
                activation=activations[0],
                timespan=timespan,
                watch=self.watch,
            )


def _step_by_step(
    cell: Any,
    rows: Rows,
    packed: Tensor | None,
    timespan: Tensor | float | None,
    scale: Tensor | None,
) -> Callable[[int, Tensor, Tensor, Any], Tensor]:
    """A cell as a function of t, its input [B, I], its state [B, H] and the time span [B, 1].

    As `reference.cfc_cell`, by as few operations a step as can be: masks, the joining of the
    weights, and the product with the input are done for all steps at once.

    Args:
        cell: an ncps cell.
        rows: which rows take each step.
        packed: its input at all steps, as `rows` packs it, [..., I], where that is known. Then it
            is used.
        timespan: of all steps, or None if each has its own.
        scale: dropout of the backbone, [..., layers - 1, U], or None.
    """
    weights, activation = _weights(cell)
    hidden, mode = int(cell.hidden_size), cell.mode
    first, *maps = joined_maps(weights, mode, timespan, weights.ff1.weight.dtype)
    biases, matrices = (
        zip(*((m[:, 0], m[:, 1:].t()) for m in maps), strict=True) if maps else ((), ())
    )
    bias, matrix = first[:, 0], first[:, 1:].t()
    products: Sequence[Tensor] = ()
    if packed is not None:
        inputs = packed.shape[-1]
        products = rows.split(nn.functional.linear(packed, matrix[:inputs].t(), bias))
        matrix = matrix[inputs:]
    scales = None if scale is None else rows.split(scale)

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
    """Fresh dropout of a cell's backbone, [..., layers - 1, U] for x, [..., I], if it trains."""
    layers = () if cell.backbone is None else cell.backbone
    dropouts = [layer for layer in layers if isinstance(layer, nn.Dropout)]
    if not dropouts or not dropouts[0].training:
        return None
    units = cell.ff1.weight.shape[1]
    ones = x.new_ones(*x.shape[:-1], len(dropouts), units)
    return nn.functional.dropout(ones, dropouts[0].p)
