"""Every field and every file that can change a result is in the keys of what it changes, and of nothing else."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from semformer import pipeline
from semformer.config import field_names, load_config
from semformer.store import Store
from semformer.store.leases import LeaseLost

CPU = torch.device("cpu")
SEG = ["deeplab", "segmentation", "evaluate_seg"]
MASKS = ["pseudo_masks", "evaluate_masks", *SEG]
MAPS = ["cams", "evaluate", "train_cams", "affinity_labels", "affinity", "walk", *MASKS]
READERS = {
    "caae": ["caae", "segmentor", *MAPS],
    "segmentor": ["segmentor", *MAPS],
    "cams": MAPS,
    "evaluate": ["evaluate", "evaluate_masks", "evaluate_seg"],
    "affinity_labels": ["affinity_labels", "affinity", "walk", *MASKS],
    "affinity": ["affinity", "walk", *MASKS],
    "walk": ["walk", *MASKS],
    "pseudo_masks": MASKS,
    "deeplab": SEG,
    "segmentation": SEG[1:],
}
"""The stages that depend on a group of options, in the pipeline's order."""
BASE = {
    **{f"{network}.optimizer.name": "sgd" for network in ("caae", "segmentor", "affinity", "deeplab")},
    "segmentor.selection": "best_miou",
    "affinity.radius": 3,
}
OPTIMIZER = {
    "name": "adamw",
    "lr": 0.5,
    "momentum": 0.5,
    "weight_decay": 0.5,
    "power": 0.5,
    "warmup_steps": 7,
    "new_multiplier": 3.0,
    "bias_multiplier": 3.0,
}
NETWORK = {
    "pretrained": True,
    "compile": True,
    "epochs": 7,
    "batch_size": 7,
    "color_jitter": "0.1,0,0,0",
    "image_size": 64,
}
CRF = {
    "crf.iterations": 7,
    "crf.gt_prob": 0.8,
    "crf.gaussian_sxy": 7.0,
    "crf.gaussian_compat": 7.0,
    "crf.bilateral_sxy": 7.0,
    "crf.bilateral_srgb": 7.0,
    "crf.bilateral_compat": 7.0,
}
CHANGED = {
    "caae": {
        **NETWORK,
        **{f"optimizer.{name}": value for name, value in OPTIMIZER.items()},
        "backbone": "vit_wiring_patch8_48",
        "class_dim": 4,
        "merge": "max",
        "decoder_depth": 1,
        "decoder_width": 48,
        "reconstruction": False,
        "enlarge": "1,2",
        "crop_area": "0.1,1",
        "selection": "best_ap",
    },
    "segmentor": {
        **NETWORK,
        **{f"optimizer.{name}": value for name, value in OPTIMIZER.items()},
        "backbone": "vit_shapes_patch8_64",
        "losses": "CF,CB,AS,AC",
        "sigma": 0.3,
        "pair_reduction": "image",
        "suppress": "all",
        "complement": "all",
        "token_dropout": 0.1,
        "long_side": "40,70",
        "selection": "last",
    },
    "cams": {"scales": "1", "flip": False, "final_map": "attention", "last_blocks": 2},
    "evaluate": {"thresholds": "0.1,0.4,0.1", "rule": "fixed", "fixed_threshold": 0.3, "erosion": 3, "pictures": 1},
    "affinity_labels": {"foreground_threshold": 0.6, "background_threshold": 0.1, **CRF},
    "affinity": {
        **NETWORK,
        **{f"optimizer.{name}": value for name, value in OPTIMIZER.items()},
        "backbone": "resnet18",
        "variant": "feature",
        "frozen": True,
        "long_side": "40,70",
        "radius": 2,
    },
    "walk": {"radius": 3, "beta": 3.0, "log2_steps": 3},
    "pseudo_masks": {"threshold": 0.6, "skip_failing": True, **CRF},
    "deeplab": {
        **NETWORK,
        **{f"optimizer.{name}": value for name, value in OPTIMIZER.items()},
        "backbone": "vit_shapes_patch8_64",
        "long_side": "40,70",
        "head_width": 32,
        "head_dilation": 3,
        "frozen_statistics": False,
        "supervised": True,
    },
    "segmentation": {"scales": "1", "flip": True, **CRF},
}
FIELDS = [(f"{group}.{name}", value, READERS[group]) for group in READERS for name, value in CHANGED[group].items()]
FIELDS += [("seed", 1, READERS["caae"]), ("precision", "bfloat16", READERS["caae"])]


