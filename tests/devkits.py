"""A devkit that is small, and has the paper's splits; and what bad ones are refused with."""

import shutil
from collections.abc import Callable
from pathlib import Path

from semformer.data.shapes import make_shapes
from semformer.errors import UserError


def paper_splits(folder: Path) -> Path:
    """Four training images, two to measure on: enough for keys, and for every count that does not depend on data."""
    make_shapes(folder, train=4, val=2, size=48)
    splits = folder / "VOC2012" / "ImageSets" / "Segmentation"
    (splits / "trainaug.txt").write_text((splits / "train.txt").read_text())
    return folder


def few_photographs(sample: Path, folder: Path, *, train: int, val: int) -> Path:
    """The first photographs of a devkit, as one with the paper's splits: `train` to learn from; `val` of these, and as
    many others, to measure on."""
    devkit = folder / "VOC2012"
    splits = devkit / "ImageSets" / "Segmentation"
    splits.mkdir(parents=True)
    learnt, measured = (
        (sample / f"ImageSets/Segmentation/{name}.txt").read_text().split() for name in ("train", "val")
    )
    for name, ids in (("trainaug", learnt[:train]), ("train", learnt[:val]), ("val", measured[:val])):
        (splits / f"{name}.txt").write_text("\n".join(ids))
        for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
            (devkit / part).mkdir(exist_ok=True)
            for image in ids:
                shutil.copy(sample / part / f"{image}.{suffix}", devkit / part)
    return folder


def refused(action: Callable[[], object], *texts: str | Path) -> None:
    """`action` raises UserError whose text contains all of `texts`."""
    try:
        action()
    except UserError as error:
        told = str(error)
    else:
        raise AssertionError("it was not refused")
    for text in texts:
        assert str(text) in told
