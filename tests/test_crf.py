"""The dense CRF against brute force, and against pydensecrf where it is installed (the extra `crf`)."""

import numpy as np
import pytest
import torch

from semformer import crf
from semformer.config import CrfConfig
from semformer.crf import DenseCrf, Lattice
from semformer.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def mean_field(probabilities: np.ndarray, image: np.ndarray, options: CrfConfig) -> np.ndarray:
    """Every pixel hears every other one: (C, H, W) of an image (3, H, W)."""
    C, H, W = probabilities.shape
    y, x = (part.ravel() for part in np.mgrid[:H, :W])
    place = np.stack([x, y], axis=1) / 1.0
    colour = image.reshape(3, -1).T.astype(np.float64)

    def kernel(features: np.ndarray) -> np.ndarray:
        apart = ((features[:, None] - features[None]) ** 2).sum(axis=-1)
        weights = np.exp(-apart / 2)
        norm = 1 / np.sqrt(weights.sum(axis=1))
        return norm[:, None] * weights * norm[None]

    kernels = [
        (options.gaussian_compat, kernel(place / options.gaussian_sxy)),
        (
            options.bilateral_compat,
            kernel(np.concatenate([place / options.bilateral_sxy, colour / options.bilateral_srgb], axis=1)),
        ),
    ]
    unary = np.log(np.clip(probabilities.reshape(C, -1).T, 1e-5, 1))
    Q = np.exp(unary) / np.exp(unary).sum(axis=1, keepdims=True)
    for _ in range(options.iterations):
        field = unary + sum(compat * weights @ Q for compat, weights in kernels)
        field = np.exp(field - field.max(axis=1, keepdims=True))
        Q = field / field.sum(axis=1, keepdims=True)
    return Q.T.reshape(C, H, W)


@pytest.fixture
def noisy(rng):
    """Two flat halves with a little noise, and distributions that are sure of the wrong label in some places."""
    image = np.full((3, 20, 24), 60, dtype=np.float64)
    image[:, :, 12:] = 180
    image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    right = np.zeros((20, 24), dtype=int)
    right[:, 12:] = 1
    labels = np.where(rng.random(right.shape) < 0.2, 1 - right, right)
    return torch.from_numpy(image), right, torch.from_numpy(labels)


@pytest.mark.parametrize(("sides", "least"), [((40,), 0.99), ((16, 16), 0.98), ((6, 6, 6), 0.97)])
def test_the_lattice_filters_as_gaussians_do(sides, least):
    """As an approximation: the blur of a lattice is not quite that of a Gaussian."""
    places = np.stack([part.ravel() for part in np.indices(sides)], axis=1) / 2.5
    found = Lattice(torch.from_numpy(places).float()).filter(torch.eye(len(places))).numpy()
    weights = np.exp(-((places[:, None] - places[None]) ** 2).sum(axis=-1) / 2)
    norm = 1 / np.sqrt(weights.sum(axis=1))
    expected = norm[:, None] * weights * norm[None]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least
    np.testing.assert_allclose(found.sum(axis=1), expected.sum(axis=1), rtol=0.15)


def test_the_weights_of_corners_add_up_to_one_and_give_the_place_back(rng):
    features = torch.from_numpy(rng.normal(0, 20, (500, 3)).astype(np.float32))
    lattice = Lattice(features)
    constant = lattice._sums(torch.ones(500, 1))  # of nothing but ones: the sums of weights
    assert (constant > 0).all()
    put = lattice._steps[0].to_dense()
    torch.testing.assert_close(put.sum(dim=0), torch.ones(500), atol=1e-4, rtol=0)
    assert (put >= -1e-5).all()
    assert (put > 0).sum(dim=0).max() <= 4


def test_it_is_the_mean_field_of_brute_force(noisy, rng):
    image, right, _ = noisy
    probabilities = rng.dirichlet([1.0, 1.0, 1.0], right.shape).transpose(2, 0, 1)
    options = CrfConfig(iterations=5, bilateral_sxy=20, bilateral_srgb=13)
    found = DenseCrf(image, options).refine(torch.from_numpy(probabilities).float()).numpy()
    expected = mean_field(probabilities, image.numpy(), options)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.97


def test_labels_follow_the_image(noisy):
    image, right, labels = noisy
    found = DenseCrf(image, CrfConfig(iterations=10)).refine_labels(labels, 2)
    assert (labels.numpy() == right).mean() < 0.85
    assert (found.numpy() == right).mean() > 0.99


