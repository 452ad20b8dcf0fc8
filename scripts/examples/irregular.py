"""Classify series that were sampled at irregular times, with `nn.CfC` and `nn.LTC`.

Each series is a wave of one of two frequencies. It is seen at random times, and the number of
samples is random, too. Only the time spans between the samples tell the two classes apart. A batch
takes one call, with time spans for each row and step and a length for each row. ncps takes
neither, so it gets one series at a time here. Prints the accuracy and the times of both.

python scripts/examples/irregular.py
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from ncps.wirings import AutoNCP
from torch import Tensor, nn

from ember_ext import decelerate
from ember_ext.nn import LTC, CfC


def data(rows: int, longest: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [B, T, 1], time spans [B, T], lengths [B] and classes [B]."""
    spans = 0.05 + 0.5 * torch.rand(rows, longest)
    classes = torch.randint(2, (rows,))
    phases = (1.0 + classes)[:, None] * spans.cumsum(1) + 6 * torch.rand(rows, 1)
    lengths = torch.randint(longest // 2, longest + 1, (rows,))
    beyond = torch.arange(longest) >= lengths[:, None]
    nan = float("nan")  # values beyond the end of a series have no influence
    return phases.sin().masked_fill(beyond, nan)[..., None], spans, lengths, classes


def logits_by_ncps(model: Any, x: Tensor, spans: Tensor, lengths: Tensor) -> Tensor:
    """One series at a time: [B, 2]."""
    rows = [
        model(x[i : i + 1, :length], timespans=spans[i : i + 1, :length])[0]
        for i, length in enumerate(lengths.tolist())
    ]
    return torch.cat(rows)


def main() -> None:
    """Train each network, then classify new series with it and with ncps and the same weights."""
    parser = argparse.ArgumentParser(description="Classify irregularly sampled series.")
    parser.add_argument("--updates", type=int, default=150, help="optimiser steps (default: 150)")
    updates = parser.parse_args().updates
    torch.manual_seed(0)
    torch.set_num_threads(1)  # networks of 24 neurons are too little work for two
    training, test = data(64), data(100)
    for kind in (CfC, LTC):
        model: Any = kind(1, AutoNCP(24, 2), return_sequences=False)
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
        for _ in range(updates):
            x, spans, lengths, classes = training
            optimizer.zero_grad()
            logits = model(x, timespans=spans, lengths=lengths)[0]
            nn.functional.cross_entropy(5 * logits, classes).backward()
            optimizer.step()
        x, spans, lengths, classes = test
        with torch.no_grad():
            start = time.perf_counter()
            logits, _ = model(x, timespans=spans, lengths=lengths)
            middle = time.perf_counter()
            decelerate(model)
            expected = logits_by_ncps(model, x, spans, lengths)
            end = time.perf_counter()
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        right = (logits.argmax(1) == classes).float().mean()
        print(
            f"{kind.__name__}: {right:.0%} of 100 new series right, "
            f"{1e3 * (middle - start):.1f} ms; ncps, one by one: {1e3 * (end - middle):.0f} ms"
        )


if __name__ == "__main__":
    main()
