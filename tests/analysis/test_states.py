"""Cells without a value, and runs that cannot be used, say why."""

import pytest

from analysis.cli import main
from analysis.render import to_latex, to_markdown
from semformer.errors import UserError
from tests.analysis.scene import cells, check_latex, footnote, grid, note


def test_missing_failed_and_running_cells_say_so(sweep):
    sweep.trial("CF", 34.8)
    sweep.trial("CF-AS", tags={"status": "failed", "reason": "segmentor: \x1b[31mloss is nan\x1b[0m\n at <epoch> 3"})
    sweep.trial("CF-AC", tags={"status": "running"})
    sweep.trial("CF-CB-AS", tags={"status": "queued"})
    text = to_markdown(sweep.compiled())
    ours = grid(text)["mIoU (%) ours"]
    assert ours[1:] == ["34.8", "— [1]", "failed [2]", "running [3]", "queued [4]", "— [1]", "— [1]", "— [1]"]
    assert footnote(text, "[1]") == "not run"
    assert footnote(text, "[2]") == r"failed: segmentor: loss is nan at \<epoch> 3"
    assert footnote(text, "[3]").startswith("still running")


@pytest.mark.parametrize("status", ["failed", "running", "queued", "pruned"])
def test_values_of_a_trial_that_has_not_finished_are_not_shown(sweep, status):
    sweep.trial("CF", 34.8)
    sweep.trial("CF-AS", 90.0, tags={"status": status})
    assert [cell.mean for cell in cells(sweep.compiled()).values() if cell.mean is not None] == [34.8]


def test_a_run_that_ended_badly_without_a_word_has_failed(sweep):
    sweep.trial("CF", tags={"status": "running"}, ended="FAILED")
    line = sweep.compiled().lines[1]
    assert line.status == "failed"
    assert line.cells["miou"].remarks == ("failed: no reason recorded",)


def test_trials_of_a_stopped_sweep_have_not_failed(sweep):
    sweep.trial("CF", 34.8)
    stopped = {"status": "queued", "reason": "the sweep was stopped"}
    sweep.trial("CF-CB", tags=stopped, begun=False, ended="KILLED")
    sweep.trial("CF-AS", tags=stopped, ended="KILLED")
    sweep.trial("CF-AC", tags={"status": "running"}, ended="KILLED")
    compiled = sweep.compiled()
    text = to_markdown(compiled)
    assert grid(text)["mIoU (%) ours"][2:5] == ["stopped [1]", "stopped [2]", "stopped [2]"]
    assert footnote(text, "[1]") == "stopped before it ran: resume the sweep (semformer-sweep resume)"
    assert footnote(text, "[2]") == "stopped while it ran: resume the sweep (semformer-sweep resume)"
    assert "failed" not in text
    check_latex(to_latex(compiled))


def test_a_pruned_trial_has_its_own_word(sweep):
    sweep.trial("CF", 34.8)
    sweep.trial("CF-CB", tags={"status": "pruned"})
    text = to_markdown(sweep.compiled())
    assert grid(text)["mIoU (%) ours"][2] == "pruned [1]"
    assert footnote(text, "[1]").startswith("pruned: stopped early")


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"seed": None}, "it has no tag semformer.seed"),
        ({"seed": "zero"}, "its tag semformer.seed = 'zero' cannot be read"),
        ({"seed": "-1"}, "its tag semformer.seed = '-1' cannot be read"),
        ({"seed": "9" * 30}, "its tag semformer.seed"),
        ({"trial_key": None}, "it has no tag semformer.trial_key"),
        ({"protocol": "{"}, "its tag semformer.protocol = '{' cannot be read"),
        ({"protocol": "[" * 4000}, "its tag semformer.protocol"),
        ({"protocol": "[1]"}, "its tag semformer.protocol = '[1]' cannot be read"),
        ({"stage_keys": '{"caae": ["x"]}'}, 'its tag semformer.stage_keys = \'{"caae": ["x"]}\' cannot be read'),
        ({"masks_read_by": "evaluate"}, "its tag semformer.masks_read_by = 'evaluate' cannot be read"),
    ],
)
def test_a_run_that_cannot_be_used_is_left_out_and_named(sweep, tags, says):
    sweep.trial("CF", 34.8)
    bad = sweep.trial("CF-CB", 99.9, tags=tags)
    text = to_markdown(sweep.compiled())
    assert grid(text)["mIoU (%) ours"][1:4] == ["34.8", "— [1]", "— [2]"]
    assert footnote(text, "[1]") == "left out, see Runs"
    assert f"Run {bad} of experiment 'table03 tiny' is left out: {says}" in note(text, "Runs")


def test_only_runs_that_cannot_be_used_are_told(sweep, capsys):
    bad = [sweep.trial("CF", 34.8, tags={"seed": None}) for _ in range(2)]
    assert main(["table03", "--tracking-uri", sweep.uri]) == 2
    error = capsys.readouterr().err
    assert all(f"Run {run} of experiment 'table03 tiny' is left out: it has no tag" in error for run in bad)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_finished_trial_without_its_metric_is_no_number(sweep, value):
    sweep.trial("CF", value)
    cell = cells(sweep.compiled())["CF"]
    assert cell.mean is None
    assert cell.remarks == ("finished, but without a value of mIoU (%)",)


def test_runs_of_no_row_of_the_table_are_told(sweep, tmp_path):
    sweep.trial("CF", 34.8, tags={"rows": f"{sweep.table.name}/renamed"})
    with pytest.raises(UserError, match="have the rows been renamed"):
        sweep.compiled()
