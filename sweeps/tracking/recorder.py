"""Writes the events of a sweep to MLflow; writing an event twice changes nothing.

A run is found again by a tag (the key of the sweep, trial or stage) and made under a lease in the store, so that two
drivers never make it twice. A point of a series that is there already, by metric and step, is left as it is. What
events have for one run goes there in one go.

Tags begin with "semformer."; metrics are "<stage>/loss/<term>", "<stage>/lr" ... by epoch (1, 2, ...), the final ones
of stage evaluate ("cam/val/miou"), "<stage>/seconds", "evaluate/threshold_curve/<score>" by threshold in percent,
"probe/<metric>" by segmentation epoch, and "system/<name>" by seconds since the trial was planned.
"""

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from semformer.secrets import without_password
from semformer.store import Artifact, Store
from sweeps.plan.trials import Cell, Trial
from sweeps.tracking import exhibits, rows
from sweeps.tracking.connection import TAG, connecting, open_experiment, search_runs
from sweeps.tracking.journal import Event

log = logging.getLogger(__name__)
LOSSES = {*get_args(LossName), "recon", "total"}
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 800, 100, 100  # MLflow takes 1000 items in all
TAG_LENGTH, PARAM_LENGTH = 5000, 6000
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}
"""Of MLflow, by ours. A trial that is queued again stays as it was."""
ENDED = ("FINISHED", "FAILED", "KILLED")
STOPPED = "the sweep was stopped"
"""Why trials are queued that a sweep left unfinished."""
FEW = 20
"""Runs that are looked for one by one; more are found by listing the experiment."""
AT_ONCE = 4
"""Runs that are written at the same time, where a server takes them."""
TRIALS = 1000
"""Whose descriptions are held in memory."""

Point = tuple[str, int, float]
"""Metric, step, value."""


class MissingArtifact(UserError):
    """A stage that was reported as done is not in the store."""


@dataclass
class KnownRun:
    """What is known of a run of ours. `tags`: those that begin with "semformer.", without that, and the parent's id."""

    id: str
    name: str
    status: str
    started: int
    """Milliseconds since the epoch."""
    tags: dict[str, str]
    has_params: bool
    has_metrics: bool
    series: "dict[str, Steps] | None" = None
    """By metric; None: to be read."""

    @classmethod
    def of(cls, run: Run) -> "KnownRun":
        tags = {name.removeprefix(TAG): text for name, text in run.data.tags.items() if name.startswith(TAG)}
        if parent := run.data.tags.get(MLFLOW_PARENT_RUN_ID):
            tags[MLFLOW_PARENT_RUN_ID] = parent
        data, info = run.data, run.info
        return cls(
            info.run_id, info.run_name, info.status, info.start_time, tags, bool(data.params), bool(data.metrics)
        )


class Steps:
    """The steps of a series that are written: all up to one (of those that count 1, 2, ...), and others."""

    __slots__ = ("others", "upto")

    def __init__(self, steps: Iterable[int] = ()):
        self.upto = 0
        self.others: set[int] = set()
        for step in sorted(steps):
            self.add(step)

    def __contains__(self, step: int) -> bool:
        return 0 < step <= self.upto or step in self.others

    def add(self, step: int) -> None:
        self.others.add(step)
        while self.upto + 1 in self.others:
            self.upto += 1
            self.others.discard(self.upto)


@dataclass
class _Pending:
    """What is to be written to one run in one go."""

    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    status: str | None = None
    ended: int | None = None


