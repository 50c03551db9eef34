"""A split decoded once, as Arrow IPC files that are memory-mapped: opening one reads nothing, and all trials of a
machine share its pages.

images.arrow  a row an image: id, height, width, luma (its mean, 0..1), and data: RGB pixels, or the image's file
masks.arrow   a row an image: id, height, width, and data: class indices, 255 = ignore

Masks are a file, and an artifact, of their own: a stage that may not see them is not given it.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from semformer.data.voc import Split, image_size, read_bytes, read_image
from semformer.errors import UserError

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # of torch, and nobody writes
LUMA = (0.2989, 0.587, 0.114)
"""Shares of R, G and B in what counts as grey."""
MOST_DECODED = 24 * 2**30
"""Bytes of pixels up to which they are kept decoded: four times those of VOC's trainaug, a third of COCO's."""
ROWS = 64
"""Of a record batch: as many images are in memory at once while a pack is written."""
Kind = Literal["images", "masks"]
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("luma", pa.float32()),
        ("data", pa.large_binary()),
    ]
)


def write_pack(split: Split, kind: Kind, path: Path, progress: Callable[[int, int], None]) -> None:
    """Decode the images or the masks of a split into a file, on all cores; `progress` is told (done, of how many).

    Raises UserError for a file that cannot be used, and for files that are no longer those of the split's digest.
    """
    decoded = kind == "masks" or _bytes_decoded(split) <= MOST_DECODED
    schema = SCHEMA.with_metadata({"kind": kind, "decoded": str(decoded)})

    def row(i: int) -> tuple[bytes, dict[str, Any]]:
        """The sha256 of the row's file, and the row."""
        content = read_bytes(split.image_path(i) if kind == "images" else split.mask_path(i))
        if kind == "images":
            pixels = np.asarray(read_image(split.image_path(i), content))
            luma = float(pixels.reshape(-1, 3).mean(axis=0) @ LUMA) / 255
        else:
            pixels, luma = split.mask(i), 0.0
        height, width = pixels.shape[:2]
        data = pixels.tobytes() if decoded else content
        row = {"id": split.ids[i], "height": height, "width": width, "luma": luma, "data": data}
        return hashlib.sha256(content).digest(), row

    hashes: list[bytes] = []
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
        ThreadPoolExecutor(os.cpu_count()) as cores,
    ):
        for rows in split.batches(ROWS):
            read = list(cores.map(row, rows))
            hashes += [digest for digest, _ in read]
            writer.write(pa.RecordBatch.from_pylist([values for _, values in read], schema))
            progress(len(hashes), len(split))
    if split.digest_of(hashes) != (split.digest if kind == "images" else split.mask_digest):
        raise UserError(f"files of split {split.name!r} in {split.folder} have changed since this began: start again")


class Table:
    """The rows of a file that `write_pack` wrote; its pixels are read when they are looked at, and not copied."""

    def __init__(self, path: Path):
        self._file = np.memmap(path, np.uint8, mode="r")  # a writable map, even a private one, counts as memory in use
        table = pa.ipc.open_file(pa.py_buffer(self._file)).read_all()
        self.decoded = table.schema.metadata[b"decoded"] == b"True"
        self.ids = tuple(table["id"].to_pylist())
        self.sizes = np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1).astype(np.int64)
        self.luma = table["luma"].to_numpy()
        self._bounds = np.concatenate([self._places(chunk) for chunk in table["data"].chunks])

    def _places(self, chunk: pa.LargeBinaryArray) -> np.ndarray:
        """(rows, 2): where each row's data begins and ends in the file (pyarrow's own way to a row copies it)."""
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        return np.stack([ends[:-1], ends[1:]], axis=1) + (data.address - self._file.ctypes.data)

    def data(self, i: int) -> np.ndarray:
        first, last = self._bounds[i]
        return self._file[first:last]


@dataclass(frozen=True, eq=False)
class Packed(Split):
    """A split with its images and masks from packs. Without a pack, an image is read from its file, but no mask is."""

    images: Table | None = None
    masks: Table | None = None

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2), height and width of the images in pixels."""
        return self._images.sizes

    @property
    def luma(self) -> np.ndarray:
        """(n,), the mean of each image in 0..1."""
        return self._images.luma

    @property
    def decoded(self) -> bool:
        """Whether `pixels` has nothing to decode."""
        return self._images.decoded

    def pixels(self, i: int) -> np.ndarray:
        if self.images is None:
            return super().pixels(i)
        data = self.images.data(i)
        if self.images.decoded:
            return data.reshape(*self.images.sizes[i], 3)
        return np.array(read_image(self.image_path(i), data.tobytes()))

    def mask(self, i: int) -> np.ndarray:
        if self.masks is None:
            raise RuntimeError(f"split {self.name!r} was opened without its masks: this stage declares none")
        return self.masks.data(i).reshape(*self.masks.sizes[i])

    @property
    def _images(self) -> Table:
        if self.images is None:
            raise RuntimeError(f"split {self.name!r} was opened without its images")
        return self.images


def _bytes_decoded(split: Split) -> int:
    def count(i: int) -> int:
        width, height = image_size(split.image_path(i))
        return 3 * width * height

    with ThreadPoolExecutor(os.cpu_count()) as cores:
        return sum(cores.map(count, range(len(split))))
