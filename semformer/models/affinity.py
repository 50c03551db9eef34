"""AffinityNet: how alike near pixels of an image are, by the edges between them (Ahn, Cho and Kwak, CVPR 2019) or by
their features (Ahn and Kwak, CVPR 2018).

Legend: B images, H W pixels, C channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semformer.models.features import Features

Variant = Literal["edge", "feature"]
STRIDES: dict[Variant, int] = {"edge": 4, "feature": 8}
"""Pixels of an image to one of its edge or feature map."""
FEATURE_STRIDES: dict[Variant, tuple[int, ...]] = {"edge": (2, 4, 8, 16, 16), "feature": (8, 8, 8)}
"""Pixels of an image to one of the feature maps that are read, of the backbone's last ones."""


class EdgeNet(nn.Module):
    """Five feature maps, all brought to stride 4, tell where edges are."""

    def __init__(self, features: Features):
        super().__init__()
        self.features = features
        self.taps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, 32, 1, bias=False), nn.GroupNorm(4, 32)) for C in features.channels
        )
        self.edge = nn.Conv2d(5 * 32, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Edge logits (B, H / 4, W / 4) of images (B, 3, H, W)."""
        maps = self.features(images)
        maps[0] = F.max_pool2d(maps[0], 3, stride=2, padding=1)  # what a ResNet's next stage is given
        h, w = maps[1].shape[2:]
        read = []
        for tap, one in zip(self.taps, maps, strict=True):
            scale = max(1, round(w / one.shape[3]))
            found = F.interpolate(tap(one), scale_factor=scale, mode="bilinear", align_corners=True)
            read.append(found[..., :h, :w].relu())
        return self.edge(torch.cat(read, dim=1))[:, 0]


class FeatureNet(nn.Module):
    """The last three feature maps, at stride 8, become features that are alike within an object."""

    WIDTHS = (64, 128, 256)

    def __init__(self, features: Features):
        super().__init__()
        self.features = features
        self.taps = nn.ModuleList(
            nn.Conv2d(C, width, 1, bias=False) for C, width in zip(features.channels[-3:], self.WIDTHS, strict=True)
        )
        self.joined = nn.Conv2d(sum(self.WIDTHS), sum(self.WIDTHS), 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 448, H / 8, W / 8) of images (B, 3, H, W)."""
        maps = self.features(images)[-3:]
        read = [F.elu(tap(one)) for tap, one in zip(self.taps, maps, strict=True)]
        return F.elu(self.joined(torch.cat(read, dim=1)))


AffinityNet = EdgeNet | FeatureNet
