"""What chance does to mean IoUs: two sources of it, never added up.

The images that happen to be in the split: a bootstrap over images, with the networks as they are, and each at the
threshold that it is reported at. The seed of a training: Student's t over seeds, with the images as they are. Of two
rows both are paired: the same images, the same seeds.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
AT_ONCE = 4_000_000
"""Images, times resamples, of which the pixels are summed together."""


class Interval(NamedTuple):
    low: float
    high: float

    @property
    def has_zero(self) -> bool:
        return self.low <= 0 <= self.high


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Of the mean of normally distributed values (Student's t); None for fewer than two."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)


def over_images(values: np.ndarray) -> Interval:
    """Percentiles of what the resamples gave."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def mean_iou(pixels: np.ndarray) -> np.ndarray:
    """In percent, from pixels (..., K, 3) of intersection, prediction and truth. A class without pixels counts as 0, as
    in the published evaluation."""
    return _iou(pixels).mean(axis=-1)


def _iou(pixels: np.ndarray) -> np.ndarray:
    hit, predicted, true = np.moveaxis(pixels, -1, 0)
    return 100 * hit / np.maximum(predicted + true - hit, 1)


def resampled(pixels: np.ndarray) -> np.ndarray:
    """The mean IoU (RESAMPLES,) in percent of images drawn with replacement from those of the split: for as many images
    always the same. A class of the split that was not drawn is left out. pixels: those of each image (N, K, 3)."""
    N, K, _ = pixels.shape
    flat, drawn = pixels.reshape(N, -1).astype(float), _drawn(N)
    step = max(1, AT_ONCE // N)
    sums = [drawn[i : i + step].astype(float) @ flat for i in range(0, RESAMPLES, step)]
    drawn_pixels = np.concatenate(sums).reshape(RESAMPLES, K, 3)
    counted = (drawn_pixels[..., 2] > 0) | ~pixels[..., 2].any(axis=0)
    return (_iou(drawn_pixels) * counted).sum(axis=-1) / np.maximum(counted.sum(axis=-1), 1)


@lru_cache(maxsize=2)
def _drawn(N: int) -> np.ndarray:
    """How often each resample has each of N images (RESAMPLES, N)."""
    rng = np.random.default_rng(0)
    return np.stack([np.bincount(rng.integers(N, size=N), minlength=N) for _ in range(RESAMPLES)]).astype(np.uint16)
