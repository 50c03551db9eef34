"""Stage deeplab: train DeepLabV1 on pseudo masks, or on pixel masks where the config says so.

Legend: B images, K classes (0 is background), S side of a crop.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from semformer.config import Config, DeeplabConfig
from semformer.data.augment import segmentor_crops
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.data.voc import IGNORE
from semformer.errors import UserError
from semformer.models.deeplab import OUTPUT_STRIDE, DeepLab
from semformer.models.features import build_features, check_features
from semformer.models.vit import check_tiles, is_plain_vit
from semformer.stages.context import Context
from semformer.stages.shards import label_maps_in
from semformer.stages.training import compiled, train
from semformer.store import Artifact
from semformer.weights import load_published, load_state

WEIGHTS = "deeplab.safetensors"


def run(config: Config, data: Packed, pseudo_masks: Artifact | None, ctx: Context) -> dict[str, Any]:
    """Makes `deeplab.safetensors`. Returns the loss per epoch, and the names of the classes.

    Raises UserError where no pixel of the masks has a label.
    """
    options = config.deeplab
    torch.manual_seed(config.seed)
    model = build(options, n_classes=len(data.classes)).to(ctx.device)
    if options.checkpoint:
        load_published(model, "deeplab", options.checkpoint)
    ctx.have_read(options)
    history: dict[str, list[float]] = {}
    if not options.checkpoint:
        masks = label_maps_in(pseudo_masks) if pseudo_masks else None

        def label_map(i: int) -> np.ndarray:
            return masks[data.ids[i]] if masks else data.mask(i)

        if not any((label_map(i) != IGNORE).any() for i in range(len(data))):
            raise UserError(
                f"deeplab: every pixel of the masks of split {data.name!r} is ignored ({IGNORE}): give it masks that "
                "have labels"
            )
        network = compiled(model, options)
        history = train(
            model,
            stage="deeplab",
            config=options,
            loader=Loader(
                data,
                segmentor_crops,
                options,
                seed=config.seed,
                device=ctx.device,
                label_map=label_map,
                label_side=options.image_size,
            ),
            gradients=lambda batch, _, pieces: gradients(network, batch, pieces),
            pretrained=model.features if options.starts_pretrained else None,
            precision=config.precision,
            seed=config.seed,
            ctx=ctx,
        )
    save_file(model.state_dict(), ctx.out / WEIGHTS)
    return {"history": history, "classes": list(data.classes)}


def gradients(model: DeepLab, batch: Batch, pieces: int = 1) -> dict[str, Tensor]:
    """Adds the gradients of a batch's loss, the cross entropy's mean over its labelled pixels; returns it."""
    assert batch.label_maps is not None
    count = (batch.label_maps != IGNORE).sum().clamp(min=1)
    total = torch.zeros((), device=batch.images.device)
    for images, labels in zip(batch.images.chunk(pieces), batch.label_maps.chunk(pieces), strict=True):
        logits = F.interpolate(model(images).float(), labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / count
        loss.backward()
        total += loss.detach()
    return {"total": total}


def check(options: DeeplabConfig) -> None:
    """Raises UserError for a backbone or an image size with which there is no network."""
    pretrained = options.pretrained and not options.checkpoint
    check_features(
        options.backbone, OUTPUT_STRIDE, pretrained=pretrained, weights=options.weights_file, field="deeplab"
    )
    if is_plain_vit(options.backbone):
        check_tiles(options.backbone, options.image_size, "deeplab.image_size")


def build(options: DeeplabConfig, *, n_classes: int) -> DeepLab:
    """The untrained network of a config."""
    features = build_features(
        options.backbone,
        output_stride=OUTPUT_STRIDE,
        pretrained=options.pretrained and not options.checkpoint,
        weights=options.weights_file,
        image_size=options.image_size,
        field="deeplab",
    )
    features.freeze("statistics" if options.frozen_statistics else "nothing")
    return DeepLab(features, n_classes=n_classes, width=options.head_width, dilation=options.head_dilation)


def load(options: DeeplabConfig, artifact: Artifact, *, device: torch.device) -> DeepLab:
    """The trained network, in evaluation mode and frozen."""
    state = load_file(artifact.file(WEIGHTS))
    model = build(options.without_weights(), n_classes=len(state["fc8_seg_conv2.bias"]))
    load_state(model, state, str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
