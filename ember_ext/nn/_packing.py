"""`Packing`: modules that keep their weights laid out for inference, as long as they hold the same.

What the weights' tensors hold is compared at each use; see `LaidOut`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ember_ext import _native
from ember_ext.nn._laid_out import LaidOut
from ember_ext.ops._watch import WeightsChangedError, swaps_parameters


class Packing(nn.Module):
    """Mixed into a module of ncps, to which it adds no state that is kept."""

    _packed: LaidOut | None = None

    @classmethod
    def _adopt(cls, module: Any) -> None:
        """Make an object of ncps one of this class, which adds no state to it."""
        module.__class__ = cls

    def _release(self) -> None:
        """Undo what `_adopt` and use did to the object, but for its class."""
        self.__dict__.pop("_packed", None)

    def _why_not_ncps(self) -> str | None:
        """The reason why ncps' class would compute something else; None if it would not."""
        return None

    def _lay_out(self) -> LaidOut:
        """The module's weights, laid out for inference."""
        raise NotImplementedError

    def _calls_cells(self) -> bool:
        """Whether weights do not tell what is computed, so that they cannot be laid out."""
        raise NotImplementedError

    def _run_packed(
        self, x: Tensor, h: Tensor, timespans: Tensor | float, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Output and final state from weights that are laid out; None where that cannot be.

        Args:
            x: input, [B, T, I], or [B, I] for a single step.
            h: initial state, [B, S].
            timespans: of every step.
            lengths: of every row; None for all T.
        """
        for _ in range(2):
            packed = self._packed_for(x, h)
            if packed is None:
                return None
            try:
                return packed.run(x, h, timespans, lengths)
            except WeightsChangedError:
                self._packed = None
        return None  # the weights change all the time

    def _packed_for(self, x: Tensor, h: Tensor) -> LaidOut | None:
        """The packed weights, if they can take x and h: another thread may pack anew meanwhile."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if _native.wants_definition() or _native.transforms_active():
            return None
        packed = self._packed
        if packed is None or not packed.is_current():
            if not _native.has("cpu") or swaps_parameters() or self._calls_cells():
                return None
            packed = self._packed = self._lay_out()
        return packed if packed.takes(x, h) else None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None  # other tensors may come to sit in the same parameters
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None  # a watched tensor cannot be swapped for another
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
