"""Class-Aware AutoEncoder, section 3.2 of the paper.

Legend: B images, K classes (0 is background), D class dimension, N patches, d token dimension, P patch side.
"""

from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from semformer.models.vit import Backbone

Merge = Literal["sum", "mean", "max"]


class CAAE(nn.Module):
    """Embeds an image once per class, and learns what each class means in the whole data set (S)."""

    def __init__(
        self,
        encoder: Backbone,
        *,
        n_classes: int,
        class_dim: int,
        merge: Merge = "sum",
        decoder_depth: int = 8,
        decoder_width: int = 768,
        reconstruction: bool = True,
    ):
        super().__init__()
        self.n_classes, self.class_dim, self.merge = n_classes, class_dim, merge
        self.encoder = encoder
        self.primary = nn.Linear(encoder.dim, n_classes * class_dim, bias=False)
        self.semantics_weight = nn.Parameter(torch.randn(n_classes, class_dim))
        self.decoder = None
        if reconstruction:
            self.decoder = Decoder(
                encoder.dim,
                primary_dim=n_classes * class_dim,
                depth=decoder_depth,
                width=decoder_width,
                num_heads=encoder.num_heads,
                patch_size=encoder.patch_size,
            )

    @property
    def semantics(self) -> Tensor:
        """Class semantics S = ReLU(W_S), (K, D)."""
        return self.semantics_weight.relu()

    def primary_tokens(self, images: Tensor) -> Tensor:
        """T of Eq. 1: (B, 3, H, W) -> (B, N, K, D)."""
        return self.primary(self.encoder(images)).relu().unflatten(-1, (self.n_classes, self.class_dim))

    def class_embeddings(self, primary: Tensor) -> Tensor:
        """E of section 3.2.2: (B, N, K, D) -> (B, K, D)."""
        if self.merge == "sum":
            return primary.sum(dim=1)
        return primary.mean(dim=1) if self.merge == "mean" else primary.amax(dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> class embeddings E (B, K, D), without the decoder."""
        return self.class_embeddings(self.primary_tokens(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> class embeddings E (B, K, D), reconstruction (B, 3, H, W) or None without a decoder."""
        primary = self.primary_tokens(images)
        h, w = (side // self.encoder.patch_size for side in images.shape[-2:])
        reconstruction = self.decoder(primary.flatten(2), (h, w)) if self.decoder else None
        return self.class_embeddings(primary), reconstruction


class Decoder(nn.Module):
    """Rebuilds the normalised image from the primary tokens (Eq. 3)."""

    def __init__(self, dim: int, *, primary_dim: int, depth: int, width: int, num_heads: int, patch_size: int):
        super().__init__()
        self.recover = nn.Linear(primary_dim, dim, bias=False)
        self.recover_norm = nn.LayerNorm(dim)
        self.embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * patch_size**2)
        self.fold = nn.PixelShuffle(patch_size)

    def forward(self, primary: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, K*D) and the patch grid (h, w) -> image (B, 3, h*P, w*P), channel-major within a patch."""
        tokens = self.embed(self.recover_norm(self.recover(primary)))
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.project(self.norm(tokens))
        return self.fold(patches.transpose(1, 2).unflatten(-1, grid))
