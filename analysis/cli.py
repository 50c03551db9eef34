"""The paper's tables with measured values, read from MLflow."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from analysis.compiled import CompiledTable
from analysis.options import add_source, compile_tables, read_tables, say
from semformer.errors import UserError
from semformer.secrets import without_password
from sweeps.plan.table import Table

COMMANDS = {
    "figures": "draws them: curves, IoU of each class, training, cost",
    "report": "all of it, figures as well, as one HTML file",
    "complexity": "parameters and FLOPs of the networks (Table 9); reads no runs",
    "why": "where a row of a table comes from, and how to make it again",
    "compare": "two sweeps, cell by cell",
    "snapshot": "what all runs have measured, in one tidy file",
}
"""What else it can do -> a line about it. Each is a module of this package, with `add_arguments` and `run`."""

EVERY = 60.0
"""Seconds after which `--watch` looks again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 when there are no tables, 1 when they could not be kept in MLflow."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, run = _parser_of(arguments[0] if arguments else "")
    options = parser.parse_args(arguments[1:] if run != _tables else arguments)
    try:
        return run(options)
    except UserError as error:
        say(f"error: {error}", options, sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(without_password(message))


def _parser_of(word: str) -> tuple[Parser, Callable[[argparse.Namespace], int]]:
    """Of a command, or of the tables themselves."""
    if word in COMMANDS:
        command = import_module(f"analysis.{word}")
        raw = argparse.RawDescriptionHelpFormatter
        name = f"semformer-tables {word}"
        parser = Parser(prog=name, description=command.__doc__, formatter_class=raw, allow_abbrev=False)
        command.add_arguments(parser)
        return parser, command.run
    others = "".join(f"\n  semformer-tables {name:10} {about}" for name, about in COMMANDS.items())
    parser = Parser(
        prog="semformer-tables",
        description=__doc__,
        epilog=f"others (each has --help):{others}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {version('semformer-sweeps')}")
    add_source(parser)
    add("--format", default="markdown", choices=("markdown", "latex", "both"), help="default: %(default)s")
    add("--agreement", action="store_true", help="also tell which pairs of rows are ordered as in the paper")
    add("--out", type=Path, metavar="DIR", help="also write TABLE.md, .tex and .parquet (all cells)")
    add("--log", action="store_true", help="also keep the tables in MLflow, with the sweep's parent run")
    add("--watch", action="store_true", help="again whenever a trial has got further, until none runs or waits")
    return parser, _tables


def _tables(options: argparse.Namespace) -> int:
    tables = read_tables(options)
    if options.agreement and options.out and any(table.name == "agreement" for table in tables):
        raise UserError("--agreement --out writes agreement.md, which would be your table's: give it another name")
    if options.watch:
        return _watch(options, tables)
    compiled = compile_tables(options, tables)
    _check_some_finished(compiled)
    return _show(options, tables, compiled)


def _watch(options: argparse.Namespace, tables: Sequence[Table]) -> int:
    """Once there are trials, an MLflow that does not answer is waited for."""
    compiled, shown, status = compile_tables(options, tables), None, 0
    while True:
        states = {(t.run_id, t.status, *sorted(t.values.items())) for table in compiled for t in table.trials}
        if states != shown:
            shown = states
            say(f"{datetime.now():%H:%M:%S}", options)
            status = _show(options, tables, compiled)
        if not any(state in ("queued", "running") for _, state, *_ in states):
            return status
        time.sleep(EVERY)
        try:
            compiled = compile_tables(options, tables)
        except UserError as error:
            say(f"still waiting: {error}", options, sys.stderr)


def _show(options: argparse.Namespace, tables: Sequence[Table], compiled: Sequence[CompiledTable]) -> int:
    from analysis import agreement
    from analysis.render import to_latex, to_markdown, write_files, write_text

    renderers = {"markdown": [to_markdown], "latex": [to_latex], "both": [to_markdown, to_latex]}
    say("\n".join(renderer(table) for table in compiled for renderer in renderers[options.format]).rstrip(), options)
    if len(tables) > 1:
        say(f"\n{'% ' * (options.format != 'markdown')}{_count(tables, compiled)}", options)
    agreed = agreement.to_markdown(compiled) if options.agreement else ""
    if agreed:
        comment = "% " * (options.format != "markdown")
        say("\n" + "\n".join(f"{comment}{line}" for line in agreed.splitlines()), options)
    if options.out:
        for path in (path for table in compiled for path in write_files(table, options.out)):
            say(f"wrote {path}", options, sys.stderr)
        if agreed:
            say(f"wrote {write_text(options.out / 'agreement.md', agreed)}", options, sys.stderr)
    return _log(options, compiled) if options.log else 0


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
            log_texts(
                options.tracking_uri, sorted({trial.record.parent_run_id for trial in table.trials} - {""}), texts
            )
    except UserError as error:
        say(f"error: the tables could not be kept in MLflow: {error}", options, sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
