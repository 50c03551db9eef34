"""How much work a stage is: floating-point operations (a multiplication and an addition are two), labels and pixels.

Plans of thousands of stages stay fast. The ViTs' matrix products, convolutions and attention are in closed form; the
tests hold it against torch's counter on real training steps. What a backward pass costs: as much as the forward pass
for the gradients of the inputs, and as much again for those of the weights. AffinityNet and DeepLab, whose backbones
are of all kinds, go through torch's counter once for each size of images, without weights.

Legend: K classes (0 is background), D class dimension, N patches, d token dimension, P patch side, H W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from semformer.config import (
    DRAWABLE,
    AffinityConfig,
    CaaeConfig,
    Config,
    CrfConfig,
    DeeplabConfig,
    SegmentorConfig,
    TrainingConfig,
)
from semformer.data.pixels import scaled
from semformer.data.voc import Devkit, image_size, read_labels
from semformer.inference import MAP_KINDS
from semformer.models.affinity import FEATURE_STRIDES, STRIDES, AffinityNet
from semformer.models.deeplab import DeepLab
from semformer.models.vit import backbone_shape
from semformer.random_walk import neighbours
from semformer.stages import affinity, deeplab

LOOKED_AT = 32
"""Images of a split from which the mean size and the mean number of classes are taken."""
MLP_RATIO = 4
"""Of plain ViTs: hidden over token dimension."""
LATTICE = 60
"""Building the lattices of an image's CRF takes as long as so many iterations of one label."""


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

    @property
    def pixels(self) -> int:
        return self.count * self.width * self.height

    def scaled(self, scale: float, multiple: int) -> tuple[int, int]:
        """(H, W) of an image, see `pixels.scaled`."""
        H, W = scaled((self.height, self.width), scale, multiple)
        return H, W

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


class Work(NamedTuple):
    """What a stage computes."""

    flops: float = 0.0
    """Floating-point operations of networks, and of the steps of a walk."""
    passes: int = 0
    """How often a batch goes through the networks: once a step of training, once a view of an image."""
    labels: float = 0.0
    """What CRFs refine: pixels x labels x iterations."""
    pixels: float = 0.0
    """What is read, scored and written on the CPU."""


def stage_work(stage: str, config: Config, images: Images) -> Work:
    """The work of a stage on the split that it reads; none where a network is imported."""
    return _WORK[stage](config, images)


def caae_training(options: CaaeConfig, K: int) -> float:
    """Of one image in L_CAAE (Eq. 4), forward and backward."""
    patches, others = _caae_forward(options, K)
    return 2 * patches + 3 * others


def caae_view(options: CaaeConfig, K: int) -> float:
    """Of the class embeddings of one image of `image_size`, and of its reconstruction if there is one."""
    return sum(_caae_forward(options, K))


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


def affinity_training(options: AffinityConfig) -> float:
    """Of one image, forward and backward."""
    return _counted(_network(options), 0, (options.image_size,) * 2, backward=True)


def affinity_view(options: AffinityConfig, size: tuple[int, int]) -> float:
    """Of one image of `size` (H, W)."""
    return _counted(_network(options), 0, size)


def deeplab_training(options: DeeplabConfig, K: int) -> float:
    """Of one image, forward and backward."""
    return _counted(_network(options), K, (options.image_size,) * 2, backward=True)


def deeplab_view(options: DeeplabConfig, K: int, size: tuple[int, int]) -> float:
    """Of one image of `size` (H, W)."""
    return _counted(_network(options), K, size)


def _caae_forward(options: CaaeConfig, K: int) -> tuple[float, float]:
    """Of one image: of the patch embedding, whose input has no gradient, and of all others."""
    vit = _Vit.of(options.backbone, (options.image_size,) * 2)
    primary = 2 * vit.N * vit.d * K * options.class_dim
    linear, attention = vit.linear + primary, vit.attention
    if options.reconstruction:
        w = options.decoder_width
        blocks_linear, blocks_attention = _blocks(options.decoder_depth, vit.N, w)
        linear += primary + 2 * vit.N * w * (vit.d + 3 * vit.P**2) + blocks_linear
        attention += blocks_attention
    return vit.patches, linear + attention


def _caae(config: Config, images: Images) -> Work:
    options = config.caae
    return Work() if options.checkpoint else _training(options, images, caae_training(options, images.n_classes))


def _segmentor(config: Config, images: Images) -> Work:
    options = config.segmentor
    of_image = segmentor_training(options, config.caae, images.n_classes, images.classes_per_image)
    return Work() if options.checkpoint else _training(options, images, of_image)


