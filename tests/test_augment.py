"""Crops of both networks against Pillow and torchvision on photographs, and what their random numbers depend on."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tvf

from semformer.config import load_config
from semformer.data.augment import (
    ADJUST,
    caae_crops,
    crop_labels,
    jitter,
    luma,
    make_crops,
    segmentor_crops,
    valid_mask,
)
from semformer.data.loading import cut
from semformer.data.pixels import MEAN, STD, as_batch, normalized, resize, resize_exactly

SAMPLE = Path(__file__).parents[2] / "shared" / "coco_sample"
NO_JITTER = (0.0, 0.0, 0.0, 0.0)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Real ones where they are there, else smooth noise, of many sizes."""
    if SAMPLE.is_dir():
        return [np.array(Image.open(path).convert("RGB")) for path in sorted(SAMPLE.rglob("*.jpg"))[:10]]
    rng, sizes = np.random.default_rng(0), [(375, 500), (500, 333), (120, 500), (500, 281), (96, 64)]
    noise = [Image.fromarray(rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)) for h, w in sizes]
    return [np.array(image.resize((w, h), PILLOW["bicubic"])) for image, (h, w) in zip(noise, sizes, strict=True)]


def config(stage: str, **changes):
    return getattr(load_config("paper", {f"{stage}.{name}": value for name, value in changes.items()}), stage)


def sizes_of(images) -> np.ndarray:
    return np.array([image.shape[:2] for image in images])


def lumas(images) -> torch.Tensor:
    return torch.stack([luma(as_batch(torch.from_numpy(image)) / 255).mean() for image in images])


def made(images, crops) -> torch.Tensor:
    """The crops in 0..255, padding at the mean colour."""
    rows = np.arange(len(images))
    out = make_crops([cut(image, crops, row) for row, image in enumerate(images)], lumas(images), crops, rows)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return 255 * (out * std + mean)


@pytest.mark.parametrize("enlarge", ["1,3", "1,1"])
def test_caae_crops_are_those_of_pillow(photographs, enlarge):
    """Enlarge the whole image, cut the box, resize it, mirror it: whole images, and 8 bits after each step."""
    worst = 0.0
    for epoch in range(3):
        options = config("caae", color_jitter=NO_JITTER, enlarge=enlarge)
        crops = caae_crops(sizes_of(photographs), options, seed=7, epoch=epoch)
        for i, ours in enumerate(made(photographs, crops)):
            (H, W), (top, left, h, w) = crops.scaled[i], crops.box[i]
            image = Image.fromarray(photographs[i]).resize((W, H), PILLOW["bilinear"])
            image = image.crop((left, top, left + w, top + h)).resize((224, 224), PILLOW["bilinear"])
            theirs = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crops.flip[i] else image)
            worst = max(worst, np.abs(ours.permute(1, 2, 0).numpy() - theirs).max())
    assert 0 < worst <= 2.01


def test_segmentor_crops_are_those_of_pillow(photographs):
    """Resize and mirror the whole image, then cut it, or place it on a canvas whose padding is zero when normalised."""
    for epoch in range(3):
        crops = segmentor_crops(sizes_of(photographs), config("segmentor", color_jitter=NO_JITTER), seed=7, epoch=epoch)
        for i, ours in enumerate(made(photographs, crops)):
            (H, W), S = crops.scaled[i], 448
            assert tuple(round(side * max(H, W) / max(photographs[i].shape)) for side in photographs[i].shape[:2]) == (
                H,
                W,
            )
            image = Image.fromarray(photographs[i]).resize((W, H), PILLOW["bicubic"])
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crops.flip[i] else image
            xmin, ymin, xmax, ymax = crops.regions[i]
            cut_left = W - crops.box[i, 1] - crops.box[i, 3] if crops.flip[i] else crops.box[i, 1]
            whole = np.tile(255 * np.array(MEAN), (S, S, 1))
            part = image.crop((cut_left, crops.box[i, 0], cut_left + xmax - xmin, crops.box[i, 0] + ymax - ymin))
            whole[ymin:ymax, xmin:xmax] = np.asarray(part)
            assert np.abs(ours.permute(1, 2, 0).numpy() - whole).max() <= 2.01
            inside = valid_mask(torch.from_numpy(crops.regions[i : i + 1]), S, S)[0, 0].bool()
            assert (
                (ours[:, ~inside] - 255 * torch.tensor(MEAN)[:, None]).abs().max() < 1e-3 if (~inside).any() else True
            )


