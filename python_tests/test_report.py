"""The report on made-up runs: complete, self-contained, escaped, and equal for equal numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from synthetic_results import SEEDS, Effect, synthetic_results

from ember_ext.paper.claims.verdicts import Verdict, claims
from ember_ext.paper.figures.style import MADE_FOR
from ember_ext.paper.formatting import p_value
from ember_ext.paper.report import ReportContext, write_report
from ember_ext.paper.report.content import page_content
from ember_ext.paper.report.facts import duration
from ember_ext.paper.report.facts import facts as facts_of
from ember_ext.paper.report.findings import Findings
from ember_ext.paper.report.numbers import numbers, to_json
from ember_ext.paper.report.report import escape_markdown
from ember_ext.paper.runs.results import ResultError, RunResult

NASTY = '<script>alert("x")</script> & | *plays*'

FAILED = "transformer-qwen-gate-seed668"


def runs() -> list[RunResult]:
    effects = {"lif": Effect(loss=-0.02), "qwen-gate": Effect(loss=0.02)}
    results = [
        *synthetic_results(effects, variants=["standard", "lif", "qwen-gate", "null"]),
        *synthetic_results(backbone="cfc", variants=["standard", "lif"], seeds=[42]),
    ]
    return [
        dataclasses.replace(run, corpus={**run.corpus, "name": NASTY})
        for run in results
        if run.name != FAILED
    ]


CONTEXT = ReportContext(
    suite="xs",
    planned=(*(run.name for run in runs()), FAILED, "cfc-standard-seed668", "cfc-null-seed42"),
    failed={FAILED: "NonFiniteLossError: loss nan <b>"},
    command="python scripts/reproduce.py --suite xs",
)


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    assert write_report(path, runs(), CONTEXT) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_needs_nothing_else(folder: Path, page: Page) -> None:
    assert not page.open
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "base"}
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset", "data")]
    assert len(sources) == 7
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert MADE_FOR in page.text
    links = page.values("a", "href")
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert links
    assert all(link.startswith("#") and link[1:] in targets for link in links)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))


def test_page_can_be_read_by_all(page: Page) -> None:
    alternatives = page.values("img", "alt")
    assert len(alternatives) == 7
    assert all(len(text) > 100 for text in alternatives)
    assert len(page.values("th", "scope")) == page.tags["th"]
    assert page.values("html", "lang") == ["en"]


def test_claims_come_with_verdict_and_numbers(folder: Path, page: Page) -> None:
    judged = claims(runs())
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    tested = page_content(Findings.of(runs()), CONTEXT)["tested"]
    assert sum(map(bool, tested.values())) == sum(bool(claim.tests) for claim in judged) > 2
    for claim in judged:
        stated = (
            f"{claim.verdict} {claim.statement} ({claim.source}) {claim.evidence} "
            f"{tested[claim.key]} Criterion"
        )
        assert " ".join(stated.split()) in page.text
        assert f"- **{claim.verdict}**: {escape_markdown(claim.statement)}" in markdown
    counts = Counter(claim.verdict for claim in judged)
    title = f"LIF gating, tested: {counts['supported']} of {len(judged)} claims are supported"
    assert page.text.count(title) == 2
    assert markdown.startswith(
        f"# {title} (suite xs)\n\nWe tested {len(judged)} claims of the paper"
    )
    classes = Counter(page.values("li", "class"))
    for verdict, name in zip(get_args(Verdict), ("yes", "no", "open"), strict=True):
        assert f" {counts[verdict]} {verdict} " in page.text
        assert classes[name] == 1 + counts[verdict] > 1
    stored = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    assert [claim["verdict"] for claim in stored["claims"]] == [c.verdict for c in judged]


def test_p_values_come_corrected_and_with_their_power(page: Page) -> None:
    found = {claim.key: claim for claim in claims(runs())}
    loss = found["loss-transformer"]
    (test,) = loss.tests
    assert test.base is not None
    assert test.detectable is not None
    family = sum(claim.judged for claim in found.values())
    assert (
        f"p = {p_value(loss.p)}, corrected for the {family} claims judged here (Holm) "
        f"{p_value(loss.holm_p)}. These seeds would have found a true difference of "
        f"{test.detectable:.5f} ({100 * test.detectable / test.base:.2f}%, 3 seeds) with a power "
        "of 80%." in page.text
    )
    assert "would have found true differences of" in page.text


def test_tables_are_whole(folder: Path, page: Page) -> None:
    stored = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    cells = "".join(page.words)
    for table in stored["tables"]:
        assert f"{table['number']} {table['title']}" in page.text
        assert f"### {table['number']} {escape_markdown(table['title'])}\n\n| " in markdown
        for row in table["rows"]:
            assert f"\n| {' | '.join(map(escape_markdown, row))} |\n" in markdown
            assert "".join(row) in cells


def test_names_cannot_become_markup(folder: Path, page: Page) -> None:
    assert NASTY in page.text
    assert "loss nan <b>" in page.text
    assert page.tags["b"] == 0
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert NASTY not in markdown
    assert escape_markdown(NASTY) in markdown
    assert escape_markdown("a|b\n<c> `d` *e*_f_") == r"a\|b \<c\> \`d\` \*e\*\_f\_"


def test_missing_and_failed_runs_are_listed(folder: Path, page: Page) -> None:
    assert "13 of 16 planned runs are finished; What was run lists the missing ones" in page.text
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| Transformer | Qwen-gate | – | 2 | done | failed | done |" in markdown
    assert "| CfC | CfC-only (base) | – | 1 | done | missing | not planned |" in markdown
    assert "| CfC | CfC+LIF | released | 1 | done | not planned | not planned |" in markdown
    assert "| CfC | Null (base again) | – | 0 | missing | not planned | not planned |" in markdown


def test_markdown_points_at_the_figures(folder: Path) -> None:
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", markdown)
    assert len([link for link in links if link.endswith(".png")]) == 7
    for link in links:
        assert (folder / link).is_file()


def test_numbers_do_not_depend_on_times_or_order(folder: Path) -> None:
    def slower(run: RunResult) -> RunResult:
        evaluations = [{**record, "seconds": 7 * record["step"]} for record in run.evaluations]
        summary = {**run.summary, "seconds": 1e6, "machine": "another", "tokens_per_second": 1.0}
        return dataclasses.replace(run, evaluations=evaluations, summary=summary)

    def encoded(results: Sequence[RunResult]) -> bytes:
        findings = Findings.of(results)
        return to_json(numbers(findings, CONTEXT))

    expected = (folder / "numbers.json").read_bytes()
    assert encoded([slower(run) for run in reversed(runs())]) == expected
    assert encoded(runs()[:-1]) != expected


def test_numbers_agree_with_the_runs(folder: Path) -> None:
    stored = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    by_name = {run.name: run for run in runs()}
    assert {run["name"] for run in stored["runs"]} == by_name.keys()
    for run in stored["runs"]:
        assert run["loss"]["best, estimate"] == by_name[run["name"]].best("val_loss_estimate")
        assert run["loss"]["final, whole text"] == by_name[run["name"]].final("val_loss")
    statistics: dict[str, Any] = stored["statistics"]["transformer"]
    differences = statistics["comparisons"]["lif"]["final, whole text"]["differences"]
    assert differences == [
        by_name[f"transformer-lif-seed{seed}"].final()
        - by_name[f"transformer-standard-seed{seed}"].final()
        for seed in SEEDS
    ]


def test_facts_say_how_long_and_where() -> None:
    results = synthetic_results(variants=["standard", "lif"], seeds=[42])
    first, second = (
        dataclasses.replace(run, summary={**run.summary, "machine": machine, "seconds": seconds})
        for run, machine, seconds in zip(results, ["A", "B"], [3600.0, 1800.0], strict=True)
    )
    findings = Findings.of([first, second])
    facts = dict(facts_of(findings.finished, ReportContext("quick", (first.name,))))
    assert facts["Time"][0].startswith("1 h 30 min")
    assert facts["Machine"] == ["A", "B"]
    for precision, said in (("highest", "A"), ("high", "A, matrix products of precision 'high'")):
        summary = {**first.summary, "matmul_precision": precision}
        one = Findings.of([dataclasses.replace(first, summary=summary)]).finished
        assert dict(facts_of(one, CONTEXT))["Machine"] == [said]
    assert facts["Runs"] == ["1 finished of 1 planned, and 1 more"]
    assert facts["Gates"] == ["preset released: Transformer LIF-learnable"]
    ungated = Findings.of([first]).finished
    assert dict(facts_of(ungated, CONTEXT))["Gates"] == ["none"]
    assert [duration(s) for s in (59.6, 61, 3599.6)] == ["1 min 0 s", "1 min 1 s", "1 h 0 min"]


def test_facts_say_how_models_were_made_and_trained() -> None:
    results = synthetic_results(variants=["standard", "lif", "qwen-gate"], seeds=[42])
    schedule = {"lr_schedule": "cosine", "warmup_steps": 50, "learning_rate": 6e-3}
    (cfc,) = synthetic_results(backbone="cfc", variants=["standard"], seeds=[42], **schedule)
    cfc.summary["trainable_parameters"] = 400_000
    facts = dict(facts_of(Findings.of([*results, cfc]).finished, CONTEXT))
    assert facts["Models"] == [
        "Transformer: 2 layers of 128, 4 heads, windows of 128, dropout 0.1, "
        "418,560 to 451,328 parameters",
        "CfC: 2 layers of 128, 192 neurons, windows of 128, dropout 0.1, 418,560 parameters, "
        "400,000 of them trainable",
    ]
    assert facts["Training"] == [
        "Transformer: 3000 steps of 64 windows, evaluated every 200, AdamW with learning rate "
        "0.001 (constant), weight decay 0.1 on matrices, gradient norm at most 1",
        "CfC: 3000 steps of 64 windows, evaluated every 200, AdamW with learning rate 0.006 "
        "(warm-up over 50 steps, then cosine to a tenth), weight decay 0.1 on matrices, gradient "
        "norm at most 1",
    ]


def test_unknown_names_are_refused() -> None:
    findings = Findings.of([])
    with pytest.raises(ResultError, match="'lif' is not the name of a run"):
        page_content(findings, ReportContext("xs", ("lif",)))


@pytest.mark.parametrize("package", ["jinja2", "scipy"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "ember_ext.paper.report.report")
    with pytest.raises(ModuleNotFoundError, match=rf'{package}.*pip install "ember-ext\[paper\]"'):
        importlib.import_module("ember_ext.paper.report.report")
