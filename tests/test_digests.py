"""What is remembered of files is forgotten with whatever it was about."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from semformer import machine
from semformer.config import file_digest
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.stages.pack import find_or_pack


@pytest.fixture
def folder(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "STILL", 0.0)
    return shutil.copytree(shapes, tmp_path / "shapes") / "VOC2012"


def test_labels_that_change_change_the_digests_of_images_that_do_not(folder):
    def digests() -> tuple[str, str]:
        split = open_devkit(folder).split("train")
        return split.digest, split.mask_digest

    before = digests()
    assert digests() == before
    text = "<annotation><object><name>{}</name></object></annotation>"
    (folder / "Annotations" / "train_000000.xml").write_text(text.format("bar"))
    bar = digests()
    (folder / "Annotations" / "train_000000.xml").write_text(text.format("star"))
    assert all(len({old, one, other}) == 3 for old, one, other in zip(before, bar, digests(), strict=True))


@pytest.mark.parametrize(
    ("kind", "part"), [("images", "JPEGImages/train_000002.jpg"), ("masks", "SegmentationClass/train_000002.png")]
)
def test_a_file_that_changes_before_it_is_packed_is_refused(folder, store, kind, part):
    split = open_devkit(folder).split("train")
    assert split.digest != split.mask_digest  # of the files as they are now
    Image.fromarray(np.zeros((48, 48, 3) if kind == "images" else (48, 48), np.uint8)).save(folder / part)
    with pytest.raises(UserError, match="have changed"):
        find_or_pack(split, kind, store)


@pytest.mark.parametrize("time", [None, (1e9, 1e9)], ids=["now", "the time of the first"])
def test_a_weights_file_of_the_same_length_is_another(tmp_path, time):
    path, digests = tmp_path / "weights.pth", set()
    for content in (b"weights", b"heavier"):
        path.write_bytes(content)
        if time:
            os.utime(path, time)
        digests.add(file_digest(path))
    assert len(digests) == 2


def test_the_names_of_the_images_count_in_their_digests(folder):
    before = open_devkit(folder).split("train")
    told = before.digest, before.mask_digest
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
        (folder / part / f"train_000003.{suffix}").rename(folder / part / f"photo.{suffix}")
    names = folder / "ImageSets" / "Segmentation" / "train.txt"
    names.write_text(names.read_text().replace("train_000003", "photo"))
    after = open_devkit(folder).split("train")
    assert after.digest != told[0]
    assert after.mask_digest != told[1]
