"""Size beside size: verdicts and tables of several suites in one report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic_results import Effect, synthetic_results

from ember_ext.paper.claims import claims
from ember_ext.paper.formatting import DASH
from ember_ext.paper.report import ReportContext, write_report
from ember_ext.paper.report.findings import Findings, Size
from ember_ext.paper.report.sizes import (
    in_order,
    merged,
    size_tables,
    sizes_as_data,
    stacked_tables,
)
from ember_ext.paper.reproduce import reproduce_main
from ember_ext.paper.runs.results import RunResult, read_results, write_result
from ember_ext.paper.runs.suites import SUITES, plan
from ember_ext.paper.runs.worker import GridFolder
from ember_ext.paper.tables import Table

ROOT = Path(__file__).parents[1]
STATED: dict[str, Any] = {
    "n_layer": 4, "n_embd": 128, "cfc_units": 192, "block_size": 256, "learning_rate": 2e-4,
    "weight_decay": 0.01, "eval_iters": 50, "preset": "paper", "bias": True, "beta1": 0.9,
    "beta2": 0.99, "gate_preset": "released",
}  # fmt: skip
CFC = ("standard", "lif", "null")


def size(suite: str, results: Sequence[RunResult], planned: Sequence[str] = ()) -> Size:
    names = tuple(planned) or tuple(run.name for run in results)
    return Size(ReportContext(suite, names), Findings.of(results))


def xs() -> list[RunResult]:
    better = {"lif": Effect(loss=-0.01)}
    return [
        *synthetic_results(better),
        *synthetic_results(better, backbone="cfc", variants=CFC),
    ]


def stated(seeds: Sequence[int] = (42, 668, 1337)) -> list[RunResult]:
    worse = {"lif": Effect(loss=0.01)}
    return synthetic_results(worse, backbone="cfc", variants=CFC, seeds=seeds, **STATED)


@pytest.fixture(scope="module")
def sizes() -> list[Size]:
    planned = [spec.name for spec in plan("stated", device="cpu")]
    return in_order([size("stated", stated(), [*planned, "cfc-lif-seed1"]), size("xs", xs())])


def by_number(tables: Sequence[Table]) -> dict[str, Table]:
    assert len({table.number for table in tables}) == len(tables)
    return {table.number: table for table in tables}


def test_every_claim_has_a_verdict_at_every_size(sizes: list[Size]) -> None:
    overview, verdicts = size_tables(sizes)
    assert verdicts.columns[2:] == tuple(SUITES) == ("quick", "xs", "stated", "paper")
    rows = {row[0]: row[2:] for row in verdicts.rows}
    assert rows["loss-cfc"] == ("not run", "supported", "not supported", "not run")
    assert rows["loss-transformer"] == ("not run", "supported", "not run", "not run")
    assert rows["threshold-ratio"] == ("not run", "not testable", "not supported", "not run")
    keys = [claim.key for claim in sizes[0].findings.claims]
    assert [row[0] for row in verdicts.rows] == keys
    runs = {row[0]: row[1] for row in overview.rows}
    assert runs == {
        "quick": "not run (9 planned)",
        "xs": "30 of 30",
        "stated": "9 of 10",
        "paper": f"not run ({len(plan('paper', device='cpu'))} planned)",
    }
    assert overview.rows[2][2] == DASH
    assert overview.rows[2][3].startswith("4 layers of 128, 192 neurons, windows of 256")
    data: Any = sizes_as_data(sizes)
    assert (data["stated"]["finished"], data["stated"]["planned"]) == (9, 10)
    assert data["paper"]["verdicts"] == {}
    assert data["xs"]["verdicts"]["threshold-ratio"] == "not testable at this scale"


def test_rows_of_all_sizes_stand_together(sizes: list[Size]) -> None:
    stacked = by_number(stacked_tables(sizes))
    # The size stated has no Transformer.
    assert "E3.1" not in stacked
    assert stacked.keys() >= {"E3.2", "E3.3b", "E3.4", "E3.5", "E3.6", "E4.2", "ES1", "ES5"}
    losses = stacked["E3.2"]
    assert losses.columns[:4] == ("Condition", "Gate", "Size", "Seeds")
    assert [row[:4] for row in losses.rows] == [
        ("CfC-only (base)", DASH, "xs", "3"),
        ("CfC-only (base)", DASH, "stated", "3"),
        ("CfC+LIF", "released", "xs", "3"),
        ("CfC+LIF", "released", "stated", "3"),
    ]
    cells = dict(zip(losses.columns, losses.rows[3], strict=True))
    assert cells["vs CfC-only (base)"].startswith("+")
    assert cells["Authors' xs"] == DASH
    assert any(note.startswith("Size stated: Our runs have the sizes") for note in losses.notes)
    layers = [row[2:4] for row in stacked["E3.3b"].rows if row[0] == "CfC+LIF"]
    assert layers == [
        *(("L0", "xs"), ("L0", "stated"), ("L1", "xs"), ("L1", "stated")),
        *(("L2", "stated"), ("L3", "stated")),
    ]


def test_no_row_is_lost_or_changed(sizes: list[Size]) -> None:
    for number, table in by_number(stacked_tables(sizes)).items():
        found = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        for part in sizes:
            original = next(t for t in part.findings.tables if t.number == number[1:])
            rows = [dict(zip(original.columns, row, strict=True)) for row in original.rows]
            wanted = [row for row in rows if row.get("Seeds") != DASH]
            got = [row for row in found if row["Size"] == part.context.suite]
            assert len(got) == len(wanted), number
            for row in wanted:
                assert any(row.items() <= other.items() for other in got), (number, row)


def test_one_size_alone_is_stacked_on_nothing() -> None:
    alone = [size("xs", xs()), size("stated", [], ["cfc-lif-seed42"])]
    assert stacked_tables(alone) == []
    assert size_tables(alone)[0].rows[2][1] == "not run (1 planned)"


def test_merging_keeps_each_order() -> None:
    assert merged([["a", "c"], ["a", "b", "c", "d"]]) == ["a", "b", "c", "d"]
    assert merged([["a", "b"], ["b", "a", "c"]]) == ["a", "b", "c"]
    assert merged([[], ["x"], ["y", "x"]]) == ["y", "x"]
    assert merged([]) == []


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ember_ext.paper.report.report.draw_figures", lambda finished: [])


@pytest.mark.usefixtures("no_figures")
def test_a_report_alone_says_nothing_of_other_sizes(tmp_path: Path) -> None:
    context = ReportContext("xs", tuple(run.name for run in xs()))
    write_report(tmp_path / "alone", xs(), context)
    write_report(tmp_path / "both", xs(), context, [(ReportContext("stated", ()), stated())])
    alone, both = (
        json.loads((tmp_path / n / "numbers.json").read_text()) for n in ("alone", "both")
    )
    assert both.keys() - alone.keys() == {"sizes", "size_tables"}
    assert {key: both[key] for key in alone} == alone
    for name, heading in (("report.md", "## Every size"), ("report.html", 'id="sizes"')):
        texts = [(tmp_path / n / name).read_text(encoding="utf-8") for n in ("alone", "both")]
        assert [heading in text for text in texts] == [False, True]
        assert ["E3.2" in text for text in texts] == [False, True]


def write_stated(folder: Path, seeds: Sequence[int]) -> GridFolder:
    """A folder with results of the suite "stated", as far as `reproduce.py` looks at them."""
    grid = GridFolder(folder)
    for result in stated(seeds):
        write_result(grid.result(result.name), result)
    return grid


@pytest.mark.usefixtures("no_figures")
def test_results_are_collected_and_set_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_stated(tmp_path / n, s) for n, s in (("a", [42]), ("b", [42, 668])))
    (first.run("cfc-lif-seed42").path).mkdir(parents=True)
    out = GridFolder(tmp_path / "out")
    sources = [str(first.path), str(second.path)]
    arguments = ["--suite", "stated", "--report-only", "--out", str(out.path)]
    assert reproduce_main([*arguments, "--collect", *sources]) == 0
    assert "results taken over: 6" in capsys.readouterr().out
    assert len(read_results(out.results)) == 6
    same = "cfc-lif-seed42"
    assert out.result(same).read_bytes() == first.result(same).read_bytes()
    assert not (out.path / "runs").exists()
    page = (out.path / "report.md").read_text(encoding="utf-8")
    assert "6 of 9 planned runs are finished" in page
    # The command on the page is the one to call again.
    assert f"reproduce.py --suite stated --out {out.path}\n" in page
    assert reproduce_main([*arguments[:2], f"--collect={sources[0]}", *arguments[2:]]) == 0
    assert "results taken over: 0" in capsys.readouterr().out
    assert (out.path / "report.md").read_text(encoding="utf-8") == page

    results = GridFolder(tmp_path / "xs")
    for result in synthetic_results(backbone="cfc", variants=CFC, seeds=[42], **XS_CFC):
        write_result(results.result(result.name), result)
    xs_only = ["--suite", "xs", "--report-only", "--out", str(results.path)]
    assert reproduce_main([*xs_only, "--beside", f"stated={out.path}"]) == 0
    numbers = json.loads((results.path / "numbers.json").read_text(encoding="utf-8"))
    assert (numbers["sizes"]["stated"]["finished"], numbers["sizes"]["stated"]["planned"]) == (6, 9)

    for wrong, message in (
        (["--collect", str(results.path)], "is of another configuration (n_layer was 2 and is 4"),
        (["--beside", f"paper={results.path}"], "not one of suite paper"),
        (["--beside", f"xs={tmp_path / 'nowhere'}"], "nowhere/results is not a folder of results"),
        (["--beside", f"stated={out.path}"], "--beside must name other suites, each once"),
        (["--beside", "big=x"], "--beside must be SUITE=FOLDER with a suite of"),
        (["--beside", "xs"], "--beside must be SUITE=FOLDER with a suite of"),
    ):
        assert reproduce_main([*arguments, *wrong]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("where", ["two sources", "the folder", "one source", "the call"])
def test_results_of_two_texts_are_not_collected(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They could not stand in one report, and every later call would refuse the folder."""
    ours, out = write_stated(tmp_path / "ours", [42]), GridFolder(tmp_path / "out")
    theirs = GridFolder(tmp_path / "theirs")
    source = ours if where == "one source" else theirs
    for result in stated([7] if where == "one source" else [668]):
        other = dataclasses.replace(result, corpus={**result.corpus, "sha256": "1" * 64})
        write_result(source.result(other.name), other)
    if where == "the folder":
        write_stated(out.path, [42])
    there = sorted(out.path.rglob("*.json"))
    sources = {
        "two sources": [ours, theirs], "the folder": [theirs], "one source": [ours],
        "the call": [theirs],
    }[where]  # fmt: skip
    arguments = ["--suite", "stated", "--out", str(out.path)]
    arguments += ["--collect", *(str(folder.path) for folder in sources)]
    if where == "the call":
        arguments += ["--data", str(ROOT / "ember_ext" / "paper" / "data" / "lighthouse.txt")]
    else:
        arguments += ["--report-only"]
    assert reproduce_main(arguments) == 1
    said = capsys.readouterr().err
    wrong, name = ("1" * 12, "cfc-lif-seed")
    assert f"(SHA-256 {wrong})" in said
    assert str(source.result(f"{name}{7 if where == 'one source' else 668}")) in said
    if where == "the call":
        assert "but this call trains on 'lighthouse" in said
    else:
        first = out if where == "the folder" else ours
        assert str(first.result(f"{name}42")) in said
        assert "(SHA-256 000000000000)" in said
    assert sorted(out.path.rglob("*.json")) == there


