"""The results of finished training runs, as one small file a run.

Everything that tables, figures and verdicts say is computed from these, so a report can be drawn
again, or a grid continued, without any checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ember_ext.paper.earlier import current_fields, current_variant
from ember_ext.paper.files import write_atomically
from ember_ext.paper.records import RecordError, check_record, read_json

SIGNIFICANT_DIGITS = 7
"""The digits of every number in a file; a float32 has no more."""


_FIELDS = {"variant": str, "config": dict, "corpus": dict, "summary": dict, "evaluations": list}


class ResultError(Exception):
    """A result that is missing or damaged; the message names the file."""


@dataclass(frozen=True)
class RunResult:
    """The outcome of one run.

    Attributes:
        variant: what was trained, within its backbone: a condition's name, or one of
            `suites.VARIANTS` such as "null" (see `ember_ext.paper.runs.suites`).
        config: the fields of its `TrainConfig`, without the path of its text; "backbone",
            "condition", "gate_preset", "seed", "steps" and "block_size" are among them.
        corpus: "name" and "sha256" of the text, and the size of its "vocabulary".
        summary: what `training.train` returns, among it "parameters" and "lif_parameters".
        evaluations: one entry per evaluation, in order of "step": "val_loss" (the whole validation
            text), "val_loss_estimate" and "train_loss_estimate" (random batches, the paper's
            protocol), "seconds", and the entries of `training.metrics.collect_metrics`.
    """

    variant: str
    config: dict[str, Any]
    corpus: dict[str, Any]
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]

    @property
    def backbone(self) -> str:
        """Which model: "transformer" or "cfc"."""
        return str(self.config["backbone"])

    @property
    def seed(self) -> int:
        """The seed; runs of one backbone and seed are paired."""
        return int(self.config["seed"])

    @property
    def name(self) -> str:
        """The file's name, without its ending."""
        return f"{self.backbone}-{self.variant}-seed{self.seed}"

    def curve(self, key: str = "val_loss") -> tuple[list[int], list[float]]:
        """Steps and values of one scalar over all evaluations."""
        steps = [int(record["step"]) for record in self.evaluations]
        return steps, [float(record[key]) for record in self.evaluations]

    def final(self, key: str = "val_loss") -> float:
        """One scalar at the last evaluation."""
        return float(self.evaluations[-1][key])

    def best(self, key: str = "val_loss") -> float:
        """The smallest value of one scalar over all evaluations, which is what the paper reports.

        Choosing it by the loss that is then reported flatters every run a little.
        """
        return min(self.curve(key)[1])


def write_result(path: str | os.PathLike[str], result: RunResult) -> None:
    """Write one result in one step, numbers rounded to `SIGNIFICANT_DIGITS`.

    Raises:
        OSError: it cannot be written.
    """
    content = rounded(dataclasses.asdict(result))
    # One line an evaluation: readable, and small.
    evaluations = ",\n".join("    " + json.dumps(e) for e in content.pop("evaluations"))
    head = json.dumps(content, indent=2)[:-2]
    text = f'{head},\n  "evaluations": [\n{evaluations}\n  ]\n}}\n'
    write_atomically(Path(path), text.encode())


def read_result(path: str | os.PathLike[str]) -> RunResult:
    """Read what `write_result` wrote.

    Raises:
        ResultError: the file is missing or is not a result.
    """
    try:
        result = RunResult(**check_record(read_json(Path(path)), _FIELDS, exact=True))
        check_record(result.config, {"backbone": str, "seed": int}, "config")
        result = dataclasses.replace(
            result,
            variant=current_variant(result.variant),
            config=current_fields(result.config),
        )
        check_record(result.corpus, {"name": str}, "corpus")
        if not result.evaluations:
            raise RecordError("evaluations must be at least one, got none")
        for number, evaluation in enumerate(result.evaluations):
            what = f"evaluation {number}"
            check_record(evaluation, {"step": int, "val_loss": float}, what)
    except RecordError as error:
        raise ResultError(f"{path} is not the result of a run: {error}") from None
    return result


def read_results(folder: str | os.PathLike[str]) -> list[RunResult]:
    """All results in a folder, sorted by backbone, variant and seed.

    Raises:
        ResultError: the folder is missing, or a file in it is damaged.
    """
    if not Path(folder).is_dir():
        raise ResultError(f"{folder} is not a folder of results")
    results = [read_result(path) for path in Path(folder).glob("*.json")]
    return sorted(results, key=lambda r: (r.backbone, r.variant, r.seed))


def select(results: Iterable[RunResult], backbone: str, variant: str) -> dict[int, RunResult]:
    """The results of one backbone and variant, by seed in rising order."""
    chosen = [r for r in results if r.backbone == backbone and r.variant == variant]
    return {r.seed: r for r in sorted(chosen, key=lambda r: r.seed)}


def rounded(value: Any) -> Any:
    """A value as files have it: all numbers in it rounded to `SIGNIFICANT_DIGITS`."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return value
