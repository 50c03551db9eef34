"""Affinities and random walks against brute force."""

import itertools

import numpy as np
import pytest
import torch

from semformer import random_walk as module
from semformer.random_walk import (
    along_edges,
    along_features,
    edge_affinities,
    feature_affinities,
    line,
    neighbours,
    random_walk,
    seconds,
    shifted,
    transition,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def edge_affinity(edges: np.ndarray, a: tuple[int, int], b: tuple[int, int]) -> float:
    """1 - the highest edge among the pixels nearer than 1 to the line from a to b, within their rectangle."""
    (y0, x0), (y1, x1) = a, b
    length = np.hypot(y1 - y0, x1 - x0)
    on_line = [
        edges[y, x]
        for y in range(min(y0, y1), max(y0, y1) + 1)
        for x in range(min(x0, x1), max(x0, x1) + 1)
        if abs((y - y0) * (x1 - x0) - (x - x0) * (y1 - y0)) / length < 1
    ]
    return 1 - max(on_line)


def dense_transition(affinity, size: tuple[int, int], radius: int, beta: float) -> np.ndarray:
    """T[i, j]: columns add up to 1, as published."""
    pixels = list(itertools.product(range(size[0]), range(size[1])))
    matrix = np.eye(len(pixels))
    for i, j in itertools.combinations(range(len(pixels)), 2):
        if np.hypot(pixels[i][0] - pixels[j][0], pixels[i][1] - pixels[j][1]) < radius:
            matrix[i, j] = matrix[j, i] = affinity(pixels[i], pixels[j]) ** beta
    return matrix / matrix.sum(axis=0, keepdims=True)


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (4, 22), (5, 34), (10, 152)])
def test_neighbours_are_all_pixels_nearer_than_the_radius_once(radius, count):
    found = neighbours(radius)
    assert len(set(found)) == len(found) == count
    both = {*found, *((-dy, -dx) for dy, dx in found)}
    reach = range(-radius, radius + 1)
    assert both == {(y, x) for y in reach for x in reach if 0 < y * y + x * x < radius * radius}


def test_a_line_is_what_is_nearer_than_one_pixel_to_it():
    assert line(0, 3) == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert set(line(1, 1)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert set(line(2, -1)) == {(0, 0), (0, -1), (1, 0), (1, -1), (2, -1), (2, 0)}


def test_first_and_second_pixels():
    maps = torch.arange(2 * 6 * 9).view(2, 6, 9)
    first, second = shifted(maps, 3, 0, 0), seconds(maps, 3)
    assert first.shape == (2, 4, 5)
    assert second.shape == (2, len(neighbours(3)), 4, 5)
    for pair, (dy, dx) in enumerate(neighbours(3)):
        for y, x in itertools.product(range(4), range(5)):
            assert first[1, y, x] == maps[1, y, x + 2]
            assert second[1, pair, y, x] == maps[1, y + dy, x + 2 + dx]


def test_edge_affinities_are_those_of_brute_force(rng):
    edges = rng.random((9, 11)).astype(np.float32)
    found = edge_affinities(torch.from_numpy(edges)[None], 4)[0]
    for pair, (dy, dx) in enumerate(neighbours(4)):
        for y, x in itertools.product(range(found.shape[1]), range(found.shape[2])):
            expected = edge_affinity(edges, (y, x + 3), (y + dy, x + 3 + dx))
            assert found[pair, y, x].item() == pytest.approx(expected, abs=1e-6)


def test_feature_affinities_are_those_of_brute_force(rng):
    features = torch.from_numpy(rng.random((1, 7, 6, 8)).astype(np.float32))
    found = feature_affinities(features, 3)[0]
    for pair, (dy, dx) in enumerate(neighbours(3)):
        a, b = features[0, :, 1, 2 + 1], features[0, :, 1 + dy, 2 + 1 + dx]
        assert found[pair, 1, 1].item() == pytest.approx(float((-(a - b).abs().mean()).exp()), abs=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (3, 2), (1, 6), (1, 1)])
@pytest.mark.parametrize(("radius", "beta", "steps"), [(3, 4.0, 8), (5, 10.0, 3), (2, 1.0, 1)])
def test_a_walk_is_the_power_of_the_dense_matrix(rng, size, radius, beta, steps):
    edges, maps = rng.random((3, *size)), rng.random((3, 2, *size))
    walked = along_edges(torch.from_numpy(maps), torch.from_numpy(edges), radius=radius, beta=beta, steps=steps)
    for of_edges, of_maps, found in zip(edges, maps, walked.numpy(), strict=True):
        T = dense_transition(lambda a, b, e=of_edges: edge_affinity(e, a, b), size, radius, beta)
        expected = (of_maps * (1 - of_edges)).reshape(2, -1) @ np.linalg.matrix_power(T, steps)
        np.testing.assert_allclose(found.reshape(2, -1), expected, rtol=1e-9)


def test_a_walk_along_features_is_the_power_of_the_dense_matrix(rng):
    features, maps = rng.random((1, 4, 5, 6)), rng.random((1, 2, 5, 6))
    walked = along_features(torch.from_numpy(maps), torch.from_numpy(features), radius=3, beta=8, steps=5)

    def affinity(a, b):
        return np.exp(-np.abs(features[0, :, a[0], a[1]] - features[0, :, b[0], b[1]]).mean())

    T = dense_transition(affinity, (5, 6), 3, 8)
    expected = maps.reshape(2, -1) @ np.linalg.matrix_power(T, 5)
    np.testing.assert_allclose(walked.numpy().reshape(2, -1), expected, rtol=1e-9)


def test_images_of_a_batch_do_not_touch(rng):
    edges, maps = torch.from_numpy(rng.random((4, 6, 7))), torch.from_numpy(rng.random((4, 3, 6, 7)))
    together = along_edges(maps, edges, radius=4, beta=3, steps=16)
    alone = torch.cat([along_edges(maps[i : i + 1], edges[i : i + 1], radius=4, beta=3, steps=16) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_what_belongs_to_the_size_of_large_maps_is_not_kept(rng, monkeypatch):
    edges, maps = torch.from_numpy(rng.random((1, 6, 7))), torch.from_numpy(rng.random((1, 2, 6, 7)))
    found = []
    for kept in (6 * 7 - 1, 6 * 7):
        monkeypatch.setattr(module, "KEPT", kept)
        module._steps.cache_clear()
        found.append(along_edges(maps, edges, radius=4, beta=3, steps=4))
        assert module._steps.cache_info().currsize == int(kept == 6 * 7)
    assert torch.equal(*found)


def test_what_edges_enclose_stays_there():
    edges, maps = torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8)
    edges[:, :, 4] = 1.0
    maps[..., :4] = 1.0
    walked = along_edges(maps, edges, radius=5, beta=10, steps=2**8)
    assert walked[..., 5:].abs().max() == 0
    torch.testing.assert_close(walked[..., :4], torch.ones(1, 1, 8, 4))


def test_a_step_takes_the_mean_and_no_step_nothing(rng):
    affinities = torch.from_numpy(rng.random((1, len(neighbours(3)), 5, 5)))
    matrix = transition(affinities, radius=3, beta=2)
    torch.testing.assert_close(matrix.to_dense().sum(dim=1), torch.ones(25, dtype=torch.float64))
    maps = torch.from_numpy(rng.random((1, 2, 5, 5)))
    torch.testing.assert_close(random_walk(maps, affinities, radius=3, beta=2, steps=0), maps)
    assert random_walk(maps.float(), affinities, radius=3, beta=2, steps=2).dtype == torch.float32
