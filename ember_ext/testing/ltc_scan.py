"""Sample inputs of the LTC scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ember_ext.ops.ltc_scan import ltc_synapses
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights
from ember_ext.testing.sample import Sample, normal


def ltc_weights(inputs: int, units: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random fp32 weights by name, within the ranges that ncps draws them from."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    weights = {
        "cm": uniform(0.4, 0.6, units),
        "gleak": uniform(0.001, 1.0, units),
        "vleak": uniform(-0.2, 0.2, units),
    }
    for prefix, sources in (("", units), ("sensory_", inputs)):
        weights[f"{prefix}w"] = uniform(0.001, 1.0, sources, units)
        weights[f"{prefix}mu"] = uniform(0.3, 0.8, sources, units)
        weights[f"{prefix}sigma"] = uniform(3.0, 8.0, sources, units)
        weights[f"{prefix}erev"] = uniform(-1.0, 1.0, sources, units).sign()
    return weights


def flat_ltc(operator: Callable[..., Any]) -> Callable[..., Any]:
    """`operator` (an `ltc_scan`) with weights and synapses as keywords, as samples hold them."""

    def call(x: Tensor, **arguments: Any) -> Any:
        weights = LTCWeights(*(arguments.pop(name) for name in LTCWeights._fields))
        if "recurrent" in arguments:
            lists = (arguments.pop(name) for name in LTCSynapses._fields)
            arguments["synapses"] = LTCSynapses(*lists)
        return operator(x, weights, **arguments)

    return call


class _Case(NamedTuple):
    seed: int
    batch: int
    steps: int
    inputs: int
    units: int
    share: float
    """Of the synapses, that exist."""
    unfolds: int
    timespans: str


# The seeds are those of the first twenty under which results cancel little; see cfc_scan.py.
_CASES = (
    _Case(1, 3, 7, 5, 6, 0.5, 6, "none"),
    _Case(15, 19, 4, 13, 39, 0.2, 3, "rows"),
    _Case(5, 37, 3, 1, 17, 1.0, 1, "none"),
    _Case(3, 2, 5, 7, 3, 1.0, 8, "rows"),
    _Case(16, 33, 4, 6, 8, 0.6, 2, "scalar"),
    _Case(13, 5, 3, 2, 70, 0.1, 4, "rows"),
    _Case(15, 1, 9, 9, 35, 0.3, 6, "none"),
    _Case(16, 70, 2, 3, 5, 0.7, 5, "rows"),
    _Case(18, 1, 1, 1, 1, 1.0, 1, "none"),
    _Case(17, 7, 5, 0, 7, 0.5, 2, "rows"),
    _Case(0, 0, 3, 3, 4, 0.5, 6, "none"),
    _Case(6, 4, 3, 3, 4, 0.0, 6, "rows"),
    _Case(9, 3, 4, 4, 5, 1.0, 2, "rows"),
)
_STRIDED_SEED = 1


def ltc_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Wirings, solver steps, time spans and lengths over shapes with 0, 1, primes and tails."""
    for index, case in enumerate(_CASES):
        outputs = case.units // 2 if index % 2 else None
        yield from _samples_of(case, dtype, outputs=outputs, padded=index % 3 == 1)
    yield from _strided_samples(_STRIDED_SEED, dtype)


def _samples_of(
    case: _Case, dtype: torch.dtype, *, outputs: int | None, padded: bool
) -> Iterator[Sample]:
    """The sample of a case, and the same with lengths if it is `padded`."""
    seed, batch, steps, inputs, units, share, unfolds, spans = case
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": normal(batch, steps, inputs, generator=generator),
        "h0": normal(batch, units, generator=generator),
        **ltc_weights(inputs, units, generator),
    }
    options: dict[str, Any] = {"ode_unfolds": unfolds}
    if share < 1:
        masks = (torch.rand(n, units, generator=generator) < share for n in (units, inputs))
        options |= ltc_synapses(*masks)._asdict()
    if spans == "rows":
        tensors["timespans"] = 0.1 + 2 * torch.rand(batch, steps, generator=generator)
    elif spans == "scalar":
        options["timespans"] = 0.7
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    if outputs is not None:
        options["outputs"] = outputs
    name = f"{[batch, steps, inputs, units]} share={share} unfolds={unfolds} dt={spans}"
    yield Sample(name, tensors, options)
    if padded:
        lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
        yield Sample(f"{name} lengths", tensors, options | {"lengths": lengths})


def _strided_samples(seed: int, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    weights = ltc_weights(4, 5, generator)
    x = normal(6, 9, 4, generator=generator).to(dtype)
    for name, strided in (("time-major", x.transpose(0, 1)), ("every second step", x[:, ::2])):
        yield Sample(name, {"x": strided, **{k: v.to(dtype) for k, v in weights.items()}})
