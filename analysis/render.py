"""A compiled table written down: Markdown, LaTeX (booktabs), and a data frame of all cells.

The layout is the paper's: `layout.marks` tell what a row is, then come the measured and the paper's values. One row of
the table file is one line, or, in a transposed table, one column. A mark whose value was another in our runs than in
the paper is shown twice, like a metric: ours, then the paper's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from analysis.compiled import Cell, Chance, CompiledTable, Gap, Line, mark_text
from analysis.runs import SHORT
from semformer.errors import UserError
from sweeps.plan.scores import link_of
from sweeps.plan.table import Mark
from sweeps.tracking.connection import TAG

OURS, NO_VALUE, MISSING = "SemFormer (ours)", "–", "—"  # noqa: RUF001


@dataclass(frozen=True)
class Entry:
    """One place in the table. `latex` is given where it is not just the escaped text."""

    text: str
    latex: str = ""
    bold: bool = False
    italic: bool = False
    symbols: str = ""
    """Of its footnotes."""
    row: str = ""
    """The id of the row whose measured value it is."""
    spans: bool = False
    """Whether it heads all entries from here on."""


class Footnotes:
    """Numbers for what is missing, daggers for what deviates; the same text gets the same symbol."""

    def __init__(self):
        self.remarks: dict[str, str] = {}
        self.deviations: dict[str, str] = {}

    def symbols(self, cell: Cell) -> str:
        remarks = [self.remarks.setdefault(text, f"[{len(self.remarks) + 1}]") for text in cell.remarks]
        daggers = [self.deviations.setdefault(text, self._dagger()) for text in cell.deviations]
        return "".join(daggers) + "".join(remarks)

    def _dagger(self) -> str:
        i = len(self.deviations)
        return "†‡§¶"[i % 4] * (1 + i // 4)

    def items(self) -> list[tuple[str, str]]:
        deviations = [(symbol, f"not comparable: {text}") for text, symbol in self.deviations.items()]
        return deviations + [(symbol, text) for text, symbol in self.remarks.items()]


def to_markdown(compiled: CompiledTable) -> str:
    """The table, what its numbers are, and where each comes from (ids shortened)."""
    footnotes = Footnotes()
    lines, rules = entries(compiled, footnotes)
    grid = [[_markdown_entry(entry) for entry in line] for line in lines]
    if not compiled.table.layout.transposed:
        for i in rules - {0}:
            grid.insert(i + 1, [""] * len(grid[0]))  # Markdown has no other rules
    under = [f"- {symbol} {markdown(text)}" for symbol, text in footnotes.items()]
    under += [f"- **{heading}:** {markdown(text)}" for heading, text in compiled.notes]
    parts = [f"### {compiled.table.name}: {markdown(compiled.table.title)}", markdown_grid(grid), "\n".join(under)]
    if runs := _run_lines(compiled, SHORT):
        plural, places = "s" * (len(compiled.experiments) > 1), "`, `".join(compiled.experiments)
        parts.append(
            f"Where the measured values come from, in MLflow experiment{plural} `{places}` "
            f"(filter: `tags.\"{TAG}trial_key\" LIKE 'KEY%'`):"
        )
        parts.append(markdown_grid([[markdown(text) for text in line] for line in runs]))
    if chances := chance_lines(compiled):
        parts += ["How far chance goes:", markdown_grid([[markdown(text) for text in line] for line in chances])]
    return "\n\n".join(parts) + "\n"


def to_latex(compiled: CompiledTable) -> str:
    """A table environment; the document loads booktabs and amssymb. Full run ids and trial keys stand in comments."""
    footnotes = Footnotes()
    lines, rules = entries(compiled, footnotes)
    width = len(lines[0])
    body = []
    for i, line in enumerate(lines):
        body.append(" & ".join(_latex_line(line)) + r" \\")
        if i in rules:
            body.append(r"\midrule")
    under = [f"{_latex_symbols(symbol)} {_latex(text)}" for symbol, text in footnotes.items()]
    under += [rf"\textbf{{{_latex(heading)}:}} {_latex(text)}" for heading, text in compiled.notes]
    comments = [f"{compiled.table.name}, preset {compiled.preset}, MLflow: {' and '.join(compiled.experiments)}"]
    comments += [", ".join(line) for line in _run_lines(compiled, None)]
    return "\n".join(
        [
            *("% " + " ".join(comment.split()) for comment in comments),
            r"% \usepackage{booktabs,amssymb}",
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{_latex(compiled.table.title)}.}}",
            rf"\label{{tab:{compiled.table.name}}}",
            rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\smallskip",
            r"\begin{minipage}{\linewidth}\footnotesize\raggedright",
            *(text + r"\par" for text in under),
            r"\end{minipage}",
            r"\end{table}",
            "",
        ]
    )


def to_frame(compiled: CompiledTable) -> pd.DataFrame:
    """All cells, one line per row, metric and seed; `value` and `paper` in percent, ids in full."""
    records = []
    for line in compiled.lines:
        for metric in compiled.table.metrics:
            for trial in line.trials or (None,):
                records.append(
                    {
                        "table": compiled.table.name,
                        "preset": compiled.preset,
                        "experiment": trial.record.experiment if trial else "",
                        "row": line.id,
                        "label": line.label,
                        "settings": "; ".join(f"{mark} = {value}" for mark, value in line.settings.items()),
                        "metric": metric.name,
                        "seed": trial.seed if trial else None,
                        "status": trial.status if trial else line.status,
                        "reason": trial.reason if trial and trial.status in ("failed", "stopped") else "",
                        "value": trial.values.get(metric.name) if trial else None,
                        "threshold": trial.thresholds.get(link_of(metric.name)) if trial else None,
                        "paper": line.cells[metric.name].paper,
                        "deviations": "; ".join(trial.deviations) if trial else "",
                        "run_id": trial.run_id if trial else "",
                        "trial_key": trial.record.trial_key if trial else "",
                    }
                )
    types = {"seed": "Int64", "value": "float64", "threshold": "float64", "paper": "float64"}
    return pd.DataFrame(records).astype(types)


def write_files(compiled: CompiledTable, folder: Path) -> list[Path]:
    """<table>.md, <table>.tex and <table>.parquet in a folder, made if need be. Raises UserError if it cannot."""
    paths = [folder / f"{compiled.table.name}.{suffix}" for suffix in ("md", "tex", "parquet")]
    write_text(paths[0], to_markdown(compiled))
    write_text(paths[1], to_latex(compiled))
    try:
        to_frame(compiled).to_parquet(paths[2], index=False)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return paths


def write_text(path: Path, text: str) -> Path:
    """In a folder that is made if need be. Raises UserError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}") from error
    return path