@pytest.mark.parametrize("kind", range(4))
def test_each_change_of_colour_is_torchvision_s(photographs, kind):
    theirs = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)[kind]
    for image, amount in itertools.product(photographs[:4], (-0.3, -0.1, 0.0, 0.05, 0.3)):
        amount = amount / 3 if kind == 3 else 1 + amount
        pixels = as_batch(torch.from_numpy(image)) / 255
        ours = ADJUST[kind](pixels, torch.tensor([amount])[:, None, None, None], luma(pixels).mean())
        assert (ours - theirs(pixels, amount)).abs().max() < 1 / 255
        assert amount in (0, 1) or (ours - pixels).abs().max() > 1 / 255


def test_each_image_of_a_batch_has_its_own_changes_in_its_own_order(photographs):
    """Whole images, so that torchvision's contrast is about the same mean but for what came before it."""
    images = torch.cat([resize_exactly(as_batch(torch.from_numpy(image)), (64, 80)) for image in photographs[:5]]) / 255
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 1, 3], [0, 3, 2, 1]])
    amounts = torch.tensor([[1.1, 0.8, 1.2, 0.02]]).repeat(5, 1) + torch.linspace(-0.05, 0.05, 5)[:, None]
    theirs = []
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for image, order, amount in zip(images, orders, amounts, strict=True):
        for kind in order.tolist():
            image = adjust[kind](image[None], amount[kind].item())[0]
        theirs.append(image)
    ours = jitter(images, orders, amounts, luma(images).mean(dim=(1, 2, 3)), (0, 1, 2, 3))
    assert (ours - torch.stack(theirs)).abs().max() < 0.02
    without_hue = jitter(images, orders, amounts, luma(images).mean(dim=(1, 2, 3)), (0, 1, 2))
    assert (ours - without_hue).abs().max() > 0.02


@pytest.mark.parametrize("draw", [caae_crops, segmentor_crops])
def test_crops_are_jittered_by_what_was_drawn_for_them(photographs, draw):
    stage, sizes = "caae" if draw is caae_crops else "segmentor", sizes_of(photographs)
    plain = draw(sizes, config(stage, color_jitter=NO_JITTER), seed=3, epoch=0)
    crops = draw(sizes, config(stage), seed=3, epoch=0)
    ours, before = made(photographs, crops), made(photographs, plain)
    whole = (torch.from_numpy(crops.order), torch.from_numpy(crops.amounts), lumas(photographs), (0, 1, 2, 3))
    theirs = 255 * jitter(before / 255, *whole)
    inside = valid_mask(torch.from_numpy(crops.regions), crops.size, crops.size).bool().expand_as(ours)
    assert (ours - theirs)[inside].abs().max() < 0.01
    assert (ours - before)[inside].abs().mean() > 3
    assert torch.equal(ours[~inside], before[~inside]), "padding keeps its colour"


def test_contrast_turns_about_the_photograph_s_mean_not_the_crop_s():
    crop, amounts = torch.full((1, 3, 2, 2), 0.9), torch.tensor([[1.0, 0.5, 1.0, 0.0]])
    assert jitter(crop, torch.tensor([[0, 1, 2, 3]]), amounts, torch.tensor([0.3]), (1,)).allclose(torch.tensor(0.6))
    amounts[0, 0] = 0.5  # half as bright before: the photograph's mean is half as high, too
    assert jitter(crop, torch.tensor([[0, 1, 2, 3]]), amounts, torch.tensor([0.3]), (0, 1)).allclose(torch.tensor(0.3))


