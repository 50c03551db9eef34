"""Segmentation network with K class tokens, section 3.3 of the paper.

Legend: B images, K classes (0 is background), D class dimension, N patches, d token dimension, h w patch grid.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semformer.models.vit import Backbone, class_to_patch_attention


class Segmentor(nn.Module):
    def __init__(self, backbone: Backbone, *, n_classes: int, class_dim: int, token_dropout: float = 0.5):
        super().__init__()
        self.n_classes, self.token_dropout = n_classes, token_dropout
        self.backbone = backbone
        self.class_tokens = nn.Parameter(backbone.class_token.repeat(1, n_classes, 1))
        self.class_positions = nn.Parameter(backbone.class_position.repeat(1, n_classes, 1))
        self.patch_head = nn.Linear(backbone.dim, n_classes)
        self.class_head_weight = nn.Parameter(torch.empty(n_classes, backbone.dim, class_dim))
        self.class_head_bias = nn.Parameter(torch.empty(n_classes, class_dim))
        d = backbone.dim
        nn.init.uniform_(self.class_head_weight, -((d * class_dim) ** -0.5), (d * class_dim) ** -0.5)
        nn.init.uniform_(self.class_head_bias, -(d**-0.5), d**-0.5)

    def forward(
        self, images: Tensor, *, last_blocks: int = 0, kept: Tensor | None = None, recompute: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Activation logits, class embeddings and, on request, what the class tokens look at.

        images: (B, 3, H, W). Returns
        - logits (B, K, h, w): Eq. 5 before the sigmoid;
        - embeddings E' (B, K, D) of the class tokens, after ReLU (section 3.3.4);
        - A^l (B, K, h*w) of the last `last_blocks` blocks, first to last (Eq. 6); computed nowhere else.

        `kept` (B, N, 1), from `draw_kept`, tells the patch tokens that are not dropped; None drops none. `recompute`
        saves memory: what happens inside a block is computed again when its gradient is.
        """
        patches, grid = self.backbone.tokens(images)
        classes = (self.class_tokens + self.class_positions).expand(images.shape[0], -1, -1)
        tokens = torch.cat([classes, patches], dim=1)
        attention = []
        for index, block in enumerate(self.backbone.blocks):
            if index >= len(self.backbone.blocks) - last_blocks:
                attention.append(class_to_patch_attention(block, tokens, self.n_classes))
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        tokens = self.backbone.norm(tokens)
        classes, patches = tokens.split([self.n_classes, patches.shape[1]], dim=1)
        logits = self.patch_head(patches if kept is None else patches * kept / (1 - self.token_dropout))
        embeddings = torch.einsum("bkd,kde->bke", classes, self.class_head_weight) + self.class_head_bias
        return logits.transpose(1, 2).unflatten(-1, grid), embeddings.relu(), attention

    def draw_kept(self, images: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Token dropout of training images (B, 3, H, W): (B, N, 1), true with 1 - `token_dropout`.

        None where there is none: with a probability of 0, and in evaluation mode.
        """
        if not (self.training and self.token_dropout):
            return None
        h, w = (side // self.backbone.patch_size for side in images.shape[-2:])
        drawn = torch.rand(len(images), h * w, 1, generator=generator, device=images.device)
        return drawn < 1 - self.token_dropout
