"""How far measured rows are ordered as in the paper, against counts by hand."""

import itertools
import os
import re
import subprocess
import sys

import pytest
from scipy.stats import kendalltau, ttest_1samp

from analysis import agreement
from analysis.agreement import find_pairs, tau
from sweeps.plan.table import load_table
from tests.analysis.scene import CRA, OURS, PAPER, Sweep, grid


def test_pairs_and_tau_are_those_of_all_rows(sweep):
    sweep.full()
    pairs = find_pairs([sweep.compiled()])
    told = [(a, b) for a, b in itertools.combinations(range(8), 2) if PAPER[a] != PAPER[b]]
    assert [round(pair.paper, 1) for pair in pairs] == [round(PAPER[b] - PAPER[a], 1) for a, b in told]
    assert [round(pair.ours[0], 1) for pair in pairs] == [round(OURS[b] - OURS[a], 1) for a, b in told]
    assert pairs[0].rows == ("CF", "CF + CB")
    concordant = sum((PAPER[b] - PAPER[a]) * (OURS[b] - OURS[a]) > 0 for a, b in told)
    assert tau(pairs, 0) == pytest.approx(2 * concordant / 27 - 1)
    assert tau(pairs, 1) is None


def test_without_ties_it_is_kendalls(sweep):
    paper, ours = PAPER[:5], [30.0, 20.0, 50.0, 40.0, 10.0]
    sweep.full(ours)
    assert tau(find_pairs([sweep.compiled()]), 0) == pytest.approx(kendalltau(paper, ours).statistic)


def test_rows_equal_as_printed_and_runs_of_two_tables_count_once(sweep):
    sweep.full([30.04, 29.96, 40.0])
    compiled = sweep.compiled()
    pairs = find_pairs([compiled])
    assert {pair.rows for pair in pairs if pair.ours} == {("CF", "CF + AS"), ("CF + CB", "CF + AS")}
    assert [(pair.rows, pair.untold) for pair in pairs if not pair.ours] == [(("CF", "CF + CB"), (0,))]
    assert find_pairs([compiled, compiled]) == pairs
    assert "equal as printed: 1 pairs of seed 0." in agreement.to_markdown([compiled])


def test_rows_that_are_one_run_are_no_pair(sweep):
    sweep.trial("CF", 40.0, rows="CF,CF-CB")
    sweep.trial("CF-AS", 50.0)
    pairs = find_pairs([sweep.compiled()])
    assert [pair.rows for pair in pairs if pair.ours] == [("CF", "CF + AS")]
    sweep.trial("CF-AC", 60.0, rows="CF-AC,CF-CB-AS,CF-CB-AC")
    told = agreement.to_markdown([sweep.compiled()])
    assert "both rows are one run or equal as printed: 3 pairs of seed 0." in told, "1 of the first run, 2 of the last"


def test_pairs_that_are_all_one_run_have_no_list(sweep):
    sweep.trial("CF", 40.0, rows="CF,CF-CB")
    told = agreement.to_markdown([sweep.compiled()])
    assert "1 pairs of seed 0" in told
    assert "What a row has more" not in told


def test_zero_has_no_sign():
    assert agreement._told([0.03, -0.05], "+z.1f").startswith("+0.0 (")
    assert agreement._told([-1 / 3, 1 / 3 - 1e-9], "z.2f").startswith("0.00 (-4.24 to ")


def test_what_is_not_comparable_is_left_out(sweep):
    sweep.full([30.0, 35.0])
    sweep.trial("CF-AS", 40.0, protocol={"scales": "1"})
    compiled = sweep.compiled()
    assert any(trial.deviations for trial in compiled.trials)
    assert [pair.rows for pair in find_pairs([compiled])] == [("CF", "CF + CB")]


def test_rows_without_a_value_in_the_paper_are_left_out(database):
    path = database / "cra.yaml"
    path.write_text(CRA.replace("miou: 63.7", "miou: null"))
    sweep = Sweep(database, path)
    sweep.full([60.0, 70.0])
    assert find_pairs([sweep.compiled()]) == []
    assert "No two rows have measured values and different values of the paper." in agreement.to_markdown(
        [sweep.compiled()]
    )


def test_pairs_are_of_the_first_metric_and_their_labels_are_text(cra):
    lines = grid(agreement.to_markdown([cra.compiled()]).partition("What a row has more")[2])
    assert lines["cra"] == [r"without → [with] \| both", "+7.9", "+10.0", "1 of 1"]


