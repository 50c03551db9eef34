"""Where a row of a table comes from: its runs, the stages that they made or found, and how to make it again."""

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis.compiled import CompiledTable, Line, Trial
from analysis.options import add_choice, compile_tables, say
from semformer.config import load_config
from semformer.errors import UserError
from sweeps.plan.table import Row, Table, load_table

if TYPE_CHECKING:  # which imports MLflow, and takes seconds
    from analysis.runs import Record

DIGITS = 8
"""Of a key, that are printed without --full."""
BASES = {"baseline": "preset and the table's baseline", "preset": "the preset"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", metavar="TABLE", help="table03, or the path of a table file of your own")
    add("row", metavar="ROW", help="its id in the table's file, such as CF-CB of table03")
    add_choice(parser)
    add("--full", action="store_true", help="all digits of the stages' keys")
    add("--json", action="store_true", help="one JSON object instead, with the keys in full")


def run(options: argparse.Namespace) -> int:
    """The exit status: 0 also for a row without a value, of which it is told why it has none."""
    table = load_table(options.table)
    row = _row(table, options.row)
    (compiled,) = compile_tables(options, [table])
    told = explain(compiled, row)
    say(json.dumps(told, indent=1) if options.json else "\n".join(_lines(told, full=options.full)), options)
    return 0


def _row(table: Table, name: str) -> Row:
    """Raises UserError, with the nearest ones, where the table has no such row."""
    if name in table.positions:
        return table.rows[table.positions[name]]
    if name in [row.id for row in table.paper_only]:
        raise UserError(f"row {name!r} of {table.path} has values of the paper alone: no run of ours is of it")
    near = difflib.get_close_matches(name, table.positions, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table.positions)}"
    raise UserError(f"{table.path} has no row {name!r}: {hint}")


def explain(compiled: CompiledTable, row: Row) -> dict[str, Any]:
    """All that is told, as plain JSON values; times are in UTC."""
    table = compiled.table
    line = next(line for line in compiled.lines if line.id == row.id)
    return {
        "table": table.name,
        "row": row.id,
        "label": row.label,
        "preset": compiled.preset,
        "status": line.status,
        "cells": [_cell(line, metric.name, metric.header) for metric in table.metrics],
        "runs": [_run(trial, table) for trial in line.trials],
        "commands": _commands([trial.record for trial in line.trials if trial.record.begun], table, row),
        "notes": [{"about": heading, "text": text} for heading, text in compiled.notes],
    }


def _cell(line: Line, metric: str, header: str) -> dict[str, Any]:
    cell = line.cells[metric]
    values = {"mean": cell.mean, "deviation": cell.spread, "seeds": cell.n, "paper": cell.paper}
    return {"metric": metric, "header": header, **values, "remarks": list(cell.remarks)}


def _run(trial: Trial, table: Table) -> dict[str, Any]:
    from analysis.runs import time_text

    record = trial.record
    return {
        "seed": trial.seed,
        "values": dict(trial.values),
        "thresholds": dict(trial.thresholds),
        "status": trial.status,
        "reason": trial.reason if trial.status in ("failed", "stopped") else "",
        "run_id": trial.run_id,
        "trial_key": record.trial_key,
        "experiment": record.experiment,
        "parent_run_id": record.parent_run_id,
        "rows": list(record.rows),
        "started": time_text(record.started),
        "ended": time_text(record.ended),
        "host": record.host,
        "commit": record.commit,
        "versions": dict(record.versions),
        "stages": [_stage(name, record) for name in record.stages],
        "differs_from": _differences(record, table),
        "protocol": dict(record.protocol),
        "deviations": list(trial.deviations),
    }


def _stage(name: str, record: "Record") -> dict[str, Any]:
    """`found`: in the store, not made by this run; null where it has not got so far."""
    seconds = record.metrics.get(f"{name}/seconds")
    return {"stage": name, "key": record.stages[name], "found": record.found.get(name), "seconds": seconds}


def _differences(record: "Record", table: Table) -> dict[str, dict[str, Any]]:
    """Nothing of a run that has not begun, or is of another version: then `_commands` tells."""
    from analysis.recipe import differences

    with suppress(UserError):
        bases = {"baseline": load_config(record.preset, table.baseline), "preset": load_config(record.preset)}
        if record.begun:
            return {name: differences(record, base) for name, base in bases.items()}
    return {}


