"""The VOC reader (voc.py) and checker (check.py)."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from semformer import machine
from semformer.cli import main
from semformer.data import voc as voc_file
from semformer.data.check import check_devkit
from semformer.data.shapes import CLASSES, make_shapes
from semformer.data.voc import VOC_CLASSES, image_size, open_devkit, read_image, read_mask
from semformer.errors import UserError
from tests.devkits import refused

SAMPLE = Path(__file__).parents[2] / "shared" / "coco_sample"
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of photographs is not here")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("made") / "shapes", train=6, val=4, size=48)


@pytest.fixture
def voc(made, tmp_path) -> Path:
    """A copy of the VOC2012 folder of a small shapes set, to be damaged."""
    return shutil.copytree(made / "VOC2012", tmp_path / "data" / "VOC2012")


# --- reading ---


def test_opens_the_devkit_from_each_of_its_folders(voc):
    inside_devkit = voc.parent / "elsewhere" / "VOCdevkit" / "VOC2012"
    shutil.copytree(voc, inside_devkit)
    for root in (voc, voc.parent, inside_devkit.parent, inside_devkit.parent.parent):
        assert open_devkit(root).classes == ("background", *CLASSES)


def test_without_classes_txt_the_classes_are_vocs(voc):
    (voc / "classes.txt").unlink()
    assert open_devkit(voc).classes == ("background", *VOC_CLASSES)
    assert len(VOC_CLASSES) == 20


def test_split_gives_images_masks_and_labels(voc):
    split = open_devkit(voc).split("train")
    assert split.ids == tuple((voc / "ImageSets/Segmentation/train.txt").read_text().split())
    assert len(split) == 6
    assert split.labels.shape == (6, 9)
    assert split.labels.dtype == np.float32
    assert (split.labels[:, 0] == 1).all()
    assert split.pixels(0).shape == (48, 48, 3)
    assert split.pixels(0).dtype == np.uint8
    assert split.mask(0).shape == (48, 48)
    assert split.mask(0).dtype == np.uint8


def test_labels_come_from_the_annotations_not_the_masks_and_difficult_objects_count(voc):
    xml = "<object><name> {} </name><difficult>1</difficult><part><name>head</name></part></object>"
    text = f"<annotation>{xml.format('star')}{xml.format('bar')}</annotation>"
    (voc / "Annotations" / "train_000000.xml").write_text(text)
    split = open_devkit(voc).split("train")
    assert [split.classes[k] for k in np.flatnonzero(split.labels[0])] == ["background", "star", "bar"]


def test_grey_and_palette_masks_read_the_same(voc):
    split = open_devkit(voc).split("train")
    before = split.mask(0)
    Image.fromarray(before).save(split.mask_path(0))
    assert (split.mask(0) == before).all()


def test_trainaug_is_train_plus_sbd_without_val_and_its_masks_fall_back_to_sbds(voc):
    aug = voc / "SegmentationClassAug"
    aug.mkdir()
    for image_id in ("train_000003", "train_000004", "train_000005", "val_000000", "val_000001"):
        shutil.copy(voc / "SegmentationClass" / f"{image_id}.png", aug)
    splits = voc / "ImageSets" / "Segmentation"
    (splits / "train.txt").write_text("train_000000\ntrain_000003\n")
    (splits / "val.txt").write_text("val_000000\n")
    (voc / "SegmentationClass" / "train_000004.png").unlink()
    split = open_devkit(voc).split("trainaug")
    assert split.ids == ("train_000000", "train_000003", "train_000004", "train_000005", "val_000001")
    assert split.mask_path(1).parent.name == "SegmentationClass"
    assert split.mask_path(2).parent.name == "SegmentationClassAug"
    assert split.mask(2).shape == (48, 48)

    (splits / "trainaug.txt").write_text("train_000005\n")
    assert open_devkit(voc).split("trainaug").ids == ("train_000005",)


def test_digests_tell_what_changed(voc):
    def digests():
        split = open_devkit(voc).split("train")
        return split.digest, split.mask_digest

    image, mask = digests()
    assert digests() == (image, mask)
    mask_path = voc / "SegmentationClass" / "train_000001.png"
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(mask_path)
    assert digests()[0] == image
    assert digests()[1] != mask
    Image.new("RGB", (48, 48)).save(voc / "JPEGImages" / "train_000001.jpg")
    assert digests()[0] != image

    image, _ = digests()
    annotation = voc / "Annotations" / "train_000000.xml"
    annotation.write_text("<annotation><object><name>cross</name></object></annotation>")
    with_cross, _ = digests()
    annotation.write_text("<annotation><object><name>bar</name></object></annotation>")
    with_bar, _ = digests()
    assert len({image, with_cross, with_bar}) == 3


def test_a_digest_is_read_again_only_when_a_file_has_changed(voc, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    image, read = voc / "JPEGImages" / "train_000001.jpg", []
    change = None

    def note_and_read(path: Path) -> bytes:
        read.append(path)
        content = path.read_bytes()
        if change and path == image:
            image.write_bytes(change)
        return content

    monkeypatch.setattr(voc_file, "read_bytes", note_and_read)

    def digest() -> tuple[str, int]:
        read.clear()
        return open_devkit(voc).split("train").digest, len(read)

    first, _ = digest()
    assert digest() == (first, 6), "files that have just been written are read again"
    monkeypatch.setattr(machine, "STILL", 0.0)
    assert digest() == (first, 6)
    assert digest() == (first, 0)
    assert first == open_devkit(voc).split("train").digest_of(
        hashlib.sha256((image.parent / f"train_{i:06d}.jpg").read_bytes()).digest() for i in range(6)
    )
    os.utime(image, (1e9, 1e9))
    assert digest() == (first, 6)
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    os.utime(image, (1e9, 1e9))  # as those who copy with the time of the original
    second, _ = digest()
    assert second != first

    # a file that changes while the files are read
    shutil.rmtree(tmp_path / "cache")
    change = bytes(content) + b"0"
    assert digest()[0] == second
    change = None
    assert digest()[0] not in (first, second)


def test_annotations_are_read_again_only_when_one_has_changed(voc, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "STILL", 0.0)
    plain, read = voc_file.read_labels, []
    monkeypatch.setattr(voc_file, "read_labels", lambda *given: read.append(given) or plain(*given))

    def labels() -> tuple[list, int]:
        read.clear()
        return open_devkit(voc).split("train").labels.tolist(), len(read)

    first, n = labels()
    assert n == 6
    assert labels() == (first, 0)
    (note,) = (tmp_path / "cache" / "notes").iterdir()
    note.write_text(note.read_text()[:-1])
    assert labels() == (first, 6), "a damaged note"
    annotation = voc / "Annotations" / "train_000000.xml"
    for name in ("cross", "bar"):
        annotation.write_text(f"<annotation><object><name>{name}</name></object></annotation>")
        again, n = labels()
        assert n == 6
        assert again[0] == plain(annotation, open_devkit(voc).classes).tolist()
    (voc / "classes.txt").write_text("\n".join(open_devkit(voc).classes[:0:-1]))
    turned, n = labels()
    assert n == 6
    assert [row[:0:-1] for row in turned] == [row[1:] for row in again]
    annotation.unlink()
    with pytest.raises(UserError, match=r"annotation .*train_000000.xml is missing"):
        labels()


def test_sixteen_bits_become_eight_and_more_are_refused(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert (np.array(voc_file.read_image(tmp_path / "16.png")) == grey[..., None]).all()
    for mode, values in (("F", grey.astype(np.float32) / 255), ("I", grey.astype(np.int32) << 16)):
        Image.fromarray(values).save(tmp_path / "32.tiff")
        told = rf"32.tiff has 32 bits a pixel \(mode {mode}\); save it with 8 bits a channel"
        with pytest.raises(UserError, match=told):
            voc_file.read_image(tmp_path / "32.tiff")


def test_an_orientation_that_there_is_not_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert voc_file.image_size(tmp_path / "a.jpg") == voc_file.read_image(tmp_path / "a.jpg").size == (40, 20)


def test_without_a_home_notes_are_kept_among_temporary_files(monkeypatch, tmp_path):
    monkeypatch.delenv("SEMFORMER_CACHE", raising=False)

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert machine.cache_folder().parent == tmp_path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_as_large_as_it_is_read_however_the_camera_was_held(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    size = (40, 20) if orientation < 5 else (20, 40)
    assert voc_file.image_size(tmp_path / "a.jpg") == voc_file.read_image(tmp_path / "a.jpg").size == size


def test_images_are_upright(tmp_path):
    """A photograph that a camera has turned is seen, and measured, as a person sees it."""
    upright = np.zeros((20, 40, 3), dtype=np.uint8)
    upright[:, :20] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.jpg", exif=exif)
    assert np.abs(np.asarray(read_image(tmp_path / "turned.jpg")).astype(int) - upright).mean() < 2
    assert image_size(tmp_path / "turned.jpg") == (40, 20)
    Image.fromarray(np.zeros((20, 40), dtype=np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", tmp_path / "turned.jpg", 2).shape == (20, 40)


# --- bad input ---


def test_missing_data_folder(tmp_path):
    refused(lambda: open_devkit(tmp_path / "no"), tmp_path / "no", "VOC2012", "semformer data make-shapes")


@pytest.mark.parametrize("part", ["JPEGImages", "Annotations", "ImageSets/Segmentation"])
def test_folder_that_is_no_devkit(voc, part):
    shutil.rmtree(voc / part)
    refused(lambda: open_devkit(voc), voc, part, "semformer data make-shapes")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n", "names no class"),
        ("disc\ndisc\n", "'disc' twice"),
        ("background\n", "'background'"),
        ("\n".join(map(str, range(255))), "names 255 classes; at most 254 fit into a mask"),
    ],
)
def test_bad_classes_txt(voc, text, complaint):
    (voc / "classes.txt").write_text(text)
    refused(lambda: open_devkit(voc), voc / "classes.txt", complaint)


def test_as_many_classes_as_a_mask_can_hold_may_be_named(voc):
    (voc / "classes.txt").write_text("\n".join(map(str, range(254))))
    assert len(open_devkit(voc).classes) == 255


def test_unknown_split_lists_those_there_are(voc):
    refused(lambda: open_devkit(voc).split("tarin"), "'tarin'", "train, val")


def test_trainaug_without_sbd_says_what_it_needs(voc):
    refused(lambda: open_devkit(voc).split("trainaug"), "trainaug.txt", voc / "SegmentationClassAug")


def test_empty_split(voc):
    path = voc / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("\n \n")
    refused(lambda: open_devkit(voc).split("train"), "'train' is empty", path)


def test_image_listed_twice(voc):
    path = voc / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("train_000002\ntrain_000001\ntrain_000002\n")
    refused(lambda: open_devkit(voc).split("train"), path, "'train_000002' twice")


def test_missing_image(voc):
    path = voc / "JPEGImages" / "train_000002.jpg"
    path.unlink()
    refused(lambda: open_devkit(voc).split("train"), path, "missing")


def test_missing_annotation(voc):
    path = voc / "Annotations" / "train_000002.xml"
    path.unlink()
    refused(lambda: open_devkit(voc).split("train"), path, "missing")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<annotation><object>", "not readable as XML"),
        ("<svg></svg>", "XML of another kind: its root is <svg>, not <annotation>"),
        ("<annotation><object><name>triangel</name></object></annotation>", "'triangel'"),
        (
            "<annotation><object><name>triangel</name></object></annotation>",
            "nearest valid one is 'triangle'",
        ),
        ("<annotation><object><name>background</name></object></annotation>", "'background'"),
    ],
)
def test_bad_annotation(voc, text, complaint):
    path = voc / "Annotations" / "train_000002.xml"
    path.write_text(text)
    refused(lambda: open_devkit(voc).split("train"), path, complaint)


def test_missing_mask_is_told_when_asked_for(voc):
    path = voc / "SegmentationClass" / "train_000002.png"
    path.unlink()
    split = open_devkit(voc).split("train")
    refused(lambda: split.mask(2), path, "missing")
    refused(lambda: split.mask_digest, path)
    assert len(split.digest) == 64


def test_mask_of_another_size_than_its_image(voc):
    path = voc / "SegmentationClass" / "train_000002.png"
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(path)
    refused(lambda: open_devkit(voc).split("train").mask(2), path, "48x40", "48x48")


def test_mask_with_a_value_that_is_no_class(voc):
    path = voc / "SegmentationClass" / "train_000002.png"
    mask = np.zeros((48, 48), np.uint8)
    mask[5, 5], mask[6, 6], mask[7, 7] = 8, 9, 255
    Image.fromarray(mask).save(path)
    refused(lambda: open_devkit(voc).split("train").mask(2), path, "the value 9", "0 to 8", "255")


def test_mask_in_colours_instead_of_indices(voc):
    path = voc / "SegmentationClass" / "train_000002.png"
    Image.new("RGB", (48, 48)).save(path)
    refused(lambda: open_devkit(voc).split("train").mask(2), path, "RGB")


@pytest.mark.parametrize("keep", [0, 20, 0.6])
def test_corrupt_or_truncated_image_and_mask(voc, keep):
    split = open_devkit(voc).split("train")
    for path, read in ((split.image_path(2), split.pixels), (split.mask_path(2), split.mask)):
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
        refused(lambda read=read: read(2), path, "damaged")
        path.write_bytes(data)
    path = split.image_path(2)
    path.write_text("<html>404 not found</html>")
    refused(lambda: split.pixels(2), path, "no image")


def test_an_image_of_more_pixels_than_are_safe_to_decode(voc, monkeypatch):
    split = open_devkit(voc).split("train")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 48 // 3)
    refused(lambda: split.pixels(2), split.image_path(2), "exceeds limit")


# --- check_devkit ---


def test_check_finds_nothing_wrong_with_a_fresh_set(made):
    calls = []
    found = check_devkit(made, progress=lambda done, total: calls.append((done, total)))
    assert found.problems == []
    assert any(line.startswith("train: 6 images") for line in found.lines)
    assert "trainaug: absent" in found.lines
    assert calls == [(n, 10) for n in range(1, 11)]


def test_check_counts_the_images_of_each_class(made):
    devkit = open_devkit(made)
    counts = sum(devkit.split(name).labels[:, 1:].sum(axis=0) for name in ("train", "val"))
    told = ", ".join(f"{name} {count:.0f}" for name, count in zip(CLASSES, counts, strict=True))
    assert check_devkit(made).lines[-1] == f"images of each class: {told}"


def test_check_counts_the_images_without_an_object(voc):
    assert not any("without an object" in line for line in check_devkit(voc).lines)
    for image_id in ("train_000001", "val_000002"):
        (voc / "Annotations" / f"{image_id}.xml").write_text("<annotation/>")
    found = check_devkit(voc)
    assert found.lines[-1] == "images without an object: 2"
    assert found.problems == []


def test_the_check_command_fails_where_there_is_a_problem(voc, capsys):
    assert main(["data", "check", str(voc)]) == 0
    assert "problem" not in capsys.readouterr().err
    (voc / "Annotations" / "train_000004.xml").unlink()
    assert main(["data", "check", str(voc)]) == 1
    assert "problem: annotation missing: 1" in capsys.readouterr().err


def test_check_counts_every_problem_and_names_the_first_of_each_kind(voc):
    for image_id in ("train_000001", "val_000002"):
        (voc / "JPEGImages" / f"{image_id}.jpg").unlink()
    for image_id in ("train_000002", "train_000003", "val_000000"):
        (voc / "SegmentationClass" / f"{image_id}.png").unlink()
    (voc / "Annotations" / "train_000004.xml").unlink()
    (voc / "Annotations" / "train_000005.xml").write_text("<svg/>")
    (voc / "JPEGImages" / "val_000003.jpg").write_bytes(b"no image")
    Image.fromarray(np.full((48, 48), 77, np.uint8)).save(voc / "SegmentationClass" / "val_000001.png")
    expected = [
        ("annotation missing: 1", "train_000004.xml"),
        ("annotation unusable: 1", "train_000005.xml"),
        ("image missing: 2", "train_000001.jpg"),
        ("image unusable: 1", "val_000003.jpg"),
        ("mask missing: 3", "train_000002.png"),
        ("mask unusable: 1", "val_000001.png"),
    ]
    problems = check_devkit(voc).problems
    assert len(problems) == len(expected)
    for problem, (count, first) in zip(problems, expected, strict=True):
        assert problem.startswith(count)
        assert first in problem


def test_check_reports_splits_that_are_empty_or_absent(voc):
    splits = voc / "ImageSets" / "Segmentation"
    (splits / "train.txt").write_text("")
    (splits / "val.txt").unlink()
    found = check_devkit(voc)
    assert "val: absent" in found.lines
    assert any("'train' is empty" in problem for problem in found.problems)
    assert any("none of the splits" in problem for problem in found.problems)


def test_check_tells_how_many_images_voc_has_and_what_the_paper_prints(voc):
    (voc / "classes.txt").unlink()
    (voc / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("train_000005\n")
    found = check_devkit(voc)
    assert "trainaug: 1 images (VOC 2012 has 10,582; the paper prints 10,528)" in found.lines
    assert "val has 4 images, VOC 2012 has 1,449" in found.problems


# --- photographs ---


@needs_sample
def test_the_sample_s_labels_agree_with_its_masks():
    devkit = open_devkit(SAMPLE)
    train, val = devkit.split("train"), devkit.split("val")
    assert (len(train), len(val)) == (76, 77)
    present = np.maximum(train.labels.max(axis=0), val.labels.max(axis=0))
    assert [name for name, seen in zip(devkit.classes, present, strict=True) if not seen] == ["cow"]
    for split in (train, val):
        for i in range(len(split)):
            mask = split.mask(i)
            assert set(np.unique(mask)) - {0, 255} == set(split.objects(i))
            assert split.pixels(i).shape == (*mask.shape, 3)


@needs_sample
def test_check_compares_the_counts_with_vocs():
    found = check_devkit(SAMPLE)
    assert any("76 images (VOC 2012 has 1,464)" in line for line in found.lines)
    assert "val has 77 images, VOC 2012 has 1,449" in found.problems
