"""`semformer-sweep`: plan the paper's tables, run them or a search as trials on a Ray cluster, and look after them."""

import argparse
import json
import logging
import os
import re
import shlex
import signal
import sys
import time
import webbrowser
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from semformer.config import DRAWABLE, PRESETS, parse_overrides
from semformer.errors import UserError
from semformer.secrets import without_password
from sweeps.plan.scores import GOALS
from sweeps.plan.table import load_all_tables, load_tables, table_names
from sweeps.search.space import add_arguments
from sweeps.tracking.folder import SWEEPS, SweepFolder, find_sweep, new_sweep

if TYPE_CHECKING:  # torch, Ray and MLflow take seconds to import
    from semformer.keys import StageKey
    from semformer.store import Store
    from sweeps.drive import Options
    from sweeps.plan.trials import Plan

STORE = "runs/store"
TRACKING_URI = "sqlite:///mlflow.db"
TRACKING_DEFAULT = f"$MLFLOW_TRACKING_URI, else {TRACKING_URI}"
LOG = logging.StreamHandler()
SHORT = 8
"""Characters of a key that are shown."""
SHOWN, NAMED = 200, 12
"""Trials that `plan` lists, and rows that it names for one reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments, folder=None))
    console = Console(stderr=options.json)
    _log_without_passwords(options)
    try:
        status = options.command(options, console)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except UserError as error:
        told = without_password(str(error), *_addresses(options))
        Console(stderr=True).print(f"[red]error:[/] {escape(told)}", highlight=False, soft_wrap=True)
        return 2
    except BrokenPipeError:  # who read it has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        console.print("stopped; the same command, or resume, goes on from the last epochs", highlight=False)
        return 130


def _addresses(options: argparse.Namespace) -> list[str]:
    """Those that may hold passwords."""
    given = (getattr(options, name, None) for name in ("tracking_uri", "storage", "store"))
    return [*filter(None, given), *filter(None, [os.environ.get("MLFLOW_TRACKING_URI")])]


def _log_without_passwords(options: argparse.Namespace) -> None:
    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return without_password(super().format(record), *_addresses(options))

    LOG.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[LOG])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semformer-sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('semformer-sweeps')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=function)
        added.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
        return added

    plan = command("plan", _plan, "what a sweep would run, what of it is there already, and what it costs")
    _add_tables(plan)
    _add_configs(plan)
    gpus = "count on so many for the wall time that the price tells; none are asked for (default: %(default)s)"
    plan.add_argument("--gpus", type=_positive(int), default=4, metavar="N", help=gpus)
    _add_price(plan)

    run = command("run", _run, "run what is missing of the tables' trials")
    _add_tables(run)
    _add_configs(run)
    _add_price(run)
    _add_running(run)

    drawing = command("draw", _draw, "draw the maps of tables' rows side by side, as the paper's Figure 3 does")
    _add_tables(drawing)
    _add_configs(drawing)
    kept = f"to draw, at most {DRAWABLE}, of which maps are kept (default: %(default)s)"
    drawing.add_argument("--images", type=_positive(int), default=DRAWABLE, metavar="N", help=kept)
    named = "for TABLE-PRESET-seedN.png, with a mark of --set if given (default: %(default)s)"
    drawing.add_argument("--out", type=Path, default=Path("runs/figures"), metavar="DIR", help=named)

    search = command("search", _search, "search the ablation axes with Optuna")
    _add_configs(search, seeds=False)
    add_arguments(search)
    _add_price(search)
    _add_running(search)

    resume = command("resume", _resume, "go on with a sweep whose driver has ended")
    _add_sweep(resume)

    status = command("status", _status, "what every trial of a sweep does, or why it waits")
    _add_sweep(status)

    stop = command("stop", _stop, "end a sweep's driver and its trials; they can be resumed from their last epochs")
    _add_sweep(stop)

    sync = command("sync", _sync, "deliver the records that MLflow was not there to take")
    _add_sweep(sync)
    sync.add_argument("--tracking-uri", metavar="URI", help="of MLflow (default: the sweep's)")

    ui = command("ui", _ui, "open MLflow on the columns that tell a sweep's story; of a database, until Ctrl-C")
    ui.add_argument("--tracking-uri", default=_tracking_uri(), metavar="URI", help=f"default: {TRACKING_DEFAULT}")
    ui.add_argument("--experiment", default="", metavar="NAME", help="default: the newest sweep's")
    ui.add_argument("--port", type=_positive(int), default=5000, metavar="N", help="of a server (default: %(default)s)")

    gc = command("gc", _gc, "delete from a store what no sweep and no run reaches; without --apply, tell what that is")
    gc.add_argument("--store", default=STORE, metavar="DIR", help="a folder, or s3://BUCKET/PREFIX")
    gc.add_argument("--apply", action="store_true", help="delete it")
    drop = "no longer keep what this sweep reaches, wherever it was started"
    gc.add_argument("--drop", action="append", default=[], metavar="SWEEP", help=drop)
    hours = "leave what is younger (default: %(default)s)"
    gc.add_argument("--grace", type=_positive(float, zero=True), default=24.0, metavar="HOURS", help=hours)
    return parser


def _add_tables(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(name.partition("_")[0] for name in table_names())
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{known}, or a YAML file of your own")
    parser.add_argument("--all", action="store_true", help="the paper's tables, as far as --until")
    parser.add_argument("--seeds", type=_seeds, default=(0,), metavar="N,N...", help="repeat every row; default: 0")


def _add_configs(parser: argparse.ArgumentParser, *, seeds: bool = True) -> None:
    preset = "micro: toy networks, in seconds; tiny (default): small ones that learn; paper: the paper's, on --data"
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS), help=preset)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of all rows")
    data = "a VOC devkit, in the same place on every node (default: the embedded shapes)"
    parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    parser.add_argument("--store", default=STORE, metavar="DIR", help="of artifacts: a folder, or s3://BUCKET/PREFIX")
    until = (
        "how far trials go at least: cams, the activation maps; pseudo_masks; deeplab, the segmentation (default: as "
        "far as the scores that are asked for, which they do in any case)"
    )
    parser.add_argument("--until", default="cams", choices=GOALS, help=until)
    weights = (
        "pretrained weights instead of a download: a file for each backbone (timm's names), or a folder that holds "
        "NAME.safetensors, NAME.pth or NAME.bin; in the same place on every node"
    )
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE|DIR", help=weights)


def _add_price(parser: argparse.ArgumentParser) -> None:
    tflops = "effective speed of one GPU, for stages of a kind that was never measured (default: 40)"
    parser.add_argument("--tflops", type=_positive(float), default=40.0, metavar="X", help=tflops)


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    budget = "of GPUs, such as 40h or 30m: a plan that costs more is not started, a search that has taken it ends"
    add("--budget", metavar="TIME", help=budget)
    add("--address", metavar="auto|HOST:PORT", help="of a Ray cluster (default: one of our own, on this machine)")
    add("--tracking-uri", default=_tracking_uri(), metavar="URI", help=f"of MLflow (default: {TRACKING_DEFAULT})")
    add("--experiment", metavar="NAME", help="in MLflow (default: name and preset)")
    model = "register the trials' segmentation networks in MLflow under this name"
    add("--register", type=_model_name, metavar="NAME", help=model)
    add("--cpus-per-trial", type=_positive(int), default=1, metavar="N", help="default: %(default)s")
    share = "1, or a fraction of one, which trials then share (0.25: four on a GPU); default: 1 if there is one"
    add("--gpus-per-trial", type=_share, metavar="X", help=share)
    add("--max-concurrent", type=_positive(int), metavar="N", help="trials at once; an autoscaling cluster grows to it")
    silence = "after which a trial that says nothing is killed and tried again (default: %(default)s)"
    add("--silence", type=_positive(float), default=600.0, metavar="SECONDS", help=silence)
    _add_sweeps(parser)


def _add_sweeps(parser: argparse.ArgumentParser) -> None:
    text = "where the sweeps have their folders (default: %(default)s)"
    parser.add_argument("--sweeps", type=Path, default=SWEEPS, metavar="DIR", help=text)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="default: the one started last")
    _add_sweeps(parser)


def _positive(kind: type, *, zero: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


def _share(text: str) -> float:
    share = _positive(float, zero=True)(text)
    if share > 1:
        raise argparse.ArgumentTypeError(
            f"{text}: a trial uses one GPU, and would leave the others idle; more GPUs run more trials at once. "
            "Give 1, or a fraction to let trials share a GPU"
        )
    return share


def _model_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w .+-]{0,255}", text):  # MLflow refuses / and :, and cannot search for a quote
        raise argparse.ArgumentTypeError(f"{text!r}: a model's name is of letters, digits, spaces and any of . _ + -")
    return text


def _tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or TRACKING_URI


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between them, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: seeds are different numbers of at least 0")
    return seeds


# Planning


def _make_plan(options: argparse.Namespace, console: Console) -> "tuple[Plan, Store]":
    if options.all == bool(options.tables):
        raise UserError("name one or more tables, or give --all")
    tables = load_all_tables(options.until) if options.all else load_tables(options.tables)
    overrides = parse_overrides(options.set)
    from semformer.store import open_store
    from sweeps.plan.trials import make_plan
    from sweeps.plan.weights import Weights

    weights = Weights(options.weights)
    store = open_store(options.store)
    with console.status("reading the data") as status:
        plan = make_plan(
            tables,
            options.preset,
            overrides,
            options.seeds,
            options.data,
            store,
            progress=lambda done, total: status.update(f"making the embedded data set: {done}/{total} images"),
            weights=weights,
            until=options.until,
        )
    return plan, store


def _plan(options: argparse.Namespace, console: Console) -> int:
    plan, store = _make_plan(options, console)
    from semformer.store.reasons import reasons
    from sweeps.plan.price import price
    from sweeps.plan.trials import distinct_stages

    with console.status("counting the price"):
        cost = price(plan.trials, plan.cached, store, gpus=options.gpus, tflops=options.tflops)
    if options.json:
        print(json.dumps({**plan.as_json(), "price": cost.as_json()}))
        return 0
    for table in plan.tables:
        source = table.source or table.path
        console.print(f"[bold]{table.name}[/], preset {plan.preset}: {escape(f'{table.title} ({source})')}")
    missing = plan.missing()
    console.print(_trials(plan, missing, console.width))
    if len(plan.trials) > SHOWN:
        console.print(f"... and {len(plan.trials) - SHOWN} more trials (--json tells all)", highlight=False)
    stages = Grid()
    to_make = Counter(key.stage for key in missing)
    for name in ("stage", "requested", "distinct", "cached", "to make"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for name, count in plan.stages.items():
        stages.add_row(name, *map(str, count), str(to_make[name]))
    console.print(stages)
    told: dict[tuple[str, str], list[str]] = {}
    why = reasons(store, distinct_stages(plan.trials))
    for key, wanted in missing.items():
        rows = [row for trial in wanted for row in plan.rows_of(trial)]
        told.setdefault((key.stage, why[key]), []).extend(rows)
    for (stage, reason), rows in told.items():
        named = list(dict.fromkeys(rows))
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        console.print(
            f"{stage} of {', '.join(named[:NAMED])}{more}: {reason}", highlight=False, markup=False, soft_wrap=True
        )
    for line in cost.lines():
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _draw(options: argparse.Namespace, console: Console) -> int:
    if options.images > DRAWABLE:
        raise UserError(f"--images {options.images}: maps to draw are kept of {DRAWABLE} images")
    plan, store = _make_plan(options, console)
    from sweeps.figure import figure3

    others = json.dumps(plan.overrides, sort_keys=True, default=str)
    settings = f"-{sha256(others.encode()).hexdigest()[:6]}" if plan.overrides else ""
    paths = []
    for table in plan.tables:
        for seed in plan.seeds:
            trials = [trial for trial in plan.trials if trial.config.seed == seed]
            path = options.out / f"{table.name}-{plan.preset}-seed{seed}{settings}.png"
            picture = figure3(table, trials, store, options.images)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            except OSError as error:
                raise UserError(f"the picture {path} cannot be written: {error.strerror or error}") from error
            paths.append(str(path))
            console.print(f"drew {escape(str(path))}", highlight=False, soft_wrap=True)
    if options.json:
        print(json.dumps({"pictures": paths}))
    return 0


def _trials(plan: "Plan", missing: Collection["StageKey"], width: int) -> Grid:
    """A column for each stage, or where they do not fit, one with the stages that each trial makes."""
    fits = width >= sum(max(SHORT + 2, len(name)) + 3 for name in (*plan.stages, "a name", "seed"))
    grid = Grid()
    for name in ("row", "seed", *(plan.stages if fits else ["to make"])):
        grid.add_column(name, no_wrap=fits and name != "row")
    for trial in plan.trials[:SHOWN]:
        if fits:
            states = [_state(trial.keys.get(name), plan.cached, missing) for name in plan.stages]
        else:
            made = [f"{name} [dim]{key.short[:SHORT]}[/]" for name, key in trial.keys.items() if key in missing]
            states = [", ".join(made) or "[green]nothing[/]"]
        grid.add_row(escape(", ".join(plan.rows_of(trial))), str(trial.config.seed), *states)
    return grid


def _state(key: "StageKey | None", cached: Collection[str], missing: Collection["StageKey"]) -> str:
    if key and key.digest in cached:
        return f"[green]{key.short[:SHORT]} ✓[/]"
    return key.short[:SHORT] if key and key in missing else "[dim]not needed[/]"


# Running


def _run(options: argparse.Namespace, console: Console) -> int:
    plan, store = _make_plan(options, console)
    from sweeps.drive import Drive

    folder = _folder(options, plan.name)
    with folder.drive(options.arguments):
        return Drive(_running(options), console, plan, store, folder).run()


def _running(options: argparse.Namespace) -> "Options":
    from sweeps.drive import Options

    return Options(**{field.name: getattr(options, field.name) for field in fields(Options)})


def _search(options: argparse.Namespace, console: Console) -> int:
    overrides = parse_overrides(options.set)
    from semformer.store import open_store
    from sweeps.drive import Drive
    from sweeps.search.search import make_search

    store = open_store(options.store)
    with console.status("opening the study"):
        search = make_search(options, overrides, store)
    try:
        folder = _folder(options, search.name)
        with folder.drive(options.arguments):
            return Drive(_running(options), console, search, store, folder).run()
    finally:
        search.close()


def _folder(options: argparse.Namespace, name: str) -> SweepFolder:
    """That of a resumed sweep; else the same for the same sweep, so that more seeds or trials extend it."""
    if options.folder:
        return options.folder
    uri = without_password(options.tracking_uri, options.tracking_uri)
    what = [options.preset, sorted(options.set), str(options.data), options.store, uri]
    until = [] if options.until == GOALS[0] else [options.until]
    what += [options.experiment, *sorted(options.weights), *until]
    digest = sha256(json.dumps(what).encode()).hexdigest()
    name = f"{name.removesuffix(f'-{options.preset}')}-{options.preset}"  # studies have it in their names already
    return new_sweep(options.sweeps, f"{name}-{digest[:6]}")


def _resume(options: argparse.Namespace, console: Console) -> int:
    folder = find_sweep(options.sweeps, options.sweep)
    if driver := folder.driver():
        raise UserError(f"the sweep {folder.name} is driven already, by {driver}")
    started = _go_back(folder)
    started.json |= options.json
    told = without_password(f"semformer-sweep {shlex.join(started.arguments)}", *_addresses(started))
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    try:
        return started.command(started, console)
    except UserError as error:
        raise UserError(without_password(str(error), *_addresses(started))) from error


def _go_back(folder: SweepFolder) -> argparse.Namespace:
    """Changes to where the sweep was started; returns the options that it was started with."""
    cwd, arguments = folder.started()
    if not Path(cwd).is_dir():
        raise UserError(f"the folder that {folder.name} was started in, {cwd}, is not there any more")
    folder = SweepFolder(folder.path.absolute())
    os.chdir(cwd)
    started = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments, folder=folder))
    _log_without_passwords(started)
    return started


# Looking after


def _status(options: argparse.Namespace, console: Console) -> int:
    folder = find_sweep(options.sweeps, options.sweep)
    driver, told = folder.driver(), folder.state()
    if options.json:
        print(json.dumps({"sweep": folder.name, "driver": driver, **(told or {})}))
        return 0
    from sweeps.tracking.display import show_status

    show_status(console, folder.name, driver, told)
    return 0


def _stop(options: argparse.Namespace, console: Console) -> int:
    folder = find_sweep(options.sweeps, options.sweep)
    if driver := folder.driver():
        folder.ask_to_stop()
        with console.status(f"waiting for {driver} to end {folder.name}"):
            if not folder.wait_for_driver(120):
                raise UserError(f"{driver} has not ended {folder.name} within 120 s: is it alive? `status` tells")
        console.print(f"{folder.name} is stopped: semformer-sweep resume {folder.name}", highlight=False)
    else:
        console.print(f"nobody drives {folder.name}", highlight=False)
    if options.json:
        print(json.dumps({"sweep": folder.name, "stopped": driver}))
    return 0


def _sync(options: argparse.Namespace, console: Console) -> int:
    folder = find_sweep(options.sweeps, options.sweep)
    if driver := folder.driver():
        raise UserError(f"{driver} drives {folder.name} and delivers its records itself: `stop` it first")
    from semformer.store import open_store
    from sweeps.tracking.delivery import deliver

    started = _go_back(folder)
    with started.folder.lock(), console.status("delivering to MLflow"):
        uri = options.tracking_uri or started.tracking_uri
        try:
            count = deliver(started.folder.path, open_store(started.store), uri)
        except UserError as error:
            raise UserError(without_password(str(error), uri, *_addresses(started))) from error
    console.print(f"{count} records delivered", highlight=False)
    if options.json:
        print(json.dumps({"sweep": folder.name, "delivered": count}))
    return 0


def _ui(options: argparse.Namespace, console: Console) -> int:
    from sweeps.tracking.ui import experiment_of, page

    is_server = options.tracking_uri.startswith("http")
    experiment = experiment_of(options.tracking_uri, options.experiment)
    if not is_server:
        for number in (signal.SIGTERM, signal.SIGHUP):  # else the server would stay
            signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), page(options.tracking_uri, experiment, options.port) as address:
        console.print(address, highlight=False, markup=False, soft_wrap=True)
        if options.json:
            print(json.dumps({"url": address}), flush=True)
        webbrowser.open(address)
        while not is_server:
            time.sleep(1)
    return 0


def _gc(options: argparse.Namespace, console: Console) -> int:
    from semformer.store import open_store
    from semformer.store.collection import collect

    store = open_store(options.store)
    roots = store.roots.all(without=options.drop)
    found = collect(store, apply=options.apply, grace=options.grace * 3600, without=options.drop)
    if options.apply:
        for name in options.drop:
            store.roots.drop(name)
    if options.json:
        print(json.dumps({"store": store.location, "applied": options.apply, "found": [asdict(one) for one in found]}))
        return 0
    listed = Grid()
    for name in ("stage", "key", "MB", "why"):
        listed.add_column(name, justify="right" if name == "MB" else "left")
    for one in found:
        listed.add_row(one.stage, one.digest[:SHORT], f"{one.bytes / 1e6:.1f}", escape(one.why))
    if found:
        console.print(listed)
    kept = f"kept for {', '.join(roots) or 'nobody'}"
    total = f"{sum(one.bytes for one in found) / 1e6:.1f} MB in {len(found)} places"
    told = f"{total} deleted; {kept}" if options.apply else f"{total} could be deleted (--apply does it); {kept}"
    console.print(told, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
