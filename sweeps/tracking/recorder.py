"""Writes the events of a sweep to MLflow; writing an event twice changes nothing.

Tags begin with "semformer."; metrics are "<stage>/loss/<term>", "<stage>/lr" ... by epoch (1, 2, ...), the scores of
the stages that end a trial ("cam/val/miou", "seg/val/miou"), "<stage>/seconds", "evaluate/threshold_curve/<score>" by
threshold in percent, "probe/<metric>" by segmentation epoch, "system/<name>" by seconds since the trial was planned.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from mlflow.entities import Metric
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID

from semformer import pipeline
from semformer.config import Config, LossName, flatten
from semformer.keys import StageKey
from semformer.store import Artifact, Store
from sweeps.plan.trials import Cell, Trial
from sweeps.tracking import exhibits, rows
from sweeps.tracking.connection import TAG
from sweeps.tracking.journal import Event
from sweeps.tracking.runs import Gone, KnownRun, Point, Runs

LOSSES = {*get_args(LossName), "recon", "total"}
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
"""Of MLflow, by ours. A trial that is queued again stays as it was."""
STOPPED = "the sweep was stopped"
"""Why trials are queued that a sweep left unfinished."""
MAPS = "evaluate"
"""The stage whose files lie at the top of a run's; those of others that end a trial have a folder."""
TRIALS = 1000
"""Whose descriptions are held in memory."""