def keys(folder, **changes) -> dict[str, str]:
    config = load_config("micro", BASE | {name.replace("__", "."): value for name, value in changes.items()})
    until = [stage.name for stage in pipeline.STAGES]
    found = pipeline.stage_keys(config, pipeline.open_data(config, folder), until)
    return {name: key.digest for name, key in found.items()}


def remade(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [stage for stage in before if before[stage] != after[stage]]


@pytest.mark.parametrize(("field", "value", "stages"), FIELDS)
def test_a_field_is_in_the_key_of_its_stage_and_of_those_after_it(shapes, field, value, stages):
    assert remade(keys(shapes), keys(shapes, **{field: value})) == stages


@pytest.mark.parametrize("name", ["affinity", "walk", "deeplab"])
def test_the_version_of_a_stage_is_in_the_key_of_it_and_of_those_after_it(shapes, monkeypatch, name):
    before = keys(shapes)
    raised = [replace(stage, version=stage.version + (stage.name == name)) for stage in pipeline.STAGES]
    monkeypatch.setattr(pipeline, "STAGES", tuple(raised))
    assert remade(before, keys(shapes)) == READERS[name]


def test_no_field_has_been_forgotten_above():
    files = {f"{stage}.{name}" for stage in ("caae", "segmentor", "deeplab") for name in ("weights", "checkpoint")}
    files |= {"affinity.weights", "cams.folder", "pseudo_masks.folder"}
    of_data = {name for name in field_names() if name.startswith("data")}
    assert {field for field, *_ in FIELDS} == set(field_names()) - files - of_data


@pytest.mark.parametrize("losses", ["CF", "CB", "AS", "AC", "SS", "CF,AS", "AC,SS"])
def test_an_option_counts_where_a_loss_uses_it(losses):
    def key(**changes):
        return load_config("micro", {"segmentor.losses": losses, **changes}).segmentor.key_parameters()

    users = {
        "pair_reduction": ("image", "CF,CB"),
        "complement": ("all", "AC"),
        "suppress": ("all", "AS"),
        "sigma": (9, "AS"),
    }
    for option, (value, used_by) in users.items():
        used = bool(set(losses.split(",")) & set(used_by.split(",")))
        assert (key(**{f"segmentor.{option}": value}) != key()) is used, option


def test_where_there_is_a_file_whether_to_download_does_not_count(tmp_path):
    (file := tmp_path / "w.pth").write_bytes(b"weights")
    keys = [
        load_config("micro", {"caae.pretrained": pretrained, "caae.weights": weights}).caae.key_parameters()
        for weights in (str(file), "")
        for pretrained in (True, False)
    ]
    assert keys[0] == keys[1]
    assert keys[2] != keys[3]


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("caae", "class_dim merge reconstruction decoder_depth decoder_width image_size backbone"),
        ("segmentor", "image_size backbone"),
        ("deeplab", "head_width head_dilation image_size backbone"),
    ],
)
def test_an_imported_network_counts_by_all_that_decides_what_it_computes(tmp_path, network, fields):
    (file := tmp_path / "network.pth").write_bytes(b"weights")

    def key(**changes):
        return getattr(load_config("micro", {f"{network}.checkpoint": str(file), **changes}), network).key_parameters()

    for field, value in CHANGED[network].items():
        assert (key(**{f"{network}.{field}": value}) != key()) is (field in fields.split()), field


