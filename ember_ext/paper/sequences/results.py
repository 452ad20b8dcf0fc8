"""The results of a study's runs, one small file a run, and what they say together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ember_ext.paper.files import write_atomically
from ember_ext.paper.records import RecordError, check_record, read_json
from ember_ext.paper.runs.results import ResultError, rounded
from ember_ext.paper.sequences.training import Outcome

_FIELDS = {"task": str, "cell": str, "gate": bool, "drop": float, "seed": int,
           "model": dict, "training": dict, "details": dict, "outcome": dict}  # fmt: skip


@dataclass(frozen=True)
class SequenceResult:
    """One run of a study.

    Attributes:
        task: "vowels" or "xor".
        cell: see `ClassifierConfig`.
        gate: whether it had LIF gates.
        drop: the share of the steps that was dropped.
        seed: runs of one seed are paired.
        model: the fields of its `ClassifierConfig`.
        training: the fields of its `TrainingConfig`.
        details: those of its `Task`.
        outcome: the fields of its `Outcome`.
    """

    task: str
    cell: str
    gate: bool
    drop: float
    seed: int
    model: dict[str, Any]
    training: dict[str, Any]
    details: dict[str, Any]
    outcome: dict[str, Any]

    @property
    def name(self) -> str:
        """The file's name, without its ending."""
        return run_name(self.task, self.cell, self.gate, self.drop, self.seed)

    @property
    def accuracy(self) -> float:
        """In per cent."""
        return 100 * float(self.outcome["accuracy"])


def run_name(task: str, cell: str, gate: bool, drop: float, seed: int) -> str:
    """What a run is called: "vowels-cfc-gate-drop0.5-seed3"."""
    parts = [task, cell, *(["gate"] if gate else []), *([f"drop{drop:g}"] if drop else [])]
    return "-".join([*parts, f"seed{seed}"])


def write_result(folder: Path, result: SequenceResult) -> None:
    """Write a result in one step, numbers rounded to `SIGNIFICANT_DIGITS`."""
    content = dataclasses.asdict(result)
    outcome = {key: _on_one_line(value) for key, value in content.pop("outcome").items()}
    head = json.dumps(content, indent=2)[:-2]
    lines = ",\n".join(f'    "{key}": {text}' for key, text in outcome.items())
    text = f'{head},\n  "outcome": {{\n{lines}\n  }}\n}}\n'
    write_atomically(folder / f"{result.name}.json", text.encode())


def read_result(path: Path) -> SequenceResult:
    """Read what `write_result` wrote.

    Raises:
        ResultError: the file is missing or is not a result.
    """
    try:
        record = check_record(read_json(path), _FIELDS, exact=True)
        fields = {field.name for field in dataclasses.fields(Outcome)}
        if set(record["outcome"]) != fields:
            raise RecordError(
                f"outcome must have {sorted(fields)}, got {sorted(record['outcome'])}"
            )
    except RecordError as error:
        raise ResultError(f"{path} is not the result of a run: {error}") from None
    return SequenceResult(**record)


def read_results(folder: Path, task: str) -> list[SequenceResult]:
    """All results of a task in a folder, which may be missing, in the order of their seeds.

    Raises:
        ResultError: a file is damaged, or has another name than its run.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        # A copy under another name would count as one more seed.
        if path.stem != result.name:
            raise ResultError(f"{path} must be named after its run {result.name}")
        if result.task == task:
            results.append(result)
    return sorted(results, key=lambda result: result.seed)


def select(
    results: Iterable[SequenceResult], cell: str, gate: bool, drop: float
) -> list[SequenceResult]:
    """The results of one condition."""
    return [r for r in results if (r.cell, r.gate, r.drop) == (cell, gate, drop)]


def paired(
    base: Sequence[SequenceResult], other: Sequence[SequenceResult]
) -> tuple[list[float], list[float]]:
    """The accuracies of the seeds that both conditions have."""
    by_seed: Mapping[int, SequenceResult] = {result.seed: result for result in other}
    both = [(result, by_seed[result.seed]) for result in base if result.seed in by_seed]
    return [one.accuracy for one, _ in both], [two.accuracy for _, two in both]


def _on_one_line(value: Any) -> str:
    return json.dumps(rounded(value))
