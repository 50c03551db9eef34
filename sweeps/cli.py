"""`semformer-sweep`: plan a table of the paper, and run its trials."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from semformer.config import PRESETS, parse_overrides
from semformer.errors import UserError
from sweeps.axes import load_table, table_names

if TYPE_CHECKING:  # torch and MLflow take seconds to import
    from semformer.keys import StageKey
    from semformer.store import Store
    from sweeps.plan import Plan, Trial
    from sweeps.tracking import Tracker

STORE = Path("runs/store")
TRACKING_URI = "sqlite:///mlflow.db"
SHORT = 8
"""Characters of a key that are shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(stderr=options.json)
    try:
        return options.command(options, console)
    except UserError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last epochs", highlight=False)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semformer-sweep", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    plan = commands.add_parser("plan", help="what a sweep would run, and what is there already", allow_abbrev=False)
    _add_plan_arguments(plan)
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", help="run what is missing of a table's trials", allow_abbrev=False)
    _add_plan_arguments(run)
    run.add_argument("--tracking-uri", default=TRACKING_URI, metavar="URI", help="of MLflow (default: %(default)s)")
    run.add_argument("--experiment", metavar="NAME", help="in MLflow (default: table and preset)")
    run.add_argument("--cpus-per-trial", type=_positive(int), default=1, metavar="N", help="default: 1")
    run.add_argument(
        "--gpus-per-trial",
        type=_positive(float, zero=True),
        metavar="X",
        help="may be a fraction; default: 1 if there is one",
    )
    run.add_argument("--max-concurrent", type=_positive(int), metavar="N", help="trials at once")
    run.set_defaults(command=_run)
    return parser


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help=f"{', '.join(table_names())}, or a YAML file of your own")
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of all rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a VOC devkit (default: the embedded shapes)")
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="where artifacts are kept")
    parser.add_argument("--seeds", type=_seeds, default=(0,), metavar="N,N...", help="repeat every row; default: 0")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")


def _positive(kind: type, *, zero: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between them, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: seeds are different numbers of at least 0")
    return seeds


def _make_plan(options: argparse.Namespace, console: Console) -> "tuple[Plan, Store]":
    table = load_table(options.table)
    overrides = parse_overrides(options.set)
    from semformer.store import Store
    from sweeps.plan import make_plan

    store = Store(options.store)
    with console.status("reading the data") as status:
        plan = make_plan(
            [table],
            options.preset,
            overrides,
            options.seeds,
            options.data,
            store,
            progress=lambda done, total: status.update(f"making the embedded data set: {done}/{total} images"),
        )
    return plan, store


def _plan(options: argparse.Namespace, console: Console) -> int:
    plan, store = _make_plan(options, console)
    if options.json:
        print(json.dumps(plan.as_json()))
        return 0
    table = plan.tables[0]
    console.print(f"[bold]{table.name}[/], preset {plan.preset}: {escape(table.title)} ({table.source or table.path})")
    trials = Grid()
    for name in ("row", "seed", *plan.stages):
        trials.add_column(name, no_wrap=True)
    for trial in plan.trials:
        states = [_state(trial.keys.get(name), plan.cached) for name in plan.stages]
        trials.add_row(escape(plan.rows_of(trial)), str(trial.config.seed), *states)
    console.print(trials)
    stages = Grid()
    for name in ("stage", "requested", "distinct", "cached", "to make"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for name, count in plan.stages.items():
        stages.add_row(name, *map(str, count), str(count.distinct - count.cached))
    console.print(stages)
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, wanted in plan.missing().items():
        rows = [plan.rows_of(trial) for trial in wanted]
        reasons.setdefault((key.stage, store.why(key)), []).extend(rows)
    for (stage, why), rows in reasons.items():
        told = ", ".join(dict.fromkeys(rows))
        console.print(f"{stage} of {told}: {why}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _state(key: "StageKey | None", cached: frozenset[str]) -> str:
    if key is None:
        return "[dim]not needed[/]"
    return f"[green]{key.short[:SHORT]} ✓[/]" if key.digest in cached else key.short[:SHORT]


def _run(options: argparse.Namespace, console: Console) -> int:
    plan, store = _make_plan(options, console)
    with console.status("opening MLflow"):
        from sweeps.tracking import Tracker

        folder = options.store.with_name("sweeps") / f"{plan.name}-{plan.preset}"
        tracker = Tracker(options.tracking_uri, plan, store, options.experiment, folder=folder)
    missing = [trial for trial in plan.trials if not plan.is_cached(trial)]
    if not missing and tracker.is_complete():
        console.print(f"nothing to do: all {len(plan.trials)} trials are finished and recorded", highlight=False)
        return _conclude(options, console, plan, tracker, {}, failed=False)
    to_make = {name: count.distinct - count.cached for name, count in plan.stages.items()}
    told = ", ".join(f"{n} {name}" for name, n in to_make.items() if n) or "nothing, only to record"
    head = f"{plan.name}, preset {plan.preset}: {len(plan.trials)} trials; to make: {told}"
    console.print(head, highlight=False, soft_wrap=True)
    from sweeps.display import Display

    display, status = Display(plan, console), "KILLED"
    with ExitStack() as stack:
        if missing:
            with console.status("starting Ray"):
                from sweeps import runner

                share = stack.enter_context(runner.local_ray(options.cpus_per_trial, options.gpus_per_trial))
        tracker.begin()
        try:
            with display:
                for trial in plan.trials:
                    if plan.is_cached(trial):
                        display.record_found(trial)
                        tracker.record_found(trial)
                if missing:

                    def tell(trial: "Trial", report: Mapping[str, Any]) -> None:
                        tracker.tell(trial, report)
                        display.tell(trial, report)

                    runner.run_trials(missing, store, tell, share=share, max_concurrent=options.max_concurrent)
            status = "FINISHED" if display.complete else "FAILED"
        finally:
            tracker.end(status, display.counts())
    display.summary()
    return _conclude(options, console, plan, tracker, display.counts(), failed=not display.complete)


def _conclude(
    options: argparse.Namespace,
    console: Console,
    plan: "Plan",
    tracker: "Tracker",
    counts: dict[str, float],
    *,
    failed: bool,
) -> int:
    from sweeps.tracking import without_password

    uri = without_password(options.tracking_uri)
    where = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    console.print(
        f"Runs, curves and pictures: {where} (experiment {tracker.experiment!r})", highlight=False, soft_wrap=True
    )
    chosen = [f"--set {field}={value}" for field, value in plan.overrides.items()]
    chosen += [] if options.tracking_uri == TRACKING_URI else [f"--tracking-uri {uri}"]
    chosen += [] if options.experiment is None else [f"--experiment '{options.experiment}'"]
    command = " ".join(["semformer-tables tables", options.table, f"--preset {plan.preset}", *chosen])
    console.print(f"Table: {command}", highlight=False, markup=False, soft_wrap=True)
    if tracker.errors:
        console.print(
            f"[red]{len(tracker.errors)} records could not be written to MLflow[/], the first because of "
            f"{escape(tracker.errors[0])}. Run the same command again to write them.",
            highlight=False,
            soft_wrap=True,
        )
    if options.json:
        result = {**plan.summary(), **counts, "experiment": tracker.experiment, "parent_run_id": tracker.parent_run_id}
        print(json.dumps(result))
    return 1 if failed or tracker.errors else 0


if __name__ == "__main__":
    sys.exit(main())
