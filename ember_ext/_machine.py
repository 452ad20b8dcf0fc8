"""Which machine this is, in the words of benchmark tables and training summaries."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import ember_ext
from ember_ext import _native


def processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU, that a device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """One line that names the machine and the software that something ran on."""
    threads = torch.get_num_threads()
    return (
        f"{processor(device)}, {threads} thread{'s' * (threads > 1)}, "
        f"{_native.isa or 'no kernels'}, "
        f"torch {torch.__version__}, ember-ext {ember_ext.__version__}"
    )
