"""The report on a reproduction: one self-contained page, the same in Markdown, and its numbers.

`write_report(folder, results, context)` writes

    report.html    everything, pictures included: it needs no other file and no network
    report.md      the same, with the figures as files
    numbers.json   all of its numbers as data, without times: equal runs give equal bytes
    figures/       each figure as PDF and PNG
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

try:
    import scipy  # noqa: F401  (of the statistics below)
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the report needs {error.name}, which is not installed: "
        'pip install "ember-ext[paper]", or pip install ".[paper]" in a clone',
        name=error.name,
    ) from None

from ember_ext.paper.claims.catalogue import Claim, Verdict, claims
from ember_ext.paper.figures import Drawing, draw_figures, write_figures
from ember_ext.paper.figures.style import MADE_FOR, rendered
from ember_ext.paper.files import write_atomically
from ember_ext.paper.labels import BACKBONE_LABELS, VARIANT_LABELS, variant_label
from ember_ext.paper.runs.finished import BASELINE, FinishedRuns
from ember_ext.paper.runs.results import ResultError, RunResult
from ember_ext.paper.statistics.comparisons import (
    LOSS_MEASURES,
    compare,
    measure_noise,
    noise_curve,
)
from ember_ext.paper.statistics.crossover import find_crossovers
from ember_ext.paper.statistics.depth import PROFILE_MEASURES, depth_profiles
from ember_ext.paper.tables.catalogue import tables
from ember_ext.paper.tables.table import Table, gate_label, variants_in_order

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportContext:
    """What the results themselves do not say.

    Attributes:
        suite: name of the suite.
        planned: names of all runs that were asked for, as `RunResult.name`.
        failed: names of runs that failed, and why.
        command: the command line that gives this report.
    """

    suite: str
    planned: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def write_report(
    folder: str | os.PathLike[str], results: Sequence[RunResult], context: ReportContext
) -> Path:
    """Write all files of a report, over those of an earlier one.

    Args:
        folder: where to; it is made if it is missing.
        results: of the finished runs; whatever is missing is said to be.
        context: what they are a part of.

    Returns:
        The path of report.html.

    Raises:
        ResultError: see `FinishedRuns`.
        OSError: a file cannot be written.
    """
    findings = _Findings.of(results)
    drawings = draw_figures(findings.finished)
    content = _content(findings, context)
    folder = Path(folder)
    write_figures(folder / "figures", drawings)
    write_atomically(folder / "numbers.json", _json(_numbers(findings, context)))
    write_atomically(
        folder / "report.md", _markdown(content, drawings).encode("utf-8", "backslashreplace")
    )
    page = folder / "report.html"
    write_atomically(page, _html(content, drawings).encode("utf-8", "backslashreplace"))
    return page


@dataclass(frozen=True)
class _Findings:
    """What is computed from the results, once for all files."""

    finished: FinishedRuns
    claims: list[Claim]
    tables: list[Table]

    @classmethod
    def of(cls, results: Sequence[RunResult]) -> _Findings:
        return cls(FinishedRuns(results), claims(results), tables(results))


def _numbers(findings: _Findings, context: ReportContext) -> dict[str, Any]:
    """Everything that the report says in numbers, as plain data, without times."""
    finished = findings.finished
    runs = [
        {
            "name": run.name,
            "corpus": run.corpus,
            "gate_preset": run.config["gate_preset"],
            "steps": run.config["steps"],
            "parameters": run.summary["parameters"],
            "lif_parameters": run.summary["lif_parameters"],
            "loss": {name: measure(run) for name, measure in LOSS_MEASURES.items()},
        }
        for run in _ordered(finished)
    ]
    return {
        "suite": context.suite,
        "planned": list(context.planned),
        "runs": runs,
        "claims": [dataclasses.asdict(claim) for claim in findings.claims],
        "tables": [dataclasses.asdict(table) for table in findings.tables],
        "statistics": {
            backbone: _statistics(finished, backbone) for backbone in finished.backbones
        },
    }


def _statistics(finished: FinishedRuns, backbone: str) -> dict[str, Any]:
    def data(value: Any) -> Any:
        return None if value is None else dataclasses.asdict(value)

    others = [variant for variant in finished.variants(backbone) if variant != BASELINE]
    return {
        "comparisons": {
            variant: {
                name: data(compare(finished, backbone, variant, measure))
                for name, measure in LOSS_MEASURES.items()
            }
            for variant in others
        },
        "noise_floor": {
            name: data(measure_noise(finished, backbone, measure))
            for name, measure in LOSS_MEASURES.items()
        },
        "noise_curve": data(noise_curve(finished, backbone)),
        "crossovers": {
            variant: data(find_crossovers(finished.pairs(backbone, variant))) for variant in others
        },
        "depth": {
            measure: {v: data(p) for v, p in depth_profiles(finished, backbone, measure).items()}
            for measure in PROFILE_MEASURES[backbone]
        },
    }


@dataclass(frozen=True)
class _GridRow:
    """The runs of one variant: the state of each seed's, in the order of the columns."""

    backbone: str
    variant: str
    gate: str
    finished: int
    states: tuple[str, ...]


