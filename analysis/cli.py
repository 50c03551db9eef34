"""`semformer-tables`: the paper's tables with measured values, read from MLflow."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semformer.config import PRESETS, parse_overrides
from semformer.errors import UserError
from sweeps.plan.table import Table, load_all_tables, load_tables

if TYPE_CHECKING:  # pandas and MLflow take seconds to import
    from analysis.tables import CompiledTable


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semformer-tables", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    tables = commands.add_parser("tables", help="print tables, compiled from MLflow", allow_abbrev=False)
    tables.add_argument("tables", nargs="*", metavar="TABLE", help="table03, or the path of a table file of your own")
    tables.add_argument("--all", action="store_true", help="the paper's tables, instead of TABLE...")
    tables.add_argument("--preset", default="tiny", choices=tuple(PRESETS))
    tables.add_argument("--tracking-uri", default="sqlite:///mlflow.db", metavar="URI", help="default: %(default)s")
    tables.add_argument(
        "--experiment", metavar="NAME", help='default: "TABLE PRESET" if there is one, else "tables PRESET"'
    )
    tables.add_argument("--seed", type=int, help="one seed only (default: mean and deviation over all)")
    tables.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="as in the sweep, if it has several settings"
    )
    tables.add_argument("--format", default="markdown", choices=("markdown", "latex", "both"))
    tables.add_argument("--out", type=Path, metavar="DIR", help="also write TABLE.md, .tex and .parquet (all cells)")
    tables.add_argument(
        "--log", action="store_true", help="also keep the tables in MLflow, with the sweep's parent run"
    )
    tables.set_defaults(command=_tables)
    return parser


def _tables(options: argparse.Namespace) -> int:
    if options.all == bool(options.tables):
        raise UserError("which tables? Name some (table03 table08), or give --all alone")
    tables = load_all_tables() if options.all else load_tables(options.tables)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from analysis.render import to_latex, to_markdown, write_files
    from analysis.runs import log_texts
    from analysis.tables import compile_from_mlflow

    compiled = compile_from_mlflow(
        tables,
        preset=options.preset,
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
        seed=options.seed,
        overrides=parse_overrides(options.set),
    )
    lines = [line for table in compiled for line in table.lines]
    if not any(line.status == "finished" for line in lines):
        states = [f"{line.label} {line.status}" for line in lines if line.trials]
        reasons = {trial.reason for line in lines for trial in line.trials if trial.status == "failed"}
        raise UserError(
            f"no trial of experiment {compiled[0].experiment!r} has finished yet: {', '.join(states)}"
            + "".join(f"\nfailed: {reason}" for reason in sorted(reasons))
        )
    renderers = {"markdown": [to_markdown], "latex": [to_latex], "both": [to_markdown, to_latex]}
    print("\n".join(renderer(table) for table in compiled for renderer in renderers[options.format]), end="")
    if len(tables) > 1:
        print(f"\n{'% ' * (options.format != 'markdown')}{_count(tables, compiled)}")
    if options.log:
        texts = {f"{table.table.name}.md": to_markdown(table) for table in compiled}
        texts |= {f"{table.table.name}.tex": to_latex(table) for table in compiled}
        parents = {trial.parent_run_id for line in lines for trial in line.trials} - {""}
        log_texts(options.tracking_uri, sorted(parents), texts)
    if options.out:
        for table in compiled:
            for path in write_files(table, options.out):
                print(f"wrote {path}", file=sys.stderr)
    return 0


def _count(tables: Sequence[Table], compiled: "Sequence[CompiledTable]") -> str:
    """ "48 of 51 cells filled", and which tables are not there at all."""
    filled = sum(line.is_filled for table in compiled for line in table.lines if line.ours)
    without = [table.name for table in tables if table.name not in {there.table.name for there in compiled}]
    told = f"{filled} of {sum(len(table.rows) for table in tables)} cells filled"
    return told + f"; no trial of {', '.join(without)}" * bool(without)


if __name__ == "__main__":
    sys.exit(main())
