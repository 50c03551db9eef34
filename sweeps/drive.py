"""Drives a sweep from a plan or a search to its end: its folder, MLflow, Ray, the display, and the tables at last."""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from semformer.pipeline import open_data
from semformer.store import Store
from sweeps.plan.packing import check_packing
from sweeps.plan.price import budget_hours, check_budget, estimate, price
from sweeps.plan.trials import Plan, Trial, distinct_stages
from sweeps.tracking.display import Display
from sweeps.tracking.folder import SweepFolder
from sweeps.tracking.state import SweepState, duration
from sweeps.tracking.tracker import Tracker, without_password

if TYPE_CHECKING:
    from sweeps.schedule.gate import Gate
    from sweeps.search.study import Search

PATIENCE = 120.0
"""Seconds for which MLflow may be away at the end, before its records are left for `sync`."""
SHARE_OF_TIME = 0.05
"""Of the driver's time, at most, that goes into writing its state."""


class Drive:
    """One sweep being driven; `run` does it all."""

    def __init__(
        self,
        options: argparse.Namespace,
        console: Console,
        plan: Plan,
        store: Store,
        folder: SweepFolder,
        search: "Search | None" = None,
    ):
        """`search` suggests trials beyond those of the plan.

        Raises UserError for a budget that cannot be read, and when MLflow cannot be used.
        """
        self.options, self.console, self.plan, self.store = options, console, plan, store
        self.folder, self.search = folder, search
        self.budget = budget_hours(options.budget) if options.budget else math.inf
        self.state = SweepState(plan)
        self.display = Display(self.state, console)
        self.missing = [trial for trial in plan.trials if not plan.is_cached(trial)]
        self._kept: set[str] | None = None  # digests that the store keeps for this sweep
        self._told: set[str] = set()  # keys of trials that the search found by itself
        self._next_save = 0.0
        experiment = options.experiment or (plan.name if search else None)
        with console.status("opening MLflow"):
            self.tracker = Tracker(
                options.tracking_uri, plan, store, experiment, folder=folder.path, register=options.register
            )
        if search:
            search.found = self._found_by_search

    def run(self) -> int:
        """Run what is missing; returns the exit status. Raises UserError when the budget or the cluster forbids it."""
        if not self.missing and not self.search and self.tracker.is_complete():
            self._tell_found()
            self.folder.save(self.state.as_json())
            self._print(f"nothing to do: all {len(self.plan.trials)} trials are finished and recorded")
            return self._conclude(self.state.counts(), failed=False)
        if self.options.budget and self.plan.trials:
            plan = self.plan
            cost = price(plan.trials, plan.cached, self.store, gpus=self.options.gpus, tflops=self.options.tflops)
            check_budget(cost, self.options.budget)
        self._announce()
        with self._ray() as run_trials:
            self._keep({key.digest for trial in self.plan.trials for key in trial.keys.values()})
            self.tracker.begin()
            for name, text in (self.search.documents if self.search else {}).items():
                self.tracker.log_file(text, name)
            status = "KILLED"
            try:
                with self.display:
                    self._tell_found()
                    run_trials()
                status = "FAILED" if self.failed else "FINISHED"
            finally:
                self.folder.save(self.state.as_json())
                counts = self.state.counts()
                try:
                    counts |= self._report_search()
                finally:
                    with self.console.status("delivering the last records to MLflow"):
                        self.tracker.end(status, counts, patience=PATIENCE)
        self.display.summary()
        return self._conclude(self.state.counts(), failed=self.failed)

    @property
    def failed(self) -> bool:
        """Whether a row has no result. A search goes on without those that failed."""
        return not self.search and not self.state.complete

    # While it runs

    def tell(self, trial: Trial, report: Mapping[str, Any]) -> None:
        """What a trial or the gate reports, passed on to MLflow, the search and the display."""
        event = report["event"]
        if event == "found":
            artifact = self.store.find(trial.keys["evaluate"], verify=False)
            report = {**report, "metrics": artifact.info["metrics"] if artifact else {}}
            self.tracker.record_found(trial)
        else:
            self.tracker.tell(trial, report)
        if self.search and trial.key not in self._told:
            if event in ("finished", "found"):
                self.search.tell(trial, report["metrics"])
            elif event in ("failed", "pruned"):
                self.search.tell(trial, None, report.get("reason", ""), pruned=event == "pruned")
            elif event == "epoch":
                self.search.report(trial, report["epoch"], report["values"])
        self.display.tell(trial, report)

    def every_second(self, gate: "Gate") -> bool:
        """Keeps the state for `status`; whether `stop` has asked for the end."""
        now = time.monotonic()
        if now >= self._next_save:
            self.state.explain(gate.waiting())
            self.folder.save(self.state.as_json())
            self.tracker.progress(self.state.counts())
            cost = time.monotonic() - now
            self._next_save = now + cost / SHARE_OF_TIME
        return self.folder.asked_to_stop()

    def _ask(self) -> Trial | None:
        """Another suggestion, unless the search has none or has used up its budget."""
        assert self.search
        spent = self.search.saving()["spent_seconds"] / 3600
        if spent >= self.budget:
            self._print(f"--budget {self.options.budget} is used up: nothing more is suggested")
            return None
        trial = self.search.ask()
        self._keep(self.search.reached())
        if trial:
            self.tracker.add(trial)
        return trial

    def _tell_found(self) -> None:
        for trial in self.plan.trials:
            if self.plan.is_cached(trial):
                self.tell(trial, {"event": "found"})

    def _found_by_search(self, trial: Trial) -> None:
        """The study knows it already."""
        self._told.add(trial.key)
        self.tell(trial, {"event": "found"})

    def _keep(self, digests: set[str]) -> None:
        """Tell the store, for `gc`, that this sweep reaches these too: it may have reached others with other seeds."""
        if self._kept is None:
            known = self.store.roots().get(self.folder.name)
            self._kept = set(known.digests) if known else set()
        if not digests <= self._kept:
            self._kept |= digests
            self.store.keep(self.folder.name, self._kept, {"plan": self.plan.name, "preset": self.plan.preset})

    # Before and after

    def _announce(self) -> None:
        plan = self.plan
        to_make = {name: count.distinct - count.cached for name, count in plan.stages.items()}
        told = ", ".join(f"{n} {name}" for name, n in to_make.items() if n) or "nothing, only to record"
        rows = f"{plan.summary()['rows']} rows, " if len(plan.tables) > 1 else ""
        what = plan.title if self.search else f"{rows}{len(plan.trials)} trials; to make: {told}"
        self._print(f"{plan.name}, preset {plan.preset}: {what}")
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
                from sweeps.cluster import connect, nodes, preflight, runner

                stack.enter_context(connect.connect(options.address))
            share = nodes.trial_share(options.cpus_per_trial, options.gpus_per_trial, address=options.address)
            if options.address:
                with self.console.status("asking every node of the cluster"):
                    gpu_memory = self._preflight(share)
            else:
                gpu_memory = preflight.gpu_memory()
            if 0 < share["gpu"] < 1 and gpu_memory:
                keys = distinct_stages(self.missing)
                fits = check_packing(keys, self.store, gpus_per_trial=share["gpu"], gpu_bytes=min(gpu_memory))
                self._print(fits)
            estimates = estimate(self.plan.trials, self.plan.cached, self.store, tflops=options.tflops)
            seconds = {digest: one.seconds for digest, one in estimates.items()}
            yield lambda: runner.run_trials(
                self.missing,
                self.store,
                self.tell,
                share=share,
                more=self._ask if self.search else None,
                ahead=2 * nodes.places(share),  # what is held back was drawn without knowing the latest results
                seconds=lambda key: seconds.get(key.digest, 1.0),
                max_concurrent=options.max_concurrent,
                silence=options.silence,
                every_second=self.every_second,
                asha=runner.asha(self.search.own.segmentor.epochs) if self.search and options.scheduler else None,
            )

    def _preflight(self, share: Mapping[str, float]) -> tuple[int, ...]:
        """The memory of every GPU of the cluster, in bytes. Raises UserError that names the nodes at fault."""
        from sweeps.cluster.preflight import preflight

        found: list[int] = []
        configs = [self.search.own] if self.search else [trial.config for trial in self.missing]
        folder = self.options.data
        for shapes, config in {config.data.shapes: config for config in configs}.items():
            data = open_data(config, folder)
            splits = (config.data.train_split, config.data.eval_split)
            reports = preflight(
                data=folder or shapes.model_dump(),
                digests={name: data[name].digest for name in splits},
                store=self.store.location,
                share=share,
            )
            found = [size for report in reports for size in report.gpu_memory]
        return tuple(found)

    def _report_search(self) -> dict[str, float]:
        """Best configs, importances and pictures, in the folder and with the parent run; what sharing saved."""
        if not self.search:
            return {}
        for path in self.search.write_report(self.folder.path / "report"):
            self.tracker.log_file(path, path.name)
            self._print(f"wrote {escape(str(path))}")
        saving = self.search.saving()
        spent, unshared = saving["spent_seconds"], saving["unshared_seconds"]
        self._print(
            f"made in {duration(spent)} what would have taken {duration(unshared)} without sharing; "
            f"{saving['trials_inference_only']:g} trials needed no training"
        )
        return {f"search/{name}": value for name, value in saving.items()}

    def _conclude(self, counts: Mapping[str, float], *, failed: bool) -> int:
        """Where everything is, and the tables."""
        options, tracker = self.options, self.tracker
        where = without_password(tracker.view_url or f"mlflow ui --backend-store-uri {options.tracking_uri}")
        self._print(f"Runs, curves and pictures: {where} (experiment {tracker.experiment!r})")
        if tracker.undelivered:
            self._print(
                f"[red]{tracker.undelivered} records could not be written to MLflow[/] and are kept in "
                f"{escape(str(self.folder.path))}: semformer-sweep sync {self.folder.name}"
            )
        for error in tracker.errors[:3]:
            self._print(f"[red]MLflow:[/] {escape(error)}")
        if self.plan.tables and not tracker.undelivered:
            self._compile_tables()
        if options.json:
            told = {"sweep": self.folder.name, "experiment": tracker.experiment, "parent_run_id": tracker.parent_run_id}
            planned = {"trials": len(self.state.trials)} if self.search else self.plan.summary()
            print(json.dumps({**planned, **counts, **told}))
        return 1 if failed or tracker.undelivered or tracker.errors else 0

    def _compile_tables(self) -> None:
        """By the program for it, as a user would: this floor knows nothing of the one above."""
        options, folder = self.options, self.folder.path / "tables"
        command = [sys.executable, "-m", "analysis.cli", "tables", *(str(table.path) for table in self.plan.tables)]
        command += ["--preset", self.plan.preset, "--tracking-uri", options.tracking_uri]
        command += ["--experiment", self.tracker.experiment, "--log", "--out", str(folder)]
        command += [part for field, value in self.plan.overrides.items() for part in ("--set", f"{field}={value}")]
        done = subprocess.run(command, capture_output=True, text=True)
        told = done.stdout if len(self.plan.tables) == 1 else done.stdout.splitlines()[-1]
        self._print(escape(done.stderr if done.returncode else told))
        self._print(f"tables: {escape(str(folder))}")

    def _print(self, text: str) -> None:
        if text:
            self.console.print(text, highlight=False, soft_wrap=True)