class Recorder:
    """`write` takes the events that `tracker` makes. After an error, `forget` and write them all again.

    described(key) is the event that describes a trial; `files` is the folder of the files that events name. Raises
    UserError when MLflow cannot be reached at `uri`.
    """

    def __init__(self, uri: str, store: Store, files: Path, described: Callable[[str], Event | None]):
        self.store, self.files, self.described = store, files, described
        self.runs = Runs(uri, store)
        self.parent_run_id: str | None = None  # when the sweep's run has been found or made
        self._sweep_key = ""
        self._trials: OrderedDict[str, Trial] = OrderedDict()
        self._running: set[str] = set()  # keys of the trials that this process was told to be running
        self._recorded: set[str] = set()  # digests of stages whose runs are complete
        self._made: set[tuple[str, str]] = set()  # see `_stages_made`

    def write(self, events: Sequence[Event]) -> None:
        """Write events in order, those of one run in one go. Raises whatever MLflow or the store raises."""
        with self.runs.writing():
            self._open()
            self.runs.look_for("trial", [event["key"] for event in events if event["event"] == "trial"])
            self._made = self._stages_made(events)
            for event in events:
                time = int(1000 * event["time"])
                if tags := event.get("state"):
                    self._set_state(event["key"], tags, time)
                HANDLERS[event["event"]](self, event, time)
                if tags:
                    self._describe_run(event["key"])

    def forget(self) -> None:
        """Believe nothing about what MLflow holds; it is read again."""
        self.runs.forget()
        self._recorded.clear()

    def _stages_made(self, events: Sequence[Event]) -> set[tuple[str, str]]:
        """Of the stages whose epochs are told, those that are in the store by now, as (trial key, stage): any driver
        completes their series.

        From here on, none but this one does, until the events are written.
        """
        told = {(event["key"], event["stage"]) for event in events if event["event"] == "epoch"}
        if not told:
            return set()
        self.runs.hold()
        keys = {(trial, stage): self._describe(trial).keys[stage] for trial, stage in told}
        found = self.store.find_many(keys.values())
        return {name for name, key in keys.items() if key in found}

    # One method for each kind of event; `time` is the event's, in milliseconds

    def _sweep(self, event: Event, time: int) -> None:
        self._sweep_key = event["key"]
        run = self.runs.find_or_create("sweep", event["key"], event["name"], event["tags"], time)
        self.parent_run_id = run.id
        self.runs.pending(run).tags |= event["tags"]
        self.runs.pending(run).status = "RUNNING"
        for name, value in event["experiment_tags"].items():
            self.runs.client.set_experiment_tag(self.runs.experiment_id, name, value)

    def _trial(self, event: Event, time: int) -> None:
        """A run of its own for a trial, which keeps the rows of other tables and the sweep that it was made for."""
        tags = event["tags"] | event["first_tags"] | {f"{TAG}status": "queued"}
        first = tags | {MLFLOW_PARENT_RUN_ID: self._parent().id} | rows.tags(event["rows"])
        run = self.runs.find_or_create("trial", event["key"], event["name"], first, time, status="SCHEDULED")
        now = event["tags"] | rows.merged(run.tags, event["rows"], event["tables"])
        if changed := {name: text for name, text in now.items() if run.tags.get(name.removeprefix(TAG)) != text}:
            self.runs.pending(run).tags |= changed
            run.tags |= {name.removeprefix(TAG): text for name, text in changed.items()}
        if run.name != event["name"]:
            self.runs.pending(run).name = run.name = event["name"]
        if run.status == "KILLED" and run.tags.get("status") == "queued":  # by the end of an earlier sweep
            self.runs.pending(run).status = run.status = "SCHEDULED"
            self.runs.pending(run).tags[f"{TAG}reason"] = ""

    def _started(self, event: Event, time: int) -> None:
        tags = {f"{TAG}commit": event["commit"], MLFLOW_GIT_COMMIT: event["commit"]}
        self.runs.pending(self._run_of(event)).tags |= tags

    def _nothing_more(self, event: Event, time: int) -> None:
        """The trial's state is all there is."""

    def _epoch(self, event: Event, time: int) -> None:
        stage, values = event["stage"], event["values"]
        points = [(_series_name(stage, name), event["epoch"], value) for name, value in values.items()]
        run = self._run_of(event)
        if (event["key"], stage) in self._made:
            self.runs.refresh(run, points)
        self.runs.measure(run, points, time)

    def _system(self, event: Event, time: int) -> None:
        run = self._run_of(event)
        step = _seconds_since_start(run, time)
        self.runs.measure(run, [(name, step, value) for name, value in event["values"].items()], time)

    def _stage(self, event: Event, time: int) -> None:
        trial, run = self._describe(event["key"]), self._run_of(event)
        artifact = self._artifact(trial, event["stage"], verify=False)
        points = list(_history(artifact))
        if not points:
            return
        self._complete(run, points, time)
        if artifact.key.digest not in self._recorded:
            self._record_stage(trial, artifact, points, event["commit"])
            self._recorded.add(artifact.key.digest)

    def _complete(self, run: KnownRun, points: Sequence[Point], time: int) -> None:
        """Write what the run lacks, whoever wrote the rest: another driver may have had the trial meanwhile."""
        self.runs.hold()
        self.runs.refresh(run, points)
        self.runs.measure(run, points, time)

    def _record_stage(self, trial: Trial, artifact: Artifact, points: list[Point], commit: str) -> None:
        """A run of its own for a stage that was trained, from its artifact alone."""
        info, stage = artifact.info, artifact.key.stage
        ended = int(1000 * datetime.fromisoformat(info["created"]).timestamp())
        tags = {
            f"{TAG}stage": stage,
            f"{TAG}commit": commit,
            f"{TAG}host": info["host"],
            MLFLOW_PARENT_RUN_ID: self._parent().id,
            **version_tags(info["versions"]),
        }
        started = ended - int(1000 * info["seconds"])
        run = self.runs.find_or_create("stage", artifact.key.digest, str(artifact.key), tags, started)
        if run.status == "FINISHED":
            return
        self.runs.pending(run).params |= _params(flatten(getattr(trial.config, stage)))
        self.runs.measure(run, [("seconds", 0, info["seconds"]), *points], ended)
        self.runs.pending(run).status, self.runs.pending(run).ended = "FINISHED", ended

    def _finished(self, event: Event, time: int) -> None:
        trial, run = self._describe(event["key"]), self._run_of(event)
        ends = {key.stage: self._artifact(trial, key.stage) for key in trial.ends}
        stages = {name: self.store.find(key, verify=False) for name, key in trial.keys.items()}
        seconds = {f"{name}/seconds": stage.info["seconds"] for name, stage in stages.items() if stage}
        points = [(name, 0, value) for name, value in (pipeline.scores(ends.values()) | seconds).items()]
        if maps := ends.get(MAPS):
            points += exhibits.curve_points(maps)
        self._complete(run, points, time)
        self.runs.flush()  # the scores count, also where there is no room for files
        if maps:
            self.runs.client.log_figure(run.id, exhibits.curve_figure(maps), exhibits.CURVE_PICTURE)
        shown = []
        for stage, artifact in ends.items():
            folder = "" if stage == MAPS else f"{stage}/"
            for name in artifact.files:
                self.runs.upload(run, artifact.file(name), folder + name)
            self.runs.client.log_dict(run.id, exhibits.class_table(artifact), folder + exhibits.CLASS_TABLE)
            shown.append({"path": folder + exhibits.CLASS_TABLE, "type": "table"})
        self.runs.pending(run).tags[MLFLOW_LOGGED_ARTIFACTS] = json.dumps(shown)
        run.series = None  # complete; to be read again, should anything come still

    def _register(self, event: Event, time: int) -> None:
        from sweeps.tracking import registry  # PyTorch's exporter takes seconds to import

        self.runs.flush()
        trial, run = self._describe(event["key"]), self.runs.client.get_run(self._run_of(event).id)
        if "segmentor" not in trial.keys:  # its maps or masks are of another method
            return
        trained, evaluate = (self._artifact(trial, stage) for stage in ("segmentor", MAPS))
        registry.register(self.runs.uri, event["name"], run, trial, trained, evaluate)

    def _failed(self, event: Event, time: int) -> None:
        self.runs.flush()
        text = f"{event['reason']}\n\n{event['traceback']}"
        self.runs.client.log_text(self._run_of(event).id, text, "failure.txt")

    def _file(self, event: Event, time: int) -> None:
        self.runs.upload(self._parent(), self.files / event["name"], event["name"])

    def _progress(self, event: Event, time: int) -> None:
        parent = self._parent()
        step = _seconds_since_start(parent, time)
        points = event["values"].items()
        self.runs.pending(parent).metrics += [Metric(name, value, time, step) for name, value in points]

    def _end(self, event: Event, time: int) -> None:
        """Of the sweep. Trials that it leaves unfinished are another driver's if that has a lease for them."""
        self._progress(event, time)
        self.runs.flush()
        for run in self.runs.unfinished():
            key = run.data.tags.get(f"{TAG}trial_key")
            if key and self._is_ours(key, run.info.status):
                left = KnownRun.of(run)
                pending = self.runs.pending(left)
                pending.tags |= {f"{TAG}status": "queued", f"{TAG}reason": STOPPED}
                pending.status, pending.ended = "KILLED", time
                if (known := self.runs.find("trial", key)).id == left.id:
                    known.status, known.tags["status"] = "KILLED", "queued"
        parent = self._parent()
        self.runs.pending(parent).status, self.runs.pending(parent).ended = event["status"], time

    def _is_ours(self, key: str, status: str) -> bool:
        if self.described(key) is None:
            return False
        if status == "SCHEDULED" or key in self._running:
            return True
        return not any(self.store.holder(stage) for stage in self._describe(key).keys.values())

    # The state of a trial

    def _set_state(self, key: str, tags: Mapping[str, str], time: int) -> None:
        """Its tags, and MLflow's status, which follows from them."""
        run, status = self.runs.find("trial", key), tags["status"]
        pending = self.runs.pending(run)
        pending.tags |= {TAG + name: text for name, text in tags.items()}
        run.tags["status"] = status
        if status in STATUS:
            pending.status, pending.ended = STATUS[status], None if status == "running" else time
        if status == "running":
            self._running.add(key)
        else:
            self._running.discard(key)

    def _describe_run(self, key: str) -> None:
        """What a trial is, once it has begun: thousands that wait need no more than their tags."""
        run = self.runs.find("trial", key)
        if "described" in run.tags or run.tags["status"] == "queued":
            return
        trial = self._describe(key)
        self.runs.pending(run).params |= _params(trial.fields)
        self.runs.client.log_inputs(run.id, datasets=exhibits.datasets(trial))
        self.runs.flush()
        self.runs.client.log_dict(run.id, trial.config.model_dump(mode="json"), "config.json")
        run.tags["described"] = self.runs.pending(run).tags[f"{TAG}described"] = "yes"

    def _describe(self, key: str) -> Trial:
        if key not in self._trials:
            event = self.described(key)
            if event is None:
                raise Gone(f"nothing describes the trial {key}")
            self._trials[key] = _trial_of(event)
            if len(self._trials) > TRIALS:
                self._trials.popitem(last=False)
        return self._trials[key]

    def _open(self) -> None:
        """The experiment, where this process has not begun the sweep itself."""
        if not self.runs.experiment_id and (sweep := self.described("sweep")):
            self.runs.open(sweep["experiment"])

    def _parent(self) -> KnownRun:
        if not self._sweep_key and (sweep := self.described("sweep")):
            self._sweep_key = sweep["key"]
        return self.runs.find("sweep", self._sweep_key)

    def _run_of(self, event: Event) -> KnownRun:
        return self.runs.find("trial", event["key"])

    def _artifact(self, trial: Trial, stage: str, *, verify: bool = True) -> Artifact:
        artifact = self.store.find(trial.keys[stage], verify=verify)
        if artifact is None:
            raise Gone(f"{trial.keys[stage]} has gone from the store {self.store.location}")
        return artifact


