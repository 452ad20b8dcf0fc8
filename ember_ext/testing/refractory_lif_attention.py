"""Sample inputs of refractory LIF attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ember_ext.reference.refractory_lif_attention import RefractoryState
from ember_ext.testing.lif_attention import (
    attention_tensors,
    close_gates,
    closed_gradient_scales,
    gradient_scales,
)
from ember_ext.testing.sample import Operator, Sample


def with_flat_state(operator: Operator) -> Operator:
    """`operator` with `past` as two arguments of their own, and its state as two results.

    So that each is a tensor by itself, to be compared and differentiated like the others.
    """

    def flat(
        *arguments: Tensor,
        past_probabilities: Tensor | None = None,
        past_weights: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        past = None
        if past_probabilities is not None and past_weights is not None:
            past = RefractoryState(past_probabilities, past_weights)
        out, load, state = operator(*arguments, past=past, **options)
        return out, load, *state

    return flat


def refractory_tensors(
    batch: int,
    heads: int,
    groups: int,
    queries: int,
    earlier: int,
    size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Random inputs, with couplings at which loads move the thresholds about as far as p."""
    keys = earlier + queries
    tensors = attention_tensors(batch, heads, groups, queries, keys, size, dtype, generator)
    within, across = 0.2 + torch.rand(2, heads, generator=generator)
    return tensors | {"within": within, "across": across}


def refractory_gradient_scales(tensors: dict[str, Tensor]) -> dict[str, float]:
    """As `gradient_scales`; couplings, and a load that is one number, are sums over rows too."""
    scales = gradient_scales(tensors)
    sums = ["d within", "d across"]
    if "previous_load" in tensors and tensors["previous_load"].numel() == 1:
        sums.append("d previous_load")
    return scales | dict.fromkeys(sums, scales["d threshold"])


def refractory_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Both modes at 0, 1, primes and whole strips; every kind of load, state, dropout and group."""
    generator = torch.Generator().manual_seed(0)
    # batch, heads, key and value heads, queries, earlier keys, head size, dropout,
    # rows of the previous load, state of the earlier keys
    cases: list[tuple[int, int, int, int, int, int, float, str, bool]] = [
        (1, 1, 1, 1, 0, 1, 0.0, "", False),
        (2, 3, 3, 7, 0, 5, 0.0, "rows", False),
        (3, 2, 2, 97, 0, 33, 0.2, "row", False),
        (17, 2, 2, 50, 0, 16, 0.2, "rows", False),
        (16, 4, 2, 49, 5, 8, 0.0, "row", True),
        (2, 4, 2, 101, 30, 17, 0.5, "rows", True),
        (2, 6, 1, 60, 3, 8, 0.1, "number", False),
        (2, 3, 3, 1, 77, 32, 0.0, "row", True),
        (0, 2, 2, 3, 0, 4, 0.0, "", False),
        (2, 0, 0, 3, 1, 4, 0.0, "rows", False),
        (2, 2, 2, 0, 3, 4, 0.0, "row", True),
        (2, 2, 2, 5, 0, 0, 0.0, "rows", False),
    ]
    for mode in ("causal", "look_ahead"):
        for batch, heads, groups, queries, earlier, size, dropout_p, previous, state in cases:
            shapes = (batch, heads, groups, queries, earlier, size)
            tensors = refractory_tensors(*shapes, dtype, generator)
            keys = earlier + queries
            if previous:
                shape = {
                    "rows": (batch, queries, keys),
                    "row": (batch, 1, keys),
                    "number": (1, 1, 1),
                }[previous]
                tensors["previous_load"] = torch.rand(shape, generator=generator) / max(keys, 1)
            if state and mode == "causal":
                # As much as `earlier` queries can have drawn.
                probabilities = torch.rand(batch, heads, earlier, generator=generator)
                tensors["past_probabilities"] = 2 * probabilities
                tensors["past_weights"] = 2 * torch.rand(batch, earlier, generator=generator)
            options: dict[str, Any] = {"mode": mode, "is_causal": True, "dropout_p": dropout_p}
            if not previous:
                # A coupling with nothing has no gradient in the reference.
                options["across"] = tensors.pop("across")
            if dropout_p:
                options["seed"] = torch.randint(2**63 - 1, (), generator=generator)
            name = f"{mode} {list(shapes)} dropout={dropout_p} previous={previous!r} past={state}"
            yield Sample(name, tensors, options, refractory_gradient_scales(tensors))
    for mode in ("causal", "look_ahead"):
        for shape in ((2, 1, 52), (1, 50, 52)):
            tensors = refractory_tensors(2, 2, 1, 50, 2, 8, dtype, generator)
            # In the compute dtype, so that the kernels get its strides of 0.
            load = torch.rand(shape, generator=generator) / 52
            load = load.to(torch.promote_types(dtype, torch.float32))
            tensors["previous_load"] = load.expand(2, 50, 52)
            name = f"{mode}, previous load expanded from {list(shape)}"
            yield Sample(
                name,
                tensors,
                {"mode": mode, "is_causal": True},
                refractory_gradient_scales(tensors),
            )
        for steepness, threshold in ((8.0, 3.0), (8.0, 2.0)):
            tensors = refractory_tensors(1, 2, 2, 70, 0, 8, dtype, generator)
            close_gates(tensors, steepness, threshold)
            tensors["within"] = 0.1 * tensors["within"]
            options = {"mode": mode, "is_causal": True, "eps": 0.0}
            options["across"] = tensors.pop("across")
            name = f"{mode}, gates all but closed, k={steepness} theta={threshold}"
            yield Sample(name, tensors, options, closed_gradient_scales(tensors))
