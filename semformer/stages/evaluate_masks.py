"""Stage evaluate_masks: scores of each link from maps to pseudo masks, on the same images, and pictures of them."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semformer import draw
from semformer.config import Config
from semformer.data.pack import Packed
from semformer.metrics import ImageCounts, ThresholdCurve, confusion, label_map_metrics, reported, scores
from semformer.stages.affinity_labels import hard_labels
from semformer.stages.cams import MapFiles
from semformer.stages.context import Context
from semformer.stages.evaluate import of_all_images, write_image_counts, write_scores
from semformer.stages.shards import label_maps_in
from semformer.stages.walk import WalkedFiles
from semformer.store import Artifact

CPU = torch.device("cpu")
BEFORE = "miou_before_crf"


def run(
    config: Config, data: Packed, cams: Artifact | None, walk: Artifact | None, pseudo_masks: Artifact, ctx: Context
) -> dict[str, Any]:
    """Makes `metrics.json`, the IoU of each class, the pixels of each image and class, and pictures. Reads pixel masks.
    Returns {"metrics": {...}}.

    "cam/<split>/..." and "walk/<split>/..." as of maps (`metrics.reported`); "pseudo/<split>/miou", "precision" and
    "recall" of the pseudo masks, and "pseudo/<split>/miou_before_crf" at their threshold. Foreign masks have no more
    than the three.
    """
    links = _Links(config, cams, walk, pseudo_masks)
    K, options = len(data.classes), config.evaluate
    curves = {of: ThresholdCurve(K, options.scored_thresholds(), erosion=options.erosion) for of in links.maps}
    counts: dict[str, np.ndarray] = {}
    images: dict[str, list[ImageCounts]] = defaultdict(list)

    def count(i: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        image_id, truth = data.ids[i], data.mask(i)
        maps = links.maps_of(image_id, truth.shape)
        labels = links.labels_of(image_id, maps)
        return (
            {of: curves[of].count(full.numpy(), classes, truth, name=image_id) for of, (classes, full) in maps.items()},
            {name: confusion(truth, predicted, K) for name, predicted in labels.items()},
        )

    for i, (of_maps, of_labels) in enumerate(of_all_images("evaluate_masks", count, data, ctx)):
        for of, counted in of_maps.items():
            curves[of].include(*counted, half=i % 2)
            images[f"{of}/{data.name}/miou"].append(ImageCounts.of_maps(*counted))
        for name, one in of_labels.items():
            counts[name] = counts.get(name, 0) + one
            images[f"pseudo/{data.name}/{name}"].append(ImageCounts.of_labels(one))

    metrics: dict[str, float] = {}
    chosen = dict.fromkeys(images, (0, 0))
    for of, curve in curves.items():
        told, chosen[f"{of}/{data.name}/miou"] = reported(curve, options, data.name, of)
        metrics |= told
    metrics |= {f"pseudo/{data.name}/{name}": value for name, value in label_map_metrics(counts["miou"]).items()}
    if BEFORE in counts:
        metrics[f"pseudo/{data.name}/{BEFORE}"] = float(scores(counts[BEFORE]).miou)
    write_scores(metrics, scores(counts["miou"]).iou, data, ctx)
    write_image_counts({name: (of_images, chosen[name]) for name, of_images in images.items()}, data, ctx)
    _draw(config, data, links, ctx)
    return {"metrics": metrics}


class _Links:
    """What there is of an image, from its maps to its pseudo mask."""

    def __init__(self, config: Config, cams: Artifact | None, walk: Artifact | None, pseudo_masks: Artifact):
        self.threshold = config.pseudo_masks.threshold
        self._cams = MapFiles(cams) if cams else None
        self._walked = WalkedFiles(walk) if walk else None
        self.masks = label_maps_in(pseudo_masks)
        self.maps = [of for of, artifact in (("cam", cams), ("walk", walk)) if artifact]

    def maps_of(self, image_id: str, size: tuple[int, int]) -> dict[str, tuple[np.ndarray, Tensor]]:
        """Classes and maps (C, H, W), by "cam" and "walk"."""
        found = {}
        if self._cams:
            maps = self._cams[image_id]
            found["cam"] = (maps.classes, maps.full)
        if self._walked:
            found["walk"] = self._walked.full(image_id, size, CPU)
        return found

    def labels_of(self, image_id: str, maps: dict[str, tuple[np.ndarray, Tensor]]) -> dict[str, np.ndarray]:
        """The pseudo mask (H, W), and by `maps_of` the image what it was before the CRF, by the names of the scores."""
        found = {"miou": self.masks[image_id]}
        if "walk" in maps:
            classes, full = maps["walk"]
            index = np.array([0, *classes], dtype=np.uint8)
            found[BEFORE] = index[hard_labels(full, self.threshold).numpy()]
        return found


def _draw(config: Config, data: Packed, links: _Links, ctx: Context) -> None:
    """Per image and class: the map, the map after the walk, the pseudo mask, the truth."""
    headings = {"cam": "Map", "walk": "Random walk"}
    folder = ctx.out / "pictures"
    folder.mkdir()
    for i in range(min(config.evaluate.pictures, len(data))):
        image, image_id = data.pixels(i), data.ids[i]
        maps = links.maps_of(image_id, image.shape[:2])
        labels = [draw.Labels("Pseudo mask", links.masks[image_id]), draw.Labels("Ground Truth", data.mask(i))]
        lines = [
            draw.Line(
                data.classes[k],
                image,
                [draw.Map(headings[of], full[row].numpy(), links.threshold) for of, (_, full) in maps.items()],
                labels,
            )
            for row, k in enumerate(data.objects(i))
        ]
        nothing = draw.Line("no object", image, [draw.Map(headings[of], None, 0) for of in maps], labels)
        draw.draw(lines or [nothing]).save(folder / f"{image_id}.png")