class Recorder:
    """`write` takes the events that `tracker` makes. After an error, `forget` and write them all again.

    described(key) is the event that describes a trial; `files` is the folder of the files that events name. Raises
    UserError when MLflow cannot be reached at `uri`.
    """

    def __init__(self, uri: str, store: Store, files: Path, described: Callable[[str], Event | None]):
        self.uri, self.store, self.files, self.described = uri, store, files, described
        self.experiment = self.experiment_id = self._sweep_key = ""
        self.parent_run_id: str | None = None  # when the sweep's run has been found or made
        self._trials: OrderedDict[str, Trial] = OrderedDict()
        self._running: set[str] = set()  # keys of the trials that this process was told to be running
        self.written = 0  # how often a run was written to: what shows that something is still going on
        self.forget()
        with connecting(uri), self._alone():  # the first client of a new database makes its tables
            self._client = MlflowClient(tracking_uri=uri)

    # Reading

    def open(self, experiment: str) -> dict[tuple[str, str], KnownRun]:
        """Work in this experiment, made where there is none. Raises UserError.

        Returns its runs by kind ("sweep", "trial" or "stage") and key; of several, a finished one, else the oldest.
        """
        with connecting(self.uri), self._alone():
            self.experiment, self.experiment_id = experiment, open_experiment(self._client, experiment)
            self._list()
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

    def write(self, events: Sequence[Event]) -> None:
        """Write events in order, those of one run in one go. Raises whatever MLflow or the store raises."""
        with ExitStack() as self._leases:
            self._has_lease = False
            self._look_for_runs(events)
            for event in events:
                time = int(1000 * event["time"])
                HANDLERS[event["event"]](self, event, time)
                if tags := event.get("state"):
                    self._set_state(event["key"], tags, time)
            self._flush()

    def forget(self) -> None:
        """Believe nothing about what MLflow holds; it is read again."""
        self._runs: dict[tuple[str, str], KnownRun] = {}  # by kind and key
        self._pending: dict[str, _Pending] = {}  # by run id
        self._recorded: set[str] = set()  # digests of stages whose runs are complete

    # One method for each kind of event; `time` is the event's, in milliseconds

    def _sweep(self, event: Event, time: int) -> None:
        self._sweep_key = event["key"]
        run = self._find_or_create("sweep", event["key"], event["name"], event["tags"], time)
        self.parent_run_id = run.id
        self._to(run).tags |= event["tags"]
        self._to(run).status = "RUNNING"
        for name, value in event["experiment_tags"].items():
            self._client.set_experiment_tag(self.experiment_id, name, value)

    def _trial(self, event: Event, time: int) -> None:
        """A run of its own for a trial, which keeps the rows of other tables and the sweep that it was made for."""
        tags = event["tags"] | event["first_tags"] | {f"{TAG}status": "queued"}
        first = tags | {MLFLOW_PARENT_RUN_ID: self._parent().id} | rows.tags(event["rows"])
        run = self._find_or_create("trial", event["key"], event["name"], first, time, status="SCHEDULED")
        now = event["tags"] | rows.merged(run.tags, event["rows"], event["tables"])
        if changed := {name: text for name, text in now.items() if run.tags.get(name.removeprefix(TAG)) != text}:
            self._to(run).tags |= changed
            run.tags |= {name.removeprefix(TAG): text for name, text in changed.items()}
        if run.name != event["name"]:
            self._to(run).name = run.name = event["name"]

    def _started(self, event: Event, time: int) -> None:
        tags = {f"{TAG}commit": event["commit"], MLFLOW_GIT_COMMIT: event["commit"]}
        self._to(self._run_of(event)).tags |= tags

    def _nothing_more(self, event: Event, time: int) -> None:
        """The trial's state is all there is."""

    def _epoch(self, event: Event, time: int) -> None:
        stage, values = event["stage"], event["values"]
        points = [(_series_name(stage, name), event["epoch"], value) for name, value in values.items()]
        self._measure(self._run_of(event), points, time)

    def _system(self, event: Event, time: int) -> None:
        run = self._run_of(event)
        step = _seconds_since_start(run, time)
        self._measure(run, [(name, step, value) for name, value in event["values"].items()], time)

    def _stage(self, event: Event, time: int) -> None:
        trial, run = self._describe(event["key"]), self._run_of(event)
        artifact = self._artifact(trial, event["stage"], verify=False)
        points = list(_history(artifact))
        if not points:
            return
        self._hold()
        if event["found"]:
            self._refresh(run, points)
        self._measure(run, points, time)
        if artifact.key.digest not in self._recorded:
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
            MLFLOW_PARENT_RUN_ID: self._parent().id,
            **version_tags(info["versions"]),
        }
        started = ended - int(1000 * info["seconds"])
        run = self._find_or_create("stage", artifact.key.digest, str(artifact.key), tags, started)
        if run.status == "FINISHED":
            return
        self._to(run).params |= _params(flatten(getattr(trial.config, stage)))
        self._measure(run, [("seconds", 0, info["seconds"]), *points], ended)
        self._to(run).status, self._to(run).ended = "FINISHED", ended

    def _finished(self, event: Event, time: int) -> None:
        trial, run = self._describe(event["key"]), self._run_of(event)
        artifact = self._artifact(trial, "evaluate")
        stages = {name: self.store.find(key, verify=False) for name, key in trial.keys.items()}
        seconds = {f"{name}/seconds": stage.info["seconds"] for name, stage in stages.items() if stage}
        final = artifact.info["metrics"] | seconds
        curve = exhibits.curve_points(artifact)
        self._measure(run, [*((name, 0, value) for name, value in final.items()), *curve], time)
        for name in artifact.files:
            self._client.log_artifact(run.id, str(artifact.file(name)), _folder_of(name))
        self._client.log_figure(run.id, exhibits.curve_figure(artifact), exhibits.CURVE_PICTURE)
        self._client.log_dict(run.id, exhibits.class_table(artifact), exhibits.CLASS_TABLE)
        shown = json.dumps([{"path": exhibits.CLASS_TABLE, "type": "table"}])
        self._to(run).tags[MLFLOW_LOGGED_ARTIFACTS] = shown

    def _register(self, event: Event, time: int) -> None:
        from sweeps.tracking import registry  # PyTorch's exporter takes seconds to import

        self._flush()
        trial, run = self._describe(event["key"]), self._client.get_run(self._run_of(event).id)
        trained, evaluate = (self._artifact(trial, stage) for stage in ("segmentor", "evaluate"))
        registry.register(self.uri, event["name"], run, trial, trained, evaluate)

    def _failed(self, event: Event, time: int) -> None:
        text = f"{event['reason']}\n\n{event['traceback']}"
        self._client.log_text(self._run_of(event).id, text, "failure.txt")

    def _file(self, event: Event, time: int) -> None:
        name = event["name"]
        self._client.log_artifact(self._parent().id, str(self.files / name), _folder_of(name))

    def _progress(self, event: Event, time: int) -> None:
        parent = self._parent()
        step = _seconds_since_start(parent, time)
        self._to(parent).metrics += [Metric(name, value, time, step) for name, value in event["values"].items()]

    def _end(self, event: Event, time: int) -> None:
        """Of the sweep. Trials that it leaves unfinished are another driver's if that has a lease for them."""
        self._progress(event, time)
        self._flush()
        for status in ("SCHEDULED", "RUNNING"):
            for run in search_runs(self._client, self.experiment_id, f"attributes.status = '{status}'"):
                key = run.data.tags.get(f"{TAG}trial_key")
                if key and self._is_ours(key, status):
                    pending = self._to(KnownRun.of(run))
                    pending.tags |= {f"{TAG}status": "queued", f"{TAG}reason": STOPPED}
                    pending.status, pending.ended = "KILLED", time
        parent = self._parent()
        self._to(parent).status, self._to(parent).ended = event["status"], time

    def _is_ours(self, key: str, status: str) -> bool:
        if status == "SCHEDULED" or key in self._running:
            return self.described(key) is not None
        if self.described(key) is None:
            return False
        return not any(self.store.holder(stage) for stage in self._describe(key).keys.values())

    # The state of a trial

    def _set_state(self, key: str, tags: Mapping[str, str], time: int) -> None:
        """Its tags, and MLflow's status, which follows from them."""
        run, status = self._find("trial", key), tags["status"]
        pending = self._to(run)
        pending.tags |= {TAG + name: _cut(text) for name, text in tags.items()}
        if not run.has_params and status != "queued":
            self._describe_run(run, self._describe(key))
        if status in STATUS:
            pending.status, pending.ended = STATUS[status], None if status == "running" else time
        if status == "running":
            self._running.add(key)
        else:
            self._running.discard(key)
        if status == "finished":
            run.series = None  # complete; to be read again, should anything come still

    def _describe_run(self, run: KnownRun, trial: Trial) -> None:
        """What a trial is, once it has begun: thousands that wait need no more than their tags."""
        self._client.log_dict(run.id, trial.config.model_dump(mode="json"), "config.json")
        self._client.log_inputs(run.id, datasets=exhibits.datasets(trial))
        self._to(run).params |= _params(flatten(trial.config))
        run.has_params = True

    def _describe(self, key: str) -> Trial:
        if key not in self._trials:
            event = self.described(key)
            if event is None:
                raise UserError(f"nothing describes the trial {key}")
            self._trials[key] = _trial_of(event)
            if len(self._trials) > TRIALS:
                self._trials.popitem(last=False)
        return self._trials[key]

    # Runs

    def _look_for_runs(self, events: Sequence[Event]) -> None:
        """Know the runs that the events are about, where one listing tells more at once than many questions."""
        if self.experiment_id == "" and (sweep := self.described("sweep")):
            self._sweep_key = sweep["key"]
            self.open(sweep["experiment"])
        keys = [event["key"] for event in events if event["event"] == "trial"]
        if len(keys) > FEW and sum(("trial", key) not in self._runs for key in keys) > FEW:
            self._hold()
            self._list()

    def _list(self) -> None:
        for run in search_runs(self._client, self.experiment_id):
            self._keep(run)

    def _parent(self) -> KnownRun:
        if not self._sweep_key and (sweep := self.described("sweep")):
            self._sweep_key = sweep["key"]
        return self._find("sweep", self._sweep_key)

    def _run_of(self, event: Event) -> KnownRun:
        return self._find("trial", event["key"])

    def _find(self, kind: str, key: str) -> KnownRun:
        run = self._runs.get((kind, key)) or self._reread(kind, key)
        if run is None:
            raise UserError(f"the run of {kind} {key} has gone from the MLflow experiment {self.experiment!r}")
        return run

    def _find_or_create(
        self, kind: str, key: str, name: str, tags: Mapping[str, str], time: int, status: str | None = None
    ) -> KnownRun:
        if run := self._runs.get((kind, key)):
            return run
        self._hold()
        if run := self._reread(kind, key):
            return run
        tags = {**tags, f"{TAG}kind": kind, f"{TAG}{kind}_key": key}
        made = self._keep(self._client.create_run(self.experiment_id, start_time=time, tags=tags, run_name=name))
        made.series = {}
        self._to(made).status = status
        return made

    def _hold(self) -> None:
        """Make runs, and complete series, alone among the drivers on this store; until the end of `write`."""
        if not self._has_lease:
            self._leases.enter_context(self._alone())
            self._has_lease = True

    def _reread(self, kind: str, key: str) -> KnownRun | None:
        for run in search_runs(self._client, self.experiment_id, f"tags.`{TAG}{kind}_key` = '{key}'"):
            self._keep(run)
        return self._runs.get((kind, key))

    def _keep(self, run: Run) -> KnownRun:
        """Of several runs of a key, the finished one, else the first."""
        kind = run.data.tags.get(f"{TAG}kind", "")
        name = kind, run.data.tags.get(f"{TAG}{kind}_key", "")
        known = self._runs.get(name)
        if known is None or (run.info.status == "FINISHED" != known.status and run.info.run_id != known.id):
            known = self._runs[name] = KnownRun.of(run)
        return known

    # Series

    def _measure(self, run: KnownRun, points: Iterable[Point], time: int) -> None:
        """Write the points that the run does not have yet."""
        known = self._series(run)
        for name, step, value in points:
            steps = known.setdefault(name, Steps())
            if step not in steps:
                steps.add(step)
                self._to(run).metrics.append(Metric(name, value, time, step))

    def _series(self, run: KnownRun) -> dict[str, Steps]:
        if run.series is None:
            self._flush()
            names = self._client.get_run(run.id).data.metrics
            run.series = {name: self._steps(run, name) for name in names}
        return run.series

    def _refresh(self, run: KnownRun, points: Iterable[Point]) -> None:
        """Read again the series that another driver may have gone on with."""
        self._flush()
        latest = self._client.get_run(run.id).data.metrics
        for name in {name for name, _, _ in points} & latest.keys():
            self._series(run)[name] = self._steps(run, name)

    def _steps(self, run: KnownRun, name: str) -> Steps:
        return Steps(point.step for point in self._client.get_metric_history(run.id, name))

    # What is to be written

    def _to(self, run: KnownRun) -> _Pending:
        return self._pending.setdefault(run.id, _Pending())

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        if self.uri.startswith("http") and len(pending) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self._write_run, pending, pending.values()))
        else:
            for run_id, one in pending.items():
                self._write_run(run_id, one)

    def _write_run(self, run_id: str, pending: _Pending) -> None:
        params = [Param(name, text) for name, text in pending.params.items()]
        tags = [RunTag(name, text) for name, text in pending.tags.items()]
        for call in _calls(pending.metrics, params, tags):
            self._client.log_batch(run_id, **call)
        self.written += 1
        if pending.status in ENDED:
            self._client.set_terminated(run_id, pending.status, pending.ended)
        if pending.name or (pending.status and pending.status not in ENDED):
            status = None if pending.status in ENDED else pending.status
            self._client.update_run(run_id, status=status, name=pending.name)

    def _artifact(self, trial: Trial, stage: str, *, verify: bool = True) -> Artifact:
        artifact = self.store.find(trial.keys[stage], verify=verify)
        if artifact is None:
            raise MissingArtifact(f"{trial.keys[stage]} has gone from the store {self.store.location}")
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
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {name: _cut(text, PARAM_LENGTH) for name, text in texts.items()}


def _calls(metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]) -> Iterator[dict[str, Any]]:
    """The arguments of as few log_batch calls as MLflow's limits allow."""
    kinds: dict[str, tuple[Sequence[Any], int]] = {
        "metrics": (metrics, METRICS_A_CALL),
        "params": (params, PARAMS_A_CALL),
        "tags": (tags, TAGS_A_CALL),
    }
    for i in range(max(math.ceil(len(items) / limit) for items, limit in kinds.values())):
        yield {kind: items[i * limit : (i + 1) * limit] for kind, (items, limit) in kinds.items()}


def _folder_of(name: str) -> str | None:
    folder = str(PurePosixPath(name).parent)
    return None if folder == "." else folder


def _cut(text: str, length: int = TAG_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."
