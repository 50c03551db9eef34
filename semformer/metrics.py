"""Confusion matrices, mIoU, FP and FN of activation maps, at all thresholds in one pass.

At threshold t a pixel takes the class of its highest map value v if v > t, and is background otherwise.
That is the arg-max over [constant t, maps]: a tie with t goes to background, a tie between channels to the
first of them. Only the comparison with t changes between thresholds, so one histogram of v by
(true class, arg-max class) holds the confusion matrix of each.

Legend: K classes (background is 0), C object channels of one image, T thresholds, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semformer.config import EvaluateConfig
from semformer.data.voc import IGNORE
from semformer.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Scores in percent; the leading axes are those of the confusion matrices they come from.

    With P the predicted, T the true and U = P | T the pixels of a class, over the whole data set (Tables 12,
    13): iou (..., K) is |P & T| / |U|; miou, fp and fn (...) are the means over all K classes, background
    included, of iou, (|P| - |P & T|) / |U| and (|T| - |P & T|) / |U|. As in the published evaluation, a class
    that is neither predicted nor present stays in the means with 0 for each of the three.
    """

    iou: np.ndarray
    miou: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


def scores(confusion: np.ndarray) -> Scores:
    """Scores of confusion matrices (..., K, K), indexed [true, predicted].

    Raises UserError where a matrix counts no pixel.
    """
    if not confusion.sum(axis=(-2, -1)).all():
        raise UserError("nothing to score: no image was added, or every pixel of the masks is ignored (255)")
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted, true = confusion.sum(axis=-2), confusion.sum(axis=-1)
    union = np.maximum(predicted + true - hit, 1)
    iou = 100 * hit / union
    return Scores(
        iou=iou,
        miou=iou.mean(axis=-1),
        fp=(100 * (predicted - hit) / union).mean(axis=-1),
        fn=(100 * (true - hit) / union).mean(axis=-1),
    )