@pytest.mark.parametrize("gt_prob", [0.5, 0.9])
def test_labels_are_as_sure_as_gt_prob_says(noisy, monkeypatch, gt_prob):
    image, _, labels = noisy
    field, seen = DenseCrf(image, CrfConfig(iterations=0, gt_prob=gt_prob)), []
    monkeypatch.setattr(field, "refine", lambda likely: seen.append(likely) or likely)
    assert torch.equal(field.refine_labels(labels, 3), labels)
    torch.testing.assert_close(seen[0].sum(dim=0), torch.ones(labels.shape))
    torch.testing.assert_close(seen[0].gather(0, labels[None])[0], torch.full(labels.shape, gt_prob))


def test_more_iterations_and_stronger_kernels_smooth_more(noisy):
    image, _, labels = noisy
    flat = torch.full_like(image, 128)

    def changes(**options):
        found = DenseCrf(flat, CrfConfig(**options)).refine_labels(labels, 2)
        return int((found[:, 1:] != found[:, :-1]).sum())

    nothing = changes(iterations=5, gaussian_compat=0, bilateral_compat=0)
    assert nothing == int((labels[:, 1:] != labels[:, :-1]).sum())
    assert changes(iterations=0) == nothing
    by_strength = [changes(iterations=5, gaussian_compat=compat, bilateral_compat=0) for compat in (0.2, 4, 8)]
    assert nothing >= by_strength[0] > by_strength[1] > by_strength[2]
    assert changes(iterations=1, gaussian_compat=4) > changes(iterations=5, gaussian_compat=4)


def test_one_label_stays_what_it_is(noisy):
    image, _, labels = noisy
    assert torch.equal(DenseCrf(image, CrfConfig(iterations=3)).refine_labels(labels, 1), labels)


def test_an_image_of_one_pixel():
    found = DenseCrf(torch.zeros(3, 1, 1, dtype=torch.uint8), CrfConfig(iterations=3))
    assert found.refine_labels(torch.ones(1, 1, dtype=torch.int64), 2).item() == 1


def test_standard_deviations_that_are_too_small_are_told(noisy):
    with pytest.raises(UserError, match="standard deviations are too small"):
        DenseCrf(noisy[0], CrfConfig(iterations=1, bilateral_srgb=1e-3, bilateral_sxy=1e-3))


def test_a_large_image_is_taken_in_parts_and_its_lattice_is_not_kept(noisy, monkeypatch):
    image, _, labels = noisy
    options = CrfConfig(iterations=3, bilateral_sxy=20, gaussian_sxy=2)
    likely = torch.stack([labels, 1 - labels]).float()
    whole = DenseCrf(image, options).refine(likely)
    monkeypatch.setattr(crf, "AT_ONCE", 37)
    monkeypatch.setattr(crf, "KEPT", labels.numel() - 1)
    crf._places.cache_clear()
    assert torch.equal(DenseCrf(image, options).refine(likely), whole)
    assert crf._places.cache_info().currsize == 0
    monkeypatch.setattr(crf, "KEPT", labels.numel())
    assert torch.equal(DenseCrf(image, options).refine(likely), whole)
    assert crf._places.cache_info().currsize == 1


def test_indices_have_32_bits(noisy):
    """With 64, a photograph of 12 megapixels takes 7 GiB."""
    for _, kernel in DenseCrf(noisy[0], CrfConfig(iterations=1))._kernels:
        assert {step.col_indices().dtype for step in kernel._steps} == {torch.int32}


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_pydensecrf(seed):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    rng = np.random.default_rng(seed)
    image = np.repeat(np.repeat(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8), 5, axis=0), 5, axis=1)
    probabilities = rng.dirichlet(np.full(6, 0.4), image.shape[:2]).transpose(2, 0, 1).astype(np.float32)
    options = CrfConfig(iterations=10, bilateral_sxy=80, bilateral_srgb=13)
    theirs = densecrf.DenseCRF2D(image.shape[1], image.shape[0], 6)
    theirs.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probabilities, 1e-5, 1)).reshape(6, -1)))
    theirs.addPairwiseGaussian(sxy=3, compat=3)
    theirs.addPairwiseBilateral(sxy=80, srgb=13, rgbim=np.ascontiguousarray(image), compat=10)
    expected = np.array(theirs.inference(10)).reshape(probabilities.shape)
    found = DenseCrf(torch.from_numpy(image).permute(2, 0, 1), options).refine(torch.from_numpy(probabilities))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
