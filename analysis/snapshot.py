"""What all runs have measured, in one tidy file for pandas, R or a spreadsheet: Parquet or CSV, by its ending.

A line for each run of a trial, each row of a table that it fills and each metric of the table (rows may share a run:
its `run_id` is then there several times). Nothing is chosen: runs are there that a table leaves out, with other
settings or on other data, failed ones and those that a newer one has replaced; `read` returns either file.

    table, row, label      of the table file; label "" where the file has no such row now
    preset, seed           of the run
    metric, value          a score in percent, empty until the run is finished
    threshold              of the maps' background, by the config's rule; empty for scores of others
    paper                  the paper's value, empty where there is none
    status, reason         finished, failed, running, queued, stopped or pruned, and why
    data                   the data set that maps are measured on
    run_id, trial_key      of MLflow; of what was run: runs with equal keys measure the same
    experiment, parent_run_id
                           of MLflow; the sweep's run
    commit, host           of the code; where it ran
    started, ended         UTC, as 2026-11-30T22:04:51Z; when it was planned, and was over
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.options import add_tracking, say
from semformer.config import PRESETS
from semformer.errors import UserError
from sweeps.plan.scores import link_of
from sweeps.plan.table import Table, load_tables

if TYPE_CHECKING:  # which imports MLflow, and takes seconds
    from analysis.runs import Record

SCHEMA = {
    "table": "str",
    "row": "str",
    "label": "str",
    "preset": "str",
    "seed": "int64",
    "metric": "str",
    "value": "float64",
    "threshold": "float64",
    "paper": "float64",
    "status": "str",
    "reason": "str",
    "data": "str",
    "run_id": "str",
    "trial_key": "str",
    "experiment": "str",
    "parent_run_id": "str",
    "commit": "str",
    "host": "str",
    "started": "str",
    "ended": "str",
}
"""Columns, in order; numbers that are not there are NaN, texts are ""."""
ENDINGS = (".parquet", ".csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help="table03, or the path of a table file (default: all with runs)")
    add("--out", type=_file, required=True, metavar="FILE", help="that ends with .parquet or .csv")
    add("--preset", choices=tuple(PRESETS), help="of this alone (default: all)")
    add("--experiment", action="append", default=[], metavar="NAME", help="may be repeated; default: all experiments")
    add_tracking(parser)


def _file(text: str) -> Path:
    if Path(text).suffix not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{text}: name a file that ends with {' or '.join(ENDINGS)}")
    return Path(text)


def run(options: argparse.Namespace) -> int:
    from analysis.runs import contents, read_records

    named = load_tables(options.tables)
    records, unusable = read_records(options.tracking_uri, options.preset or "", options.experiment)
    wanted = [table.name for table in named] or None
    lines = [line for line in _rows(records) if wanted is None or line[0] in wanted]
    if not lines:
        of = f" of {', '.join(wanted)}" if wanted else ""
        preset = f" with preset {options.preset}" if options.preset else ""
        raise UserError(f"no trial{of}{preset}: {contents(options.tracking_uri, options.experiment)}")
    tables, left_out = _tables(options.tracking_uri, named, lines)
    for text in [*left_out, *(f"{text}." for _, text in unusable)]:
        say(text, options, sys.stderr)
    frame = to_frame(tables, lines)
    if frame.empty:
        raise UserError("there is no table to tell the metrics of the runs")
    _write(frame, options.out)
    runs = frame["run_id"].nunique()
    say(f"{len(frame)} values of {runs} runs of {', '.join(frame['table'].unique())}: {options.out}", options)
    return 0


def _rows(records: Iterable["Record"]) -> list[tuple[str, str, "Record"]]:
    """(table, row, run), by table, the oldest run first."""
    filled = [(*_split(name), record) for record in records for name in record.rows]
    return sorted(filled, key=lambda one: (one[0], one[2].started, one[2].run_id, one[1]))


def _split(name: str) -> tuple[str, str]:
    table, _, row = name.partition("/")
    return table, row


def _tables(
    tracking_uri: str, named: Sequence[Table], lines: Iterable[tuple[str, str, "Record"]]
) -> tuple[dict[str, Table], list[str]]:
    """Those named, or all that the lines are of, as they were swept last; and sentences on those that are lost."""
    from analysis.swept import swept_tables

    if named:
        return {table.name: table for table in named}, []
    return swept_tables(tracking_uri, {table: record.parent_run_id for table, _, record in lines})


def to_frame(tables: Mapping[str, Table], lines: Iterable[tuple[str, str, "Record"]]) -> pd.DataFrame:
    """By SCHEMA, of those lines (table, row, run) whose table there is."""
    told = [one for table, row, record in lines if table in tables for one in _told(tables[table], row, record)]
    return pd.DataFrame(told, columns=list(SCHEMA)).astype(SCHEMA)


def _told(table: Table, row_id: str, record: "Record") -> Iterable[dict[str, Any]]:
    from analysis.runs import time_text

    row = table.rows[table.positions[row_id]] if row_id in table.positions else None
    for metric in table.measured:
        yield {
            "table": table.name,
            "row": row_id,
            "label": row.label if row else "",
            "preset": record.preset,
            "seed": record.seed,
            "metric": metric.name,
            "value": record.score(metric.name),
            "threshold": record.threshold(link_of(metric.name)),
            "paper": row.paper.get(metric.name) if row else None,
            "status": record.status,
            "reason": record.reason,
            "data": record.data,
            "run_id": record.run_id,
            "trial_key": record.trial_key,
            "experiment": record.experiment,
            "parent_run_id": record.parent_run_id,
            "commit": record.commit,
            "host": record.host,
            "started": time_text(record.started),
            "ended": time_text(record.ended),
        }


def _write(frame: pd.DataFrame, path: Path) -> None:
    """Raises UserError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str | Path) -> pd.DataFrame:
    """A snapshot, by SCHEMA: a CSV file of its own does not tell text from numbers, or "None" from nothing."""
    if Path(path).suffix == ".parquet":
        return pd.read_parquet(path)
    numbers = {name: [""] for name, kind in SCHEMA.items() if kind == "float64"}
    return pd.read_csv(path, dtype=SCHEMA, keep_default_na=False, na_values=numbers, float_precision="round_trip")
