"""Stage walk: the maps after a random walk along the affinities of their image.

Legend: B images of one size, C present object classes, H W pixels; h w: H W / 4, rounded up (variant edge), or / 8.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semformer import memory
from semformer.config import Config
from semformer.data.pack import Packed
from semformer.data.pixels import normalized, scaled
from semformer.errors import UserError
from semformer.inference import STRIDE, Maps
from semformer.models.affinity import FEATURE_STRIDES, STRIDES, AffinityNet
from semformer.precision import autocast
from semformer.random_walk import along_edges, along_features
from semformer.stages import affinity as affinity_stage
from semformer.stages.cams import MapFiles
from semformer.stages.context import Context
from semformer.stages.shards import Tensors, make_shards, of_one_size, tensors_are_whole, write_tensors
from semformer.store import Artifact


def run(config: Config, data: Packed, cams: Artifact, affinity: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `*.safetensors` (float16) of the maps (C, h, w), each of its image's own scale. Returns their stride."""
    maps, model = MapFiles(cams), affinity_stage.load(config.affinity, affinity, device=ctx.device)

    def make(rows: Sequence[int]) -> list[tuple[str, np.ndarray, Tensor]]:
        found = [maps[data.ids[i]] for i in rows]
        walked = walk(model, [data.pixels(i) for i in rows], found, config)
        return [
            (data.ids[i], one.classes, after.half().cpu().contiguous())
            for i, one, after in zip(rows, found, walked, strict=True)
        ]

    in_parts, groups = partial(memory.in_parts, make), partial(of_one_size, data)
    make_shards("walk", data, ctx, "{:05d}.safetensors", in_parts, _write, tensors_are_whole, groups=groups)
    return {"images": len(data), "stride": STRIDES[config.affinity.variant]}


@torch.inference_mode()
def walk(model: AffinityNet, images: list[np.ndarray], maps: list[Maps], config: Config) -> list[Tensor]:
    """Maps (C, h, w) of images (H, W, 3) uint8 of one size, after their walk."""
    options, device = config.walk, next(model.parameters()).device
    stride = STRIDES[config.affinity.variant]
    seen = see(model, images, config).to(device)
    h, w = seen.shape[-2:]
    most = max(1, *(len(one.classes) for one in maps))
    values = torch.zeros(len(maps), most, h, w, device=device)
    for value, one in zip(values, maps, strict=True):
        if len(one.classes):
            strided = one.strided if stride == STRIDE else F.avg_pool2d(one.full, stride, ceil_mode=True)
            value[: len(one.classes)] = strided.to(device)
    along = along_edges if config.affinity.variant == "edge" else along_features
    after = along(values, seen, radius=options.radius, beta=options.beta, steps=2**options.log2_steps)
    return [one[: len(of_image.classes)] for one, of_image in zip(after, maps, strict=True)]


@torch.inference_mode()
def see(model: AffinityNet, images: list[np.ndarray], config: Config) -> Tensor:
    """Edges (B, h, w) in 0..1, or features (B, 448, h, w), of images (H, W, 3) uint8 of one size.

    The mean of each image and its mirror, both padded with zeros at the bottom and the right, as published.
    """
    options, device = config.affinity, next(model.parameters()).device
    (H, W), stride, multiple = images[0].shape[:2], STRIDES[options.variant], FEATURE_STRIDES[options.variant][-1]
    height, width = (max(options.image_size, side) for side in scaled((H, W), 1, multiple))
    views = normalized(torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2))
    views = F.pad(torch.cat([views, views.flip(-1)]), (0, width - W, 0, height - H))
    with autocast(device, config.precision):
        found = model(views).float()
    image, mirrored = found[..., : -(-H // stride), : -(-W // stride)].chunk(2)
    mean = (image + mirrored.flip(-1)) / 2
    return mean.sigmoid() if options.variant == "edge" else mean


def _write(path: Path, walked: Iterator[tuple[str, np.ndarray, Tensor]]) -> None:
    tensors: dict[str, Tensor] = {}
    ids = []
    for image_id, classes, after in walked:
        ids.append(image_id)
        tensors |= {f"{image_id}/classes": torch.from_numpy(classes), f"{image_id}/walked": after}
    write_tensors(path, tensors, ids)


class WalkedFiles(Tensors):
    """The maps of a walk artifact by image id."""

    def __init__(self, artifact: Artifact):
        super().__init__(artifact)
        self.stride = int(artifact.info["stride"])

    def full(self, image_id: str, size: tuple[int, int], device: torch.device) -> tuple[np.ndarray, Tensor]:
        """The classes, and their maps (C, H, W) at the image's size: divided by one maximum over all of them.

        Raises UserError where there are none, or NaN.
        """
        classes, walked = self.read(image_id, "classes", "walked")
        if not walked.isfinite().all():
            raise UserError(f"{self.path} holds maps of {image_id} that are no finite numbers")
        if not len(classes):
            return classes.numpy(), torch.zeros(0, *size, device=device)
        enlarged = F.interpolate(walked[None].to(device).float(), scale_factor=self.stride, mode="bilinear")[0]
        full = enlarged[:, : size[0], : size[1]]
        return classes.numpy(), full / full.amax().clamp(min=torch.finfo(torch.float32).tiny)
