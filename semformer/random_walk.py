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

from semformer.sparse import row_ends


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
    """The places of a step's weights in a sparse matrix (H W, H W), by rows, and which of all weights stands at each.

    All weights: 1 for each pixel itself, then those of the pairs (pairs, H, W), then these again, for the second pixel.
    """
    pixel = torch.arange(H * W, device=device).view(H, W)
    second = seconds(pad(pixel, _reach(radius), value=-1), radius).flatten()
    first = pixel.flatten().repeat(len(neighbours(radius)))
    row = torch.cat([pixel.flatten(), first, second])
    column = torch.cat([pixel.flatten(), second, first])
    inside = torch.nonzero((row >= 0) & (column >= 0))[:, 0]
    order = inside[(row[inside] * (H * W) + column[inside]).argsort()]
    return row_ends(row[inside], H * W), column[order], order


def transition(affinities: Tensor, *, radius: int, beta: float) -> Tensor:
    """The sparse matrix (B H W, B H W) of a step, one block an image, from affinities (B, pairs, H, W).

    Row p tells with which weights pixel p takes the values of its neighbours, itself with an affinity of 1:
    affinity^beta, divided by the sum.
    """
    B, _, H, W = affinities.shape
    ends, columns, order = _steps(H, W, radius, affinities.device)
    near = affinities.double().flatten(1) ** beta
    weights = torch.cat([near.new_ones(B, H * W), near, near], dim=1)[:, order]
    sums = torch.segment_reduce(weights.T.contiguous(), "sum", offsets=ends, axis=0).T
    weights = weights / sums.repeat_interleave(ends.diff(), dim=1)
    image = torch.arange(B, device=affinities.device)[:, None]
    ends = torch.cat([(ends[:-1] + image * len(order)).flatten(), B * ends[-1:]])
    size = (B * H * W, B * H * W)
    return torch.sparse_csr_tensor(ends, (columns + image * H * W).flatten(), weights.flatten(), size)


def along_edges(maps: Tensor, edges: Tensor, *, radius: int = 5, beta: float = 10, steps: int = 2**8) -> Tensor:
    """Maps (B, C, H, W) after so many steps along the affinities of edges (B, H, W), begun with maps x (1 - edges)."""
    affinities = edge_affinities(pad(edges, _reach(radius), value=1.0), radius)
    return random_walk(maps * (1 - edges[:, None]), affinities, radius=radius, beta=beta, steps=steps)


def along_features(maps: Tensor, features: Tensor, *, radius: int = 5, beta: float = 8, steps: int = 2**8) -> Tensor:
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