def _content(findings: _Findings, context: ReportContext) -> dict[str, Any]:
    """What both templates are filled with."""
    finished = findings.finished
    counts = Counter(claim.verdict for claim in findings.claims)
    done = {run.name for run in finished.results}
    unplanned = _unplanned(finished, context)
    names = [*context.planned, *unplanned]
    seeds = sorted({_parts(name)[2] for name in names})
    return {
        "suite": context.suite,
        "command": context.command,
        "planned": len(context.planned),
        "finished": len(done) - len(unplanned),
        "others": len(unplanned),
        "failed": sorted(context.failed.items()),
        "figures_made_for": MADE_FOR,
        "claims": findings.claims,
        "verdicts": [(verdict, counts[verdict]) for verdict in get_args(Verdict)],
        "facts": _facts(finished, context),
        "seeds": seeds,
        "grid": _grid_rows(finished, names, seeds, done, context.failed),
        # Those that the paper has, and those that it lacks.
        "tables": [table for table in findings.tables if not table.number.startswith("S")],
        "statistics": [table for table in findings.tables if table.number.startswith("S")],
    }


def _parts(name: str) -> tuple[str, str, int]:
    """Backbone, variant and seed of a run's name.

    Raises:
        ResultError: it is not one.
    """
    match = re.fullmatch(rf"({'|'.join(BACKBONE_LABELS)})-(.+)-seed(-?\d+)", name)
    if match is None:
        raise ResultError(f"{name!r} is not the name of a run: <backbone>-<variant>-seed<number>")
    return match[1], match[2], int(match[3])


def _grid_rows(
    finished: FinishedRuns,
    names: Sequence[str],
    seeds: Sequence[int],
    done: set[str],
    failed: Mapping[str, str],
) -> list[_GridRow]:
    def state(name: str) -> str:
        if name in done:
            return "done"
        if name in failed:
            return "failed"
        return "missing" if name in names else "not planned"

    def place(pair: tuple[str, str]) -> tuple[int, int, str]:
        backbone, variant = pair
        known = list(VARIANT_LABELS[backbone])
        rank = known.index(variant) if variant in known else len(known)
        return list(BACKBONE_LABELS).index(backbone), rank, variant

    rows = []
    for backbone, variant in sorted({_parts(name)[:2] for name in names}, key=place):
        states = tuple(state(f"{backbone}-{variant}-seed{seed}") for seed in seeds)
        rows.append(
            _GridRow(
                BACKBONE_LABELS[backbone],
                variant_label(backbone, variant),
                gate_label(finished, backbone, variant),
                states.count("done"),
                states,
            )
        )
    return rows


def _facts(finished: FinishedRuns, context: ReportContext) -> list[tuple[str, list[str]]]:
    """What was run, on which text, for how long and where: a name and lines to each."""
    runs = _ordered(finished)
    facts: list[tuple[str, list[str]]] = [
        ("Suite", [context.suite]),
        ("Runs", [_finished(finished, context)]),
    ]
    if not runs:
        return facts
    facts += [
        ("Corpus", _distinct(runs, _corpus)),
        ("Models", [_model(finished, backbone) for backbone in finished.backbones]),
        ("Training", _distinct(runs, _training)),
        ("Gates", _gate_facts(finished) or ["none"]),
        ("Time", _times(runs)),
        ("Machine", _distinct(runs, _machine)),
    ]
    return facts


def _unplanned(finished: FinishedRuns, context: ReportContext) -> list[str]:
    """Names of the finished runs that nobody asked for."""
    return sorted({run.name for run in finished.results} - set(context.planned))


def _finished(finished: FinishedRuns, context: ReportContext) -> str:
    others = len(_unplanned(finished, context))
    more = f", and {others} more" if others else ""
    return f"{len(finished.results) - others} finished of {len(context.planned)} planned{more}"


