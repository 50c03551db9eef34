"""The method written down as plainly as possible, to test and to time the real implementation against.

One pair of image and class at a time, foreground and background images in separate passes, attention matrices always
materialised, every class embedding computed anew. Same equations, no shared code with `semformer.losses`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semformer.config import SegmentorConfig
from semformer.data.loading import Batch
from semformer.models.caae import CAAE
from semformer.models.segmentor import Segmentor


def materialise_attention(model: nn.Module) -> None:
    """Make every block compute its attention matrix instead of using scaled_dot_product_attention."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def sim(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of two vectors (D,)."""
    a, b = a / a.norm().clamp(min=1e-8), b / b.norm().clamp(min=1e-8)
    return (a @ b).clamp(-1 + 1e-4, 1 - 1e-4)


def bce(p: Tensor, y: Tensor) -> Tensor:
    return -(y * p.log().clamp(min=-100) + (1 - y) * (1 - p).log().clamp(min=-100))


def caae_loss(model: CAAE, images: Tensor, Y: Tensor) -> Tensor:
    """Eq. 2, 4."""
    total = torch.zeros(())
    B, K = Y.shape
    E, recon = model(images)
    for b in range(B):
        for c in range(K):
            S = model.semantics[c] if Y[b, c] else model.semantics[c].detach()
            total = total + bce(sim(E[b, c], S), Y[b, c]) / (B * K)
        if recon is not None:
            total = total + (recon[b] - images[b]).square().mean() / B
    return total


def segmentor_losses(
    model: Segmentor,
    caae: CAAE,
    options: SegmentorConfig,
    batch: Batch,
    *,
    caae_size: int,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Eq. 7 to 13, all five losses."""
    images, regions, Y = batch.images, batch.regions, batch.Y
    B, K = Y.shape
    kept = model.draw_kept(images, generator)
    logits, E, _ = model(images, last_blocks=len(model.backbone.blocks), kept=kept)
    small = F.interpolate(images, size=caae_size, mode="bilinear", align_corners=True)
    M = F.interpolate(logits, size=caae_size, mode="bilinear", align_corners=True).sigmoid()
    valid = torch.zeros(B, caae_size, caae_size)
    for b in range(B):
        x0, y0, x1, y1 = (int(edge) * caae_size // images.shape[-1] for edge in regions[b])
        valid[b, y0:y1, x0:x1] = 1
    M = M * valid[:, None]
    S = caae.semantics

    own_fg, other_fg, own_bg, other_bg = [], [], [], []
    per_image = {"CF": [], "CB": []}
    for b in range(B):
        present = [c for c in range(K) if Y[b, c]]
        cf, cb = torch.zeros(()), torch.zeros(())
        for c in present:
            fg = caae.embed((M[b, c] * small[b])[None])[0]
            bg = caae.embed(((1 - M[b, c]) * small[b])[None])[0]
            others = [o for o in present if o != c]
            own_fg.append(sim(fg[c], S[c]))
            own_bg.append(sim(bg[c], S[c]))
            other_fg += [sim(fg[o], S[o]) for o in others]
            other_bg += [sim(bg[o], S[o]) for o in others]
            C = len(present)
            cf = cf + (1 - sim(fg[c], S[c])) / C + sum(sim(fg[o], S[o]) for o in others) / (C * max(1, C - 1))
            cb = cb + sim(bg[c], S[c]) / C + sum(1 - sim(bg[o], S[o]) for o in others) / (C * max(1, C - 1))
        per_image["CF"].append(cf)
        per_image["CB"].append(cb)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean() if values else torch.zeros(())

    terms = {}
    if options.pair_reduction == "batch":
        terms["CF"] = ((1 - mean(own_fg)) + (1 + mean(other_fg))) / 2
        terms["CB"] = ((1 - mean(other_bg)) + (1 + mean(own_bg))) / 2 if other_bg else (1 + mean(own_bg) + 1) / 2
    else:
        terms["CF"], terms["CB"] = mean(per_image["CF"]), mean(per_image["CB"])

    if options.suppress == "all":
        terms["AS"] = options.sigma * M.mean()
    else:
        terms["AS"] = options.sigma * (M[:, 1:].mean() + 1 - M[:, 0].mean())

    squares = []
    for b in range(B):
        present = [c for c in range(K) if Y[b, c]]
        for c in present:
            pool = [o for o in (range(K) if options.complement == "all" else present) if o != c]
            N = torch.stack([M[b, o] for o in pool]).amax(dim=0) if pool else torch.zeros_like(M[b, c])
            squares.append((M[b, c] + N - 1).square()[valid[b] == 1])
    terms["AC"] = torch.cat(squares).mean()

    terms["SS"] = torch.stack([bce(sim(E[b, c], S[c]), Y[b, c]) for b in range(B) for c in range(K)]).mean()
    return {"total": sum(terms.values()), **terms}
