"""Records a sweep in MLflow: one parent run, one run per trial and one per distinct trained stage, found again by key.

Only the driver writes, so that no trial ever waits for the tracking server. What is told is put into a journal on disk
(`journal`) and delivered by a background thread (`recorder`), in order and many at a time: a server that
is away delays nothing, and what a dead driver did not deliver, the next one does. When a stage is done, its series are
completed from the artifact in the store, so that they have neither gaps nor doubles, whether the stage was trained,
resumed or found.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from semformer import pipeline
from semformer.config import load_config
from semformer.errors import UserError
from semformer.store import Store
from sweeps.plan.trials import Plan, Trial
from sweeps.reports import EpochEnded, Failed, Finished, Pruned, Report, Retried, Sampled, StageDone, Started
from sweeps.tracking import views
from sweeps.tracking.connection import TAG, without_password
from sweeps.tracking.journal import Journal, has_backlog
from sweeps.tracking.recorder import MissingArtifact, Recorder, trial_event, version_tags

log = logging.getLogger(__name__)
EVENTS_A_TIME = 200
LINGER = 0.3
"""Seconds in which further events may join those that are about to be delivered."""
LONGEST_WAIT = 5.0
"""Seconds between two attempts to deliver."""
PATIENCE = 60.0
"""Seconds for which an event is tried again that MLflow, though it answers, does not take."""
PROGRESS_EVERY = 10.0

REPORTS = {
    "start": ("host", "pid", "gpu"),
    "epoch": ("stage", "epoch", "values"),
    "system": ("values",),
    "stage": ("stage", "found"),
    "finished": ("objectives",),
    "retry": ("reason",),
    "failed": ("reason", "traceback"),
    "pruned": (),
}
"""What is kept of the reports of trials and of the gate, by their "event"; others are not recorded."""


class Tracker:
    """The runs of one plan in one experiment, by default "<name of the plan> <preset>".

    `folder` is the sweep's own, for the journal. `register` is the name under which every finished trial's
    segmentation network is registered, if any. Raises UserError when MLflow cannot be reached now; later it may be
    away. `errors` collects what MLflow refused; that is written when the same sweep is started again.
    """

    def __init__(
        self,
        uri: str,
        plan: Plan,
        store: Store,
        experiment: str | None = None,
        *,
        folder: Path,
        register: str | None = None,
    ):
        self.plan, self.store, self.uri, self.folder, self.register = plan, store, uri, folder, register
        self.experiment = experiment or f"{plan.name} {plan.preset}"
        self.errors: list[str] = []
        self._recorder = Recorder(uri, store, folder / "files")
        self._past = self._recorder.open(self.experiment)
        self._commit = commit()
        self._metric = f"cam/{load_config(plan.preset, plan.overrides).data.eval_split}/miou"
        self._journal: Journal | None = None
        self._added: set[str] = set()  # keys of the trials that the journal knows
        self._progressed = float("-inf")
        self._news, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._courier = threading.Thread(target=self._deliver, name="mlflow", daemon=True)

    # Reading

    def is_recorded(self, trial: Trial) -> bool:
        """Whether the trial's run is there, finished, complete, and belongs to this sweep's rows."""
        if self.parent_run_id is None or not self._is_finished(trial):
            return False
        wanted = self._row_tags(trial) | {MLFLOW_PARENT_RUN_ID: self.parent_run_id}
        return wanted.items() <= self._past["trial", trial.key].data.tags.items()

    def _is_finished(self, trial: Trial) -> bool:
        run = self._past.get(("trial", trial.key))
        return run is not None and run.info.status == "FINISHED" and bool(run.data.metrics)

    def is_complete(self) -> bool:
        """Whether the sweep was recorded to its end before, and its table file is the same still."""
        parent = self._past.get(("sweep", self._sweep_key()))
        if parent is None or parent.info.status != "FINISHED" or has_backlog(self.folder):
            return False
        unchanged = parent.data.tags.get(f"{TAG}documents_digest") == self._documents_digest()
        return unchanged and all(self.is_recorded(trial) for trial in self.plan.trials)

    @property
    def parent_run_id(self) -> str | None:
        """None until the sweep's run has been found or made."""
        past = self._past.get(("sweep", self._sweep_key()))
        return self._recorder.parent_run_id or (past.info.run_id if past else None)

    @property
    def view_url(self) -> str | None:
        """The page of the sweep's runs with useful columns; None where MLflow is not behind an HTTP server."""
        return views.url(self.uri, self._recorder.experiment_id)

    @property
    def undelivered(self) -> int:
        """Events that MLflow does not have yet."""
        return self._journal.undelivered if self._journal else 0

    # Writing: each returns at once

    def begin(self) -> None:
        """Open the parent run, and a run for every trial that has none; those of the past are continued.

        Raises UserError when `folder` cannot be written to.
        """
        plan = self.plan
        self._journal = Journal.open(self.folder)
        self._delivery = Delivery(self._journal, self._recorder, self.errors)
        self._courier.start()
        tags = {
            f"{TAG}table": ",".join(table.name for table in plan.tables),
            f"{TAG}documents_digest": self._documents_digest(),
            f"{TAG}preset": plan.preset,
            f"{TAG}plan": json.dumps(plan.summary()),
            f"{TAG}commit": self._commit,
            MLFLOW_GIT_COMMIT: self._commit,
            MLFLOW_RUN_NOTE: views.note(plan, self._metric),
        }
        self._append(
            "sweep",
            key=self._sweep_key(),
            name=f"{plan.name} {plan.preset}",
            experiment=self.experiment,
            tags=tags,
            experiment_tags=views.experiment_tags(self._metric, views.varied_fields(plan)),
        )
        for name, text in {"plan.json": json.dumps(plan.as_json(), indent=1), **plan.documents}.items():
            self.log_file(text, name)
        for trial in plan.trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        """Open a run for a trial; those of the plan have theirs."""
        if trial.key in self._added:
            return
        self._added.add(trial.key)
        name = f"{self.plan.name_of(trial)}, seed {trial.config.seed}"
        described = trial_event(trial)
        self._append("trial", **described, name=name, tags=self._row_tags(trial), first_tags=self._trial_tags(trial))

    def record_found(self, trial: Trial, tags: Mapping[str, str]) -> None:
        """Record a trial whose stages are all in the store already, unless its run is finished too."""
        if self._is_finished(trial):
            return
        for stage, key in trial.keys.items():
            self.tell(trial, StageDone(stage, key.digest, found=True), tags)
        self.tell(trial, Finished({}), tags)

    def tell(self, trial: Trial, report: Report, tags: Mapping[str, str]) -> None:
        """Record what a trial or the gate reports."""
        told = _recorded(report)
        if told is None:
            return
        kind, kept = told
        self.add(trial)
        self._append(kind, key=trial.key, commit=self._commit, **kept)
        if kind == "finished" and self.register:
            self._append("register", key=trial.key, name=self.register)

    def log_file(self, content: Path | str, name: str) -> None:
        """Keep a file (a path) or a text (a string) with the parent run, as `name`; a later one replaces it."""
        target = self.folder / "files" / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            if isinstance(content, Path):
                shutil.copyfile(content, partial)
            else:
                partial.write_text(content, encoding="utf-8")
            os.replace(partial, target)
        except OSError as error:
            self._note_error(error)
            return
        self._append("file", name=name)

    def progress(self, counts: Mapping[str, float]) -> None:
        """Series of the parent run by seconds since the sweep began; more often than every 10 s is left out."""
        if time.monotonic() - self._progressed >= PROGRESS_EVERY:
            self._progressed = time.monotonic()
            self._append("progress", values=dict(counts))

    def end(self, status: str, metrics: Mapping[str, float] | None = None, *, patience: float = 60.0) -> None:
        """Deliver what is left; `status` is FINISHED, FAILED or KILLED, of the parent run.

        Trials that were not finished are set back to queued. Gives up when nothing could be delivered for `patience`
        seconds: the journal keeps the `undelivered` events for `deliver`, or for the next start of the sweep.
        """
        self._append("end", status=status, values=dict(metrics or {}))
        self._closing.set()
        self._news.set()
        left, since = self.undelivered, time.monotonic()
        while self._courier.is_alive() and not self._abandoned.is_set():
            self._courier.join(0.05)
            if self.undelivered < left:
                left, since = self.undelivered, time.monotonic()
            elif time.monotonic() - since > patience:
                self._abandoned.set()
                self.errors.append(f"{left} events are still in {self.folder}: {self._delivery.last_error}")
                self._courier.join(1.0)

    # In the background thread

    def _deliver(self) -> None:
        while not self._abandoned.is_set():
            if self._journal.undelivered:
                self._abandoned.wait(self._delivery.step())
            elif self._closing.is_set():
                break
            else:
                self._news.wait()
                self._news.clear()
                self._closing.wait(LINGER)
        self._journal.close()

    # Helpers

    def _append(self, kind: str, **values: Any) -> None:
        try:
            self._journal.append({"event": kind, "time": time.time(), **values})
        except OSError as error:
            self._note_error(error)
        self._news.set()

    def _note_error(self, error: Exception) -> None:
        self.errors.append(_told(error))
        log.warning("could not be recorded", exc_info=error)

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
            f"{TAG}seed": str(config.seed),
            f"{TAG}stage_keys": json.dumps({name: key.digest for name, key in trial.keys.items()}),
            f"{TAG}protocol": json.dumps(protocol),
            f"{TAG}commit": self._commit,
            MLFLOW_GIT_COMMIT: self._commit,
            **({} if self.plan.tables else {f"{TAG}search": self.plan.name}),
            **version_tags(pipeline.versions()),
        }