XS_CFC: dict[str, Any] = {
    "learning_rate": 3e-4, "weight_decay": 0.1, "eval_iters": 50, "bias": True, "beta1": 0.9,
    "beta2": 0.99,
}  # fmt: skip


def digests(numbers: dict[str, Any]) -> dict[str, list[str]]:
    """What a report says of each claim and run, and in each row, as short digests."""

    def digest(value: object) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]

    fields = ("key", "statement", "source", "verdict", "evidence", "criterion")
    found = {f"claim {c['key']}": [digest([c[f] for f in fields])] for c in numbers["claims"]}
    found |= {f"run {run['name']}": [digest(run)] for run in numbers["runs"]}
    for table in numbers["tables"]:
        found[f"table {table['number']}"] = [digest(table["columns"]), *map(digest, table["rows"])]
    return found


EARLIER = ROOT / "python_tests" / "earlier_numbers.json"
"""`digests` of bench/results/xs before reports had several sizes."""


def test_earlier_numbers_are_unchanged() -> None:
    folder = ROOT / "bench" / "results" / "xs"
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    judged = [dataclasses.asdict(claim) for claim in claims(read_results(folder / "results"))]
    found = digests({**numbers, "claims": judged})
    assert digests(numbers) == found
    for name, wanted in json.loads(EARLIER.read_text()).items():
        assert name in found
        rest = iter(found[name])
        assert all(digest in rest for digest in wanted), f"{name} was changed"
