"""Refractory LIF attention's CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

import cuda_shim
from cuda_shim import lif_attention
from ember_ext.reference.refractory_lif_attention import (
    RefractoryMode,
    RefractoryState,
    require_causal,
)

_OP = "refractory_lif_attention"


class Params(lif_attention.Params):
    """ember::RefractoryLifAttentionParams."""

    _fields_ = (
        ("look_ahead", ctypes.c_bool),
        ("block", ctypes.c_int64),
        ("within", ctypes.c_void_p),
        ("across", ctypes.c_void_p),
        ("previous_load", ctypes.c_void_p),
        ("previous_strides", ctypes.c_int64 * 2),
        ("one_previous_row", ctypes.c_bool),
        ("past_probabilities", ctypes.c_void_p),
        ("past_weights", ctypes.c_void_p),
        ("next_load", ctypes.c_void_p),
        ("probabilities", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("block_loads", ctypes.c_void_p),
        ("grad_next_load", ctypes.c_void_p),
        ("grad_probabilities", ctypes.c_void_p),
        ("grad_weights", ctypes.c_void_p),
        ("grad_previous_load", ctypes.c_void_p),
        ("grad_past_probabilities", ctypes.c_void_p),
        ("grad_past_weights", ctypes.c_void_p),
    )


_INPUTS = (
    *("query", "key", "value", "threshold", "leak", "steepness", "within", "across"),
    *("previous_load", "past_probabilities", "past_weights"),
)


def _block(query: Tensor) -> int:
    """Queries from one saved load to the next, as the operator asks for."""
    return 16 if query.element_size() == 2 else 64


def _params_size() -> int:
    return int(cuda_shim.operators().library.ember_refractory_lif_attention_params_size())


def _describe(
    inputs: dict[str, Tensor], options: dict[str, Any]
) -> tuple[Params, dict[str, Tensor]]:
    """The parameters, and the inputs without what is expanded, which a launcher gets by strides."""
    p = lif_attention.describe(inputs["query"], inputs["key"], options, Params)
    assert isinstance(p, Params)
    p.look_ahead, p.block = options["look_ahead"], _block(inputs["query"])
    previous = inputs["previous_load"]
    if previous is None:
        return p, inputs
    p.one_previous_row = previous.shape[1] == 1
    for d in (0, 1):
        if previous.stride(d) == 0:
            previous = previous.narrow(d, 0, 1)
    batch, rows, keys = previous.shape
    p.previous_strides[:] = (rows * keys if batch > 1 else 0, keys if rows > 1 else 0)
    return p, {**inputs, "previous_load": previous}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, options = arguments
        inputs = dict(zip(_INPUTS, tensors, strict=True))
        inputs["seed"] = options["seed"] if options["dropout_p"] else None
        assert ctypes.sizeof(Params) == _params_size()
        p, given = _describe(inputs, options)
        query, threshold = inputs["query"], inputs["threshold"]
        batch, heads, queries, _ = query.shape
        keys = inputs["key"].shape[2]
        rows, blocks = (1, 1) if p.look_ahead else (queries, math.ceil(queries / p.block))
        outputs = {
            "out": query,
            "row_stats": threshold.new_empty(3, batch, heads, queries),
            "next_load": threshold.new_empty(batch, rows, keys),
            "probabilities": threshold.new_empty(batch, heads, keys),
            "weights": threshold.new_empty(batch, keys),
            "block_loads": threshold.new_empty(batch, heads, blocks, keys),
            "scratch": lif_attention.scratch(_OP, p, False),
        }
        results = lif_attention.run(cuda_shim.operators(), f"{_OP}_forward", p, given, outputs)
        ctx.saved = {name: results[name] for name in ("row_stats", "block_loads")}
        ctx.inputs, ctx.options = inputs, options
        return tuple(results[n] for n in ("out", "next_load", "probabilities", "weights"))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.inputs
        p, given = _describe(inputs, ctx.options)
        names = ("grad_out", "grad_next_load", "grad_probabilities", "grad_weights")
        incoming = dict(zip(names, gradients, strict=True))
        wanted = ("query", "key", "value", "previous_load", "past_probabilities", "past_weights")
        outputs = {f"grad_{name}": inputs[name] for name in wanted if inputs[name] is not None}
        outputs["grad_gates"] = inputs["leak"].new_empty(5, inputs["leak"].numel())
        outputs["scratch"] = lif_attention.scratch(_OP, p, True)
        # Backward gets by without the past sums.
        given = {k: v for k, v in given.items() if not k.startswith("past_")}
        results = lif_attention.run(
            cuda_shim.operators(), f"{_OP}_backward", p, given | ctx.saved | incoming, outputs
        )
        results |= {
            f"grad_{n}": g for n, g in zip(_INPUTS[3:8], results["grad_gates"], strict=True)
        }
        return *(results.get(f"grad_{name}") for name in _INPUTS), None


def refractory_lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    within: Tensor,
    across: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    mode: RefractoryMode = "causal",
    previous_load: Tensor | None = None,
    past: RefractoryState | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, RefractoryState]:
    """As ember_ext.ops.refractory_lif_attention."""
    require_causal(is_causal)
    compute = torch.promote_types(query.dtype, torch.float32)
    options = {
        "is_causal": is_causal,
        "look_ahead": mode == "look_ahead",
        "dropout_p": dropout_p,
        "scale": 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        "eps": eps,
        "seed": seed,
    }
    gate = [p.to(compute) for p in (threshold, leak, steepness, within, across)]
    if previous_load is not None:
        previous_load = previous_load.to(compute).expand(query.shape[0], -1, key.shape[2])
    state = [None, None] if past is None else [t.to(compute) for t in past]
    out, next_load, *sums = _Attention.apply(
        query, key, value, *gate, previous_load, *state, options
    )
    return out, next_load, RefractoryState(*sums)
