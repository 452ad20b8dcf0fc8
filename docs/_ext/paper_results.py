"""What the pages say of the paper, taken by the build from the committed reports.

Reports lie in `bench/results/SUITE`, with their numbers in `numbers.json`.

    ```{paper-claims} xs
    ```

lists each claim with its verdict and the evidence, and

    ```{paper-table} xs 3.1
    :columns: Condition; Gate; Val loss = loss
    ```

is one of the report's tables, those that set size beside size among them. With `:having: Published`
it has only the rows in which that column is no dash, and with `:wrap:` its cells may have several
lines. The role {paper}`xs; supported` counts the claims with a verdict, {paper}`xs; claims` all of
them, {paper}`xs; judged` those with one, and {paper}`xs; planned` and {paper}`xs; runs` the runs
that the suite has and that were made. In the same way {paper-size}`xs; stated; planned` and
{paper-size}`xs; stated; finished` count those of another suite that the report of xs has beside its
own. {paper-cell}`xs; S5; ROW; Power for it` is a table's cell, in the only row that starts with
ROW. The page of each report is copied to `reports/SUITE.html`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench_tables import make_table, named
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
SUITES = ("xs", "quick", "stated", "paper")
VERDICTS = ("supported", "not supported", "not testable at this scale")


def numbers(suite: str, environment: BuildEnvironment) -> dict[str, Any]:
    """The numbers of a suite's report, which the page depends on from now on."""
    path = RESULTS / suite / "numbers.json"
    environment.note_dependency(str(path))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class PaperClaims(SphinxDirective):
    """Every claim of a report, those with one verdict together."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """For each verdict a rubric and a list."""
        claims = numbers(self.arguments[0], self.env)["claims"]
        result: list[nodes.Node] = []
        for verdict in VERDICTS:
            chosen = [claim for claim in claims if claim["verdict"] == verdict]
            result.append(nodes.rubric("", f"{verdict.capitalize()}: {len(chosen)}"))
            items = []
            for claim in chosen:
                statement = nodes.paragraph("", f"{claim['statement']} ")
                statement += nodes.emphasis("", f"({claim['source']})")
                lines = filter(None, (claim["evidence"], claim["tested"]))
                evidence = [nodes.paragraph("", line, classes=["paper-evidence"]) for line in lines]
                items.append(nodes.list_item("", statement, *evidence))
            result.append(nodes.bullet_list("", *items))
        return result


class PaperTable(SphinxDirective):
    """A table of a report."""

    required_arguments = 2
    option_spec = {  # noqa: RUF012
        **dict.fromkeys(("columns", "having"), directives.unchanged_required),
        "wrap": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        """The table, with the columns that were asked for."""
        suite, number = self.arguments
        found = numbers(suite, self.env)
        shown = [*found["tables"], *found.get("size_tables", [])]
        tables = {table["number"]: table for table in shown}
        if number not in tables:
            raise self.error(f"the report of suite {suite} has no table {number}")
        table = tables[number]
        wanted = self.options.get("columns", "; ".join(table["columns"]))
        names = named(wanted)
        if unknown := {name for name, _ in names} - set(table["columns"]):
            raise self.error(f"table {number} of suite {suite} has no columns {sorted(unknown)}")
        places = [table["columns"].index(name) for name, _ in names]
        having = self.options.get("having", table["columns"][0])
        if having not in table["columns"]:
            raise self.error(f"table {number} of suite {suite} has no column {having!r}")
        filled = table["columns"].index(having)
        rows = [row for row in table["rows"] if row[filled] != "–"]
        wrap = "wrap" in self.options
        lines = [
            [(_unbroken(row[place]) if wrap else row[place],) for place in places] for row in rows
        ]
        result = make_table([heading for _, heading in names], lines, len(names))
        if wrap:
            result["classes"].append("paper-text")
        return [result]


def _unbroken(text: str) -> str:
    """Text that stays on one line if it is short, such as a verdict."""
    return text.replace(" ", "\N{NO-BREAK SPACE}") if len(text) <= 16 else text


class PaperNumber(SphinxRole):
    """How many claims have a verdict, or how many runs there are."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The number as text."""
        suite, _, what = (part.strip() for part in self.text.partition(";"))
        try:
            found = numbers(suite, self.env)
            if what in VERDICTS:
                count = sum(claim["verdict"] == what for claim in found["claims"])
            elif what == "judged":
                count = sum(claim["verdict"] != VERDICTS[-1] for claim in found["claims"])
            elif what == "runs":
                # Runs beyond the planned ones count, too.
                count = len(found["runs"])
            else:
                count = len({"claims": found["claims"], "planned": found["planned"]}[what])
        except (KeyError, OSError) as error:
            problem = self.inliner.reporter.error(f"paper: {error!r}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, problem)], [problem]
        return [nodes.Text(str(count))], []


class PaperSize(SphinxRole):
    """How many runs of another suite there are, or should be, by a report that sets it beside."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The number as text."""
        suite, size, what = (part.strip() for part in f"{self.text};;".split(";")[:3])
        try:
            count = int(numbers(suite, self.env)["sizes"][size][what])
        except (KeyError, OSError, TypeError) as error:
            problem = self.inliner.reporter.error(f"paper-size: {error!r}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, problem)], [problem]
        return [nodes.Text(str(count))], []


class PaperCell(SphinxRole):
    """A cell of one of a report's tables."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The cell's text."""
        suite, number, head, column = (part.strip() for part in f"{self.text};;;".split(";")[:4])
        try:
            found = numbers(suite, self.env)
            shown = [*found["tables"], *found.get("size_tables", [])]
            table = next(table for table in shown if table["number"] == number)
            (row,) = (row for row in table["rows"] if row[0] == head)
            text = str(row[table["columns"].index(column)])
        except (OSError, StopIteration, ValueError) as error:
            problem = self.inliner.reporter.error(
                f"paper-cell: {self.text!r} is no cell: {error!r}", line=self.lineno
            )
            return [self.inliner.problematic(self.rawtext, self.rawtext, problem)], [problem]
        return [nodes.Text(text)], []


class PaperReport(SphinxRole):
    """A link to the copy of a report."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The link."""
        text, _, suite = (part.strip() for part in self.text.partition(";"))
        if not (RESULTS / suite / "report.html").exists():
            problem = self.inliner.reporter.error(f"no report of {suite!r}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, problem)], [problem]
        depth = self.env.docname.count("/")
        link = nodes.reference("", text, refuri=f"{'../' * depth}reports/{suite}.html")
        return [link], []


def copy_reports(app: Sphinx, exception: Exception | None) -> None:
    """Copy the pages of the reports into the built site."""
    if exception is None and app.builder.format == "html":
        folder = Path(app.outdir) / "reports"
        folder.mkdir(exist_ok=True)
        for suite in SUITES:
            page = RESULTS / suite / "report.html"
            # Not every size was run.
            if page.exists():
                shutil.copyfile(page, folder / f"{suite}.html")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register directives and roles."""
    app.add_directive("paper-claims", PaperClaims)
    app.add_directive("paper-table", PaperTable)
    app.add_role("paper", PaperNumber())
    app.add_role("paper-size", PaperSize())
    app.add_role("paper-cell", PaperCell())
    app.add_role("paper-report", PaperReport())
    app.connect("build-finished", copy_reports)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