class Delivery:
    """Takes the events of a journal to MLflow. `errors` gets a line for every event that was refused for good."""

    def __init__(self, journal: Journal, recorder: Recorder, errors: list[str]):
        self.journal, self.recorder, self.errors = journal, recorder, errors
        self.last_error = "there was no time"
        self._recalled = False
        self._singly = 0  # events to be delivered one by one, because one of them is at fault
        self._attempts, self._since = 0, 0.0

    def step(self) -> float:
        """Deliver the next events; returns the seconds after which to go on, more than 0 after a failure.

        While MLflow does not answer, an event is tried for ever. One that MLflow refuses is skipped: at the second
        attempt if it will never be taken, else after PATIENCE seconds.
        """
        entries = self.journal.read(1 if self._singly else EVENTS_A_TIME)
        end = entries[-1][1]
        try:
            self._recall()
            self.recorder.write([event for event, _ in entries if event is not None])
        except Exception as error:
            self.recorder.forget()
            self.last_error = _told(error)
            self._attempts += 1
            if self._attempts == 1 or not self.recorder.answers():
                self._since = time.monotonic()
                return min(0.1 * 2**self._attempts, LONGEST_WAIT)
            if not _is_final(error) and time.monotonic() - self._since < PATIENCE:
                return min(0.1 * 2**self._attempts, LONGEST_WAIT)
            self._attempts = 0
            if len(entries) > 1:
                self._singly = len(entries)
                return 0.0
            self.errors.append(self.last_error)
            log.warning("could not write to MLflow: %s", entries[0][0], exc_info=error)
        self._attempts = 0
        self._singly = max(0, self._singly - 1)
        self.journal.advance(end, len(entries))
        return 0.0

    def _recall(self) -> None:
        """Learn what later events refer to from those that were delivered before, by a driver that has died."""
        if not self._recalled:
            for event in self.journal.history():
                self.recorder.learn(event)
            self._recalled = True


