"""Sweeps whose records tests make by hand and read back: the stages are made, Ray is not there."""

import secrets
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from semformer import pipeline
from semformer.config import Goal
from semformer.store import Store
from sweeps.plan.table import load_table
from sweeps.plan.trials import Plan, Trial, make_plan
from sweeps.reports import (
    EpochEnded,
    Finished,
    Found,
    Report,
    StageDone,
    Started,
)
from sweeps.tracking.state import SweepState
from sweeps.tracking.tracker import Tracker
from tests import pipelines
from tests.workplace import Workplace

MINE = """\
name: mine
title: Two rows
metrics: [{name: miou, header: mIoU}]
rows:
  - {id: a, label: a, set: {segmentor.sigma: 0.1}, paper: {miou: 50}}
  - {id: b, label: b, set: {segmentor.sigma: 0.2}, paper: {miou: 60}}
"""
EPOCHS = 3
SERIES = {"caae/loss/total": 2, "segmentor/loss/total": EPOCHS, "segmentor/lr": EPOCHS}


def make_folder(folder: Path) -> None:
    """Puts the table there, a store in which both trials are finished, and later MLflow's database."""
    (folder / "mine.yaml").write_text(MINE)
    store, plan = Store(folder / "store"), plan_of(folder)
    for trial in plan.trials:
        pipelines.run(trial.config, trial.data, store)


def plan_of(folder: Path, table: str = "mine.yaml", seeds: tuple[int, ...] = (0,)) -> Plan:
    overrides = {"segmentor.epochs": EPOCHS}
    return make_plan([load_table(folder / table)], "micro", overrides, seeds, None, Store(folder / "store"))


class Driver(Tracker):
    """A tracker that hears reports, with the state that a driver keeps of them."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.state = SweepState(self.sweep)

    def hear(self, trial: Trial, report: Report) -> None:
        self.state.tell(trial, report)
        self.tell(trial, report, self.state.trials[trial.key].tags())


class Recorded:
    """A sweep's own experiment, and what is in it."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.uri = folder, name, f"sqlite:///{folder / 'mlflow.db'}"
        self.store = Store(folder / "store")

    def tracker(self, plan: Plan | None = None, store: Store | None = None, driver: str = "", **options) -> Driver:
        own = self.folder / "sweeps" / f"{self.name}{driver}"
        plan, store = plan or plan_of(self.folder), store or self.store
        return Driver(self.uri, plan, store, self.name, folder=own, **options)

    def runs(self, kind: str) -> dict[str, object]:
        """Trials by their rows, others by name; it is an error to have two of the same."""
        client = MlflowClient(self.uri)
        runs = client.search_runs([client.get_experiment_by_name(self.name).experiment_id])
        runs = [run for run in runs if run.data.tags["semformer.kind"] == kind]
        rows = [run.data.tags.get("semformer.rows", run.info.run_name) for run in runs]
        named = {row.removeprefix("mine/"): run for row, run in zip(rows, runs, strict=True)}
        assert len(named) == len(runs)
        return named

    def series(self, run, metric: str) -> list[tuple[int, float]]:
        return [
            (point.step, point.value) for point in MlflowClient(self.uri).get_metric_history(run.info.run_id, metric)
        ]

    def files(self, run) -> dict[str, Path]:
        root = Path(run.info.artifact_uri.removeprefix("file://"))
        return {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}


def epoch(trial: Trial, store: Store, stage: str, n: int) -> EpochEnded:
    """The report of the end of an epoch, as training gave it."""
    history = store.find(trial.keys[stage]).info["history"]
    values = {name: series[n - 1] for name, series in history.items()}
    return EpochEnded(stage, 1, 1, n, EPOCHS, values)


def done(trial: Trial, stage: str, *, found: bool = False) -> StageDone:
    return StageDone(stage, trial.keys[stage].digest, found, seconds=1.0)


STARTED, FINISHED = Started("node-1", pid=1, gpu="0"), Finished({})
FOUND = Found(("caae", "segmentor", "cams", "evaluate"))


def run_through(tracker: Driver, trial: Trial) -> None:
    tracker.hear(trial, STARTED)
    for stage in trial.keys:
        for n in range(1, 3 if stage == "caae" else EPOCHS + 1 if stage == "segmentor" else 0):
            tracker.hear(trial, epoch(trial, tracker.store, stage, n))
        tracker.hear(trial, done(trial, stage))
    tracker.hear(trial, FINISHED)


def record(place: Workplace, table: Path, data: Path | None = None, until: Goal = "cams", **overrides: Any) -> None:
    """A sweep of a table as its command leaves it in a workplace."""
    plan = make_plan([load_table(table)], "micro", overrides, (0,), data and str(data), place.store, until=until)
    tracker = Driver(place.uri, plan, place.store, folder=place.folder / "sweeps" / secrets.token_hex(4))
    tracker.begin()
    for trial in plan.trials:
        tracker.hear(trial, STARTED)
        made = pipelines.run(trial.config, trial.data, place.store, until=[*trial.keys])
        for stage in made.values():
            tracker.hear(trial, StageDone(stage.stage, stage.key, stage.found, stage.seconds))
        tracker.hear(trial, Finished(pipeline.scores([stage.artifact for stage in made.values()])))
    tracker.end("FINISHED")
    assert tracker.errors == []


def check_complete(recorded: Recorded) -> None:
    """Both trials and the three stages once, finished, their series without gaps or doubles."""
    (parent,) = recorded.runs("sweep").values()
    trials = recorded.runs("trial")
    assert sorted(trials) == ["a", "b"]
    assert len(recorded.runs("stage")) == 3
    for run in trials.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        for name, length in SERIES.items():
            assert [step for step, _ in recorded.series(run, name)] == list(range(1, length + 1)), name
        curve = [step for step, _ in recorded.series(run, "evaluate/threshold_curve/miou")]
        assert curve == sorted(set(curve))
        assert len(curve) == 99
        names = {f.path for f in MlflowClient(recorded.uri).list_artifacts(run.info.run_id)}
        assert {"config.json", "class_iou.json", "threshold_curve.png", "pictures"} < names
