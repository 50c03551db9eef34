"""Batches of crops for training: a thread reads ahead, the device does the rest.

Legend: n images of a split, B of a batch, S side of a crop, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semformer.config import TrainingConfig
from semformer.data.augment import Crops, crop_labels, make_crops
from semformer.data.pack import Packed
from semformer.threads import in_order

AHEAD = 2
"""Batches that are read before they are asked for."""


@dataclass(frozen=True)
class Batch:
    """images (B, 3, S, S), normalised; regions (B, 4), what of a crop is image (see `Crops.regions`); Y (B, K) labels.

    Y stays on the host: what is decided by labels alone needs no answer from the device. label_maps: (B, s, s) uint8,
    class indices, 255 where there is none, if the loader has label maps.
    """

    images: Tensor
    regions: Tensor
    Y: Tensor
    label_maps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.Y)


class Loader:
    """The batches of an epoch, in an order that depends on seed and epoch alone; what is left over is dropped."""

    def __init__(
        self,
        data: Packed,
        crops: Callable[..., Crops],
        options: TrainingConfig,
        *,
        seed: int,
        device: torch.device,
        label_map: Callable[[int], np.ndarray] | None = None,
        label_side: int = 0,
    ):
        """crops: `caae_crops` or `segmentor_crops`, with the `options` that they take.

        label_map: of image i, (H, W) uint8; crops have them with a side of `label_side`.
        """
        self.data, self.crops, self.options, self.seed, self.device = data, crops, options, seed, device
        self.label_map, self.label_side = label_map, label_side
        self.batch_size = min(options.batch_size, len(data))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.data) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Raises UserError for an image that cannot be read."""
        crops = self.crops(self.data.sizes, self.options, seed=self.seed, epoch=epoch)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.data))
        batches = order[: len(self) * self.batch_size].reshape(-1, self.batch_size)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(torch.get_num_threads()) as decoders:
            run = map if self.data.decoded else decoders.map

            def read(rows: np.ndarray) -> tuple:
                return *self._read(crops, rows, run(self.data.pixels, rows)), self._label_maps(crops, rows)

            for parts in in_order(reader, read, batches, ahead=AHEAD):
                yield self._batch(crops, *parts)

    def _read(self, crops: Crops, rows: np.ndarray, pixels: Iterable[np.ndarray]) -> tuple:
        """The rows, their images on the device, and what tells when they have arrived there."""
        images = [cut(image, crops, row) for image, row in zip(pixels, rows, strict=True)]
        if self._copies is None:
            return rows, images, None
        sizes = [image.numel() for image in images]
        pinned = pack_flat(images, torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True))
        with torch.cuda.stream(self._copies):
            moved = pinned.to(self.device, non_blocking=True)
        parts = zip(moved.split(sizes), images, strict=True)
        return rows, [part.view(image.shape) for part, image in parts], self._copies.record_event()

    def _label_maps(self, crops: Crops, rows: np.ndarray) -> Tensor | None:
        if self.label_map is None:
            return None
        maps = torch.from_numpy(np.stack([crop_labels(self.label_map(i), crops, i, self.label_side) for i in rows]))
        return maps.pin_memory() if self.device.type == "cuda" else maps

    def _batch(
        self,
        crops: Crops,
        rows: np.ndarray,
        images: list[Tensor],
        arrived: torch.cuda.Event | None,
        label_maps: Tensor | None,
    ) -> Batch:
        if arrived:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            images[0].record_stream(stream)  # they share one block of memory
        return Batch(
            make_crops(images, torch.from_numpy(self.data.luma[rows]), crops, rows),
            torch.from_numpy(crops.regions[rows]).to(self.device, non_blocking=True),
            torch.from_numpy(self.data.labels[rows]),
            None if label_maps is None else label_maps.to(self.device, non_blocking=True),
        )


def cut(pixels: np.ndarray, crops: Crops, row: int) -> Tensor:
    """What a crop needs of its image's pixels (H, W, 3): a view of them."""
    top, left, height, width = crops.source[row]
    return torch.from_numpy(pixels[top : top + height, left : left + width])


def pack_flat(images: list[Tensor], out: Tensor) -> Tensor:
    """Copy images (H, W, 3), one after the other, into `out`, which is flat and as large as they are together."""
    for part, image in zip(out.split([image.numel() for image in images]), images, strict=True):
        part.view(image.shape).copy_(image)
    return out
