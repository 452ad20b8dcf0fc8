"""Lets programs and files hold named tuples of the package."""

from __future__ import annotations

import torch
from torch.utils import _pytree


def make_saveable(*kinds: type[tuple[object, ...]]) -> None:
    """Let `torch.export.save` and `torch.load(weights_only=True)` handle named tuples.

    torch exports a program with any named tuple, but saves it only if the tuple has a name for the
    file. The name must stay the same when a class moves, because old files have it.
    """
    for kind in kinds:
        _pytree._register_namedtuple(kind, serialized_type_name=f"ember_ext.{kind.__name__}")
    # A saved program holds its example inputs, which are loaded with `weights_only` first.
    torch.serialization.add_safe_globals(list(kinds))