def entries(compiled: CompiledTable, footnotes: Footnotes) -> tuple[list[list[Entry]], set[int]]:
    """The lines of the table, the heading first, and after which of them a rule belongs."""
    table, lines = compiled.table, compiled.lines
    marks, metrics, transposed = table.layout.marks, table.metrics, table.layout.transposed
    labelled = not marks or any(not line.ours for line in lines)
    stub = [Entry("")] * labelled
    for mark in marks:
        stub += _heads(mark.header, mark.latex, transposed, twice=_has_two_values(mark, compiled))
    rules = {0, len(stub) - 1} if labelled else {len(stub) - 1}
    for metric in metrics:
        stub += _heads(metric.header, "", transposed, twice=metric.name in table.paper_metrics)
    several = any(cell.n > 1 for line in lines for cell in line.cells.values())
    columns = [stub]
    for line in lines:
        told = [entry for mark in marks for entry in _mark_entries(line, mark, compiled)]
        values = []
        for metric in metrics:
            entry, row = _measured(line, line.cells[metric.name], several, footnotes), line.id if line.ours else ""
            values.append(replace(entry, italic=metric == metrics[0] and compiled.is_tied(line), row=row))
            values += [_paper(line.cells[metric.name])] * (metric.name in table.paper_metrics)
        columns.append([Entry(line.label)] * labelled + told + values)
    if not transposed:
        return columns, {0, sum(not line.ours for line in lines)}
    grid = [list(line) for line in zip(*columns, strict=True)]
    if labelled and marks:
        ours = [i for i, line in enumerate(lines, start=1) if line.ours]
        for i in ours:
            grid[0][i] = Entry(OURS, spans=True) if i == ours[0] else Entry("")
    return grid, rules


def _has_two_values(mark: Mark, compiled: CompiledTable) -> bool:
    """Whether our runs had another value than the paper's in some row."""
    lines = [line for line in compiled.lines if mark.name in line.settings]
    return bool(compiled.table.paper_metrics) and any(line.settings[mark.name] != _told(line, mark) for line in lines)


def _heads(header: str, latex: str, transposed: bool, *, twice: bool) -> list[Entry]:
    """One heading, or ours and the paper's. Above a LaTeX column, "ours" has a line of its own: it keeps the column
    narrow."""
    if not twice:
        return [Entry(header, latex)]
    form = "{} {}" if transposed else r"\shortstack{{{}\\{}}}"
    return [Entry(f"{header} {whose}", form.format(latex or _latex(header), whose)) for whose in ("ours", "paper")]


def _mark_entries(line: Line, mark: Mark, compiled: CompiledTable) -> list[Entry]:
    ours, told = Entry(line.settings.get(mark.name, NO_VALUE)), Entry(_told(line, mark))
    if _has_two_values(mark, compiled):
        return [ours, told]
    return [told if compiled.table.paper_metrics or mark.name not in line.settings else ours]


def _told(line: Line, mark: Mark) -> str:
    """What the table file says of a row."""
    return mark_text(line.marks.get(mark.name, "" if line.ours else NO_VALUE))


