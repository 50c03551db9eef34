"""The whole pipeline: the stages in order, what each reads, and how one is found or made.

images, labels ──> caae ──> segmentor ──> cams ──> evaluate <── pixel masks
                                └──> train_cams ──> affinity_labels ──> affinity
                                        └──> walk <────────────────────────┘
                                               └──> pseudo_masks ──> deeplab ──> segmentation
                         pixel masks ──> evaluate_masks <─┘   pixel masks ──> evaluate_seg <─┘
"""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from semformer import memory
from semformer.config import Config, Goal, Settings, file_digest
from semformer.data.pack import Packed
from semformer.data.shapes import CLASSES as SHAPES
from semformer.data.shapes import cached_shapes
from semformer.data.voc import BACKGROUND, VOC_CLASSES, Devkit, Split, open_devkit
from semformer.errors import UserError
from semformer.keys import StageKey, to_make
from semformer.models.vit import backbone_shape, check_tiles
from semformer.precision import determinism
from semformer.stages import (
    affinity,
    affinity_labels,
    caae,
    cams,
    deeplab,
    evaluate,
    evaluate_masks,
    evaluate_seg,
    pack,
    pseudo_masks,
    segmentation,
    segmentor,
    walk,
)
from semformer.stages.context import Context, Progress
from semformer.store import Artifact, Lease, LeaseHolder, Store

SplitField = Literal["train_split", "eval_split", "selection_split", "mask_split", "test_split"]


@dataclass(frozen=True)
class Stage:
    """A stage and everything that its key depends on. Raise `version` with any change that changes its result."""

    name: str
    run: Callable[..., dict[str, Any]]
    inputs: tuple[str, ...]
    split: SplitField
    version: int = 1
    reads_images: bool = True
    selects: Callable[[Config], bool] = lambda config: False
    """Whether it keeps the epoch that is best on `data.selection_split`, so that it reads that split as well."""
    split_of_masks: SplitField | None = None
    """The split whose pixel masks it reads, if it reads that split."""
    learns_from_masks: Callable[[Config], bool] = lambda config: False
    """Whether it reads the pixel masks of its own split in the place of its inputs."""
    options_of: str = ""
    """The stage whose group of options it has, where that is not its own."""
    spares: Callable[[Config], bool] = lambda config: False
    """Whether it does without all of its inputs but the last."""

    @property
    def group(self) -> str:
        """The name of its options in a config."""
        return self.options_of or self.name

    def options(self, config: Config) -> Settings:
        return getattr(config, self.group)

    def splits(self, config: Config) -> dict[str, list[pack.Kind]]:
        """The splits that it reads, its own first, and what of them; an imported network reads none."""
        if self.is_imported(config):
            return {}
        fields = [self.split, "selection_split"] if self.selects(config) else [self.split]
        images: list[pack.Kind] = ["images"] if self.reads_images else []
        kinds: dict[str, list[pack.Kind]] = {}
        for field in fields:
            of_split = kinds.setdefault(getattr(config.data, field), [*images])
            if field == self.split_of_masks or (field == self.split and self.learns_from_masks(config)):
                of_split.append("masks")
        return kinds

    @property
    def measures(self) -> bool:
        """Whether it scores, under the name of its split, what others have made."""
        return self.split_of_masks == self.split

    def reads_masks(self, config: Config) -> bool:
        return any("masks" in kinds for kinds in self.splits(config).values())

    def is_imported(self, config: Config) -> bool:
        return bool(getattr(self.options(config), "checkpoint", ""))

    def needs(self, config: Config) -> tuple[str, ...]:
        """The stages whose results it reads."""
        if self.options(config).replaces_inputs:
            return ()
        return self.inputs[-1:] if self.spares(config) else self.inputs


