"""Training crops of both stages, and the conversion of images to network inputs.

Every random choice comes from the generator that is passed in, so that a sample depends on (seed, epoch, index) alone.
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tvf

from semformer.config import CaaeConfig, SegmentorConfig

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_SCALE = 1 / (255 * np.array(STD, dtype=np.float32))
_OFFSET = np.array(MEAN, dtype=np.float32) / np.array(STD, dtype=np.float32)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> ImageNet-normalised (3, H, W) float32."""
    pixels = np.asarray(image, dtype=np.float32) * _SCALE - _OFFSET
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def caae_crop(image: Image.Image, config: CaaeConfig, rng: np.random.Generator) -> Tensor:
    """Colour jitter, random enlargement, random resized crop, flip -> (3, S, S), S = `image_size`."""
    image = _color_jitter(image, config.color_jitter, rng)
    factor = rng.uniform(*config.enlarge)
    if factor != 1:
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    box = _random_box(image.size, config.crop_area, rng)
    image = image.resize((config.image_size,) * 2, Image.Resampling.BICUBIC, box=box)
    return to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)


def segmentor_crop(
    image: Image.Image, config: SegmentorConfig, rng: np.random.Generator
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Random resize of the long side, flip, random crop or zero padding -> (3, S, S) and the valid region.

    The region is (xmin, ymin, xmax, ymax) in pixels, max excluded: where the crop shows image, not padding. Padding is
    zero in normalised space.
    """
    S = config.image_size
    scale = rng.integers(*config.long_side, endpoint=True) / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    x, y = (int(rng.integers(0, abs(side - S), endpoint=True)) for side in image.size)
    left, source_x = (x, 0) if image.width < S else (0, x)
    top, source_y = (y, 0) if image.height < S else (0, y)
    part = image.crop((source_x, source_y, source_x + min(S, image.width), source_y + min(S, image.height)))
    canvas = torch.zeros(3, S, S)
    region = (left, top, left + part.width, top + part.height)
    canvas[:, top : region[3], left : region[2]] = to_tensor(part)
    return canvas, region


def valid_mask(regions: Tensor, size: int, out_size: int) -> Tensor:
    """Regions (B, 4) in crops of side `size` -> (B, 1, out_size, out_size), 1 inside, for maps of another size.

    A region's edges are scaled and rounded down.
    """
    edges = (regions * out_size) // size
    steps = torch.arange(out_size, device=regions.device)
    inside_x = (steps >= edges[:, 0, None]) & (steps < edges[:, 2, None])
    inside_y = (steps >= edges[:, 1, None]) & (steps < edges[:, 3, None])
    return (inside_y[:, None, :, None] & inside_x[:, None, None, :]).float()


def _color_jitter(
    image: Image.Image, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation by factors in 1 -+ strength, hue by a shift of -+ strength, in random order."""
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for kind in rng.permutation(4):
        strength = strengths[kind]
        if strength:
            amount = rng.uniform(-strength, strength)
            image = adjust[kind](image, amount if kind == 3 else 1 + amount)
    return image


def _random_box(
    size: tuple[int, int], area: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box of a random share of the image's area and an aspect ratio in 3/4 .. 4/3; the centre square if none fits."""
    width, height = size
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(pixels * ratio), np.sqrt(pixels / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
