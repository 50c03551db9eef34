"""Stage segmentor: train the segmentation network under the guidance of a frozen CAAE (section 3.3).

Legend: B images, K classes (0 is background), P pairs of (image, present class), s side of the CAAE's image.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from semformer import losses
from semformer.config import CamsConfig, Config, SegmentorConfig
from semformer.data.augment import segmentor_crops, valid_mask
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.data.pixels import as_batch, normalized
from semformer.data.voc import IGNORE, Split
from semformer.inference import multi_scale_maps
from semformer.losses import Pairs, similarity
from semformer.metrics import ThresholdCurve, reported
from semformer.models.caae import CAAE
from semformer.models.segmentor import Segmentor
from semformer.models.vit import build_backbone
from semformer.precision import autocast
from semformer.stages import caae as caae_stage
from semformer.stages.context import Context, Progress
from semformer.stages.training import compiled, train
from semformer.store import Artifact
from semformer.weights import load_published, load_state

WEIGHTS = "segmentor.safetensors"
COMPILED = 16
"""Compiled, the CAAE embeds multiples of so many images at once."""


def run(config: Config, data: Packed, caae: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `segmentor.safetensors`. Returns the loss terms per epoch, and the names of the classes."""
    options = config.segmentor
    n_classes = len(data.classes)
    torch.manual_seed(config.seed)
    model = build(options, n_classes=n_classes, class_dim=config.caae.class_dim).to(ctx.device)
    if options.checkpoint:
        load_published(model, "segmentor", options.checkpoint)
    ctx.have_read(options)
    history: dict[str, list[float]] = {}
    if not options.checkpoint:
        guide = caae_stage.load(config.caae, caae, device=ctx.device)
        network = compiled(model, options)
        if options.compile:
            guide.embed = compiled(guide.embed, options)  # type: ignore[method-assign]

        def progress(told: Progress) -> None:
            """Probes beside the training: neither the weights nor the history depend on it."""
            if told.end_of_epoch and ctx.probe:
                told = replace(told, probe=ctx.probe(model))
            ctx.progress(told)

        history = train(
            model,
            stage="segmentor",
            config=options,
            loader=Loader(data, segmentor_crops, options, seed=config.seed, device=ctx.device),
            gradients=lambda batch, generator, pieces: gradients(
                network, guide, options, batch, generator, pieces, caae_size=config.caae.image_size
            ),
            pretrained=model.backbone if options.starts_pretrained else None,
            precision=config.precision,
            seed=config.seed,
            ctx=replace(ctx, progress=progress),
            score=lambda data: {f"{data.name}_miou": patch_miou(model, data, options.image_size, config.precision)},
        )
    save_file(model.state_dict(), ctx.out / WEIGHTS)
    return {"history": history, "classes": list(data.classes)}


def selects(config: Config) -> bool:
    """Whether the epoch is chosen by *pixel masks*: the published way is pixel supervision."""
    return config.segmentor.selection == "best_miou" and not config.segmentor.checkpoint


@torch.inference_mode()
def patch_miou(model: Segmentor, data: Split, size: int, precision: str, *, batch_size: int = 16) -> float:
    """Best mIoU in percent over 99 thresholds, on the patch grid of each image's top left `size` x `size` pixels.

    The published choice of the epoch: one scale, no flip, no attention; padding does not count, but is part of what
    an activation map is divided by. Leaves the network in evaluation mode.
    """
    model.eval()
    curve = ThresholdCurve(len(data.classes), [t / 100 for t in range(1, 100)])
    device, P = model.patch_head.weight.device, model.backbone.patch_size
    for rows in data.batches(batch_size):
        images = torch.zeros(len(rows), 3, size, size, device=device)
        for image, i in zip(images, rows, strict=True):
            part = torch.from_numpy(data.pixels(i)[:size, :size]).to(device)
            image[:, : part.shape[0], : part.shape[1]] = normalized(as_batch(part))[0]
        with autocast(device, precision):
            activation = model(images)[0].float().relu()
        activation = (activation - 1e-5).relu() / (activation.amax(dim=(2, 3), keepdim=True) + 1e-5)
        for maps, i in zip(activation.cpu().numpy(), rows, strict=True):
            truth = np.full((size, size), IGNORE, dtype=np.uint8)
            mask = data.mask(i)[:size, :size]
            truth[: mask.shape[0], : mask.shape[1]] = mask
            curve.add(maps[data.objects(i)], data.objects(i), truth[::P, ::P].copy(), name=data.ids[i])
    return float(curve.scores().miou.max())


