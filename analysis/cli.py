"""The paper's tables with measured values, read from MLflow."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TextIO

from analysis.compiled import CompiledTable
from semformer.config import PRESETS, parse_overrides
from semformer.errors import UserError
from semformer.secrets import without_password
from sweeps.plan.table import Table, load_all_tables, load_tables

DATABASE = "sqlite:///mlflow.db"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 when there are no tables, 1 when they could not be kept in MLflow."""
    options = _parser().parse_args(arguments)
    try:
        return _tables(options)
    except UserError as error:
        _say(f"error: {error}", options, sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(without_password(message))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="semformer-tables", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {version('semformer-sweeps')}")
    add("tables", nargs="*", metavar="TABLE", help="table03, or the path of a table file of your own")
    add("--all", action="store_true", help="the paper's tables, instead of TABLE...")
    add("--preset", default="tiny", choices=tuple(PRESETS), help="default: %(default)s")
    add(
        "--tracking-uri",
        default=os.environ.get("MLFLOW_TRACKING_URI") or DATABASE,
        metavar="URI",
        help=f"default: $MLFLOW_TRACKING_URI, else {DATABASE}",
    )
    add("--experiment", action="append", default=[], metavar="NAME", help="may be repeated; default: all experiments")
    add("--data", metavar="NAME", help="the data set, or how its name begins (default: that of most cells)")
    add("--seed", type=int, help="one seed only (default: mean and deviation over all)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in the sweep, if it has several settings")
    add("--format", default="markdown", choices=("markdown", "latex", "both"), help="default: %(default)s")
    add("--agreement", action="store_true", help="also tell which pairs of rows are ordered as in the paper")
    add("--out", type=Path, metavar="DIR", help="also write TABLE.md, .tex and .parquet (all cells)")
    add("--log", action="store_true", help="also keep the tables in MLflow, with the sweep's parent run")
    return parser


def _tables(options: argparse.Namespace) -> int:
    if options.all == bool(options.tables):
        raise UserError("which tables? Name some (table03 table08), or give --all alone")
    tables = load_all_tables() if options.all else load_tables(options.tables)
    if options.agreement and options.out and any(table.name == "agreement" for table in tables):
        raise UserError("--agreement --out writes agreement.md, which would be your table's: give it another name")
    from analysis import agreement
    from analysis.render import to_latex, to_markdown, write_files, write_text
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
    _check_some_finished(compiled)
    renderers = {"markdown": [to_markdown], "latex": [to_latex], "both": [to_markdown, to_latex]}
    _say("\n".join(renderer(table) for table in compiled for renderer in renderers[options.format]).rstrip(), options)
    if len(tables) > 1:
        _say(f"\n{'% ' * (options.format != 'markdown')}{_count(tables, compiled)}", options)
    agreed = agreement.to_markdown(compiled) if options.agreement else ""
    if agreed:
        comment = "% " * (options.format != "markdown")
        _say("\n" + "\n".join(f"{comment}{line}" for line in agreed.splitlines()), options)
    if options.out:
        for path in (path for table in compiled for path in write_files(table, options.out)):
            _say(f"wrote {path}", options, sys.stderr)
        if agreed:
            _say(f"wrote {write_text(options.out / 'agreement.md', agreed)}", options, sys.stderr)
    return _log(options, compiled) if options.log else 0


def _say(text: str, options: argparse.Namespace, file: TextIO | None = None) -> None:
    try:
        print(without_password(text, options.tracking_uri), file=file, flush=True)
    except BrokenPipeError:  # who read it has seen enough, as `| head` does: the files are written all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def _check_some_finished(compiled: Sequence[CompiledTable]) -> None:
    """Raises UserError, with the distinct reasons of those that failed."""
    trials = {trial.run_id: trial for table in compiled for trial in table.trials}.values()
    states = Counter(trial.status for trial in trials)
    if not states["finished"]:
        told = ", ".join(f"{n} {status}" for status, n in states.items())
        reasons = sorted({f"failed: {trial.reason}" for trial in trials if trial.status == "failed"})
        names = ", ".join(table.table.name for table in compiled)
        others = dict.fromkeys(text for table in compiled for heading, text in table.notes if heading == "Runs")
        raise UserError("\n".join([f"no trial of {names} has finished yet: {told}", *reasons, *others]))


def _count(tables: Sequence[Table], compiled: Sequence[CompiledTable]) -> str:
    """ "48 of 51 cells filled", and which tables are not there at all."""
    filled = sum(line.is_filled for table in compiled for line in table.lines if line.ours)
    without = [table.name for table in tables if table.name not in {there.table.name for there in compiled}]
    told = f"{filled} of {sum(len(table.rows) for table in tables)} cells filled"
    return told + f"; no trial of {', '.join(without)}" * bool(without)


def _log(options: argparse.Namespace, compiled: Sequence[CompiledTable]) -> int:
    from analysis.render import to_latex, to_markdown
    from analysis.runs import log_texts

    try:
        for table in compiled:
            name = table.table.name
            texts = {f"{name}.md": to_markdown(table), f"{name}.tex": to_latex(table)}
            log_texts(options.tracking_uri, sorted({trial.parent_run_id for trial in table.trials} - {""}), texts)
    except UserError as error:
        _say(f"error: the tables could not be kept in MLflow: {error}", options, sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
