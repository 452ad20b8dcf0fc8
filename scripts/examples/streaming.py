"""Answer one observation at a time, as a robot does, and see how long the slowest steps take.

A wired CfC or LTC takes 2000 steps with ncps, with `step`, which follows every change of the
weights, and with `streamer().step`, which does not look for changes. The time spans between the
observations vary, as those of a real sensor do. Prints percentiles and saves a histogram.

python scripts/examples/streaming.py
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import ncps.torch
import torch
from ncps.wirings import AutoNCP
from torch import Tensor

import ember_ext

Step = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def ncps_step(layer: Any) -> Step:
    """A step of ncps: a sequence of length 1."""

    def step(x: Tensor, h: Tensor, span: float) -> tuple[Tensor, Tensor]:
        y, h = layer(x[:, None], h, torch.tensor([[span]]))
        return y[:, 0], h

    return step


def loop(step: Step, observations: Tensor, spans: list[float]) -> tuple[list[float], Tensor]:
    """Microseconds of each step, and the last answer."""
    times, h = [], torch.zeros(1, 32)
    with torch.no_grad():
        for x, span in zip(observations, spans, strict=True):
            start = time.perf_counter()
            y, h = step(x, h, span)
            times.append(1e6 * (time.perf_counter() - start))
    return times, y


parser = argparse.ArgumentParser(description="Time single steps.")
parser.add_argument("--network", choices=("CfC", "LTC"), default="CfC", help="default: CfC")
parser.add_argument("--steps", type=int, default=2000, help="observations (default: 2000)")
parser.add_argument("--out", default="streaming.png", help="picture (default: streaming.png)")
args = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)  # a step is too little work for two
observations = torch.randn(args.steps, 1, 20)
spans = (0.8 + 0.4 * torch.rand(args.steps)).tolist()
theirs = getattr(ncps.torch, args.network)(20, AutoNCP(32, 4))
ours = getattr(ember_ext.nn, args.network)(20, AutoNCP(32, 4))
ours.load_state_dict(theirs.state_dict())
answers: dict[str, Tensor] = {}
contenders = {"ncps": ncps_step(theirs), "step": ours.step, "streamer": ours.streamer().step}
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
print(f"{'µs a step':10}{'median':>9}{'99 %':>9}{'99.9 %':>9}{'slowest':>9}")
for name, step in contenders.items():
    loop(step, observations[:50], spans[:50])  # the first calls of a process take longer
    times, answers[name] = loop(step, observations, spans)
    torch.testing.assert_close(answers[name], answers["ncps"], rtol=1e-4, atol=1e-5)
    marks = torch.tensor(times).quantile(torch.tensor([0.5, 0.99, 0.999, 1.0])).tolist()
    print(f"{name:10}" + "".join(f"{mark:9.0f}" for mark in marks))
    bins = [10 ** (i / 20) for i in range(16, 100)]
    axis.hist(times, bins, label=f"{name}, median {marks[0]:.0f} µs", alpha=0.7)
axis.set(xscale="log", yscale="log", xlabel="µs a step", ylabel="steps")
axis.set(title=f"{args.network} of 32 neurons")
axis.legend()
figure.savefig(args.out, dpi=150)
