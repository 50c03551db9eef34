"""Label maps that a stage makes of images: zips of PNGs in VOC's palette, an image an entry."""

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np
from PIL import Image

from semformer.data.voc import voc_palette
from semformer.errors import UserError


class LabelMaps:
    """The label maps of files of `write_label_maps`, by image id; threads may read them at once."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._zip_of: dict[str, ZipFile] = {}
        for path in paths:
            file = ZipFile(path)
            self._zip_of |= dict.fromkeys((name.removesuffix(".png") for name in file.namelist()), file)

    def __iter__(self) -> Iterator[str]:
        """The ids, in the order in which they were written."""
        return iter(self._zip_of)

    def __getitem__(self, image_id: str) -> np.ndarray:
        """(H, W) uint8: class indices, 255 = ignored. Raises UserError where there is none, or a damaged one."""
        if image_id not in self._zip_of:
            raise UserError(f"{', '.join(map(str, self._paths))} hold no label map of {image_id}")
        try:
            with Image.open(BytesIO(self._zip_of[image_id].read(f"{image_id}.png"))) as image:
                return np.array(image)
        except Exception as error:  # each damage in its own way
            raise UserError(f"the label map of {image_id} in {self._zip_of[image_id].filename} is damaged") from error


def write_label_maps(path: Path, label_maps: Iterable[tuple[str, np.ndarray]]) -> None:
    """Of (image id, (H, W) uint8 class indices and 255)."""
    with ZipFile(path, "w") as file:
        for image_id, labels in label_maps:
            file.writestr(ZipInfo(f"{image_id}.png"), png(labels))  # of no date: equal maps are equal files


def is_whole(path: Path) -> bool:
    """Whether a file of `write_label_maps` was written to its end."""
    try:
        with ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # each damage in its own way
        return False


def png(labels: np.ndarray) -> bytes:
    """(H, W) uint8 -> an indexed PNG in VOC's palette."""
    image, buffer = Image.fromarray(labels).convert("P"), BytesIO()
    image.putpalette(voc_palette())
    image.save(buffer, format="png")
    return buffer.getvalue()