def map_probe(data: Split, config: Config, *, n_images: int = 64) -> Callable[[Segmentor], dict[str, float]]:
    """Measures the final metrics (`metrics.reported`) on the single-scale maps of images spread over a split.

    Without flip or attention. Reads pixel masks. Draws no random number, and leaves the network in the mode it was in.
    """
    options, view = config.evaluate, CamsConfig(scales=(1.0,), flip=False, final_map="activation")
    indices = [i * len(data) // n_images for i in range(n_images)] if n_images < len(data) else range(len(data))

    def probe(model: Segmentor) -> dict[str, float]:
        was_training = model.training
        model.eval()
        curve = ThresholdCurve(len(data.classes), options.scored_thresholds(), erosion=options.erosion)
        for number, i in enumerate(indices):
            pixels, objects = data.pixels(i), data.objects(i)
            (maps,) = multi_scale_maps(model, [pixels], [objects], view, precision=config.precision)
            curve.add(maps.full.cpu().numpy(), maps.classes, data.mask(i), name=data.ids[i], half=number % 2)
        model.train(was_training)
        return reported(curve, options, data.name)[0]

    return probe


def gradients(
    model: Segmentor,
    caae: CAAE,
    options: SegmentorConfig,
    batch: Batch,
    generator: torch.Generator,
    pieces: int = 1,
    *,
    caae_size: int,
) -> dict[str, Tensor]:
    """Adds the gradients of a batch's loss; returns its terms."""
    terms = loss_terms(model, caae, options, batch, caae_size=caae_size, generator=generator, pieces=pieces)
    terms["total"].backward()
    return {name: term.detach() for name, term in terms.items()}


def loss_terms(
    model: Segmentor,
    caae: CAAE,
    options: SegmentorConfig,
    batch: Batch,
    *,
    caae_size: int,
    generator: torch.Generator | None = None,
    pieces: int = 1,
) -> dict[str, Tensor]:
    """L_seg of Eq. 13, the terms that `options.losses` names.

    Activation maps live at the size of the CAAE's image, s = `caae_size`. The CAAE embeds the class-foreground and
    class-background images of all P pairs in so many `pieces`; in more than one, what happens inside them and inside
    the blocks is computed twice to save memory.
    """
    images = batch.images
    pairs = Pairs.of(batch.Y).to(images.device)  # known from the labels, without waiting for the device
    Y = batch.Y.to(images.device, non_blocking=True)
    valid = valid_mask(batch.regions, images.shape[-1], caae_size)
    I = F.interpolate(images, size=caae_size, mode="bilinear", align_corners=True)  # noqa: E741 (the paper's symbol)
    logits, E, _ = model(images, kept=model.draw_kept(images, generator), recompute=pieces > 1)
    M = activation_maps(logits, valid)
    S = caae.semantics

    terms: dict[str, Tensor] = {}
    M_pairs, I_pairs = M[pairs.image, pairs.own, None], I[pairs.image]
    kinds = {"CF": (M_pairs, losses.class_foreground), "CB": (1 - M_pairs, losses.class_background)}
    wanted = {name: kind for name, kind in kinds.items() if name in options.losses}
    if wanted:
        weighted = torch.cat([weight * I_pairs for weight, _ in wanted.values()])
        if options.compile:  # for few numbers of images, as each is compiled anew
            weighted = F.pad(weighted, (0, 0) * 3 + (0, -len(weighted) % COMPILED))
        embedded = embed_in_pieces(caae, weighted, pieces)[: len(wanted) * len(I_pairs)]
        sims = similarity(embedded.float(), S).chunk(len(wanted))
        for (name, (_, loss)), sim in zip(wanted.items(), sims, strict=True):
            terms[name] = loss(sim, pairs, options.pair_reduction)
    if "AS" in options.losses:
        terms["AS"] = losses.activation_suppression(M, options.sigma, options.suppress)
    if "AC" in options.losses:
        terms["AC"] = losses.activation_complementation(M, Y, valid, options.complement)
    if "SS" in options.losses:
        terms["SS"] = losses.semantic_similarity(similarity(E.float(), S), Y)
    return {"total": losses.total(terms), **terms}


def embed_in_pieces(caae: CAAE, images: Tensor, pieces: int) -> Tensor:
    """Class embeddings (P, K, D) of images (P, 3, s, s)."""
    if pieces == 1:
        return caae.embed(images)
    return torch.cat([checkpoint(caae.embed, part, use_reentrant=False) for part in images.chunk(pieces)])


def activation_maps(logits: Tensor, valid: Tensor) -> Tensor:
    """M of Eq. 5 at the size of the CAAE's image: logits (B, K, h, w), valid (B, 1, s, s) -> (B, K, s, s)."""
    return F.interpolate(logits.float(), size=valid.shape[-2:], mode="bilinear", align_corners=True).sigmoid() * valid


def build(options: SegmentorConfig, *, n_classes: int, class_dim: int) -> Segmentor:
    """The untrained network of a config; its class tokens start as copies of the backbone's."""
    backbone = build_backbone(
        options.backbone,
        pretrained=options.pretrained and not options.checkpoint,
        weights=options.weights_file,
        image_size=options.image_size,
    )
    return Segmentor(backbone, n_classes=n_classes, class_dim=class_dim, token_dropout=options.token_dropout)


def load(options: SegmentorConfig, artifact: Artifact, *, device: torch.device) -> Segmentor:
    """The trained network, in evaluation mode and frozen."""
    state = load_file(artifact.file(WEIGHTS))
    n_classes, _, class_dim = state["class_head_weight"].shape
    model = build(options.without_weights(), n_classes=n_classes, class_dim=class_dim)
    load_state(model, state, str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
