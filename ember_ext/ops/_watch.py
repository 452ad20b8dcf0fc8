"""Whether weights still hold what they held when a copy of them was made."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ember_ext import _native


class WeightsChangedError(RuntimeError):
    """Packed weights are no longer those that they were packed from."""


class Watch:
    """Keeps a fingerprint of tensors, which packed weights are compared with at each use.

    The content decides, whoever wrote it and in whatever way: an optimiser, `.data`, NumPy, another
    process. Reading it costs about what reading the packed weights costs.

    `torch.utils.swap_tensors` refuses a tensor for as long as it is watched.

    Args:
        tensors: what `can_watch` says yes to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.number: int = torch.ops.ember_ext.watch(list(tensors))
        library = _native.library
        assert library is not None  # it has the operator
        weakref.finalize(self, library.ember_ext_unwatch, self.number).atexit = False
        self._unchanged = library.ember_ext_unchanged

    def unchanged(self) -> bool:
        """Whether the tensors hold what they held. Packed operators that take a watch ask it."""
        return bool(self._unchanged(self.number))


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def can_watch(tensor: Tensor) -> bool:
    """Whether all that `tensor` holds lies in memory that can be read here."""
    return type(tensor) in _PLAIN and tensor.device.type == "cpu" and not tensor.is_sparse


def swaps_parameters() -> bool:
    """Whether modules swap their parameters for others when they are converted or loaded."""
    return bool(torch.__future__.get_swap_module_params_on_conversion())
