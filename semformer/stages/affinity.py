"""Stage affinity: train AffinityNet to tell which near pixels are of one label.

Legend: B images, H W pixels, h w pixels of the edge or feature map.
"""

from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from semformer import losses
from semformer.config import AffinityConfig, Config
from semformer.data.augment import segmentor_crops
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.data.voc import IGNORE
from semformer.errors import UserError
from semformer.models.affinity import FEATURE_STRIDES, STRIDES, AffinityNet, EdgeNet, FeatureNet
from semformer.models.features import build_features, check_features
from semformer.random_walk import edge_affinities, feature_affinities, seconds, shifted
from semformer.stages.context import Context
from semformer.stages.shards import label_maps_in
from semformer.stages.training import compiled, train
from semformer.store import Artifact
from semformer.weights import load_state

WEIGHTS = "affinity.safetensors"


def run(config: Config, data: Packed, affinity_labels: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `affinity.safetensors`. Returns the loss terms per epoch."""
    options = config.affinity
    torch.manual_seed(config.seed)
    model = build(options).to(ctx.device)
    ctx.have_read(options)
    label_maps = label_maps_in(affinity_labels)
    loader = Loader(
        data,
        segmentor_crops,
        options,
        seed=config.seed,
        device=ctx.device,
        label_map=lambda i: label_maps[data.ids[i]],
        label_side=options.image_size // STRIDES[options.variant],
    )
    network = compiled(model, options)
    history = train(
        model,
        stage="affinity",
        config=options,
        loader=loader,
        gradients=lambda batch, _, pieces: gradients(network, batch, options, pieces),
        pretrained=model.features if options.starts_pretrained else None,
        precision=config.precision,
        seed=config.seed,
        ctx=ctx,
    )
    save_file(model.state_dict(), ctx.out / WEIGHTS)
    return {"history": history}


class Kinds(NamedTuple):
    """Which pairs (B, pairs, h, w) are both background, both of one object class, and of two labels."""

    background: Tensor
    objects: Tensor
    different: Tensor

    @classmethod
    def of(cls, label_maps: Tensor, radius: int) -> "Kinds":
        """label_maps: (B, H, W) class indices, 255 = ignored."""
        first, second = shifted(label_maps, radius, 0, 0)[:, None], seconds(label_maps, radius)
        known = (first != IGNORE) & (second != IGNORE)
        alike = known & (first == second)
        return cls(alike & (first == 0), alike & (first != 0), known & ~alike)


def gradients(model: AffinityNet, batch: Batch, options: AffinityConfig, pieces: int = 1) -> dict[str, Tensor]:
    """Adds the gradients of a batch's loss; returns it. Each kind of pairs counts by its number in the whole batch."""
    assert batch.label_maps is not None
    kinds = Kinds.of(batch.label_maps, options.radius)
    counts = [kind.sum() + losses.AFFINITY_EPS for kind in kinds]
    total = torch.zeros((), device=batch.images.device)
    for images, *parts in zip(batch.images.chunk(pieces), *(kind.chunk(pieces) for kind in kinds), strict=True):
        weights = [part / count for part, count in zip(parts, counts, strict=True)]
        loss = losses.affinity(affinities(model, images, options), *weights)
        loss.backward()
        total += loss.detach()
    return {"total": total}


def affinities(model: AffinityNet, images: Tensor, options: AffinityConfig) -> Tensor:
    """Of the pairs of images (B, 3, H, W): (B, pairs, h - (radius - 1), w - 2 (radius - 1))."""
    found = model(images).float()
    if options.variant == "edge":
        return edge_affinities(found.sigmoid(), options.radius)
    return feature_affinities(found, options.radius)


def check(options: AffinityConfig) -> None:
    """Raises UserError for a backbone or an image size with which there is no network."""
    wanted = FEATURE_STRIDES[options.variant]
    _, strides = check_features(
        options.backbone,
        wanted[-1],
        pretrained=options.pretrained,
        weights=options.weights_file,
        field="affinity",
    )
    if strides[-len(wanted) :] != wanted:
        raise UserError(
            f"affinity.backbone {options.backbone} has features of the strides {', '.join(map(str, strides))}; variant "
            f"{options.variant} needs {', '.join(map(str, wanted))}, as resnet50 has"
        )
    if options.image_size % wanted[-1]:
        raise UserError(f"affinity.image_size = {options.image_size} is no multiple of {wanted[-1]}")
    side, stride = options.image_size // STRIDES[options.variant], STRIDES[options.variant]
    if side <= 2 * (options.radius - 1):
        raise UserError(
            f"affinity.radius = {options.radius}: no pixel of a crop has all its neighbours, {options.radius - 1} to "
            f"each side, in a map of {side}x{side} (affinity.image_size = {options.image_size} by {stride}): "
            f"{(side + 1) // 2} is the most"
        )


def build(options: AffinityConfig) -> AffinityNet:
    """The untrained network of a config."""
    variant = options.variant
    features = build_features(
        options.backbone,
        output_stride=FEATURE_STRIDES[variant][-1],
        dilated=variant == "feature",
        pretrained=options.pretrained,
        weights=options.weights_file,
        image_size=options.image_size,
        field="affinity",
    )
    features.freeze("all" if options.frozen else "nothing")
    return (EdgeNet if variant == "edge" else FeatureNet)(features)


def load(options: AffinityConfig, artifact: Artifact, *, device: torch.device) -> AffinityNet:
    """The trained network, in evaluation mode and frozen."""
    model = build(options.without_weights())
    load_state(model, load_file(artifact.file(WEIGHTS)), str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
