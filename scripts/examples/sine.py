"""Fit a sine with ncps' networks, before and after `accelerate`; prints losses and times.

python scripts/examples/sine.py
"""

from __future__ import annotations

import argparse
import time

import ncps.torch
import torch
from ncps.wirings import AutoNCP
from torch import Tensor, nn

from ember_ext import accelerate


class Sine(nn.Module):
    """Two phases in, and the sine of their course out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        # 19 neurons, of which one is the output.
        self.rnn = getattr(ncps.torch, kind)(2, AutoNCP(19, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 2] to [B, T, 1]."""
        output, _ = self.rnn(x)
        return output  # type: ignore[no-any-return]


def data(steps: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs [1, T, 2] and targets [1, T, 1]: two waves, and one of twice their frequency."""
    t = torch.linspace(0, 3 * torch.pi, steps)
    return torch.stack([t.sin(), t.cos()], 1)[None], (2 * t).sin()[None, :, None]


def fit(model: nn.Module, updates: int) -> tuple[float, float]:
    """The last loss, and the seconds that the fit took."""
    x, y = data()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    start = time.perf_counter()
    for _ in range(updates):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item(), time.perf_counter() - start


def main() -> None:
    """Fit each kind of network twice from the same weights."""
    parser = argparse.ArgumentParser(description="Fit a sine before and after accelerate.")
    parser.add_argument("--updates", type=int, default=100, help="optimiser steps (default: 100)")
    updates = parser.parse_args().updates
    print(f"{'':16}{'ncps':>18}{'accelerated':>18}")
    for kind in ("CfC", "LTC"):
        torch.manual_seed(0)
        model = Sine(kind)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        losses, seconds = zip(fit(model, updates), strict=True)
        model.load_state_dict(state)
        report = accelerate(model)
        assert report.replaced == ("rnn",)
        again, faster = fit(model, updates)
        print(f"{kind + ', loss':16}{losses[0]:18.6f}{again:18.6f}")
        print(f"{kind + ', seconds':16}{seconds[0]:18.2f}{faster:18.2f}")


if __name__ == "__main__":
    main()
