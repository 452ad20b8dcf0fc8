"""Sample inputs of LIF attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ember_ext.testing.sample import Operator, Sample, run


def attention_tensors(
    batch: int,
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Random query, key and value, and gates that matter at probabilities of about 1 / keys."""
    theta, lam, k = torch.rand(3, heads, generator=generator)
    return {
        "query": torch.randn(batch, heads, queries, size, generator=generator).to(dtype),
        "key": torch.randn(batch, groups, keys, size, generator=generator).to(dtype),
        "value": torch.randn(batch, groups, keys, size, generator=generator).to(dtype),
        "threshold": 0.3 * theta,
        "leak": 0.1 + 0.8 * lam,
        "steepness": 1 + 8 * k,
    }


def close_gates(tensors: dict[str, Tensor], steepness: float, threshold: float) -> None:
    """Let nothing leak, so that weights are as small as exp(-steepness * threshold)."""
    tensors["leak"] = torch.zeros_like(tensors["leak"])
    tensors["steepness"] = torch.full_like(tensors["steepness"], steepness)
    tensors["threshold"] = torch.full_like(tensors["threshold"], threshold)


def nearly_equal_keys(
    tensors: dict[str, Tensor], steepness: float, generator: torch.Generator
) -> dict[str, float]:
    """Let three keys have a third of each query's weight, and steep gates be half open to them.

    The first three keys differ by a 160th of what they have in common. Their weights differ by
    about 1 / `steepness`. Each query has to see them all.

    Returns:
        Options of the call: the scale at which scores are about 10 and -10.
    """
    query, key = tensors["query"], tensors["key"]
    size = query.shape[-1]
    places = torch.arange(size)
    signs = torch.stack((1.0 - 2.0 * (places % 2), 1.0 - 2.0 * (places // 2 % 2)))
    keys = torch.full(key.shape, -2.5)
    keys[:, :, :3] *= -1
    keys[:, :, 1:3] += signs / 64
    tensors["key"] = keys.to(key.dtype)
    apart = 128 / steepness * torch.randn(*query.shape[:-1], 2, generator=generator)
    tensors["query"] = (1 + apart @ signs).to(query.dtype)
    heads = tensors["threshold"].shape
    tensors |= {"steepness": torch.full(heads, steepness), "threshold": torch.full(heads, 1 / 3)}
    return {"scale": 4 / size}


def with_steep_scales(reference: Operator, sample: Sample) -> Sample:
    """`sample` with scales for the results in fp32 of inputs of 16 bits: the gates' gradients.

    A gate is a function of steepness * (p - threshold). The rounding of p to fp32 is multiplied by
    steepness * threshold there.
    """
    steepness, threshold = (float(sample.tensors[n].max()) for n in ("steepness", "threshold"))
    scales = {
        name: steepness * threshold * float(value.abs().max())
        for name, value in run(reference, sample).items()
        if value.dtype != sample.tensors["query"].dtype
    }
    return replace(sample, scale=scales)


def shift_scores(tensors: dict[str, Tensor], by: float) -> None:
    """Move all scores by about `by` < 0, and leave about half of their spread."""
    size = tensors["query"].shape[-1]
    mean = math.sqrt(-by / math.sqrt(size))
    for name, sign in (("query", 1), ("key", -1)):
        values = tensors[name]
        tensors[name] = (sign * mean + 0.5 / mean * values.float()).to(values.dtype)


def gradient_scales(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Sizes of the terms that cancel in the gradients, by the names of a sample's results.

    A gate's gradient is a sum over all rows, each of about the size of a dot product and of either
    sign. The softmax of a single score has none.
    """
    batch, _, queries, size = tensors["query"].shape
    gates = 1 + math.sqrt(batch * queries * size)
    scales = dict.fromkeys(("d threshold", "d leak", "d steepness"), gates)
    if tensors["key"].shape[2] == 1:
        scales |= {"d query": 1.0, "d key": 1.0}
    return scales


def closed_gradient_scales(tensors: dict[str, Tensor]) -> dict[str, float]:
    """As `gradient_scales`, for gates that are all but closed.

    Where every gate is about g = exp(-k threshold), moving the threshold multiplies the weights of
    a row by one number, which their sum takes out again: terms of size k cancel. With a leak they
    grow by one number, relative to g: terms of size 1 / g cancel.
    """
    scales = gradient_scales(tensors)
    size, k = scales["d threshold"], float(tensors["steepness"].max())
    gate = math.exp(-k * float(tensors["threshold"].max()))
    return scales | dict.fromkeys(("d threshold", "d within"), size * k) | {"d leak": size / gate}


def attention_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Shapes with 0, 1, primes and whole tiles; masks, dropout, grouped heads and odd strides."""
    generator = torch.Generator().manual_seed(0)
    # batch, heads, key and value heads, queries, keys, head size, causal, dropout, mask
    cases: list[tuple[int, int, int, int, int, int, bool, float, str]] = [
        (1, 1, 1, 1, 1, 1, True, 0.0, ""),
        (2, 3, 3, 7, 7, 5, True, 0.0, ""),
        (3, 2, 2, 64, 64, 64, True, 0.2, ""),
        (2, 4, 2, 65, 65, 33, True, 0.5, "keys"),
        (1, 6, 1, 50, 97, 16, True, 0.0, ""),
        (2, 2, 2, 97, 50, 17, True, 0.1, ""),
        (1, 3, 3, 31, 130, 8, False, 0.3, "all"),
        (2, 2, 1, 1, 77, 32, True, 0.0, ""),
        (1, 2, 2, 300, 301, 8, True, 0.1, "queries"),
        (1, 1, 1, 5, 9, 130, False, 0.0, ""),
        (0, 2, 2, 3, 3, 4, True, 0.0, ""),
        (2, 0, 0, 3, 3, 4, True, 0.0, ""),
        (2, 2, 2, 0, 3, 4, True, 0.0, ""),
        (2, 2, 2, 3, 0, 4, True, 0.0, ""),
        (2, 2, 2, 3, 3, 0, True, 0.0, ""),
    ]
    for batch, heads, groups, queries, keys, size, causal, dropout_p, mask in cases:
        options: dict[str, Any] = {"is_causal": causal, "dropout_p": dropout_p}
        if dropout_p:
            options["seed"] = torch.randint(2**63 - 1, (), generator=generator)
        if mask:
            shape = {
                "keys": (batch, 1, 1, keys),
                "queries": (queries, 1),
                "all": (batch, heads, queries, keys),
            }[mask]
            options["attn_mask"] = torch.rand(shape, generator=generator) < 0.6
        shapes = [batch, heads, groups, queries, keys, size]
        tensors = attention_tensors(
            batch, heads, groups, queries, keys, size, dtype, generator=generator
        )
        name = f"{shapes} causal={causal} dropout={dropout_p} mask={mask!r}"
        yield Sample(name, tensors, options, gradient_scales(tensors))
    tensors = attention_tensors(2, 3, 3, 20, 20, 12, dtype, generator=generator)
    joined = torch.randn(2, 20, 3, 3 * 12, generator=generator).to(dtype).transpose(1, 2)
    tensors |= dict(zip(("query", "key", "value"), joined.chunk(3, -1), strict=True))
    yield Sample("heads side by side", tensors, {"is_causal": True}, gradient_scales(tensors))
    tensors = {
        name: value.mT.contiguous().mT if value.dim() == 4 else value
        for name, value in tensors.items()
    }
    options = {"is_causal": True, "scale": -0.7, "eps": 0.1}
    yield Sample("tokens innermost", tensors, options, gradient_scales(tensors))
    for steepness, threshold in ((8.0, 3.0), (8.0, 2.0)):
        tensors = attention_tensors(1, 2, 2, 70, 70, 8, dtype, generator=generator)
        close_gates(tensors, steepness, threshold)
        name = f"gates all but closed, k={steepness} theta={threshold}"
        yield Sample(
            name, tensors, {"is_causal": True, "eps": 0.0}, closed_gradient_scales(tensors)
        )
