"""The MLflow records of a sweep, without Ray: what a trial reports is told by hand, its stages are really made."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.data import get_source

from semformer import pipeline
from semformer.config import flatten
from semformer.errors import UserError
from semformer.store import Store
from sweeps.plan.table import load_table
from sweeps.plan.trials import Cell, make_plan
from sweeps.reports import (
    EpochEnded,
    Failed,
    Failure,
    Progress,
    Retried,
    Sampled,
    Scope,
    Started,
)
from sweeps.tracking import delivery, rows
from sweeps.tracking.journal import Journal
from sweeps.tracking.runs import steps_of
from sweeps.tracking.tracker import Tracker
from tests.artifacts import eventually
from tests.records import (
    EPOCHS,
    FOUND,
    MINE,
    STARTED,
    done,
    plan_of,
    run_through,
)


def test_a_sweep_is_recorded_in_full(recorded):
    tracker = recorded.tracker()
    plan = tracker.sweep
    assert not tracker.is_complete()
    tracker.begin()
    run_through(tracker, plan.trials[0])
    tracker.hear(plan.trials[1], FOUND)
    tracker.end("FINISHED", {"sweep/finished": 2.0})
    assert tracker.errors == []

    (parent,) = recorded.runs("sweep").values()
    assert parent.info.run_name == "mine micro"
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"sweep/finished": 2.0}
    assert json.loads(parent.data.tags["semformer.plan"])["trials"] == 2
    files = recorded.files(parent)
    assert files["mine.yaml"].read_text() == MINE
    assert json.loads(files["plan.json"].read_text()) == json.loads(json.dumps(plan.as_json()))

    trials = recorded.runs("trial")
    assert sorted(trials) == ["a", "b"]
    for trial in plan.trials:
        run = trials[trial.cells[0].row]
        tags = {name.removeprefix("semformer."): text for name, text in run.data.tags.items()}
        assert run.info.status == "FINISHED"
        assert (tags["status"], tags["rows"], tags["seed"], tags["preset"]) == ("finished", trial.rows[0], "0", "micro")
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["trial_key"] == trial.key
        assert json.loads(tags["stage_keys"]) == {name: key.digest for name, key in trial.keys.items()}
        found = trial.rows == ("mine/b",)
        assert json.loads(tags["stages_found"]) == dict.fromkeys(trial.keys, found)
        assert json.loads(tags["masks_read_by"]) == ["evaluate"]
        expected = {
            "data": trial.data_name,
            "eval_split": "val",
            "scales": [0.5, 1.0],
            "flip": True,
            "erosion": 0,
            "rule": "oracle",
        }
        assert json.loads(tags["protocol"]) == expected
        assert tags["version.torch"] == pipeline.versions()["torch"]
        assert run.data.params == {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in flatten(trial.config).items()
            if name.partition(".")[0] in ("seed", "precision", "data", *trial.keys)
        }
        artifact = recorded.store.find(trial.keys["evaluate"])
        assert artifact.info["metrics"].items() <= run.data.metrics.items()
        history = recorded.store.find(trial.keys["segmentor"]).info["history"]
        for name, metric in (("CF", "segmentor/loss/CF"), ("total", "segmentor/loss/total"), ("lr", "segmentor/lr")):
            assert recorded.series(run, metric) == list(enumerate(history[name], start=1))
        assert [step for step, _ in recorded.series(run, "caae/loss/recon")] == [1, 2]
        files = recorded.files(run)
        assert {"config.json", "metrics.json", "class_iou.parquet", "threshold_curve.parquet"} < set(files)
        assert len([name for name in files if name.startswith("pictures/") and name.endswith(".png")]) == 2
        assert len(pd.read_parquet(files["threshold_curve.parquet"])) >= 99

    stages = recorded.runs("stage")
    assert sorted(run.data.tags["semformer.stage"] for run in stages.values()) == ["caae", "segmentor", "segmentor"]
    for run in stages.values():
        stage = run.data.tags["semformer.stage"]
        key = next(t.keys[stage] for t in plan.trials if t.keys[stage].digest == run.data.tags["semformer.stage_key"])
        info = recorded.store.find(key).info
        assert run.data.metrics["seconds"] == info["seconds"]
        assert recorded.series(run, f"{stage}/loss/total") == list(enumerate(info["history"]["total"], start=1))
        assert (run.info.end_time - run.info.start_time) / 1000 == pytest.approx(info["seconds"], abs=0.01)

    again = recorded.tracker()
    assert again.is_complete()
    left = Journal(again.folder)
    assert (left.undelivered, left.described(plan.trials[0].key)) == (0, None)
    left.close()
    assert all(again.is_recorded(trial) for trial in plan.trials)


def test_recording_twice_adds_nothing(recorded):
    def record():
        tracker = recorded.tracker()
        tracker.begin()
        for trial in tracker.sweep.trials:
            run_through(tracker, trial)
        tracker.end("FINISHED", {})
        assert tracker.errors == []
        runs = [run for kind in ("sweep", "trial", "stage") for run in recorded.runs(kind).values()]
        return {(r.info.run_id, m): recorded.series(r, m) for r in runs for m in r.data.metrics}

    assert record() == record()


def test_a_sweep_with_events_to_deliver_is_not_complete(recorded):
    tracker = recorded.tracker()
    tracker.begin()
    for trial in tracker.sweep.trials:
        run_through(tracker, trial)
    tracker.end("FINISHED")
    assert recorded.tracker().is_complete()
    journal = Journal(tracker.folder)
    journal.append({"event": "file", "time": time.time(), "name": "a.txt"})
    journal.close()
    assert not recorded.tracker().is_complete()


def test_a_trial_that_is_found_and_recorded_is_left_as_it_is(recorded):
    def find() -> dict[Path, float]:
        tracker = recorded.tracker()
        tracker.begin()
        for trial in tracker.sweep.trials:
            tracker.hear(trial, FOUND)
        tracker.end("FINISHED")
        assert tracker.errors == []
        files = [path for run in recorded.runs("trial").values() for path in recorded.files(run).values()]
        return {path: path.stat().st_mtime for path in files}

    first = find()
    assert len(first) > 10
    assert find() == first


def test_a_failure_is_recorded_with_its_reason_and_mended_later(recorded):
    tracker = recorded.tracker()
    a, b = tracker.sweep.trials
    tracker.begin()
    tracker.hear(a, STARTED)
    message = "too fast " + "!" * 20_000
    failure = Failure(Scope.STAGE, "segmentor", "TrainingDiverged", message, traceback="Traceback: here")
    tracker.hear(a, Failed(failure))
    tracker.hear(b, STARTED)
    tracker.hear(b, Retried(Failure(Scope.TRIAL, "caae", "WorkerDied", "killed")))
    run_through(tracker, b)
    tracker.end("FAILED")
    assert tracker.errors == []
    runs = recorded.runs("trial")
    assert runs["a"].info.status == "FAILED"
    assert runs["a"].data.tags["semformer.status"] == "failed"
    assert runs["a"].data.tags["semformer.reason"].startswith("segmentor: TrainingDiverged: too fast")
    assert "Traceback: here" in recorded.files(runs["a"])["failure.txt"].read_text()
    assert runs["b"].info.status == "FINISHED"
    assert runs["b"].data.tags["semformer.reason"] == ""
    assert next(iter(recorded.runs("sweep").values())).info.status == "FAILED"

    again = recorded.tracker()
    assert [again.is_recorded(trial) for trial in (a, b)] == [False, True]
    again.begin()
    again.hear(a, FOUND)
    again.end("FINISHED")
    mended = recorded.runs("trial")["a"]
    assert mended.info.run_id == runs["a"].info.run_id
    assert (mended.info.status, mended.data.tags["semformer.reason"]) == ("FINISHED", "")


def test_renamed_rows_rename_the_records_of_their_trials(recorded):
    folder = recorded.folder
    tracker = recorded.tracker()
    tracker.begin()
    for trial in tracker.sweep.trials:
        tracker.hear(trial, FOUND)
    tracker.end("FINISHED")

    (folder / "renamed.yaml").write_text(MINE.replace("id: a", "id: first"))
    renamed = recorded.tracker(plan_of(folder, "renamed.yaml"))
    assert not renamed.is_complete()
    renamed.begin()
    for trial in renamed.sweep.trials:
        renamed.hear(trial, FOUND)
    renamed.end("FINISHED")
    names = {row: run.info.run_name for row, run in recorded.runs("trial").items()}
    assert names == {"first": "first, seed 0", "b": "b, seed 0"}
    assert recorded.tracker(plan_of(folder, "renamed.yaml")).is_complete()


def test_more_seeds_extend_a_sweep(recorded):
    for seeds in ((0,), (0, 1), (1,)):
        tracker = recorded.tracker(plan_of(recorded.folder, seeds=seeds))
        assert not tracker.is_complete()
        tracker.begin()
        for trial in tracker.sweep.trials:
            if trial.config.seed == 0:
                tracker.hear(trial, FOUND)
        tracker.end("FINISHED")
    assert recorded.tracker().is_complete()
    (parent,) = recorded.runs("sweep").values()
    client = MlflowClient(recorded.uri)
    runs = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    trials = sorted(run.info.run_name for run in runs if run.data.tags["semformer.kind"] == "trial")
    assert trials == ["a, seed 0", "a, seed 1", "b, seed 0", "b, seed 1"]


def test_a_sweep_of_some_tables_keeps_the_rows_of_others(recorded):
    """A table that another sweep filled must not lose its cells because one of them is swept again."""
    folder = recorded.folder
    (folder / "other.yaml").write_text(MINE.replace("name: mine", "name: other").replace("id: b", "id: only-b"))
    (folder / "fewer.yaml").write_text(MINE.replace("id: b", "id: c").replace("0.2", "0.3"))

    def sweep(*tables: str) -> dict[float, dict[str, str]]:
        overrides = {"segmentor.epochs": EPOCHS}
        loaded = [load_table(folder / table) for table in tables]
        tracker = recorded.tracker(make_plan(loaded, "micro", overrides, (0,), None, recorded.store))
        tracker.begin()
        for trial in tracker.sweep.trials:
            if trial.config.segmentor.sigma != 0.3:
                tracker.hear(trial, FOUND)
        tracker.end("FINISHED")
        assert tracker.errors == []
        runs = recorded.runs("trial").values()
        return {json.loads(run.data.params["segmentor.sigma"]): run.data.tags for run in runs if run.data.params}

    both = sweep("mine.yaml", "other.yaml")
    parent = both[0.1]["mlflow.parentRunId"]
    assert both[0.1]["semformer.rows"] == "mine/a,other/a"
    again = sweep("other.yaml")
    assert again[0.1]["semformer.rows"] == "mine/a,other/a"
    assert again[0.1]["semformer.table"] == "mine,other"
    assert again[0.1]["mlflow.parentRunId"] == parent
    renamed = sweep("fewer.yaml")  # its table `mine` has no row b
    assert renamed[0.1]["semformer.rows"] == "other/a,mine/a"
    assert renamed[0.2]["semformer.rows"] == "mine/b,other/only-b"  # of a trial that it does not ask for


def test_rows_that_are_too_many_for_a_tag_go_on_in_others():
    names = [f"table/a-row-with-a-long-name-{n}" for n in range(400)]
    found = {name.removeprefix("semformer."): text for name, text in rows.tags(names).items()}
    assert max(map(len, found.values())) <= 4000
    assert rows.read(found) == names
    fewer = rows.merged(found, names[:2], ["table"])
    now = found | {name.removeprefix("semformer."): text for name, text in fewer.items()}
    assert rows.read(now) == names[:2]
    again = rows.merged({"rows": "study/trial-7"}, ["study/trial-7"], tables=[])  # of a search, which has no table
    assert again["semformer.rows"] == "study/trial-7"


def test_a_trial_that_waits_has_a_run_with_no_more_than_its_tags(recorded):
    tracker = recorded.tracker()
    tracker.begin()
    eventually(lambda: tracker.undelivered == 0)
    for run in recorded.runs("trial").values():
        assert (run.info.status, run.data.tags["semformer.status"]) == ("SCHEDULED", "queued")
        assert (run.data.params, recorded.files(run)) == ({}, {})
    tracker.end("KILLED")


def test_losses_that_are_not_finite_are_recorded(recorded):
    tracker = recorded.tracker()
    trial = tracker.sweep.trials[0]
    tracker.begin()
    tracker.hear(trial, STARTED)
    for n, value in enumerate([1.0, math.nan, math.inf, 2.0], start=1):
        tracker.hear(trial, EpochEnded("segmentor", 1, 1, n, 4, {"total": value}))
    tracker.end("KILLED")
    assert tracker.errors == []
    series = recorded.series(recorded.runs("trial")["a"], "segmentor/loss/total")
    assert [step for step, _ in series] == [1, 2, 3, 4]
    assert math.isnan(series[1][1])


def test_a_changed_table_file_is_recorded_anew(recorded):
    tracker = recorded.tracker()
    tracker.begin()
    for trial in tracker.sweep.trials:
        tracker.hear(trial, FOUND)
    tracker.end("FINISHED")
    (recorded.folder / "corrected.yaml").write_text(MINE.replace("miou: 60", "miou: 61"))
    corrected = recorded.tracker(plan_of(recorded.folder, "corrected.yaml"))
    assert not corrected.is_complete()
    corrected.begin()
    corrected.end("FINISHED")
    (parent,) = recorded.runs("sweep").values()
    assert "61" in recorded.files(parent)["mine.yaml"].read_text()


def test_what_cannot_be_written_is_told_and_loses_nothing_else(recorded, tmp_path):
    empty = Store(tmp_path / "empty")
    tracker = recorded.tracker(store=empty)
    a, b = tracker.sweep.trials
    tracker.begin()
    tracker.hear(a, STARTED)
    tracker.hear(a, done(a, "caae"))  # no such artifact
    tracker.hear(b, Failed(Failure(Scope.NODE, "", "UserError", "no data")))
    tracker.end("FAILED")
    (error,) = tracker.errors
    assert str(a.keys["caae"]) in error
    assert recorded.runs("trial")["b"].data.tags["semformer.reason"] == "UserError: no data"


def test_scores_are_there_though_the_artifacts_cannot_be_kept(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "PATIENCE", 1.0)
    tracker = recorded.tracker()
    tracker.begin()
    eventually(lambda: tracker.undelivered == 0)
    folder = Path(recorded.runs("trial")["a"].info.artifact_uri.removeprefix("file://")).parents[1]
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("no folder")  # root may write into one without permission
    try:
        for trial in tracker.sweep.trials:
            run_through(tracker, trial)
        started = time.monotonic()
        tracker.end("FINISHED")
    finally:
        folder.unlink()
    assert time.monotonic() - started < 40  # the patience is for a cause, not for each event
    assert "Error" in tracker.errors[0]
    for run in recorded.runs("trial").values():
        assert (run.info.status, run.data.tags["semformer.status"]) == ("FINISHED", "finished")
        assert "cam/val/miou" in run.data.metrics
        assert run.data.params


def test_the_events_of_a_run_that_was_deleted_hold_up_no_others(recorded):
    tracker = recorded.tracker()
    a, b = tracker.sweep.trials
    tracker.begin()
    eventually(lambda: tracker.undelivered == 0)
    MlflowClient(recorded.uri).delete_run(recorded.runs("trial")["a"].info.run_id)
    tracker._recorder.forget()
    for trial in (a, b):
        run_through(tracker, trial)
    started = time.monotonic()
    tracker.end("FINISHED")
    assert time.monotonic() - started < 30
    assert "the run of trial" in tracker.errors[0]
    assert recorded.runs("trial")["b"].info.status == "FINISHED"


def test_what_a_trial_tells_of_its_machine_is_recorded_once(recorded):
    tracker = recorded.tracker()
    trial = tracker.sweep.trials[0]
    tracker.begin()
    tracker.hear(trial, Started("node-7", pid=3, gpu="2"))
    for value in (10.0, 20.0):
        tracker.hear(trial, Sampled({"system/cpu_utilization_percentage": value}))
        time.sleep(1.1)
    tracker.hear(trial, Progress("caae", 1, 2, values={"not": 1.0}))  # not for MLflow
    tracker.end("KILLED")
    run = recorded.runs("trial")["a"]
    assert (run.data.tags["semformer.host"], run.data.tags["semformer.gpu"]) == ("node-7", "2")
    (first, _), (second, _) = recorded.series(run, "system/cpu_utilization_percentage")
    assert 0 <= first < second <= 5  # seconds
    assert "not" not in run.data.metrics


def test_the_data_sets_are_recorded_with_their_digests(recorded):
    tracker = recorded.tracker()
    tracker.begin()
    trial = tracker.sweep.trials[0]
    tracker.hear(trial, STARTED)
    tracker.end("KILLED")
    inputs = recorded.runs("trial")["a"].inputs.dataset_inputs
    told = {i.tags[0].value: (i.dataset.name.split()[-1], i.dataset.digest) for i in inputs}
    digests = {stage: trial.keys[stage].spec["data"]["images"][:12] for stage in ("segmentor", "evaluate")}
    assert told == {"training": ("train", digests["segmentor"]), "evaluation": ("val", digests["evaluate"])}
    shapes = trial.config.data.shapes.model_dump()
    assert get_source(inputs[0].dataset).to_dict() == {"tags": {"semformer.data.shapes": shapes}}


def test_the_parent_keeps_files_progress_and_a_view(recorded, tmp_path):
    tracker = recorded.tracker()
    tracker.begin()
    (tmp_path / "plot.png").write_bytes(b"a picture")
    tracker.log_file(tmp_path / "plot.png", "study/plot.png")
    (tmp_path / "plot.png").unlink()  # it was taken over at once
    tracker.log_file("first", "table.md")
    tracker.log_file("second", "table.md")
    tracker.progress({"sweep/finished": 0.0})
    tracker.progress({"sweep/finished": 1.0})  # too soon
    tracker.end("FINISHED", {"sweep/finished": 2.0})
    assert tracker.errors == []
    (parent,) = recorded.runs("sweep").values()
    files = recorded.files(parent)
    assert files["study/plot.png"].read_bytes() == b"a picture"
    assert files["table.md"].read_text() == "second"
    assert [value for _, value in recorded.series(parent, "sweep/finished")] == [0.0, 2.0]
    assert "`cam/val/miou`" in parent.data.tags["mlflow.note.content"]
    tags = MlflowClient(recorded.uri).get_experiment(parent.info.experiment_id).tags
    columns = json.loads(tags["mlflow.sharedViewState.semformer"])["selectedColumns"]
    assert {"metrics.`cam/val/miou`", "tags.`semformer.rows`", "params.`segmentor.sigma`"} <= set(columns)
    assert tracker.view_url is None  # no server shows an sqlite database


def test_trials_of_a_search_are_added_as_it_goes_on(recorded):
    plan = plan_of(recorded.folder)
    found = replace(plan.trials[0], cells=(Cell("my study", "trial-7", 0),))
    tracker = recorded.tracker(replace(plan, name="my study", tables=(), trials=()))
    tracker.begin()
    tracker.add(found)
    run_through(tracker, found)
    tracker.end("FINISHED")
    assert tracker.errors == []
    (run,) = recorded.runs("trial").values()
    assert run.info.run_name == "trial-7, seed 0"
    assert run.data.tags["semformer.search"] == "my study"


# MLflow that cannot be used


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "nonsense://x", "./mlruns", "postgresql://me:secret@127.0.0.1:9/x"]
)
def test_an_unusable_tracking_uri_is_told_soon(records, uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"--tracking-uri .*MLflow cannot be used there") as error:
        Tracker(uri, plan_of(records), Store(records / "store"), folder=records / "sweep")
    assert time.monotonic() - started < 30
    assert "secret" not in str(error.value)


def test_a_deleted_experiment_is_told(recorded):
    recorded.tracker()
    client = MlflowClient(recorded.uri)
    client.delete_experiment(client.get_experiment_by_name(recorded.name).experiment_id)
    with pytest.raises(UserError, match=r"was deleted: restore it .* or give another name with --experiment"):
        recorded.tracker()


# What is known of a series


def test_steps_that_are_there_are_known_and_gaps_are_not():
    epochs, seconds = steps_of("segmentor/loss/CF", [1, 2, 5]), steps_of("system/cpu", [10, 30])
    assert [step in epochs for step in (0, 1, 2, 3, 5, 6)] == [False, True, True, False, True, False]
    assert [step in seconds for step in (5, 30, 31)] == [True, True, False]
    epochs.add(3)
    epochs.add(4)
    seconds.add(40)
    assert (epochs.upto, epochs.others) == (5, set())
    assert [step in seconds for step in (40, 41)] == [True, False]
