"""What is random in a crop: how it is distributed, and that nothing of it tells anything of the rest."""

import itertools

import numpy as np
import pytest

from semformer.config import load_config
from semformer.data.augment import caae_crops, segmentor_crops

DRAW = {"caae": caae_crops, "segmentor": segmentor_crops}


def drawn(stage: str, sizes, *, seed: int = 0, epoch: int = 0, **changes):
    config = load_config("paper", {f"{stage}.{name}": value for name, value in changes.items()})
    return DRAW[stage](np.array(sizes), getattr(config, stage), seed=seed, epoch=epoch)


@pytest.mark.parametrize("stage", DRAW)
def test_nothing_that_is_drawn_for_an_image_tells_anything_of_the_rest(stage):
    crops = drawn(stage, [[375, 500]] * 20_000)
    S, (H, W) = crops.size, crops.scaled.T
    top, left, h, w = crops.box.T
    if stage == "segmentor":  # a place in the image, or of the image in the frame
        top, left, h, w = (
            np.where(side > S, inside, around)
            for side, inside, around in (
                (H, top, crops.corner[:, 0]),
                (W, left, crops.corner[:, 1]),
                (H, S, H + H - S),
                (W, S, W + W - S),
            )
        )
    places = [(place + 0.5) / (np.abs(side - part) + 1) for side, place, part in ((H, top, h), (W, left, w))]
    values = np.column_stack([W, *places, crops.flip, crops.amounts, crops.order.argsort(axis=1)[:, :3]])
    together = np.corrcoef(values.T)
    together[-3:, -3:] = np.eye(3)  # turns exclude each other
    assert np.abs(together - np.eye(len(together))).max() < 0.035


@pytest.mark.parametrize("stage", DRAW)
def test_every_epoch_of_every_seed_has_numbers_of_its_own(stage):
    flips = {
        drawn(stage, [[375, 500]] * 64, seed=s, epoch=e).flip.tobytes()
        for s, e in itertools.product(range(4), repeat=2)
    }
    assert len(flips) == 16


def test_the_caae_s_boxes_are_uniform_in_area_and_in_the_logarithm_of_their_ratio():
    crops = drawn("caae", [[1000, 1000]] * 20_000, crop_area="0.08,0.6", enlarge="1,1")
    area, ratio = crops.box[:, 2] * crops.box[:, 3] / 1e6, crops.box[:, 3] / crops.box[:, 2]
    quarters = [0.25, 0.5, 0.75]
    assert np.quantile(area, quarters) == pytest.approx([0.21, 0.34, 0.47], abs=0.01)
    assert np.quantile(np.log(ratio) / np.log(4 / 3), quarters) == pytest.approx([-0.5, 0, 0.5], abs=0.03)


@pytest.mark.parametrize("stage", DRAW)
def test_photographs_keep_their_shape(stage):
    crops = drawn(stage, [[375, 500], [500, 333]] * 500)
    H, W = crops.scaled.T
    assert np.abs(W / H / np.tile([500 / 375, 333 / 500], 500) - 1).max() < 0.01
