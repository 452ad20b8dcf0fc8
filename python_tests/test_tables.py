"""Tables against numbers worked out by hand from made-up runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from synthetic_results import LATER_VARIANTS, SEEDS, Effect, synthetic_results

from ember_ext.paper import published
from ember_ext.paper.claims import claims
from ember_ext.paper.data.sources import TINY_SHA256
from ember_ext.paper.formatting import (
    DASH,
    noise_text,
    number,
    p_value,
    percent,
    share,
    signed,
)
from ember_ext.paper.runs.finished import NEWER_MEASURES
from ember_ext.paper.runs.results import ResultError, RunResult
from ember_ext.paper.statistics.paired import NoiseFloor
from ember_ext.paper.tables.catalogue import Table, tables
from ember_ext.paper.tables.claim_tables import claim_tables

NUMBERS = ["3.1", "3.2", "3.3a", "3.3b", "3.4", "3.5", "3.6", "4.2", "S1", "S2", "S3"]

BOTH = synthetic_results() + synthetic_results(backbone="cfc")


def by_number(results: Sequence[RunResult]) -> dict[str, Table]:
    return {table.number: table for table in tables(results)}


def row(table: Table, *starts_with: str) -> dict[str, str]:
    """The only row that starts with some cells, by column."""
    found = [r for r in table.rows if r[: len(starts_with)] == starts_with]
    assert len(found) == 1, table.rows
    return dict(zip(table.columns, found[0], strict=True))


def set_losses(results: Sequence[RunResult], variant: str, losses: Sequence[float]) -> None:
    """Give the runs of a variant, one a seed, constant losses; on the whole text 0.1 more."""
    runs = [run for run in results if run.variant == variant]
    for run, loss in zip(runs, losses, strict=True):
        for record in run.evaluations:
            record["val_loss_estimate"], record["val_loss"] = loss, loss + 0.1


@pytest.mark.parametrize(
    "results",
    [
        [],
        BOTH,
        BOTH[:1],
        synthetic_results(variants=("lif",)),
        synthetic_results(backbone="cfc", variants=("null",), seeds=(1,)),
        synthetic_results(n_layer=6, n_head=6, n_embd=384, block_size=256),
    ],
)
def test_every_table_is_there_and_whole(results: list[RunResult]) -> None:
    found = tables(results)
    assert [table.number for table in found] == NUMBERS
    for table in found:
        assert table.notes
        assert len(set(table.columns)) == len(table.columns)
        for cells in table.rows:
            assert len(cells) == len(table.columns)
            assert all(cell and "nan" not in cell and "None" not in cell for cell in cells)


def test_dashes_where_nothing_was_run() -> None:
    table = by_number([])["3.1"]
    cells = row(table, "LIF-learnable", "released")
    assert cells["Published"] == "1.4673"
    assert {cells[c] for c in ("Seeds", "Val loss", "sd", "vs Standard")} == {DASH}
    assert row(table, "Standard")["vs Standard"] == DASH
    assert "Nothing was run." in table.notes


def test_performance_of_the_published_seeds() -> None:
    """The published losses in, the published table out."""
    results = synthetic_results(
        n_layer=6, n_head=6, n_embd=384, block_size=256, steps=2000, eval_interval=500
    )
    for variant, printed in published.LOSSES["transformer"].items():
        set_losses(results, variant, printed.per_seed)
    table = by_number(results)["3.1"]
    assert "Authors' xs" not in table.columns
    for variant in ("LIF-fixed", "LIF-learnable", "LIF-refractory"):
        cells = row(table, variant, "released")
        assert cells["Seeds"] == "3"
        assert cells["Val loss"] == cells["Published"]
        assert cells["sd (ddof 0)"] == cells["Published sd (ddof 0)"]
        assert cells["vs Standard"] == cells["Published vs Standard"]
    standard = row(table, "Standard")
    assert (standard["sd"], standard["vs Standard"]) == ("0.0128", "baseline")
    assert standard["Final, whole text"] == "1.5784 ± 0.0128"
    assert row(table, "Qwen-gate", DASH)["vs Standard"] == "+0.88%"
    text_gate = row(table, "LIF-learnable", "text")
    assert text_gate["Published"] == DASH
    assert text_gate["Val loss"] != DASH


def test_authors_small_runs_stand_beside_small_runs_only() -> None:
    small = by_number(BOTH)
    assert row(small["3.1"], "LIF-learnable", "released")["Authors' xs"] == (
        "1.6156 ± 0.0068 (n = 8)"
    )
    assert row(small["3.1"], "Standard")["Authors' xs"].startswith("1.6167")
    assert row(small["3.2"], "CfC+LIF", "released")["Authors' xs"] == "1.6392 (n = 3)"
    assert any("authors' xs" in note for note in small["3.1"].notes)
    assert row(small["3.1"], "Standard")["Ours vs authors' xs"] == DASH  # of another corpus
    other = by_number(synthetic_results(steps=1000))["3.1"]
    assert "Authors' xs" not in other.columns
    assert any("do not compare" in note for note in other.notes)


def test_our_means_against_the_authors_small_runs() -> None:
    corpus = {"name": "tinyshakespeare", "sha256": TINY_SHA256}
    results = [dataclasses.replace(run, corpus=corpus) for run in BOTH[:21]]
    set_losses(results, "standard", [1.6, 1.6328670, 1.6657340])  # 1 % above 1.6167
    table = by_number(results)["3.1"]
    assert row(table, "Standard")["Ours vs authors' xs"] == "+1.00%"
    assert row(table, "Qwen-gate")["Ours vs authors' xs"] == DASH


def test_another_corpus_is_told() -> None:
    def tells(results: list[RunResult]) -> bool:
        return any("not Tiny Shakespeare" in note for note in by_number(results)["3.1"].notes)

    corpus = {"name": "tinyshakespeare", "sha256": TINY_SHA256}

    def sends_to_the_authors_runs(results: list[RunResult]) -> bool:
        return any("compare our losses with" in note for note in by_number(results)["3.1"].notes)

    ours = [dataclasses.replace(run, corpus=corpus) for run in BOTH]
    assert (tells(BOTH), sends_to_the_authors_runs(BOTH)) == (True, False)
    assert (tells(ours), sends_to_the_authors_runs(ours)) == (False, True)


def test_published_numbers_of_other_sizes_are_told() -> None:
    def tells(results: list[RunResult], table: str) -> bool:
        note = "The published numbers are of the paper's sizes. Our runs have other sizes."
        return note in by_number(results)[table].notes

    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "steps": 2000}
    paper = synthetic_results(**sizes)
    for table in ("3.4", "3.5", "4.2"):
        assert tells(BOTH, table)
        assert not tells(paper, table)


def test_differences_are_over_common_seeds() -> None:
    results = synthetic_results(variants=("standard",), seeds=(1, 2, 3, 4))
    results += synthetic_results(variants=("lif",), seeds=(3, 4, 5))
    set_losses(results, "standard", [9.0, 9.0, 2.0, 2.0])
    set_losses(results, "lif", [1.9, 1.9, 7.0])
    table = by_number(results)["3.1"]
    assert row(table, "LIF-learnable", "released")["vs Standard"] == "-5.00%"
    assert row(table, "Standard")["Val loss"] == "5.5000"
    assert table.notes[0] == (
        "LIF-learnable (released) and Standard are compared over the seeds of both (n = 2): "
        "1.9000 ± 0.0000 and 2.0000 ± 0.0000."
    )
    # A row that lacks seeds of the baseline's says so as well.
    fewer = synthetic_results(variants=("standard",), seeds=(1, 2))
    fewer += synthetic_results(variants=("qwen-gate",), seeds=(1,))
    assert "(n = 1)" in by_number(fewer)["3.1"].notes[0]


def test_head_roles() -> None:
    results = synthetic_results(variants=("standard", "lif"))
    for i, run in enumerate(results):
        run.evaluations[-1]["attention_entropy"] = [[0.01, 0.5, 2.0, 3.5], [2.0] * 4]
        if i < 2:
            run.evaluations[-1]["attention_entropy"][1][0] = 0.02
    table = by_number(results)["3.3a"]
    first = row(table, "LIF-learnable", "released", "3", "L0")
    assert [first[c] for c in ("Pointers", "Focusers", "Mixed", "Gatherers")] == ["1.0"] * 4
    last = row(table, "Standard", DASH, "3", "L1")
    assert (last["Pointers"], last["Mixed"]) == ("0.3", "3.7")
    assert row(table, "Standard", DASH, "3", "all")["Pointers"] == "1.3"
    assert last["Deviating heads"] == DASH
    assert first["Selective/mild/moderate/pass-through"] == "0/0/0/12"
    assert first["Largest contrast"] == "1.050"
    assert "gatherer H > 2.98" in table.notes[0]


def test_heads_attend_to_so_many_keys_and_to_the_first() -> None:
    results = synthetic_results(variants=("standard", "lif"), seeds=(1, 2))
    for run, support in zip(results, (4.0, 2.0, 8.0, 3.0), strict=True):
        run.evaluations[-1]["attention_support"] = [[support] * 4, [support + 1, support - 1] * 2]
        run.evaluations[-1]["first_token_mass"] = [[support / 100] * 4, [0.1, 0.3] * 2]
    table = by_number(results)["3.3a"]
    standard = row(table, "Standard", DASH, "2", "L0")
    assert (standard["Support"], standard["First-token mass"]) == (
        "6.00 ± 2.83",
        "0.0600 ± 0.0283",
    )
    lif = row(table, "LIF-learnable", "released", "2", "L1")
    assert (lif["Support"], lif["First-token mass"]) == ("2.50 ± 0.71", "0.2000 ± 0.0000")
    everything = row(table, "LIF-learnable", "released", "2", "all")
    assert everything["First-token mass"].startswith("0.1125")
    assert "Uniform attention has 38.67 and 0.0424." in table.notes[1]


def test_depth_and_its_published_numbers() -> None:
    lif = Effect(entropy=(0.067, 0.1, 0.12, 0.161))
    table = by_number(synthetic_results({"lif": lif}, backbone="cfc", n_layer=4))["3.4"]
    cells = row(table, "CfC", "CfC+LIF", "released", "3", "own gate")
    assert (cells["Published first"], cells["Published last"]) == ("0.067", "0.161")
    assert cells["Spearman"] == "+1.00"
    assert cells["Rise"].startswith("+0.09") or cells["Rise"].startswith("0.09")
    assert row(table, "CfC", "CfC+LIF", "released", "3", "virtual gate")["Published last"] == DASH
    assert row(table, "CfC", "CfC-only (base)")["Measured through"] == "virtual gate"
    assert row(table, "Transformer", "Standard")["Published last"] == "1.690"


def test_firing_of_neurons_and_what_earlier_versions_did_not_measure() -> None:
    results = synthetic_results(backbone="cfc")
    lif = row(by_number(results)["3.3b"], "CfC+LIF", "released", "3", "L1")
    assert lif["Always on"] == "0.750 ± 0.000"
    assert lif["Selective"] == "0.125 ± 0.000"
    assert lif["Always on (virtual gate)"] == "0.875 ± 0.000"
    base = row(by_number(results)["3.3b"], "CfC-only (base)", DASH, "3", "L0")
    assert base["Always on"] == base["Selective"] == base["Fire rate"] == DASH
    assert base["Selective (virtual gate)"] == "0.062 ± 0.000"
    for run in results:
        for record in run.evaluations:
            for measure in NEWER_MEASURES["cfc"]:
                del record[measure]
    earlier = row(by_number(results)["3.3b"], "CfC+LIF", "released", "3", "L1")
    assert earlier["Always on"] == earlier["Selective (virtual gate)"] == DASH
    assert earlier["Fire rate"] == lif["Fire rate"]
    results[0].evaluations[0]["virtual_selective"] = [0.5]
    with pytest.raises(ResultError, match="virtual_selective must have one entry for each of 2"):
        tables(results)


def test_crossovers() -> None:
    effect = Effect(loss=-0.02, early=0.02, since=1600, noise=1e-4)
    table = by_number(synthetic_results({"lif": effect}))["3.5"]
    cells = row(table, "Transformer", "LIF-learnable", "released", "3", "persistent")
    assert cells["Step by seed"] == "42: 1600, 668: 1600, 1337: 1600"
    assert (cells["With a crossover"], cells["Range"]) == ("3", "1600-1600")
    early = by_number(synthetic_results({"lif": Effect(loss=-0.02, early=-0.02, noise=1e-4)}))
    cells = row(early["3.5"], "Transformer", "LIF-learnable", "released", "3", "first")
    assert cells["Step by seed"] == "42: always, 668: always, 1337: always"
    assert (cells["With a crossover"], cells["Mean"], cells["Range"]) == ("0", DASH, DASH)
    cells = row(early["3.5"], "Transformer", "LIF-learnable", "released", "3", "persistent")
    assert cells["Range"] == "200-200"
    assert row(table, "CfC", "CfC+LIF", "released", DASH, "first")["Published"] == "1600"


def test_parameters() -> None:
    table = by_number(BOTH)["3.6"]
    cells = row(table, "Transformer", "LIF-learnable", "released")
    assert (cells["Extra parameters"], cells["Published extra parameters"]) == ("24", "108")
    assert row(table, "Transformer", "Qwen-gate")["Published extra parameters"] == "884,736"
    assert row(table, "CfC", "CfC+LIF", "released")["Extra parameters"] == "768"


def test_thresholds() -> None:
    lif = Effect(threshold=(0.001, 0.001, 0.002, 0.004))
    table = by_number(synthetic_results({"lif": lif}, backbone="cfc", n_layer=4))["4.2"]
    cells = row(table, "CfC", "CfC+LIF", "released", "3", "L3")
    assert cells["Ratio to L0"] == "4.00"
    assert cells["Published θ"] == "0.00210"


def test_spread_of_gates() -> None:
    results = synthetic_results({"lif": Effect(threshold=(0.001, 0.041))})
    cells = row(by_number(results)["S3"], "Transformer", "LIF-learnable", "released")
    # 3 seeds x 4 heads in either layer; their λ and k are all alike.
    assert cells["Gates"] == "24"
    assert cells["θ"] == f"0.0210 ± {0.02 * (24 / 23) ** 0.5:.4f}"
    assert cells["λ"] == "0.8810 ± 0.0000"
    assert (cells["First component"], cells["Second component"]) == ("100.0%", "0.0%")
    assert cells["Its direction (θ, λ, k)"] == "(+1.00, +0.00, +0.00)"
    alike = row(by_number(synthetic_results())["S3"], "Transformer", "LIF-learnable", "released")
    assert alike["First component"] == DASH


def test_statistics_and_noise() -> None:
    results = synthetic_results(variants=("standard", "lif", "null"))
    set_losses(results, "standard", [1.0, 2.0, 3.0])
    set_losses(results, "lif", [0.9, 1.7, 2.8])
    set_losses(results, "null", [1.1, 2.0, 3.0])
    found = by_number(results)
    cells = row(found["S1"], "Transformer", "LIF-learnable", "released", "3", "best, estimate")
    assert (cells["Difference"], cells["%"], cells["Lower in"]) == ("-0.20000", "-10.00%", "3/3")
    # t = -.2 / (.1/√3) with two degrees of freedom.
    assert (cells["t p"], cells["Wilcoxon p"], cells["dz"]) == (".074", ".250", "-2.00")
    assert cells["95% interval (t)"] == "[-0.4484, +0.0484]"
    assert (cells["Noise floor (RMS)"], cells["Beyond noise"]) == ("0.05774", "yes")
    null = row(found["S1"], "Transformer", "Null (Standard again)", DASH, "3", "best, estimate")
    assert null["Beyond noise"] == DASH
    fewer = by_number([run for run in results if run.variant != "null" or run.seed != 42])
    cells = row(fewer["S1"], "Transformer", "LIF-learnable", "released", "3", "best, estimate")
    assert cells["Beyond noise"] == DASH
    noise = row(found["S2"], "Transformer", "best, estimate")
    assert (noise["Null pairs"], noise["RMS"], noise["Largest"]) == ("3", "0.05774", "0.10000")
    steps = [r[1] for r in found["S2"].rows]
    assert steps[-1] == "estimate at 3000"


def test_conditions_beyond_the_paper_have_rows_where_they_were_run() -> None:
    variants = ("standard", "lif", "null", *LATER_VARIANTS)
    effects = {"lif": Effect(noise=0), "sigmoid": Effect(loss=1e-3, noise=0)}
    later, without = (
        by_number(synthetic_results(effects, variants=v)) for v in (variants, variants[:3])
    )
    for label, extra in (("LIF-temporal", "30"), ("LIF-persistent", "40"), ("Sigmoid", "24")):
        for section in ("3.1", "3.3a", "3.6", "4.2", "S1", "S3"):
            found = [r for r in later[section].rows if any(c.startswith(label) for c in r)]
            assert found, (label, section)
            assert not any(c.startswith(label) for r in without[section].rows for c in r)
        cells = next(r for r in later["3.6"].rows if r[1].startswith(label))
        assert cells[4] == extra
    noise = {r[1]: r[2:] for r in later["S2"].rows if r[1].endswith(": Sigmoid and LIF")}
    assert len(noise) == 4
    assert noise["final, whole text: Sigmoid and LIF"] == ("3", "0.00100", "0.00100")
    assert not any("Sigmoid" in r[1] for r in without["S2"].rows)
    assert len(later["S2"].notes) == len(without["S2"].notes) + 1


def test_one_seed_has_means_and_no_tests() -> None:
    table = by_number(synthetic_results(seeds=SEEDS[:1]))["S1"]
    for cells in (dict(zip(table.columns, r, strict=True)) for r in table.rows):
        assert cells["Seeds"] == "1"
        assert cells["Difference"] != DASH
        columns = ("t p", "Wilcoxon p", "dz", "95% interval (t)", "95% interval (BCa)", "sd ratio")
        assert {cells[column] for column in columns} == {DASH}


def test_formats() -> None:
    assert [p_value(p) for p in (None, 0.0004, 0.0426, 1.0)] == [DASH, "<.001", ".043", "1.000"]
    assert [percent(v) for v in (None, -0.754, 0.0)] == [DASH, "-0.75%", "+0.00%"]
    assert [signed(v, 3) for v in (None, -0.0024, 0.5)] == [DASH, "-0.002", "+0.500"]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"backbone": "transformer", "n_layer": 6, "n_head": 6, "n_embd": 384}, "other"),
        (BOTH[0].config, "xs"),
        ({**BOTH[0].config, "steps": 2999}, "other"),
        (BOTH[-1].config, "xs"),
    ],
)
def test_scale(config: dict[str, object], scale: str) -> None:
    assert published.scale_of(config) == scale


def test_a_small_number_is_not_shown_as_zero() -> None:
    assert number(0.00123, 5) == "0.00123"
    assert number(1.2e-7, 5) == "1e-07"
    assert number(0.0, 2) == "0.00"
    assert number(None) == DASH


def test_noise_in_words() -> None:
    assert noise_text(None) == "no null pairs"
    assert noise_text(NoiseFloor(2, 0.00021, 0.0004)) == (
        "noise floor 0.00021 (RMS of 2 null pairs; largest 0.00040)"
    )
    assert noise_text(NoiseFloor(1, 0.0, 0.0)) == "noise floor 0 to the 7 digits kept (1 null pair)"


def test_claims_have_tables_of_their_own() -> None:
    effects = {"lif": Effect(loss=-0.006), "qwen-gate": Effect(loss=0.01)}
    judged = claims(synthetic_results(effects))
    correction, power = claim_tables(judged)
    assert [table.number for table in (correction, power)] == ["S4", "S5"]
    with_verdict = [claim for claim in judged if claim.judged]
    assert [cells[:2] for cells in correction.rows] == [(c.key, c.verdict) for c in with_verdict]
    assert f"judge {len(with_verdict)} claims" in correction.notes[0]
    for claim, cells in zip(with_verdict, correction.rows, strict=True):
        assert cells[3:5] == (p_value(claim.p), p_value(claim.holm_p))
        sure = {None: DASH, True: "yes", False: "no"}
        assert cells[5] == sure[None if claim.holm_p is None else claim.holm_p < 0.05]
    names = [cells[0] for cells in power.rows]
    assert len(set(names)) == len(names) > 5
    cells = row(power, "transformer, best val loss: lif against standard")
    (test,) = next(claim for claim in judged if claim.key == "loss-transformer").tests
    assert cells["Seeds"] == "3"
    assert cells["Detectable"] == f"{test.detectable:.5f}"
    assert cells["Published effect"] == "-0.75%"
    assert cells["Power for it"] == share(test.published_power)
    assert cells["Authors' xs effect"] == "-0.07%"
    assert cells["Power for that"] == share(test.authors_xs_power)
    assert row(power, "transformer, best val loss: lif against qwen-gate")["Power for it"] == DASH
    other = claim_tables(claims(synthetic_results(effects, steps=2800)))[1]
    assert other.columns == power.columns[:-2]
    assert len(other.rows) == len(power.rows)
    assert [len(table.rows) for table in claim_tables(claims([]))] == [0, 0]


def test_shares_are_whole_only_if_they_are() -> None:
    values = (None, 0, 1e-4, 0.006, 0.5, 0.994, 0.996, 1)
    assert [*map(share, values)] == [DASH, "0%", "<1%", "1%", "50%", "99%", ">99%", "100%"]