def _measured(line: Line, cell: Cell, several: bool, footnotes: Footnotes) -> Entry:
    if not line.ours:
        return Entry(NO_VALUE)
    symbols = footnotes.symbols(cell)
    if cell.mean is None:
        is_told = line.trials and line.status != "finished" and not cell.elsewhere
        return Entry(line.status if is_told else MISSING, symbols=symbols)
    mean, latex = f"{cell.mean:.1f}", ""
    spread = [] if cell.spread is None else [f"± {cell.spread:.1f}"]
    if several:
        spread.append(f"({cell.n})")
        small = (rf"\\{{\scriptsize {_latex(text)}}}" for text in spread)
        latex = rf"\shortstack{{{mean}{''.join(small)}}}"
    return Entry(" ".join([mean, *spread]), latex, bold=cell.best, symbols=symbols)


def _paper(cell: Cell) -> Entry:
    return Entry(NO_VALUE if cell.paper is None else f"{cell.paper:.1f}", bold=cell.paper_best)


def _run_lines(compiled: CompiledTable, length: int | None) -> list[list[str]]:
    """A heading and one line per trial; ids cut to `length`. Empty if there is no trial."""
    several = len(compiled.experiments) > 1
    metrics = compiled.table.measured
    marks = [mark for mark in compiled.table.layout.marks if _has_two_values(mark, compiled)]
    heads = ["row", *(f"{mark.header} ours" for mark in marks), "seed", "status"]
    heads += [*(metric.header for metric in metrics), "threshold", *["experiment"] * several, "MLflow run", "trial key"]
    lines = [
        [
            line.label,
            *(line.settings[mark.name] for mark in marks),
            str(trial.seed),
            trial.status,
            *(_number(trial.values.get(metric.name), 2) for metric in metrics),
            _number(trial.threshold, 2),
            *[trial.record.experiment] * several,
            trial.run_id[:length],
            trial.record.trial_key[:length],
        ]
        for line in compiled.lines
        for trial in line.trials
    ]
    return [heads, *lines] if lines else []


def chance_lines(compiled: CompiledTable) -> list[list[str]]:
    """A heading and one line per measured row: its first metric, and what it has more than the first row and than the
    best one, each with its intervals. Empty if none is known."""
    metric = compiled.table.measured[0]
    told = [(line, compiled.chances[line.id]) for line in compiled.lines if line.id in compiled.chances]
    first = next((line.label for line, _ in told if not line.cells[metric.name].deviations), "")
    best = next((line.label for line, _ in told if line.id == compiled.best), "")
    lines = [
        [
            line.label,
            f"{line.cells[metric.name].mean:.1f}{_intervals(chance)}",
            *(
                f"{gap.mean:+z.1f}{_intervals(gap)}" if gap else NO_VALUE
                for gap in (chance.from_first, chance.from_best)
            ),
        ]
        for line, chance in told
    ]
    heads = ["row", metric.header, f"more than {first}", f"more than {best} (the best)"]
    return [heads, *lines] if any(chance.images or chance.seeds for _, chance in told) else []


def _intervals(of: Chance | Gap) -> str:
    known = [("images", of.images), ("seeds", of.seeds)]
    told = [f"{name} {interval.low:z.1f} to {interval.high:z.1f}" for name, interval in known if interval]
    return f" ({', '.join(told)})" if told else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _markdown_entry(entry: Entry) -> str:
    text = markdown(entry.text)
    text = f"**{text}**" if entry.bold else f"*{text}*" if entry.italic else text
    return f"{text} {entry.symbols}" if entry.symbols.startswith("[") else text + entry.symbols


def markdown_grid(grid: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in grid]
    rule = "|" + "|".join("-" * (width + 2) if i == 0 else f":{'-' * width}:" for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown(text: str) -> str:
    """Escaped, but `_` inside a word (L_CF) is harmless and stays readable."""
    return re.sub(r"([\\`*<|$])|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], " ".join(text.split()))


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "–": r"\textendash{}",  # noqa: RUF001
        "—": r"\textemdash{}",
        "±": r"$\pm$",
        "×": r"$\times$",  # noqa: RUF001
        "✓": r"\checkmark{}",
        "✗": r"$\times$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "σ": r"$\sigma$",  # noqa: RUF001
        "†": r"\dag{}",
        "‡": r"\ddag{}",
        "§": r"\S{}",
        "¶": r"\P{}",
        **{symbol: "\\" + symbol for symbol in "&%$#_{}"},
    }
)


def _latex(text: str) -> str:
    return " ".join(text.split()).translate(LATEX).replace("--", "-{}-")


def _latex_symbols(symbols: str) -> str:
    return rf"\textsuperscript{{{_latex(symbols)}}}" if symbols else ""


def _latex_line(line: Sequence[Entry]) -> list[str]:
    """The entries; a first one with `[` or `*` must not be read as the option of the line break before it."""
    texts: list[str] = []
    for i, entry in enumerate(line):
        if entry.spans:
            return [*texts, rf"\multicolumn{{{len(line) - i}}}{{c}}{{{_latex(OURS)}}}"]
        text = entry.latex or _latex(entry.text)
        text = "{}" + text if i == 0 and text[:1] in ("[", "*") else text
        text = rf"\textbf{{{text}}}" if entry.bold else rf"\textit{{{text}}}" if entry.italic else text
        texts.append(text + _latex_symbols(entry.symbols))
    return texts
