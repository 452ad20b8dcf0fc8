"""Sample inputs, and the comparison of an operator with its reference on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ember_ext.testing.tolerance import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Operator = Callable[..., Any]


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Normally distributed fp32 numbers that are the same on every platform.

    PyTorch's own fp32 ones are not, because they are made by vector instructions.
    """
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


@dataclass(frozen=True)
class Sample:
    """The arguments of one call.

    Attributes:
        name: for test ids and messages.
        tensors: the differentiable arguments, by name.
        options: all other arguments, by name.
    """

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | dict[str, float] = 0.0
    """The size of the terms that results are sums of, where these cancel to much less; of all
    results, or by name."""

    def __str__(self) -> str:
        return self.name

    def to(self, device: torch.device | str) -> Sample:
        """The same sample on another device."""
        tensors = {name: value.to(device) for name, value in self.tensors.items()}
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return replace(self, tensors=tensors, options=options)


def run(operator: Operator, sample: Sample, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Call `operator` on a sample and return its outputs and all gradients, by name.

    The gradients are those of a fixed random weighting of the outputs. With `dtype`, every tensor
    is converted first, which from a narrower dtype is exact; strides are kept.
    """
    leaves = {
        name: (value if dtype is None else value.to(dtype)).detach().requires_grad_()
        for name, value in sample.tensors.items()
    }
    outputs = operator(**leaves, **sample.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64)
        .to(next(iter(sample.tensors.values())).dtype)
        .to(output)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}


def check_sample(
    operator: Operator, reference: Operator, sample: Sample, *, floor_ulps: float | None = None
) -> None:
    """Hold `operator` to the tolerance rule on one sample: every output and every gradient.

    `floor_ulps` is that of `error_bound`, for operators that compute more coarsely than in their
    results' dtype.

    Raises:
        AssertionError: naming the sample, the tensor, its error and the bound.
    """
    actual = run(operator, sample)
    eager = run(reference, sample)
    exact = run(reference, sample, torch.float64)
    for name, value in actual.items():
        scale = sample.scale.get(name, 0.0) if isinstance(sample.scale, dict) else sample.scale
        assert_close(
            f"{sample.name}: {name}",
            value,
            eager[name],
            exact[name],
            floor_ulps=floor_ulps,
            scale=scale,
        )
