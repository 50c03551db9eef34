"""What makes scores comparable, beside what a row is about: recorded with every trial, told under every table."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from semformer.config import Config, flatten
from semformer.keys import StageKey
from sweeps.plan.scores import (
    LINKS,
    NAMES,
    OF_MAPS,
    OF_MASKS,
    OF_SEGMENTATION,
    OF_TRAIN_MAPS,
    OF_WALK,
    is_idle,
    link_of,
)

DIGITS = 8
"""Of a digest, that are recorded."""
SCORED_BY_THRESHOLD = (OF_MAPS, OF_TRAIN_MAPS, OF_WALK)
FROM_WALK = (OF_WALK, OF_MASKS, OF_SEGMENTATION)
MASKS = (OF_MASKS, OF_SEGMENTATION)


@dataclass(frozen=True)
class Setting:
    """A config field, and the scores (words of `scores.LINKS`) that it matters to."""

    field: str
    """ "" for the digest of what a stage reads: `images_of`."""
    of: tuple[str, ...]
    images_of: str = ""


PROTOCOL = {
    "eval_split": Setting("data.eval_split", (OF_MAPS,)),
    "mask_split": Setting("data.mask_split", (OF_TRAIN_MAPS, OF_WALK, OF_MASKS)),
    "test_split": Setting("data.test_split", (OF_SEGMENTATION,)),
    "images of mask_split": Setting("", (OF_TRAIN_MAPS, OF_WALK, OF_MASKS), images_of="evaluate_masks"),
    "images of test_split": Setting("", (OF_SEGMENTATION,), images_of="evaluate_seg"),
    "scales": Setting("cams.scales", tuple(LINKS)),
    "flip": Setting("cams.flip", tuple(LINKS)),
    "erosion": Setting("evaluate.erosion", SCORED_BY_THRESHOLD),
    "rule": Setting("evaluate.rule", SCORED_BY_THRESHOLD),
    "radius of the walk": Setting("walk.radius", FROM_WALK),
    "beta": Setting("walk.beta", FROM_WALK),
    "log2 of the steps": Setting("walk.log2_steps", FROM_WALK),
    "threshold of the masks": Setting("pseudo_masks.threshold", MASKS),
    "CRF iterations of the masks": Setting("pseudo_masks.crf.iterations", MASKS),
    "scales of the segmentation": Setting("segmentation.scales", (OF_SEGMENTATION,)),
    "flip of the segmentation": Setting("segmentation.flip", (OF_SEGMENTATION,)),
    "CRF iterations of the segmentation": Setting("segmentation.crf.iterations", (OF_SEGMENTATION,)),
    "supervised": Setting("deeplab.supervised", (OF_SEGMENTATION,)),
}
"""By the names that runs record. A CRF of 0 iterations is none."""


def of_trial(config: Config, keys: Mapping[str, StageKey]) -> dict[str, Any]:
    """The values of what matters to a trial's scores."""
    values, told = flatten(config), dict[str, Any]()
    for name, setting in of_stages(keys, values).items():
        images = keys[setting.images_of].spec["data"]["images"][:DIGITS] if setting.images_of else ""
        told[name] = images or values[setting.field]
    return told


def of_stages(stages: Collection[str], values: Mapping[str, Any]) -> dict[str, Setting]:
    """What matters to the scores of a run with some stages, by the values of its config's fields."""
    links = {word for word, link in LINKS.items() if link.stage in stages}
    if values.get("pseudo_masks.folder"):
        links -= {OF_TRAIN_MAPS, OF_WALK}
    measured = [name for name in NAMES if link_of(name) in links]
    return {
        name: setting
        for name, setting in of_scores(measured).items()
        if setting.images_of or uses(setting.field, stages, values)
    }


def uses(field: str, stages: Collection[str], values: Mapping[str, Any]) -> bool:
    """Whether a run with some stages has a use for a config field: what comes from a folder has no other settings, and
    how an imported network has learnt is not known."""
    group, _, name = field.partition(".")
    if values.get(folder := f"{group}.folder"):
        return field == folder
    if values.get(f"{group}.checkpoint") and name in ("supervised", "selection"):
        return False
    return group in {"precision", "data", "evaluate", *(name.removeprefix("train_") for name in stages)}


def of_scores(names: Collection[str]) -> dict[str, Setting]:
    """What matters to some of `scores.NAMES`."""
    return {
        told: setting
        for told, setting in PROTOCOL.items()
        if any(link_of(name) in setting.of and not is_idle(setting.field, name) for name in names)
    }
