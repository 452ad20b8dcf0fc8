"""The content of checkpoints: progress, weights and the optimiser's state, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_type_hints

import torch
from torch import Tensor, nn

from ember_ext.paper.records import RecordError, check_record, parse_json

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """The progress of a run, as its checkpoint records it."""

    step: int = 0
    """Updates made."""
    evaluated: bool = False
    """Whether the weights of this step were evaluated."""
    val_loss: float = float("inf")
    """That of the latest evaluation, on the whole validation text."""
    val_loss_estimate: float = float("inf")
    """That of the latest evaluation, on random batches."""
    best_val_loss: float = float("inf")
    best_step: int = 0
    best_val_loss_estimate: float = float("inf")
    seconds: float = 0.0
    """Time spent, resumed parts together."""
    step_seconds: float = 0.0
    """Time spent on updates alone."""
    metrics_bytes: int = 0
    """Length of `metrics.jsonl`."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with a tensor of two names (tied weights) once only."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them: on the CPU, contiguous and without gradients."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def parse_progress(header: Mapping[str, str]) -> Progress:
    """The progress in the header of a file.

    Raises:
        RecordError: there is none, or it is damaged.
    """
    if "progress" not in header:
        raise RecordError(f"the header must have progress, got {sorted(header)}")
    types = get_type_hints(Progress)
    return Progress(**check_record(parse_json(header["progress"]), types, "progress", exact=True))


def check_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that the tensors of a file are those of a model.

    Raises:
        RecordError: they are others.
    """
    wanted = {f"model.{name}": _kind(tensor) for name, tensor in model_tensors(model).items()}
    given = {name: _kind(t) for name, t in tensors.items() if name.startswith("model.")}
    _check_tensors("the weights of another model", wanted, given)


def optimizer_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    step: int,
) -> dict[Tensor, dict[str, Tensor]]:
    """The optimiser's state of each parameter, on the parameter's device.

    Raises:
        RecordError: the file holds another state.
    """
    given = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    wanted: dict[str, str] = {}
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        if step == 0 or id(parameter) not in trained:
            continue
        states[parameter] = {}
        for key in _ADAM_STATE:
            full_name = f"optimizer.{key}.{name}"
            like = torch.zeros(()) if key == "step" else parameter
            wanted[full_name] = _kind(like)
            if full_name in given:
                # The step count stays on the CPU unless the optimiser is fused on another device.
                states[parameter][key] = given[full_name].to(parameter.device)
    _check_tensors("another optimiser's state", wanted, {n: _kind(t) for n, t in given.items()})
    return states


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_tensors(what: str, wanted: Mapping[str, str], given: Mapping[str, str]) -> None:
    for name in sorted(wanted.keys() | given.keys()):
        expected, got = wanted.get(name, "no such tensor"), given.get(name, "no such tensor")
        if expected != got:
            raise RecordError(f"it holds {what}: {name} must be {expected}, got {got}")


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into a model."""
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(tensors[f"model.{name}"])