def _ordered(finished: FinishedRuns) -> list[RunResult]:
    return [
        run
        for backbone in finished.backbones
        for variant in variants_in_order(finished, backbone)
        for run in finished.runs(backbone, variant)
    ]


def _distinct(runs: Sequence[RunResult], say: Callable[[RunResult], str]) -> list[str]:
    """What is said of the runs, each thing once."""
    return list(dict.fromkeys(map(say, runs)))


def _corpus(run: RunResult) -> str:
    c = run.corpus
    return f"{c.get('name')}, {c.get('vocabulary')} characters, SHA-256 {c.get('sha256')}"


def _model(finished: FinishedRuns, backbone: str) -> str:
    """Sizes of a backbone, which all of its runs share, and the parameters, which they do not."""
    runs = [run for run in finished.results if run.backbone == backbone]
    c = runs[0].config
    units = f"{c['n_head']} heads" if backbone == "transformer" else f"{c['cfc_units']} neurons"
    # A CfC counts the frozen masks of its wiring, as the paper does.
    counts, trainable = (
        _range([int(run.summary[key]) for run in runs])
        for key in ("parameters", "trainable_parameters")
    )
    frozen = "" if trainable == counts else f", {trainable} of them trainable"
    return (
        f"{BACKBONE_LABELS[backbone]}: {c['n_layer']} layers of {c['n_embd']}, {units}, "
        f"windows of {c['block_size']}, dropout {c['dropout']:g}, {counts} parameters{frozen}"
    )


def _range(counts: Sequence[int]) -> str:
    """The smallest and the largest of some counts, or the only one."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _training(run: RunResult) -> str:
    """What decides how a run is trained, besides its seed."""
    c = run.config
    schedule = {"cosine": "cosine to a tenth"}.get(c["lr_schedule"], c["lr_schedule"])
    warm_up = f"warm-up over {c['warmup_steps']} steps, then " if c["warmup_steps"] else ""
    return (
        f"{BACKBONE_LABELS[run.backbone]}: {c['steps']} steps of {c['batch_size']} windows, "
        f"evaluated every {c['eval_interval']}, AdamW with learning rate {c['learning_rate']:g} "
        f"({warm_up}{schedule}), weight decay {c['weight_decay']:g} on matrices, "
        f"gradient norm at most {c['grad_clip']:g}"
    )


def _gate_facts(finished: FinishedRuns) -> list[str]:
    """Which variants have which preset of the gate."""
    by_preset: dict[str, list[str]] = {}
    for run in _ordered(finished):
        if run.evaluations[-1]["gates"]:
            backbone = BACKBONE_LABELS[run.backbone]
            label = variant_label(run.backbone, run.variant)
            name = label if label.startswith(backbone) else f"{backbone} {label}"
            names = by_preset.setdefault(str(run.config["gate_preset"]), [])
            if name not in names:
                names.append(name)
    return [f"preset {preset}: {', '.join(names)}" for preset, names in sorted(by_preset.items())]


def _machine(run: RunResult) -> str:
    processes = run.summary.get("processes", 1)
    several = f", {processes} processes" if processes != 1 else ""
    return f"{run.summary.get('machine', 'not recorded')}{several}"


def _times(runs: Sequence[RunResult]) -> list[str]:
    """Time spent in training and evaluation, for each backbone and in all."""
    lines, total = [], 0.0
    for backbone, label in BACKBONE_LABELS.items():
        seconds = [float(r.summary.get("seconds", 0)) for r in runs if r.backbone == backbone]
        if seconds:
            total += sum(seconds)
            each = duration(sum(seconds) / len(seconds))
            lines.append(f"{label}: {duration(sum(seconds))}, {each} a run")
    return [f"{duration(total)} of training and evaluation in all runs together", *lines]


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "3 h 20 min"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _html(content: dict[str, Any], drawings: Sequence[Drawing]) -> str:
    pictures = [
        {
            "drawing": drawing,
            "data": base64.b64encode(rendered(drawing.figure, "svg")).decode(),
        }
        for drawing in drawings
    ]
    template = _environment(autoescape=True).get_template("report.html.jinja")
    return template.render(content, pictures=pictures)


def _markdown(content: dict[str, Any], drawings: Sequence[Drawing]) -> str:
    environment = _environment(autoescape=False)
    environment.filters["escape_markdown"] = escape_markdown
    return environment.get_template("report.md.jinja").render(content, drawings=drawings)


def escape_markdown(text: object) -> str:
    """Text that Markdown, or HTML inside it, would take for markup, made plain; on one line."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(str(text).split()))


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
