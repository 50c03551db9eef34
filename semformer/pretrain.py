"""Classification of other images than the method's: what the embedded data set's backbones start from.

As ImageNet's weights for the paper's, they are no stage of a trial but files that trials start from: those of
`models/weights` were made by `semformer pretrain`. Each is kept in the store like a stage, under a key of its own.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from semformer import memory
from semformer.config import PretrainConfig
from semformer.data.augment import caae_crops
from semformer.data.loading import Batch, Loader
from semformer.data.pixels import as_batch, normalized
from semformer.data.voc import Devkit, Split
from semformer.keys import StageKey
from semformer.models.vit import build_vit
from semformer.precision import determinism
from semformer.stages.context import Context, Progress
from semformer.stages.pack import packed
from semformer.stages.training import compiled, train
from semformer.store import Artifact, Lease, LeaseHolder, Store

VERSION = 2
WEIGHTS = "backbone.safetensors"


def pretrain_key(options: PretrainConfig, train_split: Split, seed: int) -> StageKey:
    params, data = options.key_parameters(), {"images": train_split.digest}
    return StageKey("pretrain", {"version": VERSION, "params": params, "data": data, "inputs": {}, "seed": seed})


def pretrain(
    options: PretrainConfig,
    data: Devkit,
    store: Store,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[Progress], None],
    waiting: Callable[[StageKey, LeaseHolder], None] = lambda key, holder: None,
) -> tuple[Artifact, bool]:
    """Finds or makes `backbone.safetensors` (timm's names, without the classifier); tells whether it was found.

    Raises UserError for a model that is no plain ViT, and what `train` raises.
    Its info has the share of the images of split "val" whose class is the likeliest, in percent.
    """
    splits = data.split("train"), data.split("val")
    key = pretrain_key(options, splits[0], seed)

    def make(workspace: Path, lease: Lease) -> dict[str, Any]:
        train_images, val_images = (
            packed(split, ["images"], store, progress=progress, waiting=waiting) for split in splits
        )
        ctx = Context.of(store, lease, workspace, device, progress)
        started = time.monotonic()
        with memory.explained("pretrain", device), determinism(device):
            torch.manual_seed(seed)
            model = build_vit(
                options.backbone,
                pretrained=options.pretrained,
                weights=options.weights_file,
                num_classes=len(data.classes) - 1,
                img_size=options.image_size,
            ).to(device)
            ctx.have_read(options)
            network = compiled(model, options)
            history = train(
                model,
                stage="pretrain",
                config=options,
                loader=Loader(train_images, caae_crops, options, seed=seed, device=device),
                gradients=lambda batch, _, pieces: gradients(network, batch, pieces),
                precision="float32",
                seed=seed,
                ctx=ctx,
            )
            scored = accuracy(model, val_images)
        weights = {name: value for name, value in model.state_dict().items() if "head" not in name}
        save_file(weights, workspace / WEIGHTS, metadata={"key": json.dumps(key.spec)})
        return {"history": history, "accuracy": scored, "seconds": time.monotonic() - started}

    return store.find_or_make(key, make, wait=partial(waiting, key))


def gradients(model: nn.Module, batch: Batch, pieces: int) -> dict[str, Tensor]:
    """Adds the gradients of the cross-entropy with the object class of each image; returns it."""
    total = torch.zeros((), device=batch.images.device)
    classes = batch.Y[:, 1:].argmax(dim=1).to(batch.images.device, non_blocking=True)
    for images, wanted in zip(batch.images.chunk(pieces), classes.chunk(pieces), strict=True):
        loss = F.cross_entropy(model(images).float(), wanted, label_smoothing=0.1) * len(images) / len(batch)
        loss.backward()
        total = total + loss.detach()
    return {"total": total}


@torch.inference_mode()
def accuracy(model: nn.Module, data: Split, *, batch_size: int = 64) -> float:
    """Percent. Leaves the network in evaluation mode."""
    model.eval()
    right, device = 0, next(model.parameters()).device
    for rows in data.batches(batch_size):
        images = torch.cat([as_batch(torch.from_numpy(data.pixels(i)).to(device)) for i in rows])
        likeliest = model(normalized(images)).argmax(dim=1).cpu().numpy()
        right += int((likeliest == data.labels[rows, 1:].argmax(axis=1)).sum())
    return 100 * right / len(data)
