"""Stage evaluate: scores of the maps against pixel masks, and pictures in the layout of Figure 4."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from semformer import draw
from semformer.config import Config
from semformer.data.pack import Packed
from semformer.inference import MAP_KINDS
from semformer.metrics import ImageCounts, ThresholdCurve, reported, scores
from semformer.stages.cams import FOREIGN, PICTURES, MapFiles
from semformer.stages.context import Context, Progress
from semformer.store import Artifact
from semformer.threads import in_order

CURVE = "threshold_curve.parquet"
CLASS_IOU = "class_iou.parquet"
IMAGE_COUNTS = "image_counts.parquet"
COUNTED = pa.schema(
    [(name, pa.string()) for name in ("score", "image", "class")]
    + [(name, pa.int32()) for name in ("intersection", "predicted", "true")]
)
METRICS = "metrics.json"
T = TypeVar("T")


def run(config: Config, data: Packed, cams: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `metrics.json`, the threshold curve, per class the IoU at the reported threshold, per image and class the
    pixels there, and pictures.

    Reads pixel masks. Returns {"metrics": {...}}, see `metrics.reported`; beside these, the mean cosine between the
    maps of an image's classes.
    """
    options, maps = config.evaluate, MapFiles(cams)
    curve = ThresholdCurve(len(data.classes), options.scored_thresholds(), erosion=options.erosion)

    def count(i: int) -> tuple[np.ndarray, np.ndarray]:
        of_image = maps[data.ids[i]]
        return curve.count(of_image.full.numpy(), of_image.classes, data.mask(i), name=data.ids[i])

    images = []
    for i, counts in enumerate(of_all_images("evaluate", count, data, ctx)):
        curve.include(*counts, half=i % 2)
        images.append(ImageCounts.of_maps(*counts))
    of_all, (metrics, chosen) = curve.scores(), reported(curve, options, data.name)
    metrics |= {f"cam/{data.name}/cosine_{kind}": value for kind, value in cams.info["cosine"].items()}
    curve_table = {"threshold": curve.thresholds, "miou": of_all.miou, "fp": of_all.fp, "fn": of_all.fn}
    pq.write_table(pa.table(curve_table), ctx.out / CURVE)
    write_scores(metrics, scores(curve.confusion_at(chosen)).iou, data, ctx)
    write_image_counts({f"cam/{data.name}/miou": (images, chosen)}, data, ctx)
    _draw(config, data, cams, [float(curve.thresholds[index]) for index in chosen], ctx)
    return {"metrics": metrics}


def of_all_images(stage: str, count: Callable[[int], T], data: Packed, ctx: Context) -> Iterator[T]:
    """count(i) of each image, in order, by all threads of torch."""
    started, n_threads = time.monotonic(), torch.get_num_threads()
    with ThreadPoolExecutor(n_threads) as threads:
        counted = in_order(threads, count, range(len(data)), ahead=2 * n_threads)
        for done, counts in enumerate(counted, start=1):
            yield counts
            ctx.progress(Progress.of_images(stage, done, len(data), started))


def write_scores(metrics: Mapping[str, float], class_iou: np.ndarray, data: Packed, ctx: Context) -> None:
    """Makes `metrics.json`, and the table of the IoU (K,) of each class."""
    (ctx.out / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
    pq.write_table(pa.table({"class": data.classes, "iou": class_iou}), ctx.out / CLASS_IOU)


def write_image_counts(
    counted: Mapping[str, tuple[Sequence[ImageCounts], tuple[int, int]]], data: Packed, ctx: Context
) -> None:
    """Makes the table of what each score was counted from: of each image and class, at the threshold of the image's
    half, the pixels of intersection, prediction and truth. Counts of all images, by the score's name."""
    rows = [
        (score, data.ids[i], data.classes[k], hit, predicted, true)
        for score, (images, chosen) in counted.items()
        for i, image in enumerate(images)
        for k, hit, predicted, true in zip(
            image.classes, image.hit[:, chosen[i % 2]], image.predicted[:, chosen[i % 2]], image.true, strict=True
        )
    ]
    columns = (pa.array(values, kind.type) for kind, values in zip(COUNTED, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table([*columns], COUNTED), ctx.out / IMAGE_COUNTS)


def _draw(config: Config, data: Packed, cams: Artifact, thresholds: Sequence[float], ctx: Context) -> None:
    """thresholds: of each half of the images."""
    tensors = load_file(cams.file(PICTURES))
    folder = ctx.out / "pictures"
    folder.mkdir()
    for i in range(min(config.evaluate.pictures, len(data))):
        kinds = [kind for kind in (*MAP_KINDS, FOREIGN) if f"{i}/{kind}" in tensors]
        maps: dict[str, np.ndarray] = {kind: tensors[f"{i}/{kind}"].float().numpy() for kind in kinds}
        picture = draw.figure4(
            data.pixels(i), maps, data.objects(i), data.classes, truth=data.mask(i), threshold=thresholds[i % 2]
        )
        picture.save(folder / f"{data.ids[i]}.png")
