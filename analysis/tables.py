"""A table of the paper, compiled from the trials in MLflow: measured beside published, never mixed.

`compile_table` makes plain data; what only writes it down is in `render.py`.
"""

import itertools
import re
import statistics
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.choice import Candidate, choose
from analysis.compiled import Cell, CompiledTable, Line, Trial, mark_text
from analysis.notes import Protocol, notes_under
from analysis.runs import Record, Trials, contents, plain_text, read_trials
from semformer.config import flatten
from semformer.errors import UserError
from sweeps.plan.scores import LINKS, link_of
from sweeps.plan.table import Metric, Row, Table, resolve

LEFT_OUT = "left out, see Runs"


def compile_from_mlflow(
    tables: Sequence[Table],
    *,
    preset: str,
    tracking_uri: str,
    experiments: Sequence[str] = (),
    data: str | None = None,
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[CompiledTable]:
    """Reads some experiments, by default all, and compiles those of the tables that they have trials of.

    `data` is the beginning of the name of a data set; with None for it or for `seed`, all count. `overrides` are the
    `--set` of the sweep. Raises UserError as `read_trials` does, and if there is no such trial of any table.
    """
    trials = read_trials(tracking_uri, preset, experiments)
    names = [table.name for table in tables]
    records = [record for record in trials.records if any(map(record.rows_of, names))]
    if not records:
        where = f"experiment {', '.join(map(repr, experiments))}" if experiments else "MLflow"
        why = "".join(f"\n{text}" for text in trials.unusable_of(names)) or f": {contents(tracking_uri, experiments)}"
        raise UserError(f"{where} has no trial of {', '.join(names)} with preset {preset}{why}")
    records = _only(records, "data", data, {r.data for r in records if r.data.startswith(data or "")})
    records = _only(records, "seed", seed, {seed})
    return [
        compile_table(table, replace(trials, records=own), preset=preset, overrides=overrides)
        for table in tables
        if (own := [record for record in records if record.rows_of(table.name)])
    ]


def _only(records: list[Record], name: str, asked: str | int | None, values: Collection) -> list[Record]:
    """Those records whose attribute is among `values`, if something was `asked` for. Raises UserError if none is."""
    if asked is None:
        return records
    kept = [record for record in records if getattr(record, name) in values]
    if not kept:
        there = "; ".join(sorted({str(getattr(record, name)) or "not recorded" for record in records}))
        raise UserError(f"no trial of these tables has {name} {asked}: there are {there}")
    return kept


def compile_table(
    table: Table, trials: Trials, *, preset: str, overrides: Mapping[str, Any] | None = None
) -> CompiledTable:
    """The table's cells from trials that fill rows of it. Raises UserError as `choose` does."""
    overrides, unusable = overrides or {}, trials.unusable_of([table.name])
    choice = choose(table, trials.records, preset, overrides)
    protocol = Protocol([candidate for candidate in choice.shown if _is_measured(candidate.record, table)])
    seeds = sorted({candidate.record.seed for candidate in choice.shown})
    lines = []
    for paper_row in table.paper_only:
        cells = {m.name: Cell(None, None, 0, paper_row.paper.get(m.name)) for m in table.metrics}
        lines.append(Line(paper_row.id, paper_row.label, False, paper_row.marks, {}, (), cells))
    for row in table.rows:
        own = [candidate for candidate in choice.shown if candidate.row == row.id]
        runs = tuple(_trial(candidate, table, protocol) for candidate in own)
        is_unusable = any(f"{table.name}/{row.id}" in filled for filled in unusable.values())
        left_out = seeds if is_unusable else choice.left_out.get(row.id, ())
        cells = {m.name: _cell(m, row.paper.get(m.name), runs, seeds, left_out) for m in table.metrics}
        settings = _settings(table, row, own, preset, overrides)
        lines.append(Line(row.id, row.label, True, row.marks, settings, runs, cells))
    lines = _with_best(table, lines)
    notes = [*notes_under(table, lines, protocol, preset, overrides, seeds)]
    notes += [("Runs", text) for text in choice.sentences]
    if n := len({candidate.record.trial_key for candidate in choice.shown} & trials.repeated):
        trials_have = "trials have" if n > 1 else "trial has"
        notes.append(("Runs", f"{n} {trials_have} several runs; of each, the newest finished one is shown."))
    notes += [("Runs", f"{text}.") for text in unusable]
    return CompiledTable(table, preset, tuple(lines), tuple(notes))


def _is_measured(record: Record, table: Table) -> bool:
    return record.finished and any(record.score(metric.name) is not None for metric in table.measured)


def _settings(
    table: Table, row: Row, own: Sequence[Candidate], preset: str, overrides: Mapping[str, Any]
) -> dict[str, str]:
    """What the row's trials had in the fields that marks name; preset paper has the paper's values."""
    marks = [mark for mark in table.layout.marks if mark.field]
    if not marks:
        return {}
    paper, planned = flatten(resolve(table, row, "paper", {}, 0)), flatten(resolve(table, row, preset, overrides, 0))
    settings = {}
    for mark in marks:
        recorded = [c.record.config[mark.field] for c in own if mark.field in c.record.config]
        had = recorded or [plain_text(planned[mark.field])]
        told = row.marks.get(mark.name)
        as_paper = set(had) == {plain_text(paper[mark.field])}
        settings[mark.name] = mark_text(told) if told is not None and as_paper else " and ".join(dict.fromkeys(had))
    return settings


def _trial(candidate: Candidate, table: Table, protocol: Protocol) -> Trial:
    record = candidate.record
    scores = {metric.name: record.score(metric.name) for metric in table.measured}
    links = set(map(link_of, candidate.scores))
    thresholds = {word: record.threshold(word) for word in LINKS if word in links}
    reason = re.sub(r"\x1b\[[0-9;]*m", "", record.reason) or "no reason recorded"
    return Trial(
        record,
        reason=textwrap.shorten(reason, 200, placeholder=" ..."),
        values={name: score for name, score in scores.items() if score is not None},
        thresholds={word: value for word, value in thresholds.items() if value is not None},
        deviations=protocol.deviations(candidate) if _is_measured(record, table) else (),
        measured=" ".join(digest for _, digest in sorted(candidate.measured)),
    )


def _cell(
    metric: Metric, paper: float | None, trials: Sequence[Trial], seeds: Sequence[int], left_out: Collection[int]
) -> Cell:
    if metric.elsewhere:
        return Cell(None, None, 0, paper, remarks=(f"{metric.header} is measured {metric.elsewhere}",), elsewhere=True)
    measured = [trial for trial in trials if metric.name in trial.values]
    values = [trial.values[metric.name] for trial in measured]
    return Cell(
        mean=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        n=len(values),
        paper=paper,
        remarks=tuple(_remarks(metric, trials, seeds, left_out)),
        deviations=tuple(dict.fromkeys(text for trial in measured for text in trial.deviations)),
    )


def _remarks(metric: Metric, trials: Sequence[Trial], seeds: Sequence[int], left_out: Collection[int]) -> Iterable[str]:
    """Why a seed has no value."""
    if not trials:
        yield LEFT_OUT if left_out else "not run"
        return
    by_seed = {trial.seed: trial for trial in trials}
    for seed in seeds:
        prefix = f"seed {seed}: " if len(seeds) > 1 else ""
        if (trial := by_seed.get(seed)) is None:
            yield prefix + (LEFT_OUT if seed in left_out else "not run")
        elif metric.name not in trial.values:
            yield prefix + _without_value(metric, trial)


def _without_value(metric: Metric, trial: Trial) -> str:
    match trial.status:
        case "failed":
            return f"failed: {trial.reason}"
        case "stopped":
            return f"stopped {trial.reason}: resume the sweep (semformer-sweep resume)"
        case "pruned":
            return "pruned: stopped early by the search's scheduler"
        case "finished":
            return f"finished, but without a value of {metric.header}"
    return f"still {trial.status} when the table was made"


def _with_best(table: Table, lines: Sequence[Line]) -> list[Line]:
    """Marks the best values as they are printed: of the measured ones under the common protocol, and of the paper's."""
    cells = [dict(line.cells) for line in lines]
    compared = [line.marks.get(table.layout.compared) for line in lines]
    for metric, group in itertools.product(table.metrics, dict.fromkeys(compared)):
        best = max if metric.best == "max" else min
        own = {i: row[metric.name] for i, row in enumerate(cells) if compared[i] == group}
        ours = {i: round(c.mean, 1) for i, c in own.items() if c.mean is not None and not c.deviations}
        paper = {i: c.paper for i, c in own.items() if c.paper is not None}
        for i in _best_of(ours, best):
            cells[i][metric.name] = replace(cells[i][metric.name], best=True)
        for i in _best_of(paper, best):
            cells[i][metric.name] = replace(cells[i][metric.name], paper_best=True)
    return [replace(line, cells=row) for line, row in zip(lines, cells, strict=True)]


def _best_of(values: Mapping[int, float], best: Any) -> list[int]:
    """Where the best value is; nowhere if all are equal."""
    return [i for i, value in values.items() if len(set(values.values())) > 1 and value == best(values.values())]