def test_seeds_are_paired_and_pooled(sweep):
    gains = [2.0, 3.0, -1.0]
    for seed, gain in enumerate(gains):
        sweep.trial("CF", 40.0 + 5 * seed, seed=seed)
        sweep.trial("CF-CB", 40.0 + 5 * seed + gain, seed=seed)
    sweep.trial("CF-AS", 60.0, seed=2)
    compiled = sweep.compiled()
    lines = grid(agreement.to_markdown([compiled]).partition("What a row has more")[2])
    low, high = ttest_1samp(gains, 0).confidence_interval()
    text = agreement.to_markdown([compiled])
    assert f"| +7.9  | +1.3 ({low:+.1f} to {high:+.1f}) | 2 of 3" in text, (text, lines)
    assert "| table03" in text
    assert re.search(r"\| CF → CF \+ AS .*\| 1 of 1 +\|$", text, re.MULTILINE), "measured in one of the three seeds"
    assert "tau (1: all, -1: none): 0.56" in text, "1, 1 and, of CF < CB, CF < AS, CB > AS, -1/3"


def test_only_pairs_beyond_the_papers_noise_count_as_far(sweep):
    sweep.full([10.0, 30.0, 20.0, 40.0])
    text = agreement.to_markdown([sweep.compiled()])
    pairs = find_pairs([sweep.compiled()])
    far = [pair for pair in pairs if abs(pair.paper) > 2.1]
    assert [pair.rows for pair in pairs if pair not in far] == [("CF + CB", "CF + AC"), ("CF + AS", "CF + AC")]
    assert f"in the paper: {tau(far, 0):.2f}." in text
    ordered = sum(pair.is_ordered(0) for pair in far)
    assert grid(text)["**all that differ by more than 2.1 in the paper**"] == ["4", f"{ordered} of 4"]


def test_the_papers_noise_is_what_the_sum_gains_over_the_mean():
    paper = {row.id: row.paper["miou"] for row in load_table("table05").rows}
    assert paper["sum"] - paper["mean"] == pytest.approx(agreement.NOISE)


def test_a_difference_of_just_the_papers_noise_is_not_beyond_it(database):
    path = database / "cra.yaml"
    path.write_text(CRA.replace("miou: 55.8", "miou: 61.6"))
    sweep = Sweep(database, path)
    sweep.full([60.0, 70.0])
    assert agreement.NOISE < 63.7 - 61.6, "as floats"
    assert (
        grid(agreement.to_markdown([sweep.compiled()]))["**all that differ by more than 2.1 in the paper**"][0] == "0"
    )


def test_the_command_tells_it(sweep, capsys):
    from analysis.cli import main

    sweep.full()
    assert main(["table03", "--tracking-uri", sweep.uri, "--agreement"]) == 0
    assert "### Pairs of rows that are ordered as in the paper" in capsys.readouterr().out
    assert main(["table03", "--tracking-uri", sweep.uri]) == 0
    assert "### Pairs" not in capsys.readouterr().out
    out = sweep.folder / "out"
    assert main(["table03", "--tracking-uri", sweep.uri, "--agreement", "--format", "latex", "--out", str(out)]) == 0
    assert all(line.startswith("% ") for line in capsys.readouterr().out.partition("% ### Pairs")[2].splitlines()[1:])
    assert (out / "agreement.md").read_text().startswith("### Pairs")


def test_a_table_named_so_is_not_overwritten(sweep, capsys):
    from analysis.cli import main

    path = sweep.folder / "own.yaml"
    path.write_text(CRA.replace("name: cra", "name: agreement", 1))
    assert load_table(str(path)).name == "agreement"
    assert main([str(path), "--tracking-uri", sweep.uri, "--agreement", "--out", str(sweep.folder / "out")]) == 2
    assert "give it another name" in capsys.readouterr().err


@pytest.mark.parametrize("buffered", [False, True])
def test_files_are_written_whoever_reads_the_text(sweep, buffered):
    sweep.full()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    out = sweep.folder / "out"
    command = [sys.executable, "-m", "analysis.cli", "table03", "--tracking-uri", sweep.uri, "--agreement"]
    process = subprocess.Popen(
        [*command, "--format", "both", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    process.stdout.close()
    _, told = process.communicate(timeout=120)
    assert (process.returncode, {path.name for path in out.iterdir()}) == (
        0,
        {"agreement.md", "table03.md", "table03.tex", "table03.parquet"},
    ), told


def test_the_same_runs_in_another_metric_are_other_pairs(cra):
    """Of two tables of the same runs, one of mIoU and one of false positives."""
    low = cra.folder / "low.yaml"
    text = re.sub(r"  - \{name: miou, .*\n|miou: [\d.]+, ", "", cra.table.text).replace("fp: null", "fp: 19.3")
    low.write_text(text)
    assert [pair.paper for pair in find_pairs([cra.compiled(), cra.compiled(low)])] == [7.9, -1.2]
