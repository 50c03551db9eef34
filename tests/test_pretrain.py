"""Pretraining on other shapes: what it makes, what its key depends on, and what its loss is."""

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import nn

from semformer import cli
from semformer import pretrain as pretrain_module
from semformer.config import PretrainConfig, file_digest, load_config
from semformer.config.settings import OWN_WEIGHTS
from semformer.data import other_shapes
from semformer.data.loading import Batch
from semformer.data.pixels import MEAN, STD
from semformer.data.shapes import make_shapes
from semformer.data.voc import open_devkit
from semformer.errors import MachineError
from semformer.models.vit import build_backbone
from semformer.pretrain import accuracy, gradients, pretrain, pretrain_key
from semformer.store import Store
from semformer.store.collection import collect
from sweeps.plan.table import load_table, resolve

NAME = "vit_wiring_patch8_32"
OPTIONS = PretrainConfig(backbone=NAME, image_size=32, epochs=3, batch_size=16)
CPU = torch.device("cpu")
IMAGES = "b029ae6519338f88220a1aca61b047f1e5c608d133f28b6d4a637c56308a9752"
"""sha256 of the first 50."""


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others") / "set"
    return open_devkit(make_shapes(folder, train=48, val=16, size=32, kind="pretraining"))


def run(devkit, store, progress=lambda told: None, seed=0):
    return pretrain(OPTIONS, devkit, store, seed=seed, device=CPU, progress=progress)


def test_the_command_writes_weights_that_a_network_starts_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    file, store = tmp_path / "new" / "weights.safetensors", tmp_path / "store"
    command = ["pretrain", NAME, "--images", "40", "--epochs", "1", "--image-size", "32", "--seed", "7"]
    command += ["--store", str(store), "--out", str(file)]
    assert cli.main(command) == 0
    assert not [stage for stage in collect(Store(store), grace=0) if stage.stage == "pretrain"], "gc leaves it"
    told = " ".join(capsys.readouterr().err.split())
    assert "made" in told
    assert "% right on new images" in told
    (images,) = (tmp_path / "cache").glob("shapes-*")
    assert len(open_devkit(images).split("val")) == 2000, "however few are learnt from"
    assert cli.main(command) == 0
    assert "found" in capsys.readouterr().err
    with safe_open(file, framework="pt") as opened:
        key = json.loads(opened.metadata()["key"])
    assert (key["params"]["backbone"], key["seed"]) == (NAME, 7)
    weights, backbone = load_file(file), build_backbone(NAME, weights=str(file), image_size=48)
    assert not [name for name in weights if name.startswith("head")]
    torch.testing.assert_close(backbone.blocks[1].attn.qkv.weight.data, weights["blocks.1.attn.qkv.weight"])
    torch.testing.assert_close(backbone.class_token, weights["cls_token"])


