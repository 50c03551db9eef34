"""Stage cams: multi-scale activation maps of every image of a split, un-thresholded (sections 3.3.1 and 3.3.3)."""

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semformer.config import DRAWABLE, Config
from semformer.data.voc import Split
from semformer.inference import MAP_KINDS, Maps, multi_scale_maps
from semformer.models.segmentor import Segmentor
from semformer.stages import segmentor as segmentor_stage
from semformer.stages.context import Context, Progress
from semformer.store import Artifact

SHARD = 256
"""Images per file."""
PICTURES = "pictures.safetensors"


def run(config: Config, data: Split, segmentor: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `maps-*.safetensors` (float16), and all kinds of maps of the first images, to be drawn."""
    model = segmentor_stage.load(config.segmentor, segmentor, device=ctx.device)
    started = time.monotonic()
    shard: dict[str, Tensor] = {}
    for i, image_id in enumerate(data.ids):
        maps = multi_scale_maps(model, data.image(i), data.objects(i), config.cams, precision=config.precision)
        shard[f"{image_id}/classes"] = torch.from_numpy(maps.classes)
        shard[f"{image_id}/strided"] = maps.strided.half().cpu()
        shard[f"{image_id}/full"] = maps.full.half().cpu().contiguous()
        done = i + 1
        if done % SHARD == 0 or done == len(data):
            ids = data.ids[i // SHARD * SHARD : done]
            save_file(shard, ctx.out / f"maps-{i // SHARD:05d}.safetensors", metadata={"ids": json.dumps(ids)})
            shard = {}
            ctx.check()
        rate = done / (time.monotonic() - started)
        ctx.progress(Progress("cams", done, len(data), images_per_second=rate, seconds_left=(len(data) - done) / rate))
    save_file(_maps_to_draw(model, data, config), ctx.out / PICTURES)
    return {"images": len(data)}


def _maps_to_draw(model: Segmentor, data: Split, config: Config) -> dict[str, Tensor]:
    tensors = {}
    for i in range(min(DRAWABLE, len(data))):
        for kind in MAP_KINDS:
            options = config.cams.model_copy(update={"final_map": kind})
            maps = multi_scale_maps(model, data.image(i), data.objects(i), options, precision=config.precision)
            tensors[f"{i}/{kind}"] = maps.full.half().cpu().contiguous()
    return tensors


def read_maps(artifact: Artifact) -> Iterator[tuple[str, Maps]]:
    """(image id, maps) of a cams artifact in the split's order, one image in memory at a time."""
    for name in sorted(name for name in artifact.files if name.startswith("maps-")):
        with safe_open(artifact.file(name), framework="pt") as shard:
            for image_id in json.loads(shard.metadata()["ids"]):
                parts = {part: shard.get_tensor(f"{image_id}/{part}") for part in ("classes", "strided", "full")}
                yield image_id, Maps(parts["classes"].numpy(), parts["strided"].float(), parts["full"].float())
