"""Figures of tables: curves over an axis and over thresholds, IoU of each class, training, cost."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.compiled import CompiledTable
from analysis.details import CLASS_FILES, read_details
from analysis.options import add_source, compile_tables, read_tables, say
from analysis.plots.axis import draw_axis
from analysis.plots.classes import draw_classes
from analysis.plots.common import STYLE, NoData, Parts
from analysis.plots.cost import draw_cost
from analysis.plots.curves import draw_thresholds, draw_training
from analysis.render import markdown, write_text
from semformer.errors import UserError
from sweeps.plan.scores import link_of

SUFFIXES = ("png", "pdf")
DPI = 150


@dataclass(frozen=True)
class Drawn:
    """`name` is that of its files, without a suffix. The figure has no title in it."""

    name: str
    title: str
    caption: str
    figure: Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="for FIGURE.png and FIGURE.pdf of each, and figures.md"
    )


def run(options: argparse.Namespace) -> int:
    """Raises UserError if there is nothing to draw, or a file cannot be written."""

    def tell(text: str) -> None:
        say(text, options, sys.stderr)

    told = []
    for drawn in draw_all(compile_tables(options, read_tables(options)), options.tracking_uri, tell):
        for path in write_files(drawn, options.out):
            tell(f"wrote {path}")
        told.append(f"## {markdown(drawn.title)}\n\n![]({drawn.name}.png)\n\n{markdown(drawn.caption)}\n")
    if not told:
        raise UserError("no run has anything to draw: the lines above say what is missing")
    tell(f"wrote {write_text(options.out / 'figures.md', chr(10).join(told))}")
    return 0


def write_files(drawn: Drawn, folder: Path) -> list[Path]:
    """<name>.png and .pdf in a folder, made if need be, with title and caption. Raises UserError if it cannot."""
    told = {
        "png": {"Title": drawn.title, "Description": drawn.caption},
        "pdf": {"Title": drawn.title, "Subject": drawn.caption, "CreationDate": None},
    }
    paths = [folder / f"{drawn.name}.{suffix}" for suffix in SUFFIXES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(STYLE):
            for path, suffix in zip(paths, SUFFIXES, strict=True):
                drawn.figure.savefig(path, dpi=DPI, metadata=told[suffix])
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return paths


def draw_all(
    compiled: Sequence[CompiledTable], tracking_uri: str, tell: Callable[[str], None] = lambda text: None
) -> Iterator[Drawn]:
    """Of each table <table>-axis, -thresholds, -classes and -training, then of all tables `cost`, as far as there is
    data; `tell` hears which are left out, and why.

    Raises UserError as `read_details` does.
    """
    links: dict[str, set[str]] = {}
    for table in compiled:
        link = {link_of(table.table.measured[0].name)} & CLASS_FILES.keys()
        for trial in table.trials:
            if trial.status == "finished":
                links.setdefault(trial.run_id, set()).update(link)
    details = read_details(tracking_uri, links, tell)
    for table in compiled:
        figures: dict[str, Callable[[], Parts]] = {
            "axis": partial(draw_axis, table),
            "thresholds": partial(draw_thresholds, table, details),
            "classes": partial(draw_classes, table, details),
            "training": partial(draw_training, table, details),
        }
        for kind, draw in figures.items():
            yield from _drawn(f"{table.table.name}-{kind}", draw, tell)
    yield from _drawn("cost", partial(draw_cost, compiled), tell)


def _drawn(name: str, draw: Callable[[], Parts], tell: Callable[[str], None]) -> list[Drawn]:
    try:
        with rc_context(STYLE):
            return [Drawn(name, *draw())]
    except NoData as reason:
        tell(f"{name} is left out: {reason}")
        return []
