"""Stage cams: multi-scale activation maps of every image of a split, un-thresholded (sections 3.3.1 and 3.3.3)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from semformer import memory
from semformer.config import DRAWABLE, Config
from semformer.data.pack import Packed
from semformer.errors import UserError, first_line
from semformer.inference import STRIDE, Maps, class_cosines, maps_of_every_kind, multi_scale_maps
from semformer.models.segmentor import Segmentor
from semformer.stages import segmentor as segmentor_stage
from semformer.stages.context import Context
from semformer.stages.shards import Tensors, make_shards, of_one_size, tensors_are_whole, write_tensors
from semformer.store import Artifact

COMPARED = 64
"""Images with several classes whose maps are compared, spread over the split."""
FILES, PICTURES = "maps-{:05d}.safetensors", "pictures.safetensors"
FOREIGN = "foreign"
"""The kind of maps of which nothing else is known."""


def run(config: Config, data: Packed, segmentor: Artifact | None, ctx: Context) -> dict[str, Any]:
    """Makes `maps-*.safetensors` (float16), and all kinds of maps of the first images, to be drawn.

    Returns the number of images, and how alike the maps of an image's classes are, in the mean over images. With
    `config.cams.folder`, the maps are those in it.
    """
    folder, pictures, cosine = config.cams.folder, dict[str, Tensor](), dict[str, float]()
    drawn = range(min(DRAWABLE, len(data)))
    if folder:
        _make(data, ctx, lambda rows: [foreign_maps(Path(folder), data, i) for i in rows])
        ctx.have_read(config.cams)
        pictures = {f"{i}/{FOREIGN}": foreign_maps(Path(folder), data, i).full.half() for i in drawn}
    else:
        model = segmentor_stage.load(config.segmentor, cast(Artifact, segmentor), device=ctx.device)
        _make(data, ctx, lambda rows: memory.in_parts(lambda part: _maps(model, data, part, config), rows))
        for i in drawn:
            kinds = maps_of_every_kind(model, data.pixels(i), data.objects(i), config.cams, precision=config.precision)
            pictures |= {f"{i}/{kind}": maps.half().contiguous() for kind, maps in kinds.items()}
        cosine = _mean_cosines(model, data, config)
    save_file(pictures, ctx.out / PICTURES)
    return {"images": len(data), "cosine": cosine}


def _make(data: Packed, ctx: Context, maps_of: Callable[[Sequence[int]], list[Maps]]) -> None:
    """The files of the maps, in the order of the split; the device goes on while one is written."""
    order = {image_id: i for i, image_id in enumerate(data.ids)}

    def make(rows: list[int]) -> list[tuple[str, Maps]]:
        return list(zip([data.ids[i] for i in rows], maps_of(rows), strict=True))

    def write(path: Path, found: Iterator[tuple[str, Maps]]) -> None:
        tensors: dict[str, Tensor] = {}
        ids = []
        for image_id, maps in found:
            ids.append(image_id)
            tensors[f"{image_id}/classes"] = torch.from_numpy(maps.classes)
            tensors[f"{image_id}/strided"] = maps.strided.half().cpu()
            tensors[f"{image_id}/full"] = maps.full.half().cpu().contiguous()
        write_tensors(path, tensors, sorted(ids, key=order.__getitem__))

    make_shards("cams", data, ctx, FILES, make, write, tensors_are_whole, groups=partial(of_one_size, data))


def foreign_maps(folder: Path, data: Packed, i: int) -> Maps:
    """The maps of image i from ID.npy: floats in 0..1, (C, H, W) with a channel for each present object class of the
    image, ascending, (K - 1, H, W) with one for every object class, or (K, H, W) with the background's before them.

    Raises UserError that names the file for anything else.
    """
    path, classes, size = folder / f"{data.ids[i]}.npy", data.objects(i), tuple(data.sizes[i])
    try:
        maps = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {path.name}, the maps of an image of split {data.name!r}") from None
    except Exception as error:  # each damage in its own way
        raise UserError(
            f"{path} holds no array of numbers ({first_line(error)}): write it with numpy.save, no pickle"
        ) from error
    if not isinstance(maps, np.ndarray):
        raise UserError(f"{path} holds several arrays: write one with numpy.save, not numpy.savez")
    n_objects = len(data.classes) - 1
    channels = {n_objects + 1: classes, n_objects: classes - 1, len(classes): np.arange(len(classes))}
    if maps.ndim != 3 or maps.shape[1:] != size or len(maps) not in channels:
        raise UserError(
            f"{path} has the shape {maps.shape}; the maps of its image must be (C, {size[0]}, {size[1]}), with C = "
            f"{len(classes)} (its classes), {n_objects} (all objects) or {n_objects + 1} (and the background first)"
        )
    if maps.dtype.kind not in "fiub":
        raise UserError(f"{path} holds {maps.dtype}, no real numbers")
    full = torch.from_numpy(maps[channels[len(maps)]].astype(np.float32))
    if not (full.isfinite() & (full >= 0) & (full <= 1)).all():
        raise UserError(f"{path} has values that are not within 0..1: divide its maps by their maximum, without NaN")
    strided = F.interpolate(full[:, None], [-(-side // STRIDE) for side in size], mode="bilinear", antialias=True)
    return Maps(classes, strided[:, 0], full)


def _mean_cosines(model: Segmentor, data: Packed, config: Config) -> dict[str, float]:
    """By kind of map; nothing where no image has two classes. Raises UserError for maps that are NaN."""
    several = [i for i in range(len(data)) if len(data.objects(i)) > 1]
    compared = several[:: -(-len(several) // COMPARED)] if several else []
    found = [
        class_cosines(model, data.pixels(i), data.objects(i), config.cams, precision=config.precision) for i in compared
    ]
    for i, one in zip(compared, found, strict=True):
        if not np.isfinite(list(one.values())).all():
            raise UserError(f"{data.ids[i]}: the activation maps contain NaN")
    return {kind: float(np.mean([one[kind] for one in found])) for kind in (found[0] if found else ())}


def _maps(model: Segmentor, data: Packed, rows: Sequence[int], config: Config) -> list[Maps]:
    """Of images of one size."""
    images, classes = [data.pixels(i) for i in rows], [data.objects(i) for i in rows]
    return multi_scale_maps(model, images, classes, config.cams, precision=config.precision)


class MapFiles(Tensors):
    """The maps of a cams artifact by image id, one image in memory at a time."""

    def __init__(self, artifact: Artifact):
        super().__init__(artifact, prefix=FILES.partition("{")[0])

    def __getitem__(self, image_id: str) -> Maps:
        """Raises UserError where there are none."""
        classes, strided, full = self.read(image_id, "classes", "strided", "full")
        return Maps(classes.numpy(), strided.float(), full.float())
