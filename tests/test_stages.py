"""What the stages hand to their trainings: seeds, what is pretrained, sizes; and the best epoch after a break."""

import re

import pytest
import timm
import torch
from safetensors import SafetensorError
from torch import nn

from semformer.config import load_config
from semformer.errors import UserError
from semformer.models import vit
from semformer.models.caae import CAAE
from semformer.stages import caae, segmentor, training
from semformer.store import Store
from tests import pipelines
from tests.pipelines import weights


def run(config, folder, store, progress=lambda told: None):
    return pipelines.run(config, folder, store, progress, until="segmentor")


@pytest.fixture
def trainings(monkeypatch) -> dict[str, list]:
    """Stage -> (network, options) of each training, which learns nothing."""
    seen: dict[str, list] = {"caae": [], "segmentor": []}

    def note(model, *, stage, **options):
        seen[stage].append((model, options))
        return {}

    for module in (caae, segmentor):
        monkeypatch.setattr(module, "train", note)
    return seen


def test_weights_images_and_dropout_of_both_networks_follow_the_seed(shapes, tmp_path, trainings):
    for number, seed in enumerate((0, 1, 1)):
        run(load_config("micro", {"seed": seed}), shapes, Store(tmp_path / str(number)))
    for of_stage in trainings.values():
        assert [(options["seed"], options["loader"].seed) for _, options in of_stage] == [(0, 0), (1, 1), (1, 1)]
        first, second, third = (
            next(v for n, v in model.state_dict().items() if "qkv.weight" in n) for model, _ in of_stage
        )
        assert not torch.equal(first, second)
        assert torch.equal(second, third)


def test_the_backbones_alone_count_as_pretrained_and_only_where_they_are(shapes, tmp_path, trainings, monkeypatch):
    small = vit._small_vit
    monkeypatch.setattr(vit, "_small_vit", lambda pretrained, *a, **k: small(False, *a, **k))  # as if downloaded
    file = tmp_path / "weights.pth"
    given = {"pretrained": ({"pretrained": True}), "scratch": {}, "file": {"weights": str(file)}}
    for name, part, backbone in (
        ("caae", "encoder", "vit_wiring_patch8_32"),
        ("segmentor", "backbone", "vit_wiring_patch8_48"),
    ):
        torch.save(timm.create_model(backbone).state_dict(), file)
        for number, (what, changes) in enumerate(given.items()):
            config = load_config("micro", {f"{name}.{field}": value for field, value in changes.items()})
            run(config, shapes, Store(tmp_path / f"{name}{number}"))
            model, options = trainings[name][-1]
            assert options["pretrained"] is (None if what == "scratch" else getattr(model, part))


def test_the_guide_sees_images_of_the_size_that_it_has_learnt_from(shapes, store, monkeypatch):
    sides, embed = set(), CAAE.embed
    monkeypatch.setattr(CAAE, "embed", lambda self, images: sides.add(tuple(images.shape[-2:])) or embed(self, images))
    run(load_config("micro"), shapes, store)
    assert sides == {(32, 32)}


class Stop(Exception):
    pass


@pytest.mark.parametrize("scores", [(20.0, 10.0, 15.0), (10.0, 20.0, 15.0), (20.0, 20.0, 10.0), (10.0, 20.0, 20.0)])
def test_the_first_best_epoch_is_kept_also_from_before_a_break(shapes, tmp_path, monkeypatch, scores):
    seen = []

    def score(model, *_):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return scores[len(seen) - 1]

    monkeypatch.setattr(segmentor, "patch_miou", score)
    config = load_config("micro", {"segmentor.selection": "best_miou", "segmentor.epochs": 3})
    store = Store(tmp_path / "store")

    def stop_in_third_epoch(told):
        if told.stage == "segmentor" and told.epoch == 3 and not told.end_of_epoch:
            raise Stop

    with pytest.raises(Stop):
        run(config, shapes, store, stop_in_third_epoch)
    assert len(seen) == 2
    kept = weights(run(config, shapes, store)["segmentor"])
    best = seen[scores.index(20.0)]
    assert len(seen) == 3
    assert all(torch.equal(kept[name], best[name]) for name in best)


def test_best_weights_that_cannot_be_read_or_fit_nothing_are_named(tmp_path, caplog):
    checkpoint = training.Checkpoint(tmp_path)
    checkpoint.path.write_bytes(b"there")
    (tmp_path / "best.safetensors").write_bytes(b"no tensors")
    training.Best(checkpoint)
    (record,) = caplog.records
    assert record.args[0] == tmp_path / "best.safetensors"
    assert isinstance(record.args[1], SafetensorError)
    best = training.Best(checkpoint)
    best.keep(nn.Linear(2, 2), {"score": 1.0}, {})
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'best.safetensors'} is of another architecture")):
        best.restore(nn.Linear(3, 2))


def test_the_epoch_is_chosen_by_crops_of_the_size_that_the_network_learns_from(shapes, store, monkeypatch):
    sizes, measured = [], segmentor.patch_miou
    monkeypatch.setattr(
        segmentor,
        "patch_miou",
        lambda model, data, size, precision: sizes.append(size) or measured(model, data, size, precision),
    )
    run(load_config("micro", {"segmentor.selection": "best_miou"}), shapes, store)
    assert sizes == [48, 48]


def test_a_training_with_momentum_ends_the_same_after_a_break(shapes, tmp_path):
    changes = {"name": "sgd", "momentum": 0.9, "lr": 0.01}
    config = load_config("micro", {"caae.optimizer": changes, "caae.epochs": 3})

    def made(folder, progress=lambda told: None):
        return weights(pipelines.run(config, shapes, Store(folder), progress, until="caae")["caae"])

    def stop_in_second_epoch(told):
        if told.stage == "caae" and told.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        made(tmp_path / "broken", stop_in_second_epoch)
    resumed, whole = made(tmp_path / "broken"), made(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