def test_an_interrupted_pretraining_ends_with_the_same_weights(devkit, tmp_path):
    def interrupt(told):
        if told.stage == "pretrain" and told.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(devkit, Store(tmp_path / "broken"), interrupt)
    epochs = []
    resumed, found = run(devkit, Store(tmp_path / "broken"), lambda told: epochs.append(told.epoch))
    whole, _ = run(devkit, Store(tmp_path / "whole"))
    assert not found
    assert set(epochs) - {0} == {3}
    ours, theirs = (load_file(artifact.file("backbone.safetensors")) for artifact in (resumed, whole))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_weights_and_images_follow_the_seed(devkit, tmp_path, monkeypatch):
    begun = []

    def note(model, *, loader, seed, **_):
        assert model.head.out_features == 64
        begun.append((model.blocks[0].attn.qkv.weight.clone(), loader.seed, seed))
        return {}

    monkeypatch.setattr(pretrain_module, "train", note)
    for number, seed in enumerate((0, 1, 1)):
        run(devkit, Store(tmp_path / str(number)), seed=seed)
    weights, *seeds = zip(*begun, strict=True)
    assert seeds == [(0, 1, 1), (0, 1, 1)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_the_position_embedding_is_of_the_size_that_is_asked_for(store, tmp_path):
    larger = open_devkit(make_shapes(tmp_path / "larger", train=2, val=2, size=48, kind="pretraining"))
    options = OPTIONS.model_copy(update={"image_size": 48, "epochs": 1})
    artifact, _ = pretrain(options, larger, store, seed=0, device=CPU, progress=lambda told: None)
    assert load_file(artifact.file("backbone.safetensors"))["pos_embed"].shape[1] == 1 + (48 // 8) ** 2


def test_the_network_is_measured_on_images_that_it_has_not_seen(devkit, store, monkeypatch):
    measured = []

    def note(model, data):
        measured.append(data.name)
        return accuracy(model, data)

    monkeypatch.setattr(pretrain_module, "accuracy", note)
    artifact, _ = run(devkit, store)
    assert measured == ["val"]
    assert 0 <= artifact.info["accuracy"] <= 100


def test_too_little_memory_says_what_to_make_smaller(devkit, store, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pretrain_module, "train", exhausted)
    with pytest.raises(MachineError, match=r"^pretrain: out of memory on .* smaller --image-size"):
        run(devkit, store)


def test_the_key_is_of_the_images_the_options_and_the_seed(devkit, tmp_path):
    train = devkit.split("train")
    key = pretrain_key(OPTIONS, train, 0)
    assert key == pretrain_key(PretrainConfig(**OPTIONS.model_dump()), train, 0)
    others = [
        pretrain_key(OPTIONS, train, 1),
        pretrain_key(OPTIONS.model_copy(update={"epochs": 4}), train, 0),
        pretrain_key(OPTIONS, devkit.split("val"), 0),
    ]
    assert len({key, *others}) == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["resnet18", "--out", "w.safetensors"], "resnet18 is no plain ViT"),
        ([NAME, "--out", "w.safetensors", "--image-size", "36"], "--image-size = 36 is no multiple"),
        ([NAME, "--out", "."], "--out .: name a file that ends with .safetensors"),
        ([NAME, "--out", "w.pth"], "--out w.pth: name a file that ends with .safetensors"),
        ([NAME, "--out", "there/w.safetensors"], "written to --out there/w.safetensors: File exists"),
        ([NAME, "--out", "a.safetensors"], "written to --out a.safetensors: it is a folder"),
        ([NAME, "--out", f"{'w' * 300}.safetensors"], "File name too long"),
        ([NAME, "--out", "w.safetensors", "--seed", str(2**32)], "4294967296 is not between 0 and 4294967295"),
        ([NAME, "--out", "w.safetensors", "--threads", "9999999"], "is not between 1 and 1024"),
    ],
)
def test_what_cannot_work_is_refused_before_images_are_made(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "there").touch()
    (tmp_path / "a.safetensors").mkdir()
    try:
        status = cli.main(["pretrain", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "there"]


def test_weights_that_are_there_stay_until_the_new_ones_are_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "kept").write_bytes(b"older weights")
    (out := tmp_path / "w.safetensors").symlink_to(tmp_path / "kept")
    command = ["pretrain", NAME, "--images", "8", "--epochs", "1", "--image-size", "32", "--out", str(out)]
    command += ["--store", str(tmp_path / "store")]
    copy = cli.shutil.copyfile

    def full(source, target):
        copy(source, target)
        if "store" in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli.shutil, "copyfile", full)
    assert cli.main(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "No space left on device (they are in " in told
    assert out.read_bytes() == b"older weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "kept", "store", "w.safetensors"]
    monkeypatch.undo()
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    assert cli.main(command) == 0
    assert load_file(out)
    assert (tmp_path / "kept").read_bytes() == b"older weights", "a link is replaced, not followed"


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_loss_is_the_smoothed_cross_entropy_of_the_objects_class(pieces):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), torch.randn(7, 3, 4, 4)
    classes = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    Y = torch.cat([torch.ones(7, 1), F.one_hot(classes, 5)], dim=1)  # the background is everywhere
    told = gradients(model, Batch(images, torch.zeros(7, 4), Y), pieces)
    wanted = torch.full((7, 5), 0.1 / 5)
    wanted[torch.arange(7), classes] += 0.9
    loss = -(wanted * model(images).log_softmax(dim=1)).sum(dim=1).mean()
    (gradient,) = torch.autograd.grad(loss, [model[1].weight])
    torch.testing.assert_close(told["total"], loss.detach())
    torch.testing.assert_close(model[1].weight.grad, gradient)


def test_accuracy_is_the_share_of_images_whose_class_is_the_likeliest(devkit):
    torch.manual_seed(0)
    split = devkit.split("val")
    model = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, num_classes=64)
    with torch.no_grad():
        model.head.bias[int(np.argmax(split.labels[0, 1:]))] += 100
    right = (split.labels[:, 1:].argmax(axis=1) == split.labels[0, 1:].argmax()).mean()
    assert accuracy(model, split, batch_size=5) == pytest.approx(100 * right)
    assert not model.training


def test_accuracy_is_of_images_as_the_training_gives_them(devkit):
    torch.manual_seed(0)
    split = devkit.split("val")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    images = [(torch.from_numpy(split.pixels(i)) / 255 - mean) / std for i in range(len(split))]
    told = model(torch.stack(images).permute(0, 3, 1, 2)).argmax(dim=1).numpy()
    labels = np.concatenate([np.ones((len(told), 1)), np.eye(64)[told]], axis=1).astype(np.float32)
    assert len(set(told)) > 3
    assert accuracy(model, replace(split, labels=labels)) == 100


OWN = sorted(OWN_WEIGHTS.glob("*.safetensors"))


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_the_projects_own_weights_are_what_the_command_makes_today(path):
    with safe_open(path, framework="pt") as file:
        key = json.loads(file.metadata()["key"])
    options = PretrainConfig(backbone=path.stem, image_size=64, epochs=30)
    assert key["params"] == json.loads(json.dumps(options.key_parameters()))
    assert (key["version"], key["seed"]) == (pretrain_module.VERSION, 0)
    build_backbone(path.stem, weights=str(path), image_size=64)


def test_the_images_that_the_projects_own_weights_have_seen_are_drawn_as_they_were():
    images = b"".join(other_shapes.render("train", i, seed=0, size=64)[0].tobytes() for i in range(50))
    told = "make the weights anew with `semformer pretrain`, each with its name"
    assert hashlib.sha256(images).hexdigest() == IMAGES, told


def test_every_backbone_of_preset_tiny_starts_from_weights():
    table = load_table("table06")
    assert {path.stem for path in OWN} == {resolve(table, row, "tiny", {}, 0).caae.backbone for row in table.rows}
    config = load_config("tiny")
    assert Path(config.caae.weights_file).stem == config.caae.backbone
    assert Path(config.segmentor.weights_file).stem == config.segmentor.backbone
    assert config.segmentor.key_parameters()["weights"] == file_digest(config.segmentor.weights_file)
    assert load_config("tiny", {"segmentor.pretrained": False}).segmentor.weights_file == ""
