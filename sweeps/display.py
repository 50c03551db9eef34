"""What a sweep shows while it runs: a live table in a terminal, a line per epoch elsewhere; and its summary."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from sweeps.plan import Plan, Trial

LINE_EVERY = 30.0
"""Seconds after which a trial gets a line without having ended an epoch."""
SHOWN = 30
"""Trials in the live table: the running ones first, then those that ended last."""
NO_LOSSES = ("lr", "images_per_second", "micro_batch", "gpu_memory")
"""Of what an epoch measures; not in its line."""
STYLES = {"running": "bold", "finished": "green", "found": "green", "failed": "red", "queued": "dim"}


@dataclass
class _State:
    status: str = "queued"
    stage: str = ""
    epoch: str = ""
    told: str = ""
    left: float = math.nan
    since: float = 0.0
    reason: str = ""


class Display:
    """Use as a context manager; `tell` takes the reports of `sweeps.trial` and `sweeps.gate`."""

    def __init__(self, plan: Plan, console: Console):
        self.plan, self.console = plan, console
        self.states = {trial.key: _State() for trial in plan.trials}
        self.made: dict[str, list[float]] = defaultdict(list)  # seconds by stage
        self.found: Counter[str] = Counter()
        self.there = set(plan.cached)
        self.workers = 1
        self.started = time.monotonic()
        live = Live(get_renderable=self._grid, console=console, refresh_per_second=2, transient=False)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> "Display":
        self.started = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def record_found(self, trial: Trial) -> None:
        self.states[trial.key] = _State("found", told=self._result(trial, {}))
        self.found.update(list(trial.keys))

    def tell(self, trial: Trial, report: Mapping[str, Any]) -> None:
        state, event = self.states[trial.key], report["event"]
        line = ""
        if event == "start":
            state.status, state.stage, state.since = "running", next(iter(trial.keys)), self.seconds
            self.workers = max(self.workers, sum(s.status == "running" for s in self.states.values()))
        elif event in ("progress", "epoch"):
            state.stage, state.left = report["stage"], report["seconds_left"]
            state.epoch = f"{report['epoch']}/{report['epochs']}" if report["epochs"] else ""
            losses = [f"{n} {v:.3f}" for n, v in report["values"].items() if n not in NO_LOSSES]
            speed = f"{report['images_per_second']:.0f} img/s"
            state.told = " ".join(filter(None, [*losses, speed, report["note"]]))
            if event == "epoch" or self.seconds - state.since > LINE_EVERY:
                epoch = f"epoch {state.epoch}, " if state.epoch else ""
                line = f"{state.stage} {epoch}{state.told}, {_duration(state.left)} left"
        elif event == "waiting":
            state.stage, state.told = report["stage"], f"waiting: {report['holder']} makes it"
        elif event == "stage":
            self.there.add(report["key"])
            if report["found"]:
                self.found[report["stage"]] += 1
            else:
                self.made[report["stage"]].append(report["seconds"])
                line = f"{report['stage']} made in {_duration(report['seconds'])}"
            state.stage, state.epoch, state.told, state.left = report["stage"], "", "done", math.nan
        elif event == "finished":
            self.states[trial.key] = state = _State("finished", told=self._result(trial, report["metrics"]))
            line = f"finished, {state.told}"
        elif event == "retry":
            self.states[trial.key] = _State(told=f"again after {report['error']}")
            line = f"tried again after {report['reason']}"
        elif event == "failed":
            self.states[trial.key] = _State("failed", report["stage"], told=report["error"], reason=report["reason"])
            line = f"failed: {report['reason']}"
        if line:
            state.since = self.seconds
            if not self._live:
                self.console.print(
                    f"{self.seconds:6.0f} s  {self._name(trial)}: {line}", highlight=False, markup=False, soft_wrap=True
                )

    def summary(self) -> None:
        """What was trained, found and failed, in how long."""
        counts = Counter(state.status for state in self.states.values())
        trials = ", ".join(f"{n} {status}" for status, n in counts.items())
        made = ", ".join(f"{len(seconds)} {name}" for name, seconds in self.made.items()) or "nothing"
        work = _duration(sum(map(sum, self.made.values())))
        self.console.print(f"{len(self.states)} trials: {trials}", highlight=False)
        self.console.print(
            f"made: {made} ({work} of work in {_duration(self.seconds)})", highlight=False, soft_wrap=True
        )
        if self.found:
            found = ", ".join(f"{n} times {name}" for name, n in self.found.items())
            self.console.print(f"found in the store: {found}", highlight=False, soft_wrap=True)
        for trial in self.plan.trials:
            if reason := self.states[trial.key].reason:
                self.console.print(
                    f"[red]failed[/] {self._name(trial)}: {escape(reason)}", highlight=False, soft_wrap=True
                )

    def counts(self) -> dict[str, float]:
        """For the parent run: trials by how they ended, stages made, seconds of work and of the clock."""
        ended = Counter(state.status for state in self.states.values())
        made = {f"sweep/made_{name}": len(seconds) for name, seconds in self.made.items()}
        seconds = {"sweep/work_seconds": sum(map(sum, self.made.values())), "sweep/wall_seconds": self.seconds}
        return {f"sweep/{status}": float(n) for status, n in ended.items()} | made | seconds

    @property
    def complete(self) -> bool:
        return all(state.status in ("finished", "found") for state in self.states.values())

    def _name(self, trial: Trial) -> str:
        seed = f" (seed {trial.config.seed})" if len(self.plan.seeds) > 1 else ""
        return self.plan.rows_of(trial) + seed

    def _result(self, trial: Trial, metrics: Mapping[str, float]) -> str:
        names = [metric.name for table in self.plan.tables for metric in table.metrics]
        values = {name: metrics.get(f"cam/{trial.config.data.eval_split}/{name}") for name in names}
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value is not None)

    def _left(self) -> float:
        """Seconds that the sweep may still take, once every kind of stage that is missing has been measured."""
        open_trials = [trial for trial in self.plan.trials if self.states[trial.key].status in ("queued", "running")]
        missing = {key for trial in open_trials for key in trial.keys.values() if key.digest not in self.there}
        if any(key.stage not in self.made for key in missing):
            return math.nan
        return sum(sum(self.made[key.stage]) / len(self.made[key.stage]) for key in missing) / self.workers

    def _grid(self) -> Grid:
        done = sum(state.status in ("finished", "found", "failed") for state in self.states.values())
        left = self._left()
        caption = f"{done} of {len(self.states)} trials, {_duration(self.seconds)}"
        caption += f", about {_duration(left)} left" if left == left and done < len(self.states) else ""
        grid = Grid(caption=caption, caption_justify="left", expand=False)
        for name in ("trial", "row", "status", "stage", "epoch", "metric", "time left"):
            grid.add_column(name, justify="right" if name == "time left" else "left", overflow="ellipsis", no_wrap=True)
        order = ["running", "failed", "queued", "finished", "found"]
        shown = self.plan.trials
        if len(shown) > SHOWN:
            shown = sorted(shown, key=lambda trial: order.index(self.states[trial.key].status))[:SHOWN]
        for trial in shown:
            state = self.states[trial.key]
            cells = (trial.key[:8], self._name(trial), state.status, state.stage, state.epoch, state.told)
            left = _duration(state.left) if state.left == state.left else ""
            grid.add_row(*(Text(cell) for cell in (*cells, left)), style=STYLES[state.status])
        return grid


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
