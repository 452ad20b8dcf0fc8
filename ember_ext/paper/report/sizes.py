"""The paper at every size at which it was repeated: verdicts and tables, size beside size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ember_ext.paper.claims.verdicts import UNTESTABLE
from ember_ext.paper.formatting import DASH
from ember_ext.paper.labels import BACKBONE_LABELS
from ember_ext.paper.report.findings import Size, unplanned
from ember_ext.paper.runs.suites import SUITES, plan
from ember_ext.paper.tables import Table
from ember_ext.paper.training import TrainConfig

NOT_RUN = "not run"
"""The verdict at a size of which there are no runs, or none of the claim's backbone."""

_SHORT: dict[str, str] = {UNTESTABLE: "not testable"}

# The columns that say what a row is about; size is set beside size among rows of equal ones.
_KEYS = ("Backbone", "Condition", "Gate", "Layer", "Measured through", "Rule", "Loss", "Test")

_COUNTS = ("Seeds", "Gates", "Null pairs")


def in_order(sizes: Iterable[Size]) -> list[Size]:
    """Sizes in the order of the suites, those of other names last."""
    names: list[str] = list(SUITES)
    return sorted(
        sizes,
        key=lambda size: (
            names.index(size.context.suite) if size.context.suite in names else len(names)
        ),
    )


def size_tables(sizes: Sequence[Size]) -> list[Table]:
    """Tables E1 and E2: the sizes, and each claim's verdict at each of them.

    Args:
        sizes: of different suites; the other suites count as not run.
    """
    by_suite = {size.context.suite: size for size in sizes}
    return [_overview(by_suite), _verdicts(by_suite)]


def verdicts(size: Size | None) -> dict[str, str]:
    """The verdict on each claim at one size, by the claim's key; empty without runs."""
    if size is None or not size.findings.finished.results:
        return {}
    return {
        claim.key: claim.verdict if claim.was_run else NOT_RUN for claim in size.findings.claims
    }


def counts(size: Size) -> tuple[int, int, int]:
    """Finished planned runs, planned runs, and finished runs beyond those."""
    others = len(unplanned(size.findings.finished, size.context))
    finished = len(size.findings.finished.results) - others
    return finished, len(size.context.planned), others


def _overview(by_suite: Mapping[str, Size]) -> Table:
    rows = []
    for suite in SUITES:
        specs = plan(suite, device="cpu")
        size = by_suite.get(suite)
        finished, planned, others = (0, len(specs), 0) if size is None else counts(size)
        runs = f"{finished} of {planned}" + (f", and {others} more" if others else "")
        results = () if size is None else size.findings.finished.results
        corpora = dict.fromkeys(str(run.corpus.get("name")) for run in results)
        models: dict[str, str] = {
            spec.config.backbone: _model(spec.config)
            for spec in specs
            if spec.variant == "standard"
        }
        rows.append(
            (
                suite,
                runs if results else f"{NOT_RUN} ({planned} planned)",
                *(models.get(backbone, DASH) for backbone in BACKBONE_LABELS),
                ", ".join(corpora) or DASH,
            )
        )
    columns = ("Size", "Runs", *BACKBONE_LABELS.values(), "Corpus")
    notes = (
        "Each size is a suite of scripts/reproduce.py. The authors trained the models of size "
        "paper. Size stated has the CfC of the sizes that the paper's text states, which its "
        "authors did not train on text. Size xs is the smallest of the authors' own scales. Size "
        "quick shows in minutes how all this works, and proves nothing.",
    )
    return Table("E1", "The sizes", columns, tuple(rows), notes)


def _model(config: TrainConfig) -> str:
    units = f", {config.cfc_units} neurons" if config.backbone == "cfc" else ""
    return (
        f"{config.n_layer} layers of {config.n_embd}{units}, windows of {config.block_size}, "
        f"{config.steps} steps"
    )


