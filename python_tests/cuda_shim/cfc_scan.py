"""The CfC scan's CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

import cuda_shim
from cuda_shim.scan_call import ScanCall
from ember_ext.ops._cfc_packing import raw_arguments
from ember_ext.reference.cfc_scan import CfCWeights


class Layer(ctypes.Structure):
    """ember::CfcLayer."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("grad_weight", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("input_offset", ctypes.c_int64),
        ("input_stride", ctypes.c_int64),
        ("kept_offset", ctypes.c_int64),
        ("kept_stride", ctypes.c_int64),
        ("grad_offset", ctypes.c_int64),
        ("grad_stride", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """ember::CfcScanParams."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("layers", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("h0", ctypes.c_void_p),
        ("timespans", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("dropout_scale", ctypes.c_void_p),
        ("decay", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("h_last", ctypes.c_void_p),
        ("h_stride", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("chunk", ctypes.c_int64),
        ("grad_y", ctypes.c_void_p),
        ("grad_h_last", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_h0", ctypes.c_void_p),
        ("grad_timespans", ctypes.c_void_p),
        ("grad_decay", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


class Call(ScanCall):
    """One call of a launcher: what csrc/binding/cfc_scan.cpp fills in."""

    def __init__(self, x: Tensor, maps: list[Tensor], hidden: int, chunk: int, options: Any):
        spans, lengths, dropout_scale, decay, mode, activation = options
        heads = len(maps[-1]) // max(1, hidden)
        p = Params(
            dtype=cuda_shim.DTYPE_CODES[x.dtype],
            mode=mode,
            activation=activation,
            batch=x.shape[0],
            steps=x.shape[1],
            inputs=maps[0].shape[1] - 1 - hidden,
            hidden=hidden,
            heads=heads,
            num_layers=len(maps),
            chunk=max(0, chunk),
            h_stride=hidden,
        )
        super().__init__("cfc_scan", p, maps[-1].dtype)
        self.layers = (Layer * len(maps))()
        for layer, matrix in zip(self.layers, maps, strict=True):
            is_heads = matrix is maps[-1]
            layer.inputs = matrix.shape[1] - 1
            layer.segments = heads if is_heads else 1
            layer.units = hidden if is_heads else len(matrix)
        self.function("lay_out")(ctypes.byref(self.p), self.layers)
        self.inputs = {
            "timespans": spans,
            "lengths": lengths,
            "dropout_scale": dropout_scale,
            "decay": decay,
            **{f"weight {layer}": matrix for layer, matrix in enumerate(maps)},
        }

    def part(self, name: str, field: str) -> tuple[Any, str]:
        """A layer's number comes after its field."""
        return self.layers[int(field)], name

    def saved_size(self) -> int:
        """As the binding's function of that name."""
        p = self.p
        if p.chunk:
            return int((p.steps + p.chunk - 1) // p.chunk * p.batch * p.hidden)
        return int(self.function("tape_size")(ctypes.byref(p)))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: int, options: Any, x: Tensor, h0: Tensor, *rest: Any) -> Any:
        spans, decay, *maps = rest
        if not any(ctx.needs_input_grad):
            chunk = -1
        options = (spans, *options[:2], decay, *options[2:])
        call = Call(x, maps, h0.shape[1], chunk, options)
        outputs = {"y": x.new_empty(*x.shape[:2], h0.shape[1]), "h_last": h0}
        if chunk >= 0:
            outputs["saved"] = h0.new_empty(call.saved_size())
        results = call.run("forward", {"x": x, "h0": h0}, outputs)
        ctx.arguments = (x, maps, h0.shape[1], chunk, options)
        ctx.saved = results.get("saved")
        return results["y"], results["h_last"]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_h_last: Tensor) -> Any:
        x, maps, hidden, chunk, options = ctx.arguments
        spans, _, _, decay, *_ = options
        call = Call(grad_y, maps, hidden, chunk, options)
        _, _, wants_x, _, _, wants_decay, *wants_weights = ctx.needs_input_grad
        inputs = {"grad_y": grad_y, "grad_h_last": grad_h_last, "saved": ctx.saved}
        if chunk:
            inputs["x"] = x
        outputs = {"grad_h0": grad_h_last}
        if wants_x:
            outputs["grad_x"] = x
        if spans is not None:
            outputs["grad_timespans"] = spans
        if any(wants_weights) or wants_decay:
            outputs |= {f"grad_weight {layer}": matrix for layer, matrix in enumerate(maps)}
            if decay is not None:
                outputs["grad_decay"] = decay
        results = call.run("backward", inputs, outputs)
        names = [
            "x",
            "h0",
            "timespans",
            "decay",
            *(f"weight {layer}" for layer in range(len(maps))),
        ]
        return None, None, *(results.get(f"grad_{name}") for name in names)


_DEFAULTS = {
    "timespans": 1.0,
    "lengths": None,
    "mode": "default",
    "activation": "lecun_tanh",
    "dropout_scale": None,
}


def cfc_scan(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As ember_ext.ops.cfc_scan."""
    raw = raw_arguments(x, weights, h0, **(_DEFAULTS | options))
    x, h0, maps, spans, *others = raw
    lengths, dropout_scale, decay, *numbers = others
    y, h_last = _Scan.apply(
        chunk_size or 0, (lengths, dropout_scale, *numbers), x, h0, spans, decay, *maps
    )
    return y, h_last.to(x.dtype)
