"""`semformer-tables`: the paper's tables with measured values, read from MLflow."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from semformer.config import PRESETS, parse_overrides
from semformer.errors import UserError


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
    tables = commands.add_parser("tables", help="print a table, compiled from MLflow", allow_abbrev=False)
    tables.add_argument("table", metavar="TABLE", help="table03, or the path of a table file of your own")
    tables.add_argument("--preset", default="tiny", choices=tuple(PRESETS))
    tables.add_argument("--tracking-uri", default="sqlite:///mlflow.db", metavar="URI", help="default: %(default)s")
    tables.add_argument("--experiment", metavar="NAME", help='default: "TABLE PRESET"')
    tables.add_argument("--seed", type=int, help="one seed only (default: mean and deviation over all)")
    tables.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="as in the sweep, if it has several settings"
    )
    tables.add_argument("--format", default="markdown", choices=("markdown", "latex", "both"))
    tables.add_argument("--out", type=Path, metavar="DIR", help="also write TABLE.md, .tex and .parquet (all cells)")
    tables.add_argument("--log", action="store_true", help="also keep the table in MLflow, with the sweep's parent run")
    tables.set_defaults(command=_tables)
    return parser


def _tables(options: argparse.Namespace) -> int:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from analysis.render import to_latex, to_markdown, write_files
    from analysis.runs import log_with_parents
    from analysis.tables import compile_from_mlflow

    compiled = compile_from_mlflow(
        options.table,
        preset=options.preset,
        tracking_uri=options.tracking_uri,
        experiment=options.experiment,
        seed=options.seed,
        overrides=parse_overrides(options.set),
    )
    if not any(line.status == "finished" for line in compiled.lines):
        states = [f"{line.label} {line.status}" for line in compiled.lines if line.trials]
        reasons = {trial.reason for line in compiled.lines for trial in line.trials if trial.status == "failed"}
        raise UserError(
            f"no trial of experiment {compiled.experiment!r} has finished yet: {', '.join(states)}"
            + "".join(f"\nfailed: {reason}" for reason in sorted(reasons))
        )
    renderers = {"markdown": [to_markdown], "latex": [to_latex], "both": [to_markdown, to_latex]}
    print("\n".join(renderer(compiled) for renderer in renderers[options.format]), end="")
    if options.log:
        name, run_ids = compiled.table.name, [trial.run_id for line in compiled.lines for trial in line.trials]
        texts = {f"{name}.md": to_markdown(compiled), f"{name}.tex": to_latex(compiled)}
        log_with_parents(options.tracking_uri, run_ids, texts)
    if options.out:
        for path in write_files(compiled, options.out):
            print(f"wrote {path}", file=sys.stderr)
    return 0
