"""Two sweeps cell by cell: values, paired differences, and what they were not run alike in."""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from analysis.options import add_tracking, say
from semformer.errors import UserError
from sweeps.plan.table import Table

if TYPE_CHECKING:  # which imports MLflow, and takes seconds
    from analysis.runs import Record, SweepRun

Cells = Mapping[tuple[str, str, int], "Record"]
"""The run of a table's row under a seed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a sweep: its name (as `semformer-sweep status` tells it), the id of its MLflow run, or its experiment"
    parser.add_argument("a", metavar="A", help=text)
    parser.add_argument("b", metavar="B", help="another one")
    add_tracking(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead")


def run(options: argparse.Namespace) -> int:
    from analysis.runs import read_records, read_sweeps
    from analysis.swept import swept_tables

    sweeps = read_sweeps(options.tracking_uri)
    a, b = (find(name, sweeps) for name in (options.a, options.b))
    if a == b:
        raise UserError(f"{options.a} and {options.b} are one sweep, {a}: name two")
    common = [name for name in a.tables if name in b.tables]
    if not common:
        told = "; ".join(f"{one} has {', '.join(one.tables) or 'none, as a search'}" for one in (a, b))
        raise UserError(f"the sweeps have no table in common: {told}")
    tables, left_out = swept_tables(options.tracking_uri, dict.fromkeys(common, a.run_id))
    for text in left_out:
        say(text, options, sys.stderr)
    records, unusable = read_records(options.tracking_uri, experiments=sorted({a.experiment, b.experiment}))
    for _, text in unusable:
        say(f"{text}.", options, sys.stderr)
    sides = [_cells(one, records, _planned(options.tracking_uri, one)) for one in (a, b)]
    answer = {"a": _sweep(a), "b": _sweep(b), **compare(tables.values(), *sides)}
    say(json.dumps(answer, indent=1) if options.json else "\n".join(_lines(answer, str(a), str(b))), options)
    return 0


def find(name: str, sweeps: Sequence["SweepRun"]) -> "SweepRun":
    """The one sweep of such a name, run id (or the beginning of it) or experiment.

    Raises UserError, with those that there are, if it is none or several.
    """
    from analysis.runs import SHORT

    if not sweeps:
        raise UserError("MLflow has no sweep at all: run one first (semformer-sweep run)")
    found = [one for one in sweeps if name in (one.run_id, one.folder)] or [
        one
        for one in sweeps
        if name in (one.name, one.experiment) or (len(name) >= SHORT and one.run_id.startswith(name))
    ]
    if len(found) == 1:
        return found[0]
    there = "; ".join(map(str, found or sweeps))
    if found:
        raise UserError(f"{len(found)} sweeps are meant by {name!r}: name one by the id of its run: {there}")
    raise UserError(f"MLflow has no sweep {name!r}: there are {there}")


def _planned(tracking_uri: str, sweep: "SweepRun") -> set[str]:
    """The keys of the trials that a sweep was begun with: other sweeps may have made some of them."""
    from analysis.artifacts import fetch

    with TemporaryDirectory() as folder:
        found = fetch(tracking_uri, [(sweep.run_id, "plan.json")], Path(folder))
        texts = [path.read_bytes() for path in found.values()]
    try:
        return {trial["key"] for text in texts for trial in json.loads(text).get("trial_list", ())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the plan.json of sweep {sweep} cannot be read: {error!r}") from error


def _cells(sweep: "SweepRun", records: Iterable["Record"], planned: set[str]) -> Cells:
    """Of several runs of a cell, the newest finished one, else the newest."""
    own = [one for one in records if one.experiment == sweep.experiment]
    own = [one for one in own if one.parent_run_id == sweep.run_id or one.trial_key in planned]
    cells: dict[tuple[str, str, int], Record] = {}
    for record in sorted(own, key=lambda record: (not record.finished, -record.started)):
        for table, _, row in (name.partition("/") for name in record.rows):
            cells.setdefault((table, row, record.seed), record)
    return cells


def compare(tables: Iterable[Table], a: Cells, b: Cells) -> dict[str, Any]:
    """As plain JSON values: `cells` with the means of both over the seeds that both have, and of the differences by
    seed; `missing`, the seeds that not both have; `differs`, what the runs of equal cells were not run alike in."""
    told: list[dict[str, Any]] = []
    missing: dict[tuple[str, ...], list[int]] = {}
    pairs: dict[tuple[str, str], tuple[Record, Record]] = {}
    for table in tables:
        names = dict.fromkeys([*table.positions, *(row for name, row, _ in (*a, *b) if name == table.name)])
        for row in names:
            seeds = sorted({seed for name, own, seed in (*a, *b) if (name, own) == (table.name, row)})
            for metric in table.measured:
                both: dict[int, tuple[float, float]] = {}
                for seed in seeds:
                    one, other = a.get((table.name, row, seed)), b.get((table.name, row, seed))
                    had, has = (record.score(metric.name) if record else None for record in (one, other))
                    if one and other and had is not None and has is not None:
                        both[seed] = had, has
                        pairs[one.run_id, other.run_id] = one, other
                    else:
                        states = _state(one, had), _state(other, has)
                        missing.setdefault((table.name, row, metric.name, *states), []).append(seed)
                if both:
                    told.append({"table": table.name, "row": row, "metric": metric.name} | _paired(both))
    return {
        "cells": told,
        "missing": [
            dict(zip(("table", "row", "metric", "a", "b"), key, strict=True)) | {"seeds": seeds}
            for key, seeds in missing.items()
        ],
        "pairs": len(pairs),
        "same": sum(one.trial_key == other.trial_key for one, other in pairs.values()),
        "differs": _differs(pairs.values()),
    }


def _paired(both: Mapping[int, tuple[float, float]]) -> dict[str, Any]:
    """Means, and the sample standard deviation of the differences, null for one seed."""
    differences = [other - one for one, other in both.values()]
    return {
        "seeds": [*both],
        "a": statistics.fmean(one for one, _ in both.values()),
        "b": statistics.fmean(other for _, other in both.values()),
        "difference": statistics.fmean(differences),
        "deviation": statistics.stdev(differences) if len(differences) > 1 else None,
    }


def _state(record: "Record | None", value: float | None) -> str:
    if record is None:
        return "not run"
    if value is not None:
        return f"{value:.2f}"
    if record.finished:
        return "finished without a value"
    return f"{record.status}: {record.reason}" if record.reason else record.status


def _differs(pairs: Iterable[tuple["Record", "Record"]]) -> list[dict[str, Any]]:
    """`pairs`: of how many."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for one, other in pairs:
        had, has = _made(one), _made(other)
        counts.update((name, had[name], has[name]) for name in had if name in has and had[name] != has[name])
    return [{"name": name, "a": a, "b": b, "pairs": n} for (name, a, b), n in counts.items()]


