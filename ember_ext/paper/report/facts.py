"""The facts at the head of a report: runs, text, models, training, time and machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ember_ext.paper.labels import BACKBONE_LABELS, variant_label
from ember_ext.paper.report.findings import ReportContext, ordered, unplanned
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult


def facts(finished: FinishedRuns, context: ReportContext) -> list[tuple[str, list[str]]]:
    """The facts about the runs, the text, the time and the machine: a name and lines to each."""
    runs = ordered(finished)
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


def _finished(finished: FinishedRuns, context: ReportContext) -> str:
    others = len(unplanned(finished, context))
    more = f", and {others} more" if others else ""
    return f"{len(finished.results) - others} finished of {len(context.planned)} planned{more}"


def _distinct(runs: Sequence[RunResult], say: Callable[[RunResult], str]) -> list[str]:
    """The statements about the runs, each of them once."""
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
    """The settings that decide how a run is trained, besides its seed."""
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
    for run in ordered(finished):
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
    # "highest" is fp32 throughout; the others let a GPU round the factors of products to tf32.
    precision = run.summary.get("matmul_precision", "highest")
    rounded = f", matrix products of precision {precision!r}" if precision != "highest" else ""
    return f"{run.summary.get('machine', 'not recorded')}{several}{rounded}"


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
