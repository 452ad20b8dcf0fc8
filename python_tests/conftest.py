"""What all tests share: fixtures, and GPU tests are skipped where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

# Spinning threads of a test and of the processes that it starts would fight for the cores. torch
# reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_repeats() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """Check that a function returns the same bits again and with any number of threads."""

    def check(run: Callable[[], Sequence[Tensor]]) -> None:
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                results.append(run())
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)

    return check
