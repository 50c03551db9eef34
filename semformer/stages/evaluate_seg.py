"""Stage evaluate_seg: scores of the segmentation against pixel masks, and pictures in the layout of Figure 5."""

from typing import Any

import numpy as np

from semformer import draw
from semformer.config import Config
from semformer.data.pack import Packed
from semformer.metrics import ImageCounts, confusion, label_map_metrics, scores
from semformer.stages.context import Context
from semformer.stages.evaluate import of_all_images, write_image_counts, write_scores
from semformer.stages.segmentation import MULTI, SINGLE
from semformer.stages.shards import label_maps_in
from semformer.store import Artifact


def run(config: Config, data: Packed, segmentation: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `metrics.json`, the IoU of each class, the pixels of each image and class, and pictures. Reads pixel masks.
    Returns {"metrics": {...}}.

    "seg/<split>/miou", "precision" and "recall" of label maps from several scales, "miou_single" from one; with the
    CRF these are "miou_crf" and so on.
    """
    label_maps = label_maps_in(segmentation)
    K, kinds = len(data.classes), list(segmentation.info["kinds"])

    def count(i: int) -> np.ndarray:
        return np.stack([confusion(data.mask(i), label_maps[f"{kind}/{data.ids[i]}"], K) for kind in kinds])

    counts = np.zeros((len(kinds), K, K), dtype=np.int64)
    images: list[list[ImageCounts]] = [[] for _ in kinds]
    for of_image in of_all_images("evaluate_seg", count, data, ctx):
        counts += of_image
        for of_kind, confused in zip(images, of_image, strict=True):
            of_kind.append(ImageCounts.of_labels(confused))

    metrics, counted = {}, {}
    for kind, confused, of_kind in zip(kinds, counts, images, strict=True):
        ending = kind.removeprefix(MULTI).replace(SINGLE, f"_{SINGLE}")
        counted[f"seg/{data.name}/miou{ending}"] = of_kind, (0, 0)
        for name, value in label_map_metrics(confused).items():
            metrics[f"seg/{data.name}/{name}{ending}"] = value
    write_scores(metrics, scores(counts[-1]).iou, data, ctx)
    write_image_counts(counted, data, ctx)
    folder = ctx.out / "pictures"
    folder.mkdir()
    for i in range(min(config.evaluate.pictures, len(data))):
        found = draw.Labels("Segmentation", label_maps[f"{kinds[-1]}/{data.ids[i]}"])
        line = draw.Line("", data.pixels(i), [], [found, draw.Labels("Ground Truth", data.mask(i))])
        draw.draw([line]).save(folder / f"{data.ids[i]}.png")
    return {"metrics": metrics}