HANDLERS: dict[str, Callable[[Recorder, Event, int], None]] = {
    "sweep": Recorder._sweep,
    "trial": Recorder._trial,
    "started": Recorder._started,
    "state": Recorder._nothing_more,
    "epoch": Recorder._epoch,
    "system": Recorder._system,
    "stage": Recorder._stage,
    "finished": Recorder._finished,
    "register": Recorder._register,
    "failed": Recorder._failed,
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
        "rows": list(trial.rows),
        "seed": trial.config.seed,
    }


def version_tags(versions: Mapping[str, str]) -> dict[str, str]:
    return {f"{TAG}version.{name}": version for name, version in versions.items()}


def _trial_of(event: Event) -> Trial:
    keys = {name: StageKey(name, spec) for name, spec in event["keys"].items()}
    named = (row.partition("/") for row in event["rows"])
    cells = tuple(Cell(table, row, event["seed"]) for table, _, row in named)
    data = Path(event["data"]) if event["data"] else None
    return Trial(Config.model_validate(event["config"]), data, event["data_name"], keys, cells)


def _history(artifact: Artifact) -> Iterator[Point]:
    """The series of a trained stage, by epoch; empty for a stage that trains nothing."""
    for name, values in (artifact.info.get("history") or {}).items():
        yield from ((_series_name(artifact.key.stage, name), i + 1, value) for i, value in enumerate(values))


def _series_name(stage: str, name: str) -> str:
    if name.startswith("probe/"):
        return name
    return f"{stage}/loss/{name}" if name in LOSSES else f"{stage}/{name}"


def _seconds_since_start(run: KnownRun, time: int) -> int:
    return max(0, time - run.started) // 1000


def _params(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
