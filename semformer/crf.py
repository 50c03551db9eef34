"""The fully connected conditional random field of Krähenbühl and Koltun (NIPS 2011), by mean field.

Its Gaussians, of places and of places and colours, are filters on the permutohedral lattice (Adams, Baek and Davis,
Eurographics 2010), in plain torch: on the CPU and the GPU alike.

Legend: C labels, H W pixels, N = H W; d feature dimensions, M points of the lattice.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from semformer.config import CrfConfig
from semformer.errors import UserError
from semformer.sparse import by_rows

LEAST = 1e-5
"""No label is less likely than that to begin with."""
KEPT = 2**20
"""Pixels of an image up to which the lattice of its places is kept, for other images of the size."""
AT_ONCE = 2**20
"""Pixels whose places in the lattice are found together: what that takes is ten times what is kept of it."""


class DenseCrf:
    """The field of one image: what its pixels have to say to each other does not depend on their labels."""

    def __init__(self, image: Tensor, options: CrfConfig):
        """image: RGB (3, H, W) in 0..255."""
        _, H, W = image.shape
        colours = image.reshape(3, -1).T.float() / options.bilateral_srgb
        both = torch.cat([_grid(H, W, image.device) / options.bilateral_sxy, colours], dim=1)
        places = _places if H * W <= KEPT else _places.__wrapped__
        self.options = options
        self._kernels = (
            (options.gaussian_compat, places(H, W, options.gaussian_sxy, image.device)),
            (options.bilateral_compat, Lattice(both)),
        )

    def refine_labels(self, labels: Tensor, n_labels: int) -> Tensor:
        """Hard labels (H, W) in 0..n_labels - 1 -> the most likely ones, (H, W).

        `options.gt_prob` is how sure each label is to begin with; the others share the rest.
        """
        if n_labels == 1:
            return labels
        others = (1 - self.options.gt_prob) / (n_labels - 1)
        likely = torch.full((n_labels, *labels.shape), others, device=labels.device)
        return self.refine(likely.scatter_(0, labels[None], self.options.gt_prob)).argmax(dim=0)

    @torch.inference_mode()
    def refine(self, probabilities: Tensor) -> Tensor:
        """Distributions (C, H, W) of the pixels -> those after `options.iterations`."""
        unary = probabilities.flatten(1).T.clamp(LEAST, 1).log()
        Q = unary.softmax(dim=1)
        for _ in range(self.options.iterations):
            Q = (unary + sum(compat * kernel.filter(Q) for compat, kernel in self._kernels)).softmax(dim=1)
        return Q.T.unflatten(1, probabilities.shape[1:])


class Lattice:
    """Filters values at N places by exp(-|f_i - f_j|^2 / 2) of their features f, in time linear in N.

    Each place lies in a simplex of the lattice. Its value is put on the d + 1 corners, blurred along each axis, and
    read back: so many sparse matrices. The kernel is normalised symmetrically, by the square roots of the sums of its
    weights on both sides.
    """

    def __init__(self, features: Tensor):
        """features: (N, d), in standard deviations. Raises UserError where they reach too far for the lattice."""
        keys, weights, axes = _corners(features)
        (N, corners), weights = keys.shape, weights.flatten()
        keys, order = keys.flatten().sort(stable=True)
        points, counts = keys.unique_consecutive(return_counts=True)
        del keys
        corner = torch.empty(len(order), dtype=torch.int32, device=order.device)
        corner[order] = torch.arange(len(points), dtype=torch.int32, device=order.device).repeat_interleave(counts)
        to_places = by_rows(counts.new_full((N,), corners), corner, weights, len(points))
        to_points = by_rows(counts, order.div(corners, rounding_mode="floor"), weights[order], N)
        del order
        self._steps = [to_points, *(_blur(points, axis) for axis in axes), to_places]
        self._norm = self._sums(features.new_ones(len(features), 1)).rsqrt()

    def filter(self, values: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        return self._norm * self._sums(self._norm * values)

    def _sums(self, values: Tensor) -> Tensor:
        for step in self._steps:
            values = step @ values
        return values


def _corners(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Of features (N, d): the corners of the simplices that they lie in, as numbers (N, d + 1), with the weights of
    each (N, d + 1), and how far it is in these numbers to the next point along each of the d + 1 axes.

    A point of the lattice has d + 1 whole coordinates with the sum 0, all alike modulo d + 1; the last is left out.
    """
    d = features.shape[1]
    parts = [_simplices(some) for some in features.split(AT_ONCE)]
    lowest = torch.stack([origin.amin(dim=0) for origin, _, _ in parts]).amin(dim=0) - 2 * d
    highest = torch.stack([origin.amax(dim=0) for origin, _, _ in parts]).amax(dim=0) + 2 * d
    extent = (highest + 1 - lowest).tolist()
    if math.prod(extent) >= 2**63:
        raise UserError(f"a CRF's standard deviations are too small: the lattice would be {extent} points wide")
    place = torch.tensor([math.prod(extent[i + 1 :]) for i in range(d)], device=features.device)

    def corners(origin: Tensor, rank: Tensor) -> Tensor:
        first = ((origin - lowest) * place).sum(dim=1)
        found = [first + k * place.sum() - (d + 1) * ((rank > d - k) * place).sum(dim=1) for k in range(d + 1)]
        return torch.stack(found, dim=1)

    keys = torch.cat([corners(origin, rank) for origin, rank, _ in parts])
    axes = [(d + 1) * int(place[i]) - int(place.sum()) for i in range(d)]
    return keys, torch.cat([weights for _, _, weights in parts]), [*axes, -int(place.sum())]


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of features (N, d): the coordinates of the first corner of each simplex (N, d), the ranks of the axes by which
    its other corners follow (N, d), and the weights of its corners (N, d + 1)."""
    d = features.shape[1]
    axis = torch.arange(1, d + 1, device=features.device)
    scaled = features * math.sqrt(2 / 3) * (d + 1) / (axis * (axis + 1)).sqrt()
    position = pad(scaled.flip(1).cumsum(1).flip(1), (0, 1))  # (N, d + 1)
    position[:, 1:] -= axis * scaled
    nearest = (position / (d + 1)).round()
    rest = position / (d + 1) - nearest
    # The order of the rests tells the simplex. Where the nearest points' coordinates do not add up to 0, those that
    # were rounded most are taken back.
    rank = rest.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + nearest.sum(1, keepdim=True).long()
    over = rank.div(d + 1, rounding_mode="floor")
    rank, nearest, rest = rank - over * (d + 1), nearest - over, rest + over
    ascending = torch.zeros_like(rest).scatter_(1, d - rank, rest)
    weights = torch.cat([1 + ascending[:, :1] - ascending[:, -1:], ascending.diff(dim=1)], dim=1)
    return (d + 1) * nearest[:, :d].long(), rank[:, :d].to(torch.int8), weights


def _blur(points: Tensor, axis: int) -> Tensor:
    """(M, M): a point's value and half of those before and after it, `axis` apart, as far as there are any."""
    M, device = len(points), points.device
    columns = torch.empty(M, 3, dtype=torch.int32, device=device)
    columns[:, 0] = torch.arange(M, device=device)
    there = torch.ones(M, 3, dtype=torch.bool, device=device)
    for side, wanted in ((1, points - axis), (2, points + axis)):
        found = torch.searchsorted(points, wanted).clamp_(max=M - 1)
        columns[:, side], there[:, side] = found, points[found] == wanted
    weights = torch.tensor([1, 0.5, 0.5], device=device).expand(M, 3)
    return by_rows(there.sum(dim=1), columns[there], weights[there], M)


@lru_cache(maxsize=8)
def _places(H: int, W: int, sxy: float, device: torch.device) -> Lattice:
    return Lattice(_grid(H, W, device) / sxy)


def _grid(H: int, W: int, device: torch.device) -> Tensor:
    """(N, 2): x and y of each pixel."""
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1).float()