def _made(record: "Record") -> dict[str, str]:
    """All that a run's values depend on, as far as it has a use for it."""
    from analysis.runs import FIELDS

    covered = {FIELDS[name] for name in record.protocol if name in FIELDS}
    code = {"preset": record.preset, "stages": ", ".join(record.stages), "commit": record.commit}
    config = {field: value for field, value in record.config.items() if field not in covered}
    return {name: value or "not recorded" for name, value in code.items()} | {
        **{f"version of {name}": version for name, version in record.versions.items()},
        **record.protocol,
        **config,
    }


def _sweep(sweep: "SweepRun") -> dict[str, Any]:
    return {"name": sweep.folder or sweep.name, "experiment": sweep.experiment, "run_id": sweep.run_id}


# For people


def _lines(told: Mapping[str, Any], a: str, b: str) -> Iterable[str]:
    from analysis.render import markdown, markdown_grid

    yield from (f"A: {a}", f"B: {b}", "")
    if told["cells"]:
        grid = [["cell", "metric", "A", "B", "B - A", "seeds"]]
        for cell in told["cells"]:
            deviation = "" if cell["deviation"] is None else f" ± {cell['deviation']:.2f}"
            values = [f"{cell['a']:.2f}", f"{cell['b']:.2f}", f"{cell['difference']:+.2f}{deviation}"]
            seeds = ", ".join(map(str, cell["seeds"]))
            grid.append([markdown(f"{cell['table']}/{cell['row']}"), cell["metric"], *values, seeds])
        yield markdown_grid(grid)
        yield ""
        yield "Means over the seeds that both have; B - A (± its sample standard deviation) is of pairs of equal seeds."
    else:
        yield "No cell has a value of the same seed in both."
    yield f"{told['pairs']} pairs of runs; {told['same']} of them have the same key, and are one measurement."
    yield "What is not alike in the pairs, A -> B:" if told["differs"] else "Nothing else differs that is recorded."
    for one in told["differs"]:
        n = "all" if one["pairs"] == told["pairs"] else f"{one['pairs']} of {told['pairs']}"
        yield f"  {one['name']}: {one['a']} -> {one['b']} ({n})"
    if told["missing"]:
        yield "Without a value of both:"
    for one in told["missing"]:
        seeds = f"seed{'s' * (len(one['seeds']) > 1)} {', '.join(map(str, one['seeds']))}"
        yield f"  {one['table']}/{one['row']}, {one['metric']}, {seeds}: A {one['a']}, B {one['b']}"
