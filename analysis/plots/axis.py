"""The curve over the one number that a table's rows vary, ours beside the paper's."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.compiled import CompiledTable, Line, Trial
from analysis.plots.common import (
    OURS,
    PAPER,
    NoData,
    Parts,
    are_several,
    identity,
    joined,
    told_absent,
    told_deviations,
    told_seeds,
)
from semformer.config import flatten
from sweeps.plan.table import resolve

MEAN, SEEDS, AGAIN, PUBLISHED = "ours", "ours, each seed", "ours, runs of another row again", "paper"


def draw_axis(compiled: CompiledTable) -> Parts:
    """Each metric in a panel of its own. A row is where the paper has it.

    Raises NoData where the rows vary something else, or nothing is measured.
    """
    field, axis = _axis(compiled)
    lines = sorted((line for line in compiled.lines if line.id in axis), key=lambda line: axis[line.id])
    metrics = [m for m in compiled.table.metrics if any(line.cells[m.name].mean is not None for line in lines)]
    if not metrics:
        raise NoData("no trial has finished")
    own = {line.id: _own_setting(compiled, line, field, axis[line.id]) for line in lines}
    ticks = {axis[line.id]: f"{axis[line.id]:g}" + f"\n({own[line.id]})" * bool(own[line.id]) for line in lines}
    header = _header(compiled, field)
    scale, gap = _scale([*ticks])
    width = min(max(3.1, 0.7 + 0.4 / gap), 12)  # of a panel in inches: tick labels are narrower than 0.4
    figure = Figure(figsize=(0.8 + width * len(metrics), 3.2), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        _draw_panel(panel, lines, axis, metric.name)
        panel.set(xlabel=header + ", ours in brackets" * any(own.values()), ylabel=metric.header)
        panel.set_xscale(scale)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks([*ticks], labels=[*ticks.values()])
    drawn = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    entries = [label for label in (MEAN, SEEDS, PUBLISHED, AGAIN) if label in drawn]
    columns = len(entries) if len(panels) > 1 or len(entries) < 4 else 2
    figure.legend([drawn[label] for label in entries], entries, loc="outside lower center", ncols=columns)
    names = ", ".join(metric.header.removesuffix(" (%)") for metric in metrics)
    return f"{compiled.table.name}: {names} by {header}", _caption(compiled, lines, metrics[0].name, own), figure


def _axis(compiled: CompiledTable) -> tuple[str, dict[str, float]]:
    """The field that the rows vary, and its value by row: the paper's, or ours where that has no scores."""
    table, fields = compiled.table, [*compiled.table.varied]
    if len(fields) != 1:
        raise NoData(f"its rows vary {' and '.join(fields) or 'nothing'}, not one number")
    preset = "paper" if table.paper_metrics else compiled.preset
    values = {row.id: flatten(resolve(table, row, preset, {}, 0)).get(fields[0]) for row in table.rows}
    axis = {row: value for row, value in values.items() if isinstance(value, int | float) and type(value) is not bool}
    if len(axis) < len(values):
        raise NoData(f"its rows vary {fields[0]}, which is not a number in each of them")
    if len(set(axis.values())) < 2:
        raise NoData(f"its rows all have the same {fields[0]}")
    return fields[0], axis


def _header(compiled: CompiledTable, field: str) -> str:
    mark = next((mark for mark in compiled.table.layout.marks if mark.field == field), None)
    return f"{mark.header} ({field})" if mark and mark.header != field else field


def _scale(values: Sequence[float]) -> tuple[Literal["linear", "log"], float]:
    """The one on which the narrowest gap between values is wider, and that gap as a share of their range."""

    def narrowest(at: np.ndarray) -> float:
        return float(np.diff(at).min() / (at[-1] - at[0]))

    linear = np.array(values, dtype=float)
    gaps: dict[Literal["linear", "log"], float] = {"linear": narrowest(linear)}
    if linear[0] > 0:
        gaps["log"] = narrowest(np.log(linear))
    return max(gaps.items(), key=lambda item: item[1])


def _own_setting(compiled: CompiledTable, line: Line, field: str, value: float) -> str:
    """What the runs of a row had in a field, "" where that is `value`; without runs, what they would have."""
    planned = flatten(
        resolve(compiled.table, compiled.table.rows[compiled.table.positions[line.id]], compiled.preset, {}, 0)
    )[field]
    had = [trial.record.config[field] for trial in line.trials if field in trial.record.config] or [str(planned)]
    return "" if all(_is_number(text, value) for text in had) else " and ".join(dict.fromkeys(had))


def _is_number(text: str, value: float) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False


def _draw_panel(panel: Axes, lines: Sequence[Line], axis: Mapping[str, float], metric: str) -> None:
    again = {line.id for same in _same_runs(lines, metric) for line in same[1:]}
    measured = [line for line in lines if line.cells[metric].mean is not None]
    first = [line for line in measured if line.id not in again]
    dots = [(axis[line.id], trial.values[metric]) for line in first for trial in _measured(line, metric)]
    if len(dots) > len(first):
        panel.plot(*zip(*dots, strict=True), ".", color=OURS, alpha=0.35, label=SEEDS)
    cells = [line.cells[metric] for line in first]
    x, means = [axis[line.id] for line in first], np.array([cell.mean for cell in cells])
    spreads = [np.nan if cell.spread is None else cell.spread for cell in cells]
    panel.errorbar(x, means, yerr=spreads, fmt="-o", color=OURS, markersize=5, capsize=3, label=MEAN)
    if points := [(axis[line.id], line.cells[metric].mean) for line in measured if line.id in again]:
        hollow: Any = {"color": OURS, "markerfacecolor": "white", "markersize": 5}
        panel.plot(*zip(*points, strict=True), "o", label=AGAIN, **hollow)
    if paper := [(axis[line.id], told) for line in lines if (told := line.cells[metric].paper) is not None]:
        panel.plot(*zip(*paper, strict=True), "--s", color=PAPER, markersize=4, label=PUBLISHED)
    panel.margins(x=0.1)


def _same_runs(lines: Sequence[Line], metric: str) -> list[list[Line]]:
    """Those of the lines that show the same runs, by these; only where there are several."""
    groups: dict[frozenset[str], list[Line]] = {}
    for line in lines:
        if measured := _measured(line, metric):
            groups.setdefault(frozenset(map(identity, measured)), []).append(line)
    return [same for same in groups.values() if len(same) > 1]


def _measured(line: Line, metric: str) -> list[Trial]:
    return [trial for trial in line.trials if metric in trial.values]


def _caption(compiled: CompiledTable, lines: Sequence[Line], metric: str, own: Mapping[str, str]) -> str:
    seeds = {line.label: [trial.seed for trial in measured] for line in lines if (measured := _measured(line, metric))}
    same = [", ".join(line.label for line in group) for group in _same_runs(lines, metric)]
    return joined(
        [
            told_seeds(compiled, seeds),
            "Points are means, error bars the sample standard deviation over seeds." if are_several(seeds) else "",
            "Rows stand at the paper's values; what ours had is in brackets." if any(own.values()) else "",
            f"One and the same runs: {'; '.join(same)}." if same else "",
            told_deviations(compiled),
            told_absent([line.label for line in lines if line.label not in seeds], "no finished run"),
        ]
    )
