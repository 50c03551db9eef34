"""Activation maps of an image from a trained segmentation network (Eq. 5, 6, sections 3.3.1 and 3.3.3).

Legend: B images, C present object classes of an image, K classes (0 is background), D class dimension, N patches,
H W pixels, h w patch grid, P patch side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from semformer.config import CamsConfig, Config, FinalMap
from semformer.data.transforms import to_tensor
from semformer.losses import similarity
from semformer.models.segmentor import Segmentor
from semformer.precision import autocast

STRIDE = 4
FULL_MULTIPLE = 16
"""Full-size maps are interpolated to multiples of this, then cropped to the image (published code)."""

MAP_KINDS: tuple[FinalMap, ...] = get_args(FinalMap)


@dataclass(frozen=True)
class Maps:
    """Maps of one image in 0..1, un-thresholded. strided: (C, ceil(H/4), ceil(W/4)), full: (C, H, W)."""

    classes: np.ndarray
    strided: Tensor
    full: Tensor


@torch.inference_mode()
def multi_scale_maps(
    model: Segmentor,
    image: Image.Image,
    classes: Sequence[int] | np.ndarray,
    options: CamsConfig,
    *,
    precision: str = "float32",
) -> Maps:
    """Maps of the present object `classes` (1..K-1), summed over scales and flips, each divided by its maximum.

    Every scaled size is rounded up to a multiple of the patch size.
    """
    classes = np.asarray(classes, dtype=np.int64)
    P = model.backbone.patch_size
    device = model.patch_head.weight.device
    W, H = image.size
    strided = torch.zeros(len(classes), math.ceil(H / STRIDE), math.ceil(W / STRIDE), device=device)
    full = torch.zeros(len(classes), _round_up(H, FULL_MULTIPLE), _round_up(W, FULL_MULTIPLE), device=device)
    if not len(classes):
        return Maps(classes, strided, full[:, :H, :W])
    for scale in options.scales:
        size = (_round_up(W * scale, P), _round_up(H * scale, P))
        view = image.resize(size, Image.Resampling.BICUBIC)
        views = [view, ImageOps.mirror(view)] if options.flip else [view]
        batch = torch.stack([to_tensor(view) for view in views]).to(device)
        with autocast(device, precision):
            maps = final_map(model, batch, options.final_map, options.last_blocks)[:, classes]
        if options.flip:
            maps[1] = maps[1].flip(-1)
        for total in (strided, full):
            total += F.interpolate(maps, total.shape[-2:], mode="bilinear", align_corners=False).sum(dim=0)
    return Maps(classes, _divide_by_maximum(strided), _divide_by_maximum(full[:, :H, :W]))


@torch.inference_mode()
def present_classes(model: Segmentor, S: Tensor, image: Image.Image, config: Config) -> np.ndarray:
    """Object classes (1..K-1, ascending) whose class token is more like its semantic than not; S: (K, D)."""
    side = (config.segmentor.image_size,) * 2
    batch = to_tensor(image.resize(side, Image.Resampling.BICUBIC))[None].to(S.device)
    with autocast(S.device, config.precision):
        _, E, _ = model(batch)
    return 1 + np.flatnonzero((similarity(E.float(), S)[0, 1:] > 0.5).cpu().numpy())


def final_map(model: Segmentor, images: Tensor, kind: FinalMap, last_blocks: int) -> Tensor:
    """Final activation map of section 3.3.3: images (B, 3, H, W) -> (B, K, h, w).

    "activation" is ReLU(logits), "attention" is A' of Eq. 6, "both" their product.
    """
    logits, _, attention = model(images, last_blocks=0 if kind == "activation" else last_blocks)
    activation = logits.float().relu()
    if kind == "activation":
        return activation
    relative = class_relative_attention([A.float() for A in attention]).view_as(activation)
    return relative if kind == "attention" else activation * relative


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _divide_by_maximum(maps: Tensor, eps: float = 1e-5) -> Tensor:
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + eps)


def class_relative_attention(attention: list[Tensor], *, eps: float = 1e-5) -> Tensor:
    """A' of Eq. 6: A^l (B, K, N) of the last U blocks -> (B, K, N), summed over blocks, min-max over patches."""
    total = torch.stack(attention).sum(dim=0)
    low, high = total.amin(dim=-1, keepdim=True), total.amax(dim=-1, keepdim=True)
    return (total - low) / (high - low + eps)
