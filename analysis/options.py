"""What the commands of `semformer-tables` have in common: which tables, of which runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from semformer.config import PRESETS, parse_overrides
from semformer.errors import UserError
from semformer.secrets import without_password
from sweeps.plan.scores import GOALS
from sweeps.plan.table import Table, load_all_tables, load_tables

if TYPE_CHECKING:
    from analysis.compiled import CompiledTable

DATABASE = "sqlite:///mlflow.db"


def add_tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri",
        default=os.environ.get("MLFLOW_TRACKING_URI") or DATABASE,
        metavar="URI",
        help=f"default: $MLFLOW_TRACKING_URI, else {DATABASE}",
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Which tables, of which runs."""
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help="table03, or the path of a table file of your own")
    add("--all", action="store_true", help="the paper's tables, instead of TABLE...")
    add_choice(parser)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which runs a table shows."""
    add = parser.add_argument
    add("--preset", default="tiny", choices=tuple(PRESETS), help="default: %(default)s")
    add_tracking(parser)
    add("--experiment", action="append", default=[], metavar="NAME", help="may be repeated; default: all experiments")
    add("--data", metavar="NAME", help="the data set, or how its name begins (default: that of most cells)")
    add("--seed", type=int, help="one seed only (default: mean and deviation over all)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in the sweep, if it has several settings")


def read_tables(options: argparse.Namespace) -> list[Table]:
    """Raises UserError if none is named, or a table file is wrong."""
    if options.all == bool(options.tables):
        raise UserError("which tables? Name some (table03 table08), or give --all alone")
    return load_all_tables(GOALS[-1]) if options.all else load_tables(options.tables)


def compile_tables(options: argparse.Namespace, tables: Sequence[Table]) -> "list[CompiledTable]":
    """Those of the tables that there are runs of. Raises UserError as `compile_from_mlflow` does."""
    from analysis.chance import with_chance
    from analysis.tables import compile_from_mlflow

    compiled = compile_from_mlflow(
        tables,
        preset=options.preset,
        tracking_uri=options.tracking_uri,
        experiments=options.experiment,
        data=options.data,
        seed=options.seed,
        overrides=parse_overrides(options.set),
    )
    return with_chance(compiled, options.tracking_uri)


def say(text: str, options: argparse.Namespace, file: TextIO | None = None) -> None:
    """A line for people, on stdout if no `file` is named, without the password of the tracking URI."""
    try:
        print(without_password(text, options.tracking_uri), file=file, flush=True)
    except BrokenPipeError:  # who read it has seen enough, as `| head` does: the files are written all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
