"""The embedded data set: procedural images in VOC layout, on which weak supervision fails as it does on VOC.

An object is a body and, mostly, a part. The body is large and only weakly telling: an outline and a low-contrast
texture in one of two colours, each shared with another class and with a background. The part is small and gives the
class away: a saturated emblem in the class's two colours, at the class's place in the body. Where it is seen, a
classifier needs the part alone, so a plain activation map covers too little. Each class is mostly seen in its own
context (water, grass, sand, sky), which tells of it where the part is not seen, and which stands out more than the
body does: so the map leaks into the background.

Image i of a split depends on (seed, split, i, size) and on nothing else. An object's extent is its diameter;
texture periods are in pixels of a 96-pixel image. Change VERSION with anything that changes an image.
"""

import glob
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from semformer.config import Difficulty, ShapesConfig
from semformer.data import other_shapes
from semformer.data.drawing import (
    Array,
    Body,
    Outline,
    Texture,
    blend,
    box,
    finished,
    gradient,
    grid,
    petals,
    place,
    polygon,
    put_emblem,
    smooth_noise,
    textured,
    wave,
)
from semformer.data.voc import IGNORE, voc_palette
from semformer.errors import UserError
from semformer.machine import cache_folder
from semformer.store.processes import is_alive, machine

VERSION = 5

NUM_OBJECTS_PROBABILITIES = (0.50, 0.35, 0.15)  # of one, two, three objects
SAME_CLASS_PROBABILITY = 0.08  # that a further object repeats the class of an earlier one
EXTENT_RANGE = (0.35, 0.62)  # object's extent / image's side
MIN_VISIBLE_PIXELS = 60  # of each object, in a 96-pixel image
MIN_VISIBLE_FRACTION = 0.7  # of each object's own area; the rest may be hidden by a later object
COLOUR_JITTER = 0.03  # standard deviation, of every colour drawn from PALETTE

Colour = tuple[float, float, float]

PALETTE = np.array(
    [
        (0.28, 0.45, 0.66),  # blue
        (0.36, 0.55, 0.30),  # green
        (0.76, 0.66, 0.46),  # sand
        (0.66, 0.77, 0.86),  # pale blue
        (0.52, 0.38, 0.28),  # brown
        (0.55, 0.55, 0.55),  # grey
        (0.28, 0.50, 0.50),  # teal
        (0.70, 0.50, 0.50),  # rose
    ]
)


@dataclass(frozen=True)
class Context:
    """A kind of background: two of PALETTE's colours, blended from top to bottom, and a texture."""

    colours: tuple[int, int]
    texture: str


@dataclass(frozen=True)
class ObjectClass:
    """What an object of a class looks like.

    Its outline is that of its name in OUTLINES; texture and context are keys of TEXTURES and CONTEXTS; place is the
    part's centre in the upright body, x and y in -0.5..0.5 of the extent; colours are those of the part's rim and core;
    fills are the indices of the body's usual colours in PALETTE, each of which two classes share.
    """

    texture: str
    period: float
    place: tuple[float, float]
    colours: tuple[Colour, Colour]
    fills: tuple[int, int]
    context: str


CONTEXTS = {
    "water": Context(colours=(0, 6), texture="waves"),
    "grass": Context(colours=(1, 4), texture="blades"),
    "sand": Context(colours=(2, 7), texture="grain"),
    "sky": Context(colours=(3, 5), texture="clouds"),
}

RED, YELLOW, MAGENTA, CYAN = (0.9, 0.1, 0.1), (1.0, 0.9, 0.1), (0.9, 0.1, 0.8), (0.1, 0.9, 0.9)
LIME, ORANGE, VIOLET, NAVY = (0.4, 0.95, 0.1), (1.0, 0.5, 0.0), (0.5, 0.1, 0.9), (0.1, 0.1, 0.6)
WHITE, BLACK = (1.0, 1.0, 1.0), (0.05, 0.05, 0.05)

