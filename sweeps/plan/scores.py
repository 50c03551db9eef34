"""The scores that tables and searches ask for: their names, where runs record them, and how far a run goes for them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from semformer.config import Config, Goal
from semformer.metrics import COSINES, REPORTED

GOALS: tuple[Goal, ...] = get_args(Goal)
"""From the nearest to the furthest."""
MASK_SCORES = ("miou", "precision", "recall")
OF_MAPS, OF_TRAIN_MAPS, OF_WALK, OF_MASKS, OF_SEGMENTATION = "cam", "train_cam", "walk", "pseudo", "seg"


@dataclass(frozen=True)
class Link:
    """Of the chain from maps to a segmentation. Runs record "<of>/<split>/<score>"; the split is `data.<split>`."""

    stage: str
    """That measures it."""
    made_by: str
    """The stage that makes what is measured."""
    of: str
    split: Literal["eval_split", "mask_split", "test_split"]
    scores: tuple[str, ...]
    goal: Goal


LINKS = {
    OF_MAPS: Link("evaluate", "cams", "cam", "eval_split", (*REPORTED, *COSINES), "cams"),
    OF_TRAIN_MAPS: Link("evaluate_masks", "train_cams", "cam", "mask_split", REPORTED, "pseudo_masks"),
    OF_WALK: Link("evaluate_masks", "walk", "walk", "mask_split", REPORTED, "pseudo_masks"),
    OF_MASKS: Link(
        "evaluate_masks", "pseudo_masks", "pseudo", "mask_split", (*MASK_SCORES, "miou_before_crf"), "pseudo_masks"
    ),
    OF_SEGMENTATION: Link(
        "evaluate_seg",
        "segmentation",
        "seg",
        "test_split",
        tuple(f"{name}{ending}" for ending in ("", "_crf", "_single", "_single_crf") for name in MASK_SCORES),
        "deeplab",
    ),
}
"""By the word before the slash in a score's name; without one, it is of maps."""
NAMES = tuple(name if word == OF_MAPS else f"{word}/{name}" for word, link in LINKS.items() for name in link.scores)
MAIN: dict[Goal, str] = {"cams": "miou", "pseudo_masks": "pseudo/miou", "deeplab": "seg/miou"}
"""What a run that goes so far is for."""
BEYOND: dict[Goal, tuple[str, ...]] = {
    "pseudo_masks": ("affinity_labels", "affinity", "walk", "pseudo_masks", "data.mask_split"),
    "deeplab": ("deeplab", "segmentation", "data.test_split"),
}
"""The fields, or groups of them, that matter only to runs that go so far."""

IDLE: dict[str, Callable[[str], bool]] = {
    "segmentation.crf": lambda name: link_of(name) == OF_SEGMENTATION and not name.endswith("_crf"),
    "pseudo_masks.crf": lambda name: name == "pseudo/miou_before_crf",
    "evaluate.rule": lambda name: name.endswith(("_oracle", "_fixed", "_heldout")),
    "evaluate.thresholds": lambda name: name.endswith("_fixed"),
    "evaluate.fixed_threshold": lambda name: name.endswith(("_oracle", "_heldout")),
}
"""The scores of which a field, or a group of them, changes nothing, though it is an option of what makes or scores
them."""


def link_of(name: str) -> str:
    """The word of LINKS: "pseudo/miou" -> "pseudo", "miou" -> "cam"."""
    return name.rpartition("/")[0] or OF_MAPS


def full_name(name: str, split: str) -> str:
    """As runs record it that was measured on a split: "miou" -> "cam/val/miou"."""
    return f"{LINKS[link_of(name)].of}/{split}/{name.rpartition('/')[2]}"


def recorded(name: str, config: Config) -> str:
    """As runs of a config record it."""
    return full_name(name, getattr(config.data, LINKS[link_of(name)].split))


def is_idle(field: str, name: str) -> bool:
    """Whether a config field changes nothing of a score, see IDLE."""
    return any(of(name) for part, of in IDLE.items() if field == part or field.startswith(f"{part}."))


def is_low(name: str) -> bool:
    """Whether a score is good when it is low."""
    return name.rpartition("/")[2] in ("fp", "fn")


def furthest(goals: Iterable[Goal]) -> Goal:
    """The nearest, where there is none."""
    return max(goals, key=GOALS.index, default=GOALS[0])


def goal_of(names: Iterable[str]) -> Goal:
    """How far a run goes that has all of these scores."""
    return furthest(LINKS[link_of(name)].goal for name in names)


def goal_of_field(field: str) -> Goal:
    """How far a run must go for a config field to matter."""
    of_parts = ((goal, part) for goal, parts in BEYOND.items() for part in parts)
    return furthest(goal for goal, part in of_parts if field == part or field.startswith(f"{part}."))
