"""Stage segmentor: train the segmentation network under the guidance of a frozen CAAE (section 3.3).

Legend: B images, K classes (0 is background), P pairs of (image, present class), s side of the CAAE's image.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from semformer import losses
from semformer.config import CamsConfig, Config, SegmentorConfig
from semformer.data.transforms import segmentor_crop, valid_mask
from semformer.data.voc import Split
from semformer.inference import multi_scale_maps
from semformer.losses import Pairs, similarity
from semformer.metrics import ThresholdCurve, reported
from semformer.models.caae import CAAE
from semformer.models.segmentor import Segmentor
from semformer.models.vit import build_backbone
from semformer.stages import caae as caae_stage
from semformer.stages.context import Context, Progress
from semformer.stages.training import Checkpoint, train, write_whole
from semformer.store import Artifact
from semformer.weights import load_published, load_state

WEIGHTS = "segmentor.safetensors"
log = logging.getLogger(__name__)


def run(config: Config, data: Split, caae: Artifact, ctx: Context) -> dict[str, Any]:
    """Makes `segmentor.safetensors`. Returns the loss terms per epoch, and the names of the classes."""
    options = config.segmentor
    n_classes = len(data.classes)
    torch.manual_seed(config.seed)
    model = build(options, n_classes=n_classes, class_dim=config.caae.class_dim).to(ctx.device)
    history: dict[str, list[float]] = {}
    if options.checkpoint:
        load_published(model, "segmentor", options.checkpoint)
    else:
        guide = caae_stage.load(config.caae, caae, device=ctx.device)

        def sample(i, rng):
            crop, region = segmentor_crop(data.image(i), options, rng)
            return crop, torch.tensor(region), torch.from_numpy(data.labels[i])

        def progress(told: Progress) -> None:
            """Probes beside the training: neither the weights nor the history depend on it."""
            if told.end_of_epoch and ctx.probe:
                told = replace(told, probe=ctx.probe(model))
            ctx.progress(told)

        best = BestEpoch(model, data, config, ctx) if reads_masks(config) else None
        history = train(
            model,
            stage="segmentor",
            config=options,
            n_images=len(data),
            sample=sample,
            loss=lambda batch, generator, part: loss_terms(
                model, guide, options, *batch, caae_size=config.caae.image_size, generator=generator, part=part
            ),
            pretrained=model.backbone if options.pretrained or options.weights else None,
            precision=config.precision,
            seed=config.seed,
            ctx=replace(ctx, progress=progress),
            after_epoch=best,
        )
        if best:
            best.restore()
    save_file(model.state_dict(), ctx.out / WEIGHTS)
    return {"history": history, "classes": list(data.classes)}


def reads_masks(config: Config) -> bool:
    """The published way to choose the epoch is pixel supervision."""
    return config.segmentor.selection == "best_miou" and not config.segmentor.checkpoint


class BestEpoch:
    """Keeps the weights of the epoch with the best `map_miou` on the training split's *pixel masks*, as published.

    Where those of an interrupted training cannot be read any more, it starts again.
    """

    def __init__(self, model: Segmentor, data: Split, config: Config, ctx: Context):
        self.model, self.data, self.precision = model, data, config.precision
        self.path, checkpoint = ctx.checkpoints / "best.safetensors", Checkpoint(ctx.checkpoints).path
        if checkpoint.exists():
            try:
                load_file(self.path)
            except (SafetensorError, OSError) as error:
                log.warning("starting again: the weights %s cannot be read (%s)", self.path, error)
                checkpoint.unlink()

    def __call__(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        miou = map_miou(self.model, self.data, range(len(self.data)), self.precision)
        if epoch == 0 or miou > self._best():
            write_whole(self.model.state_dict(), self.path, miou=repr(miou))
        return {"train_miou": miou}

    def _best(self) -> float:
        with safe_open(self.path, framework="pt") as file:
            return float(file.metadata()["miou"])

    def restore(self) -> None:
        load_state(self.model, load_file(self.path), str(self.path))


def map_probe(data: Split, config: Config, *, n_images: int = 64) -> Callable[[Segmentor], dict[str, float]]:
    """Measures the final metrics (`metrics.reported`) on the single-scale maps of images spread over a split.

    Reads pixel masks. Draws no random number, and leaves the network in the mode it was in.
    """
    options = config.evaluate
    indices = [i * len(data) // n_images for i in range(n_images)] if n_images < len(data) else range(len(data))

    def probe(model: Segmentor) -> dict[str, float]:
        was_training = model.training
        curve = ThresholdCurve(len(data.classes), options.scored_thresholds(), erosion=options.erosion)
        add_single_scale(curve, model.eval(), data, indices, config.precision)
        model.train(was_training)
        return reported(curve, options, data.name)[0]

    return probe


def map_miou(model: Segmentor, data: Split, indices: Sequence[int], precision: str) -> float:
    """Best mIoU in percent over 99 thresholds, of activation maps at one scale, without flip or attention."""
    curve = ThresholdCurve(len(data.classes), [t / 100 for t in range(1, 100)])
    add_single_scale(curve, model, data, indices, precision)
    return float(curve.scores().miou.max())


def add_single_scale(
    curve: ThresholdCurve, model: Segmentor, data: Split, indices: Sequence[int], precision: str
) -> None:
    """Count the activation maps of some images at one scale, without flip or attention."""
    options = CamsConfig(scales=(1.0,), flip=False, final_map="activation")
    for i in indices:
        maps = multi_scale_maps(model, data.image(i), data.objects(i), options, precision=precision)
        curve.add(maps.full.cpu().numpy(), maps.classes, data.mask(i), name=data.ids[i])


def loss_terms(
    model: Segmentor,
    caae: CAAE,
    options: SegmentorConfig,
    images: Tensor,
    regions: Tensor,
    Y: Tensor,
    *,
    caae_size: int,
    generator: torch.Generator | None = None,
    part: slice = slice(None),
) -> dict[str, Tensor]:
    """L_seg of Eq. 13, the terms that `options.losses` names.

    images: (B, 3, H, H), regions: (B, 4) valid pixels of the crops, Y: (B, K). Activation maps live at the size of the
    CAAE's image, s. One pass of the CAAE embeds the class-foreground and class-background images of all P pairs.
    Of the images in `part`, it is their share of the batch's loss, with the tokens that the batch's dropout keeps:
    the shares of all parts add up to the batch's loss.
    """
    pairs = Pairs.of(Y, part)
    valid = valid_mask(regions, images.shape[-1], caae_size)
    n_counted = valid.sum(dim=(1, 2, 3)) * Y.sum(dim=1)  # of L_AC, by image
    share_of_images = len(Y[part]) / len(Y)
    share_of_counted = n_counted[part].sum() / n_counted.sum().clamp(min=1)
    kept = model.draw_kept(images, generator)
    images, valid, Y, kept = images[part], valid[part], Y[part], None if kept is None else kept[part]

    I = F.interpolate(images, size=caae_size, mode="bilinear", align_corners=True)  # noqa: E741 (the paper's symbol)
    logits, E, _ = model(images, kept=kept)
    M = activation_maps(logits, valid)
    S = caae.semantics

    terms: dict[str, Tensor] = {}
    M_pairs, I_pairs = M[pairs.image, pairs.own, None], I[pairs.image]
    kinds = {"CF": (M_pairs, losses.class_foreground), "CB": (1 - M_pairs, losses.class_background)}
    wanted = {name: kind for name, kind in kinds.items() if name in options.losses}
    if wanted:
        embedded = caae.embed(torch.cat([weight * I_pairs for weight, _ in wanted.values()]))
        sims = similarity(embedded.float(), S).chunk(len(wanted))
        for (name, (_, loss)), sim in zip(wanted.items(), sims, strict=True):
            terms[name] = loss(sim, pairs, options.pair_reduction)
    if "AS" in options.losses:
        terms["AS"] = share_of_images * losses.activation_suppression(M, options.sigma, options.suppress)
    if "AC" in options.losses:
        terms["AC"] = share_of_counted * losses.activation_complementation(M, Y, valid, options.complement)
    if "SS" in options.losses:
        terms["SS"] = share_of_images * losses.semantic_similarity(similarity(E.float(), S), Y)
    return {"total": losses.total(terms), **terms}


def activation_maps(logits: Tensor, valid: Tensor) -> Tensor:
    """M of Eq. 5 at the size of the CAAE's image: logits (B, K, h, w), valid (B, 1, s, s) -> (B, K, s, s)."""
    return F.interpolate(logits.float(), size=valid.shape[-2:], mode="bilinear", align_corners=True).sigmoid() * valid


def build(options: SegmentorConfig, *, n_classes: int, class_dim: int) -> Segmentor:
    """The untrained network of a config; its class tokens start as copies of the backbone's."""
    backbone = build_backbone(
        options.backbone,
        pretrained=options.pretrained and not options.checkpoint,
        weights=options.weights,
        image_size=options.image_size,
    )
    return Segmentor(backbone, n_classes=n_classes, class_dim=class_dim, token_dropout=options.token_dropout)


def load(options: SegmentorConfig, artifact: Artifact, *, device: torch.device) -> Segmentor:
    """The trained network, in evaluation mode and frozen."""
    state = load_file(artifact.file(WEIGHTS))
    untrained = options.model_copy(update={"pretrained": False, "weights": ""})
    n_classes, _, class_dim = state["class_head_weight"].shape
    model = build(untrained, n_classes=n_classes, class_dim=class_dim)
    load_state(model, state, str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
