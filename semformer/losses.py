"""The losses of the paper, one function per equation, in its symbols.

Legend: B images, K classes (0 is background), D class dimension, H W pixels,
P pairs of (image, present class), in order of image, then class.

Similarities are cosine similarities in (-1, 1); ReLU before them makes them non-negative. Where the published code
differs from the paper, the default is the code and the paper's reading is an argument.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITY_MARGIN = 1e-4
NORM_EPS = 1e-8
AFFINITY_EPS = 1e-5


def similarity(E: Tensor, S: Tensor) -> Tensor:
    """Sim(E, S) of section 3.2.3: (..., K, D) and (K, D) -> (..., K), in [-1 + 1e-4, 1 - 1e-4]."""
    cosine = (F.normalize(E, dim=-1, eps=NORM_EPS) * F.normalize(S, dim=-1, eps=NORM_EPS)).sum(dim=-1)
    return cosine.clamp(-1 + SIMILARITY_MARGIN, 1 - SIMILARITY_MARGIN)


def semantic_similarity(sim: Tensor, Y: Tensor) -> Tensor:
    """L_SS of Eq. 2 and Eq. 12. sim, Y: (B, K) -> scalar, mean over images and classes."""
    p = sim.float().relu()
    return -(Y * _log(p) + (1 - Y) * _log(1 - p)).mean()


def _log(p: Tensor) -> Tensor:
    """log p, and -100 without a gradient where p is 0 (as binary cross entropy has it in PyTorch)."""
    is_zero = p == 0
    return p.masked_fill(is_zero, 1.0).log().masked_fill(is_zero, -100.0)


def reconstruction(images: Tensor, images_recon: Tensor) -> Tensor:
    """L_recon of Eq. 4: mean squared error of normalised images (B, 3, H, W)."""
    return F.mse_loss(images_recon, images)


@dataclass(frozen=True)
class Pairs:
    """The P pairs of (image, present class) of a batch.

    image, own: (P,) indices; others: (P, K), true where a class is present in the pair's image and is not its own.
    """

    image: Tensor
    own: Tensor
    others: Tensor

    @classmethod
    def of(cls, Y: Tensor) -> "Pairs":
        """Y: (B, K) image-level labels, 1 where present (background always is)."""
        image, own = torch.nonzero(Y, as_tuple=True)
        others = Y[image].bool()
        others[torch.arange(len(own), device=own.device), own] = False
        return cls(image, own, others)

    def to(self, device: torch.device) -> "Pairs":
        return Pairs(*(part.to(device, non_blocking=True) for part in (self.image, self.own, self.others)))


def class_foreground(sim: Tensor, pairs: Pairs, reduction: Literal["batch", "image"] = "batch") -> Tensor:
    """L_CF of Eq. 7: the foreground image of a class shows that class and none of the image's others.

    sim: (P, K), similarities of the class-foreground images. "batch" is ((1 - mean own) + (1 + mean others)) / 2,
    means over all pairs of the batch; "image" is the paper's normalisation per image, averaged over images.
    """
    own, others = _weights(pairs, reduction)
    loss = (own * (1 - sim) + others * sim).sum()
    return (loss + 1) / 2 if reduction == "batch" else loss


def class_background(sim: Tensor, pairs: Pairs, reduction: Literal["batch", "image"] = "batch") -> Tensor:
    """L_CB of Eq. 8: the background image of a class shows nothing of it and all the image's others.

    sim: (P, K), similarities of the class-background images. Reductions as in `class_foreground`.
    """
    own, others = _weights(pairs, reduction)
    loss = (own * sim + others * (1 - sim)).sum()
    return (loss + 1) / 2 if reduction == "batch" else loss


def activation_suppression(M: Tensor, sigma: float, channels: Literal["objects", "all"] = "objects") -> Tensor:
    """L_AS of Eq. 9. M: activation maps (B, K, H, W) in (0, 1), zero outside the crop's valid region.

    "objects" suppresses the object channels and raises the background's; "all" is the paper's mean over K channels.
    """
    if channels == "all":
        return sigma * M.mean()
    return sigma * (M[:, 1:].mean() + (1 - M[:, 0].mean()))


def activation_complementation(
    M: Tensor, Y: Tensor, valid: Tensor, maximum_over: Literal["present", "all"] = "present"
) -> Tensor:
    """L_AC of Eq. 10, 11: at each pixel a present class and the strongest other one sum to 1.

    M: (B, K, H, W) activation maps, Y: (B, K) labels, valid: (B, 1, H, W), 1 inside the crop's valid region.
    N_c is the maximum over the other present classes of the image, or over all K ("all", as the paper writes it).
    Mean over the valid pixels of all (image, present class) pairs.
    """
    present = Y[:, :, None, None].bool()
    candidates = M if maximum_over == "all" else M.masked_fill(~present, 0.0)
    first, argmax = candidates.max(dim=1, keepdim=True)
    second = candidates.scatter(1, argmax, 0.0).amax(dim=1, keepdim=True)
    is_strongest = torch.arange(M.shape[1], device=M.device)[:, None, None] == argmax
    N = torch.where(is_strongest, second, first)
    counted = valid * present
    return ((M + N - 1).square() * counted).sum() / counted.sum().clamp(min=1)


def affinity(affinities: Tensor, background: Tensor, objects: Tensor, different: Tensor) -> Tensor:
    """Loss of AffinityNet: pairs of one label are alike, background and object pairs counting alike; others are not.

    affinities: (B, pairs, h, w) in 0..1. The others, of the same shape, weigh the pairs that are both background, both
    of one object class, and of two labels; the weights of each kind add up to 1 over the batch.
    """
    alike, apart = -(affinities + AFFINITY_EPS).log(), -(1 + AFFINITY_EPS - affinities).log()
    return (((background + objects) * alike).sum() / 2 + (different * apart).sum()) / 2


def _weights(pairs: Pairs, reduction: str) -> tuple[Tensor, Tensor]:
    """Weights (P, K) of each pair's own and other similarities: means over the batch, or per image, then images."""
    own, others = F.one_hot(pairs.own, pairs.others.shape[1]).float(), pairs.others.float()
    if reduction == "batch":
        return own / len(own), others / others.sum().clamp(min=1)
    C = 1 + others.sum(dim=1, keepdim=True)  # classes of the pair's image
    n_images = (1 / C).sum()
    return own / (C * n_images), others / (C * (C - 1) * n_images).clamp(min=1)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the named terms: L_CAAE of Eq. 4, L_seg of Eq. 13."""
    return functools.reduce(torch.add, terms.values())
