"""Sample inputs of the LIF gate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ember_ext.testing.sample import Sample


def gate_parameters(units: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random θ in [-0.1, 1), λ in [0.1, 0.9) and k in [0.5, 6), [units] each, fp32."""
    theta, lam, k = torch.rand(3, units, generator=generator)
    return {"threshold": 1.1 * theta - 0.1, "leak": 0.1 + 0.8 * lam, "steepness": 0.5 + 5.5 * k}


def gate_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Shapes with 0, 1, primes and long rows; every norm and unit dimension; odd strides."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[tuple[int, ...], int]] = [
        ((7,), -1),
        ((1, 1), -1),
        ((3, 129), -1),
        ((257, 13), 1),
        ((2, 3, 5, 31), -1),
        ((2, 3, 5, 31), 1),
        ((4, 6, 17, 17), 1),
        ((37, 4), 0),
        ((3, 5, 1), 1),
        ((2, 4501), -1),
        ((0, 8), -1),
        ((4, 0), -1),
        ((3, 0, 5), -1),
    ]
    for shape, unit_dim in shapes:
        for norm in (None, "l1", "l2"):
            x = torch.randn(shape, generator=generator).to(dtype)
            yield Sample(
                f"{list(shape)} unit_dim={unit_dim} norm={norm}",
                {"x": x, **gate_parameters(shape[unit_dim], generator)},
                {"norm": norm, "unit_dim": unit_dim},
                # The norm of a row of one is that one, so its gradients cancel.
                scale=1.0 if shape[-1] == 1 else 0.0,
            )
    for name, x in (
        ("transposed", torch.randn(19, 6, 11, generator=generator).to(dtype).transpose(0, 2)),
        ("every third", torch.randn(5, 39, generator=generator).to(dtype)[:, ::3]),
        ("expanded", torch.randn(1, 23, generator=generator).to(dtype).expand(7, 23)),
    ):
        units = gate_parameters(x.shape[-1], generator)
        yield Sample(f"{name} {list(x.shape)}", {"x": x, **units}, {"norm": "l2"})