@pytest.mark.parametrize("draw", ["caae", "segmentor"])
def test_crops_depend_on_seed_epoch_and_index_alone(draw):
    crops_of, options = {"caae": caae_crops, "segmentor": segmentor_crops}[draw], config(draw)
    sizes = np.array([[375, 500], [500, 375], [100, 60], [333, 500]] * 5)
    parts = ("scaled", "box", "shown", "corner", "flip", "order", "amounts")

    def drawn(n=20, seed=1, epoch=3):
        crops = crops_of(sizes[:n], options, seed=seed, epoch=epoch)
        return [getattr(crops, part)[:8] for part in parts]

    assert all(np.array_equal(a, b) for a, b in zip(drawn(), drawn(n=8), strict=True))
    for other in (drawn(seed=2), drawn(epoch=4)):
        assert not all(np.array_equal(a, b) for a, b in zip(drawn(), other, strict=True))


@pytest.fixture(scope="module")
def many():
    """Crops of 20,000 images of 375 x 500, of both kinds."""
    sizes = np.tile([375, 500], (20_000, 1))
    return (
        caae_crops(sizes, config("caae"), seed=0, epoch=0),
        segmentor_crops(sizes, config("segmentor"), seed=0, epoch=0),
    )


def test_caae_geometry_has_the_published_ranges(many):
    crops, _ = many
    factor = crops.scaled / np.array([375, 500])
    assert factor.min() >= 1 - 1 / 375
    assert factor.max() < 3
    assert abs(factor.mean() - 2) < 0.01
    H, W = crops.scaled.T
    top, left, h, w = crops.box.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= H).all()
    assert (left + w <= W).all()
    area, ratio = h * w / (H * W), w / h
    assert 0.078 < area.min() < 0.085
    assert area.max() > 0.97
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.05
    assert (top + h == H).any()
    assert (top == 0).any()
    assert abs((top / np.maximum(H - h, 1)).mean() - 0.5) < 0.01
    assert abs(crops.flip.mean() - 0.5) < 0.02
    assert (crops.shown == 224).all()
    assert not crops.corner.any()


def test_no_crop_needs_more_than_its_source():
    """Many sizes and factors, whole ones among them, at which a pixel lies exactly on another."""
    sizes = np.random.default_rng(0).integers(20, 60, (400, 2))
    for enlarge in ("1,3", "2,2", "3,3", "1,1"):
        options = config("caae", enlarge=enlarge, crop_area="0.08,1", image_size=16, color_jitter=NO_JITTER)
        crops = caae_crops(sizes, options, seed=1, epoch=0)
        images = [np.full((h, w, 3), 7, dtype=np.uint8) for h, w in sizes]
        parts = [cut(image, crops, row) for row, image in enumerate(images)]
        assert (
            make_crops(parts, torch.zeros(400), crops, np.arange(400)) == normalized(torch.full((1, 3, 1, 1), 7.0))
        ).all()
        top, left, h, w = crops.source.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + h <= sizes[:, 0]).all()
        assert (left + w <= sizes[:, 1]).all()


def test_enlarged_sizes_are_truncated():
    sizes = np.tile([375, 500], (1000, 1))
    options = config("caae", enlarge="1.999,1.999")
    assert (caae_crops(sizes, options, seed=0, epoch=0).scaled == [749, 999]).all()


@pytest.mark.parametrize(("size", "box"), [((30, 300), (0, 130, 30, 40)), ((300, 30), (130, 0, 40, 30))])
def test_where_no_box_fits_it_is_the_largest_in_the_centre(size, box):
    options = config("caae", enlarge="1,1", crop_area="1,1")
    assert (caae_crops(np.array([size] * 9), options, seed=0, epoch=0).box == box).all()


def test_segmentor_geometry_has_the_published_ranges(many):
    _, crops = many
    long = crops.scaled.max(axis=1)
    assert (long.min(), long.max()) == (224, 896)
    counts = np.bincount(long - 224)
    assert len(counts) == 673
    assert counts.min() > 5, "uniform over whole numbers, both ends included"
    assert (crops.scaled[:, 0] == np.rint(375 * (long / 500))).all()
    S, (H, W) = 448, crops.scaled.T
    _top, left, h, w = crops.box.T
    assert (h == np.minimum(H, S)).all()
    assert (w == np.minimum(W, S)).all()
    wide = W > S
    assert (left[~wide] == 0).all()
    assert (left[wide] + S <= W[wide]).all()
    assert abs((left[wide] / (W[wide] - S)).mean() - 0.5) < 0.02
    corner_y = crops.corner[H < S, 0] / (S - H[H < S])
    assert corner_y.min() == 0
    assert corner_y.max() == 1
    assert abs(corner_y.mean() - 0.5) < 0.02
    assert abs(crops.flip.mean() - 0.5) < 0.02


