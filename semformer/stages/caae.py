"""Stage caae: train the Class-Aware AutoEncoder from images and image-level labels (section 3.2)."""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from semformer import losses
from semformer.config import CaaeConfig, Config
from semformer.data.transforms import caae_crop
from semformer.data.voc import Split
from semformer.models.caae import CAAE
from semformer.models.vit import build_backbone
from semformer.stages.context import Context
from semformer.stages.training import train
from semformer.store import Artifact
from semformer.weights import load_published, load_state

WEIGHTS = "caae.safetensors"


def run(config: Config, data: Split, ctx: Context) -> dict[str, Any]:
    """Makes `caae.safetensors`: encoder, class semantics and decoder. Returns the loss terms per epoch."""
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
            n_images=len(data),
            sample=lambda i, rng: (caae_crop(data.image(i), options, rng), torch.from_numpy(data.labels[i])),
            loss=lambda batch, generator, part: loss_terms(model, *batch, part=part),
            pretrained=model.encoder if options.pretrained or options.weights else None,
            precision=config.precision,
            seed=config.seed,
            ctx=ctx,
        )
    save_file(model.state_dict(), ctx.out / WEIGHTS)
    return {"history": history}


def loss_terms(model: CAAE, images: Tensor, Y: Tensor, *, part: slice = slice(None)) -> dict[str, Tensor]:
    """L_CAAE of Eq. 4 and its terms. images: (B, 3, S, S), Y: (B, K). Only present classes train their semantics.

    Of the images in `part`, it is their share of the batch's loss: the shares of all parts add up to it.
    """
    share = len(Y[part]) / len(Y)
    images, Y = images[part], Y[part]
    E, images_recon = model(images)
    S = torch.where(Y[..., None].bool(), model.semantics, model.semantics.detach())
    terms = {"SS": share * losses.semantic_similarity(losses.similarity(E.float(), S), Y)}
    if images_recon is not None:
        terms["recon"] = share * losses.reconstruction(images, images_recon.float())
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
    """The trained network, in evaluation mode and frozen."""
    state = load_file(artifact.file(WEIGHTS))
    untrained = options.model_copy(update={"pretrained": False, "weights": ""})
    model = build(untrained, n_classes=len(state["semantics_weight"]))
    load_state(model, state, str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