CLASSES = {
    "disc": ObjectClass("horizontal", 6.0, (0.0, -0.25), (RED, BLACK), (0, 3), "water"),
    "square": ObjectClass("checker", 9.0, (0.18, 0.18), (YELLOW, WHITE), (1, 4), "grass"),
    "triangle": ObjectClass("vertical", 6.0, (0.0, 0.10), (MAGENTA, BLACK), (2, 5), "sand"),
    "star": ObjectClass("dots", 8.0, (0.0, 0.0), (CYAN, WHITE), (3, 6), "sky"),
    "cross": ObjectClass("rings", 7.0, (0.0, -0.32), (LIME, BLACK), (4, 7), "water"),
    "crescent": ObjectClass("diagonal", 6.0, (-0.31, 0.0), (ORANGE, WHITE), (5, 0), "grass"),
    "bar": ObjectClass("diamonds", 9.0, (0.30, 0.0), (VIOLET, BLACK), (6, 1), "sand"),
    "flower": ObjectClass("zigzag", 8.0, (0.22, 0.125), (NAVY, WHITE), (7, 2), "sky"),
}

OUTLINES: dict[str, Outline] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.5,
    "square": lambda x, y: box(x, y, 0.42, 0.42),
    "triangle": lambda x, y: polygon(x, y, [(0.0, -0.5), (0.48, 0.36), (-0.48, 0.36)]),
    "star": lambda x, y: 0.8 * petals(x, y, 5, 0.36, 0.14),
    "cross": lambda x, y: np.minimum(box(x, y, 0.17, 0.5), box(x, y, 0.5, 0.17)),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.5, 0.34 - np.hypot(x - 0.28, y)),
    "bar": lambda x, y: box(x, y, 0.5, 0.2),
    "flower": lambda x, y: 0.8 * petals(x, y, 3, 0.38, 0.12),
}

# Their orientation tells the class; no two are mirror images.
TEXTURES: dict[str, Texture] = {
    "horizontal": lambda x, y, p: wave(y, p),
    "vertical": lambda x, y, p: wave(x, p),
    "diagonal": lambda x, y, p: wave((x + y) * np.sqrt(0.5), p),
    "checker": lambda x, y, p: np.clip(3 * wave(x, p) * wave(y, p), -1, 1),
    "diamonds": lambda x, y, p: np.clip(3 * wave((x + y) * np.sqrt(0.5), p) * wave((x - y) * np.sqrt(0.5), p), -1, 1),
    "dots": lambda x, y, p: np.clip(2 * (wave(x, p) + wave(y, p)) - 1.6, -1, 1),
    "rings": lambda x, y, p: wave(np.hypot(x, y), p),
    "zigzag": lambda x, y, p: wave(y + 0.6 * np.abs(x % (2 * p) - p), p),
}


def render(
    split: str, index: int, *, seed: int, size: int, difficulty: Difficulty | None = None
) -> tuple[Array, Array, list[tuple[int, Array]]]:
    """Draw image `index` of a split.

    Returns the image, (size, size, 3) uint8; the mask, (size, size) uint8 with class indices and a ring of
    255, one pixel wide, along the objects' edges; and per object its class index and its visible pixels,
    (size, size) bool, ring included.
    """
    difficulty = difficulty or Difficulty()
    rng = np.random.default_rng([seed, *split.encode(), index, size])
    names = _draw_classes(rng)
    classes = [CLASSES[name] for name in names]
    bodies, instances = _draw_layout(rng, names, size)
    image = _draw_background(rng, classes[0].context, size, difficulty)
    for object_class, body in zip(classes, bodies, strict=True):
        _paint(rng, image, object_class, body, difficulty)
    drawn = finished(rng, image)
    indices = [list(CLASSES).index(name) + 1 for name in names]
    mask = np.array([0, *indices], dtype=np.uint8)[instances]
    mask[_ring(instances)] = IGNORE
    visible = [(k, instances == n) for n, k in enumerate(indices, start=1)]
    return drawn, mask, visible


def _draw_classes(rng: np.random.Generator) -> list[str]:
    names: list[str] = []
    for _ in range(1 + rng.choice(3, p=NUM_OBJECTS_PROBABILITIES)):
        if names and rng.random() < SAME_CLASS_PROBABILITY:
            names.append(str(rng.choice(names)))
        else:
            names.append(str(rng.choice([name for name in CLASSES if name not in names])))
    return names


