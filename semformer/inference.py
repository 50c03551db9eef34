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
from torch import Tensor

from semformer.config import CamsConfig, Config, FinalMap
from semformer.data.pixels import as_batch, normalized, resize_exactly, scaled
from semformer.losses import similarity
from semformer.models.segmentor import Segmentor
from semformer.precision import autocast

STRIDE = 4
EPS = 1e-5
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
    images: Sequence[np.ndarray],
    classes: Sequence[Sequence[int] | np.ndarray],
    options: CamsConfig,
    *,
    precision: str = "float32",
) -> list[Maps]:
    """Maps of the present object `classes` (1..K-1) of each image, summed over scales and flips, each divided by its
    maximum.

    images: (H, W, 3) uint8, RGB, all of one size. Every scaled size is rounded to whole pixels, then up to a multiple
    of the patch size.
    """
    B, (H, W), device = len(images), images[0].shape[:2], model.patch_head.weight.device
    present = [np.asarray(one, dtype=np.int64) for one in classes]
    counts = [len(one) for one in present]
    strided = torch.zeros(sum(counts), 1, math.ceil(H / STRIDE), math.ceil(W / STRIDE), device=device)
    full = torch.zeros(sum(counts), 1, *scaled((H, W), 1, FULL_MULTIPLE), device=device)
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    of_image = torch.arange(B).repeat_interleave(torch.tensor(counts)).to(device)
    of_class = torch.from_numpy(np.concatenate(present)).to(device)
    for scale in options.scales if sum(counts) else ():
        views = normalized(resize_exactly(pixels, scaled((H, W), scale, model.backbone.patch_size)))
        if options.flip:
            views = torch.cat([views, views.flip(-1)])
        with autocast(device, precision):
            maps = final_map(model, views, options.final_map, options.last_blocks)
        seen = [maps[of_image, of_class]]
        if options.flip:
            seen.append(maps[B + of_image, of_class].flip(-1))
        for total in (strided, full):
            for one in seen:
                total += F.interpolate(one[:, None], total.shape[-2:], mode="bilinear", align_corners=False)
    parts = [_divide_by_maximum(total[:, 0]).split(counts) for total in (strided, full[..., :H, :W])]
    return [Maps(*of_one) for of_one in zip(present, *parts, strict=True)]


def maps_of_every_kind(
    model: Segmentor, image: np.ndarray, classes: Sequence[int] | np.ndarray, options: CamsConfig, *, precision: str
) -> dict[str, Tensor]:
    """Full-size maps (C, H, W) of an image by each of `MAP_KINDS`, as `draw.figure4` shows them."""
    found: dict[str, Tensor] = {}
    for kind in MAP_KINDS:
        view = options.model_copy(update={"final_map": kind})
        (maps,) = multi_scale_maps(model, [image], [classes], view, precision=precision)
        found[kind] = maps.full.cpu()
    return found


@torch.inference_mode()
def class_cosines(
    model: Segmentor, image: np.ndarray, classes: Sequence[int] | np.ndarray, options: CamsConfig, *, precision: str
) -> dict[str, float]:
    """How alike the maps of an image's `classes` are: the mean cosine over their pairs, by kind, at the image's scale.

    "activation" is of ReLU(logits), "attention" of A' of Eq. 6. Near 1, a map tells that something is there, not what.
    A map that is zero everywhere is like none.
    image: (H, W, 3) uint8; two classes or more.
    """
    size = scaled(image.shape[:2], 1, model.backbone.patch_size)
    view = normalized(resize_exactly(as_batch(torch.from_numpy(image).to(model.patch_head.weight.device)), size))
    with autocast(view.device, precision):
        logits, _, attention = model(view, last_blocks=options.last_blocks)
    maps = {
        "activation": logits.float().relu(),
        "attention": class_relative_attention([A.float() for A in attention]),
    }
    of_pairs = torch.triu_indices(len(classes), len(classes), offset=1)
    found = {}
    for kind, of_all in maps.items():
        unit = F.normalize(of_all[0, torch.as_tensor(classes)].flatten(1), dim=1)
        found[kind] = float((unit @ unit.T)[*of_pairs].mean())
    return found


@torch.inference_mode()
def present_classes(model: Segmentor, S: Tensor, image: np.ndarray, config: Config) -> np.ndarray:
    """Object classes (1..K-1, ascending) whose class token is more like its semantic than not.

    image: (H, W, 3) uint8; S: (K, D).
    """
    batch = as_batch(torch.from_numpy(image).to(S.device))
    view = normalized(resize_exactly(batch, (config.segmentor.image_size,) * 2))
    with autocast(S.device, config.precision):
        _, E, _ = model(view)
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


def _divide_by_maximum(maps: Tensor) -> Tensor:
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + EPS)


def class_relative_attention(attention: list[Tensor]) -> Tensor:
    """A' of Eq. 6: A^l (B, K, N) of the last U blocks -> (B, K, N), summed over blocks, min-max over patches."""
    total = torch.stack(attention).sum(dim=0)
    low, high = total.amin(dim=-1, keepdim=True), total.amax(dim=-1, keepdim=True)
    return (total - low) / (high - low + EPS)
