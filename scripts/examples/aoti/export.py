"""Compile a small accelerated model for main.cpp: `python export.py model.pt2`."""

import sys

import torch
from ncps.torch import CfC
from ncps.wirings import AutoNCP
from torch.export import Dim

from ember_ext import accelerate


def make() -> torch.nn.Module:
    """A wired CfC, the same at each call."""
    torch.manual_seed(0)
    model = CfC(4, AutoNCP(9, 2))
    accelerate(model)
    return model.eval()


def package(path: str) -> None:
    """Compile the model to `path` for any batch, and any number of steps up to 4096."""
    shapes = ({0: Dim("batch"), 1: Dim("steps", max=4096)},)
    with torch.no_grad():
        program = torch.export.export(make(), (torch.randn(3, 5, 4),), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=path)


if __name__ == "__main__":
    package(sys.argv[1])