def confusion(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Pixel counts (K, K) int64, indexed [true, predicted], of label maps (H, W) uint8.

    Ignored pixels of the truth do not count; a prediction of 255 is one of background.
    """
    known = truth != IGNORE
    predicted = np.where(predicted == IGNORE, 0, predicted)
    cell = truth[known].astype(np.int64) * n_classes + predicted[known]
    return np.bincount(cell, minlength=n_classes**2).reshape(n_classes, n_classes)


def label_map_metrics(counts: np.ndarray) -> dict[str, float]:
    """miou, precision and recall of a confusion matrix (K, K), in percent: means over all K classes."""
    hit, predicted, true = np.diagonal(counts), counts.sum(axis=0), counts.sum(axis=1)
    return {
        "miou": float(scores(counts).miou),
        "precision": float((100 * hit / np.maximum(predicted, 1)).mean()),
        "recall": float((100 * hit / np.maximum(true, 1)).mean()),
    }


class ThresholdCurve:
    """Confusion matrices of activation maps at every background threshold, accumulated image by image.

    n_classes: K, background included, at most 255. thresholds: (T,) finite and increasing.
    erosion: 0, or the odd side in pixels of the square by which each predicted region is eroded at each
    threshold; pixels left without a region become background, and the image border does not erode. The
    published evaluation of maps without CRF erodes by 7. The config and the devkit take no other values.

    Thresholds are rounded to the maps' dtype before they are compared, as in an arg-max over [t, maps] of one
    dtype. So a float32 value of 0.3 ties with threshold 0.3, although the two differ as reals, and to float32
    maps it is all one whether 0.11 was written so or computed as 0.10 + 0.01.
    """

    def __init__(self, n_classes: int, thresholds: Sequence[float], *, erosion: int = 0):
        self.thresholds = np.array(thresholds, dtype=np.float64)
        self.n_classes, self.erosion = n_classes, erosion
        # counts[half, true, predicted, level]: level = how many thresholds lie below the pixel's value
        self._counts = np.zeros((2, n_classes, n_classes, self.thresholds.size + 1), dtype=np.int64)
        self._row_of_label = np.full(256, n_classes + 1)
        self._row_of_label[:n_classes] = np.arange(n_classes)
        self._row_of_label[IGNORE] = n_classes

    def add(
        self,
        maps: np.ndarray,
        classes: Sequence[int] | np.ndarray,
        truth: np.ndarray,
        *,
        name: str = "image",
        half: int = 0,
    ) -> None:
        """Counts the pixels of one image, which belongs to a half (0, 1) of the images.

        maps: (C, H, W) floats, one channel per object class in `classes`: (C,) distinct, 1..K-1.
        With C = 0 the whole image is predicted as background. truth: (H, W) uint8, 255 = ignored.
        Raises UserError, with `name`, for shapes that do not fit, NaN, and classes or labels out of range;
        the counts are then as before.
        """
        self.include(*self.count(maps, classes, truth, name=name), half=half)

    def include(self, channels: np.ndarray, counts: np.ndarray, *, half: int = 0) -> None:
        """Adds what `count` has counted."""
        self._counts[half][:, channels] += counts

    def count(
        self, maps: np.ndarray, classes: Sequence[int] | np.ndarray, truth: np.ndarray, *, name: str = "image"
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `add`, but adds nothing: threads may count images at once.

        Returns the classes (C,) and counts (K, C, T + 1) of pixels by true class, arg-max class and level.
        """
        maps, channels = np.asarray(maps), np.asarray(classes, dtype=np.intp)
        self._check(maps, channels, truth, name)
        if not channels.size:
            maps, channels = np.full((1, *truth.shape), -np.inf), np.array([0])
        value, channel = _dominant(maps)
        if np.isnan(value).any():
            raise UserError(f"{name}: the activation maps contain NaN")
        if self.erosion:
            value = _eroded(value, channel, self.erosion)

        n_labels, n_channels, n_levels = self.n_classes + 2, channels.size, self.thresholds.size + 1
        cell = np.searchsorted(self.thresholds.astype(value.dtype), value)
        cell += np.multiply(channel, n_levels, dtype=np.int32)
        cell += (self._row_of_label * (n_channels * n_levels)).take(truth)
        counts = np.bincount(cell.ravel(), minlength=n_labels * n_channels * n_levels)
        counts = counts.reshape(n_labels, n_channels, n_levels)
        if counts[-1].any():
            raise UserError(
                f"{name}: the mask has labels outside 0..{self.n_classes - 1} that are not {IGNORE} (ignored)"
            )
        return channels, counts[: self.n_classes]

    def confusion(self, half: int | None = None) -> np.ndarray:
        """Pixel counts (T, K, K) int64, indexed [threshold, true, predicted], of all images or of one half."""
        counts = self._counts.sum(axis=0) if half is None else self._counts[half]
        confusion = np.moveaxis(_above(counts), -1, 0).copy()
        confusion[..., 0] = counts.sum(axis=(-2, -1)) - confusion[..., 1:].sum(axis=-1)
        return confusion

    def confusion_at(self, chosen: tuple[int, int]) -> np.ndarray:
        """Pixel counts (K, K) of all images, each half at the threshold of its index."""
        return self.confusion(0)[chosen[0]] + self.confusion(1)[chosen[1]]

    def scores(self) -> Scores:
        """Scores, leading axis T in the order of `thresholds`. Raises UserError if no pixel was counted."""
        return scores(self.confusion())

    def _check(self, maps: np.ndarray, classes: np.ndarray, truth: np.ndarray, name: str) -> None:
        if maps.ndim != 3 or not np.issubdtype(maps.dtype, np.floating):
            raise UserError(f"{name}: activation maps must be floats (C, H, W), not {maps.dtype} of shape {maps.shape}")
        if classes.shape != maps.shape[:1]:
            raise UserError(f"{name}: {len(maps)} activation maps need as many classes, not {classes.tolist()}")
        if np.unique(classes).size < classes.size or not np.isin(classes, range(1, self.n_classes)).all():
            raise UserError(
                f"{name}: classes must be distinct and within 1..{self.n_classes - 1}, not {classes.tolist()}"
            )
        if truth.dtype != np.uint8 or truth.ndim != 2:
            raise UserError(f"{name}: the mask must be uint8 (H, W), not {truth.dtype} of shape {truth.shape}")
        if truth.shape != maps.shape[1:]:
            raise UserError(f"{name}: the mask is {truth.shape} but the prediction is {maps.shape[1:]} (height, width)")


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of one image, of the classes (n,) that are predicted at some threshold or true; the last axis is that of
    the thresholds. See `Scores` for P and T."""

    classes: np.ndarray
    hit: np.ndarray
    """|P & T| (n, T)."""
    predicted: np.ndarray
    """|P| (n, T)."""
    true: np.ndarray
    """|T| (n,)."""

    @classmethod
    def of_maps(cls, channels: np.ndarray, counts: np.ndarray) -> "ImageCounts":
        """Of what `ThresholdCurve.count` returns."""
        above, true = _above(counts), counts.sum(axis=(1, 2))
        hit, predicted = (np.zeros((len(counts), above.shape[-1]), dtype=np.int64) for _ in range(2))
        hit[channels], predicted[channels] = above[channels, range(len(channels))], above.sum(axis=0)
        hit[0] = true[0] - above[0].sum(axis=0)
        predicted[0] = true.sum() - above.sum(axis=(0, 1))
        (there,) = np.nonzero(predicted.any(axis=1) | (true > 0))
        return cls(there, hit[there], predicted[there], true[there])

    @classmethod
    def of_labels(cls, confusion: np.ndarray) -> "ImageCounts":
        """Of a confusion matrix (K, K): at one threshold, so to speak."""
        hit, predicted, true = np.diagonal(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
        (there,) = np.nonzero((predicted > 0) | (true > 0))
        return cls(there, hit[there, None], predicted[there, None], true[there])


REPORTED = ("miou", "fp", "fn", "threshold", "miou_oracle", "miou_fixed", "miou_heldout")
"""What `reported` tells of maps."""
COSINES = ("cosine_activation", "cosine_attention")
"""What stage cams tells of them (`inference.class_cosines`)."""


def reported(
    curve: ThresholdCurve, options: EvaluateConfig, split: str, of: str = "cam"
) -> tuple[dict[str, float], tuple[int, int]]:
    """The final metrics of maps, and the index of the threshold that each half of the images is reported at.

    `curve` is over `options.scored_thresholds()`. "<of>/<split>/miou", "fp", "fn" and "threshold" (where the halves
    have two, their mean) are by the config's rule, "miou_oracle", "miou_fixed" and "miou_heldout" by each, percent;
    the last is missing where a half has no pixel. Raises UserError where it is the config's.
    """
    rules = chosen_thresholds(curve, options)
    if options.rule not in rules:
        raise UserError(
            f"evaluate.rule=heldout needs known pixels in both halves of split {split}: take oracle or fixed"
        )
    chosen, of_rule = rules[options.rule], {rule: scores(curve.confusion_at(at)) for rule, at in rules.items()}
    own = of_rule[options.rule]
    values = {"miou": own.miou, "fp": own.fp, "fn": own.fn, "threshold": curve.thresholds[list(chosen)].mean()}
    values |= {f"miou_{rule}": found.miou for rule, found in of_rule.items()}
    return {f"{of}/{split}/{name}": float(value) for name, value in values.items()}, chosen


def chosen_thresholds(curve: ThresholdCurve, options: EvaluateConfig) -> dict[str, tuple[int, int]]:
    """By each rule of `evaluate.rule`, the index of the threshold of each half of the images. "oracle": the best of all
    images; "heldout": the best of the other half, if both have pixels."""
    fixed = int(np.flatnonzero(curve.thresholds == options.fixed_threshold)[0])
    searched = np.flatnonzero(np.isin(curve.thresholds, options.threshold_values()))

    def best(confusion: np.ndarray) -> int:
        return int(searched[scores(confusion[searched]).miou.argmax()])

    first, second = curve.confusion(0), curve.confusion(1)
    oracle = best(first + second)
    rules = {"oracle": (oracle, oracle), "fixed": (fixed, fixed)}
    return rules | {"heldout": (best(second), best(first))} if first.any() and second.any() else rules


def label_ap(similarities: np.ndarray, labels: np.ndarray) -> float:
    """Average precision in percent of the classes of an image (N, K), mean over images, at the best of 99 thresholds.

    Published: what ranks the classes is not the similarity but whether it exceeds the threshold. So the classes that
    do come first, in one rank, with their precision; the rest of the present ones has that of all K classes.
    labels: (N, K) of 0 and 1, with a present class (background, if no other) in each row.
    """
    present, n_present = labels.astype(bool), labels.sum(axis=1)
    best = 0.0
    for threshold in np.arange(1, 100) / 100:
        named = similarities > threshold
        hits = (named & present).sum(axis=1)
        recall, precision = hits / n_present, hits / np.maximum(named.sum(axis=1), 1)
        ap = recall * precision + (1 - recall) * n_present / labels.shape[1]
        best = max(best, 100 * float(ap.mean()))
    return best


def _above(counts: np.ndarray) -> np.ndarray:
    """Pixels above each threshold (..., T) from those at each level (..., T + 1)."""
    return counts[..., :0:-1].cumsum(axis=-1)[..., ::-1]


def _dominant(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest value (H, W) over the channels of maps (C, H, W) and the first channel (H, W) that has it.

    Equal to maps.max(0), maps.argmax(0), but NumPy's arg-max over a leading axis is slow, and so is masked
    assignment where maps are noisy. A byte holds every channel, since K is at most 255.
    """
    value, channel = maps[0].copy(), np.zeros(maps.shape[1:], dtype=np.uint8)
    for c in range(1, len(maps)):
        np.maximum(channel, (maps[c] > value) * np.uint8(c), out=channel)
        np.maximum(value, maps[c], out=value)
    return value, channel


def _eroded(value: np.ndarray, channel: np.ndarray, side: int) -> np.ndarray:
    """Values (H, W) whose thresholding gives the eroded regions, for every threshold at once.

    A pixel survives erosion at t if its whole window has its class at t: if the window has one arg-max
    channel and its lowest value is above t. So the value is that minimum, or -inf where the window is mixed.
    """
    uniform = _over_window(np.minimum, channel, side) == _over_window(np.maximum, channel, side)
    return np.where(uniform, _over_window(np.minimum, value, side), value.dtype.type(-np.inf))


def _over_window(extremum: np.ufunc, x: np.ndarray, side: int) -> np.ndarray:
    """Minimum or maximum over the side x side window around each pixel of x (H, W), cut off at the border."""
    height, width = x.shape
    # Edge padding adds nothing: it repeats pixels that are in the window already.
    x = np.pad(x, side // 2, mode="edge")
    x = extremum.reduce([x[k : k + height] for k in range(side)])
    return extremum.reduce([x[:, k : k + width] for k in range(side)])
