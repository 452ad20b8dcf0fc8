"""The report on a reproduction: one self-contained page, the same in Markdown, and its numbers.

`write_report(folder, results, context)` writes

    report.html    everything, pictures included: it needs no other file and no network
    report.md      the same, with the figures as files
    numbers.json   all of its numbers as data, without times: equal runs give equal bytes
    figures/       each figure as PDF and PNG
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import scipy  # noqa: F401  (the statistics need it)
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the report needs {error.name}, which is not installed: "
        'pip install "ember-ext[paper]", or pip install ".[paper]" in a clone',
        name=error.name,
    ) from None

from ember_ext.paper.figures import Drawing, draw_figures, write_figures
from ember_ext.paper.figures.style import rendered
from ember_ext.paper.files import write_atomically
from ember_ext.paper.report.content import page_content
from ember_ext.paper.report.findings import Findings, ReportContext, Size
from ember_ext.paper.report.numbers import numbers, to_json
from ember_ext.paper.report.sizes import in_order
from ember_ext.paper.runs.results import RunResult

__all__ = ["ReportContext", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    folder: str | os.PathLike[str],
    results: Sequence[RunResult],
    context: ReportContext,
    beside: Sequence[tuple[ReportContext, Sequence[RunResult]]] = (),
) -> Path:
    """Write all files of a report, and replace those of an earlier one.

    Args:
        folder: where to; it is made if it is missing.
        results: those of the finished runs; the report says which are missing.
        context: the suite that they belong to.
        beside: other suites and their results. With any, the report sets size beside size.

    Returns:
        The path of report.html.

    Raises:
        ResultError: see `FinishedRuns`.
        OSError: a file cannot be written.
    """
    findings = Findings.of(results)
    others = [Size(about, Findings.of(runs)) for about, runs in beside]
    sizes = in_order([Size(context, findings), *others]) if others else []
    drawings = draw_figures(findings.finished)
    content = page_content(findings, context, sizes)
    folder = Path(folder)
    write_figures(folder / "figures", drawings)
    write_atomically(folder / "numbers.json", to_json(numbers(findings, context, sizes)))
    write_atomically(
        folder / "report.md", _markdown(content, drawings).encode("utf-8", "backslashreplace")
    )
    page = folder / "report.html"
    write_atomically(page, _html(content, drawings).encode("utf-8", "backslashreplace"))
    return page


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
