"""A table of the paper, compiled from the trials in MLflow: measured beside published, never mixed.

`compile_table` makes plain data; what only writes it down is in `render.py`.
"""

import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.runs import choose_runs, parameter_text, plain_text, read_trials
from semformer.config import flatten
from semformer.errors import UserError
from sweeps.plan.table import SEVERAL, Metric, PaperRow, Row, Table, resolve

MASKS = "pixel masks read by"
FINAL_MAPS = {
    "activation": "activation map alone",
    "attention": "class-relative attention alone",
    "both": "activation map times class-relative attention",
}


@dataclass(frozen=True)
class Trial:
    """One run of one row. `values` has the finite values by metric name; `threshold` is what they were scored at.

    `parent_run_id` is the sweep's, "" where there is none.

    `deviations` tells what its protocol or settings have other than most cells.
    """

    seed: int
    run_id: str
    parent_run_id: str
    trial_key: str
    status: str
    reason: str
    values: Mapping[str, float]
    threshold: float | None
    deviations: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A measured value, in percent: mean and sample standard deviation over n seeds, beside the paper's.

    None where there is no value; `remarks` then say why.
    """

    mean: float | None
    spread: float | None
    n: int
    paper: float | None
    remarks: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    best: bool = False
    paper_best: bool = False


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
        """finished (at least one seed), failed, running, queued, not run, or paper only."""
        if not self.ours:
            return "paper only"
        found = {trial.status for trial in self.trials}
        return next((s for s in ("finished", "failed", "running", "queued") if s in found), "not run")

    @property
    def is_filled(self) -> bool:
        """Whether every metric has a measured value."""
        return all(cell.mean is not None for cell in self.cells.values())


@dataclass(frozen=True)
class CompiledTable:
    """`notes` are (heading, text) pairs that belong under the table."""

    table: Table
    preset: str
    experiment: str
    lines: tuple[Line, ...]
    notes: tuple[tuple[str, str], ...]


def compile_from_mlflow(
    tables: Sequence[Table],
    *,
    preset: str,
    tracking_uri: str,
    experiment: str | None = None,
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[CompiledTable]:
    """Reads an experiment once and compiles those of the tables that it has trials of, of one seed or of all.

    The experiment is by default that of a sweep of several tables, "tables <preset>"; for one table its own, "<table>
    <preset>", if there is one. `overrides` are the `--set` of the sweep. Raises UserError as `read_trials` does, and
    if there is no trial of any table, with `preset` and `seed`.
    """
    own = [f"{table.name} {preset}" for table in tables if len(tables) == 1]
    trials = read_trials(tracking_uri, [experiment] if experiment else [*own, f"{SEVERAL} {preset}"])
    frames = {table.name: trials.of_table(table.name, preset) for table in tables}
    if all(frame.empty for frame in frames.values()):
        raise UserError(
            f"experiment {trials.experiment!r} has no trial of {', '.join(frames)} with preset {preset}"
            f"{'; ' if trials.runs else ': '}{trials.contents()}"
        )
    if seed is not None:
        seeds = sorted({int(n) for frame in frames.values() if not frame.empty for n in frame["seed"]})
        if seed not in seeds:
            told = ", ".join(map(str, seeds))
            raise UserError(f"no trial of experiment {trials.experiment!r} has seed {seed}: there are {told}")
        frames = {name: frame if frame.empty else frame[frame["seed"] == seed] for name, frame in frames.items()}
    return [
        compile_table(table, frames[table.name], preset=preset, experiment=trials.experiment, overrides=overrides)
        for table in tables
        if not frames[table.name].empty
    ]


def compile_table(
    table: Table,
    trials: pd.DataFrame,
    *,
    preset: str,
    experiment: str,
    overrides: Mapping[str, Any] | None = None,
) -> CompiledTable:
    """The table's cells from trials as `Trials.of_table` gives them. Raises UserError as `choose_runs` does."""
    overrides = overrides or {}
    chosen, left_out = choose_runs(trials, table, preset, overrides)
    records = chosen.sort_values("seed").to_dict("records")
    records.sort(key=lambda record: table.positions[record["row"]])
    protocol = Protocol([record for record in records if record["status"] == "finished"])
    seeds = sorted({record["seed"] for record in records})
    lines = [Line(row.id, row.label, False, row.marks, {}, (), _cells(table, row, (), [])) for row in table.paper_only]
    for row in table.rows:
        own = [record for record in records if record["row"] == row.id]
        settings = _settings(table, row, own, preset, overrides)
        runs = tuple(_trial(record, table, protocol) for record in own)
        lines.append(Line(row.id, row.label, True, row.marks, settings, runs, _cells(table, row, runs, seeds)))
    lines = _with_best(table.metrics, lines)
    notes = [*_notes(table, lines, protocol, preset, overrides, seeds), *(("Runs", text) for text in left_out)]
    return CompiledTable(table, preset, experiment, tuple(lines), tuple(notes))


