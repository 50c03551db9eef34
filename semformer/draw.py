"""Pictures of activation maps and label maps, in the layout of the paper's Figures 3, 4 and 5."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from semformer.data.voc import IGNORE, voc_palette

FINEST = 1000
"""Pixels along a side of an image that are drawn at least, of those that it has: a panel shows a quarter of them."""
TITLES = {"activation": "Act. Map", "attention": "CRA", "both": "Act. Map ⊗ CRA", "foreign": "Map"}


class Map(NamedTuple):
    """What stands in a column: values (H, W) in 0..1, or None where there is none, and where their contour is drawn."""

    heading: str
    values: np.ndarray | None
    threshold: float


class Labels(NamedTuple):
    """What stands in a column: class indices (H, W), 255 = ignored."""

    heading: str
    values: np.ndarray


class Line(NamedTuple):
    """A class of an image: `image` (H, W, 3) uint8, its maps, and its label maps."""

    name: str
    image: np.ndarray
    maps: Sequence[Map]
    labels: Sequence[Labels] = ()


def truth_of(mask: np.ndarray | None) -> list[Labels]:
    """The column of the ground truth, where there is one."""
    return [] if mask is None else [Labels("Ground Truth", mask)]


def figure4(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    classes: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    *,
    truth: np.ndarray | None = None,
    threshold: float,
) -> Image.Image:
    """Per present class a line: image, activation map, CRA, final map, and ground truth where there is one.

    image: (H, W, 3) uint8.
    maps: kind ("activation", "attention", "both") -> (C, H, W) in 0..1, one channel per class in `classes`.
    The contour of `threshold` is drawn on every map.
    """
    lines = [
        Line(class_names[k], image, [Map(TITLES[kind], maps[kind][row], threshold) for kind in maps], truth_of(truth))
        for row, k in enumerate(classes)
    ]
    return draw(
        lines or [Line("no object", image, [Map(TITLES[kind], None, threshold) for kind in maps], truth_of(truth))]
    )


def draw(lines: Sequence[Line]) -> Image.Image:
    """Images, their maps over them, and label maps. All lines have the columns of the first.

    Of large images, every so many pixels; a panel is at most four times as high as wide, or as wide as high.
    """
    lines = [_thinned(line, max(1, max(line.image.shape[:2]) // FINEST)) for line in lines]
    headings = ["Image", *(one.heading for one in lines[0].maps), *(one.heading for one in lines[0].labels)]
    aspects = [min(max(line.image.shape[0] / line.image.shape[1], 1 / 4), 4) for line in lines]
    figure = Figure(figsize=(2.2 * len(headings), 2.2 * sum(aspects) + 0.35), layout="constrained")
    axes = figure.subplots(len(lines), len(headings), squeeze=False, height_ratios=aspects)
    for line, panels in zip(lines, axes, strict=True):
        grey = Image.fromarray(line.image).convert("L")
        panels[0].imshow(line.image)
        panels[0].set_ylabel(line.name)
        for panel, (_, heat, threshold) in zip(panels[1:], line.maps, strict=False):
            panel.imshow(grey, cmap="gray", vmin=0, vmax=255)
            if heat is not None:
                panel.imshow(colormaps["jet"](heat), alpha=0.55)
                if heat.min() < threshold < heat.max() and min(heat.shape) > 1:
                    panel.contour(heat, levels=[threshold], colors="white", linewidths=0.8)
        for panel, labels in zip(panels[1 + len(line.maps) :], line.labels, strict=True):
            panel.imshow(colored_mask(labels.values))
        for panel in panels:
            panel.set_xticks([])
            panel.set_yticks([])
    for panel, heading in zip(axes[0], headings, strict=True):
        panel.set_title(heading, fontsize=9, parse_math=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def _thinned(line: Line, step: int) -> Line:
    """Every so many pixels of each row and column."""

    def thin(values: np.ndarray) -> np.ndarray:
        return values[::step, ::step]

    return Line(
        line.name,
        thin(line.image),
        [one._replace(values=None if one.values is None else thin(one.values)) for one in line.maps],
        [one._replace(values=thin(one.values)) for one in line.labels],
    )


def colored_mask(mask: np.ndarray) -> Image.Image:
    """(H, W) class indices -> VOC's colours, ignored pixels white."""
    palette = np.array(voc_palette(), dtype=np.uint8).reshape(-1, 3)
    palette[IGNORE] = 255
    return Image.fromarray(palette[mask])
