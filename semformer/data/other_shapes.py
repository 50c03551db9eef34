"""Images to pretrain on: one object each, of other classes than those of `shapes`, as ImageNet's are others than VOC's.

A class is an outline and a texture, each shared with seven other classes, so that it takes the whole body to tell it.
Colours and backgrounds are anything, and the emblems on a body tell nothing. None of the outlines, textures and
backgrounds is one of the embedded data set's.
"""

import colorsys

import numpy as np

from semformer.data.drawing import (
    Array,
    Body,
    Outline,
    Texture,
    blend,
    box,
    finished,
    gradient,
    petals,
    place,
    polygon,
    put_emblem,
    smooth_noise,
    textured,
    wave,
)

EXTENT_RANGE = (0.4, 0.8)  # object's extent / image's side
BODY_TEXTURE_CONTRAST = 0.35  # swing, on a scale where black to white is 1
BACKGROUND_TEXTURE_CONTRAST = 0.12
MOST_EMBLEMS = 2
PERIOD_RANGE = (6.0, 9.0)

OUTLINES: dict[str, Outline] = {
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.37) - 0.13,
    "heart": lambda x, y: np.minimum(
        np.hypot(np.abs(x) - 0.21, y + 0.16) - 0.26,
        polygon(x, y, [(-0.43, -0.02), (-0.2, -0.3), (0.2, -0.3), (0.43, -0.02), (0.0, 0.5)]),
    ),
    "arrow": lambda x, y: np.minimum(
        polygon(x, y, [(0.0, -0.52), (0.45, -0.02), (-0.45, -0.02)]), box(x, y - 0.22, 0.16, 0.28)
    ),
    "corner": lambda x, y: np.minimum(box(x + 0.25, y, 0.16, 0.42), box(x, y - 0.26, 0.42, 0.16)),
    "drop": lambda x, y: np.minimum(
        np.hypot(x, y - 0.17) - 0.32, polygon(x, y, [(0.0, -0.54), (0.3, 0.05), (-0.3, 0.05)])
    ),
    "gear": lambda x, y: 0.8 * petals(x, y, 8, 0.43, 0.07),
    "dome": lambda x, y: np.maximum(np.hypot(x, y - 0.22) - 0.5, y - 0.22),
    "kite": lambda x, y: polygon(x, y, [(0.0, -0.5), (0.33, -0.1), (0.0, 0.52), (-0.33, -0.1)]),
}


def _stripes(degrees: float) -> Texture:
    towards_x, towards_y = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return lambda x, y, p: wave(towards_x * x + towards_y * y, p)


def _bricks(x: Array, y: Array, p: float) -> Array:
    row = np.floor(y / (0.7 * p))
    along, across = (x / (1.4 * p) + 0.5 * (row % 2)) % 1, y / (0.7 * p) % 1
    return np.where((along < 0.18) | (across < 0.3), -1.0, 0.7)


def _hexagons(x: Array, y: Array, p: float) -> Array:
    directions = ((1.0, 0.0), (-0.5, 0.866), (-0.5, -0.866))
    total = np.sum([np.cos(2 * np.pi * (a * x + b * y) / p) for a, b in directions], axis=0)
    return np.clip(1.2 * total - 0.3, -1, 1)


def _scales(x: Array, y: Array, p: float) -> Array:
    row = np.floor(y / (0.8 * p))
    along, down = (x / (1.6 * p) + 0.5 * (row % 2)) % 1 - 0.5, y / (0.8 * p) % 1
    return np.clip(4 * (np.hypot(2 * along, down) - 0.8), -1, 1)


# No two are mirror images.
TEXTURES: dict[str, Texture] = {
    "steep": _stripes(22.5),
    "flat": _stripes(67.5),
    "bricks": _bricks,
    "hexagons": _hexagons,
    "spiral": lambda x, y, p: wave(np.hypot(x, y) + p * np.arctan2(y, x) / np.pi, p),
    "rays": lambda x, y, p: np.sin(9 * np.arctan2(y, x)),
    "grid": lambda x, y, p: np.clip(3 * np.maximum(wave(x, 1.3 * p), wave(y, 1.3 * p)) - 2, -1, 1),
    "scales": _scales,
}
CLASSES = {f"{texture}-{outline}": (outline, texture) for outline in OUTLINES for texture in TEXTURES}


def render(split: str, index: int, *, seed: int, size: int) -> tuple[Array, Array, list[tuple[int, Array]]]:
    """Draw image `index` of a split: as `shapes.render`, with the body's pixels as the mask, without a ring."""
    rng = np.random.default_rng([seed, *b"pretraining", *split.encode(), index, size])
    k = 1 + int(rng.integers(len(CLASSES)))
    outline, texture = list(CLASSES.values())[k - 1]
    body = place(rng, OUTLINES[outline], EXTENT_RANGE, size)
    colour, period = _colour(rng), rng.uniform(*PERIOD_RANGE)
    fill = textured(rng, colour, TEXTURES[texture], period, BODY_TEXTURE_CONTRAST, body, size)
    for _ in range(rng.integers(MOST_EMBLEMS + 1)):
        fill = _with_emblem(rng, fill, body)
    image = gradient(rng, _colour(rng), _colour(rng), size)
    down, across = rng.integers(3, size, 2)
    image += BACKGROUND_TEXTURE_CONTRAST / 2 * smooth_noise(rng, size, (down, across))[..., None]
    image[body.window] = blend(image[body.window], fill, body.distance)
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[body.window][body.distance < 0] = k
    return finished(rng, image), mask, [(k, mask == k)]


def _with_emblem(rng: np.random.Generator, fill: Array, body: Body) -> Array:
    radius = body.emblem(rng)
    inside = np.argwhere(body.distance < -0.4 * radius)
    if not len(inside):
        return fill
    row, column = inside[rng.integers(len(inside))]
    distance = np.hypot(body.x - body.x[0, column], body.y - body.y[row, 0])
    return put_emblem(fill, distance, radius, (_bright(rng), _bright(rng)))


def _colour(rng: np.random.Generator) -> Array:
    """Muted, as those of bodies and backgrounds are."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.45), rng.uniform(0.4, 0.85)))


def _bright(rng: np.random.Generator) -> Array:
    """Saturated, or black, or white."""
    if rng.random() < 0.25:
        return np.full(3, float(rng.integers(2)))
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.8, 1.0), rng.uniform(0.3, 1.0)))
