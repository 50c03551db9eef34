"""Stage caae: train the Class-Aware AutoEncoder from images and image-level labels (section 3.2)."""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from semformer import losses
from semformer.config import CaaeConfig, Config
from semformer.data.augment import caae_crops
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.models.caae import CAAE
from semformer.models.vit import build_backbone
from semformer.stages.context import Context
from semformer.stages.training import train
from semformer.store import Artifact
from semformer.weights import load_published, load_state

WEIGHTS = "caae.safetensors"
DECODER = "decoder.safetensors"
"""Apart from the rest: nothing after this stage needs it, and it is the larger half."""


def run(config: Config, data: Packed, ctx: Context) -> dict[str, Any]:
    """Makes `caae.safetensors` (encoder and class semantics) and the decoder. Returns the loss terms per epoch."""
    options = config.caae
    torch.manual_seed(config.seed)
    model = build(options, n_classes=len(data.classes)).to(ctx.device)
    history: dict[str, list[float]] = {}
    if options.checkpoint:
        load_published(model, "caae", options.checkpoint)
    else:
        history = train(
            model,
            stage="caae",
            config=options,
            loader=Loader(data, caae_crops, options, seed=config.seed, device=ctx.device),
            gradients=lambda batch, _, pieces: gradients(model, batch, pieces),
            pretrained=model.encoder if options.pretrained or options.weights else None,
            precision=config.precision,
            seed=config.seed,
            ctx=ctx,
        )
    parts: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, DECODER: {}}
    for name, value in model.state_dict().items():
        parts[DECODER if name.startswith("decoder.") else WEIGHTS][name] = value
    for file, tensors in parts.items():
        save_file(tensors, ctx.out / file)
    return {"history": history}


def gradients(model: CAAE, batch: Batch, pieces: int = 1) -> dict[str, Tensor]:
    """Adds the gradients of a batch's loss; returns its terms. Each is a mean over images: pieces count by theirs."""
    totals: dict[str, Tensor] = {}
    Y = batch.Y.to(batch.images.device, non_blocking=True)
    for images, labels in zip(batch.images.chunk(pieces), Y.chunk(pieces), strict=True):
        share = len(labels) / len(Y)
        terms = {name: share * term for name, term in loss_terms(model, images, labels).items()}
        terms["total"].backward()
        totals = {name: totals.get(name, 0.0) + term.detach() for name, term in terms.items()}
    return totals


def loss_terms(model: CAAE, images: Tensor, Y: Tensor) -> dict[str, Tensor]:
    """L_CAAE of Eq. 4 and its terms. images: (B, 3, S, S), Y: (B, K). Only present classes train their semantics."""
    E, images_recon = model(images)
    S = torch.where(Y[..., None].bool(), model.semantics, model.semantics.detach())
    terms = {"SS": losses.semantic_similarity(losses.similarity(E.float(), S), Y)}
    if images_recon is not None:
        terms["recon"] = losses.reconstruction(images, images_recon.float())
    return {"total": losses.total(terms), **terms}


def build(options: CaaeConfig, *, n_classes: int) -> CAAE:
    """The untrained network of a config."""
    encoder = build_backbone(
        options.backbone,
        pretrained=options.pretrained and not options.checkpoint,
        weights=options.weights,
        image_size=options.image_size,
    )
    return CAAE(
        encoder,
        n_classes=n_classes,
        class_dim=options.class_dim,
        merge=options.merge,
        decoder_depth=options.decoder_depth,
        decoder_width=options.decoder_width,
        reconstruction=options.reconstruction,
    )


def load(options: CaaeConfig, artifact: Artifact, *, device: torch.device) -> CAAE:
    """The trained network without its decoder, in evaluation mode and frozen."""
    state = load_file(artifact.file(WEIGHTS))
    untrained = options.model_copy(update={"pretrained": False, "weights": "", "reconstruction": False})
    model = build(untrained, n_classes=len(state["semantics_weight"]))
    load_state(model, state, str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
