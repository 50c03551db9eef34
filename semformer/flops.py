"""How much work a stage is, in floating-point operations: a multiplication and an addition are two.

Matrix products, convolutions and attention in closed form, so that plans of thousands of stages stay fast; the tests
hold it against torch's counter on real training steps. What a backward pass costs: as much as the forward pass for
the gradients of the inputs, and as much again for those of the weights.

Legend: K classes (0 is background), D class dimension, N patches, d token dimension, P patch side.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from semformer.config import DRAWABLE, CaaeConfig, Config, SegmentorConfig
from semformer.data.voc import Devkit, image_size, read_labels
from semformer.inference import MAP_KINDS
from semformer.models.vit import backbone_shape

LOOKED_AT = 32
"""Images of a split from which the mean size and the mean number of classes are taken."""
MLP_RATIO = 4
"""Of plain ViTs: hidden over token dimension."""


@dataclass(frozen=True)
class Images:
    """What decides the work on a split's images. width, height: mean, in pixels."""

    count: int
    width: int
    height: int
    classes_per_image: float
    """Mean number of present classes, with the background: the pairs of Eq. 7 and 8."""
    n_classes: int
    """K, with the background."""

    @classmethod
    def of(cls, devkit: Devkit, split: str) -> "Images":
        """Means of a sample. Raises UserError for a split that is missing or empty, and for unusable files."""
        ids = devkit.ids(split)
        sample = ids[:: math.ceil(len(ids) / LOOKED_AT)]
        width = height = classes = 0.0
        for image_id in sample:
            size = image_size(devkit.folder / "JPEGImages" / f"{image_id}.jpg")
            labels = read_labels(devkit.folder / "Annotations" / f"{image_id}.xml", devkit.classes)
            width += size[0] / len(sample)
            height += size[1] / len(sample)
            classes += float(labels.sum()) / len(sample)
        return cls(len(ids), round(width), round(height), classes, len(devkit.classes))


def stage_work(stage: str, config: Config, images: Images) -> float:
    """Floating-point operations of a stage on the split that it reads; for `evaluate`, which does none, pixels.

    0 where a network is imported.
    """
    if stage == "evaluate":
        return images.count * images.width * images.height
    if stage == "cams":
        return _cams(config, images)
    options, K = getattr(config, stage), images.n_classes
    trained_on = stage_passes(stage, config, images) * min(options.batch_size, images.count)
    if stage == "caae":
        return trained_on * caae_training(options, K)
    return trained_on * segmentor_training(options, config.caae, K, images.classes_per_image)


def stage_passes(stage: str, config: Config, images: Images) -> int:
    """How often a stage passes a batch through its networks: once a step of training, once a scale of an image."""
    if stage == "evaluate":
        return 0
    if stage == "cams":
        return images.count * len(config.cams.scales)
    options = getattr(config, stage)
    return 0 if options.checkpoint else options.epochs * (images.count // min(options.batch_size, images.count))


def caae_training(options: CaaeConfig, K: int) -> float:
    """Of one image in L_CAAE (Eq. 4), forward and backward."""
    vit = _Vit.of(options.backbone, (options.image_size,) * 2)
    primary = 2 * vit.N * vit.d * K * options.class_dim
    linear, attention = vit.linear + primary, vit.attention
    if options.reconstruction:
        w = options.decoder_width
        blocks_linear, blocks_attention = _blocks(options.decoder_depth, vit.N, w)
        linear += primary + 2 * vit.N * w * (vit.d + 3 * vit.P**2) + blocks_linear
        attention += blocks_attention
    return 2 * vit.patches + 3 * (linear + attention)


def segmentor_training(options: SegmentorConfig, caae: CaaeConfig, K: int, pairs: float) -> float:
    """Of one image with `pairs` present classes in L_seg (Eq. 13), forward and backward, its part of the frozen CAAE's
    work included: that has no gradients of weights, but its attention multiplies inputs by inputs."""
    vit = _Vit.of(options.backbone, (options.image_size,) * 2, K)
    heads = 2 * vit.N * vit.d * K + 2 * K * vit.d * caae.class_dim
    network = 2 * vit.patches + 3 * (vit.linear + vit.attention + heads)
    guide = _Vit.of(caae.backbone, (caae.image_size,) * 2)
    primary = 2 * guide.N * guide.d * K * caae.class_dim
    guided = 2 * (guide.patches + guide.linear + primary) + 3 * guide.attention
    return network + len({"CF", "CB"} & set(options.losses)) * pairs * guided


def segmentor_view(backbone: str, size: tuple[int, int], K: int, *, last_blocks: int) -> float:
    """Of the activation map of one image of `size` (H, W) and the attention of Eq. 6 in `last_blocks` blocks."""
    vit = _Vit.of(backbone, size, K)
    attention = 6 * (vit.N + K) * vit.d**2 + 2 * K * (vit.N + K) * vit.d
    return vit.patches + vit.linear + vit.attention + 2 * vit.N * vit.d * K + last_blocks * attention


def _cams(config: Config, images: Images) -> float:
    """All views of all images, and of those that are drawn, all kinds of maps."""
    options, backbone = config.cams, config.segmentor.backbone
    P = backbone_shape(backbone)["patch_size"]

    def maps(kind: str) -> float:
        last_blocks = 0 if kind == "activation" else options.last_blocks
        views = 0.0
        for scale in options.scales:
            height, width = (math.ceil(round(side * scale) / P) * P for side in (images.height, images.width))
            views += segmentor_view(backbone, (height, width), images.n_classes, last_blocks=last_blocks)
        return (2 if options.flip else 1) * views

    drawn = min(DRAWABLE, images.count)
    return images.count * maps(options.final_map) + drawn * sum(map(maps, MAP_KINDS))


class _Vit(NamedTuple):
    """A backbone's forward pass on one image: the operations of its patch embedding, of the blocks' linear layers and
    of their attention."""

    N: int
    d: int
    P: int
    patches: float
    linear: float
    attention: float

    @classmethod
    def of(cls, backbone: str, size: tuple[int, int], n_class_tokens: int = 0) -> "_Vit":
        shape = backbone_shape(backbone)
        d, P = shape["dim"], shape["patch_size"]
        N = (size[0] // P) * (size[1] // P)
        return cls(N, d, P, 2 * N * d * 3 * P**2, *_blocks(shape["depth"], N + n_class_tokens, d))


def _blocks(depth: int, n_tokens: int, d: int) -> tuple[float, float]:
    """Of the linear layers (qkv, projection, MLP) and of the attention of `depth` blocks."""
    return depth * 2 * n_tokens * d**2 * (4 + 2 * MLP_RATIO), depth * 4 * n_tokens**2 * d