STAGES = (
    Stage("caae", caae.run, inputs=(), split="train_split", version=4, selects=caae.selects),
    Stage(
        "segmentor",
        segmentor.run,
        inputs=("caae",),
        split="train_split",
        version=3,
        selects=segmentor.selects,
        split_of_masks="selection_split",
    ),
    Stage("cams", cams.run, inputs=("segmentor",), split="eval_split", version=3),
    Stage(
        "evaluate",
        evaluate.run,
        inputs=("cams",),
        split="eval_split",
        version=3,
        reads_images=False,
        split_of_masks="eval_split",
    ),
    Stage("train_cams", cams.run, inputs=("segmentor",), split="train_split", version=3, options_of="cams"),
    Stage("affinity_labels", affinity_labels.run, inputs=("train_cams",), split="train_split"),
    Stage("affinity", affinity.run, inputs=("affinity_labels",), split="train_split"),
    Stage("walk", walk.run, inputs=("train_cams", "affinity"), split="train_split", version=2),
    Stage("pseudo_masks", pseudo_masks.run, inputs=("walk",), split="train_split"),
    Stage(
        "evaluate_masks",
        evaluate_masks.run,
        inputs=("train_cams", "walk", "pseudo_masks"),
        split="mask_split",
        version=2,
        split_of_masks="mask_split",
        options_of="evaluate",
        spares=lambda config: bool(config.pseudo_masks.folder),
    ),
    Stage(
        "deeplab",
        deeplab.run,
        inputs=("pseudo_masks",),
        split="train_split",
        learns_from_masks=lambda config: config.deeplab.supervised,
    ),
    Stage("segmentation", segmentation.run, inputs=("deeplab",), split="test_split"),
    Stage(
        "evaluate_seg",
        evaluate_seg.run,
        inputs=("segmentation",),
        split="test_split",
        version=2,
        split_of_masks="test_split",
        options_of="evaluate",
    ),
)
MAPS = ("evaluate",)
"""What a run ends with that goes as far as the maps."""


def ends(config: Config, goal: Goal) -> tuple[str, ...]:
    """The stages that a run ends with which goes so far: they hold the scores of what leads to there."""
    masks, seg = ("evaluate_masks",), ("evaluate_seg",)
    if goal == "cams":
        return MAPS
    scored = masks if config.pseudo_masks.folder else (*MAPS, *masks)
    if goal == "pseudo_masks":
        return scored
    return seg if config.deeplab.replaces_inputs else (*scored, *seg)


def scores(artifacts: Iterable[Artifact]) -> dict[str, float]:
    """What the stages among them have measured that score others, by full name; of two equal names the first's."""
    told: dict[str, float] = {}
    for artifact in artifacts:
        told |= {name: value for name, value in artifact.info.get("metrics", {}).items() if name not in told}
    return told


class Data:
    """The splits of a devkit, read once; those that are `unlabelled` are for stages that read no labels."""

    def __init__(self, devkit: Devkit, unlabelled: Collection[str] = ()):
        self.devkit, self.unlabelled = devkit, unlabelled
        self._splits: dict[str, Split] = {}

    def __getitem__(self, name: str) -> Split:
        if name not in self._splits:
            self._splits[name] = self.devkit.split(name, labelled=name not in self.unlabelled)
        return self._splits[name]

    def unread(self) -> Packed:
        """Of which the names of the classes are all that is known."""
        classes = self.devkit.classes
        return Packed("unread", self.devkit.folder, classes, ids=(), labels=np.zeros((0, len(classes)), np.float32))

    def describe(self, name: str) -> str:
        """What a split is, for people: the data set, the number of images, and the start of their digest."""
        split = self[name]
        return f"{self.devkit.name} ({len(split)} images, {split.digest[:8]})"


@dataclass(frozen=True)
class StageRun:
    """What happened to one stage: `found` in the store, or made in `seconds`."""

    stage: str
    key: str
    found: bool
    seconds: float
    artifact: Artifact


def open_data(
    config: Config,
    folder: str | Path | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    unlabelled: Collection[str] = (),
) -> Data:
    """The devkit in `folder`, or the embedded shapes data set (made in the cache when it is not there yet)."""
    if folder:
        return Data(open_devkit(folder), unlabelled)
    if not config.data.shapes:
        raise UserError("this preset needs real images: give the VOC devkit's folder with --data DIR")
    return Data(open_devkit(cached_shapes(config.data.shapes, progress=progress)), unlabelled)


