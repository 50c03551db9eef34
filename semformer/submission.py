"""What PASCAL VOC's test server takes: the label maps of a trained DeepLab, as PNGs and in an archive.

    results/VOC2012/Segmentation/comp6_test_cls/<id>.png    one an image: class indices in VOC's palette
    results.tar.gz                                          the same

comp6 is the server's name for networks that have learnt from more than VOC's images, as those of ImageNet have.
"""

import gzip
import os
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np

from semformer.config import Config
from semformer.data.label_maps import LabelMaps, png
from semformer.data.voc import Split, image_size, open_image, voc_palette
from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.stages.context import Progress
from semformer.stages.segmentation import kinds
from semformer.store import Store

RESULTS = "results/VOC2012/Segmentation/comp6_test_cls"
ARCHIVE = "results.tar.gz"


def kind_of(config: Config, name: str | None) -> str:
    """The kind of label maps that is asked for: by default several scales, with the CRF if there is one.

    Raises UserError for one that the config does not make.
    """
    there = kinds(config.segmentation)
    if name and name not in there:
        raise UserError(
            f"--kind {name}: with segmentation.crf.iterations = {config.segmentation.crf.iterations} there are the "
            f"kinds {', '.join(there)}"
        )
    return name or there[-1]


def check_trained(config: Config, keys: Mapping[str, StageKey], store: Store) -> None:
    """Raises UserError where the store has neither the label maps nor the network: nothing is trained on the way."""
    wanted = [keys["segmentation"], keys["deeplab"]]
    if not config.deeplab.checkpoint and not store.find_many(wanted, verify=True):
        raise UserError(
            f"{store.location} has no DeepLab of this config: train it with `semformer run --until deeplab` and the "
            "same --preset, --set, --weights, --caae-weights and --data"
        )


def make_room(out: Path) -> None:
    """An empty folder. Raises UserError where there is something else, or none can be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"--out {out} holds files: nothing is overwritten, so remove it or name another folder")
    except OSError as error:
        raise UserError(f"--out {out} cannot be a folder: {error.strerror}") from error


def write(
    label_maps: LabelMaps, kind: str, split: Split, out: Path, progress: Callable[[Progress], None]
) -> tuple[Path, Path]:
    """Fills an empty folder, once all is there and checked. Returns the folder of the PNGs, and the archive.

    Raises UserError where it cannot be written, and as `check` does.
    """
    started, out = time.monotonic(), out.resolve()
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        (partial / RESULTS).mkdir(parents=True)
        with tarfile.open(partial / ARCHIVE, "w:gz") as archive:
            for done, image_id in enumerate(split.ids, start=1):
                content = png(label_maps[f"{kind}/{image_id}"])
                member = tarfile.TarInfo(f"{RESULTS}/{image_id}.png")  # of no owner
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
                (partial / member.name).write_bytes(content)
                progress(Progress.of_images("submission", done, len(split), started))
        check(partial / ARCHIVE, split)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / RESULTS, out / ARCHIVE


def check(archive: Path, split: Split) -> None:
    """That an archive has one PNG of each image of a split, and nothing else.

    Each has the image's size, VOC's palette, and class indices alone. Raises UserError for the first that is otherwise.
    """
    missing = {f"{RESULTS}/{image_id}.png": i for i, image_id in enumerate(split.ids)}
    try:
        whole = BytesIO(gzip.decompress(archive.read_bytes()))  # with its checksum, which tarfile leaves unread
        with tarfile.open(fileobj=whole) as file:
            for member in file:
                i, content = missing.pop(member.name, None), file.extractfile(member)
                if i is None or content is None:
                    raise UserError(f"{archive.name} has {member.name}: of no image of {split.name}, or twice")
                _check_png(member.name, content.read(), image_size(split.image_path(i)), len(split.classes))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive.name} is damaged: {error}") from error
    if missing:
        raise UserError(f"{archive.name} has no {next(iter(missing))}, of an image of {split.name}")


def _check_png(name: str, content: bytes, size: tuple[int, int], n_classes: int) -> None:
    """size: width and height."""
    with open_image("label map", name, content) as image:
        if (image.format, image.mode) != ("PNG", "P") or image.getpalette() != voc_palette():
            raise UserError(f"{name} is no PNG in VOC's palette, but {image.format} of mode {image.mode}")
        labels = np.array(image)
    if image.size != size:
        raise UserError(f"{name} is {image.width}x{image.height} pixels, its image {size[0]}x{size[1]}")
    if labels.max() >= n_classes:
        raise UserError(f"{name} has the value {labels.max()}; allowed are the class indices 0 to {n_classes - 1}")
