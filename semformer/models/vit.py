"""A timm ViT as both networks of SemFormer use it: patch tokens, position embedding, blocks, final norm.

Legend: B images, N patches, d token dimension, K classes, H W pixels, h w patch grid, P patch side.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, resample_abs_pos_embed
from timm.models import VisionTransformer, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from semformer.errors import MachineError, UserError, first_line
from semformer.memory import is_exhausted
from semformer.weights import load_state, read_weights


@register_model
def vit_shapes_patch8_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Both backbones of preset tiny: 64x64 images."""
    return _small_vit(pretrained, kwargs, img_size=64, embed_dim=64, depth=4, num_heads=4)


@register_model
def vit_shapes_medium_patch8_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A narrower encoder for presets tiny and micro, in the place of DeiT-B in Table 6."""
    return _small_vit(pretrained, kwargs, img_size=64, embed_dim=48, depth=4, num_heads=4)


@register_model
def vit_shapes_small_patch8_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Half the width of `vit_shapes_patch8_64`, as DeiT-S has half of DeiT-B's (Table 6)."""
    return _small_vit(pretrained, kwargs, img_size=64, embed_dim=32, depth=4, num_heads=2)


@register_model
def vit_wiring_patch8_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Encoder of preset micro."""
    return _small_vit(pretrained, kwargs, img_size=32, embed_dim=24, depth=2, num_heads=2)


@register_model
def vit_wiring_patch8_48(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Segmentation backbone of preset micro, deep enough for every U of Table 13."""
    return _small_vit(pretrained, kwargs, img_size=48, embed_dim=24, depth=7, num_heads=2)


def _small_vit(pretrained: bool, options: dict[str, Any], **defaults: int) -> VisionTransformer:
    if pretrained:
        raise UserError(
            "this backbone has no pretrained weights: set pretrained=false, or make some with `semformer pretrain`"
        )
    hub_options = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    chosen = {name: value for name, value in options.items() if name not in hub_options}
    return VisionTransformer(**{"patch_size": 8, **defaults, **chosen})


