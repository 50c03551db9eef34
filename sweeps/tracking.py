"""Records a sweep in MLflow: one parent run, one run per trial and one per distinct trained stage, found again by key.

Only the driver writes, in one background thread, so that no trial ever waits for the tracking server. What a trial
reports is written as it arrives; when one of its stages is done, its series are completed from the artifact in the
store, so that they have neither gaps nor doubles, whether the stage was trained, resumed or found.

Tags begin with "semformer."; metrics are "<stage>/loss/<term>", "<stage>/lr" ... by epoch (1, 2, ...), and the final
ones of stage evaluate ("cam/val/miou").
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from semformer import pipeline
from semformer.config import LossName, flatten
from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.store import Artifact, Store
from sweeps.plan import Plan, Trial

log = logging.getLogger(__name__)
TAG = "semformer."
LOSSES = {*get_args(LossName), "recon", "total"}
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100
TAG_LENGTH = 5000
ENDED = ("FINISHED", "FAILED", "KILLED")

Point = tuple[str, int, float]
"""Metric, step, value."""


class Tracker:
    """The runs of one plan in one experiment, by default "<name of the plan> <preset>".

    Raises UserError when MLflow cannot be reached. Later failures to write are collected in `errors`; what was lost
    is written when the same sweep is started again.
    """

    def __init__(self, uri: str, plan: Plan, store: Store, experiment: str | None = None):
        self.plan, self.store, self.uri = plan, store, uri
        self.experiment = experiment or f"{plan.name} {plan.preset}"
        self.errors: list[str] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        with _connecting(uri):
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment_id = self._open_experiment()
            runs = list(self._search())
        self._trial_runs = _by_tag(runs, "trial", "trial_key")
        self._stage_runs = _by_tag(runs, "stage", "stage_key")
        self._parent = _by_tag(runs, "sweep", "sweep_key").get(self._sweep_key())
        self._run_ids: dict[str, str] = {}  # by trial key, of this sweep's trials
        self._points: dict[str, set[tuple[str, int]]] = {}  # (metric, step) by run id
        self._found: dict[str, dict[str, bool]] = {}  # by trial key
        self._commit = commit()

    # Reading

    def is_recorded(self, trial: Trial) -> bool:
        """Whether the trial's run is there, finished, complete, and belongs to this sweep's rows."""
        if self._parent is None or not self._is_finished(trial):
            return False
        wanted = self._row_tags(trial) | {MLFLOW_PARENT_RUN_ID: self.parent_run_id}
        return wanted.items() <= self._trial_runs[trial.key].data.tags.items()

    def _is_finished(self, trial: Trial) -> bool:
        run = self._trial_runs.get(trial.key)
        return run is not None and run.info.status == "FINISHED" and bool(run.data.metrics)

    def is_complete(self) -> bool:
        """Whether the sweep was recorded to its end before, and its table file is the same still."""
        if self._parent is None or self._parent.info.status != "FINISHED":
            return False
        unchanged = self._parent.data.tags.get(f"{TAG}documents_digest") == self._documents_digest()
        return unchanged and all(self.is_recorded(trial) for trial in self.plan.trials)

    @property
    def parent_run_id(self) -> str:
        return self._parent.info.run_id

    # Writing

    def begin(self) -> None:
        """Open the parent run, and a run for every trial that has none; those of the past are continued."""
        plan = self.plan
        tags = {
            f"{TAG}kind": "sweep",
            f"{TAG}sweep_key": self._sweep_key(),
            f"{TAG}table": ",".join(table.name for table in plan.tables),
            f"{TAG}documents_digest": self._documents_digest(),
            f"{TAG}preset": plan.preset,
            f"{TAG}plan": json.dumps(plan.summary()),
            f"{TAG}commit": self._commit,
            MLFLOW_GIT_COMMIT: self._commit,
            MLFLOW_RUN_NOTE: "\n".join(f"{table.title}. {table.source}" for table in plan.tables) or plan.title,
        }
        with _connecting(self.uri):
            if self._parent is None:
                name = f"{plan.name} {plan.preset}"
                self._parent = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
            else:
                self._client.update_run(self.parent_run_id, status="RUNNING")
                self._tag(self.parent_run_id, tags)
        self._later(self._client.log_text, self.parent_run_id, json.dumps(plan.as_json(), indent=1), "plan.json")
        for name, text in plan.documents.items():
            self._later(self._client.log_text, self.parent_run_id, text, name)
        for trial in plan.trials:
            self._later(self._open, trial)

    def record_found(self, trial: Trial) -> None:
        """Record a trial whose stages are all in the store already, unless its run is finished too."""
        if self._is_finished(trial):
            return
        for name, key in trial.keys.items():
            self._later(self._stage, trial, name, key, True)
        self._later(self._finish, trial)

    def tell(self, trial: Trial, report: Mapping[str, Any]) -> None:
        """Record what `sweeps.trial` or `sweeps.gate` reports."""
        event = report["event"]
        if event == "start":
            self._later(self._start, trial)
        elif event == "epoch":
            self._later(self._epoch, trial, report["stage"], report["epoch"], dict(report["values"]))
        elif event == "stage":
            self._later(self._stage, trial, report["stage"], trial.keys[report["stage"]], report["found"])
        elif event == "finished":
            self._later(self._finish, trial)
        elif event == "retry":
            self._later(self._retry, trial, report["reason"])
        elif event == "failed":
            self._later(self._fail, trial, report["reason"], report["traceback"])

    def end(self, status: str, metrics: Mapping[str, float] | None = None) -> None:
        """Write everything that is still to be written; `status` is FINISHED, FAILED or KILLED, of the parent run.

        Trials that were not finished are set back to queued.
        """
        self._later(self._end, status, dict(metrics or {}))
        self._writer.shutdown()

    # In the background thread

    def _later(self, function: Any, *arguments: Any) -> None:
        self._writer.submit(self._guarded, function, *arguments)

    def _guarded(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            log.warning("could not write to MLflow", exc_info=True)

    def _open(self, trial: Trial) -> None:
        run, name = self._trial_runs.get(trial.key), f"{self.plan.rows_of(trial)}, seed {trial.config.seed}"
        tags = self._row_tags(trial) | {MLFLOW_PARENT_RUN_ID: self.parent_run_id}
        if run is None:
            tags |= self._trial_tags(trial) | {f"{TAG}status": "queued"}
            run = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
            self._client.update_run(run.info.run_id, status="SCHEDULED")
            self._points[run.info.run_id] = set()
        elif not tags.items() <= run.data.tags.items():
            self._tag(run.info.run_id, tags)
            self._client.update_run(run.info.run_id, name=name)
        run_id = self._run_ids[trial.key] = run.info.run_id
        params = {name: _text(value) for name, value in flatten(trial.config).items()}
        if absent := {name: text for name, text in params.items() if name not in run.data.params}:
            entities = [Param(name, text) for name, text in absent.items()]
            for chunk in _chunks(entities, PARAMS_A_CALL):
                self._client.log_batch(run_id, params=chunk)
            self._client.log_dict(run_id, trial.config.model_dump(mode="json"), "config.json")

    def _start(self, trial: Trial) -> None:
        run_id = self._run_ids[trial.key]
        self._client.update_run(run_id, status="RUNNING")
        tags = {"status": "running", "reason": "", "commit": self._commit}
        self._tag(run_id, {TAG + name: text for name, text in tags.items()} | {MLFLOW_GIT_COMMIT: self._commit})

    def _epoch(self, trial: Trial, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        self._measure(self._run_ids[trial.key], [(_series_name(stage, n), epoch, value) for n, value in values.items()])

    def _stage(self, trial: Trial, stage: str, key: StageKey, found: bool) -> None:
        run_id = self._run_ids[trial.key]
        artifact = self.store.find(key, verify=False)
        if artifact is None:
            raise UserError(f"{key} has gone from the store {self.store.root}")
        history = artifact.info.get("history") or {}
        points = [
            (_series_name(stage, name), i + 1, value)
            for name, values in history.items()
            for i, value in enumerate(values)
        ]
        self._measure(run_id, points)
        self._found.setdefault(trial.key, {})[stage] = found
        self._tag(run_id, {f"{TAG}stages_found": json.dumps(self._found[trial.key])})
        if history and key.digest not in self._stage_runs:
            self._stage_runs[key.digest] = self._record_stage(trial, stage, artifact, points)

    def _record_stage(self, trial: Trial, stage: str, artifact: Artifact, points: list[Point]) -> Run:
        info = artifact.info
        ended = int(datetime.fromisoformat(info["created"]).timestamp() * 1000)
        tags = {
            f"{TAG}kind": "stage",
            f"{TAG}stage": stage,
            f"{TAG}stage_key": artifact.key.digest,
            f"{TAG}preset": self.plan.preset,
            f"{TAG}commit": self._commit,
            MLFLOW_PARENT_RUN_ID: self.parent_run_id,
            **_version_tags(info["versions"]),
        }
        started = ended - int(info["seconds"] * 1000)
        run = self._client.create_run(self._experiment_id, start_time=started, tags=tags, run_name=str(artifact.key))
        run_id = run.info.run_id
        self._points[run_id] = set()
        params = [Param(name, _text(value)) for name, value in flatten(getattr(trial.config, stage)).items()]
        self._client.log_batch(run_id, params=params)
        self._measure(run_id, [("seconds", 0, info["seconds"]), *points])
        self._client.set_terminated(run_id, "FINISHED", ended)
        return run

    def _finish(self, trial: Trial) -> None:
        run_id, key = self._run_ids[trial.key], trial.keys["evaluate"]
        artifact = self.store.find(key)
        if artifact is None:
            raise UserError(f"{key} has gone from the store {self.store.root}")
        stages = {name: self.store.find(key, verify=False) for name, key in trial.keys.items()}
        seconds = {f"{name}/seconds": stage.info["seconds"] for name, stage in stages.items() if stage}
        self._measure(run_id, [(name, 0, value) for name, value in (artifact.info["metrics"] | seconds).items()])
        for name in artifact.files:
            folder = str(Path(name).parent)
            self._client.log_artifact(run_id, str(artifact.file(name)), None if folder == "." else folder)
        self._tag(run_id, {f"{TAG}status": "finished", f"{TAG}reason": ""})
        self._client.set_terminated(run_id, "FINISHED")

    def _retry(self, trial: Trial, reason: str) -> None:
        tags = {f"{TAG}status": "queued", f"{TAG}reason": _cut(f"tried again after {reason}")}
        self._tag(self._run_ids[trial.key], tags)

    def _fail(self, trial: Trial, reason: str, traceback: str) -> None:
        run_id = self._run_ids[trial.key]
        self._tag(run_id, {f"{TAG}status": "failed", f"{TAG}reason": _cut(reason)})
        self._client.log_text(run_id, f"{reason}\n\n{traceback}", "failure.txt")
        self._client.set_terminated(run_id, "FAILED")

    def _end(self, status: str, metrics: Mapping[str, float]) -> None:
        ours = set(self._run_ids.values())
        for run in self._search():
            if run.info.run_id in ours and run.info.status not in ENDED:
                self._tag(run.info.run_id, {f"{TAG}status": "queued", f"{TAG}reason": "the sweep was stopped"})
                self._client.set_terminated(run.info.run_id, "KILLED")
        now = _now()
        self._client.log_batch(self.parent_run_id, metrics=[Metric(n, v, now, 0) for n, v in metrics.items()])
        self._client.set_terminated(self.parent_run_id, status)

    def _measure(self, run_id: str, points: Iterable[Point]) -> None:
        """Write the points that the run does not have yet."""
        if run_id not in self._points:
            names = self._client.get_run(run_id).data.metrics
            histories = [self._client.get_metric_history(run_id, name) for name in names]
            self._points[run_id] = {(point.key, point.step) for history in histories for point in history}
        known, now, new = self._points[run_id], _now(), []
        for name, step, value in points:
            if (name, step) not in known:
                known.add((name, step))
                new.append(Metric(name, value, now, step))
        for chunk in _chunks(new, METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=chunk)

    # Helpers

    def _open_experiment(self) -> str:
        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return self._client.create_experiment(self.experiment, artifact_location=self._artifact_location())
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {self.experiment!r} was deleted: restore it (mlflow experiments restore "
                f"-x {experiment.experiment_id}), or give another name with --experiment"
            )
        return experiment.experiment_id

    def _artifact_location(self) -> str | None:
        """`mlartifacts/` beside an sqlite database; a server knows its own."""
        if not self.uri.startswith("sqlite:///"):
            return None
        folder = Path(self.uri.removeprefix("sqlite:///").partition("?")[0]).absolute().parent
        return (folder / "mlartifacts" / _digest(self.experiment)[:12]).as_uri()

    def _search(self) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], order_by=["attribute.start_time ASC"], page_token=token
            )
            yield from page
            if not (token := page.token):
                return

    def _sweep_key(self) -> str:
        """Of what a parent run stands for: a table under a preset and overrides. More seeds extend a sweep."""
        return _digest(json.dumps([self.plan.name, self.plan.preset, sorted(self.plan.overrides.items())]))

    def _row_tags(self, trial: Trial) -> dict[str, str]:
        return {
            f"{TAG}table": ",".join(trial.tables),
            f"{TAG}rows": ",".join(trial.rows),
            f"{TAG}preset": self.plan.preset,
            f"{TAG}masks_read_by": json.dumps(trial.masks_read_by),
        }

    def _documents_digest(self) -> str:
        return _digest(json.dumps(self.plan.documents))

    def _trial_tags(self, trial: Trial) -> dict[str, str]:
        config = trial.config
        protocol = {
            "data": trial.data_name,
            "eval_split": config.data.eval_split,
            "scales": config.cams.scales,
            "flip": config.cams.flip,
            "erosion": config.evaluate.erosion,
            "rule": config.evaluate.rule,
        }
        return {
            f"{TAG}kind": "trial",
            f"{TAG}trial_key": trial.key,
            f"{TAG}seed": str(config.seed),
            f"{TAG}stage_keys": json.dumps({name: key.digest for name, key in trial.keys.items()}),
            f"{TAG}protocol": json.dumps(protocol),
            f"{TAG}commit": self._commit,
            MLFLOW_GIT_COMMIT: self._commit,
            **_version_tags(pipeline.versions()),
        }

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def commit() -> str:
    """The git commit of this code, with "-dirty" where it was changed since; "unknown" outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if tracked and git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@contextmanager
