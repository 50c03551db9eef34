"""Search over 30 thresholds: the obvious loop beside `semformer.metrics`, one thread, identical numbers."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from semformer.metrics import ThresholdCurve

N_CLASSES = 21
THRESHOLDS = [n / 100 for n in range(10, 40)]
N_IMAGES, HEIGHT, WIDTH = 8, 375, 500
REPEATS = 5
REQUIRED_RATIO = 20

Image = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_images(seed: int = 0) -> list[Image]:
    """VOC-sized (maps, classes, truth) with 1-3 object classes; maps are patch grids resized to pixels."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(N_IMAGES):
        n_objects = 1 + i % 3
        classes = rng.choice(np.arange(1, N_CLASSES), size=n_objects, replace=False)
        grid = torch.from_numpy(rng.random((1, n_objects, 24, 32), dtype=np.float32) ** 2)
        maps = F.interpolate(grid, (HEIGHT, WIDTH), mode="bilinear")[0].numpy()
        truth = np.concatenate([[0], classes, [255]]).astype(np.uint8)[
            rng.integers(0, n_objects + 2, size=(15, 20)).repeat(25, axis=0).repeat(25, axis=1)
        ]
        images.append((maps, classes, truth))
    return images


def obvious_loop(images: list[Image]) -> np.ndarray:
    """Confusion matrices (T, K, K): every threshold predicts every image anew."""
    confusion = np.zeros((len(THRESHOLDS), N_CLASSES, N_CLASSES), dtype=np.int64)
    for k, threshold in enumerate(THRESHOLDS):
        for maps, classes, truth in images:
            background = np.full_like(maps[:1], threshold)
            prediction = np.concatenate([[0], classes])[np.concatenate([background, maps]).argmax(axis=0)]
            counted = truth != 255
            cell = truth[counted] * np.intp(N_CLASSES) + prediction[counted]
            confusion[k] += np.bincount(cell, minlength=N_CLASSES**2).reshape(N_CLASSES, N_CLASSES)
    return confusion


def one_pass(images: list[Image]) -> np.ndarray:
    curve = ThresholdCurve(N_CLASSES, THRESHOLDS)
    for image in images:
        curve.add(*image)
    return curve.confusion()


def timed(function: Callable[[list[Image]], np.ndarray], images: list[Image]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = function(images)
    return time.perf_counter() - start, result


def run() -> dict[str, float]:
    """Median seconds of either way and their ratio. Raises AssertionError if the numbers differ."""
    torch.set_num_threads(1)
    images = make_images()
    one_pass(images)
    seconds: dict[str, list[float]] = {"obvious": [], "ours": []}
    for _ in range(REPEATS):
        obvious_seconds, expected = timed(obvious_loop, images)
        our_seconds, result = timed(one_pass, images)
        np.testing.assert_array_equal(result, expected)
        seconds["obvious"].append(obvious_seconds)
        seconds["ours"].append(our_seconds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "obvious_seconds": medians["obvious"],
        "our_seconds": medians["ours"],
        "ratio": medians["obvious"] / medians["ours"],
    }


def main() -> None:
    result = run()
    print(
        f"| threshold search: {len(THRESHOLDS)} thresholds, "
        f"{N_IMAGES} images {WIDTH}x{HEIGHT}, K = {N_CLASSES} "
        f"| {1e3 * result['obvious_seconds']:.0f} ms | {1e3 * result['our_seconds']:.1f} ms "
        f"| {result['ratio']:.0f}x |"
    )
    if result["ratio"] < REQUIRED_RATIO:
        raise SystemExit(f"threshold search is less than {REQUIRED_RATIO}x faster than the obvious loop")


if __name__ == "__main__":
    main()