def test_jitter_has_the_published_strengths(many):
    for crops in many:
        low, high = crops.amounts.min(axis=0), crops.amounts.max(axis=0)
        assert np.allclose(low, [0.7, 0.7, 0.7, -0.1], atol=1e-3)
        assert np.allclose(high, [1.3, 1.3, 1.3, 0.1], atol=1e-3)
        orders, counts = np.unique(crops.order, axis=0, return_counts=True)
        assert len(orders) == 24
        assert counts.min() > 600
        assert abs(np.corrcoef(crops.amounts.T) - np.eye(4)).max() < 0.03
    assert config("caae", color_jitter="0,0,0.3,0").color_jitter == (0, 0, 0.3, 0)
    crops = caae_crops(np.array([[10, 10]]), config("caae", color_jitter="0,0,0.3,0"), seed=0, epoch=0)
    assert crops.adjusted == (2,)


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.77, 1.0, 1.5, 2.0])
def test_views_are_pillow_s_to_the_digit(photographs, scale):
    for image in photographs[:5]:
        size = [max(1, round(side * scale)) for side in image.shape[:2]]
        ours = resize_exactly(as_batch(torch.from_numpy(image)), size)[0].permute(1, 2, 0).numpy()
        theirs = Image.fromarray(image).resize(size[::-1], PILLOW["bicubic"])
        assert np.array_equal(ours, np.asarray(theirs))


def test_normalised_images_have_imagenet_s_mean_and_deviation():
    grey = torch.tensor([[0.485, 0.456, 0.406], [0.714, 0.68, 0.631]])[:, :, None, None] * 255
    assert normalized(grey)[:, :, 0, 0].allclose(torch.tensor([[0.0, 0, 0], [1.0, 1, 1]]), atol=1e-5)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_floats_are_resized_to_whole_values_in_the_range_of_bytes_like_bytes(resample):
    extremes = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (20, 30, 3))
    images = torch.from_numpy(extremes).permute(2, 0, 1)[None]
    theirs = np.array(Image.fromarray(extremes).resize((45, 33), PILLOW[resample])).transpose(2, 0, 1)
    for given in (images, images.float()):  # a GPU resizes floats alone
        ours = resize(given, (33, 45), resample).double().numpy()[0]
        assert (ours == ours.round()).all()
        assert (ours.min(), ours.max()) == (theirs.min(), theirs.max())
        assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("side", [448, 112, 56])
def test_labels_are_cropped_as_their_images_are(side):
    """As Pillow does: resized with the image, cut, mirrored, put into a frame of 255, and that resized.

    Where a pixel lies just between two, rounding decides which is the nearest: rows or columns may differ, few do.
    """
    rng = np.random.default_rng(0)
    sizes = np.array([(375, 500), (500, 333), (120, 500), (1, 1), (96, 64), (700, 800)] * 4)
    labels = [rng.integers(0, 21, size, dtype=np.uint8) for size in sizes]
    crops = segmentor_crops(sizes, config("segmentor"), seed=3, epoch=1)
    assert len(set(crops.flip)) == 2
    for row, of_image in enumerate(labels):
        (h, w), (top, left, box_h, box_w), (y, x) = crops.scaled[row], crops.box[row], crops.corner[row]
        part = Image.fromarray(of_image).resize((w, h), Image.Resampling.NEAREST)
        part = part.crop((left, top, left + box_w, top + box_h))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crops.flip[row] else part
        frame = Image.new("L", (448, 448), 255)
        frame.paste(part, (int(x), int(y)))
        expected = np.array(frame.resize((side, side), Image.Resampling.NEAREST))
        found = crop_labels(of_image, crops, row, side)
        np.testing.assert_array_equal(found == 255, expected == 255)
        assert (found == expected).mean() > 0.97
