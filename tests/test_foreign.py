"""Maps, masks and networks of others in the place of stages."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semformer import pipeline
from semformer.cli import main
from semformer.config import load_config
from semformer.errors import UserError
from semformer.stages import deeplab, pseudo_masks
from semformer.stages.cams import MapFiles, foreign_maps
from semformer.stages.context import Context
from semformer.stages.pack import packed
from semformer.store import Store
from semformer.weights import RULES
from tests.pipelines import CPU, label_maps, run, weights

ALL = [stage.name for stage in pipeline.STAGES]


# Files in the place of stages


def foreign(chain, split, folder: Path) -> Path:
    """The maps of the store as a method of others would have left them."""
    maps = MapFiles(chain[1]["train_cams"].artifact)
    folder.mkdir()
    for image_id in split.ids:
        np.save(folder / f"{image_id}.npy", maps[image_id].full.numpy())
    return folder


def test_maps_of_others_take_the_place_of_the_networks(chain, split, shapes, tmp_path):
    folder = foreign(chain, split, tmp_path / "maps")
    config = load_config("micro", {"cams.folder": str(folder), "data.eval_split": "train"})
    runs = run(config, shapes, Store(tmp_path / "store"), until=pipeline.ends(config, "deeplab"))
    assert "segmentor" not in runs
    ours, theirs = (r["evaluate_masks"].artifact.info["metrics"]["cam/train/miou"] for r in (runs, chain[1]))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert "pictures/train_000000.png" in runs["evaluate"].artifact.files
    np.save(folder / f"{split.ids[0]}.npy", np.zeros((1, 48, 48)))
    os.utime(folder / f"{split.ids[0]}.npy", (1, 1))
    other = pipeline.stage_keys(config, pipeline.open_data(config, shapes), ALL)
    assert other["train_cams"].digest != runs["train_cams"].key


@pytest.mark.parametrize("channels", ["present", "objects", "all"])
def test_maps_of_others_may_have_all_classes(chain, split, tmp_path, channels):
    data = packed(split, ["images"], chain[0])
    maps = np.random.default_rng(0).random((9, 48, 48)).astype(np.float32)
    own = {"present": maps[split.objects(0)], "objects": maps[1:], "all": maps}[channels]
    np.save(tmp_path / f"{split.ids[0]}.npy", own)
    found = foreign_maps(tmp_path, data, 0)
    np.testing.assert_array_equal(found.full.numpy(), maps[split.objects(0)])
    assert found.strided.shape == (len(split.objects(0)), 12, 12)


def test_masks_of_others_take_the_place_of_pseudo_masks(chain, split, shapes, tmp_path):
    masks, folder = label_maps(chain[1]["pseudo_masks"]), tmp_path / "masks"
    folder.mkdir()
    for image_id in split.ids:
        Image.fromarray(masks[image_id]).save(folder / f"{image_id}.png")
    config = load_config("micro", {"pseudo_masks.folder": str(folder)})
    runs = run(config, shapes, Store(tmp_path / "store"), until=pipeline.ends(config, "deeplab"))
    assert list(runs) == ["pseudo_masks", "evaluate_masks", "deeplab", "segmentation", "evaluate_seg"]
    for stage, name in (("evaluate_masks", "pseudo/train/miou"), ("evaluate_seg", "seg/val/miou_crf")):
        ours, theirs = (r[stage].artifact.info["metrics"][name] for r in (runs, chain[1]))
        assert ours == theirs
    read = []
    ctx = Context(CPU, lambda told: None, tmp_path, tmp_path, have_read=read.append)
    pseudo_masks.run(config, packed(split, ["images"], chain[0]), None, ctx)
    assert read == [config.pseudo_masks]
    (folder / f"{split.ids[3]}.png").unlink()
    with pytest.raises(UserError, match=rf"has no {split.ids[3]}\.png, the mask of an image of split 'train'"):
        run(config, shapes, Store(tmp_path / "another"), until="deeplab")


def test_pixel_masks_are_learnt_from_only_when_asked(chain, shapes, tmp_path, capsys):
    config = load_config("micro", {"deeplab.supervised": "true"})
    by_name = {stage.name: stage for stage in pipeline.STAGES}
    assert by_name["deeplab"].splits(config) == {"train": ["images", "masks"]}
    assert by_name["deeplab"].splits(load_config("micro")) == {"train": ["images"]}
    runs = run(config, shapes, Store(tmp_path / "store"), until=pipeline.ends(config, "deeplab"))
    assert list(runs) == ["deeplab", "segmentation", "evaluate_seg"]
    assert runs["deeplab"].key != chain[1]["deeplab"].key
    command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(tmp_path / "store")]
    assert main([*command, "--until", "deeplab", "--set", "deeplab.supervised=true"]) == 0
    told = capsys.readouterr().err
    assert "has learnt from the pixel masks of train: an upper bound" in told
    assert "(segmentation of val)" in told


def test_a_network_under_the_usual_names_is_imported(chain, shapes, tmp_path, monkeypatch):
    state = deeplab.build(load_config("micro").deeplab, n_classes=9).state_dict()
    torch.save(state, tmp_path / "net.pth")
    config = load_config("micro", {"deeplab.checkpoint": str(tmp_path / "net.pth")})
    with pytest.raises(UserError, match="is no weight of a published deeplab"):
        run(config, shapes, Store(tmp_path / "store"), until="deeplab")


def test_an_imported_network_segments_and_is_not_trained(chain, split, tmp_path, monkeypatch):
    config, artifact = load_config("micro"), chain[1]["deeplab"].artifact
    trained = load_file(artifact.file(deeplab.WEIGHTS))
    config = config.model_copy(update={"deeplab": config.deeplab.model_copy(update={"checkpoint": "net.pth"})})
    monkeypatch.setattr(deeplab, "load_published", lambda model, kind, path: model.load_state_dict(trained))
    data = replace(packed(split, ["images"], chain[0]), ids=(), labels=np.zeros((0, 9), np.float32))
    made = deeplab.run(config, data, None, Context(CPU, lambda told: None, tmp_path, tmp_path))
    assert made == {"history": {}, "classes": list(split.classes)}
    imported = load_file(tmp_path / deeplab.WEIGHTS)
    assert all(torch.equal(imported[name], value) for name, value in trained.items())


def test_what_an_imported_network_has_learnt_from_is_not_told(chain, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RULES, "deeplab", ((r"(.*)", r"\1"),))  # of a ViT, there are no published names
    torch.save(weights(chain[1]["deeplab"]), tmp_path / "net.pth")
    command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(tmp_path / "store"), "--json"]
    options = ["--set", f"deeplab.checkpoint={tmp_path / 'net.pth'}", "--set", "deeplab.supervised=true"]
    assert main([*command, "--until", "deeplab", *options]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["metrics"] == chain[1]["evaluate_seg"].artifact.info["metrics"]
    assert "has learnt" not in told.err


def test_a_folder_that_is_none_is_told(shapes, tmp_path):
    (tmp_path / "maps.npy").touch()
    for name in ("cams", "pseudo_masks"):
        config = load_config("micro", {f"{name}.folder": str(tmp_path / "maps.npy")})
        with pytest.raises(UserError, match=r"maps\.npy is a file: give the folder that has one for each image"):
            pipeline.stage_keys(config, pipeline.open_data(config, shapes), [name])
    config = load_config("micro", {"pseudo_masks.folder": "nowhere"})
    with pytest.raises(UserError, match="cannot read nowhere: No such file"):
        pipeline.stage_keys(config, pipeline.open_data(config, shapes), ["pseudo_masks"])


def test_files_of_others_are_imported_once_for_all_seeds(shapes, tmp_path):
    (tmp_path / "a.npy").write_bytes(b"maps")
    keys = []
    for seed in (0, 1):
        config = load_config("micro", {"cams.folder": str(tmp_path), "seed": seed})
        keys.append(pipeline.stage_keys(config, pipeline.open_data(config, shapes), "affinity"))
    assert keys[0]["train_cams"] == keys[1]["train_cams"]
    assert keys[0]["affinity"] != keys[1]["affinity"]
