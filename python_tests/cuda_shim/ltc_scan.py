"""The LTC scan's CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

import cuda_shim
from cuda_shim.scan_call import ScanCall
from ember_ext.ops._ltc_packing import raw_arguments
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights


class Synapses(ctypes.Structure):
    """ember::LtcSynapses."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("num_sources", ctypes.c_int64),
        ("sources", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("by_source", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("grad_weights", ctypes.c_void_p),
    )


class Params(ctypes.Structure):
    """ember::LtcScanParams."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("unfolds", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("sensory", Synapses),
        ("recurrent", Synapses),
        ("unit_weights", ctypes.c_void_p),
        ("grad_unit_weights", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("h0", ctypes.c_void_p),
        ("timespans", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("h_last", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("chunk", ctypes.c_int64),
        ("grad_y", ctypes.c_void_p),
        ("grad_h_last", ctypes.c_void_p),
        ("grad_x", ctypes.c_void_p),
        ("grad_h0", ctypes.c_void_p),
        ("grad_timespans", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("input_map", ctypes.c_void_p),
        ("output_map", ctypes.c_void_p),
    )


class Call(ScanCall):
    """One call of a launcher: what csrc/binding/ltc_scan.cpp fills in."""

    def __init__(
        self,
        x: Tensor,
        units: Tensor,
        sensory_weights: Tensor,
        recurrent_weights: Tensor,
        options: tuple[Any, ...],
    ):
        sensory, recurrent, spans, lengths, unfolds, outputs, eps, chunk = options
        steps = x.shape[1]
        p = Params(
            dtype=cuda_shim.DTYPE_CODES[x.dtype],
            batch=x.shape[0],
            steps=steps,
            inputs=x.shape[2],
            units=units.shape[1],
            outputs=outputs,
            unfolds=unfolds,
            eps=eps,
            chunk=min(max(chunk, 0), max(steps, 1)),
        )
        super().__init__("ltc_scan", p, units.dtype)
        self.inputs = {
            "x": x,
            "timespans": spans,
            "lengths": lengths,
            "unit_weights": units,
        }
        lists = (("sensory", sensory, sensory_weights), ("recurrent", recurrent, recurrent_weights))
        for name, index, weights in lists:
            own = getattr(self.p, name)
            own.count = index.shape[1]
            own.num_sources = x.shape[2] if name == "sensory" else units.shape[1]
            rows = zip(("sources", "targets", "by_source"), index, strict=True)
            self.inputs |= {f"{name} {key}": row for key, row in rows}
            self.inputs[f"{name} weights"] = weights

    def saved_size(self) -> int:
        """ember::ltc_saved_size."""
        return int(self.function("saved_size")(ctypes.byref(self.p)))

    def part(self, name: str, field: str) -> tuple[Any, str]:
        """A field of one list of synapses."""
        return getattr(self.p, name), field


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[Any, ...],
        x: Tensor,
        h0: Tensor,
        units: Tensor,
        sensory_weights: Tensor,
        recurrent_weights: Tensor,
        spans: Tensor,
    ) -> Any:
        sensory, recurrent, lengths, unfolds, outputs, eps, chunk = options
        if not any(ctx.needs_input_grad):
            chunk = -1
        options = (sensory, recurrent, spans, lengths, unfolds, outputs, eps, chunk)
        ctx.arguments = (x, units, sensory_weights, recurrent_weights, options)
        call = Call(*ctx.arguments)
        written = {"y": x.new_empty(*x.shape[:2], outputs), "h_last": h0}
        if chunk >= 0:
            written["saved"] = h0.new_empty(call.saved_size())
        results = call.run("forward", {"h0": h0}, written)
        ctx.saved = results.get("saved")
        return results["y"], results["h_last"]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_h_last: Tensor) -> Any:
        x, units, sensory_weights, recurrent_weights, options = ctx.arguments
        call = Call(*ctx.arguments)
        _, wants_x, _, *wants_weights, _ = ctx.needs_input_grad
        inputs = {"grad_y": grad_y, "grad_h_last": grad_h_last, "saved": ctx.saved}
        outputs = {"grad_h0": grad_h_last, "grad_timespans": options[2]}
        if wants_x:
            outputs["grad_x"] = x
        if any(wants_weights):
            outputs["grad_unit_weights"] = units
            outputs["sensory grad_weights"] = sensory_weights
            outputs["recurrent grad_weights"] = recurrent_weights
        results = call.run("backward", inputs, outputs)
        names = (
            *("grad_x", "grad_h0", "grad_unit_weights", "sensory grad_weights"),
            *("recurrent grad_weights", "grad_timespans"),
        )
        return None, *(results.get(name) for name in names)


def ltc_scan(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None = None,
    *,
    synapses: LTCSynapses | None = None,
    timespans: Tensor | float = 1.0,
    lengths: Tensor | None = None,
    ode_unfolds: int = 6,
    eps: float = 1e-8,
    outputs: int | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As ember_ext.ops.ltc_scan."""
    raw = raw_arguments(x, weights, h0, synapses, timespans, lengths, ode_unfolds, eps, outputs)
    *tensors, sensory, recurrent, spans, lengths, unfolds, count, eps = raw
    options = (sensory, recurrent, lengths, unfolds, count, eps, chunk_size or 0)
    y, h_last = _Scan.apply(options, *tensors, spans)
    return y, h_last.to(x.dtype)
