"""What is in a batch: image, region and labels of one photograph, cropped as drawn for this seed and epoch."""

import numpy as np
import pytest
import torch
from PIL import Image

from semformer.config import load_config
from semformer.data.augment import caae_crops, make_crops, segmentor_crops, valid_mask
from semformer.data.loading import Loader, cut
from semformer.data.voc import open_devkit, read_image
from semformer.stages.pack import packed

CPU = torch.device("cpu")


@pytest.mark.parametrize("stage", ["caae", "segmentor"])
def test_a_batch_holds_each_photograph_s_own_crop_region_and_labels(shapes, store, stage):
    split = open_devkit(shapes).split("train")
    data, draw = packed(split, ["images"], store), {"caae": caae_crops, "segmentor": segmentor_crops}[stage]
    data.labels[:, 1] = np.arange(16)  # so that an image can be told by its labels
    jitter = {f"{stage}.color_jitter": "0.3,0.3,0.3,0.1", f"{stage}.batch_size": 5}
    options = getattr(load_config("micro", jitter), stage)
    crops = draw(data.sizes, options, seed=3, epoch=2)
    for batch in Loader(data, draw, options, seed=3, device=CPU).epoch(2):
        for image, region, Y in zip(batch.images, batch.regions, batch.Y, strict=True):
            row = int(Y[1])
            pixels = split.pixels(row)
            luma = torch.tensor([(pixels @ np.array([0.2989, 0.587, 0.114])).mean() / 255], dtype=torch.float32)
            expected = make_crops([cut(pixels, crops, row)], luma, crops, np.array([row]))[0]
            torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
            assert region.tolist() == crops.regions[row].tolist()
            assert Y[2:].tolist() == split.labels[row, 2:].tolist()


def test_colours_are_read_as_red_green_and_blue(tmp_path):
    Image.new("RGB", (8, 8), (250, 120, 10)).save(tmp_path / "orange.png")
    assert np.asarray(read_image(tmp_path / "orange.png"))[3, 3].tolist() == [250, 120, 10]


def test_edges_of_a_valid_region_are_scaled_and_rounded_down():
    valid = valid_mask(torch.tensor([[1, 3, 9, 13]]), 16, 8)[0, 0]
    expected = torch.zeros(8, 8)
    expected[1:6, 0:4] = 1
    assert torch.equal(valid, expected)
