"""Affinities of near pixels from an edge map, and the random walk of class maps along them (Ahn, Cho and Kwak, CVPR
2019; Ahn and Kwak, CVPR 2018).

Affinity is symmetric, so of each two pixels one is the first: the upper one, or the left one of a row.

Legend: B images, C classes, H W pixels; h = H - (radius - 1), w = W - 2 (radius - 1): the pixels all of whose
neighbours lie within the map; pairs: how many neighbours a first pixel has.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from semformer.sparse import by_rows

KEPT = 2**16
"""Pixels of a map up to which the places of its steps' weights are kept, for other maps of the size."""


@lru_cache
def neighbours(radius: int) -> tuple[tuple[int, int], ...]:
    """(dy, dx) from a first pixel to all second ones nearer than `radius`."""
    reach = range(1 - radius, radius)
    return tuple((dy, dx) for dy in range(radius) for dx in reach if (dy or dx > 0) and dy**2 + dx**2 < radius**2)


@lru_cache
def line(dy: int, dx: int) -> tuple[tuple[int, int], ...]:
    """The pixels of the rectangle between (0, 0) and (dy, dx), both included, that are nearer than 1 to their line."""
    rows, columns = range(min(dy, 0), max(dy, 0) + 1), range(min(dx, 0), max(dx, 0) + 1)
    return tuple((y, x) for y in rows for x in columns if (y * dx - x * dy) ** 2 < dy**2 + dx**2)


def shifted(maps: Tensor, radius: int, dy: int, dx: int) -> Tensor:
    """What maps (..., H, W) have at (dy, dx) from each first pixel: (..., h, w), a view."""
    *_, H, W = maps.shape
    left = radius - 1 + dx
    return maps[..., dy : dy + H - (radius - 1), left : left + W - 2 * (radius - 1)]


def seconds(maps: Tensor, radius: int) -> Tensor:
    """What maps (..., H, W) have at the second pixels: (..., pairs, h, w)."""
    return torch.stack([shifted(maps, radius, dy, dx) for dy, dx in neighbours(radius)], dim=-3)


def edge_affinities(edges: Tensor, radius: int) -> Tensor:
    """1 - the highest edge on the line between two pixels: edges (..., H, W) in 0..1 -> (..., pairs, h, w)."""
    highest = []
    for dy, dx in neighbours(radius):
        on_line = [shifted(edges, radius, y, x) for y, x in line(dy, dx)]
        highest.append(torch.stack(on_line).amax(dim=0))
    return 1 - torch.stack(highest, dim=-3)


def feature_affinities(features: Tensor, radius: int) -> Tensor:
    """exp(-mean |f_i - f_j|): features (B, F, H, W) -> (B, pairs, h, w)."""
    first = shifted(features, radius, 0, 0)
    apart = [(first - shifted(features, radius, dy, dx)).abs().mean(dim=1) for dy, dx in neighbours(radius)]
    return torch.stack(apart, dim=1).neg().exp()


@lru_cache(maxsize=8)
def _steps(H: int, W: int, radius: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A step's sparse matrix (H W, H W) by rows: how many elements each has, in which columns, and which of all weights
    they are.

    All weights: 1 for each pixel itself, then those of the pairs (pairs, H, W), by their first pixel.
    """
    pair = {(0, 0): 0} | {offset: 1 + i for i, offset in enumerate(neighbours(radius))}
    offsets = sorted({*pair, *((-dy, -dx) for dy, dx in pair)})
    pixel = torch.arange(H * W, dtype=torch.int32, device=device)
    y, x = pixel.div(W, rounding_mode="floor"), pixel % W
    columns = torch.empty(H * W, len(offsets), dtype=torch.int32, device=device)
    order, inside = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.bool)
    for i, (dy, dx) in enumerate(offsets):
        second = pixel + (dy * W + dx)
        columns[:, i] = second
        inside[:, i] = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        is_first = (dy, dx) in pair
        order[:, i] = (pixel if is_first else second) + H * W * pair[(dy, dx) if is_first else (-dy, -dx)]
    return inside.sum(dim=1), columns[inside], order[inside]


def transition(affinities: Tensor, *, radius: int, beta: float) -> Tensor:
    """The sparse matrix (B H W, B H W) of a step, one block an image, from affinities (B, pairs, H, W).

    Row p tells with which weights pixel p takes the values of its neighbours, itself with an affinity of 1:
    affinity^beta, divided by the sum.
    """
    B, _, H, W = affinities.shape
    steps = _steps if H * W <= KEPT else _steps.__wrapped__
    counts, columns, order = steps(H, W, radius, affinities.device)
    near = affinities.double().flatten(1) ** beta
    weights = torch.cat([near.new_ones(B, H * W), near], dim=1).index_select(1, order)
    sums = torch.segment_reduce(weights.T.contiguous(), "sum", lengths=counts, axis=0).T
    weights /= sums.repeat_interleave(counts, dim=1)
    image = torch.arange(B, dtype=torch.int32, device=affinities.device)[:, None]
    return by_rows(counts.repeat(B), (columns + image * (H * W)).flatten(), weights.flatten(), B * H * W)


def along_edges(maps: Tensor, edges: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """Maps (B, C, H, W) after so many steps along the affinities of edges (B, H, W), begun with maps x (1 - edges)."""
    affinities = edge_affinities(pad(edges, _reach(radius), value=1.0), radius)
    return random_walk(maps * (1 - edges[:, None]), affinities, radius=radius, beta=beta, steps=steps)


def along_features(maps: Tensor, features: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """Maps (B, C, H, W) after so many steps along the affinities of features (B, F, H, W)."""
    affinities = feature_affinities(pad(features, _reach(radius)), radius)
    return random_walk(maps, affinities, radius=radius, beta=beta, steps=steps)


def random_walk(maps: Tensor, affinities: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """Maps (B, C, H, W) after so many steps by `transition`: as by the matrix's power, which is never formed.

    In float64: what float32 rounds adds up over 2^8 steps.
    """
    matrix = transition(affinities, radius=radius, beta=beta)
    values = maps.double().transpose(0, 1).flatten(1).T
    for _ in range(steps):
        values = matrix @ values
    return values.T.unflatten(1, (len(maps), *maps.shape[2:])).transpose(0, 1).to(maps.dtype)


def _reach(radius: int) -> tuple[int, int, int, int]:
    """Padding (left, right, top, bottom) with which every pixel of a map is a first one."""
    return radius - 1, radius - 1, 0, radius - 1
