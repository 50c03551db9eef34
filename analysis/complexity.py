"""Table 9: the parameters of a preset's networks, and what one image costs them. Nothing is trained or read."""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from analysis.options import say
from analysis.render import NO_VALUE, markdown_grid
from semformer import flops
from semformer.config import PRESETS, Config, load_config
from semformer.data.shapes import CLASSES
from semformer.data.voc import VOC_CLASSES
from semformer.errors import UserError
from semformer.models.vit import build_vit, check_tiles
from semformer.stages import affinity, caae, deeplab, segmentor

PAPER_SIZE = 448
PAPER = {"TS-CAM": (22.04, 22.67), "SemFormer": (24.06, 23.34)}
"""Millions of parameters and billions of multiply-adds."""
NORMALISING = 5
"""Operations for an element of a LayerNorm, where these are counted: mean, variance, difference, scale, shift."""


@dataclass(frozen=True)
class Network:
    """`multiply_adds`: of a forward pass of one square image with a side of `size` pixels."""

    name: str
    parameters: int
    size: int
    multiply_adds: float
    paper: str = ""
    """Its name in PAPER."""

    @classmethod
    def of(cls, network: nn.Module, size: int, operations: float, name: str, paper: str = "") -> "Network":
        """operations: as `flops` counts them, two for a multiply-add."""
        return cls(name, sum(parameter.numel() for parameter in network.parameters()), size, operations / 2, paper)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", default="paper", choices=tuple(PRESETS), help="default: %(default)s")
    add("--size", type=int, default=PAPER_SIZE, metavar="SIDE", help="of the image, in pixels (default: %(default)s)")
    parser.set_defaults(tracking_uri="")  # it reads no runs


def run(options: argparse.Namespace) -> int:
    """Raises UserError for a size that the patches do not tile."""
    say(to_markdown(options.preset, options.size), options)
    return 0


def networks(config: Config, size: int) -> list[Network]:
    """The segmentation network as maps are made with it, and the others. The CAAE sees images of its own size.

    Raises UserError for a size that the patches of the segmentation network do not tile.
    """
    if size < 1:
        raise UserError(f"--size {size}: give the side of an image in pixels, such as {PAPER_SIZE}")
    backbone, class_dim, U = config.segmentor.backbone, config.caae.class_dim, config.cams.last_blocks
    check_tiles(backbone, size, "--size")
    K, sides = 1 + len(CLASSES if config.data.shapes else VOC_CLASSES), (size, size)
    with torch.device("meta"):
        guide = caae.build(config.caae.without_weights(), n_classes=K)
        network = segmentor.build(config.segmentor.without_weights(), n_classes=K, class_dim=class_dim)
        walking = affinity.build(config.affinity.without_weights())
        segmenting = deeplab.build(config.deeplab.without_weights(), n_classes=K)
    alone, both = (flops.segmentor_view(backbone, sides, K, last_blocks=last) for last in (0, U))
    embedded = flops.caae_view(config.caae, K)
    walked, segmented = flops.affinity_view(config.affinity, sides), flops.deeplab_view(config.deeplab, K, sides)
    return [
        Network.of(network, size, alone, "segmentation network: activation map", paper="SemFormer"),
        Network.of(network, size, both, f"with class-relative attention (U = {U})"),
        Network.of(guide, config.caae.image_size, embedded, "CAAE, in training alone"),
        Network.of(walking, size, walked, f"AffinityNet on {config.affinity.backbone}"),
        Network.of(segmenting, size, segmented, f"DeepLabV1 on {config.deeplab.backbone}"),
    ]


def to_markdown(preset: str, size: int) -> str:
    """Table 9, with the paper's values where preset and size are the paper's. Raises UserError as `networks` does."""
    config = load_config(preset)
    found = networks(config, size)
    is_papers = (preset, size) == ("paper", PAPER_SIZE)
    whose = ["ours", "paper"] if is_papers else [""]
    heads = [f"{head} {who}".strip() for head in ("Parameters (M)", "FLOPs (G)") for who in whose]
    lines = [["Model", "Image", *heads]]
    if is_papers:
        theirs = [_number(value) for value in PAPER["TS-CAM"]]
        lines.append(["TS-CAM", f"{size}x{size}", NO_VALUE, theirs[0], NO_VALUE, theirs[1]])
    for one in found:
        values = [[_number(one.parameters / 1e6)], [_number(one.multiply_adds / 1e9)]]
        if is_papers:
            for column, value in zip(values, PAPER.get(one.paper, (None, None)), strict=True):
                column.append(NO_VALUE if value is None else _number(value))
        lines.append([one.name, f"{one.size}x{one.size}", *values[0], *values[1]])
    notes = [
        f"preset {preset}; a forward pass of one image. Convolutions, linear layers and attention are counted, a "
        "multiplication with its addition once."
    ]
    if is_papers:
        notes.append(_difference(config, found[0]))
    told = "\n".join(f"- {note}" for note in notes)
    return f"### table09: Model complexity\n\n{markdown_grid(lines)}\n\n{told}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def _difference(config: Config, ours: Network) -> str:
    """What makes ours the paper's, to its last digit."""
    with torch.device("meta"):
        vit = build_vit(config.segmentor.backbone, pretrained=False, weights="", num_classes=0)
    assert vit.pos_embed is not None  # `build_vit` takes no other
    K, N = 1 + len(VOC_CLASSES), (ours.size // vit.patch_embed.patch_size[0]) ** 2
    positions = vit.pos_embed.numel()
    norms = NORMALISING * (2 * len(vit.blocks) + 1) * (K + N) * vit.embed_dim
    return (
        "The paper does not say how it counted. Ours become its values with the backbone's own position embedding "
        f"({'x'.join(map(str, vit.pos_embed.shape[1:]))}, in whose place ours has one of {N} patches), "
        f"{_number((ours.parameters + positions) / 1e6)} M, and with {NORMALISING} operations for each element that "
        f"a LayerNorm normalises, {_number((ours.multiply_adds + norms) / 1e9)} G."
    )