def _draw_layout(rng: np.random.Generator, names: list[str], size: int) -> tuple[list[Body], Array]:
    """Place the objects, later ones in front, again and again until enough of each can be seen.

    Returns the bodies and the instance map, (size, size): 0 background, n the n-th object.
    """
    min_pixels = MIN_VISIBLE_PIXELS * (size / 96) ** 2
    while True:
        bodies = [place(rng, OUTLINES[name], EXTENT_RANGE, size) for name in names]
        instances = np.zeros((size, size), dtype=np.int64)
        for n, body in enumerate(bodies, start=1):
            instances[body.window][body.distance < 0] = n
        visible = np.bincount(instances.ravel(), minlength=len(bodies) + 1)[1:]
        in_mask = np.bincount(instances[~_ring(instances)], minlength=len(bodies) + 1)[1:]
        own = np.array([body.area for body in bodies])
        if (in_mask >= min_pixels).all() and (visible >= MIN_VISIBLE_FRACTION * own).all():
            return bodies, instances


def _choose_context(rng: np.random.Generator, preferred: str, probability: float) -> str:
    others = [name for name in CONTEXTS if name != preferred]
    return preferred if rng.random() < probability else str(rng.choice(others))


def _draw_background(rng: np.random.Generator, preferred: str, size: int, difficulty: Difficulty) -> Array:
    """The image to paint on, (size, size, 3) in 0..1."""
    context = CONTEXTS[_choose_context(rng, preferred, difficulty.context)]
    top, bottom = (PALETTE[c] + COLOUR_JITTER * rng.standard_normal(3) for c in rng.permutation(context.colours))
    image = gradient(rng, top, bottom, size)
    grid_y, grid_x = grid(size)
    y, x = 96 / size * grid_y, 96 / size * grid_x
    if context.texture == "waves":
        phase = rng.uniform(0, 20)
        texture = wave(y + 3 * wave(x + phase, 48) + phase, 12)
    elif context.texture == "blades":
        texture = smooth_noise(rng, size, (12, 48))
    elif context.texture == "grain":
        texture = smooth_noise(rng, size, (48, 48))
    else:
        texture = np.clip(2 * smooth_noise(rng, size, (5, 3)), -1, 1)
    return image + difficulty.background_contrast / 2 * texture[..., None]


def _paint(
    rng: np.random.Generator, image: Array, object_class: ObjectClass, body: Body, difficulty: Difficulty
) -> None:
    """Paint a body and its part onto `image`."""
    colour = PALETTE[rng.choice(object_class.fills)] + COLOUR_JITTER * rng.standard_normal(3)
    texture, period = TEXTURES[object_class.texture], object_class.period
    fill = textured(rng, colour, texture, period, difficulty.body_contrast, body, len(image))
    if rng.random() < difficulty.part:
        place_x, place_y = object_class.place
        from_part = body.extent * np.hypot(body.upright_x - place_x, body.upright_y - place_y)
        fill = put_emblem(fill, from_part, body.emblem(rng), object_class.colours)
    image[body.window] = blend(image[body.window], fill, body.distance)


