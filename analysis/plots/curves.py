"""Curves of a table's rows: mIoU over thresholds, and loss over epochs."""

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.compiled import CompiledTable, Trial
from analysis.details import LOSS, Details
from analysis.plots.common import (
    COLOURS,
    Group,
    NoData,
    Parts,
    are_several,
    group_rows,
    joined,
    told_absent,
    told_deviations,
    told_seeds,
)
from analysis.runs import Record
from semformer.config import EvaluateConfig
from semformer.stages.evaluate import CURVE

MARKERS = "os^Dvp*X"
Dash = Literal["-", "--", "-.", ":"]
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":")
RULES = ("oracle", "fixed")
MARKED = 6
"""How many points of a curve are marked."""
WIDTH = 26
"""Of the legend, in characters."""


@dataclass(frozen=True)
class Thresholds:
    """mIoU (%) by threshold, and the threshold by RULES, as far as the run tells them."""

    miou: Mapping[float, float]
    rules: Mapping[str, float]


def draw_thresholds(compiled: CompiledTable, details: Mapping[str, Details]) -> Parts:
    """The mIoU of the maps by threshold, with the thresholds of both rules. Raises NoData without curves."""

    def thresholds(trial: Trial) -> Thresholds | None:
        curve = details[trial.run_id].curve
        return Thresholds(curve, _rules(trial.record, curve)) if curve else None

    groups, absent = group_rows(compiled, thresholds)
    if not groups:
        raise NoData(f"no finished run has {CURVE}")
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    panel = figure.subplots()
    for i, group in enumerate(groups):
        _draw_curves(panel, [one.miou for one in group.values.values()], i)
        for rule, inside in zip(RULES, (_look(i)[1], "white"), strict=True):
            _draw_rule(panel, group.values.values(), rule, i, inside)
    panel.set(xlabel="threshold", ylabel="mIoU of maps (%)", ylim=(0, None))
    _add_legend(figure, groups)
    seeds = {group.label: group.values for group in groups}
    fixed = sorted({one.rules["fixed"] for own in seeds.values() for one in own.values() if "fixed" in one.rules})
    parts = [
        told_seeds(compiled, seeds),
        _told_span(seeds),
        "Filled markers: the best threshold (oracle)" + are_several(seeds) * ", in the mean of the seeds" + ".",
        f"Hollow markers: the fixed threshold, {' or '.join(f'{value:g}' for value in fixed)}." if fixed else "",
        told_deviations(compiled),
        told_absent(absent, f"no {CURVE} of a finished run"),
    ]
    return f"{compiled.table.name}: mIoU of maps by threshold", joined(parts), figure


def draw_training(compiled: CompiledTable, details: Mapping[str, Details]) -> Parts:
    """The loss of each segmentation network of the rows by epoch. Raises NoData without such series."""

    def network(trial: Trial) -> str:
        return trial.record.stages.get("segmentor", trial.run_id)

    groups, absent = group_rows(compiled, lambda trial: details[trial.run_id].loss or None, network)
    if not groups:
        raise NoData(f"no finished run has the series {LOSS}")
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    panel = figure.subplots()
    for i, group in enumerate(groups):
        _draw_curves(panel, [*group.values.values()], i, markers=True)
    panel.set(xlabel="epoch", ylabel="loss of the segmentation network")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    _add_legend(figure, groups)
    seeds = {group.label: group.values for group in groups}
    parts = [
        told_seeds(compiled, seeds),
        _told_span(seeds),
        "Rows with one curve share their networks." if any(len(group.labels) > 1 for group in groups) else "",
        "Rows with other losses sum other terms." if "segmentor.losses" in compiled.table.varied else "",
        told_absent(absent, f"no series {LOSS} of a finished run"),
    ]
    return f"{compiled.table.name}: training of the segmentation networks", joined(parts), figure


def _rules(record: Record, curve: Mapping[float, float]) -> dict[str, float]:
    """The best of the thresholds that were tried, and the fixed one."""
    try:
        fields = ("thresholds", "fixed_threshold")
        texts: dict[str, Any] = {name: record.config[f"evaluate.{name}"] for name in fields}
        options = EvaluateConfig(**texts | {"fixed_threshold": float(texts["fixed_threshold"])})
    except (KeyError, ValueError):  # of runs that did not record them
        return {}
    tried = [threshold for threshold in options.threshold_values() if threshold in curve]
    best = {"oracle": max(tried, key=curve.__getitem__)} if tried else {}
    return best | ({"fixed": options.fixed_threshold} if options.fixed_threshold in curve else {})


def _draw_rule(panel: Axes, seeds: Iterable[Thresholds], rule: str, i: int, inside: str) -> None:
    """A marker at the mean of threshold and mIoU."""
    told = [(one.rules[rule], one.miou[one.rules[rule]]) for one in seeds if rule in one.rules]
    if told:
        marker, colour, _ = _look(i)
        x, y = map(statistics.fmean, zip(*told, strict=True))
        panel.plot(
            [x], [y], marker, color=colour, markerfacecolor=inside, markeredgecolor="black", zorder=4, label=rule
        )


def _draw_curves(panel: Axes, curves: Sequence[Mapping[Any, float]], i: int, *, markers: bool = False) -> None:
    """The mean of curves where all have a value, and a band from the least to the most."""
    marker, colour, dashes = _look(i)
    x = [at for at in curves[0] if all(at in curve for curve in curves)]
    values = np.array([[curve[at] for at in x] for curve in curves])
    marked: Any = {"marker": marker, "markersize": 4, "markevery": max(1, len(x) // MARKED)} if markers else {}
    panel.plot(x, values.mean(axis=0), dashes, color=colour, linewidth=1.4, **marked)
    if len(curves) > 1:
        panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, linewidth=0)


def _look(i: int) -> tuple[str, str, Dash]:
    """Marker, colour and dashes of the i-th curve; each round of colours has others of the other two."""
    again = i + i // len(COLOURS)
    return MARKERS[again % len(MARKERS)], COLOURS[i % len(COLOURS)], DASHES[again % len(DASHES)]


def _add_legend(figure: Figure, groups: Sequence[Group]) -> None:
    looks = map(_look, range(len(groups)))
    lines = [Line2D([], [], marker=m, color=colour, linestyle=dash, markersize=4) for m, colour, dash in looks]
    labels = [_wrapped(group) for group in groups]
    figure.legend(lines, labels, loc="outside right upper", handlelength=3)
    lines_of_text = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(max(figure.get_figheight(), 0.4 + 0.17 * lines_of_text))


def _wrapped(group: Group) -> str:
    """The labels of its rows in lines, broken inside a label only where that is longer than a line."""
    kept = [label.replace(" ", "\N{NO-BREAK SPACE}") if len(label) < WIDTH else label for label in group.labels]
    return textwrap.fill(", ".join(kept), WIDTH)


def _told_span(seeds: Mapping[str, Mapping[int, Any]]) -> str:
    return "Lines are means over seeds, bands go from the least to the most." if are_several(seeds) else ""
