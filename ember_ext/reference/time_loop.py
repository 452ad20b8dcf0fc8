"""A loop over the steps of a sequence that exporters can record for any length."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_flatten, tree_unflatten

Step = Callable[[Any, Any, Any], tuple[Any, Tensor]]
"""(constants, state, inputs of one step) -> (next state, output)."""


def conditions(
    x: Tensor, timespans: Tensor | float, lengths: Tensor | None, dtype: torch.dtype
) -> tuple[float | None, Tensor | None, Tensor | None, Tensor | None]:
    """What time spans and lengths come to in a loop over the steps of x.

    Args:
        x: input, [B, T, ...].
        timespans: a number, or a tensor of no dimension, [B, T] or [B, T, 1].
        lengths: [B]; None for all T.
        dtype: of time spans.

    Returns:
        The time span of every step, as a number or as a tensor; or time spans [B, T, 1]; and
        [B, T, 1] of whether a row has the step. What there is not is None.
    """
    batch, steps = x.shape[:2]
    number = fixed = spans = running = None
    if not isinstance(timespans, Tensor):
        number = timespans
    elif timespans.dim() == 0:
        fixed = timespans.to(dtype)
    else:
        spans = timespans.to(dtype).reshape(batch, steps, 1)
    if lengths is not None:
        running = (torch.arange(steps, device=x.device) < lengths[:, None]).unsqueeze(-1)
    return number, fixed, spans, running


def over_time(
    step: Step, state: Any, inputs: Any, constants: Any, width: int
) -> tuple[Any, Tensor]:
    """Call `step` for each step in turn.

    A loop in Python, but for `torch.export`, where it is a scan operator, and for
    `torch.jit.trace`, where it is a loop of TorchScript. Both stay loops in what is exported, such
    as an ONNX graph, and take sequences of any length.

    Args:
        step: a function of nothing but its arguments.
        state: of the first step; like the next two tensors in nested tuples, which may hold None.
        inputs: of all steps, [B, T, ...] each, at least one tensor; `step` gets [B, ...].
        constants: whatever is the same at each step, at least one tensor.
        width: of the output.

    Returns:
        The last state, and the outputs [B, T, width].
    """
    values, structure = tree_flatten(inputs)
    places = [i for i, value in enumerate(values) if value is not None]
    sequences = [values[i] for i in places]

    def at_once(constants: Any, state: Any, now: Any) -> tuple[Any, Tensor]:
        filled = [None] * len(values)
        for place, value in zip(places, now, strict=True):
            filled[place] = value
        return step(constants, state, tree_unflatten(filled, structure))

    if records_loops(sequences[0]):
        if torch.compiler.is_exporting():
            return _scan(at_once, state, sequences, constants)
        return _script(at_once, state, sequences, constants, width)
    outputs = []
    # In a loop that is recorded step by step, unbind refuses another number of steps.
    for now in zip(*(sequence.unbind(1) for sequence in sequences), strict=True):
        state, output = at_once(constants, state, now)
        outputs.append(output)
    if outputs:
        return state, torch.stack(outputs, 1)
    first = tree_flatten(state)[0][0]
    return state, first.new_empty(first.shape[0], 0, width)


def records_loops(x: Tensor) -> bool:
    """Whether someone records the operations on x, [B, T, ...], so that a loop has to be a loop."""
    if torch.compiler.is_exporting():
        return not statically_known_true(x.shape[1] <= 1)
    is_tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return is_tracing and int(x.shape[1]) > 0


def _scan(step: Step, state: Any, sequences: list[Tensor], constants: Any) -> tuple[Any, Tensor]:
    from torch._higher_order_ops.scan import scan

    states, structure = tree_flatten(state)

    def own(value: Tensor) -> Tensor:
        # The inputs and outputs of a scan must not share memory, or its results are wrong. States
        # must keep their strides.
        return value.clone(memory_format=torch.contiguous_format)

    def combine(states: list[Tensor], now: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        state, output = step(constants, tree_unflatten(states, structure), now)
        return [own(value) for value in tree_flatten(state)[0]], own(output)

    states = [own(value) for value in states]
    last, outputs = scan(combine, states, [s.transpose(0, 1) for s in sequences])
    return tree_unflatten(last, structure), outputs.transpose(0, 1)


def _script(
    step: Step, state: Any, sequences: list[Tensor], constants: Any, width: int
) -> tuple[Any, Tensor]:
    """The loop in TorchScript, around a trace of one step."""
    states, structure = tree_flatten(state)
    values, constant_structure = tree_flatten(constants)
    places = [i for i, value in enumerate(values) if value is not None]

    def flat(given: list[Tensor], states: list[Tensor], now: list[Tensor]) -> list[Tensor]:
        filled: list[Tensor | None] = [None] * len(values)
        for place, value in zip(places, given, strict=True):
            filled[place] = value
        state, output = step(
            tree_unflatten(filled, constant_structure), tree_unflatten(states, structure), now
        )
        return [*tree_flatten(state)[0], output]

    given = [values[i] for i in places]
    jit: Any = torch._C
    recording = jit._get_tracing_state()
    jit._set_tracing_state(None)
    try:
        with warnings.catch_warnings():
            # The user chose TorchScript, and was told by the call that is being traced.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            first = [sequence.select(1, 0) for sequence in sequences]
            one = torch.jit.trace(flat, (given, states, first), check_trace=False)

            def loop(
                given: list[Tensor], states: list[Tensor], sequences: list[Tensor], width: int
            ) -> tuple[list[Tensor], Tensor]:
                # With the first there is something to stack where T = 0. It is cut off again.
                outputs = [states[0].new_zeros([states[0].size(0), width])]
                for t in range(sequences[0].size(1)):
                    now = [sequence.select(1, t) for sequence in sequences]
                    result = one(given, states, now)
                    states = result[:-1]
                    outputs.append(result[-1])
                return states, torch.stack(outputs, 1)[:, 1:]

            scripted = torch.jit.script(loop)
    finally:
        jit._set_tracing_state(recording)
    last, outputs = scripted(given, states, sequences, width)
    return tree_unflatten(last, structure), outputs
