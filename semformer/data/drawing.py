"""What the embedded images are drawn with: outlines, textures, noise, and objects that are placed and painted.

An object's extent is its diameter; texture periods are in pixels of a 96-pixel image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

Array = np.ndarray
Outline = Callable[[Array, Array], Array]
"""Approximate signed distance to an outline, negative inside. x, y: (h, w) in units of the extent, origin at the
centre, y downwards. Every outline lies within REACH of the centre."""
Texture = Callable[[Array, Array, float], Array]
"""Values in -1..1 at x (1, w), y (h, 1), in pixels of a 96-pixel image, origin near the object's centre; and the
period."""

REACH = 0.6
CUT_OFF = 0.08  # how far an object may reach out of the image / its extent
NOISE_CONTRAST = 0.10  # swing of a background's low-frequency noise, on a scale where black to white is 1
PIXEL_NOISE = 0.02  # standard deviation, everywhere
PART_AREA_RANGE = (0.08, 0.14)  # emblem's area / body's area


def polygon(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    distance = np.full(x.shape, -np.inf)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = np.hypot(bx - ax, by - ay)
        distance = np.maximum(distance, ((by - ay) * (x - ax) - (bx - ax) * (y - ay)) / length)
    return distance


def box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def petals(x: Array, y: Array, n: int, mean: float, swing: float) -> Array:
    return np.hypot(x, y) - (mean + swing * np.cos(n * np.arctan2(x, -y)))


def wave(t: Array, period: float) -> Array:
    return np.sin(2 * np.pi * t / period)


@dataclass(frozen=True)
class Body:
    """A placed object: the window of the image it may cover, and grids over that window.

    x (1, w), y (h, 1): pixels from the centre; upright_x, upright_y (h, w): the same turned upright, in units of the
    extent; distance (h, w): signed distance to the outline in pixels.
    """

    window: tuple[slice, slice]
    extent: float
    x: Array
    y: Array
    upright_x: Array
    upright_y: Array
    distance: Array

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.distance < 0))

    def emblem(self, rng: np.random.Generator) -> float:
        """The radius of an emblem of it, in pixels."""
        return np.sqrt(rng.uniform(*PART_AREA_RANGE) * self.area / np.pi)


def place(rng: np.random.Generator, outline: Outline, extents: tuple[float, float], size: int) -> Body:
    """Anywhere in an image of `size` pixels, turned; `extents` are in units of its side."""
    extent = rng.uniform(*extents) * size
    margin = (0.5 - CUT_OFF) * extent
    centre_x, centre_y = rng.uniform(margin, size - margin, 2)
    angle = rng.uniform(0, 2 * np.pi)
    reach = REACH * extent
    rows, columns = (
        slice(max(0, int(centre - reach)), min(size, int(centre + reach) + 1)) for centre in (centre_y, centre_x)
    )
    grid_y, grid_x = grid(size)
    y, x = grid_y[rows] - centre_y, grid_x[:, columns] - centre_x
    upright_x = (np.cos(angle) * x + np.sin(angle) * y) / extent
    upright_y = (np.cos(angle) * y - np.sin(angle) * x) / extent
    return Body((rows, columns), extent, x, y, upright_x, upright_y, extent * outline(upright_x, upright_y))


def textured(
    rng: np.random.Generator, colour: Array, texture: Texture, period: float, contrast: float, body: Body, size: int
) -> Array:
    """A body of one colour (3,) with a texture that stays upright when the body turns: (h, w, 3)."""
    scale = 96 / size
    period = period * rng.uniform(0.9, 1.1)
    shift_x, shift_y = rng.uniform(-2, 2, 2)
    values = texture(scale * body.x + shift_x, scale * body.y + shift_y, period)
    return colour + contrast / 2 * values[..., None]


def gradient(rng: np.random.Generator, top: Array, bottom: Array, size: int) -> Array:
    """From one colour (3,) to the other, roughly downwards, with low-frequency noise: (size, size, 3)."""
    grid_y, grid_x = grid(size)
    slope = rng.uniform(-0.5, 0.5)
    t = np.clip((grid_y + slope * (grid_x - size / 2)) / size, 0, 1)[..., None]
    return (1 - t) * top + t * bottom + NOISE_CONTRAST / 2 * smooth_noise(rng, size, (4, 4))[..., None]


def put_emblem(fill: Array, distance: Array, radius: float, colours: tuple[ArrayLike, ArrayLike]) -> Array:
    """A rim and a core over `fill` (h, w, 3). distance: (h, w) from the emblem's centre, pixels."""
    for colour, r in zip(colours, (radius, 0.55 * radius), strict=True):
        fill = blend(fill, np.asarray(colour), distance - r)
    return fill


def blend(below: Array, above: Array, distance: Array) -> Array:
    """`above` where the signed distance is negative, else `below`, with an edge one pixel soft: (h, w, 3)."""
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    return below + cover * (above - below)


def finished(rng: np.random.Generator, image: Array) -> Array:
    """The image (H, W, 3) in 0..1 with its pixels' noise, as uint8."""
    noisy = image + PIXEL_NOISE * rng.standard_normal(image.shape)
    return (255 * np.clip(noisy, 0, 1) + 0.5).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> Array:
    """Noise in -1..1, (size, size), with so many independent values down and across."""
    values = rng.uniform(-1, 1, cells).astype(np.float32)
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


@cache
def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres: y (size, 1) and x (1, size)."""
    centres = np.arange(size) + 0.5
    return centres[:, None], centres[None, :]