def _ring(instances: Array) -> Array:
    """Where an object's outermost pixels lie: (H, W) bool. Of two that touch, the later has a ring."""
    padded = np.pad(instances, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return instances > np.minimum.reduce(neighbours)


Kind = Literal["scenes", "pretraining"]
"""scenes: those of this module. pretraining: those of `other_shapes`."""


def make_shapes(
    root: str | Path,
    *,
    train: int,
    val: int,
    size: int = 96,
    seed: int = 0,
    kind: Kind = "scenes",
    difficulty: Difficulty | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `train` + `val` images of size x size pixels to root/VOC2012 and return root.

    The set is written beside `root` and renamed at the end, so a half-made one is never found. A set that is
    there already with the same parameters is returned as it is. progress(done, total) is called after each
    image.
    Raises UserError if `root` holds anything else: nothing is overwritten.
    """
    root = Path(root).expanduser().resolve()  # "." and links, in whose place a folder is put
    difficulty = difficulty or Difficulty()
    parameters: dict[str, Any] = {"version": VERSION, "kind": kind}
    parameters |= {"train": train, "val": val, "size": size, "seed": seed} | difficulty.model_dump()
    if _is_made(root, parameters):
        return root
    making = root.parent / f".{root.name}.{machine()}-{os.getpid()}-{threading.get_ident()}"
    for left in root.parent.glob(f".{glob.escape(root.name)}.{machine()}-*"):
        if not is_alive(int(left.name.split("-")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        _write(making, parameters, difficulty, progress)
        try:
            making.rename(root)
        except OSError:
            if not _is_made(root, parameters):
                raise
    except OSError as error:
        raise UserError(f"The data set cannot be written to {root}: {error}.") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


def cached_shapes(
    config: ShapesConfig, kind: Kind = "scenes", progress: Callable[[int, int], None] | None = None
) -> Path:
    """`make_shapes` into $SEMFORMER_CACHE, or ~/.cache/semformer. Several processes may call it at once."""
    parameters = (
        {"kind": kind} | config.model_dump(exclude={"difficulty"}) | config.difficulty.model_dump(exclude_defaults=True)
    )
    name = "-".join([f"shapes-v{VERSION}", *(f"{key}-{value}" for key, value in parameters.items())])
    return make_shapes(cache_folder() / name, **dict(config), kind=kind, progress=progress)


def _is_made(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether `root` holds this very data set. Raises UserError if it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "shapes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{root} exists and is no shapes data set: give another folder, or remove it.") from None
    if found != parameters:
        raise UserError(
            f"{root} holds a shapes data set with other parameters ({found}, wanted {parameters}): "
            "give another folder, or remove it."
        )
    return True


def _write(
    root: Path, parameters: dict[str, Any], difficulty: Difficulty, progress: Callable[[int, int], None] | None
) -> None:
    folder = root / "VOC2012"
    splits = folder / "ImageSets" / "Segmentation"
    for part in (folder / "JPEGImages", folder / "Annotations", folder / "SegmentationClass", splits):
        part.mkdir(parents=True)
    scenes = parameters["kind"] == "scenes"
    draw = partial(render, difficulty=difficulty) if scenes else other_shapes.render
    names = list(CLASSES if scenes else other_shapes.CLASSES)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    size, seed = parameters["size"], parameters["seed"]
    palette = voc_palette()
    done, total = 0, parameters["train"] + parameters["val"]
    for split in ("train", "val"):
        ids = [f"{split}_{i:06d}" for i in range(parameters[split])]
        for i, image_id in enumerate(ids):
            image, mask, visible = draw(split, i, seed=seed, size=size)
            Image.fromarray(image).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=95, subsampling=0)
            palette_mask = Image.fromarray(mask)
            palette_mask.putpalette(palette)
            palette_mask.save(folder / "SegmentationClass" / f"{image_id}.png")
            annotation = _annotation(image_id, size, visible, names)
            (folder / "Annotations" / f"{image_id}.xml").write_text(annotation, encoding="utf-8")
            done += 1
            if progress is not None:
                progress(done, total)
        (splits / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")
    (root / "shapes.json").write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")


def _annotation(image_id: str, size: int, visible: list[tuple[int, Array]], names: list[str]) -> str:
    lines = [
        "<annotation>",
        "\t<folder>VOC2012</folder>",
        f"\t<filename>{image_id}.jpg</filename>",
        f"\t<size><width>{size}</width><height>{size}</height><depth>3</depth></size>",
        "\t<segmented>1</segmented>",
    ]
    for k, pixels in visible:
        rows, columns = np.flatnonzero(pixels.any(axis=1)) + 1, np.flatnonzero(pixels.any(axis=0)) + 1
        lines += [
            "\t<object>",
            f"\t\t<name>{names[k - 1]}</name>",
            "\t\t<difficult>0</difficult>",
            f"\t\t<bndbox><xmin>{columns[0]}</xmin><ymin>{rows[0]}</ymin>"
            f"<xmax>{columns[-1]}</xmax><ymax>{rows[-1]}</ymax></bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
