"""Pictures of activation maps, in the layout of the paper's Figure 4."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from semformer.data.voc import IGNORE, voc_palette

TITLES = {"activation": "Act. Map", "attention": "CRA", "both": "Act. Map ⊗ CRA"}


def figure4(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    classes: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    *,
    truth: np.ndarray | None = None,
    threshold: float,
) -> Image.Image:
    """Per present class a row: image, activation map, CRA, final map, and ground truth where there is one.

    image: (H, W, 3) uint8.
    maps: kind ("activation", "attention", "both") -> (C, H, W) in 0..1, one channel per class in `classes`.
    The contour of `threshold` is drawn on every map.
    """
    rows, columns = max(1, len(classes)), len(maps) + 1 + (truth is not None)
    aspect = image.shape[0] / image.shape[1]
    grey = Image.fromarray(image).convert("L")
    figure = Figure(figsize=(2.2 * columns, 2.2 * aspect * rows + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, axis in enumerate(axes):
        name = class_names[classes[row]] if len(classes) else "no object"
        axis[0].imshow(image)
        axis[0].set_ylabel(name)
        for column, kind in enumerate(maps, start=1):
            axis[column].imshow(grey, cmap="gray", vmin=0, vmax=255)
            if len(classes):
                heat = maps[kind][row]
                axis[column].imshow(colormaps["jet"](heat), alpha=0.55)
                if heat.min() < threshold < heat.max() and min(heat.shape) > 1:
                    axis[column].contour(heat, levels=[threshold], colors="white", linewidths=0.8)
        if truth is not None:
            axis[-1].imshow(colored_mask(truth))
        for panel in axis:
            panel.set_xticks([])
            panel.set_yticks([])
    titles = ["Image", *(TITLES[kind] for kind in maps), *(["Ground Truth"] if truth is not None else [])]
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def colored_mask(mask: np.ndarray) -> Image.Image:
    """(H, W) class indices -> VOC's colours, ignored pixels white."""
    palette = np.array(voc_palette(), dtype=np.uint8).reshape(-1, 3)
    palette[IGNORE] = 255
    return Image.fromarray(palette[mask])
