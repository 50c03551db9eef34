"""What a sweep shows: a live table in a terminal, a line per epoch elsewhere; and its summary."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from sweeps.tracking.state import Snapshot, SweepState, TrialState, duration

if TYPE_CHECKING:
    from sweeps.plan.trials import Trial

SHOWN = 30
"""Trials in the table: the running ones first, then those that failed or wait, then those that ended."""
WIDEST = 32
"""Characters of a column; what a trial tells takes the rest of the line."""
STYLES = {"running": "bold", "finished": "green", "found": "green", "pruned": "", "failed": "red", "queued": "dim"}
ORDER = ("running", "failed", "queued", "finished", "pruned", "found")


class Display:
    """Use as a context manager; all methods belong to the thread that changes the state.

    `tell` says what a trial reported, in a line where there is no live table; `refresh` draws that anew.
    """

    def __init__(self, state: SweepState, console: Console):
        self.state, self.console = state, console
        live = Live(get_renderable=self._grid, console=console, auto_refresh=False)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._live.stop()

    def tell(self, trial: "Trial", line: str) -> None:
        if line and not self._live:
            name = self.state.trials[trial.key].name
            told = f"{self.state.seconds:6.0f} s  {name}: {line}"
            self.console.print(told, highlight=False, markup=False, soft_wrap=True)

    def refresh(self) -> None:
        if self._live:
            self._live.refresh()

    def summary(self) -> None:
        """What was trained, found and failed, in how long."""
        state = self.state
        counts = Counter(trial.status for trial in state.trials.values())
        trials = ", ".join(f"{n} {status}" for status, n in counts.items())
        made = ", ".join(f"{len(seconds)} {name}" for name, seconds in state.made.items()) or "nothing"
        work = duration(sum(map(sum, state.made.values())))
        lines = [f"{len(state.trials)} trials: {trials}", f"made: {made} ({work} of work in {duration(state.seconds)})"]
        if state.found:
            lines.append("found in the store: " + ", ".join(f"{n} times {name}" for name, n in state.found.items()))
        failed: dict[str, list[str]] = {}
        for trial in state.trials.values():
            if trial.status == "failed":
                failed.setdefault(trial.reason, []).append(trial.name)
        for reason, names in failed.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"[red]failed[/] {escape(names[0])}{more}: {escape(reason)}")
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _grid(self) -> Grid:
        return grid(list(self.state.trials.values()), self.state.seconds, self.state.left())


def show_status(console: Console, name: str, driver: str, told: Mapping[str, Any] | None) -> None:
    """What `status` prints: `driver` as `SweepFolder.driver` tells it, `told` what the driver wrote last."""
    if told is None:
        console.print(f"{name}: {f'{driver} is starting it' if driver else 'ended before it began'}", highlight=False)
        return
    snapshot = Snapshot.read(told)
    is_open = any(trial.status in ("queued", "running") for trial in snapshot.trials)
    if driver:
        head = f"{name}: driven by {driver}, which wrote this {duration(time.time() - snapshot.at)} ago"
    elif is_open:
        head = f"{name}: nobody drives it any more; semformer-sweep resume {name}"
        for trial in snapshot.trials:
            if trial.status == "running":
                trial.status, trial.told, trial.left = "queued", "interrupted; goes on from its last epoch", math.nan
    else:
        head = f"{name}: ended"
    console.print(head, highlight=False, soft_wrap=True)
    for why in snapshot.unfit.values():
        console.print(f"[yellow]no work for[/] {escape(why)}", highlight=False, soft_wrap=True)
    console.print(grid(snapshot.trials, snapshot.seconds, snapshot.left, cut=False))


def grid(trials: Sequence[TrialState], seconds: float, left: float, *, cut: bool = True) -> Grid:
    """The trials, at most SHOWN of them; `seconds` since the sweep began, and those that it may still take (or NaN).

    `cut`: what a trial tells gets a single line.
    """
    done = sum(trial.status not in ("queued", "running") for trial in trials)
    caption = f"{done} of {len(trials)} trials, {duration(seconds)}"
    caption += f", about {duration(left)} left" if left == left and done < len(trials) else ""
    shown = trials
    if len(trials) > SHOWN:
        shown = sorted(trials, key=lambda trial: ORDER.index(trial.status))[:SHOWN]
    heads = ("row", "status", "host", "tells")
    lines = [(trial.name, trial.status, trial.host, _told(trial)) for trial in shown]
    table = Grid(caption=caption, caption_justify="left", expand=False)
    for name, column in zip(heads, zip(heads, *lines, strict=True), strict=True):
        if name == "tells":  # the one that gives way where the terminal is narrow
            table.add_column(name)
        else:
            table.add_column(name, width=min(WIDEST, max(map(len, column))), overflow="ellipsis", no_wrap=True)
    for trial, (*cells, told) in zip(shown, lines, strict=True):
        last = Text(told, no_wrap=cut, overflow="ellipsis" if cut else "fold")
        table.add_row(*map(Text, cells), last, style=STYLES[trial.status])
    return table


def _told(trial: TrialState) -> str:
    at = [trial.stage, f"epoch {trial.epoch}" if trial.epoch else "", trial.told]
    left = [f"{duration(trial.left)} left"] if trial.left == trial.left else []
    if trial.status == "failed":
        return trial.reason
    return ", ".join([*filter(None, at if trial.status == "running" else at[2:]), *left])
