"""Writes the events of a sweep to MLflow; writing an event twice changes nothing.

A run is found again by a tag (the key of the sweep, trial or stage) and made under a lease in the store, so that two
drivers never make it twice. A point of a series that is there already, by metric and step, is left as it is.

Tags begin with "semformer."; metrics are "<stage>/loss/<term>", "<stage>/lr" ... by epoch (1, 2, ...), the final ones
of stage evaluate ("cam/val/miou"), "<stage>/seconds", "evaluate/threshold_curve/<score>" by threshold in percent, and
"system/<name>" by seconds since the trial was planned.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID

from semformer.config import Config, LossName, flatten
from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.leases import Lease
from semformer.store import Artifact, Store
from sweeps.plan.trials import Cell, Trial
from sweeps.tracking import exhibits
from sweeps.tracking.connection import TAG, connecting, open_experiment, search_runs, without_password
from sweeps.tracking.journal import Event

LOSSES = {*get_args(LossName), "recon", "total"}
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 800, 100, 100  # MLflow takes 1000 items in all
TAG_LENGTH = 5000
ENDED = ("FINISHED", "FAILED", "KILLED")

Point = tuple[str, int, float]
"""Metric, step, value."""


class MissingArtifact(UserError):
    """A stage that was reported as done is not in the store."""


@dataclass
class _Pending:
    """What is to be written to one run in one go."""

    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    ended: int | None = None


class Recorder:
    """`write` takes events as `sweeps.tracking` makes them. After an error, `forget` and write them all again.

    `files` is the folder of the files that events name. Raises UserError when MLflow cannot be reached at `uri`.
    """

    def __init__(self, uri: str, store: Store, files: Path):
        self.uri, self.store, self.files = uri, store, files
        self.experiment = self.experiment_id = self._sweep_key = ""
        self.parent_run_id: str | None = None  # when the sweep's run has been found or made
        self._trials: dict[str, Trial] = {}
        self._started: set[str] = set()  # keys of the trials that this sweep has running
        self._found: dict[str, dict[str, bool]] = {}  # by trial key
        self.forget()
        with connecting(uri), self._alone():  # the first client of a new database makes its tables
            self._client = MlflowClient(tracking_uri=uri)

    # Reading

    def open(self, experiment: str) -> dict[tuple[str, str], Run]:
        """Work in this experiment, made where there is none. Raises UserError.

        Returns its runs by kind ("sweep", "trial" or "stage") and key; of several, a finished one, else the oldest.
        """
        with connecting(self.uri), self._alone():
            self.experiment, self.experiment_id = experiment, open_experiment(self._client, experiment)
            for run in search_runs(self._client, self.experiment_id):
                self._keep(run)
        return dict(self._runs)

    def _alone(self) -> Lease:
        """Among the drivers on this store that write to this MLflow."""
        key = StageKey("mlflow", {"uri": without_password(self.uri)})
        return self.store.lease(key, wait=lambda holder: None)

    def answers(self) -> bool:
        """Whether MLflow can be reached."""
        try:
            self._client.search_experiments(max_results=1)
            return True
        except Exception:
            return False

    # Writing

    def learn(self, event: Event) -> None:
        """Take note of an event that was written before."""
        kind = event["event"]
        if kind == "sweep":
            self._sweep_key = event["key"]
            if event["experiment"] != self.experiment:
                self.open(event["experiment"])
        elif kind == "trial":
            self._trials[event["key"]] = _trial_of(event)
        elif kind == "start":
            self._started.add(event["key"])
        elif kind in ("finished", "failed", "pruned"):
            self._started.discard(event["key"])

    def write(self, events: Iterable[Event]) -> None:
        """Write events in order, those of one run in one go. Raises whatever MLflow or the store raises."""
        with ExitStack() as self._leases:
            self._has_lease = False
            for event in events:
                self.learn(event)
                HANDLERS[event["event"]](self, event, int(1000 * event["time"]))
            self._flush()

    def forget(self) -> None:
        """Believe nothing about what MLflow holds; it is read again."""
        self._runs: dict[tuple[str, str], Run] = {}  # by kind and key
        self._points: dict[str, dict[str, dict[int, float]]] = {}  # run id -> metric -> step -> value
        self._pending: dict[str, _Pending] = {}  # by run id
        self._recorded: set[str] = set()  # digests of stages whose runs are complete

    # One method for each kind of event; `time` is the event's, in milliseconds

    def _sweep(self, event: Event, time: int) -> None:
        run = self._find_or_create("sweep", event["key"], event["name"], event["tags"], time)
        self.parent_run_id = run.info.run_id
        self._to(run).tags |= event["tags"]
        self._to(run).status = "RUNNING"
        for name, value in event["experiment_tags"].items():
            self._client.set_experiment_tag(self.experiment_id, name, value)

    def _trial(self, event: Event, time: int) -> None:
        trial, name = self._trials[event["key"]], event["name"]
        tags = event["tags"] | {MLFLOW_PARENT_RUN_ID: self._parent().info.run_id}
        first = tags | event["first_tags"] | {f"{TAG}status": "queued"}
        run = self._find_or_create("trial", trial.key, name, first, time, status="SCHEDULED")
        if not tags.items() <= run.data.tags.items():
            self._to(run).tags |= tags
        if run.info.run_name != name:
            self._client.update_run(run.info.run_id, name=name)
        params = _params(flatten(trial.config))
        if not params.keys() <= run.data.params.keys():
            self._client.log_dict(run.info.run_id, trial.config.model_dump(mode="json"), "config.json")
            self._client.log_inputs(run.info.run_id, datasets=exhibits.datasets(trial))
            self._to(run).params |= {name: text for name, text in params.items() if name not in run.data.params}

    def _start(self, event: Event, time: int) -> None:
        pending = self._to(self._run_of(event))
        where = {f"{TAG}{name}": str(event[name]) for name in ("host", "gpu") if event.get(name) is not None}
        commit = {f"{TAG}commit": event["commit"], MLFLOW_GIT_COMMIT: event["commit"]}
        pending.tags |= {f"{TAG}status": "running", f"{TAG}reason": "", **commit, **where}
        pending.status = "RUNNING"

    def _epoch(self, event: Event, time: int) -> None:
        stage, values = event["stage"], event["values"]
        points = [(_series_name(stage, name), event["epoch"], value) for name, value in values.items()]
        self._measure(self._run_of(event), points, time)

    def _system(self, event: Event, time: int) -> None:
        run = self._run_of(event)
        step = _seconds_since_start(run, time)
        self._measure(run, [(name, step, value) for name, value in event["values"].items()], time)

    def _stage(self, event: Event, time: int) -> None:
        trial, stage, run = self._trials[event["key"]], event["stage"], self._run_of(event)
        artifact = self._artifact(trial, stage, verify=False)
        points = list(_history(artifact))
        self._hold()
        self._refresh(run, points)
        self._measure(run, points, time)
        found = self._found.setdefault(trial.key, {})
        found[stage] = event["found"]
        self._to(run).tags[f"{TAG}stages_found"] = json.dumps(found)
        if points and artifact.key.digest not in self._recorded:
            self._record_stage(trial, artifact, points, event["commit"])
            self._recorded.add(artifact.key.digest)

    def _record_stage(self, trial: Trial, artifact: Artifact, points: list[Point], commit: str) -> None:
        """A run of its own for a stage that was trained, from its artifact alone."""
        info, stage = artifact.info, artifact.key.stage
        ended = int(1000 * datetime.fromisoformat(info["created"]).timestamp())
        tags = {
            f"{TAG}stage": stage,
            f"{TAG}commit": commit,
            f"{TAG}host": info["host"],
            MLFLOW_PARENT_RUN_ID: self._parent().info.run_id,
            **version_tags(info["versions"]),
        }
        started = ended - int(1000 * info["seconds"])
        run = self._find_or_create("stage", artifact.key.digest, str(artifact.key), tags, started)
        if run.info.status == "FINISHED":
            return
        self._to(run).params |= _params(flatten(getattr(trial.config, stage)))
        self._measure(run, [("seconds", 0, info["seconds"]), *points], ended)
        self._to(run).status, self._to(run).ended = "FINISHED", ended

    def _finished(self, event: Event, time: int) -> None:
        trial, run = self._trials[event["key"]], self._run_of(event)
        run_id, artifact = run.info.run_id, self._artifact(trial, "evaluate")
        stages = {name: self.store.find(key, verify=False) for name, key in trial.keys.items()}
        seconds = {f"{name}/seconds": stage.info["seconds"] for name, stage in stages.items() if stage}
        objectives = {f"objective/{name}": value for name, value in event.get("objectives", {}).items()}
        final = artifact.info["metrics"] | seconds | objectives
        curve = exhibits.curve_points(artifact)
        self._measure(run, [*((name, 0, value) for name, value in final.items()), *curve], time)
        for name in artifact.files:
            self._client.log_artifact(run_id, str(artifact.file(name)), _folder_of(name))
        self._client.log_figure(run_id, exhibits.curve_figure(artifact), exhibits.CURVE_PICTURE)
        self._client.log_dict(run_id, exhibits.class_table(artifact), exhibits.CLASS_TABLE)
        shown = json.dumps([{"path": exhibits.CLASS_TABLE, "type": "table"}])
        self._to(run).tags |= {f"{TAG}status": "finished", f"{TAG}reason": "", MLFLOW_LOGGED_ARTIFACTS: shown}
        self._to(run).status, self._to(run).ended = "FINISHED", time

    def _register(self, event: Event, time: int) -> None:
        from sweeps.tracking import registry  # PyTorch's exporter takes seconds to import

        self._flush()
        trial, run = self._trials[event["key"]], self._run_of(event)
        trained, evaluate = (self._artifact(trial, stage) for stage in ("segmentor", "evaluate"))
        registry.register(self.uri, event["name"], run, trial, trained, evaluate)

    def _retry(self, event: Event, time: int) -> None:
        reason = _cut(f"tried again after {event['reason']}")
        self._to(self._run_of(event)).tags |= {f"{TAG}status": "queued", f"{TAG}reason": reason}

    def _failed(self, event: Event, time: int) -> None:
        run = self._run_of(event)
        self._client.log_text(run.info.run_id, f"{event['reason']}\n\n{event['traceback']}", "failure.txt")
        self._to(run).tags |= {f"{TAG}status": "failed", f"{TAG}reason": _cut(event["reason"])}
        self._to(run).status, self._to(run).ended = "FAILED", time

    def _pruned(self, event: Event, time: int) -> None:
        """Stopped by a scheduler; its run has the epochs that there were."""
        run = self._to(self._run_of(event))
        run.tags |= {f"{TAG}status": "pruned", f"{TAG}reason": ""}
        run.status, run.ended = "KILLED", time

    def _file(self, event: Event, time: int) -> None:
        name = event["name"]
        self._client.log_artifact(self._parent().info.run_id, str(self.files / name), _folder_of(name))

    def _progress(self, event: Event, time: int) -> None:
        parent = self._parent()
        step = _seconds_since_start(parent, time)
        self._to(parent).metrics += [Metric(name, value, time, step) for name, value in event["values"].items()]

    def _end(self, event: Event, time: int) -> None:
        self._progress(event, time)
        self._flush()
        for run in search_runs(self._client, self.experiment_id):
            key = run.data.tags.get(f"{TAG}trial_key")
            others = run.info.status == "RUNNING" and key not in self._started  # by another driver
            if key in self._trials and run.info.status not in ENDED and not others:
                self._to(run).tags |= {f"{TAG}status": "queued", f"{TAG}reason": "the sweep was stopped"}
                self._to(run).status, self._to(run).ended = "KILLED", time
        parent = self._parent()
        self._to(parent).status, self._to(parent).ended = event["status"], time

    # Runs

    def _parent(self) -> Run:
        return self._find("sweep", self._sweep_key)

    def _run_of(self, event: Event) -> Run:
        return self._find("trial", event["key"])

    def _find(self, kind: str, key: str) -> Run:
        run = self._runs.get((kind, key)) or self._reread(kind, key)
        if run is None:
            raise UserError(f"the run of {kind} {key} has gone from the MLflow experiment {self.experiment!r}")
        return run

    def _find_or_create(
        self, kind: str, key: str, name: str, tags: Mapping[str, str], time: int, status: str | None = None
    ) -> Run:
        if run := self._runs.get((kind, key)):
            return run
        self._hold()
        if run := self._reread(kind, key):
            return run
        tags = {**tags, f"{TAG}kind": kind, f"{TAG}{kind}_key": key}
        run = self._client.create_run(self.experiment_id, start_time=time, tags=tags, run_name=name)
        self._points[run.info.run_id] = {}
        self._to(run).status = status
        self._keep(run)
        return run

    def _hold(self) -> None:
        """Make runs, and complete series, alone among the drivers on this store; until the end of `write`."""
        if not self._has_lease:
            self._leases.enter_context(self._alone())
            self._has_lease = True

    def _reread(self, kind: str, key: str) -> Run | None:
        for run in search_runs(self._client, self.experiment_id, f"tags.`{TAG}{kind}_key` = '{key}'"):
            self._keep(run)
        return self._runs.get((kind, key))

    def _keep(self, run: Run) -> None:
        kind = run.data.tags.get(f"{TAG}kind", "")
        known = self._runs.get((kind, key := run.data.tags.get(f"{TAG}{kind}_key", "")))
        if known is None or run.info.run_id == known.info.run_id or run.info.status == "FINISHED" != known.info.status:
            self._runs[kind, key] = run

    # Series

    def _measure(self, run: Run, points: Iterable[Point], time: int) -> None:
        """Write the points that the run does not have yet."""
        known = self._known(run.info.run_id)
        for name, step, value in points:
            series = known.setdefault(name, {})
            if step not in series:
                series[step] = value
                self._to(run).metrics.append(Metric(name, value, time, step))

    def _known(self, run_id: str) -> dict[str, dict[int, float]]:
        if run_id not in self._points:
            names = self._client.get_run(run_id).data.metrics
            self._points[run_id] = {name: self._series(run_id, name) for name in names}
        return self._points[run_id]

    def _refresh(self, run: Run, points: Iterable[Point]) -> None:
        """Read again the series that another driver may have gone on with: their last values are not ours."""
        self._flush()
        known, latest = self._known(run.info.run_id), self._client.get_run(run.info.run_id).data.metrics
        for name in {name for name, _, _ in points} & latest.keys():
            series = known.get(name)
            if not series or series[max(series)] != latest[name]:
                known[name] = self._series(run.info.run_id, name)

    def _series(self, run_id: str, name: str) -> dict[int, float]:
        return {point.step: point.value for point in self._client.get_metric_history(run_id, name)}

    # What is to be written

    def _to(self, run: Run) -> _Pending:
        return self._pending.setdefault(run.info.run_id, _Pending())

    def _flush(self) -> None:
        for run_id, pending in self._pending.items():
            params = [Param(name, text) for name, text in pending.params.items()]
            tags = [RunTag(name, text) for name, text in pending.tags.items()]
            for call in _calls(pending.metrics, params, tags):
                self._client.log_batch(run_id, **call)
            if pending.status in ENDED:
                self._client.set_terminated(run_id, pending.status, pending.ended)
            elif pending.status:
                self._client.update_run(run_id, status=pending.status)
        self._pending = {}

    def _artifact(self, trial: Trial, stage: str, *, verify: bool = True) -> Artifact:
        artifact = self.store.find(trial.keys[stage], verify=verify)
        if artifact is None:
            raise MissingArtifact(f"{trial.keys[stage]} has gone from the store {self.store.root}")
        return artifact


HANDLERS: dict[str, Callable[[Recorder, Event, int], None]] = {
    "sweep": Recorder._sweep,
    "trial": Recorder._trial,
    "start": Recorder._start,
    "epoch": Recorder._epoch,
    "system": Recorder._system,
    "stage": Recorder._stage,
    "finished": Recorder._finished,
    "register": Recorder._register,
    "retry": Recorder._retry,
    "failed": Recorder._failed,
    "pruned": Recorder._pruned,
    "file": Recorder._file,
    "progress": Recorder._progress,
    "end": Recorder._end,
}


def trial_event(trial: Trial) -> Event:
    """A trial in plain JSON values: all that is needed to record it without its plan."""
    return {
        "key": trial.key,
        "config": trial.config.model_dump(mode="json"),
        "data": str(trial.data or ""),
        "data_name": trial.data_name,
        "keys": {name: key.spec for name, key in trial.keys.items()},
        "cells": trial.cells,
    }


def version_tags(versions: Mapping[str, str]) -> dict[str, str]:
    return {f"{TAG}version.{name}": version for name, version in versions.items()}


def _trial_of(event: Event) -> Trial:
    keys = {name: StageKey(name, spec) for name, spec in event["keys"].items()}
    cells = tuple(Cell(*cell) for cell in event["cells"])
    data = Path(event["data"]) if event["data"] else None
    return Trial(Config.model_validate(event["config"]), data, event["data_name"], keys, cells)


def _history(artifact: Artifact) -> Iterator[Point]:
    """The series of a trained stage, by epoch; empty for a stage that trains nothing."""
    for name, values in (artifact.info.get("history") or {}).items():
        yield from ((_series_name(artifact.key.stage, name), i + 1, value) for i, value in enumerate(values))


def _series_name(stage: str, name: str) -> str:
    return f"{stage}/loss/{name}" if name in LOSSES else f"{stage}/{name}"


def _seconds_since_start(run: Run, time: int) -> int:
    return max(0, time - run.info.start_time) // 1000


def _params(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _calls(metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]) -> Iterator[dict[str, Any]]:
    """The arguments of as few log_batch calls as MLflow's limits allow."""
    kinds = {"metrics": (metrics, METRICS_A_CALL), "params": (params, PARAMS_A_CALL), "tags": (tags, TAGS_A_CALL)}
    for i in range(max(math.ceil(len(items) / limit) for items, limit in kinds.values())):
        yield {kind: items[i * limit : (i + 1) * limit] for kind, (items, limit) in kinds.items()}


def _folder_of(name: str) -> str | None:
    folder = str(PurePosixPath(name).parent)
    return None if folder == "." else folder


def _cut(text: str) -> str:
    return text if len(text) <= TAG_LENGTH else text[: TAG_LENGTH - 4] + " ..."