def _settings(
    table: Table, row: Row, records: Sequence[Mapping[str, Any]], preset: str, overrides: Mapping[str, Any]
) -> dict[str, str]:
    """What the row's trials had in the fields that marks name; preset paper has the paper's values."""
    marks = [mark for mark in table.layout.marks if mark.field]
    if not marks:
        return {}
    paper, planned = flatten(resolve(table, row, "paper", {}, 0)), flatten(resolve(table, row, preset, overrides, 0))
    settings = {}
    for mark in marks:
        recorded = [value for record in records if isinstance(value := record.get(f"params.{mark.field}"), str)]
        had = [parameter_text(value) for value in recorded] or [plain_text(planned[mark.field])]
        told = row.marks.get(mark.name)
        as_paper = told is not None and set(had) == {plain_text(paper[mark.field])}
        settings[mark.name] = mark_text(told) if as_paper else " and ".join(dict.fromkeys(had))
    return settings


def mark_text(value: bool | int | float | str) -> str:
    """What stands in the table for a row's mark."""
    return ("✓" if value else "✗") if isinstance(value, bool) else str(value)


class Protocol:
    """The settings in which all measured cells should agree: the value of most of them, and who deviates.

    Settings are the trial's protocol, the stages that read pixel masks, and every config field in which a trial is not
    what table file and preset say (None for the trials that are).
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self.records = records
        names = dict.fromkeys(name for record in records for name in record if name.startswith("protocol."))
        self.names = [name.removeprefix("protocol.") for name in names]
        settings = [self._settings(record) for record in records]
        names = dict.fromkeys(name for one in settings for name in one)
        self.counts = {name: Counter(one.get(name) for one in settings) for name in names}

    def common(self, name: str) -> str | None:
        """The value that most measured cells have."""
        return self.counts[name].most_common(1)[0][0] if name in self.counts else None

    def shown(self, name: str) -> str:
        value = self.common(name) or "not recorded"
        return value if len(self.counts.get(name, ())) < 2 else f"{value} (not in all cells, see the daggers)"

    def parameter(self, field: str) -> str:
        """The value of a config field if all measured cells have the same, else ""."""
        values = {parameter_text(str(record.get(f"params.{field}", ""))) for record in self.records}
        return values.pop() if len(values) == 1 else ""

    def changed(self) -> dict[str, str]:
        """The config fields in which most cells are not what table file and preset say."""
        known = {*self.names, MASKS}
        return {name: value for name in self.counts if name not in known and (value := self.common(name))}

    def deviations(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """A text as `erosion = 7 (otherwise 0)` for every setting that is not the common one."""
        own, texts = self._settings(record), []
        for name in self.counts:
            value, common = own.get(name), self.common(name)
            if value != common:
                value = value or parameter_text(str(record.get(f"params.{name}", "not recorded")))
                _, wanted = record["differs"].get(name, ("", "not recorded"))
                texts.append(f"{name} = {value} (otherwise {common or wanted})")
        return tuple(texts)

    def _settings(self, record: Mapping[str, Any]) -> dict[str, str]:
        protocol = {name: value for name in self.names if isinstance(value := record.get(f"protocol.{name}"), str)}
        fields = {name: value for name, (value, _) in record["differs"].items() if name.split(".")[-1] not in protocol}
        return protocol | {MASKS: record["masks_read_by"] or "no stage"} | fields


def _trial(record: Mapping[str, Any], table: Table, protocol: Protocol) -> Trial:
    prefix = f"metrics.cam/{record.get('protocol.eval_split')}/"
    values = {metric.name: record.get(prefix + metric.name, math.nan) for metric in table.metrics}
    threshold = record.get(prefix + "threshold", math.nan)
    finished = record["status"] == "finished"
    reason = re.sub(r"\x1b\[[0-9;]*m", "", record["reason"]) or "no reason recorded"
    return Trial(
        seed=record["seed"],
        run_id=record["run_id"],
        parent_run_id=record["parent_run_id"],
        trial_key=record["trial_key"],
        status=record["status"],
        reason=textwrap.shorten(reason, 200, placeholder=" ..."),
        values={name: value for name, value in values.items() if finished and math.isfinite(value)},
        threshold=threshold if math.isfinite(threshold) else None,
        deviations=protocol.deviations(record) if finished else (),
    )


def _cells(table: Table, row: PaperRow, trials: Sequence[Trial], seeds: Sequence[int]) -> dict[str, Cell]:
    return {metric.name: _cell(metric, row.paper[metric.name], trials, seeds) for metric in table.metrics}


def _cell(metric: Metric, paper: float | None, trials: Sequence[Trial], seeds: Sequence[int]) -> Cell:
    measured = [trial for trial in trials if trial.status == "finished" and metric.name in trial.values]
    values = [trial.values[metric.name] for trial in measured]
    return Cell(
        mean=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
        paper=paper,
        remarks=tuple(_remarks(metric, trials, seeds)),
        deviations=tuple(dict.fromkeys(text for trial in measured for text in trial.deviations)),
    )


def _remarks(metric: Metric, trials: Sequence[Trial], seeds: Sequence[int]) -> Iterable[str]:
    """Why a seed has no value."""
    by_seed = {trial.seed: trial for trial in trials}
    for seed in seeds:
        trial = by_seed.get(seed)
        prefix = f"seed {seed}: " if len(seeds) > 1 and trials else ""
        if trial is None:
            yield prefix + "not run"
        elif trial.status == "failed":
            yield f"{prefix}failed: {trial.reason}"
        elif trial.status != "finished":
            yield f"{prefix}still {trial.status} when the table was made"
        elif metric.name not in trial.values:
            yield f"{prefix}finished, but without a value of {metric.header}"
        if not trials:
            return


def _with_best(metrics: Sequence[Metric], lines: Sequence[Line]) -> list[Line]:
    """Marks the best values as they are printed: of the measured ones under the common protocol, and of the paper's."""
    cells = [dict(line.cells) for line in lines]
    for metric in metrics:
        best = max if metric.best == "max" else min
        ours = {i: round(c.mean, 1) for i, row in enumerate(cells) if _comparable(c := row[metric.name])}
        paper = {i: c.paper for i, row in enumerate(cells) if (c := row[metric.name]).paper is not None}
        for values, flag in ((ours, "best"), (paper, "paper_best")):
            for i, value in values.items():
                if len(set(values.values())) > 1 and value == best(values.values()):
                    cells[i][metric.name] = replace(cells[i][metric.name], **{flag: True})
    return [replace(line, cells=row) for line, row in zip(lines, cells, strict=True)]


