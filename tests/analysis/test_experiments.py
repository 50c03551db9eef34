"""Tables find their runs in whatever experiments they are."""

import re

import pandas as pd
from mlflow import MlflowClient

from analysis.cli import main
from analysis.render import to_frame, to_latex, to_markdown, write_files
from analysis.tables import compile_from_mlflow
from sweeps.plan.table import load_all_tables, load_table
from sweeps.plan.trials import make_plan
from sweeps.tracking import rows
from tests.analysis.scene import OURS, Sweep, cells, heading_and_lines, note


def test_of_several_runs_of_a_trial_the_newest_finished_one_is_shown(sweep):
    sweep.full()
    newest = sweep.trial("CF", 36.0)
    sweep.trial("CF", tags={"status": "failed", "reason": "crashed"})
    compiled = sweep.compiled()
    assert cells(compiled)["CF"].mean == 36.0
    assert compiled.lines[1].trials[0].run_id == newest
    assert note(to_markdown(compiled), "Runs") == "1 trial has several runs; of each, the newest finished one is shown."


def test_a_trial_fills_rows_of_several_tables(tables):
    sweep, _ = tables
    names = ["table08", "table11", "table05"]
    compiled = compile_from_mlflow([load_table(name) for name in names], preset="tiny", tracking_uri=sweep.uri)
    assert [table.table.name for table in compiled] == ["table08", "table11"]
    assert [cell.mean for cell in cells(compiled[0]).values()] == [40.0, None, 50.0, None]
    assert [cell.mean for cell in cells(compiled[1]).values()] == [45.0, 50.0]
    assert "†" not in to_markdown(compiled[1])


def test_a_table_is_found_in_all_experiments_or_in_those_that_are_named(tables, database):
    sweep, _ = tables
    compiled = sweep.compiled("table11")
    assert compiled.experiments == ["tables tiny"]
    assert "in MLflow experiment `tables tiny` (" in to_markdown(compiled)
    run = Sweep(database, "table11").trial("without", 60.0)
    Sweep(database, "table11", preset="micro", experiment="third").trial("with", 99.0)
    text = to_markdown(sweep.compiled("table11"))
    _, lines = heading_and_lines(text)
    assert [line[1] for line in lines] == ["**60.0**", "50.0"]
    assert "in MLflow experiments `table11 tiny`, `tables tiny` (" in text
    assert re.search(rf"\| table11 tiny +\| {run[:8]} +\|", text)
    frame = to_frame(sweep.compiled("table11"))
    assert frame["experiment"].tolist() == ["table11 tiny", "tables tiny"]
    only = sweep.compiled("table11", experiments=["tables tiny"])
    assert [cell.mean for cell in cells(only).values()] == [45.0, 50.0]
    both = sweep.compiled("table11", experiments=["tables tiny", "table11 tiny", "third"])
    assert [cell.mean for cell in cells(both).values()] == [60.0, 50.0]


def test_the_same_trial_of_another_experiment_fills_all_its_rows(tables, database):
    """A sweep of all tables was stopped; another, of one of them, finished what they share."""
    sweep, _ = tables
    shared = {"rows": "table05/sum,table08/D-256", "table": "table05,table08"}
    Sweep(database, "table05", experiment="all").trial("sum", tags=shared | {"status": "queued"}, ended="KILLED")
    compiled = sweep.compiled("table05")
    assert cells(compiled)["sum"].mean == 50.0
    assert compiled.experiments == ["tables tiny"]


def recorded(folder, plan, experiment):
    """The finished runs of a whole plan, as its sweep leaves them."""
    sweep = Sweep(folder, preset=plan.preset, experiment=experiment)
    for n, trial in enumerate(plan.trials):
        tags = {"status": "finished", "trial_key": trial.key, **rows.tags(trial.rows)}
        run = sweep.record(trial.config, 40.0 + n, tags, {"data": trial.data_name}, fp=20.0, fn=10.0)
        sweep.client.set_terminated(run, "FINISHED")
    return sweep


def test_tables_swept_together_and_one_by_one_are_compiled_together(database, store, capsys):
    def plan(*tables):
        return make_plan(tables, "micro", {}, (0,), None, store)

    sweep = recorded(database, plan(*load_all_tables()), "tables micro")
    recorded(database, plan(load_table("table04"), load_table("table12")), "tables micro")
    recorded(database, plan(load_table("table08")), "other")
    assert main(["--all", "--preset", "micro", "--tracking-uri", sweep.uri]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("51 of 53 cells filled; no trial of table01, table02")
    assert "left out" not in out
    assert "†" not in out
    assert main(["--all", "--preset", "micro", "--tracking-uri", sweep.uri, "--experiment", "other"]) == 0
    assert "4 of 53 cells filled; no trial of table01, table02, table03, " in capsys.readouterr().out


def test_tables_swept_one_by_one_are_compiled_together(database, store, capsys):
    for name in ("table03", "table08"):
        sweep = recorded(database, make_plan([load_table(name)], "micro", {}, (0,), None, store), f"{name} micro")
    assert main(["table03", "table08", "--preset", "micro", "--tracking-uri", sweep.uri]) == 0
    assert capsys.readouterr().out.rstrip().endswith("12 of 12 cells filled")


def test_a_sweep_of_more_than_a_page_of_runs_is_read_whole(sweep, monkeypatch):
    sweep.full()
    search = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *args, **query: search(*args, **query, max_results=3))
    assert [cell.mean for cell in cells(sweep.compiled()).values()][1:] == OURS


def test_every_measured_cell_is_traceable_to_its_run(sweep, tmp_path):
    sweep.full()
    sweep.full([v + 1 for v in OURS], seed=1)
    compiled = sweep.compiled()
    paths = write_files(compiled, tmp_path / "out")
    assert [path.name for path in paths] == ["table03.md", "table03.tex", "table03.parquet"]
    markdown, latex = (path.read_text() for path in paths[:2])
    assert (markdown, latex) == (to_markdown(compiled), to_latex(compiled))
    frame = pd.read_parquet(paths[2])
    pd.testing.assert_frame_equal(frame, to_frame(compiled))
    measured = frame[frame["status"] == "finished"]
    assert len(measured) == 16
    for cell in measured.to_dict("records"):
        run = sweep.client.get_run(cell["run_id"])
        assert cell["value"] == run.data.metrics["cam/val/miou"]
        assert cell["trial_key"] == run.data.tags["semformer.trial_key"]
        assert str(cell["seed"]) == run.data.tags["semformer.seed"]
        line = rf"\| {re.escape(cell['label'])} +\| +{cell['seed']} .*{cell['value']:.2f}.* {cell['run_id'][:8]} "
        assert re.search(line, markdown)
        assert re.search(rf"(?m)^% .*{cell['run_id']}, {cell['trial_key']}$", latex)
    paper_only = frame[frame["row"] == "TS-CAM"].iloc[0]
    assert (paper_only["status"], paper_only["paper"]) == ("paper only", 40.3)
    assert pd.isna(paper_only["value"])


def test_the_printed_filter_finds_the_run(sweep):
    runs = sweep.full()
    compiled = sweep.compiled()
    query = re.search(r"filter: `(.*)`", to_markdown(compiled))[1]
    key = compiled.lines[-1].trials[0].record.trial_key[:8]
    found = sweep.client.search_runs([sweep.id], query.replace("KEY", key))
    assert [run.info.run_id for run in found] == [runs[-1]]