def _verdicts(by_suite: Mapping[str, Size]) -> Table:
    names = list(SUITES)
    found = {suite: verdicts(by_suite.get(suite)) for suite in names}
    claims = next(iter(by_suite.values())).findings.claims
    rows = []
    for claim in claims:
        words = [found[suite].get(claim.key, NOT_RUN) for suite in names]
        rows.append((claim.key, claim.statement, *(_SHORT.get(word, word) for word in words)))
    notes = (
        f'A verdict is "{NOT_RUN}" where a size has no runs, or none of the backbone that the '
        "claim is about. One seed of each condition, as in size quick, can test next to nothing. "
        "The evidence for the verdicts of a size is in the report of its suite.",
    )
    columns = ("Claim", "What it says", *names)
    return Table("E2", "Every claim at every size", columns, tuple(rows), notes)


def stacked_tables(sizes: Sequence[Size]) -> list[Table]:
    """The tables of the paper, S1 and S5, with the rows of all sizes; those of two sizes or more.

    Args:
        sizes: in the order of rows that are about the same thing.
    """
    numbers = merged(
        [[t.number for t in size.findings.tables if not t.number.startswith("S")] for size in sizes]
    )
    found = (_stacked(number, sizes) for number in [*numbers, "S1", "S5"])
    return [table for table in found if table is not None]


def merged(sequences: Iterable[Sequence[str]]) -> list[str]:
    """The elements of several sequences, each once, those of one sequence in its order.

    What a later sequence adds stands after what it follows there. Where two sequences disagree, the
    earlier one's order holds.
    """
    result: list[str] = []
    for sequence in sequences:
        place = 0
        for element in sequence:
            if element in result:
                place = max(place, result.index(element) + 1)
            else:
                result.insert(place, element)
                place += 1
    return result


def _stacked(number: str, sizes: Sequence[Size]) -> Table | None:
    tables = {
        size.context.suite: table
        for size in sizes
        for table in size.findings.tables
        if table.number == number
    }
    # Rows of what was not run say nothing beside those of another size.
    rows = {suite: _rows_that_were_run(table) for suite, table in tables.items()}
    tables = {suite: table for suite, table in tables.items() if rows[suite]}
    if len(tables) < 2:
        return None
    names = merged([table.columns for table in tables.values()])
    keys = [name for name in names if name in _KEYS]
    others = [name for name in names if name not in _KEYS]
    by_key: dict[str, dict[str, dict[str, str]]] = {
        suite: {_key(row, keys): row for row in rows[suite]} for suite in tables
    }
    lines = []
    for key in merged([list(found) for found in by_key.values()]):
        for suite, found in by_key.items():
            if key in found:
                row = found[key]
                lines.append(
                    (
                        *(row.get(name, DASH) for name in keys),
                        suite,
                        *(row.get(name, DASH) for name in others),
                    )
                )
    first = next(iter(tables.values()))
    return Table(
        f"E{number}",
        f"{first.title}, at every size",
        (*keys, "Size", *others),
        tuple(lines),
        tuple(_notes(tables)),
    )


def _rows_that_were_run(table: Table) -> list[dict[str, str]]:
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return [row for row in rows if all(row.get(name) != DASH for name in _COUNTS)]


def _key(row: Mapping[str, str], keys: Sequence[str]) -> str:
    return "\n".join(row.get(name, DASH) for name in keys)


def _notes(tables: Mapping[str, Table]) -> list[str]:
    """The notes of all tables; those that not all of them have name their sizes."""
    notes = []
    for note in merged([table.notes for table in tables.values()]):
        having = [suite for suite, table in tables.items() if note in table.notes]
        named = "" if len(having) == len(tables) else f"Size {', '.join(having)}: "
        notes.append(f"{named}{note}")
    return notes


def sizes_as_data(sizes: Sequence[Size]) -> dict[str, object]:
    """Runs and verdicts of every size, for numbers.json."""
    by_suite = {size.context.suite: size for size in sizes}
    found: dict[str, object] = {}
    for suite in SUITES:
        size = by_suite.get(suite)
        planned = len(plan(suite, device="cpu"))
        finished, planned, others = (0, planned, 0) if size is None else counts(size)
        found[suite] = {
            "finished": finished,
            "planned": planned,
            "more": others,
            "verdicts": verdicts(size),
        }
    return found