def open_classes(config: Config, folder: str | Path | None) -> Data:
    """As `open_data` where the names of the classes are all that is read: without a folder, there are no images."""
    if folder:
        return open_data(config, folder)
    return Data(Devkit(Path(), (BACKGROUND, *(SHAPES if config.data.shapes else VOC_CLASSES))))


def check(config: Config, stages: Collection[str] = ()) -> None:
    """Raises UserError for what no single field shows to be wrong, of the networks and of these stages."""
    for stage in ("caae", "segmentor"):
        options = getattr(config, stage)
        check_tiles(options.backbone, options.image_size, f"{stage}.image_size")
    depth = backbone_shape(config.segmentor.backbone)["depth"]
    if config.cams.last_blocks > depth:
        raise UserError(
            f"cams.last_blocks = {config.cams.last_blocks} (U), but {config.segmentor.backbone} has {depth} blocks"
        )
    heads = backbone_shape(config.caae.backbone)["num_heads"]
    if config.caae.reconstruction and config.caae.decoder_width % heads:
        raise UserError(
            f"caae.decoder_width = {config.caae.decoder_width} is no multiple of the {heads} heads of "
            f"{config.caae.backbone}"
        )

    if "affinity" in stages:
        affinity.check(config.affinity)
    if "deeplab" in stages:
        deeplab.check(config.deeplab)


def _check_splits(config: Config, data: Data) -> None:
    fields = config.data.mask_split, config.data.train_split
    masks, train = (data[name] for name in fields)
    if strange := sorted(set(masks.ids) - set(train.ids)):
        raise UserError(
            f"data.mask_split = {fields[0]} has images that have no pseudo masks, such as {strange[0]}: those of "
            f"data.train_split = {fields[1]} have some"
        )


def needed_stages(config: Config, until: str | Sequence[str] = MAPS) -> list[Stage]:
    """The stages that lead to `until`, one or several, in order. An imported network needs none before it."""
    wanted = {until} if isinstance(until, str) else set(until)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.needs(config))
    return [stage for stage in STAGES if stage.name in wanted]


def stage_keys(config: Config, data: Data, until: str | Sequence[str] = MAPS) -> dict[str, StageKey]:
    """The keys of the needed stages, in order: everything that can change a stage's result, and nothing else."""
    stages = needed_stages(config, until)
    check(config, names := {stage.name for stage in stages})
    if "evaluate_masks" in names:
        _check_splits(config, data)
    keys: dict[str, StageKey] = {}
    for stage in stages:
        options = stage.options(config)
        if stage.is_imported(config):
            rest: dict[str, Any] = {"data": {"classes": list(data.devkit.classes)}}
        else:
            rest = {"data": {}}
            for role, (name, kinds) in zip(("images", "selection_images"), stage.splits(config).items(), strict=False):
                rest["data"][role] = data[name].digest
                if "masks" in kinds:
                    rest["data"]["masks"] = data[name].mask_digest
            if stage.measures:
                rest["data"]["split"] = getattr(config.data, stage.split)
            rest["inputs"] = {name: keys[name].digest for name in stage.needs(config)}
            if not getattr(options, "folder", ""):
                rest |= {"seed": config.seed, "precision": config.precision}
        files = tuple(map(file_digest, options.files))
        keys[stage.name] = _stage_key(stage.name, stage.version, options, files, json.dumps(rest))
    return keys


@lru_cache(maxsize=100_000)
def _stage_key(name: str, version: int, options: Settings, files: tuple[str, ...], rest: str) -> StageKey:
    """Many trials of a large plan share a stage, and its key is made once for the same contents of its files."""
    params = options.key_parameters()
    return StageKey(name, {"stage": name, "version": version, "params": params, **json.loads(rest)})


