"""Stage caae: train the Class-Aware AutoEncoder from images and image-level labels (section 3.2)."""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from semformer import losses, metrics
from semformer.config import CaaeConfig, Config
from semformer.data.augment import caae_crops
from semformer.data.loading import Batch, Loader
from semformer.data.pack import Packed
from semformer.data.pixels import as_batch, normalized, resize
from semformer.data.voc import Split
from semformer.models.caae import CAAE
from semformer.models.vit import build_backbone
from semformer.precision import autocast
from semformer.stages.context import Context
from semformer.stages.training import compiled, train
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
    if options.checkpoint:
        load_published(model, "caae", options.checkpoint)
    ctx.have_read(options)
    history: dict[str, list[float]] = {}
    if not options.checkpoint:
        network = compiled(model, options)
        history = train(
            model,
            stage="caae",
            config=options,
            loader=Loader(data, caae_crops, options, seed=config.seed, device=ctx.device),
            gradients=lambda batch, _, pieces: gradients(network, batch, pieces),
            pretrained=model.encoder if options.starts_pretrained else None,
            precision=config.precision,
            seed=config.seed,
            ctx=ctx,
            score=lambda data: {f"{data.name}_ap": label_ap(model, data, options.image_size, config.precision)},
        )
    parts: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, DECODER: {}}
    for name, value in model.state_dict().items():
        parts[DECODER if name.startswith("decoder.") else WEIGHTS][name] = value
    for file, tensors in parts.items():
        save_file(tensors, ctx.out / file)
    return {"history": history}


def selects(config: Config) -> bool:
    """Whether the epoch is chosen, by image-level labels."""
    return config.caae.selection == "best_ap" and not config.caae.checkpoint


@torch.inference_mode()
def label_ap(model: CAAE, data: Split, size: int, precision: str, *, batch_size: int = 64) -> float:
    """The AP in percent of the image-level labels (`metrics.label_ap`) by the similarities of whole images.

    The published choice of the epoch: each image is resized to `size` x `size`. Leaves the network in evaluation mode.
    """
    model.eval()
    device, found = model.semantics_weight.device, []
    for rows in data.batches(batch_size):
        parts = (as_batch(torch.from_numpy(data.pixels(i)).to(device)) for i in rows)
        images = normalized(torch.cat([resize(part, (size, size), "bilinear") for part in parts]))
        with autocast(device, precision):
            E = model.embed(images)
        found.append(losses.similarity(E.float(), model.semantics).cpu())
    return metrics.label_ap(torch.cat(found).numpy(), data.labels)


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
        weights=options.weights_file,
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
    untrained = options.without_weights().model_copy(update={"reconstruction": False})
    model = build(untrained, n_classes=len(state["semantics_weight"]))
    load_state(model, state, str(artifact.path))
    return model.to(device).eval().requires_grad_(False)