def _connecting(uri: str) -> Iterator[None]:
    """MLflow, quiet; a server that does not answer is given up after two attempts instead of minutes."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    before = os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = before or "1"
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets through whatever the database driver or the HTTP library raises
        first = str(error).strip().partition("\n")[0]
        told = f"--tracking-uri {uri}: MLflow cannot be used there: {type(error).__name__}: {first}"
        raise UserError(without_password(told)) from error
    finally:
        if before is None:
            del os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]


def without_password(text: str) -> str:
    """Text with URIs, such as "postgresql://me:***@host/db"."""
    return re.sub(r"(?<=:)[^:@/\s]+(?=@)", "***", text)


def _by_tag(runs: Iterable[Run], kind: str, tag: str) -> dict[str, Run]:
    """Runs of a kind by a tag; of several with the same, a finished one, else the oldest."""
    found: dict[str, Run] = {}
    for run in runs:
        if run.data.tags.get(f"{TAG}kind") == kind and (key := run.data.tags.get(TAG + tag)):
            known = found.get(key)
            if known is None or (run.info.status == "FINISHED" != known.info.status):
                found[key] = run
    return found


def _series_name(stage: str, name: str) -> str:
    return f"{stage}/loss/{name}" if name in LOSSES else f"{stage}/{name}"


def _version_tags(versions: Mapping[str, str]) -> dict[str, str]:
    return {f"{TAG}version.{name}": version for name, version in versions.items()}


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    return text if len(text) <= TAG_LENGTH else text[: TAG_LENGTH - 4] + " ..."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> int:
    return int(time.time() * 1000)
