"""LIF attention's CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

import cuda_shim
from ember_ext.reference.lif_attention import AttentionSummary


class AttentionTensor(ctypes.Structure):
    """ember::AttentionTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """ember::LifAttentionParams."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("causal", ctypes.c_bool),
        ("tf32", ctypes.c_bool),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("query", AttentionTensor),
        ("key", AttentionTensor),
        ("value", AttentionTensor),
        ("threshold", ctypes.c_void_p),
        ("leak", ctypes.c_void_p),
        ("steepness", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 4),
        ("seed", ctypes.c_void_p),
        ("out", AttentionTensor),
        ("row_stats", ctypes.c_void_p),
        ("summary", ctypes.c_void_p),
        ("load", ctypes.c_void_p),
        ("summary_partials", ctypes.c_void_p),
        ("grad_out", AttentionTensor),
        ("grad_query", AttentionTensor),
        ("grad_key", AttentionTensor),
        ("grad_value", AttentionTensor),
        ("grad_gates", ctypes.c_void_p),
        ("gate_partials", ctypes.c_void_p),
        ("key_partials", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


_WITH_STRIDES = {name for name, kind in Params._fields_ if kind is AttentionTensor}
Options = dict[str, Any]


def describe(query: Tensor, key: Tensor, options: Options, kind: type[Params] = Params) -> Params:
    """Parameters with everything set but pointers."""
    batch, heads, queries, size = query.shape
    return kind(
        dtype=cuda_shim.DTYPE_CODES[query.dtype],
        batch=batch,
        heads=heads,
        groups=key.shape[1],
        queries=queries,
        keys=key.shape[2],
        size=size,
        causal=options["is_causal"],
        tf32=query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
        scale=options["scale"],
        eps=options["eps"],
        dropout=options["dropout_p"],
    )


def run(
    shim: cuda_shim.Shim,
    name: str,
    p: Params,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    pad: int | None = None,
) -> dict[str, Tensor]:
    """Call a launcher with `inputs` and return `outputs`, by the names of the parameters.

    Tokens have `pad` elements between them. Default: whole packs start at whole packs, others at
    odd addresses.
    """
    if pad is None:
        pad = 8 if p.size % 8 == 0 else 1
    strided = {
        k: torch.nn.functional.pad(t, (0, pad)) if k in _WITH_STRIDES and t is not None else t
        for k, t in inputs.items()
    }
    shapes = {
        k: t.new_empty(*t.shape[:-1], t.shape[-1] + pad) if k in _WITH_STRIDES else t
        for k, t in outputs.items()
    }
    mask = inputs.get("mask")
    if mask is not None:
        p.mask_strides[:] = mask.contiguous().stride()

    def launch(addresses: dict[str, int | None]) -> int:
        for key, address in addresses.items():
            if key in _WITH_STRIDES:
                tensor = strided[key] if key in strided else shapes[key]
                assert tensor is not None
                setattr(p, key, AttentionTensor(address, *tensor.stride()[:3]))
            else:
                setattr(p, key, address)
        return int(getattr(shim.library, f"ember_{name}")(ctypes.byref(p)))

    results = shim.call(launch, strided, shapes)
    return {k: v[..., :-pad] if k in _WITH_STRIDES else v for k, v in results.items()}


def scratch(name: str, p: Params, backward: bool) -> Tensor:
    """The scratch memory that a call of the operator `name` needs."""
    size = getattr(cuda_shim.operators().library, f"ember_{name}_scratch_bytes")
    size.restype = ctypes.c_int64
    # Aligned to 16 bytes, as arrays end where a page does.
    return torch.empty(size(ctypes.byref(p), int(backward)) // 16 * 2 + 2, dtype=torch.float64)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, options = arguments
        query, key, value, threshold, leak, steepness = tensors
        p = describe(query, key, options)
        inputs = {
            "query": query,
            "key": key,
            "value": value,
            "threshold": threshold,
            "leak": leak,
            "steepness": steepness,
            "mask": options["attn_mask"],
            "seed": options["seed"] if options["dropout_p"] else None,
        }
        rows = query.shape[:3]
        outputs = {"out": query, "row_stats": threshold.new_empty(3, *rows)}
        if options["return_summary"]:
            outputs["summary"] = threshold.new_empty(4, *rows[:2])
            outputs["load"] = threshold.new_empty(*rows[:2], key.shape[2])
            p.summary = 1  # for the scratch's size; replaced below
            outputs["scratch"] = scratch("lif_attention", p, False)
        shim = cuda_shim.operators(options["architecture"])
        results = run(shim, "lif_attention_forward", p, inputs, outputs, options["pad"])
        ctx.inputs, ctx.options = inputs, options
        ctx.left = {"out": results["out"], "row_stats": results["row_stats"]}
        if not options["return_summary"]:
            return results["out"]
        ctx.mark_non_differentiable(results["summary"], results["load"])
        return results["out"], results["summary"], results["load"]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.inputs
        p = describe(inputs["query"], inputs["key"], ctx.options)
        outputs = {f"grad_{name}": inputs[name] for name in ("query", "key", "value")}
        outputs["grad_gates"] = inputs["leak"].new_empty(3, inputs["leak"].numel())
        outputs["scratch"] = scratch("lif_attention", p, True)
        extra = {"grad_out": grad_out, **ctx.left}
        shim = cuda_shim.operators(ctx.options["architecture"])
        results = run(
            shim, "lif_attention_backward", p, {**inputs, **extra}, outputs, ctx.options["pad"]
        )
        gradients = [results[f"grad_{name}"] for name in ("query", "key", "value")]
        return *gradients, *results["grad_gates"], None


def lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
    return_summary: bool = False,
    architecture: int = cuda_shim.ARCHITECTURE,
    pad: int | None = None,
) -> Tensor | tuple[Tensor, AttentionSummary]:
    """As ember_ext.ops.lif_attention, with kernels compiled for `architecture`.

    Tokens have `pad` elements between them: see `run`.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        "eps": eps,
        "seed": seed,
        "return_summary": return_summary,
        "architecture": architecture,
        "pad": pad,
    }
    gate = [p.to(compute) for p in (threshold, leak, steepness)]
    result = _Attention.apply(query, key, value, *gate, options)
    if not return_summary:
        return result  # type: ignore[no-any-return]
    out, summary, load = result
    return out, AttentionSummary(*summary, load)
