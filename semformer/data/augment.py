"""Training crops (sections 3.2 and 3.3, with the published geometry), made where the network is: those of the CAAE, and
those of the segmentation network, which AffinityNet and DeepLab have as well.

What is random is drawn on the host for a whole epoch at once, and depends on (seed, epoch, index of the image) alone:
`caae_crops`, `segmentor_crops`. What it does to the pixels happens on the device: `make_crops`.

Legend: n images of a split, B of a batch, S side of a crop, K classes, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semformer.config import AffinityConfig, CaaeConfig, DeeplabConfig, PretrainConfig, SegmentorConfig
from semformer.data.pack import LUMA
from semformer.data.pixels import Resample, as_batch, normalized, resize, resize_axis
from semformer.data.voc import IGNORE

RATIO = (3 / 4, 4 / 3)
"""Width by height of the CAAE's boxes."""
TRIES = 10


@dataclass(frozen=True)
class Crops:
    """How each image of a split becomes a crop of side `size` in one epoch: a row an image, all in pixels.

    The image, `sizes` (height, width), is resized to `scaled`, its `box` (top, left, height, width) is cut out, resized
    to `shown` (height, width), mirrored where `flip` says so, and put into the crop at `corner` (top, left). No more
    than `source` (top, left, height, width) of the image is needed for that.
    Then its colours change: `order` (n, 4) has the numbers of the operations in `ADJUST` in turn, `amounts` (n, 4) how
    much each of them does.
    """

    size: int
    resample: Resample
    sizes: np.ndarray
    source: np.ndarray
    scaled: np.ndarray
    box: np.ndarray
    shown: np.ndarray
    corner: np.ndarray
    flip: np.ndarray
    order: np.ndarray
    amounts: np.ndarray
    adjusted: tuple[int, ...]
    """The operations that do anything at all."""

    @property
    def regions(self) -> np.ndarray:
        """(n, 4): xmin, ymin, xmax, ymax (max excluded) of what a crop shows of its image, beside padding."""
        first = self.corner[:, ::-1]
        return np.concatenate([first, first + self.shown[:, ::-1]], axis=1)


def caae_crops(sizes: np.ndarray, config: CaaeConfig | PretrainConfig, *, seed: int, epoch: int) -> Crops:
    """Random enlargement, random resized crop, flip, colour jitter. sizes: (n, 2), height and width of the images.

    Enlarged sizes are truncated; boxes are whole pixels of the enlarged image.
    """
    u = _uniform(seed, epoch, len(sizes), 2 * TRIES + 12)
    scaled = (sizes * _between(config.enlarge, u[:, :1])).astype(np.int64)
    box = _random_boxes(scaled, config.crop_area, u[:, 1 : 2 * TRIES + 3])
    first = np.floor(_centres(box[:, :2], sizes, scaled)).astype(np.int64)
    last = np.floor(_centres(box[:, :2] + box[:, 2:] - 1, sizes, scaled)).astype(np.int64) + 1
    return Crops(
        size=config.image_size,
        resample="bilinear",
        sizes=sizes,
        source=np.concatenate([first, np.minimum(last + 1, sizes) - first], axis=1),
        scaled=scaled,
        box=box,
        shown=np.full_like(scaled, config.image_size),
        corner=np.zeros_like(scaled),
        flip=u[:, 2 * TRIES + 3] < 0.5,
        **_color_jitter(config.color_jitter, u[:, -8:]),
    )


def segmentor_crops(
    sizes: np.ndarray, config: SegmentorConfig | AffinityConfig | DeeplabConfig, *, seed: int, epoch: int
) -> Crops:
    """Random resize of the long side, flip, random crop or random place in the frame, colour jitter.

    sizes: (n, 2), height and width of the images.
    """
    u = _uniform(seed, epoch, len(sizes), 12)
    S, (shortest, longest) = config.image_size, config.long_side
    long_side = shortest + np.floor(u[:, 0] * (longest - shortest + 1))
    scaled = np.maximum(1, np.rint(sizes * (long_side / sizes.max(axis=1))[:, None])).astype(np.int64)
    flip = u[:, 1] < 0.5
    offset = np.floor(u[:, 2:4] * (np.abs(scaled - S) + 1)).astype(np.int64)  # top, left
    shown, cut = np.minimum(scaled, S), np.where(scaled > S, offset, 0)
    cut[:, 1] = np.where(flip, scaled[:, 1] - shown[:, 1] - cut[:, 1], cut[:, 1])  # of the image before it is mirrored
    return Crops(
        size=S,
        resample="bicubic",
        sizes=sizes,
        source=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
        scaled=scaled,
        box=np.concatenate([cut, shown], axis=1),
        shown=shown,
        corner=np.where(scaled < S, offset, 0),
        flip=flip,
        **_color_jitter(config.color_jitter, u[:, -8:]),
    )


