"""Random streams that are a function of the seed, a purpose and a step.

Nothing random carries over from one step to the next, so a resumed run draws what an uninterrupted
one would, evaluation cannot disturb training, and runs of one seed see equal batches and masks.
"""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed that no other purpose or step shares."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator at the start of that stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, step))
