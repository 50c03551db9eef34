"""All tables, figures and the agreement with the paper as one HTML file that needs nothing else to be read."""

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis.agreement import NOISE, Agreement, agreement_of
from analysis.compiled import Cell, CompiledTable, Line, Trial
from analysis.figures import Drawn, draw_all
from analysis.options import add_source, compile_tables, read_tables, say
from analysis.render import Footnotes, chance_lines, entries, write_text
from analysis.runs import MASKS, SHORT, plain_text

HOUR = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """The exit status. Raises UserError as the tables do, and if the file cannot be written."""
    compiled = compile_tables(options, read_tables(options))

    def tell(text: str) -> None:
        say(text, options, sys.stderr)

    figures = [*draw_all(compiled, options.tracking_uri, tell)]
    tell(f"wrote {write_text(options.out, to_html(compiled, figures))}")
    return 0


def to_html(compiled: Sequence[CompiledTable], figures: Sequence[Drawn]) -> str:
    """The report. A figure whose name is a table's and its kind stands under that, others at the end."""
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [table.table.name for table in compiled]
    of_tables = {name: [one for one in figures if one.name.rpartition("-")[0] == name] for name in names}
    shown = {one.name for own in of_tables.values() for one in own}
    return environment.get_template("report.html").render(
        facts=[*_facts(compiled)],
        agreement=agreement_of(compiled),
        tables=[_Section(table, of_tables[table.table.name]) for table in compiled],
        figures=[_Figure.of(one) for one in figures if one.name not in shown],
    )


def _facts(compiled: Sequence[CompiledTable]) -> Iterable[tuple[str, str]]:
    """(name, text) pairs: the answer first."""
    lines = [line for table in compiled for line in table.lines if line.ours]
    trials = {trial.run_id: trial for line in lines for trial in line.trials}.values()
    finished = [trial for trial in trials if trial.status == "finished"]
    if agreement := agreement_of(compiled):
        yield "Order of the rows", _ordered(agreement)
    filled = sum(line.is_filled for line in lines)
    yield "Cells", f"{filled} of {len(lines)} rows measured, by {len(finished)} runs"
    yield "Preset", ", ".join(dict.fromkeys(table.preset for table in compiled))
    if not finished:
        return
    yield "Data", "; ".join(dict.fromkeys(trial.record.data or "not recorded" for trial in finished))
    yield "Seeds", ", ".join(map(str, sorted({trial.seed for trial in finished})))
    readers = {name for trial in finished for name in trial.record.protocol.get(MASKS, "not recorded").split(", ")}
    yield "Pixel masks", f"read by {', '.join(sorted(readers))}; by no other stage"
    if cost := _cost(finished):
        yield "Cost", cost
    yield "Experiments", ", ".join(dict.fromkeys(trial.record.experiment for trial in finished))


def _ordered(agreement: Agreement) -> str:
    _, *seeds = agreement.counts[0][1:]
    _, _, *far = agreement.counts[-1]
    _, _, *every = agreement.counts[-2]
    told = [
        f"{all_of} and {far_of} ({name.partition(', ')[2]})"
        for name, all_of, far_of in zip(seeds, every, far, strict=True)
    ]
    what = f"pairs as in the paper, of all and of those that differ by more than {NOISE} points there"
    return f"{'; '.join(told)} {what}. {agreement.taus}."


def _cost(trials: Iterable[Trial]) -> str:
    """How long the stages took, each once, and how long they would have taken had no trial shared one."""
    alone, once = 0.0, dict[tuple[str, str], float]()
    for trial in trials:
        for name, digest in trial.record.stages.items():
            seconds = trial.record.metrics.get(f"{name}/seconds", 0.0)
            once[name, digest] = max(seconds, once.get((name, digest), 0.0))
            alone += seconds
    if not once:
        return ""
    took = sum(once.values())
    return f"{took / HOUR:.1f} hours of stages, each made once; had no run shared one, {alone / HOUR:.1f}"


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    source: str
    """As a URL that holds the picture."""

    @classmethod
    def of(cls, drawn: Drawn) -> "_Figure":
        buffer = io.BytesIO()
        drawn.figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = base64.b64encode(buffer.getvalue()).decode()
        return cls(drawn.title, drawn.caption, f"data:image/svg+xml;base64,{text}")


class _Section:
    """A table as the template shows it."""

    def __init__(self, compiled: CompiledTable, figures: Sequence[Drawn]):
        footnotes = Footnotes()
        grid, rules = entries(compiled, footnotes)
        table = compiled.table
        self.name, self.title = table.name, table.title
        self.sortable = not table.layout.transposed
        self.spanned = next((len(grid[0]) - i for i, entry in enumerate(grid[0]) if entry.spans), 1)
        self.heading, self.lines = grid[0][: len(grid[0]) - self.spanned + 1], grid[1:]
        self.ruled = set() if table.layout.transposed else rules
        self.footnotes, self.notes = footnotes.items(), compiled.notes
        self.chance = chance_lines(compiled)
        self.figures = [_Figure.of(one) for one in figures]
        self.rows = [_Row(compiled, line) for line in compiled.lines if line.ours]
        metric = table.measured[0]
        best = next((line for line in compiled.lines if line.id == compiled.best), None)
        paper = next((line for line in compiled.lines if line.ours and line.cells[metric.name].paper_best), None)
        self.best = f"{best.label}: {_number(best.cells[metric.name])}" if best else "nothing is measured"
        self.of_paper = f"{paper.label}: {paper.cells[metric.name].paper:.1f}" if paper else ""


class _Row:
    """Where a row's values come from."""

    def __init__(self, compiled: CompiledTable, line: Line):
        table = compiled.table
        self.id, self.label, self.status = line.id, line.label, line.status
        row = next(row for row in table.rows if row.id == line.id)
        own = {**row.set, **row.presets.get(compiled.preset, {})}
        self.settings = ", ".join(f"{field} = {plain_text(value)}" for field, value in own.items()) or "the table's own"
        self.why = f"semformer-tables why {table.name} {line.id} --preset {compiled.preset}"
        self.deviations = list(dict.fromkeys(text for trial in line.trials for text in trial.deviations))
        headers = (metric.header for metric in table.metrics)
        self.heads = ["seed", "status", *headers, "threshold", "MLflow run", "stages"]
        self.trials = [self._told(trial, [metric.name for metric in table.metrics]) for trial in line.trials]

    @staticmethod
    def _told(trial: Trial, metrics: Sequence[str]) -> list[Any]:
        reason = f": {trial.reason}" if trial.status in ("failed", "stopped") else ""
        stages = " ".join(f"{name}:{digest[:SHORT]}" for name, digest in trial.record.stages.items())
        values = [f"{trial.values[name]:.2f}" if name in trial.values else "" for name in metrics]
        threshold = "" if trial.threshold is None else f"{trial.threshold:.2f}"
        return [str(trial.seed), f"{trial.status}{reason}", *values, threshold, trial.run_id, stages]


def _number(cell: Cell) -> str:
    return f"{cell.mean:.1f}" + (f" ± {cell.spread:.1f} ({cell.n})" if cell.spread is not None else "")