def test_an_imported_network_counts_by_the_content_of_its_file_and_the_names_of_its_classes(folder, tmp_path):
    (file := tmp_path / "network.pth").write_bytes(b"weights")

    def digest() -> str:
        return keys(folder, segmentor__checkpoint=str(file))["segmentor"]

    digests = [digest(), digest()]
    file.write_bytes(b"heavier")
    digests.append(digest())
    for path in (folder / "VOC2012" / "classes.txt", *(folder / "VOC2012" / "Annotations").glob("*.xml")):
        path.write_text(path.read_text().replace("disc", "wheel"))
    digests.append(digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.fixture
def folder(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "shapes")


def test_images_and_masks_are_in_the_keys_of_what_reads_them(folder):
    def change(part: str, name: str, pixel) -> list[str]:
        before = keys(folder, data__selection_split="val", data__eval_split="train")
        Image.fromarray(np.full((48, 48, *np.shape(pixel)), pixel, np.uint8)).save(folder / "VOC2012" / part / name)
        return remade(before, keys(folder, data__selection_split="val", data__eval_split="train"))

    assert change("JPEGImages", "train_000001.jpg", (1, 2, 3)) == READERS["caae"]
    assert change("SegmentationClass", "train_000001.png", 0) == ["evaluate", "evaluate_masks"]
    assert change("SegmentationClass", "val_000001.png", 0) == READERS["segmentor"]
    assert change("JPEGImages", "val_000001.jpg", (1, 2, 3)) == READERS["segmentor"]


def test_masks_that_are_learnt_from_are_in_the_key_of_what_learns(folder):
    changes = {"deeplab__supervised": True, "data__selection_split": "val"}
    before = keys(folder, **changes)
    Image.new("L", (48, 48)).save(folder / "VOC2012" / "SegmentationClass" / "train_000001.png")
    assert remade(before, keys(folder, **changes)) == ["evaluate_masks", *SEG]


def test_each_stage_reads_the_split_that_is_meant_for_it():
    names = {f"data.{name}_split": name for name in ("train", "eval", "selection", "mask", "test")}
    config = load_config("micro", names | {"caae.selection": "best_ap", "segmentor.selection": "best_miou"})
    images, masks, both = ["images"], ["masks"], ["images", "masks"]
    assert {stage.name: stage.splits(config) for stage in pipeline.STAGES} == {
        "caae": {"train": images, "selection": images},
        "segmentor": {"train": images, "selection": both},
        "cams": {"eval": images},
        "evaluate": {"eval": masks},
        **{name: {"train": images} for name in ("train_cams", "affinity_labels", "affinity", "walk", "pseudo_masks")},
        "evaluate_masks": {"mask": both},
        "deeplab": {"train": images},
        "segmentation": {"test": images},
        "evaluate_seg": {"test": both},
    }


def test_the_names_of_the_classes_count(folder):
    """A network tells the classes that it knows: with other names, it is another."""
    before = keys(folder)
    for path in (folder / "VOC2012" / "classes.txt", *(folder / "VOC2012" / "Annotations").glob("*.xml")):
        path.write_text(path.read_text().replace("disc", "wheel"))
    assert remade(before, keys(folder)) == READERS["caae"]


def test_a_training_sees_no_masks_of_its_own_images_though_it_is_measured_on_others(shapes, store, monkeypatch):
    opened, real = [], pipeline.pack.packed

    def packed(split, kinds, *arguments, **options):
        opened.append((split.name, *kinds))
        return real(split, kinds, *arguments, **options)

    monkeypatch.setattr(pipeline.pack, "packed", packed)
    config = load_config("micro", {**BASE, "data.selection_split": "val", "caae.optimizer.name": "adamw"})
    list(pipeline.run(config, pipeline.open_data(config, shapes), store, device=CPU, progress=lambda told: None))
    assert [names for names in opened if names[0] == "train"] == [("train", "images")] * 2


def test_who_was_overtaken_saves_no_checkpoint(shapes, store, monkeypatch):
    saved, lost = [], []
    monkeypatch.setattr(Store, "save_checkpoints", lambda self, key: saved.append(key.stage))
    check = pipeline.Lease.check

    def checked(lease):
        if lost:
            raise LeaseLost("taken over")
        check(lease)

    monkeypatch.setattr(pipeline.Lease, "check", checked)
    config = load_config("micro")
    runs = pipeline.run(
        config,
        pipeline.open_data(config, shapes),
        store,
        device=CPU,
        progress=lambda told: lost.append(1) if told.stage == "caae" else None,
    )
    with pytest.raises(LeaseLost):
        list(runs)
    assert not saved
