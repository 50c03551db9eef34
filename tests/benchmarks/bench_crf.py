"""The dense CRF beside pydensecrf (C++; the extra `crf`), of one photograph with preset paper's options: one core.

3 labels as they are refined for AffinityNet, 21 as those of a segmentation: lattices, and 10 iterations. Both must give
nearly all pixels the same label. Where pydensecrf is not installed, ours is measured alone.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semformer.config import CrfConfig, load_config
from semformer.crf import LEAST, DenseCrf

HEIGHT, WIDTH = 375, 500
ROUNDS = 3
REQUIRED_AGREEMENT = 0.99


def make_photograph() -> Tensor:
    """(3, H, W) uint8: noise that is the weaker the finer it is, so that its lattice has about as many points as a
    photograph's."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, HEIGHT, WIDTH)
    for cells in (3, 6, 12, 24, 48, 96):
        noise = torch.randn(1, 3, cells, cells * 4 // 3, generator=generator)
        total += F.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic") / cells
    total += 0.01 * torch.randn(total.shape, generator=generator)
    return (128 + 150 * total[0]).clamp(0, 255).to(torch.uint8)


def make_probabilities(labels: int) -> Tensor:
    """(C, H, W): in patches one label is likely, and not quite sure."""
    generator = torch.Generator().manual_seed(1)
    coarse = 4 * torch.randn(1, labels, HEIGHT // 50, WIDTH // 50, generator=generator)
    return F.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")[0].softmax(dim=0)


def ours(image: Tensor, likely: Tensor, options: CrfConfig) -> np.ndarray:
    return DenseCrf(image, options).refine(likely).argmax(dim=0).numpy()


def theirs(image: Tensor, likely: Tensor, options: CrfConfig) -> np.ndarray:
    from pydensecrf.densecrf import DenseCRF2D

    C, (H, W) = len(likely), image.shape[1:]
    field = DenseCRF2D(W, H, C)
    field.setUnaryEnergy(np.ascontiguousarray(-likely.clamp(LEAST, 1).log().reshape(C, -1).numpy()))
    field.addPairwiseGaussian(sxy=options.gaussian_sxy, compat=options.gaussian_compat)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    field.addPairwiseBilateral(
        sxy=options.bilateral_sxy, srgb=options.bilateral_srgb, rgbim=pixels, compat=options.bilateral_compat
    )
    return np.array(field.inference(options.iterations)).reshape(C, H, W).argmax(axis=0)


def run(labels: int, options: CrfConfig) -> dict[str, float]:
    """Median seconds of the CPU of each way, alternating; raises AssertionError where their labels differ."""
    torch.set_num_threads(1)
    image, likely = make_photograph(), make_probabilities(labels)
    ways: dict[str, Callable[[Tensor, Tensor, CrfConfig], np.ndarray]] = {"ours": ours}
    if importlib.util.find_spec("pydensecrf"):
        ways["theirs"] = theirs
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        found = {}
        for name, way in ways.items():
            started = time.process_time()
            found[name] = way(image, likely, options)
            seconds[name].append(time.process_time() - started)
        agreement = np.mean(found["ours"] == found.get("theirs", found["ours"]))
        assert agreement >= REQUIRED_AGREEMENT, f"{agreement:.1%} of the pixels have the same label"
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    config = load_config("paper")
    for labels, options in ((3, config.affinity_labels.crf), (21, config.segmentation.crf)):
        seconds = run(labels, options)
        plain, ratio = "pydensecrf is not installed", ""
        if "theirs" in seconds:
            plain, ratio = f"{seconds['theirs']:.2f} s", f"{seconds['theirs'] / seconds['ours']:.2f}x"
        what = f"CRF: {WIDTH}x{HEIGHT}, {labels} labels, {options.iterations} iterations (plain: pydensecrf)"
        print(f"| {what} | {plain} | {seconds['ours']:.2f} s | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
