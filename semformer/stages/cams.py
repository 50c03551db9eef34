"""Stage cams: multi-scale activation maps of every image of a split, un-thresholded (sections 3.3.1 and 3.3.3)."""

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semformer import memory
from semformer.config import DRAWABLE, Config
from semformer.data.pack import Packed
from semformer.errors import UserError
from semformer.inference import Maps, class_cosines, maps_of_every_kind, multi_scale_maps
from semformer.models.segmentor import Segmentor
from semformer.stages import segmentor as segmentor_stage
from semformer.stages.context import Context, Progress
from semformer.store import Artifact

SHARD = 256
"""Images per file."""
TOGETHER = 8
"""Images of one size that go through the network together, at most."""
COMPARED = 64
"""Images with several classes whose maps are compared, spread over the split."""
PICTURES = "pictures.safetensors"


def run(config: Config, data: Packed, segmentor: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `maps-*.safetensors` (float16), and all kinds of maps of the first images, to be drawn.

    Returns the number of images, and how alike the maps of an image's classes are, in the mean over images.
    """
    model = segmentor_stage.load(config.segmentor, segmentor, device=ctx.device)
    started, done = time.monotonic(), 0
    with ThreadPoolExecutor(1) as writer:  # which waits for the device, so that this thread need not
        pending: deque[Future] = deque()
        for number, rows in enumerate(data.batches(SHARD)):
            shard: dict[str, Tensor] = {}
            for together in of_one_size(data, rows):
                found = _maps(model, data, together, config)
                pending.append(writer.submit(_keep, shard, [data.ids[i] for i in together], found))
                if len(pending) > 2:
                    pending.popleft().result()
                done += len(together)
                ctx.progress(Progress.of_images("cams", done, len(data), started))
            names = {"ids": json.dumps([data.ids[i] for i in rows])}
            pending.append(writer.submit(save_file, shard, ctx.out / f"maps-{number:05d}.safetensors", names))
            ctx.check()
        for one in pending:
            one.result()
    pictures: dict[str, Tensor] = {}
    for i in range(min(DRAWABLE, len(data))):
        drawn = maps_of_every_kind(model, data.pixels(i), data.objects(i), config.cams, precision=config.precision)
        pictures |= {f"{i}/{kind}": maps.half().contiguous() for kind, maps in drawn.items()}
    save_file(pictures, ctx.out / PICTURES)
    return {"images": len(data), "cosine": _mean_cosines(model, data, config)}


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


def of_one_size(data: Packed, rows: Sequence[int]) -> Iterator[list[int]]:
    """The rows of a split in groups of images of one size, of at most `TOGETHER`."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i in rows:
        group = by_size.setdefault(tuple(data.sizes[i]), [])
        group.append(i)
        if len(group) == TOGETHER:
            yield by_size.pop(tuple(data.sizes[i]))
    yield from by_size.values()


def _maps(model: Segmentor, data: Packed, rows: Sequence[int], config: Config) -> list[Maps]:
    """Of images of one size; where they do not fit into memory together, of fewer at a time."""
    images, classes = [data.pixels(i) for i in rows], [data.objects(i) for i in rows]
    try:
        return multi_scale_maps(model, images, classes, config.cams, precision=config.precision)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not memory.is_exhausted(error):
            raise
    half = len(rows) // 2
    return [maps for part in (rows[:half], rows[half:]) for maps in _maps(model, data, part, config)]


def _keep(shard: dict[str, Tensor], ids: list[str], found: list[Maps]) -> None:
    for image_id, maps in zip(ids, found, strict=True):
        shard[f"{image_id}/classes"] = torch.from_numpy(maps.classes)
        shard[f"{image_id}/strided"] = maps.strided.half().cpu()
        shard[f"{image_id}/full"] = maps.full.half().cpu().contiguous()


def read_maps(artifact: Artifact) -> Iterator[tuple[str, Maps]]:
    """(image id, maps) of a cams artifact in the split's order, one image in memory at a time."""
    for name in sorted(name for name in artifact.files if name.startswith("maps-")):
        with safe_open(artifact.file(name), framework="pt") as shard:
            for image_id in json.loads(shard.metadata()["ids"]):
                parts = {part: shard.get_tensor(f"{image_id}/{part}") for part in ("classes", "strided", "full")}
                yield image_id, Maps(parts["classes"].numpy(), parts["strided"].float(), parts["full"].float())
