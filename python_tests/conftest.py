"""What all tests share: GPU tests are skipped where there is no GPU."""

from __future__ import annotations

import os

# Spinning threads of a test and of the processes that it starts would fight for the cores. torch
# reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