def _cams(config: Config, images: Images) -> Work:
    """All views of all images, and of those that are drawn, all kinds of maps."""
    options, backbone = config.cams, config.segmentor.backbone
    if options.folder:
        return Work(pixels=images.pixels)

    def maps(kind: str) -> float:
        last_blocks = 0 if kind == "activation" else options.last_blocks
        sizes = (images.scaled(scale, backbone_shape(backbone)["patch_size"]) for scale in options.scales)
        views = sum(segmentor_view(backbone, size, images.n_classes, last_blocks=last_blocks) for size in sizes)
        return (2 if options.flip else 1) * views

    drawn = min(DRAWABLE, images.count)
    flops = images.count * maps(options.final_map) + drawn * sum(map(maps, MAP_KINDS))
    return Work(flops, passes=images.count * len(options.scales))


def _affinity_labels(config: Config, images: Images) -> Work:
    crf = _crf(config.affinity_labels.crf, images.classes_per_image, maps=2)
    return Work(labels=images.pixels * crf, pixels=images.pixels)


def _affinity(config: Config, images: Images) -> Work:
    return _training(config.affinity, images, affinity_training(config.affinity))


def _walk(config: Config, images: Images) -> Work:
    """An image and its mirror through AffinityNet, padded as `walk.see` does; each step multiplies and adds once for
    each neighbour of a pixel and each class."""
    options, network = config.walk, config.affinity
    H, W = (max(network.image_size, side) for side in images.scaled(1, FEATURE_STRIDES[network.variant][-1]))
    h, w = (math.ceil(side / STRIDES[network.variant]) for side in (images.height, images.width))
    step = 2 * h * w * (1 + 2 * len(neighbours(options.radius))) * (images.classes_per_image - 1)
    of_image = 2 * affinity_view(network, (H, W)) + 2**options.log2_steps * step
    return Work(images.count * of_image, passes=images.count)


def _pseudo_masks(config: Config, images: Images) -> Work:
    options = config.pseudo_masks
    crf = 0.0 if options.folder else _crf(options.crf, images.classes_per_image, maps=1)
    return Work(labels=images.pixels * crf, pixels=images.pixels)


def _deeplab(config: Config, images: Images) -> Work:
    options = config.deeplab
    return Work() if options.checkpoint else _training(options, images, deeplab_training(options, images.n_classes))


def _segmentation(config: Config, images: Images) -> Work:
    """At one scale and at all, each without and with the CRF."""
    options, K = config.segmentation, images.n_classes
    multiple = _built(_network(config.deeplab), K).features.multiple
    sizes = [images.scaled(scale, multiple) for scale in (1.0, *options.scales) for _ in range(1 + options.flip)]
    views = sum(deeplab_view(config.deeplab, K, size) for size in sizes)
    labels = images.pixels * _crf(options.crf, K, maps=2)
    return Work(images.count * views, images.count * len(sizes), labels, images.pixels)


def _evaluate_masks(config: Config, images: Images) -> Work:
    """The maps before the walk and after it; other methods' masks are scored alone."""
    return Work(pixels=images.pixels * (1 if config.pseudo_masks.folder else 2))


def _evaluate(config: Config, images: Images) -> Work:
    return Work(pixels=images.pixels)


_WORK: dict[str, Callable[[Config, Images], Work]] = {
    "caae": _caae,
    "segmentor": _segmentor,
    "cams": _cams,
    "evaluate": _evaluate,
    "train_cams": _cams,
    "affinity_labels": _affinity_labels,
    "affinity": _affinity,
    "walk": _walk,
    "pseudo_masks": _pseudo_masks,
    "evaluate_masks": _evaluate_masks,
    "deeplab": _deeplab,
    "segmentation": _segmentation,
    "evaluate_seg": _evaluate,
}


def _training(options: TrainingConfig, images: Images, of_image: float) -> Work:
    """Of whole batches."""
    batch = min(options.batch_size, images.count)
    steps = options.epochs * (images.count // batch)
    return Work(steps * batch * of_image, passes=steps)


def _crf(options: CrfConfig, labels: float, *, maps: int) -> float:
    """Of each pixel of an image, as `Work.labels`, where `maps` with so many labels are refined."""
    return LATTICE + maps * options.iterations * labels if options.iterations else 0.0


def _network(options: AffinityConfig | DeeplabConfig) -> AffinityConfig | DeeplabConfig:
    """What of the options decides about the work on an image: few networks are counted."""
    decisive = {"variant", "backbone", "image_size", "frozen", "head_width", "head_dilation", "frozen_statistics"}
    return type(options)(pretrained=False, **options.model_dump(include=decisive))


@lru_cache
def _built(network: AffinityConfig | DeeplabConfig, K: int) -> AffinityNet | DeepLab:
    """Without weights."""
    with torch.device("meta"):
        if isinstance(network, AffinityConfig):
            return affinity.build(network).eval()
        return deeplab.build(network, n_classes=K).eval()


@lru_cache(maxsize=1000)
def _counted(
    network: AffinityConfig | DeeplabConfig, K: int, size: tuple[int, int], *, backward: bool = False
) -> float:
    """Of a pass of one image (H, W)."""
    model = _built(network, K)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        found = model(torch.empty(1, 3, *size, device="meta"))
        if backward:
            found.sum().backward()
    return counter.get_total_flops()


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
