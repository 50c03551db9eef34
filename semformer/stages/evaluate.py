"""Stage evaluate: scores of the maps against pixel masks, and pictures in the layout of Figure 4."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from semformer import draw
from semformer.config import Config
from semformer.data.pack import Packed
from semformer.errors import UserError
from semformer.inference import MAP_KINDS, Maps
from semformer.metrics import ThresholdCurve, reported
from semformer.stages.cams import FOREIGN, PICTURES, read_maps
from semformer.stages.context import Context, Progress
from semformer.store import Artifact
from semformer.threads import in_order

CURVE = "threshold_curve.parquet"
CLASS_IOU = "class_iou.parquet"
METRICS = "metrics.json"


def run(config: Config, data: Packed, cams: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `metrics.json`, the threshold curve, the per-class IoU at the reported threshold, and pictures.

    Reads pixel masks. Returns {"metrics": {...}}, see `metrics.reported`; beside these, the mean cosine between the
    maps of an image's classes.
    """
    options = config.evaluate
    curve = ThresholdCurve(len(data.classes), options.scored_thresholds(), erosion=options.erosion)
    started = time.monotonic()

    def count(item: tuple[int, tuple[str, Maps]]) -> tuple[np.ndarray, np.ndarray]:
        i, (image_id, maps) = item
        if image_id != data.ids[i]:
            raise UserError(f"{cams.path} holds maps of {image_id} where split {data.name} has {data.ids[i]}")
        return curve.count(maps.full.numpy(), maps.classes, data.mask(i), name=image_id)

    n_cores = torch.get_num_threads()
    with ThreadPoolExecutor(n_cores) as cores:
        counted = in_order(cores, count, enumerate(read_maps(cams)), ahead=2 * n_cores)
        for done, counts in enumerate(counted, start=1):
            curve.include(*counts)
            ctx.progress(Progress.of_images("evaluate", done, len(data), started))

    scores, (metrics, chosen) = curve.scores(), reported(curve, options, data.name)
    metrics |= {f"cam/{data.name}/cosine_{kind}": value for kind, value in cams.info["cosine"].items()}
    (ctx.out / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
    curve_table = {"threshold": curve.thresholds, "miou": scores.miou, "fp": scores.fp, "fn": scores.fn}
    pq.write_table(pa.table(curve_table), ctx.out / CURVE)
    pq.write_table(pa.table({"class": data.classes, "iou": scores.iou[chosen]}), ctx.out / CLASS_IOU)
    _draw(config, data, cams, float(curve.thresholds[chosen]), ctx)
    return {"metrics": metrics}


def _draw(config: Config, data: Packed, cams: Artifact, threshold: float, ctx: Context) -> None:
    tensors = load_file(cams.file(PICTURES))
    folder = ctx.out / "pictures"
    folder.mkdir()
    for i in range(min(config.evaluate.pictures, len(data))):
        kinds = [kind for kind in (*MAP_KINDS, FOREIGN) if f"{i}/{kind}" in tensors]
        maps: dict[str, np.ndarray] = {kind: tensors[f"{i}/{kind}"].float().numpy() for kind in kinds}
        picture = draw.figure4(
            data.pixels(i), maps, data.objects(i), data.classes, truth=data.mask(i), threshold=threshold
        )
        picture.save(folder / f"{data.ids[i]}.png")
