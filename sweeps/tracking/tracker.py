"""Records a sweep in MLflow: one parent run, one run per trial and one per distinct trained stage, found again by key.

Only the driver writes, so that no trial ever waits for the tracking server. What is told is put into a journal on disk
(`journal`) and delivered by a background thread (`delivery`, `recorder`), in order and many at a time: a server that is
away delays nothing, and what a dead driver did not deliver, the next one does. When a stage is done, its series are
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

from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_RUN_NOTE

from semformer import pipeline
from semformer.config import load_config
from semformer.store import Store
from sweeps.plan import protocol, scores
from sweeps.plan.trials import Sweep, Trial
from sweeps.reports import EpochEnded, Failed, Finished, Found, Pruned, Report, Retried, Sampled, StageDone, Started
from sweeps.tracking import rows, views
from sweeps.tracking.connection import TAG
from sweeps.tracking.delivery import Delivery, told
from sweeps.tracking.journal import Event, Journal, has_backlog
from sweeps.tracking.recorder import Recorder, trial_event, version_tags

log = logging.getLogger(__name__)
LINGER = 0.3
"""Seconds in which further events may join those that are about to be delivered."""
PROGRESS_EVERY = 10.0
SWEEP = "sweep"
"""The key under which the journal describes the sweep itself."""


class Tracker:
    """The runs of one sweep in one experiment, by default "<its name> <preset>".

    `folder` is the sweep's own, for the journal. `register` is the name under which every finished trial's
    segmentation network is registered, if any. Raises UserError when MLflow cannot be reached now; later it may be
    away. `errors` collects what MLflow refused; that is written when the same sweep is started again.
    """

    def __init__(
        self,
        uri: str,
        sweep: Sweep,
        store: Store,
        experiment: str | None = None,
        *,
        folder: Path,
        register: str | None = None,
    ):
        self.sweep, self.store, self.uri, self.folder, self.register = sweep, store, uri, folder, register
        self.experiment = experiment or f"{sweep.name} {sweep.preset}"
        self.errors: list[str] = []
        self._recorder = Recorder(uri, store, folder / "files", self._described)
        self._past = self._recorder.runs.open(self.experiment)
        self._commit = commit()
        config = next((trial.config for trial in sweep.samples), load_config(sweep.preset, sweep.overrides))
        self._metrics = [scores.recorded(name, config) for name in sweep.scores]
        self._journal: Journal | None = None
        self._added: set[str] = set()  # keys of the trials that the journal knows
        self._progressed = float("-inf")
        self._news, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._courier = threading.Thread(target=self._deliver, name="mlflow", daemon=True)

    # Reading

    def is_recorded(self, trial: Trial) -> bool:
        """Whether the trial's run is there, finished, complete, and of this sweep's rows."""
        run = self._past.get(("trial", trial.key))
        if run is None or not self._is_finished(trial):
            return False
        wanted = self._tags(trial) | rows.merged(run.tags, trial.rows, self._tables())
        return all(run.tags.get(name.removeprefix(TAG)) == text for name, text in wanted.items())

    def _is_finished(self, trial: Trial) -> bool:
        run = self._past.get(("trial", trial.key))
        return run is not None and run.status == "FINISHED" and run.has_metrics

    def is_complete(self) -> bool:
        """Whether the sweep was recorded to its end before, and its table files are the same still."""
        parent = self._past.get(("sweep", self._sweep_key()))
        if parent is None or parent.status != "FINISHED" or has_backlog(self.folder):
            return False
        unchanged = parent.tags.get("documents_digest") == self._documents_digest()
        return unchanged and all(self.is_recorded(trial) for trial in self.sweep.trials)

    @property
    def parent_run_id(self) -> str | None:
        """None until the sweep's run has been found or made."""
        past = self._past.get(("sweep", self._sweep_key()))
        return self._recorder.parent_run_id or (past.id if past else None)

    @property
    def view_url(self) -> str | None:
        """The page of the sweep's runs with useful columns; None where MLflow is not behind an HTTP server."""
        return views.url(self.uri, self._recorder.runs.experiment_id)

    @property
    def undelivered(self) -> int:
        """Events that MLflow does not have yet."""
        return self._journal.undelivered if self._journal else 0

    # Writing: each returns at once

    def begin(self) -> None:
        """Open the parent run, and a run for every trial that has none; those of the past are continued.

        Raises UserError when `folder` cannot be written to.
        """
        sweep = self.sweep
        self._journal = Journal(self.folder)
        self._delivery = Delivery(self._journal, self._recorder, self.errors)
        self._courier.start()
        tags = {
            f"{TAG}table": ",".join(self._tables()),
            f"{TAG}documents_digest": self._documents_digest(),
            f"{TAG}preset": sweep.preset,
            f"{TAG}sweep": self.folder.name,
            f"{TAG}plan": json.dumps(sweep.summary()),
            f"{TAG}commit": self._commit,
            MLFLOW_GIT_COMMIT: self._commit,
            MLFLOW_RUN_NOTE: views.note(sweep, self._metrics),
        }
        self._append(
            "sweep",
            describes=SWEEP,
            key=self._sweep_key(),
            name=f"{sweep.name} {sweep.preset}",
            experiment=self.experiment,
            tags=tags,
            experiment_tags=views.experiment_tags(self._metrics, views.varied_fields(sweep)),
        )
        for name, text in {"plan.json": json.dumps(sweep.as_json(), indent=1), **sweep.documents}.items():
            self.log_file(text, name)
        for trial in sweep.trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        """Open a run for a trial; those that are known beforehand have theirs."""
        if trial.key in self._added:
            return
        self._added.add(trial.key)
        self._append(
            "trial",
            describes=trial.key,
            **trial_event(trial),
            name=f"{self.sweep.name_of(trial)}, seed {trial.config.seed}",
            tables=self._tables(),
            tags=self._tags(trial),
            first_tags=self._first_tags(trial),
        )

    def tell(self, trial: Trial, report: Report, state: Mapping[str, str]) -> None:
        """Record what a trial or the gate reports; `state`: `TrialState.tags` after it."""
        self.add(trial)
        match report:
            case Found(stages) if not self._is_finished(trial):
                for stage in stages:
                    self._tell_stage(trial, stage)
                self._finish(trial, state)
            case Started():
                self._append("started", key=trial.key, commit=self._commit, state=state)
            case EpochEnded():
                probe = {f"probe/{name}": value for name, value in report.probe.items()}
                values = {**report.values, **probe}
                self._append("epoch", key=trial.key, stage=report.stage, epoch=report.epoch, values=values)
            case Sampled():
                self._append("system", key=trial.key, values=dict(report.values))
            case StageDone():
                self._tell_stage(trial, report.stage, state)
            case Finished():
                self._finish(trial, state)
            case Failed(failure):
                reason, traceback = failure.reason, failure.traceback
                self._append("failed", key=trial.key, reason=reason, traceback=traceback, state=state)
            case Retried() | Pruned():
                self._append("state", key=trial.key, state=state)

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
        done, since = self._done(), time.monotonic()
        while self._courier.is_alive() and not self._abandoned.is_set():
            self._courier.join(0.05)
            if self._done() != done:
                done, since = self._done(), time.monotonic()
            elif time.monotonic() - since > patience:
                self._abandoned.set()
                self.errors.append(f"{self.undelivered} events are still in {self.folder}: {self._delivery.last_error}")
                self._courier.join(1.0)

    # In the background thread

    def _deliver(self) -> None:
        assert self._journal
        while not self._abandoned.is_set():
            if self._journal.undelivered:
                self._abandoned.wait(self._delivery.step())
            elif self._closing.is_set():
                self._journal.clear()
                break
            else:
                self._news.wait()
                self._news.clear()
                self._closing.wait(LINGER)
        self._journal.close()

    # Helpers

    def _done(self) -> tuple[int, int]:
        """What changes while anything is delivered."""
        return self.undelivered, self._recorder.runs.written

    def _described(self, key: str) -> Event | None:
        return self._journal.described(key) if self._journal else None

    def _tell_stage(self, trial: Trial, stage: str, state: Mapping[str, str] | None = None) -> None:
        self._append("stage", key=trial.key, stage=stage, commit=self._commit, state=state)

    def _finish(self, trial: Trial, state: Mapping[str, str]) -> None:
        self._append("finished", key=trial.key, state=state)
        if self.register:
            self._append("register", key=trial.key, name=self.register)

    def _append(self, kind: str, *, describes: str | None = None, **values: Any) -> None:
        assert self._journal, "begin() comes first"
        try:
            self._journal.append({"event": kind, "time": time.time(), **values}, describes=describes)
        except OSError as error:
            self._note_error(error)
        self._news.set()

    def _note_error(self, error: Exception) -> None:
        self.errors.append(told(error, self.uri))
        log.warning("could not be recorded", exc_info=error)

    def _sweep_key(self) -> str:
        """Of what a parent run stands for: a table under a preset and overrides. More seeds extend a sweep."""
        return _digest(json.dumps([self.sweep.name, self.sweep.preset, sorted(self.sweep.overrides.items())]))

    def _tables(self) -> list[str]:
        return [table.name for table in self.sweep.tables]

    def _tags(self, trial: Trial) -> dict[str, str]:
        return {f"{TAG}preset": self.sweep.preset, f"{TAG}masks_read_by": json.dumps(trial.masks_read_by)}

    def _documents_digest(self) -> str:
        return _digest(json.dumps(self.sweep.documents))

    def _first_tags(self, trial: Trial) -> dict[str, str]:
        told = protocol.of_trial(trial.config, trial.keys)
        return {
            f"{TAG}seed": str(trial.config.seed),
            f"{TAG}stage_keys": json.dumps({name: key.digest for name, key in trial.keys.items()}),
            f"{TAG}protocol": json.dumps({"data": trial.data_name, **told}),
            f"{TAG}commit": self._commit,
            MLFLOW_GIT_COMMIT: self._commit,
            **({} if self.sweep.tables else {f"{TAG}search": self.sweep.name}),
            **version_tags(pipeline.versions()),
        }


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