def _comparable(cell: Cell) -> bool:
    return cell.mean is not None and not cell.deviations


def _notes(
    table: Table,
    lines: Sequence[Line],
    protocol: Protocol,
    preset: str,
    overrides: Mapping[str, Any],
    seeds: Sequence[int],
) -> Iterable[tuple[str, str]]:
    if not protocol.records:
        yield "Ours", f"preset {preset}; no trial has finished."
        return
    split = protocol.shown("eval_split")
    changed = {name: str(value) for name, value in overrides.items()} | protocol.changed()
    settings = "".join(f", {name} = {value}" for name, value in changed.items())
    data = f" of {protocol.shown('data')}" if "data" in protocol.names else ""
    plural = "s" * (len(seeds) > 1)
    listed = ", ".join(map(str, seeds))
    yield "Ours", f"preset {preset}{settings}; measured on split {split}{data}; seed{plural} {listed}."
    paper = f"{table.source}." if table.source else "see the table file."
    if preset != "paper":
        paper += f" Other data, networks and schedule than preset {preset}: compare the order, not the values."
    if only := [line.label for line in lines if not line.ours]:
        paper += f" Nothing of ours is measured for {', '.join(only)}."
    yield "Paper", paper
    if any(cell.best for line in lines for cell in line.cells.values()):
        yield "Bold", "the best of its line; cells with a dagger are not compared."
    counts = {cell.n for line in lines for cell in line.cells.values() if cell.n}
    if max(counts, default=0) > 1:
        text = "a ± s (n) is the mean and the sample standard deviation over n seeds."
        yield "Seeds", text + (" The cells do not all have the same seeds." if len(counts) > 1 else "")
    yield "Threshold", _threshold_note(protocol, split)
    final_map = protocol.parameter("cams.final_map")
    yield "Final map", f"{FINAL_MAPS.get(final_map, final_map) or 'differs from row to row'}."
    others = [f"{name} {protocol.shown(name)}" for name in protocol.names if name not in ("eval_split", "data", "rule")]
    if others:
        yield "Protocol", f"{'; '.join(others)}."
    yield "Supervision audit", _supervision_note(protocol)
    yield from (("Note", note) for note in table.notes)


def _threshold_note(protocol: Protocol, split: str) -> str:
    rule = protocol.common("rule")
    if rule == "oracle":
        searched = protocol.parameter("evaluate.thresholds").split(", ")
        text = f"oracle: of each cell the best, chosen with the pixel masks of split {split}"
        text += f", from {searched[0]} to {searched[1]} in steps of {searched[2]}" if len(searched) == 3 else ""
    elif rule == "fixed":
        text = f"fixed at {protocol.parameter('evaluate.fixed_threshold') or 'different values'}, chosen without masks"
    else:
        text = f"rule {rule or 'not recorded'}"
    return f"{text}." if len(protocol.counts.get("rule", ())) < 2 else f"{text}; another rule where a dagger says so."


def _supervision_note(protocol: Protocol) -> str:
    readers = protocol.shown(MASKS)
    if readers == "evaluate":
        what = "the scores and the oracle threshold" if protocol.common("rule") == "oracle" else "the scores"
        return f"training sees image-level labels only; pixel masks are read by stage evaluate alone, for {what}."
    return f"pixel masks are read by {readers}."