def run(
    config: Config,
    data: Data,
    store: Store,
    *,
    device: torch.device,
    progress: Callable[[Progress], None],
    waiting: Callable[[StageKey, LeaseHolder], None] = lambda key, holder: None,
    until: str | Sequence[str] = MAPS,
    probe: Callable[[Any], Mapping[str, float]] | None = None,
) -> Iterator[StageRun]:
    """Make what is missing of the stages that lead to `until`; yields these and what was found, in order.

    What is missing is resolved from the end (`keys.to_make`): a stage that nothing missing reads may be gone, and is
    looked up by its manifest alone.
    `probe`, such as `segmentor.map_probe`, adds what it measures to the report of each segmentation epoch.
    Two processes never make the same stage at once: the second waits (`waiting` is told for whom), then finds it.
    An artifact's info has what its stage returned, and "seconds", "memory" (see `memory.peak`) and "versions".
    Raises UserError where a stage does not fit into memory, beside what the stages raise.
    """
    keys = stage_keys(config, data, until)
    done: dict[str, Artifact] = {}

    def is_there(key: StageKey) -> bool:
        if artifact := store.find(key):
            done[key.stage] = artifact
        return key.stage in done

    missing = {key.stage for key in to_make(keys, is_there)}
    unread = [key for name, key in keys.items() if name not in missing | done.keys()]
    with suppress(UserError):  # looked up for the report alone: nothing missing reads them
        done |= {key.stage: artifact for key, artifact in store.find_many(unread).items()}

    def packed(name: str, *kinds: pack.Kind) -> Packed:
        return pack.packed(data[name], kinds, store, progress=progress, waiting=waiting)

    def make(stage: Stage, workspace: Path, lease: Lease) -> dict[str, Any]:
        splits = [packed(name, *kinds) for name, kinds in stage.splits(config).items()] or [data.unread()]
        selection = splits[-1] if stage.selects(config) else None
        told = partial(_told, progress, stage.name)
        ctx = Context.of(store, lease, workspace, device, told, probe=probe, selection=selection)
        inputs = [done[name] if name in stage.needs(config) else None for name in stage.inputs]
        started = time.monotonic()  # when the images are there: a pack is made once for all stages
        with memory.explained(stage.name, device), determinism(device):
            memory.reset_peak(device)
            made = stage.run(config, splits[0], *inputs, ctx)
        taken = {"seconds": time.monotonic() - started, "memory": memory.peak(device)}
        return {**made, **taken, "versions": versions()}

    for stage in needed_stages(config, until):
        found, key = True, keys[stage.name]
        if stage.name in missing:
            done[stage.name], found = store.find_or_make(key, partial(make, stage), wait=partial(waiting, key))
        if artifact := done.get(stage.name):
            yield StageRun(stage.name, key.digest, found, 0.0 if found else artifact.info["seconds"], artifact)


def _told(progress: Callable[[Progress], None], stage: str, report: Progress) -> None:
    progress(replace(report, stage=stage))


def packs(config: Config, until: str | Sequence[str] = MAPS) -> list[tuple[str, pack.Kind]]:
    """The packs (split, of what) that making the stages of `until` takes."""
    read = [
        (name, kind)
        for stage in needed_stages(config, until)
        for name, kinds in stage.splits(config).items()
        for kind in kinds
    ]
    return list(dict.fromkeys(read))


def find_or_pack(
    config: Config,
    data: Data,
    store: Store,
    progress: Callable[[Progress], None],
    waiting: Callable[[StageKey, LeaseHolder], None],
) -> Iterator[tuple[str, pack.Kind, Artifact, bool]]:
    """Makes the packs that are missing; yields each with its split, of what it is, and whether it was there."""
    for name, kind in packs(config):
        yield name, kind, *pack.find_or_pack(data[name], kind, store, progress, waiting)


def versions() -> dict[str, str]:
    """Of what can change numbers without changing a key."""
    packages = ("semformer-sweeps", "torch", "torchvision", "timm", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
