"""Maps of one's own images from a trained, imported or registered network: `semformer predict`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from semformer import draw, memory, pipeline
from semformer.config import Config
from semformer.data.voc import image_size, read_image
from semformer.errors import UserError
from semformer.inference import maps_of_every_kind, present_classes
from semformer.stages import caae, segmentor
from semformer.store import Artifact, Store

CHAIN = ("evaluate", "cams", "segmentor")
"""From a trial's last stage to its network."""


@dataclass(frozen=True)
class Network:
    """A segmentation network. `caae`, by which it tells what an image shows, is None where it has none (any more)."""

    config: Config
    classes: tuple[str, ...]
    segmentor: Artifact
    caae: Artifact | None


def network_of(config: Config, data: Path | None, store: Store) -> Network:
    """The one that a config describes; an imported one needs no images. Raises UserError if the store has none."""
    opened = pipeline.open_classes(config, data) if config.segmentor.checkpoint else pipeline.open_data(config, data)
    keys = pipeline.stage_keys(config, opened, until="segmentor")
    found = {key.stage: artifact for key, artifact in store.find_many(keys.values(), verify=True).items()}
    if "segmentor" not in found:
        raise UserError(
            f"{store.location} has no segmentation network of this config: train it with `semformer run` and the same "
            "--preset, --set and --data (or import it, with `semformer import-checkpoint`)"
        )
    return Network(config, opened.devkit.classes, found["segmentor"], found.get("caae"))


def network_by_key(start: str, config: Config, store: Store) -> Network:
    """The one of the stage whose key begins so: a segmentation network, or maps or scores of one (a trial's key).

    Its options are those that it was made with; `config` has the rest. Raises UserError if that is none, or several.
    """
    begins = start.lower()
    names = [(stage, digest) for stage in CHAIN for digest in store.published([stage]) if digest.startswith(begins)]
    if len(names) != 1:
        told = "several stages have" if names else "no segmentation network, maps or scores have"
        raise UserError(f"--network {start}: in {store.location}, {told} a key that begins so")
    ((first, digest),) = names
    read: dict[str, Artifact] = {}
    for stage in CHAIN[CHAIN.index(first) :]:
        one = store.read_many([(stage, digest)]).get(digest)
        artifact = store.find(one.key) if isinstance(one, Artifact) else None
        if artifact is None:
            raise UserError(
                f"--network {start}: its {stage} has gone from {store.location}, or is damaged. Name the key of the "
                "segmentation network, or give --preset, --set and --data"
            )
        read[stage], digest = artifact, next(iter(artifact.key.inputs.values()), "")
    trained = read["segmentor"]
    source = store.read_many(trained.key.inputs.items()).get(digest)
    guide = store.find(source.key) if isinstance(source, Artifact) else None
    made = [*read.values(), *filter(None, [guide])]
    params: dict[str, Any] = {artifact.key.stage: artifact.key.spec["params"] for artifact in made}
    precision = trained.key.spec.get("precision", config.precision)
    try:
        made_with = Config.model_validate({**config.model_dump(), **params, "precision": precision})
        return Network(made_with, tuple(trained.info["classes"]), trained, guide)
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"--network {start} was made by another version, with other options: give --preset, --set and --data"
        ) from error


@dataclass(frozen=True)
class Drawn:
    """A picture of an image's maps: where it is, of which classes, and what people should know of it."""

    image: Path
    picture: Path
    classes: list[str]
    note: str = ""


def draw_maps(
    network: Network, images: Sequence[Path], named: str | None, out: Path, device: torch.device
) -> Iterator[Drawn]:
    """Draws images in the layout of Figure 4, in `out`; yields each when it is there.

    `named`: the classes in the images, with commas; by default those that the network sees. Images that are longer
    than any that the network was trained on (segmentor.long_side) are shrunk to that length. Raises UserError for names
    that it does not know, for images that cannot be read, where it cannot tell by itself, and for pictures that cannot
    be written or would take the place of an image or of each other.
    """
    config, classes, images = network.config, network.classes, list(dict.fromkeys(images))
    targets = [out / f"{path.stem}.png" for path in images]
    for target, path in zip(targets, images, strict=True):
        image_size(path)  # raises before any work for what is no image
        if targets.count(target) > 1 or target.resolve() in {image.resolve() for image in images}:
            raise UserError(f"{path}: its picture would be {target}, where another is or will be. Choose another --out")
    model = segmentor.load(config.segmentor, network.segmentor, device=device)
    indices = None if named is None else _indices(named, classes)
    if indices is None:
        if network.caae is None:
            raise UserError("this network knows no class semantics: name the --classes in the images")
        S = caae.load(config.caae, network.caae, device=device).semantics
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be a folder: {error.strerror}") from error
    longest = config.segmentor.long_side[1]
    for path, target in zip(images, targets, strict=True):
        photo, note = read_image(path), ""
        if max(photo.size) > longest:
            note = f"{photo.width}x{photo.height} pixels"
            photo.thumbnail((longest, longest), Image.Resampling.BICUBIC)
            note += f", shrunk to {photo.width}x{photo.height}: the network was trained on at most {longest}"
        image = np.array(photo)
        present = present_classes(model, S, image, config) if indices is None else np.array(indices)
        with memory.explained("cams", device):
            found = maps_of_every_kind(model, image, present, config.cams, precision=config.precision)
        maps = {kind: one.numpy() for kind, one in found.items()}
        picture = draw.figure4(image, maps, present, classes, threshold=config.evaluate.fixed_threshold)
        try:
            picture.save(target)
        except OSError as error:
            raise UserError(f"the picture {target} cannot be written: {error.strerror or error}") from error
        yield Drawn(path, target, [classes[c] for c in present], note)


def _indices(names: str, classes: tuple[str, ...]) -> list[int]:
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in classes[1:]:
            raise UserError(f"--classes: {name!r} is none of {', '.join(classes[1:])}")
    return sorted({classes.index(name) for name in wanted})
