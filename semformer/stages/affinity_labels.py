"""Stage affinity_labels: what AffinityNet learns from, by the maps at two thresholds and the CRF."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semformer.config import AffinityLabelsConfig, Config, CrfConfig
from semformer.crf import DenseCrf
from semformer.data.label_maps import LabelMaps
from semformer.data.pack import Packed
from semformer.data.voc import IGNORE
from semformer.errors import UserError
from semformer.inference import Maps
from semformer.stages.cams import MapFiles
from semformer.stages.context import Context, Progress
from semformer.stages.shards import make_label_maps
from semformer.store import Artifact


def run(config: Config, data: Packed, cams: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes zips of label maps. Returns the shares of their pixels that are objects, background and ignored.

    Raises UserError where no pixel of the split is a confident object, or none confident background.
    """
    options, maps = config.affinity_labels, MapFiles(cams)

    def make(i: int) -> dict[str, np.ndarray]:
        return {data.ids[i]: confident(maps[data.ids[i]], data.pixels(i), options, ctx.device)}

    shares = _shares(make_label_maps("affinity_labels", data, ctx, make))
    told = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in shares.items())
    both = f"{options.foreground_threshold} and {options.background_threshold}"
    for kind in ("object", "background"):
        if not shares[kind]:
            raise UserError(
                f"affinity_labels: with the thresholds {both}, no pixel is confident {kind} ({told}): "
                f"{'lower foreground_threshold' if kind == 'object' else 'raise background_threshold'}"
            )
    note = told if shares["ignored"] else f"{told}: the thresholds {both} leave nothing out"
    ctx.progress(Progress("affinity_labels", len(data), len(data), note=note))
    return {"images": len(data), "shares": shares}


def confident(maps: Maps, image: np.ndarray, options: AffinityLabelsConfig, device: torch.device) -> np.ndarray:
    """Label map (H, W) uint8 of an image (H, W, 3) uint8, with 255 where the two thresholds leave open what it is."""
    refine = refiner(image, maps.classes, options.crf, device)
    full = maps.full.to(device)
    foreground, background = (
        refine(hard_labels(full, threshold))
        for threshold in (options.foreground_threshold, options.background_threshold)
    )
    return np.where((foreground == 0) & (background != 0), np.uint8(IGNORE), foreground)


def hard_labels(maps: Tensor, threshold: float) -> Tensor:
    """(C, H, W) -> (H, W): 1 + the index of the highest map, or 0 where none is above the threshold."""
    return torch.cat([maps.new_full((1, *maps.shape[1:]), threshold), maps]).argmax(dim=0)


def refiner(
    image: np.ndarray, classes: np.ndarray, options: CrfConfig, device: torch.device
) -> Callable[[Tensor], np.ndarray]:
    """Takes `hard_labels` of these C classes through the CRF of an image (H, W, 3) uint8, if there is one: (H, W)
    uint8, class indices."""
    index = np.array([0, *classes], dtype=np.uint8)
    if not (options.iterations and len(classes)):
        return lambda labels: index[labels.cpu().numpy()]
    field = DenseCrf(torch.from_numpy(image).to(device).permute(2, 0, 1), options)
    return lambda labels: index[field.refine_labels(labels, len(index)).cpu().numpy()]


def _shares(label_maps: LabelMaps) -> dict[str, float]:
    counts = np.zeros(256, dtype=np.int64)
    for image_id in label_maps:
        counts += np.bincount(label_maps[image_id].ravel(), minlength=256)
    kinds = {"object": counts[1:IGNORE].sum(), "background": counts[0], "ignored": counts[IGNORE]}
    return {kind: float(count / counts.sum()) for kind, count in kinds.items()}