def _commands(records: list["Record"], table: Table, row: Row) -> list[dict[str, Any]]:
    """Of the table's sweep, and of each run alone; `impossible` tells why there is none."""
    from analysis.recipe import single_command, sweep_command

    alone = [([one.seed], partial(single_command, one)) for one in records]
    together = [([one.seed for one in records], partial(sweep_command, table, row, records))] * bool(records)
    told: list[dict[str, Any]] = []
    for seeds, command in [*together, *alone]:
        try:
            told.append({"seeds": seeds, "command": command()})
        except UserError as error:
            told.append({"seeds": seeds, "impossible": str(error)})
    return told


# For people


def _lines(told: Mapping[str, Any], *, full: bool) -> Iterable[str]:
    yield f"{told['table']}/{told['row']} ({told['label']}), preset {told['preset']}: {told['status']}"
    for cell in told["cells"]:
        yield from (f"  {text}" for text in _of_cell(cell))
    for one in told["runs"]:
        yield ""
        yield _of_values(one, told["cells"])
        yield from (f"  {text}" for text in _of_run(one, full=full))
    yield from ("", f"Told under {told['table']}:")
    yield from (f"  {note['about']}: {note['text']}" for note in told["notes"])
    if told["commands"]:
        commits = sorted({one["commit"] or "(not recorded)" for one in told["runs"]})
        yield from ("", f"To make it again, with the code of commit {' and '.join(commits)}:")
    for one in told["commands"]:
        yield f"  seed{'s' * (len(one['seeds']) > 1)} {', '.join(map(str, one['seeds']))}"
        yield f"    {one['command']}" if "command" in one else f"    cannot be: {one['impossible']}"


def _of_cell(cell: Mapping[str, Any]) -> Iterable[str]:
    paper = "" if cell["paper"] is None else f" (paper {cell['paper']})"
    if cell["mean"] is not None:
        deviation = "" if cell["deviation"] is None else f" ± {cell['deviation']:.2f}, of {cell['seeds']} seeds"
        yield f"{cell['header']}: {cell['mean']:.2f}{deviation}{paper}"
    yield from (f"{cell['header']}: {text}{paper * (cell['mean'] is None)}" for text in cell["remarks"])


def _of_values(one: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]) -> str:
    values = {cell["header"]: one["values"].get(cell["metric"]) for cell in cells}
    told = [f"{header} {value:.2f}" for header, value in values.items() if value is not None]
    told += [f"threshold of {of} {value:.2f}" for of, value in one["thresholds"].items()]
    return f"Seed {one['seed']}: {', '.join(told) or 'no value'}"


def _of_run(one: Mapping[str, Any], *, full: bool) -> Iterable[str]:
    sweep = one["parent_run_id"] or "not recorded"
    yield f"MLflow run {one['run_id']} of experiment {one['experiment']!r}, sweep {sweep}"
    reason = f", {one['reason']}" if one["reason"] else ""
    ended = f", ended {one['ended']}" if one["ended"] else ""
    yield f"{one['status']}{reason}: planned {one['started'] or '?'}{ended}, on host {one['host'] or '?'}"
    yield f"it fills {', '.join(one['rows'])}"
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    yield f"commit {one['commit'] or 'not recorded'}; {versions or 'versions not recorded'}"
    for stage in one["stages"]:
        yield _of_stage(stage, full=full)
    for base, fields in one["differs_from"].items():
        told = ", ".join(f"{field} = {value}" for field, value in fields.items())
        yield f"other than {BASES[base]}: {told or 'nothing'}"
    yield "measured with " + ", ".join(f"{name} = {value}" for name, value in one["protocol"].items())
    yield from (f"dagger: {text}" for text in one["deviations"])


def _of_stage(stage: Mapping[str, Any], *, full: bool) -> str:
    how = {True: "found in the store", False: "made by this run", None: "not recorded as made or found"}[stage["found"]]
    seconds = "" if stage["seconds"] is None else f", {stage['seconds']:.1f} s to make"
    return f"{stage['stage']:15} {stage['key'] if full else stage['key'][:DIGITS]}  {how}{seconds}"
