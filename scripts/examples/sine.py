"""Fit a sine with the networks of ncps, before and after `accelerate`: same loss, less time.

Your own model is accelerated in the same way: build it with ncps, then call `accelerate(model)`.
Takes half a minute, nearly all of it before `accelerate`.

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
    """A model with a layer of ncps. It reads two waves and returns one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        # 19 neurons; one of them is the output.
        self.rnn = getattr(ncps.torch, kind)(2, AutoNCP(19, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 2] to [B, T, 1]."""
        output, _ = self.rnn(x)
        return output  # type: ignore[no-any-return]


def data(steps: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs [1, T, 2] and targets [1, T, 1]; the target has twice the frequency."""
    t = torch.linspace(0, 3 * torch.pi, steps)
    return torch.stack([t.sin(), t.cos()], 1)[None], (2 * t).sin()[None, :, None]


def fit(model: nn.Module, updates: int) -> tuple[float, float]:
    """Train the model. Returns the last loss and the seconds that it took."""
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
    """Train each network twice from the same weights, with ncps and accelerated."""
    parser = argparse.ArgumentParser(description="Fit a sine before and after accelerate.")
    parser.add_argument("--updates", type=int, default=100, help="optimiser steps (default: 100)")
    updates = parser.parse_args().updates
    torch.set_num_threads(1)  # one sequence of 19 neurons is too little work for two
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
