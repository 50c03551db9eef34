"""Stage pseudo_masks: label maps of the maps that have walked, by a fixed background threshold and the CRF.

Legend: C present object classes, H W pixels.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semformer import memory
from semformer.config import Config
from semformer.data.label_maps import write_label_maps
from semformer.data.pack import Packed
from semformer.data.voc import IGNORE, read_mask
from semformer.errors import UserError
from semformer.stages.affinity_labels import hard_labels, refiner
from semformer.stages.context import Context, Progress
from semformer.stages.shards import make_label_maps
from semformer.stages.walk import WalkedFiles
from semformer.store import Artifact


def run(config: Config, data: Packed, walk: Artifact | None, ctx: Context) -> dict[str, Any]:
    """Makes zips of PNGs. Returns which images failed, whose masks are 255 everywhere.

    Raises UserError that names the image of which no mask can be made, unless the config says to skip it, and where
    all fail. With `config.pseudo_masks.folder`, the masks are those in it.
    """
    options = config.pseudo_masks
    if options.folder:
        return _import(config, data, ctx)
    assert walk is not None
    maps = WalkedFiles(walk)

    def mask(i: int) -> np.ndarray:
        image = data.pixels(i)
        try:
            classes, full = maps.full(data.ids[i], image.shape[:2], ctx.device)
            return refiner(image, classes, options.crf, ctx.device)(hard_labels(full, options.threshold))
        except (UserError, RuntimeError) as error:
            if memory.is_exhausted(error):
                raise
            if not options.skip_failing:
                raise UserError(
                    f"no pseudo mask can be made of {data.ids[i]}: {error} (pseudo_masks.skip_failing=true goes on)"
                ) from error
            return np.full(image.shape[:2], IGNORE, dtype=np.uint8)

    made = make_label_maps("pseudo_masks", data, ctx, lambda i: {data.ids[i]: mask(i)})
    failed = [image_id for image_id in made if (made[image_id] == IGNORE).all()] if options.skip_failing else []
    if len(failed) == len(data):
        raise UserError(
            f"pseudo_masks: no mask can be made of any image of split {data.name!r}: "
            "pseudo_masks.skip_failing=false tells the reason of the first"
        )
    return {"images": len(data), "failed": failed}


def _import(config: Config, data: Packed, ctx: Context) -> dict[str, Any]:
    folder, started, note = Path(config.pseudo_masks.folder), time.monotonic(), ""

    def masks() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal note
        for i, image_id in enumerate(data.ids):
            mask = foreign_mask(folder, data, i)
            if not note and (unnamed := np.setdiff1d(mask, [0, IGNORE, *data.objects(i)])).size:
                note = f"masks have classes that labels lack, such as {data.classes[unnamed[0]]} in {image_id}"
            ctx.progress(Progress.of_images("pseudo_masks", i + 1, len(data), started, note=note))
            yield image_id, mask
            ctx.check()

    write_label_maps(ctx.out / "00000.zip", masks())
    ctx.have_read(config.pseudo_masks)
    return {"images": len(data), "failed": []}


def foreign_mask(folder: Path, data: Packed, i: int) -> np.ndarray:
    """The label map (H, W) of image i from ID.png, as pixel masks are. Classes that the image's labels lack stay.

    Raises UserError that names the file.
    """
    path = folder / f"{data.ids[i]}.png"
    if not path.exists():
        raise UserError(f"{folder} has no {path.name}, the mask of an image of split {data.name!r}")
    return read_mask(path, data.image_path(i), len(data.classes))
