"""Drives a sweep from a plan or a search to its end: its folder, MLflow, Ray, the display, and the tables at last."""

import json
import logging
import math
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from semformer import pipeline
from semformer.config import ShapesConfig
from semformer.errors import first_line
from semformer.secrets import without_password
from semformer.store import Store
from sweeps.plan.packing import check_packing
from sweeps.plan.price import budget_hours, check_budget, estimate, price
from sweeps.plan.trials import Plan, Sweep, Trial, distinct_stages
from sweeps.reports import EpochEnded, Failed, Finished, Found, Pruned, Report
from sweeps.tracking.display import Display
from sweeps.tracking.folder import SweepFolder
from sweeps.tracking.state import SweepState, duration
from sweeps.tracking.tracker import Tracker

if TYPE_CHECKING:
    from sweeps.cluster.preflight import Images
    from sweeps.schedule.gate import Gate
    from sweeps.search.search import Search

log = logging.getLogger(__name__)
PATIENCE = 120.0
"""Seconds for which MLflow, or a study's database, may be away at the end, before the rest is left for later."""
SHARE_OF_TIME = 0.05
"""Of the driver's time, at most, that goes into writing its state."""


@dataclass(frozen=True)
class Options:
    """How a sweep is run; see `semformer-sweep run --help`. `data` is a VOC devkit's folder."""

    tracking_uri: str
    data: Path | None
    experiment: str | None
    register: str | None
    address: str | None
    budget: str | None
    tflops: float
    cpus_per_trial: int
    gpus_per_trial: float | None
    max_concurrent: int | None
    silence: float
    json: bool


