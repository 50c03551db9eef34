"""What a compiled table holds: lines of cells, measured beside published, and the runs that they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sweeps.plan.table import Table

if TYPE_CHECKING:  # MLflow and scipy take seconds to import
    from analysis.runs import Record
    from analysis.stats import Interval


@dataclass(frozen=True)
class Trial:
    """One run of one row. `values` has the finite values by metric name; `thresholds` what those of maps were scored
    at, by words of `scores.LINKS`; `measured` tells the stages that measured them, "" where that is not recorded.

    `reason` is the record's, cut for people; `deviations` tells what its protocol or settings have other than most
    cells.
    """

    record: "Record"
    reason: str
    values: Mapping[str, float]
    thresholds: Mapping[str, float]
    deviations: tuple[str, ...]
    measured: str = ""

    @property
    def seed(self) -> int:
        return self.record.seed

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def threshold(self) -> float | None:
        """Of the first of its scores that have one."""
        return next(iter(self.thresholds.values()), None)


@dataclass(frozen=True)
class Cell:
    """A measured value, in percent: mean and sample standard deviation over n seeds, beside the paper's.

    None where there is no value; `remarks` then say why. With `elsewhere`, no run of ours measures it.
    """

    mean: float | None
    spread: float | None
    n: int
    paper: float | None
    remarks: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    best: bool = False
    paper_best: bool = False
    elsewhere: bool = False


@dataclass(frozen=True)
class Gap:
    """What a row has more than another, in points: mean over the n seeds that both have, and intervals of it."""

    mean: float
    images: "Interval | None"
    seeds: "Interval | None"
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether neither source of chance explains it: no interval that is known has 0 in it."""
        known = [interval for interval in (self.images, self.seeds) if interval]
        return bool(known) and not any(interval.has_zero for interval in known)


@dataclass(frozen=True)
class Chance:
    """Intervals of a row's first metric, see `stats.py`; None where they are not known.

    `from_first` and `from_best`: what it has more than the table's first comparable row, and than the best one
    if the table compares it with that (`Layout.compared`).
    """

    images: "Interval | None"
    seeds: "Interval | None"
    from_first: Gap | None
    from_best: Gap | None


@dataclass(frozen=True)
class Line:
    """A row of the table file, or (`ours` false) one that only the paper has.

    `settings` maps each mark that names a field to what our trials had in it (without any: would have), as text;
    to the mark's own text where that is the paper's value.
    """

    id: str
    label: str
    ours: bool
    marks: Mapping[str, Any]
    settings: Mapping[str, str]
    trials: tuple[Trial, ...]
    cells: Mapping[str, Cell]

    @property
    def status(self) -> str:
        """finished (at least one seed), failed, running, queued, stopped, pruned, not run, or paper only."""
        if not self.ours:
            return "paper only"
        found = {trial.status for trial in self.trials}
        order = ("finished", "failed", "running", "queued", "stopped", "pruned")
        return next((status for status in order if status in found), "not run")

    @property
    def is_filled(self) -> bool:
        """Whether every metric that runs of ours measure has a value."""
        return all(cell.mean is not None or cell.elsewhere for cell in self.cells.values())


@dataclass(frozen=True)
class CompiledTable:
    """`notes` are (heading, text) pairs that belong under the table.

    `chances` are of measured rows, by id, as far as they were asked for (`chance.with_chance`); `best` is the row that
    is best in the first metric, "" where that was not.
    """

    table: Table
    preset: str
    lines: tuple[Line, ...]
    notes: tuple[tuple[str, str], ...]
    chances: Mapping[str, Chance] = field(default_factory=dict)
    best: str = ""

    @property
    def trials(self) -> list[Trial]:
        return [trial for line in self.lines for trial in line.trials]

    def is_tied(self, line: Line) -> bool:
        """Whether chance explains what the best row has more in the first metric, or it has no more on the seeds that
        both have."""
        chance = self.chances.get(line.id)
        gap = chance.from_best if chance else None
        if gap is None or not (gap.images or gap.seeds):
            return False
        is_worse = gap.mean < 0 if self.table.measured[0].best == "max" else gap.mean > 0
        return not (gap.is_clear and is_worse)

    @property
    def experiments(self) -> list[str]:
        """Where its trials were found."""
        return list(dict.fromkeys(trial.record.experiment for trial in self.trials))


def mark_text(value: bool | int | float | str) -> str:
    """What stands in the table for a row's mark."""
    return ("✓" if value else "✗") if isinstance(value, bool) else str(value)
