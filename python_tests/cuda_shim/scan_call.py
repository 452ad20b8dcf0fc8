"""Calls of the launchers of an operator over sequences, on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

import cuda_shim


class ScanCall:
    """One call of a launcher. A subclass fills in what its binding in csrc/binding does.

    Args:
        stem: the operator's.
        p: its parameters, but for addresses.
        compute: the dtype that it computes in.
    """

    inputs: dict[str, Tensor | None]
    """What every call takes, by field; "name field" is a field of a part of the parameters."""

    def __init__(self, stem: str, p: ctypes.Structure, compute: torch.dtype) -> None:
        self.library = cuda_shim.operators().library
        self.stem, self.p, self.compute = stem, p, compute
        assert ctypes.sizeof(p) == self.function("params_size")()

    def function(self, name: str) -> Any:
        """A function of the operator's; sizes are 64 bits wide."""
        function = getattr(self.library, f"ember_{self.stem}_{name}")
        if name.endswith(("size", "workspace")):
            function.restype = ctypes.c_int64
        return function

    def part(self, name: str, field: str) -> tuple[Any, str]:
        """The structure and the field that "name field" stands for."""
        raise NotImplementedError

    def _set(self, addresses: dict[str, int | None]) -> None:
        for key, address in addresses.items():
            name, _, field = key.partition(" ")
            owner, attribute = self.part(name, field) if field else (self.p, name)
            setattr(owner, attribute, address)

    def run(
        self, direction: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Call the forward or backward launcher and return what it wrote."""
        # The workspace's size depends on what is wanted.
        self._set(dict.fromkeys(inputs | outputs, 1))
        elements = self.function("workspace")(ctypes.byref(self.p), int(direction == "backward"))
        outputs = outputs | {"workspace": torch.empty(elements, dtype=self.compute)}

        def run(addresses: dict[str, int | None]) -> int:
            self._set(addresses)
            return int(self.function(direction)(ctypes.byref(self.p)))

        results = cuda_shim.operators().call(run, inputs | self.inputs, outputs)
        del results["workspace"]
        return results