class Backbone(nn.Module):
    """The patch embedding, position embedding, blocks and final LayerNorm of a timm ViT.

    Class, distillation and register tokens are left out; the class token and its position embedding are kept as
    plain tensors, `class_token` and `class_position` (1, 1, d), for the segmentation network to start from.
    """

    def __init__(self, vit: VisionTransformer, image_size: int | None = None):
        """`image_size`: side of the training images, to whose grid the position embedding is resized once."""
        super().__init__()
        assert _is_plain(vit)  # `backbone_shape` takes no other
        self.patch_embed = vit.patch_embed.proj
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm
        self.dim = vit.embed_dim
        self.patch_size = vit.patch_embed.patch_size[0]
        self.num_heads = _attention(vit.blocks[0]).num_heads
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        assert vit.pos_embed is not None  # `build_backbone` takes no other
        position = vit.pos_embed.detach()[:, prefix:]
        if image_size:
            position = _resize_positions(position, (image_size // self.patch_size,) * 2)
        self.pos_embed = nn.Parameter(position.clone(memory_format=torch.contiguous_format))
        zeros = torch.zeros(1, 1, self.dim)
        self.class_token = zeros if vit.cls_token is None else vit.cls_token.detach().clone()
        self.class_position = vit.pos_embed.detach()[:, :1].clone() if prefix else zeros

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens with their position embedding, before the blocks.

        images: (B, 3, H, W), H and W multiples of P. Returns (B, N, d) and the grid (h, w).
        """
        patches = self.patch_embed(images)
        h, w = patches.shape[-2:]
        position = _resize_positions(self.pos_embed, (h, w))
        return self.norm_pre(patches.flatten(2).transpose(1, 2) + position), (h, w)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> patch tokens after the last block and the final LayerNorm, (B, N, d)."""
        tokens, _ = self.tokens(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def _resize_positions(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embedding (1, N, d) of a square grid -> (1, h*w, d), bicubic (align_corners=False)."""
    side = math.isqrt(position.shape[1])
    if grid == (side, side):
        return position
    square = position.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def class_to_patch_attention(block: nn.Module, tokens: Tensor, n_class: int) -> Tensor:
    """What the class tokens look at in one block: A^l of section 3.3.3.

    tokens: (B, K + N, d), the block's *input*, class tokens first. Returns (B, K, N), mean over heads; rows of the
    softmax over all K + N tokens, of which only the K rows that are needed are computed.
    """
    assert isinstance(block, Block)  # `Backbone` takes no other
    attention = _attention(block)
    B, T, _ = tokens.shape
    qkv = attention.qkv(block.norm1(tokens)).reshape(B, T, 3, attention.num_heads, attention.head_dim)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q[:, :, :n_class]), attention.k_norm(k)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1)[..., n_class:].mean(dim=1)


def build_backbone(name: str, *, pretrained: bool = False, weights: str = "", image_size: int) -> Backbone:
    """A timm ViT by name, with random, downloaded (`pretrained`) or local (`weights`) parameters.

    Raises UserError as `build_vit` does.
    """
    return Backbone(build_vit(name, pretrained=pretrained, weights=weights, num_classes=0), image_size)


def check_tiles(name: str, image_size: int, field: str) -> None:
    """Raises UserError for an image size (of this `field`) that the patches do not tile, and as `backbone_shape`."""
    patch_size = backbone_shape(name)["patch_size"]
    if image_size % patch_size:
        raise UserError(f"{field} = {image_size} is no multiple of the patch size {patch_size} of {name}")


def build_vit(name: str, *, pretrained: bool, weights: str, **options: Any) -> VisionTransformer:
    """As timm makes it, with random, downloaded (`pretrained`) or local (`weights`) parameters; the head is always new.

    Raises UserError for an unknown name, a model that is no plain ViT, a download that is impossible, and a weights
    file of another architecture.
    """
    backbone_shape(name)  # which takes plain ViTs alone
    advice = "by semformer run --weights FILE or --caae-weights FILE, semformer-sweep --weights "
    advice += f"{name}=FILE. Or set pretrained=false"
    vit = timm_model(name, pretrained and not weights, advice, **options)
    assert isinstance(vit, VisionTransformer)
    if weights:
        _load_weights(vit, name, Path(weights))
    return vit


def timm_model(name: str, download: bool, advice: str, **options: Any) -> nn.Module:
    """As timm makes it. Raises MachineError, that ends with how to give a file, for a download that is impossible."""
    try:
        return timm.create_model(name, pretrained=download, **options)
    except Exception as error:  # hub libraries raise a dozen kinds when they are offline
        if not download or is_exhausted(error):
            raise
        raise MachineError(
            f"cannot download the pretrained weights of {name} ({type(error).__name__}: {first_line(error)}). "
            f"Give a local file (timm's parameter names) {advice}."
        ) from error


def check_known(name: str) -> None:
    """Raises UserError for a name that timm does not have."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*", exclude_filters=["*.*"])[:3]
        raise UserError(f"timm {timm.__version__} has no model {name!r}; similar names: {', '.join(near) or 'none'}")


def _attention(block: nn.Module) -> Attention:
    attention = block.attn
    assert isinstance(attention, Attention)
    return attention


def _is_plain(vit: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether what `Backbone` takes of it is all that its features go through."""
    return (
        isinstance(vit, VisionTransformer)
        and type(vit.patch_embed) is PatchEmbed
        and isinstance(vit.patch_embed.norm, nn.Identity)
        and vit.pos_embed is not None
        and isinstance(vit.norm, nn.LayerNorm)
        and all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks)
    )


def is_plain_vit(name: str) -> bool:
    """Whether timm has such a model, and all that its features go through is what `Backbone` takes of it."""
    try:
        backbone_shape(name)
    except UserError:
        return False
    return True


@cache
def backbone_shape(name: str) -> dict[str, int]:
    """depth, dim, num_heads and patch_size of a timm ViT, without allocating its weights."""
    check_known(name)
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    if not _is_plain(vit):
        raise UserError(
            f"{name} is no plain ViT / DeiT of timm: SemFormer needs a VisionTransformer with one linear patch "
            "embedding, position embeddings, standard blocks and a final LayerNorm"
        )
    return {
        "depth": len(vit.blocks),
        "dim": vit.embed_dim,
        "num_heads": _attention(vit.blocks[0]).num_heads,
        "patch_size": vit.patch_embed.patch_size[0],
    }


def _resampled(positions: Tensor, wanted: Tensor, n_prefix: int, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, n_prefix + N, d) of a square of N patches for those of `grid`; others as they are."""
    N = positions.shape[1] - n_prefix if positions.ndim == 3 and positions.shape[::2] == wanted.shape[::2] else 0
    if positions.shape == wanted.shape or N <= 0 or math.isqrt(N) ** 2 != N:
        return positions
    return resample_abs_pos_embed(positions, new_size=list(grid), num_prefix_tokens=n_prefix)


def _load_weights(vit: VisionTransformer, name: str, path: Path) -> None:
    state = read_weights(path)
    wanted = vit.state_dict()
    if "pos_embed" in state:
        n_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        state["pos_embed"] = _resampled(state["pos_embed"], wanted["pos_embed"], n_prefix, vit.patch_embed.grid_size)
    head = {key: value for key, value in wanted.items() if key.startswith("head")}  # which is new
    load_state(
        vit,
        {key: value for key, value in state.items() if not key.startswith("head")} | head,
        f"{path}, read as {name},",
    )
