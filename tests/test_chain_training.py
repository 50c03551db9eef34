"""How AffinityNet and DeepLab are trained, in preset micro."""

import itertools

import numpy as np
import pytest
import torch

from semformer.config import load_config
from semformer.data.augment import segmentor_crops
from semformer.data.loading import Batch, Loader
from semformer.data.voc import IGNORE
from semformer.random_walk import line, neighbours
from semformer.stages import affinity, deeplab
from semformer.stages.context import Context
from semformer.stages.pack import packed
from semformer.store import Store
from tests.pipelines import CPU, label_maps, run, weights
from tests.test_chain import enlarged


@pytest.mark.parametrize("stage", ["affinity", "deeplab"])
def test_a_network_learns(shapes, tmp_path, stage):
    config = load_config("micro", {f"{stage}.epochs": 12, "data.shapes.train": 16})
    history = run(config, shapes, Store(tmp_path / "store"), until=stage)[stage].artifact.info["history"]["total"]
    assert history[-1] < history[0] - {"affinity": 0.03, "deeplab": 0.3}[stage], history


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("stage", ["affinity", "deeplab"])
def test_a_training_is_given_the_seed_the_label_maps_and_what_is_pretrained(
    chain, split, tmp_path, monkeypatch, stage, pretrained
):
    module, before, side = {
        "affinity": (affinity, "affinity_labels", 12),
        "deeplab": (deeplab, "pseudo_masks", 48),
    }[stage]
    config = load_config("micro", {"seed": 3, "precision": "bfloat16", f"{stage}.backbone": "test_resnet"})
    more = {} if stage == "affinity" else {"n_classes": 9}
    if pretrained:
        features = module.build(getattr(config, stage), **more).features
        torch.save(features.backbone.state_dict(), tmp_path / "weights.pth")
        with_weights = getattr(config, stage).model_copy(update={"weights": str(tmp_path / "weights.pth")})
        config = config.model_copy(update={stage: with_weights})
    labels, given, read = label_maps(chain[1][before]), {}, []

    def train(model, **options):
        assert read == [getattr(config, stage)]
        given.update(options, model=model)
        return {}

    monkeypatch.setattr(module, "train", train)
    ctx = Context(CPU, lambda told: None, tmp_path, tmp_path, have_read=read.append)
    module.run(config, packed(split, ["images"], chain[0]), chain[1][before].artifact, ctx)
    assert {name: given[name] for name in ("stage", "config", "seed", "precision")} == {
        "stage": stage,
        "config": getattr(config, stage),
        "seed": 3,
        "precision": "bfloat16",
    }
    assert given["pretrained"] is (given["model"].features if pretrained else None)
    assert (given["loader"].seed, given["loader"].label_side) == (3, side)
    for i, image_id in enumerate(split.ids):
        np.testing.assert_array_equal(given["loader"].label_map(i), labels[image_id])
    torch.manual_seed(3)
    fresh = module.build(getattr(config, stage), **more).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in given["model"].state_dict().items())


def batch_of(labels: np.ndarray) -> Batch:
    """A batch of which the label maps (B, h, w) are all that matters."""
    B = len(labels)
    return Batch(torch.zeros(B, 3, 1, 1), torch.zeros(B, 4), torch.zeros(B, 9), torch.from_numpy(labels))


def test_the_loss_of_affinities_is_that_of_brute_force():
    rng, options = np.random.default_rng(0), load_config("micro", {"affinity.radius": 3}).affinity
    logits = torch.from_numpy(rng.normal(size=(2, 6, 8))).requires_grad_()
    labels = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (2, 6, 8), p=(0.5, 0.2, 0.1, 0.2))
    found = affinity.gradients(lambda images: logits, batch_of(labels), options)["total"]
    edges = 1 / (1 + np.exp(-logits.detach().numpy()))
    terms: dict[str, list[float]] = {"background": [], "objects": [], "different": []}
    for b, y, x in itertools.product(range(2), range(4), range(2, 6)):
        for dy, dx in neighbours(3):
            a, c = labels[b, y, x], labels[b, y + dy, x + dx]
            like = 1 - max(edges[b, y + i, x + j] for i, j in line(dy, dx))
            if IGNORE not in (a, c):
                kind = "different" if a != c else "objects" if a else "background"
                terms[kind].append(-np.log(1.00001 - like) if a != c else -np.log(like + 0.00001))
    background, objects, different = (sum(kind) / (len(kind) + 0.00001) for kind in terms.values())
    assert found.item() == pytest.approx(((background + objects) / 2 + different) / 2, rel=1e-5)
    assert logits.grad is not None


def test_the_loss_of_a_segmentation_is_the_mean_over_labelled_pixels():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 4, 3, 5))).requires_grad_()
    labels = rng.choice(np.array([0, 1, 2, 3, IGNORE], np.uint8), (2, 12, 17))
    found = deeplab.gradients(lambda images: logits, batch_of(labels))["total"]
    likely = np.exp(enlarged(logits.detach().numpy(), (12, 17)))
    likely = (likely / likely.sum(axis=1, keepdims=True)).transpose(0, 2, 3, 1)
    of_labels = [of[k] for of, k in zip(likely.reshape(-1, 4), labels.ravel(), strict=True) if k != IGNORE]
    assert found.item() == pytest.approx(-np.log(of_labels).mean(), rel=1e-5)
    assert logits.grad is not None


@pytest.mark.parametrize("stage", ["affinity", "deeplab"])
def test_pieces_of_a_batch_have_its_gradients(chain, shapes, split, stage):
    config = load_config("micro")
    module, options = {"affinity": (affinity, config.affinity), "deeplab": (deeplab, config.deeplab)}[stage]
    model = module.load(options, chain[1][stage].artifact, device=CPU).requires_grad_(True).eval()
    labels = label_maps(chain[1]["pseudo_masks"])
    side = options.image_size // (4 if stage == "affinity" else 1)
    data = packed(split, ["images"], chain[0])
    loader = Loader(
        data, segmentor_crops, options, seed=0, device=CPU, label_map=lambda i: labels[data.ids[i]], label_side=side
    )
    batch = next(iter(loader.epoch(0)))
    found = []
    for pieces in (1, 2, 8):
        model.zero_grad()
        arguments = (batch, options, pieces) if stage == "affinity" else (batch, pieces)
        total = module.gradients(model, *arguments)["total"]
        found.append([total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_a_frozen_backbone_stays_as_it_is(chain, shapes, tmp_path):
    config = load_config("micro", {"affinity.frozen": "true"})
    trained = weights(run(config, shapes, chain[0], until="affinity")["affinity"])
    torch.manual_seed(config.seed)
    fresh = affinity.build(config.affinity).state_dict()
    for name, value in trained.items():
        assert torch.equal(value, fresh[name]) is name.startswith("features."), name


def test_statistics_of_a_backbone_are_frozen_or_learnt(shapes, chain):
    changed = {}
    for frozen in (True, False):
        options = {"deeplab.backbone": "test_resnet", "deeplab.frozen_statistics": frozen}
        config = load_config("micro", options)
        trained = weights(run(config, shapes, chain[0], until="deeplab")["deeplab"])
        torch.manual_seed(config.seed)
        fresh = deeplab.build(config.deeplab, n_classes=9).state_dict()
        assert not torch.equal(
            trained["features.backbone.layer1.0.conv1.weight"], fresh["features.backbone.layer1.0.conv1.weight"]
        )
        changed[frozen] = not torch.equal(
            trained["features.backbone.layer1.0.bn1.running_mean"], fresh["features.backbone.layer1.0.bn1.running_mean"]
        )
    assert changed == {True: False, False: True}
