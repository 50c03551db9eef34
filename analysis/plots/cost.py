"""What runs cost against what they score."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from analysis.compiled import CompiledTable
from analysis.plots.common import OURS, PAPER, NoData, Parts, joined

PLACES = (
    *(((5, 3), "left"), ((-5, 3), "right"), ((5, -9), "left"), ((-5, -9), "right")),
    *(((0, 7), "center"), ((0, -13), "center")),
)
"""Of a label beside its point, in points, and how it is aligned: the first that is free."""
MOST_LABELS = 100
WIDE_RANGE = 10
"""From the largest cost over the smallest on, the axis is logarithmic."""


def draw_cost(compiled: Sequence[CompiledTable]) -> Parts:
    """The mIoU of the maps of each run by the seconds of its stages. Raises NoData where no run has both."""
    rows: dict[str, list[str]] = {}
    points: dict[str, tuple[float, float]] = {}
    for table in compiled:
        for line in table.lines:
            for trial in line.trials:
                seconds = [value for name, value in trial.record.metrics.items() if name.endswith("/seconds")]
                if seconds and "miou" in trial.values:
                    points[trial.run_id] = sum(seconds), trial.values["miou"]
                    rows.setdefault(trial.run_id, []).append(f"{table.table.name} {line.label}")
    if not points:
        raise NoData("no finished run has both a mIoU of maps and the seconds of its stages")
    divisor, unit = _unit(max(seconds for seconds, _ in points.values()))
    points = {run_id: (seconds / divisor, miou) for run_id, (seconds, miou) in points.items()}
    front = _front(points)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    others = [points[run_id] for run_id in points if run_id not in front]
    if others:
        panel.plot(*zip(*others, strict=True), "o", color=OURS, markersize=4, alpha=0.6, label="run")
    best = [points[run_id] for run_id in front]
    steps: Any = {"drawstyle": "steps-post", "linewidth": 1}
    panel.plot(*zip(*best, strict=True), "--D", color=PAPER, label="run that no cheaper one equals", **steps)
    costs = [cost for cost, _ in points.values()]
    if min(costs) > 0 and max(costs) / min(costs) >= WIDE_RANGE:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(x=0.2, y=0.1)  # for labels
    panel.set(xlabel=f"time of all stages ({unit})", ylabel="mIoU of maps (%)")
    figure.legend(loc="outside lower center", ncols=2)
    order = [*front, *(run_id for run_id in points if run_id not in front)]
    named: dict[str, str] = {}
    for run_id in order:
        named.setdefault(_row_names(rows[run_id]), run_id)
    _label(figure, panel, points, dict(islice(named.items(), MOST_LABELS)))
    parts = [
        f"Each of the {len(points)} runs shown once, of every seed.",
        "The time is the sum over all stages of a run, of each as it was measured where it was made, also where runs "
        "share them.",
        "Labels are left out where it is crowded.",
    ]
    return "Cost and mIoU of all runs", joined(parts), figure


def _unit(most: float) -> tuple[float, str]:
    """Of times up to so many seconds."""
    return next(((at, unit) for at, unit in ((3600, "hours"), (60, "minutes")) if most >= 2 * at), (1, "seconds"))


def _front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The runs that are better than all that cost no more, by cost."""
    front: list[str] = []
    for run_id in sorted(points, key=lambda run_id: (points[run_id][0], -points[run_id][1])):
        if not front or points[run_id][1] > points[front[-1]][1]:
            front.append(run_id)
    return front


def _row_names(rows: Sequence[str]) -> str:
    more = f" (+{len(rows) - 1} rows)" if len(rows) > 2 else f" = {rows[1]}" if len(rows) == 2 else ""
    return textwrap.shorten(rows[0], 40, placeholder=" ...") + more


def _label(figure: Figure, panel: Axes, points: Mapping[str, tuple[float, float]], named: Mapping[str, str]) -> None:
    """Gives points names (name -> point), in this order, where the text meets no other, no point and no border."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, border = canvas.get_renderer(), panel.get_window_extent()
    dots = {key: Bbox.from_bounds(x - 4, y - 4, 8, 8) for key, (x, y) in _on_canvas(panel, points).items()}
    labels: list[Bbox] = []
    for name, key in named.items():
        taken = [*labels, *(dot for other, dot in dots.items() if other != key)]
        for offset, align in PLACES:
            style: Any = {"ha": align, "fontsize": 6.5, "color": "0.2"}
            note = panel.annotate(name, points[key], xytext=offset, textcoords="offset points", **style)
            box = note.get_window_extent(renderer)
            inside = border.x0 <= box.x0 and box.x1 <= border.x1 and border.y0 <= box.y0 and box.y1 <= border.y1
            if inside and not box.count_overlaps(taken):
                labels.append(box)
                break
            note.remove()


def _on_canvas(panel: Axes, points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return dict(zip(points, panel.transData.transform([*points.values()]).tolist(), strict=True))