class Drive:
    """One sweep being driven; `run` does it all."""

    def __init__(self, options: Options, console: Console, sweep: "Plan | Search", store: Store, folder: SweepFolder):
        """Raises UserError for a budget that cannot be read, and when MLflow cannot be used."""
        self.options, self.console, self.store, self.folder = options, console, store, folder
        self.sweep: Sweep = sweep
        self.plan = sweep if isinstance(sweep, Plan) else None
        self.search = None if isinstance(sweep, Plan) else sweep
        self.budget = budget_hours(options.budget) if options.budget else math.inf
        self.state = SweepState(sweep)
        self.display = Display(self.state, console)
        self._scores = self._read_scores()
        self.missing = [trial for trial in sweep.trials if trial.key not in self._scores]
        self.gave_up = False
        self._gpus = 1.0  # that a trial's time counts for
        self._seconds: dict[str, float] = {}  # that stages take, by digest
        self._kept: set[str] | None = None  # digests that the store keeps for this sweep
        self._told: set[str] = set()  # keys of trials that the search found by itself
        self._next_save, self._unsaved = 0.0, False
        experiment = options.experiment or (sweep.name if self.search else None)
        with console.status("opening MLflow"):
            self.tracker = Tracker(
                options.tracking_uri, sweep, store, experiment, folder=folder.path, register=options.register
            )
        if self.search:
            self.search.found = self._found_by_search

    def run(self) -> int:
        """Run what is missing; returns the exit status. Raises UserError when the budget or the cluster forbids it."""
        self._keep({key.digest for trial in self.sweep.trials for key in trial.keys.values()})
        if self.plan and not self.missing and self.tracker.is_complete():
            for trial in self.plan.trials:
                self.state.tell(trial, self._found(trial), self._metrics(trial))
            self._save()
            self._print(f"nothing to do: all {len(self.plan.trials)} trials are finished and recorded")
            return self._conclude()
        if self.plan and self.options.budget:
            plan = self.plan
            cost = price(plan.trials, plan.cached, self.store, gpus=1, tflops=self.options.tflops)
            check_budget(cost, self.options.budget)
        self._announce()
        with self._ray() as run_trials:
            self.tracker.begin()
            for name, text in (self.search.documents if self.search else {}).items():
                self.tracker.log_file(text, name)
            status = "KILLED"
            try:
                with self.display:
                    for trial in self.sweep.trials:
                        if trial.key in self._scores:
                            self.tell(trial, self._found(trial))
                    run_trials()
                status = "FAILED" if self.failed else "FINISHED"
            finally:
                self._save()
                counts = self.state.counts()
                try:
                    counts |= self._close_search()
                finally:
                    with self.console.status("delivering the last records to MLflow"):
                        self.tracker.end(status, counts, patience=PATIENCE)
        self.display.summary()
        return self._conclude()

    @property
    def failed(self) -> bool:
        """Whether a row has no result. A search goes on without those that failed, unless nothing could be started."""
        return self.gave_up if self.search else not self.state.complete

    # While it runs

    def tell(self, trial: Trial, report: Report) -> None:
        """What a trial or the gate reports, passed on to the display, MLflow and the search."""
        metrics = self._metrics(trial) if isinstance(report, Found) else {}
        line = self.state.tell(trial, report, metrics)
        self.tracker.tell(trial, report, self.state.trials[trial.key].tags())
        if self.search and trial.key not in self._told:
            self._tell_search(self.search, trial, report, metrics)
        self.display.tell(trial, line)

    def every_second(self, gate: "Gate") -> bool:
        """Draws the display, and keeps the state for `status`; whether `stop` has asked for the end."""
        now = time.monotonic()
        if now >= self._next_save:
            self.state.explain(gate.waiting())
            self.state.unfit = dict(gate.faults.unfit)
            self._save()
            self.tracker.progress(self.state.counts())
            cost = time.monotonic() - now
            self._next_save = now + cost / SHARE_OF_TIME
        self.display.refresh()
        if self.search and self.search.untold:
            self._flush(self.search)
        self.gave_up = gate.over is not None
        return self.folder.asked_to_stop()

    def _save(self) -> None:
        """For `status`; a full disk must not end the sweep."""
        try:
            self.folder.save(self.state.as_json())
        except OSError as error:
            if not self._unsaved:
                self._print(f"[yellow]`status` has no news:[/] {escape(str(self.folder.path))}: {error.strerror}")
            self._unsaved = True

    def _read_scores(self) -> dict[str, Mapping[str, float]]:
        """The scores of the trials whose ends were in the store, by trial key; what is damaged is made again."""
        cached = self.sweep.cached
        ended = [trial for trial in self.sweep.trials if all(key.digest in cached for key in trial.ends)]
        found = self.store.find_many({key: None for trial in ended for key in trial.ends})
        return {
            trial.key: pipeline.scores(found[key] for key in trial.ends)
            for trial in ended
            if all(key in found for key in trial.ends)
        }

    def _found(self, trial: Trial) -> Found:
        """Of a trial that has its scores."""
        return Found(tuple(name for name, key in trial.keys.items() if key.digest in self.sweep.cached))

    def _metrics(self, trial: Trial) -> Mapping[str, float]:
        if trial.key not in self._scores:
            ends = (self.store.find(key, verify=False) for key in trial.ends)
            return pipeline.scores(filter(None, ends))
        return self._scores[trial.key]

    def _tell_search(self, search: "Search", trial: Trial, report: Report, metrics: Mapping[str, float]) -> None:
        match report:
            case Finished():
                search.tell(trial, report.metrics)
            case Found():
                search.tell(trial, metrics)
            case Failed():
                search.tell(trial, None, report.failure.reason)
            case Pruned():
                search.tell(trial, None, pruned=True)
            case EpochEnded() if report.probe:
                search.report(trial, report.epoch, report.probe)

    def _flush(self, search: "Search") -> bool:
        """Whether the study knows every result."""
        try:
            search.flush()
        except Exception as error:  # whatever its database raises while it is away
            log.debug("the study is still away: %s", error)
        return not search.untold

    def _ask(self) -> Trial | None:
        """Another suggestion, unless the search has none or its budget is used up."""
        assert self.search
        spent = self.search.spent(self._held())
        todo = sum(self._seconds.get(digest, 0.0) for digest in self.state.in_work())
        rest = max(0.0, todo - self.state.at_work()) * self._gpus
        if spent + rest >= 3600 * self.budget:
            self._print(
                f"--budget {self.options.budget}: {duration(spent)} are spent, and trials that run may need "
                f"{duration(rest)}: nothing more is suggested"
            )
            return None
        trial = self.search.ask()
        self._keep(self.search.reached())
        if trial:
            self._estimate([trial])
            self.tracker.add(trial)
        return trial

    def _held(self) -> float:
        """GPU-seconds that this driver's trials have held (seconds, where they have no GPU)."""
        return self.state.held() * self._gpus

    def _estimate(self, trials: list[Trial]) -> None:
        estimates = estimate(trials, self.sweep.cached, self.store, tflops=self.options.tflops)
        self._seconds |= {digest: one.seconds for digest, one in estimates.items()}

    def _found_by_search(self, trial: Trial, report: Found) -> None:
        """The study knows it already."""
        self._told.add(trial.key)
        self.tell(trial, report)

    def _keep(self, digests: set[str]) -> None:
        """Tell the store, for `gc`, that this sweep reaches these too: it may have reached others with other seeds."""
        name = f"{self.folder.name}.{self.folder.id}"
        if self._kept is None:
            known = self.store.roots.kept(name)
            self._kept = set(known.digests) if known else set()
        if not digests <= self._kept:
            self._kept |= digests
            self.store.roots.keep(name, self._kept, {"plan": self.sweep.name, "preset": self.sweep.preset})

    # Before and after

    def _announce(self) -> None:
        sweep = self.sweep
        to_make = Counter(key.stage for key in self.plan.missing()) if self.plan else {}
        told = ", ".join(f"{n} {name}" for name, n in to_make.items()) or "nothing, only to record"
        rows = f"{sweep.summary()['rows']} rows, " if len(sweep.tables) > 1 else ""
        what = sweep.title if self.search else f"{rows}{len(sweep.trials)} trials; to make: {told}"
        self._print(f"{sweep.name}, preset {sweep.preset}: {what}")
        self._print(f"sweep {self.folder.name}: semformer-sweep status, stop or resume {self.folder.name}")

    @contextmanager
    def _ray(self) -> Iterator[Callable[[], None]]:
        """Inside it, what runs the trials. Ray is not even started where there is nothing to run."""
        if not self.missing and not self.search:
            yield lambda: None
            return
        options = self.options
        with ExitStack() as stack:
            with self.console.status("starting Ray"):
                from sweeps.cluster import nodes, preflight, runner
                from sweeps.cluster.connect import connect

                stack.enter_context(connect(options.address))
            share = nodes.trial_share(options.cpus_per_trial, options.gpus_per_trial, address=options.address)
            self._gpus = share["gpu"] or 1.0
            images = self._images() if options.address else []
            watch = preflight.Watch(share, images, self.store.location, ask=options.address is not None)
            stack.enter_context(closing(watch))
            with self.console.status("asking every node of the cluster"):
                watch.wait()
            if 0 < share["gpu"] < 1:
                keys, memory = distinct_stages(self.sweep.samples), min(watch.gpu_memory(), default=0)
                self._print(check_packing(keys, self.store, gpus_per_trial=share["gpu"], gpu_bytes=memory))
            self._estimate(list(self.sweep.trials))
            yield lambda: runner.run_trials(
                self.missing,
                self.store,
                self.tell,
                share=share,
                watch=watch,
                unfit=self._tell_unfit,
                more=self._ask if self.search else None,
                seconds=lambda key: self._seconds.get(key.digest, 1.0),
                published=self.sweep.cached,
                max_concurrent=options.max_concurrent,
                silence=options.silence,
                every_second=self.every_second,
                scheduler=self.search.scheduler() if self.search else None,
            )

    def _images(self) -> "list[Images]":
        """What the sweep reads, once for each data set."""
        from sweeps.cluster.preflight import Images

        folder = self.options.data
        found: dict[Path | ShapesConfig, dict[str, str]] = {}  # split -> digest
        for trial in self.sweep.samples:
            config = trial.config
            if where := folder or config.data.shapes:
                of_splits = found.setdefault(where, {})
                for name, _ in pipeline.packs(config, tuple(trial.keys)):
                    if name not in of_splits:
                        of_splits[name] = pipeline.open_data(config, folder)[name].digest
        return [Images(folder or where, digests) for where, digests in found.items()]

    def _tell_unfit(self, why: str) -> None:
        self._print(f"[yellow]no work any more for[/] {escape(why)}")

    def _close_search(self) -> dict[str, float]:
        """Best configs, importances and pictures, in the folder and with the parent run; what sharing saved."""
        if not self.search:
            return {}
        try:
            return self._report_search(self.search)
        except Exception as error:  # whatever its database raises
            log.debug("no report of the search", exc_info=error)
            self._print(
                f"[red]the study's database cannot be used now[/] ({escape(first_line(error))}). Nothing is lost: "
                f"`semformer-sweep resume {self.folder.name}` tells it what is in the store"
            )
            self.gave_up = True
            return {}

    def _report_search(self, search: "Search") -> dict[str, float]:
        from sweeps.search.report import write  # matplotlib takes a while to import

        end = time.monotonic() + PATIENCE
        while not self._flush(search) and time.monotonic() < end:
            time.sleep(1.0)
        search.close(self._held())
        for path in write(search, self.folder.path / "report"):
            self.tracker.log_file(path, path.name)
            self._print(f"wrote {escape(str(path))}")
        for trial in search.best():
            scores = zip(search.objectives, trial.values, strict=True)
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores)
            params = ", ".join(
                f"{axis} {value:.4g}" if isinstance(value, float) else f"{axis} {value}"
                for axis, value in trial.params.items()
            )
            is_start = trial.user_attrs["trial_key"] == search.start_key
            what = "the preset's own config" if is_start else params
            self._print(f"[bold]best[/]: trial {trial.number}, {escape(f'{told}: {what}')}")
        saving = search.saving() | {"held_seconds": search.spent(self._held())}
        spent, unshared = saving["spent_seconds"], saving["unshared_seconds"]
        self._print(
            f"made in {duration(spent)} what would have taken {duration(unshared)} without sharing; "
            f"{saving['trials_inference_only']:g} trials needed no training; in all, trials ran for "
            f"{duration(saving['held_seconds'])}"
        )
        return {f"search/{name}": value for name, value in saving.items()}

    def _conclude(self) -> int:
        """Where everything is, and the tables."""
        options, tracker = self.options, self.tracker
        command = ["semformer-sweep", "ui", "--tracking-uri", options.tracking_uri, "--experiment", tracker.experiment]
        self._print(f"Runs, curves and pictures: {escape(tracker.view_url or shlex.join(command))}")
        if tracker.undelivered:
            self._print(
                f"[red]{tracker.undelivered} records could not be written to MLflow[/] and are kept in "
                f"{escape(str(self.folder.path))}: semformer-sweep sync {self.folder.name}"
            )
        for error in tracker.errors[:3]:
            self._print(f"[red]MLflow:[/] {escape(error)}")
        if self.plan and not tracker.undelivered:
            self._compile_tables(self.plan)
        if options.json:
            told = {"sweep": self.folder.name, "experiment": tracker.experiment, "parent_run_id": tracker.parent_run_id}
            planned = {"trials": len(self.state.trials)} if self.search else self.sweep.summary()
            print(json.dumps({**planned, **self.state.counts(), **told}))
        return 1 if self.failed or tracker.undelivered or tracker.errors else 0

    def _compile_tables(self, plan: Plan) -> None:
        """By the program for it, as a user would: this floor knows nothing of the one above."""
        folder = self.folder.path / "tables"
        command = [sys.executable, "-m", "analysis.cli", *(str(table.path) for table in plan.tables)]
        command += ["--preset", plan.preset, "--experiment", self.tracker.experiment, "--log", "--out", str(folder)]
        command += [part for field, value in plan.overrides.items() for part in ("--set", f"{field}={value}")]
        secret = {"MLFLOW_TRACKING_URI": self.options.tracking_uri}  # others see a command's arguments
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | secret)
        if not done.stdout:
            self._print(f"no tables: {escape(done.stderr.removeprefix('error: '))}")
            return
        if done.returncode:
            self._print(escape("\n".join(line for line in done.stderr.splitlines() if line.startswith("error"))))
        self._print(escape(done.stdout if len(plan.tables) == 1 else done.stdout.rstrip().rpartition("\n")[2]))
        self._print(f"tables: {escape(str(folder))}")

    def _print(self, text: str) -> None:
        if text:
            uris = (self.options.tracking_uri,)
            self.console.print(without_password(text, *uris), highlight=False, soft_wrap=True)