def _centres(pixels: np.ndarray, sizes: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Where the centres of pixels of an enlarged image lie among those of the image."""
    return np.clip((pixels + 0.5) * sizes / scaled - 0.5, 0, sizes - 1)


def _uniform(seed: int, epoch: int, n: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), (n, count). A row is the same whatever n is."""
    return np.random.default_rng([seed, epoch]).random((n, count))


def _between(limits: tuple[float, float], u: np.ndarray) -> np.ndarray:
    low, high = limits
    return low + (high - low) * u


def _random_boxes(sizes: np.ndarray, area: tuple[float, float], u: np.ndarray) -> np.ndarray:
    """(n, 4) top, left, height, width: of a random share of the area, at a random place, and of a ratio in `RATIO`.

    u: (n, 2 * TRIES + 2). Where no try fits, the largest box in the centre whose ratio is the nearest in `RATIO`.
    """
    H, W = sizes.T
    pixels = (H * W)[:, None] * _between(area, u[:, :TRIES])
    ratio = np.exp(_between((np.log(RATIO[0]), np.log(RATIO[1])), u[:, TRIES : 2 * TRIES]))
    w, h = np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))
    fits = (w > 0) & (h > 0) & (w <= W[:, None]) & (h <= H[:, None])
    chosen = (np.arange(len(sizes)), fits.argmax(axis=1))
    h, w = h[chosen], w[chosen]
    top, left = np.floor(u[:, -2] * (H - h + 1)), np.floor(u[:, -1] * (W - w + 1))

    none = ~fits.any(axis=1)
    h = np.where(none, np.minimum(H, np.rint(W / RATIO[0])), h)
    w = np.where(none, np.minimum(W, np.rint(H * RATIO[1])), w)
    top, left = np.where(none, (H - h) // 2, top), np.where(none, (W - w) // 2, left)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def _color_jitter(strengths: tuple[float, float, float, float], u: np.ndarray) -> dict:
    """Brightness, contrast and saturation by factors in 1 -+ strength, hue by a shift of -+ strength; u: (n, 8)."""
    amounts = np.array([1, 1, 1, 0]) + np.array(strengths) * (2 * u[:, 4:] - 1)
    adjusted = tuple(kind for kind, strength in enumerate(strengths) if strength)
    return {"order": u[:, :4].argsort(axis=1), "amounts": amounts.astype(np.float32), "adjusted": adjusted}


def make_crops(images: Sequence[Tensor], lumas: Tensor, crops: Crops, rows: np.ndarray) -> Tensor:
    """The crops of the images in `rows` of the split: (B, 3, S, S), ImageNet-normalised, zero where there is no image.

    images: (H, W, 3) uint8 of each row, `Crops.source` of the image, all on the device that the crops are for.
    lumas: (B,) mean luma of the whole images in 0..1, about which the contrast changes; on the host.
    """
    device = images[0].device
    batch = torch.zeros(len(rows), 3, crops.size, crops.size, device=device)
    parts = _enlarged(images, crops, rows) if crops.resample == "bilinear" else _scaled(images, crops, rows)
    for crop, part, row in zip(batch, parts, rows, strict=True):
        (top, left), (h, w) = crops.corner[row], crops.shown[row]
        part = resize(part, (h, w), crops.resample)
        crop[:, top : top + h, left : left + w] = part.flip(-1) if crops.flip[row] else part
    if crops.adjusted:
        order, amounts = torch.from_numpy(crops.order[rows]), torch.from_numpy(crops.amounts[rows])
        batch = jitter(batch.div_(255), order, amounts, lumas, crops.adjusted).mul_(255)
    batch = normalized(batch)
    if (crops.shown[rows] < crops.size).any():
        regions = torch.from_numpy(crops.regions[rows]).to(device, non_blocking=True)
        batch *= valid_mask(regions, crops.size, crops.size)
    return batch


def _scaled(images: Sequence[Tensor], crops: Crops, rows: np.ndarray) -> Iterator[Tensor]:
    """The boxes of scaled whole images, (1, 3, h, w) in 0..255."""
    for image, row in zip(images, rows, strict=True):
        (H, W), (top, left, h, w) = crops.scaled[row], crops.box[row]
        part = resize_axis(as_batch(image), 3, W, crops.resample)[..., left : left + w]
        yield resize_axis(part, 2, H, crops.resample)[..., top : top + h, :]


def _enlarged(images: Sequence[Tensor], crops: Crops, rows: np.ndarray) -> Iterator[Tensor]:
    """The boxes of enlarged images, (1, 3, h, w) in 0..255, of what they need of them: one axis after the other."""
    taps = [_taps(crops, rows, axis, images[0].device) for axis in (0, 1)]
    for b, (image, row) in enumerate(zip(images, rows, strict=True)):
        part = as_batch(image)
        for axis in (1, 0):
            if crops.scaled[row, axis] == crops.sizes[row, axis]:
                part = part.narrow(2 + axis, 0, int(crops.box[row, 2 + axis]))  # the source has one pixel more
                continue
            low, high, weight = (of_axis[b, : crops.box[row, 2 + axis]] for of_axis in taps[axis])
            weight = weight if axis else weight[:, None]
            near, far = (part.index_select(2 + axis, one).float() for one in (low, high))
            part = near.lerp_(far, weight).round_()
        yield part


def _taps(crops: Crops, rows: np.ndarray, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Between which two pixels of `Crops.source` each pixel of a box lies (B, n), and how far from the first."""
    columns = crops.box[rows, axis], crops.sizes[rows, axis], crops.scaled[rows, axis], crops.source[rows, axis]
    box, size, scaled, first = torch.from_numpy(np.stack(columns)).to(device, non_blocking=True)[..., None]
    pixel = box + torch.arange(crops.box[rows, 2 + axis].max(), device=device)
    centre = (pixel.double() + 0.5) * size / scaled - 0.5  # as exact as `_centres`, which chose the source by it
    centre = centre.clamp(min=0).minimum(size - 1.0)
    low = centre.floor()
    return (low - first).long(), (low + 1).minimum(size - 1.0).long() - first, (centre - low).float()


def crop_labels(labels: np.ndarray, crops: Crops, row: int, side: int) -> np.ndarray:
    """The labels (side, side) of the crop of the image in this row, 255 where it shows no image; labels: (H, W) uint8.

    By nearest neighbours twice, as published: the labels are resized with the image, and their crop to this side.
    """
    (H, W), scaled = labels.shape, crops.scaled[row]
    pixel = np.floor((np.arange(side) + 0.5) * crops.size / side).astype(np.int64)
    y, x = (pixel - corner for corner in crops.corner[row])
    (h, w) = crops.shown[row]
    inside_y, inside_x = (y >= 0) & (y < h), (x >= 0) & (x < w)
    y, x = y[inside_y], x[inside_x]
    x = w - 1 - x if crops.flip[row] else x
    y, x = (one + first for one, first in zip((y, x), crops.box[row, :2], strict=True))
    y, x = (np.floor((one + 0.5) * n / m).astype(np.int64) for one, n, m in zip((y, x), (H, W), scaled, strict=True))
    found = np.full((side, side), IGNORE, dtype=np.uint8)
    found[np.ix_(inside_y, inside_x)] = labels[np.ix_(y, x)]
    return found


def jitter(images: Tensor, order: Tensor, amounts: Tensor, lumas: Tensor, adjusted: Sequence[int]) -> Tensor:
    """Each image's operations in its own order. images: (B, 3, H, W) in 0..1; order and amounts, on the host, (B, 4).

    lumas: (B,) the luma about which an image's contrast changes: that of the whole photograph, of which these may be
    parts. Brightness changes it, too.
    """
    images, lumas = images.clone(), lumas.to(images.device, non_blocking=True)[:, None, None, None]
    for turn in order.unbind(dim=1):
        for kind in adjusted:
            of = torch.nonzero(turn == kind)[:, 0]
            if not len(of):
                continue
            amount = amounts[of, kind].to(images.device, non_blocking=True)[:, None, None, None]
            of = of.to(images.device, non_blocking=True)
            images[of] = ADJUST[kind](images[of], amount, lumas[of])
            if ADJUST[kind] is brightness:
                lumas = lumas.index_put((of,), lumas[of] * amount)
    return images


def brightness(images: Tensor, factor: Tensor, grey: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor, grey: Tensor) -> Tensor:
    return (grey + factor * (images - grey)).clamp(0, 1)


def saturation(images: Tensor, factor: Tensor, grey: Tensor) -> Tensor:
    return contrast(images, factor, luma(images))


def hue(images: Tensor, shift: Tensor, grey: Tensor) -> Tensor:
    """Turns the hue by `shift` of a whole circle; brightest and darkest channel (HSV's value and chroma) stay."""
    R, G, B = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    sixth = torch.where(value == R, G - B, torch.where(value == G, B - R + 2 * chroma, R - G + 4 * chroma))
    sixth = sixth / chroma.clamp(min=torch.finfo(chroma.dtype).tiny) + 6 * shift  # of the circle, from red
    apart = (torch.tensor([3.0, 1.0, -1.0], device=images.device)[:, None, None] + sixth).abs_()
    apart = torch.minimum(apart, (apart - 6).abs_())  # of R, G, B from where they are darkest, on the circle
    return value - chroma * (2 - apart).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA, device=images.device))[:, None]


ADJUST: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)
"""Of images (B, 3, H, W) in 0..1, how much, and about which luma contrast turns (which it alone uses), (B, 1, 1, 1)."""


def valid_mask(regions: Tensor, size: int, out_size: int) -> Tensor:
    """Regions (B, 4) in crops of side `size` -> (B, 1, out_size, out_size), 1 inside, for maps of another size.

    A region's edges are scaled and rounded down.
    """
    edges = (regions * out_size) // size
    steps = torch.arange(out_size, device=regions.device)
    inside_x = (steps >= edges[:, 0, None]) & (steps < edges[:, 2, None])
    inside_y = (steps >= edges[:, 1, None]) & (steps < edges[:, 3, None])
    return (inside_y[:, None, :, None] & inside_x[:, None, None, :]).float()
