"""`semformer-tables`."""

import re
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from analysis.cli import main
from analysis.render import to_latex, to_markdown
from tests.analysis.scene import TINY, Sweep


def test_command_prints_and_writes(sweep, tmp_path, capsys):
    sweep.full()
    command = ["table03", "--tracking-uri", sweep.uri]
    assert main([*command, "--out", str(tmp_path / "out"), "--format", "both"]) == 0
    printed = capsys.readouterr()
    assert printed.out == to_markdown(sweep.compiled()) + "\n" + to_latex(sweep.compiled())
    assert printed.err.count("wrote ") == 3
    assert main([*command, "--experiment", "another sweep"]) == 2
    assert main([*command, "--seed", "0", "--set", f"segmentor.epochs={TINY.segmentor.epochs}"]) == 0


def test_all_tables_are_read_once_counted_written_and_kept(tables, tmp_path, capsys, monkeypatch):
    sweep, parent = tables
    search, searched = MlflowClient.search_runs, []
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *args, **query: searched.append(query) or search(*args, **query)
    )
    assert main(["--all", "--tracking-uri", sweep.uri, "--out", str(tmp_path / "out"), "--log"]) == 0
    assert len(searched) == 1
    printed = capsys.readouterr().out
    assert re.findall(r"(?m)^### (\w+):", printed) == ["table08", "table11"]
    last = printed.splitlines()[-1]
    assert last.startswith("4 of 53 cells filled; no trial of table01, table02, table03, ")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == ["table08.md", "table11.md"]
    kept = {file.path for file in sweep.client.list_artifacts(parent)}
    assert kept == {"table08.md", "table08.tex", "table11.md", "table11.tex"}


