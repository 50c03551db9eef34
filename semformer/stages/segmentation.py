"""Stage segmentation: label maps of a split by the trained DeepLab, at one scale and several, without and with the CRF.

Legend: K classes (0 is background), H W pixels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semformer.config import Config, SegmentationConfig
from semformer.crf import DenseCrf
from semformer.data.pack import Packed
from semformer.data.pixels import as_batch, normalized, resize, scaled
from semformer.models.deeplab import DeepLab
from semformer.precision import autocast
from semformer.stages import deeplab as deeplab_stage
from semformer.stages.context import Context
from semformer.stages.shards import make_label_maps
from semformer.store import Artifact

SINGLE, MULTI = "single", "multi"
CRF = "_crf"
"""How label maps are named: "single", "multi", "single_crf", "multi_crf", before "/" and the image's id."""


def run(config: Config, data: Packed, deeplab: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes zips of PNGs. Returns the number of images, and the kinds of label maps there are."""
    options, model = config.segmentation, deeplab_stage.load(config.deeplab, deeplab, device=ctx.device)

    def make(i: int) -> dict[str, np.ndarray]:
        found = segment(model, data.pixels(i), options, config.precision)
        return {f"{kind}/{data.ids[i]}": labels for kind, labels in found.items()}

    make_label_maps("segmentation", data, ctx, make)
    return {"images": len(data), "kinds": kinds(options)}


def kinds(options: SegmentationConfig) -> list[str]:
    """Of label maps, as `segment` makes them; the last has all that the config gives it: scales, and the CRF."""
    endings = ("", CRF) if options.crf.iterations else ("",)
    return [kind + ending for kind in (SINGLE, MULTI) for ending in endings]


def segment(model: DeepLab, image: np.ndarray, options: SegmentationConfig, precision: str) -> dict[str, np.ndarray]:
    """Label maps (H, W) uint8 of an image (H, W, 3) uint8, by kind."""
    device = model.fc8_seg_conv2.weight.device
    pixels = torch.from_numpy(image).to(device)
    single = options.model_copy(update={"scales": (1.0,)})
    field = DenseCrf(pixels.permute(2, 0, 1), options.crf) if options.crf.iterations else None
    found = {}
    for kind, views in ((SINGLE, single), (MULTI, options)):
        likely = probabilities(model, pixels, views, precision)
        found[kind] = likely.argmax(dim=0)
        if field:
            found[kind + CRF] = field.refine(likely).argmax(dim=0)
    return {kind: labels.to(torch.uint8).cpu().numpy() for kind, labels in found.items()}


@torch.inference_mode()
def probabilities(model: DeepLab, pixels: Tensor, options: SegmentationConfig, precision: str) -> Tensor:
    """The highest softmax over the views of an image (H, W, 3) uint8: (K, H, W). They need not add up to 1."""
    size, multiple = pixels.shape[:2], model.features.multiple
    highest: Tensor | None = None
    for scale in options.scales:
        view = normalized(resize(as_batch(pixels), scaled(size, scale, multiple), "bilinear"))
        for mirrored in (False, True)[: 1 + options.flip]:
            with autocast(view.device, precision):
                logits = model(view.flip(-1) if mirrored else view).float()
            logits = F.interpolate(logits.flip(-1) if mirrored else logits, size, mode="bilinear", align_corners=False)
            likely = logits[0].softmax(dim=0)
            highest = likely if highest is None else torch.maximum(highest, likely)
    assert highest is not None  # `scales` has at least one
    return highest