def deliver(folder: Path, store: Store, uri: str, *, patience: float = 60.0) -> int:
    """Take what is left in a sweep's folder to the MLflow at `uri`; returns how many events that was.

    Raises UserError when MLflow cannot be reached, or takes nothing for `patience` seconds, and when it refuses events.
    """
    delivered, errors = 0, []
    for journal in Journal.left_in(folder):
        delivery = Delivery(journal, Recorder(uri, store, journal.files), errors)
        since = time.monotonic()
        while before := journal.undelivered:
            wait = delivery.step()
            delivered += before - journal.undelivered
            if before > journal.undelivered:
                since = time.monotonic()
            elif time.monotonic() - since > patience:
                raise UserError(
                    f"--tracking-uri {without_password(uri)}: MLflow does not answer; {before} events of {folder} are "
                    "still to be delivered. Try again when it is back."
                )
            time.sleep(wait)
    if errors:
        raise UserError(
            f"{len(errors)} of {delivered} events in {folder} were refused, the first because of {errors[0]}"
        )
    return delivered


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


def _recorded(report: Report) -> tuple[str, dict[str, Any]] | None:
    match report:
        case Started():
            return "start", {"host": report.host, "gpu": report.gpu}
        case EpochEnded():
            return "epoch", {
                "stage": report.stage,
                "epoch": report.epoch,
                "values": {**report.values, **{f"probe/{n}": v for n, v in report.probe.items()}},
            }
        case Sampled():
            return "system", {"values": dict(report.values)}
        case StageDone():
            return "stage", {"stage": report.stage, "found": report.found}
        case Finished():
            return "finished", {}
        case Retried():
            return "retry", {"reason": report.failure.reason}
        case Failed():
            return "failed", {"reason": report.failure.reason, "traceback": report.failure.traceback}
        case Pruned():
            return "pruned", {}
    return None


def _is_final(error: Exception) -> bool:
    """Whether trying again must fail again, if MLflow answers."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404, 409)
    return isinstance(error, MissingArtifact | LookupError | TypeError | ValueError | AttributeError)


def _told(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return without_password(f"{type(error).__name__}: {first}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
