"""The IoU of each class in a table's first row, and its change in the others."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compiled import CompiledTable
from analysis.details import CLASS_FILES, Details
from analysis.plots.common import NoData, Parts, group_rows, joined, told_absent, told_deviations, told_seeds
from sweeps.plan.scores import OF_MAPS, OF_MASKS, OF_SEGMENTATION, link_of

WHAT = {
    OF_MAPS: "maps at the threshold that the score is reported at",
    OF_MASKS: "pseudo masks",
    OF_SEGMENTATION: "segmentations from several scales, with the CRF where there is one",
}
"""Of what the IoU of each class is recorded."""


def draw_classes(compiled: CompiledTable, details: Mapping[str, Details]) -> Parts:
    """Two heat maps; changes are means over the seeds that both rows have.

    Raises NoData where the first row has no IoU of each class.
    """
    link = link_of(compiled.table.measured[0].name)
    if link not in CLASS_FILES:
        raise NoData(f"of {compiled.table.measured[0].name}, no run records the IoU of each class")
    groups, absent = group_rows(compiled, lambda trial: details[trial.run_id].class_iou.get(link))
    first = next(line.label for line in compiled.lines if line.ours)
    if not groups or first not in groups[0].labels:
        raise NoData(f"no finished run of its first row ({first}) has {CLASS_FILES[link]}")
    baseline, *others = groups
    paired = {group.label: sorted(group.values.keys() & baseline.values.keys()) for group in others}
    absent += [label for group in others if not paired[group.label] for label in group.labels]
    others = [group for group in others if paired[group.label]]
    classes = [*next(iter(baseline.values.values()))]
    rows = {seed: _row(of_seed, classes) for seed, of_seed in baseline.values.items()}
    changes = [
        np.mean([_row(group.values[seed], classes) - rows[seed] for seed in paired[group.label]], axis=0)
        for group in others
    ]
    ious = np.mean([*rows.values()], axis=0)
    figure = _draw([*classes, "mean"], (baseline.label, ious), [group.label for group in others], np.array(changes))
    seeds = {baseline.label: [*rows], **{group.label: paired[group.label] for group in others}}
    parts = [
        f"IoU of {WHAT[link]}.",
        told_seeds(compiled, seeds),
        "Changes are of the seeds that both rows have." if others else "",
        told_deviations(compiled),
        told_absent(absent, f"no {CLASS_FILES[link]} of a finished run in a seed of the first row"),
    ]
    return f"{compiled.table.name}: IoU of each class, and its change", joined(parts), figure


def _row(of_seed: Mapping[str, float], classes: Sequence[str]) -> np.ndarray:
    """The IoU (K + 1,) of the classes, and their mean."""
    values = [of_seed.get(name, np.nan) for name in classes]
    return np.array([*values, np.mean(values)])


def _draw(
    columns: Sequence[str], baseline: tuple[str, np.ndarray], labels: Sequence[str], changes: np.ndarray
) -> Figure:
    """The IoU of the baseline; below, a line of changes for each label."""
    figure = Figure(figsize=(2.6 + 0.46 * len(columns), 1.9 + 0.3 * (1 + len(labels))), layout="constrained")
    panels = figure.subplots(1 + bool(labels), squeeze=False, height_ratios=(1, len(labels))[: 1 + bool(labels)])[:, 0]
    label, ious = baseline
    _draw_heat_map(panels[0], ious[None], [label], "cividis", (0, 100), "{:.0f}")
    panels[0].set_title("IoU (%)", loc="left")
    if labels:
        most = max(float(np.nanmax(np.abs(changes))), 1.0)
        _draw_heat_map(panels[1], changes, labels, "PuOr", (-most, most), "{:+.1f}")
        panels[1].set_title("change of IoU (points)", loc="left")
    for panel in panels:
        panel.set_xticks([])
        panel.axvline(len(columns) - 1.5, color="white", linewidth=3)
    panels[-1].set_xticks(range(len(columns)), labels=columns, rotation=45, ha="right", rotation_mode="anchor")
    return figure


def _draw_heat_map(
    panel: Axes, values: np.ndarray, labels: Sequence[str], colours: str, limits: tuple[float, float], form: str
) -> None:
    """Each value (rows, columns) in its square, as a colour and as a number."""
    image = panel.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    panel.set_yticks(range(len(labels)), labels=[textwrap.shorten(label, 36, placeholder=" ...") for label in labels])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            panel.text(column, row, form.format(value), ha="center", va="center", color=ink, fontsize=7)
