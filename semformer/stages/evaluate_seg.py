"""Stage evaluate_seg: scores of the segmentation against pixel masks, and pictures in the layout of Figure 5."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from semformer import draw
from semformer.config import Config
from semformer.data.pack import Packed
from semformer.metrics import confusion, label_map_metrics, scores
from semformer.stages.context import Context, Progress
from semformer.stages.evaluate import CLASS_IOU, METRICS
from semformer.stages.shards import label_maps_in
from semformer.store import Artifact
from semformer.threads import in_order


def run(config: Config, data: Packed, segmentation: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `metrics.json`, the IoU of each class, and pictures. Reads pixel masks. Returns {"metrics": {...}}.

    "seg/<split>/miou", "precision" and "recall" of label maps from several scales, "miou_single" from one; with the
    CRF these are "miou_crf" and so on.
    """
    label_maps = label_maps_in(segmentation)
    K, started, kinds = len(data.classes), time.monotonic(), list(segmentation.info["kinds"])

    def count(i: int) -> np.ndarray:
        return np.stack([confusion(data.mask(i), label_maps[f"{kind}/{data.ids[i]}"], K) for kind in kinds])

    counts = np.zeros((len(kinds), K, K), dtype=np.int64)
    n_cores = torch.get_num_threads()
    with ThreadPoolExecutor(n_cores) as cores:
        for done, one in enumerate(in_order(cores, count, range(len(data)), ahead=2 * n_cores), start=1):
            counts += one
            ctx.progress(Progress.of_images("evaluate_seg", done, len(data), started))

    metrics = {}
    for kind, of_kind in zip(kinds, counts, strict=True):
        ending = kind.removeprefix("multi").replace("single", "_single")
        for name, value in label_map_metrics(of_kind).items():
            metrics[f"seg/{data.name}/{name}{ending}"] = value
    (ctx.out / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
    pq.write_table(pa.table({"class": data.classes, "iou": scores(counts[-1]).iou}), ctx.out / CLASS_IOU)
    folder = ctx.out / "pictures"
    folder.mkdir()
    for i in range(min(config.evaluate.pictures, len(data))):
        found = draw.Labels("Segmentation", label_maps[f"{kinds[-1]}/{data.ids[i]}"])
        line = draw.Line("", data.pixels(i), [], [found, draw.Labels("Ground Truth", data.mask(i))])
        draw.draw([line]).save(folder / f"{data.ids[i]}.png")
    return {"metrics": metrics}
