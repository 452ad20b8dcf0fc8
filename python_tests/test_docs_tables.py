"""The documentation's own directives print what `bench/results` holds and refuse anything else."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("myst_parser")
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_ext"), str(ROOT / "bench")]

import measurements  # noqa: E402

WIRED = "config=wired [64, 256, 128] -> 192; mode=forward"


def build(folder: Path, page: str) -> tuple[str, str]:
    """A page as text, and what the build complained of."""
    (folder / "index.md").write_text(f"# Page\n\n{page}\n", encoding="utf-8")
    problems = io.StringIO()
    with docutils_namespace():
        app = Sphinx(
            str(folder), None, str(folder / "out"), str(folder / "trees"), "dummy",
            {"extensions": ["bench_tables", "paper_results", "myst_parser"]},
            status=None, warning=problems,
        )  # fmt: skip
        app.build()
    return " ".join(app.env.get_doctree("index").astext().split()), problems.getvalue()


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    ours = measurements.find("cfc.csv", f"{WIRED}; contender=ember_ext avx2")
    theirs = measurements.find("cfc.csv", f"{WIRED}; contender=ncps")
    kernels = measurements.select(
        measurements.read("h200/kernels.csv"), "pass=GRU [64, 256, 128] -> 192"
    )
    numbers = json.loads((measurements.RESULTS / "xs" / "numbers.json").read_text("utf-8"))
    (power,) = (table for table in numbers["tables"] if table["number"] == "S5")
    (loss,) = (claim for claim in numbers["claims"] if claim["key"] == "loss-cfc")
    judged = sum(claim["verdict"] != "not testable at this scale" for claim in numbers["claims"])
    supported = [claim for claim in numbers["claims"] if claim["verdict"] == "supported"]
    text, problems = build(
        tmp_path,
        f"""
```{{bench-times}} cfc.csv
:where: {WIRED}; isa=avx2
:contenders: nc* = their name; ember_ext avx2 = our name
:faster: ember_ext avx2
:rate: ember_ext avx2 = our rate
```

```{{bench-table}} h200/kernels.csv
:where: pass=GRU [64, 256, 128] -> 192
:columns: pass
:sum: ms = together
:machine: the machine
```

Alone {{bench}}`cfc.csv; {WIRED}; contender=ncps`,
{{bench}}`speedup of cfc.csv; {WIRED}; contender=ember_ext avx2`,
{{bench-ratio}}`median_ms of cfc.csv; {WIRED}; contender=ncps / {WIRED}; contender=ncps`,
{{paper}}`xs; supported` of {{paper}}`xs; claims`.

```{{paper-claims}} xs
```

```{{paper-table}} xs 3.1
:columns: Condition; Val loss = our loss
:wrap:
```

```{{paper-table}} xs S5
:having: Published effect
```

```{{paper-table}} xs E1
```

Of quick {{paper-size}}`xs; quick; finished` of {{paper-size}}`xs; quick; planned`,
{{paper}}`xs; judged` judged, power {{paper-cell}}`xs; S5; {power["rows"][0][0]}; p`.
""",
    )
    assert not problems
    times = [measurements.duration(float(row["median_ms"])) for row in (theirs, ours)]
    speedup = measurements.factor(float(ours["speedup"]))
    for expected in (
        *times, speedup, "their name", "our name", "our rate", ours["device"], "the machine",
        measurements.duration(sum(float(row["ms"]) for row in kernels)),
        f"Alone {times[0]}, {speedup}, 1.0, {len(supported)} of {len(numbers['claims'])}.",
        f"Supported: {len(supported)}", *(row[0] for row in numbers["tables"][0]["rows"]),
        "our loss", "2 layers of 96", "Of quick 9 of 9, ",
        f"{judged} judged, power {power['rows'][0][4]}.", loss["tested"],
        *(row[0] for row in power["rows"] if row[7] != "–"),
    ):  # fmt: skip
        assert expected in text
    assert not any(row[0] in text for row in power["rows"] if row[7] == "–")


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("```{bench-times} cfc.csv\n:contenders: nobody\n```", "no contender 'nobody'"),
        ("```{bench-times} nothing.csv\n:contenders: ncps\n```", "nothing.csv"),
        ("```{bench-times} cfc.csv\n:where: mode=sideways\n```", "no rows with 'mode=sideways'"),
        ("```{bench-table} h200/kernels.csv\n:columns: pass\n```", "does not name its machine"),
        ("{bench}`cfc.csv; mode=forward`", "rows with"),
        ("```{paper-table} xs 9.9\n```", "no table 9.9"),
        ("{paper}`xs; proven`", "proven"),
        ("```{paper-table} xs S5\n:having: Colour\n```", "no column 'Colour'"),
        ("{paper-size}`xs; huge; planned`", "huge"),
        ("{paper-cell}`xs; S9; a; p`", "'xs; S9; a; p' is no cell"),
        ("{paper-cell}`xs; S5; nothing; p`", "'xs; S5; nothing; p' is no cell"),
        ("{paper-cell}`huge; S5; a; p`", "'huge; S5; a; p' is no cell"),
        ("{paper-cell}`xs; S5`", "'xs; S5' is no cell"),
        ("{paper-size}`quick; xs; planned`", "sizes"),
        ("{paper-report}`all of it; huge`", "no report of 'huge'"),
    ],
)
def test_what_the_files_do_not_hold_is_an_error(tmp_path: Path, page: str, problem: str) -> None:
    _, problems = build(tmp_path, page)
    assert problem in problems
