"""Maps of one's own images from a trained, imported or registered network: `semformer predict`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semformer import draw, pipeline
from semformer.config import Config
from semformer.data.voc import read_image
from semformer.errors import UserError
from semformer.inference import MAP_KINDS, multi_scale_maps, present_classes
from semformer.stages import caae, segmentor
from semformer.store import Artifact, Store


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
    stages = ("segmentor", "cams", "evaluate")
    names = [(stage, digest) for stage in stages for digest in store.published([stage]) if digest.startswith(start)]
    if len(names) != 1:
        told = "several stages have" if names else "no segmentation network, maps or scores have"
        raise UserError(f"--network {start}: in {store.location}, {told} a key that begins so")
    read = {one.key.stage: one for one in store.read_with_inputs(names).values() if isinstance(one, Artifact)}
    found = {stage: store.find(read[stage].key) for stage in ("segmentor", "caae") if stage in read}
    trained = found.get("segmentor")
    if trained is None:
        raise UserError(f"--network {start}: the segmentation network has gone from {store.location}")
    params: dict[str, Any] = {stage: artifact.key.spec["params"] for stage, artifact in read.items()}
    precision = trained.key.spec.get("precision", config.precision)
    made_with = Config.model_validate({**config.model_dump(), **params, "precision": precision})
    return Network(made_with, tuple(trained.info["classes"]), trained, found.get("caae"))


def draw_maps(
    network: Network, images: Sequence[Path], named: str | None, out: Path, device: torch.device
) -> Iterator[tuple[Path, list[str], Path]]:
    """Draws images in the layout of Figure 4; yields each with its classes and its picture, which is in `out`.

    `named`: the classes in the images, with commas; by default those that the network sees. Raises UserError for names
    that it does not know, for images that cannot be read, and where it cannot tell by itself.
    """
    config, classes = network.config, network.classes
    model = segmentor.load(config.segmentor, network.segmentor, device=device)
    indices = None if named is None else _indices(named, classes)
    if indices is None:
        if network.caae is None:
            raise UserError("this network knows no class semantics: name the --classes in the images")
        S = caae.load(config.caae, network.caae, device=device).semantics
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        image = read_image(path)
        present = present_classes(model, S, image, config) if indices is None else np.array(indices)
        maps: dict[str, np.ndarray] = {}
        for kind in MAP_KINDS:
            view = config.cams.model_copy(update={"final_map": kind})
            full = multi_scale_maps(model, image, present, view, precision=config.precision).full
            maps[kind] = full.cpu().numpy()
        target = out / f"{path.stem}.png"
        draw.figure4(image, maps, present, classes, threshold=config.evaluate.fixed_threshold).save(target)
        yield path, [classes[c] for c in present], target


def _indices(names: str, classes: tuple[str, ...]) -> list[int]:
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in classes[1:]:
            raise UserError(f"--classes: {name!r} is none of {', '.join(classes[1:])}")
    return sorted(classes.index(name) for name in wanted)
