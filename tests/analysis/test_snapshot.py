"""`semformer-tables snapshot`."""

import re

import pandas as pd
import pytest

from analysis import snapshot
from analysis.cli import main
from tests.analysis.scene import Sweep
from tests.records import record
from tests.workplace import Workplace

TABLE = """\
name: mine
title: Two rows
metrics: [{name: miou, header: mIoU}, {name: fp, header: FP, best: min}, {name: t, header: t, elsewhere: there}]
rows:
  - {id: "1", label: None, set: {segmentor.sigma: 0.1}, paper: {miou: 50}}
  - {id: 1e5, label: 'a, "b"', set: {segmentor.sigma: 0.2}}
"""


def taken(uri, out, *options):
    assert main(["snapshot", "--out", str(out), "--tracking-uri", uri, *options]) == 0
    return snapshot.read(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Workplace(tmp_path_factory.mktemp("snapshot"))
    (place.folder / "own.yaml").write_text(TABLE.replace("id: 1e5", 'id: "1e5"'))
    record(place, place.folder / "own.yaml")
    (place.folder / "own.yaml").unlink()  # it is kept with the sweep
    return place


def test_both_files_read_back_equal_and_as_it_was_measured(place, tmp_path):
    frame = taken(place.uri, tmp_path / "new" / "all.parquet")
    pd.testing.assert_frame_equal(taken(place.uri, tmp_path / "all.csv"), frame)
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == snapshot.SCHEMA
    assert frame[["table", "row", "label", "metric"]].values.tolist() == [
        ["mine", "1", "None", "miou"],
        ["mine", "1", "None", "fp"],
        ["mine", "1e5", 'a, "b"', "miou"],
        ["mine", "1e5", 'a, "b"', "fp"],
    ]
    assert frame["paper"].tolist()[0] == 50
    assert frame["paper"].isna().tolist() == [False, True, True, True]
    for run in place.runs("mine micro", "trial"):
        own, tags, metrics = frame[frame["run_id"] == run.info.run_id], run.data.tags, run.data.metrics
        assert own["value"].tolist() == [metrics["cam/val/miou"], metrics["cam/val/fp"]]
        assert set(own["threshold"]) == {metrics["cam/val/threshold"]}
        told = {name: own[name].unique().tolist() for name in ("trial_key", "commit", "host", "parent_run_id")}
        assert told == {
            "trial_key": [tags["semformer.trial_key"]],
            "commit": [tags["semformer.commit"]],
            "host": ["node-1"],
            "parent_run_id": [tags["mlflow.parentRunId"]],
        }
        assert pd.Timestamp(own["started"].iloc[0]).timestamp() == run.info.start_time // 1000


def test_nothing_is_chosen(sweep, tmp_path):
    """Other settings, failed runs, runs that a newer one replaces: all are there, and a run for each of its rows."""
    ids = [
        sweep.trial("CF", 40.0),
        sweep.trial("CF", 41.0),
        sweep.trial("CF", 50.0, overrides={"segmentor.epochs": 9}),
        sweep.trial("CF", 60.0, protocol={"data": "VOC2012 (1464 images)"}),
        sweep.trial("CF-CB", 42.0, tags={"status": "failed", "reason": "disk full"}),
        sweep.trial("CF-AS", 43.0, rows="CF-AS,gone"),
    ]
    frame = taken(sweep.uri, tmp_path / "all.csv")
    assert sorted(frame["run_id"].unique()) == sorted(ids)
    assert sorted(frame.loc[frame["row"] == "CF", "value"]) == [40, 41, 50, 60]
    (failed,) = frame[frame["row"] == "CF-CB"].to_dict("records")
    assert (failed["status"], failed["reason"], failed["paper"]) == ("failed", "disk full", 43.5)
    assert pd.isna(failed["value"])
    shared = frame[frame["run_id"] == ids[-1]].set_index("row")
    assert shared["value"].to_dict() == {"CF-AS": 43, "gone": 43}
    assert shared["label"].to_dict() == {"CF-AS": "CF + AS", "gone": ""}
    assert pd.isna(shared.loc["gone", "paper"])
    assert set(frame["data"]) == {"", "VOC2012 (1464 images)"}


def test_tables_presets_and_experiments_are_told_apart(database, tmp_path):
    sweeps = [Sweep(database, "table03"), Sweep(database, "table08"), Sweep(database, "table08", "micro")]
    for sweep, row in zip(sweeps, ("CF", "D-32", "D-32"), strict=True):
        sweep.trial(row, 40.0)
    out, uri = tmp_path / "some.parquet", sweeps[0].uri

    def parts(*options):
        return set(map(tuple, taken(uri, out, *options)[["table", "preset"]].values.tolist()))

    assert parts() == {("table03", "tiny"), ("table08", "tiny"), ("table08", "micro")}
    assert parts("table08") == {("table08", "tiny"), ("table08", "micro")}
    assert parts("--preset", "tiny") == {("table03", "tiny"), ("table08", "tiny")}
    assert parts("--experiment", "table08 micro") == {("table08", "micro")}


def test_a_table_that_is_kept_nowhere_is_told(sweep, tmp_path, capsys):
    sweep.trial("CF", 40.0, tags={"rows": "table03/CF,lost/x"})
    assert set(taken(sweep.uri, tmp_path / "all.csv")["table"]) == {"table03"}
    assert "table lost is left out: its file is not among those kept with its sweep" in capsys.readouterr().err


def test_no_empty_file_is_left(sweep, tmp_path, capsys):
    sweep.trial("CF", 40.0, tags={"rows": "lost/x"})
    assert main(["snapshot", "--out", str(tmp_path / "x.csv"), "--tracking-uri", sweep.uri]) == 2
    assert "no table to tell the metrics" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_every_column_is_documented():
    words = re.findall(r"\w+", snapshot.__doc__.partition("\n\n    ")[2])
    assert snapshot.SCHEMA.keys() <= set(words)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "micro"], "no trial with preset micro: there are trials of table03 tiny"),
        (["table08"], "no trial of table08: there are trials of table03 tiny"),
        (["--experiment", "another sweep"], "there is no trial at all: run a sweep first"),
        (["--experiment", "x"], "MLflow has no experiment 'x'"),
        (["tabel03"], "did you mean table03"),
        (["--tracking-uri", "http://127.0.0.1:9"], "--tracking-uri http://127.0.0.1:9: MLflow cannot be used"),
        (["--tracking-uri", "sqlite:////nowhere/mlflow.db"], "there is no MLflow database /nowhere/mlflow.db"),
    ],
)
def test_bad_input_is_told_in_words(sweep, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sweep.trial("CF", 40.0)
    assert main(["snapshot", "--out", str(tmp_path / "x.csv"), "--tracking-uri", sweep.uri, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(("out", "says"), [("x.txt", "ends with .parquet or .csv"), ("file/x.csv", "cannot write")])
def test_a_file_that_cannot_be_written(sweep, tmp_path, capsys, out, says):
    sweep.trial("CF", 40.0)
    (tmp_path / "file").touch()
    try:
        status = main(["snapshot", "--out", str(tmp_path / out), "--tracking-uri", sweep.uri])
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert says in capsys.readouterr().err


def test_tables_of_the_literature_are_built_in(database, tmp_path):
    """Their sweep need not be known."""
    Sweep(database, "table01").trial("SemFormer", 40.0)
    frame = taken(f"sqlite:///{database}/mlflow.db", tmp_path / "all.csv")
    assert frame["metric"].tolist() == ["train_cam/miou", "pseudo/miou"]
    assert frame["paper"].tolist() == [63.7, 73.2]
