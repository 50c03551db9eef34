"""What the networks are given of an image: resized, and ImageNet-normalised, on the device that the image is on.

`resize` is quick, for crops; `resize_exactly` has the digits of the published maps, for the views of inference.

Legend: B images, C channels, H W pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
Resample = Literal["bilinear", "bicubic"]
PRECISION = 2**22
"""Pillow's weights are whole multiples of 1 / PRECISION."""


def scaled(size: Sequence[int], scale: float, multiple: int) -> list[int]:
    """A size (height, width) at a scale, rounded to whole pixels, then up to a multiple."""
    return [math.ceil(max(1, round(side * scale)) / multiple) * multiple for side in size]


def as_batch(image: Tensor) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W), a view of it."""
    return image.permute(2, 0, 1)[None]


def normalized(images: Tensor) -> Tensor:
    """RGB (B, 3, H, W) in 0..255 -> ImageNet-normalised float32."""
    mean, std = (255 * torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images.float() - mean) / std


def resize(images: Tensor, size: Sequence[int], resample: Resample) -> Tensor:
    """(B, C, H, W) in 0..255, bytes or floats, to a size (height, width): at most 2 from what Pillow makes of it.

    As there, along the rows, then along the columns, antialiased, and rounded to whole values after each.
    """
    return resize_axis(resize_axis(images, 3, size[1], resample), 2, size[0], resample)


def resize_axis(images: Tensor, axis: Literal[2, 3], length: int, resample: Resample) -> Tensor:
    """The same along the columns (axis 2) or the rows (3) alone."""
    if images.shape[axis] == length:
        return images
    size = (int(length), images.shape[3]) if axis == 2 else (images.shape[2], int(length))
    if images.is_cuda:  # which can resize no bytes
        images = images.float()
    resized = F.interpolate(images, size, mode=resample, antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255) if resized.is_floating_point() else resized


def resize_exactly(images: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) of whole values in 0..255 to a size (height, width), to the digit as Pillow's bicubic resize.

    Along the rows first; Pillow 13 begins with the columns of some tall images.
    """
    height, width = (_weights(*lengths).to(images.device) for lengths in zip(images.shape[2:], size, strict=True))
    images = _rounded(images.double() @ width.T)
    return _rounded(height @ images).float()


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + PRECISION // 2) / PRECISION).floor_().clamp_(0, 255)


@lru_cache(maxsize=256)
def _weights(length: int, out: int) -> Tensor:
    """(out, length) float64: how much of each pixel is in each new one, in whole multiples of 1 / PRECISION."""
    if length == out:
        return PRECISION * torch.eye(out, dtype=torch.float64)
    scale = length / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)[:, None]
    last = np.minimum((centre + 2 * stretch + 0.5).astype(int), length)[:, None]
    pixel = np.arange(length)
    weights = _cubic((pixel - centre[:, None] + 0.5) / stretch) * ((pixel >= first) & (pixel < last))
    weights = PRECISION * weights / weights.sum(axis=1, keepdims=True)
    return torch.from_numpy(np.trunc(weights + np.copysign(0.5, weights)))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel, with Pillow's parameter."""
    x, a = np.abs(x), -0.5
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