def test_latex_of_several_tables_ends_with_a_comment(tables, capsys):
    sweep, _ = tables
    assert main(["table08", "table11", "--format", "latex", "--tracking-uri", sweep.uri]) == 0
    printed = capsys.readouterr().out
    assert printed.count(r"\begin{table}") == 2
    assert printed.splitlines()[-1] == "% 4 of 6 cells filled"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tabel03"], "did you mean table03"),
        (["table03", "table08", "table03"], "the table table03 is given twice"),
        (
            ["table05", "table08", "--experiment", "table03 tiny"],
            "'table03 tiny' has no trial of table05, table08 with preset tiny: there are trials of table03 tiny",
        ),
        (["table03", "--all"], "give --all alone"),
        ([], "which tables?"),
        (
            ["table03", "--preset", "micro"],
            "MLflow has no trial of table03 with preset micro: there are trials of table03 tiny",
        ),
        (["table03", "--preset", "micro", "--experiment", "table03 tiny"], "there are trials of table03 tiny"),
        (["table03", "--experiment", "another sweep"], "there is no trial at all: run a sweep first"),
        (
            ["table03", "--experiment", "table03 tiny", "--experiment", "x"],
            "MLflow has no experiment 'x': there are 'another sweep', 'table03 tiny'",
        ),
        (["table03", "--seed", "5"], "no trial of these tables has seed 5: there are 0"),
        (["table03", "--data", "VOC"], "no trial of these tables has data VOC: there are not recorded"),
        (["table03", "--set", "segmentor.sigmo=1"], "did you mean segmentor.sigma"),
        (
            ["table03"],
            "no trial of table03 has finished yet: 1 failed, 1 running\nfailed: disk full",
        ),
        (
            ["table03", "--tracking-uri", "http://127.0.0.1:9"],
            "--tracking-uri http://127.0.0.1:9: MLflow cannot be used",
        ),
        (["table03", "--tracking-uri", "mysql://me:secret@127.0.0.1:9/x"], "--tracking-uri mysql://me:***@127"),
        (["table03", "--tracking-uri", "mysql://me:p@s/secret@127.0.0.1:9/x"], "--tracking-uri mysql://me:***@127"),
        (["table03", "--tracking-uri", "nonsense://x"], "--tracking-uri nonsense://x: MLflow cannot be used"),
    ],
)
def test_bad_input_is_told_in_words(sweep, capsys, arguments, says):
    sweep.trial("CF", tags={"status": "failed", "reason": "disk full"})
    sweep.trial("CF-CB", tags={"status": "running"})
    uri = [] if "--tracking-uri" in arguments else ["--tracking-uri", sweep.uri]
    assert main([*arguments, *uri]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "secret" not in error


def test_reading_makes_no_database(tmp_path, capsys):
    path = tmp_path / "deep" / "mlflow.db"
    assert main(["table03", "--tracking-uri", f"sqlite:///{path}"]) == 2
    assert f"there is no MLflow database {path}" in capsys.readouterr().err
    assert not path.parent.exists()


def test_a_deleted_experiment_is_no_experiment(sweep, capsys):
    sweep.full()
    sweep.client.delete_experiment(sweep.id)
    assert main(["table03", "--tracking-uri", sweep.uri]) == 2
    assert "MLflow has no trial of table03 with preset tiny: there is no trial at all" in capsys.readouterr().err


def test_a_file_that_is_no_database_is_told(tmp_path, capsys):
    (tmp_path / "mlflow.db").write_text("this is no database at all" * 100)
    assert main(["table03", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 2
    assert "MLflow cannot be used there" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(sweep, tmp_path, capsys):
    sweep.full()
    (tmp_path / "file").write_text("")
    assert main(["table03", "--tracking-uri", sweep.uri, "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_tables_of_which_all_trials_failed_give_the_reasons(sweep, database, capsys):
    other = Sweep(database, "table08")
    for trial, reason in ((sweep, "disk full"), (other, "out of memory")):
        trial.full([None, None], tags={"status": "failed", "reason": reason})
    assert main(["table03", "table08", "--tracking-uri", sweep.uri]) == 2
    assert capsys.readouterr().err == (
        "error: no trial of table03, table08 has finished yet: 4 failed\nfailed: disk full\nfailed: out of memory\n"
    )


def test_one_table_without_a_finished_trial_is_printed_with_the_others(sweep, database, capsys):
    sweep.full()
    Sweep(database, "table08").full([None], tags={"status": "failed", "reason": "disk full"})
    assert main(["table08", "table03", "--tracking-uri", sweep.uri]) == 0
    out = capsys.readouterr().out
    assert "preset tiny; nothing is measured yet." in out
    assert out.index("### table08") < out.index("### table03")


def test_the_database_is_by_default_that_of_the_environment(sweep, capsys, monkeypatch):
    sweep.full()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sweep.uri)
    assert main(["table03"]) == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(sweep.folder)
    assert main(["table03"]) == 0
    (sweep.folder / "empty").mkdir()
    monkeypatch.chdir(sweep.folder / "empty")
    assert main(["table03"]) == 2


def test_the_data_set_can_be_chosen(sweep, capsys):
    sweep.full(protocol={"data": "shapes A"})
    sweep.full([1.0], protocol={"data": "shapes B"})
    assert main(["table03", "--tracking-uri", sweep.uri, "--data", "shapes B"]) == 0
    assert "measured on split val of shapes B;" in capsys.readouterr().out


def test_version_and_help_tell_what_there_is(capsys):
    for option, told in (
        ("--version", "semformer-tables 0."),
        ("--help", "$MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"),
    ):
        with pytest.raises(SystemExit) as end:
            main([option])
        assert end.value.code == 0
        assert told in " ".join(capsys.readouterr().out.split())


def test_tables_that_cannot_be_kept_are_printed_and_written_all_the_same(tables, capsys):
    sweep, _ = tables
    (sweep.folder / "artifacts").write_text("this is no folder")
    out = sweep.folder / "out"
    assert main(["table08", "--tracking-uri", sweep.uri, "--log", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == (out / "table08.md").read_text()
    assert printed.err.splitlines()[-1].startswith("error: the tables could not be kept in MLflow: ")
    assert "Traceback" not in printed.err


def test_a_table_is_kept_with_the_sweeps_of_its_own_trials(tables, database):
    sweep, parent = tables
    alone = Sweep(database, "table05")
    other = alone.client.create_run(alone.id, tags={"semformer.kind": "sweep"}).info.run_id
    alone.trial("max", 50.0, tags={"mlflow.parentRunId": other})
    assert main(["table05", "table08", "--tracking-uri", sweep.uri, "--log"]) == 0
    kept = [{file.path for file in sweep.client.list_artifacts(run)} for run in (parent, other)]
    assert kept == [{"table08.md", "table08.tex"}, {"table05.md", "table05.tex"}]


def test_a_misspelt_option_prints_no_password(capsys):
    with pytest.raises(SystemExit):
        main(["table03", "--tracking-url", "postgresql://me:secret@host/x"])
    error = capsys.readouterr().err
    assert "postgresql://me:***@host/x" in error
    assert "secret" not in error


def test_who_reads_no_further_is_no_error(sweep):
    sweep.full()
    command = [sys.executable, "-m", "analysis.cli", "table03", "--tracking-uri", sweep.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert "Traceback" not in told
    assert process.returncode == 0


def test_watching_ends_when_nothing_runs_and_prints_what_has_changed(sweep, monkeypatch, capsys):
    """While it sleeps, the sweep goes on: a trial is measured, nothing happens, MLflow is away, the last one fails."""
    first, second = sweep.trial("CF", tags={"status": "running"}), sweep.trial("CF-CB", tags={"status": "queued"})
    split, connect = "val", MlflowClient.search_runs

    def measured():
        sweep.client.log_metric(first, f"cam/{split}/miou", 41.5)
        sweep.client.set_tag(first, "semformer.status", "finished")
        sweep.client.set_terminated(first)

    def away():
        def fail(*_, **__):
            raise ConnectionError("nobody there")

        monkeypatch.setattr(MlflowClient, "search_runs", fail)

    def failed():
        monkeypatch.setattr(MlflowClient, "search_runs", connect)
        sweep.client.set_tag(second, "semformer.status", "failed")
        sweep.client.set_tag(second, "semformer.reason", "it diverged")
        sweep.client.set_terminated(second, "FAILED")

    events = [measured, lambda: None, away, failed]
    monkeypatch.setattr("analysis.cli.time.sleep", lambda seconds: events.pop(0)())
    assert main(["table03", "--tracking-uri", sweep.uri, "--watch"]) == 0
    assert events == []
    told = capsys.readouterr()
    printed = [re.search(r"(?m)^\| mIoU \(%\) ours .*", text)[0] for text in told.out.split("### table03")[1:]]
    assert len(printed) == 3
    assert [line.count("41.5") for line in printed] == [0, 1, 1]
    assert "it diverged" in told.out.split("### table03")[-1]
    assert told.err.count("nobody there") == 1


def test_help_waits_for_no_library():
    """MLflow, scipy and torch take seconds to import."""
    code = "import sys, analysis.cli; print(*sorted({'mlflow', 'scipy', 'torch', 'pandas'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_watching_what_is_not_there_is_an_error(sweep, capsys):
    sweep.trial("CF", 41.5)
    assert main(["table05", "--tracking-uri", sweep.uri, "--watch"]) == 2
    assert "has no trial of table05" in capsys.readouterr().err
