"""The VOC reader (voc.py) and the embedded data set (shapes.py)."""

import hashlib
import json
import multiprocessing
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from semformer.data import shapes
from semformer.data import voc as voc_file
from semformer.data.check import check_devkit
from semformer.data.shapes import CLASSES, cached_shapes, make_shapes, render
from semformer.data.voc import VOC_CLASSES, image_size, open_devkit, read_image, read_mask, voc_palette
from semformer.errors import UserError

VOC_SAMPLE = Path(__file__).parents[2] / "shared" / "voc_sample"
needs_voc_sample = pytest.mark.skipif(not VOC_SAMPLE.is_dir(), reason="the VOC sample is not here")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("made") / "shapes", train=6, val=4, size=48)


@pytest.fixture
def voc(made, tmp_path) -> Path:
    """A copy of the VOC2012 folder of a small shapes set, to be damaged."""
    return shutil.copytree(made / "VOC2012", tmp_path / "data" / "VOC2012")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
    xml = "<object><name>{}</name><difficult>1</difficult><part><name>head</name></part></object>"
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
    read = []
    monkeypatch.setattr(voc_file, "read_bytes", lambda path: read.append(path) or path.read_bytes())

    def digest() -> tuple[str, int]:
        read.clear()
        return open_devkit(voc).split("train").digest, len(read)

    first = digest()
    assert first == (digest()[0], 6), "files that have just been written are read again"
    image = voc / "JPEGImages" / "train_000001.jpg"
    for path in image.parent.iterdir():
        os.utime(path, (1e9, 1e9))
    assert digest() == first
    assert digest() == (first[0], 0)
    assert digest()[0] == open_devkit(voc).split("train").digest_of(
        hashlib.sha256((image.parent / f"train_{i:06d}.jpg").read_bytes()).digest() for i in range(6)
    )
    os.utime(image, (1e9 + 1, 1e9 + 1))
    assert digest() == first
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    os.utime(image, (1e9 + 2, 1e9 + 2))
    assert digest()[0] != first[0]


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


def refused(action, *texts: str | Path) -> None:
    """`action` raises UserError whose text contains all of `texts`."""
    with pytest.raises(UserError) as raised:
        action()
    for text in texts:
        assert str(text) in str(raised.value)


def test_missing_data_folder(tmp_path):
    refused(lambda: open_devkit(tmp_path / "no"), tmp_path / "no", "VOC2012", "semformer data make-shapes")


@pytest.mark.parametrize("part", ["JPEGImages", "Annotations", "ImageSets/Segmentation"])
def test_folder_that_is_no_devkit(voc, part):
    shutil.rmtree(voc / part)
    refused(lambda: open_devkit(voc), voc, part, "semformer data make-shapes")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("\n", "names no class"), ("disc\ndisc\n", "'disc' twice"), ("background\n", "'background'")],
)
def test_bad_classes_txt(voc, text, complaint):
    (voc / "classes.txt").write_text(text)
    refused(lambda: open_devkit(voc), voc / "classes.txt", complaint)


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
        ("<annotation></annotation>", "names no object"),
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


# --- check_devkit ---


def test_check_finds_nothing_wrong_with_a_fresh_set(made):
    calls = []
    found = check_devkit(made, progress=lambda done, total: calls.append((done, total)))
    assert found.problems == []
    assert any(line.startswith("train: 6 images") for line in found.lines)
    assert "trainaug: absent" in found.lines
    assert calls == [(n, 10) for n in range(1, 11)]


def test_check_counts_every_problem_and_names_the_first_of_each_kind(voc):
    for image_id in ("train_000001", "val_000002"):
        (voc / "JPEGImages" / f"{image_id}.jpg").unlink()
    for image_id in ("train_000002", "train_000003", "val_000000"):
        (voc / "SegmentationClass" / f"{image_id}.png").unlink()
    (voc / "Annotations" / "train_000004.xml").unlink()
    (voc / "Annotations" / "train_000005.xml").write_text("<annotation/>")
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


# --- shapes ---


def test_the_same_parameters_give_the_same_bytes(made, tmp_path):
    again = make_shapes(tmp_path / "again", train=6, val=4, size=48)
    assert files(again) == files(made)
    other = make_shapes(tmp_path / "other", train=6, val=4, size=48, seed=1)
    images = {name for name in files(made) if name.endswith(".jpg")}
    assert all(files(other)[name] != files(made)[name] for name in images)


def test_an_image_does_not_depend_on_how_many_there_are(made, tmp_path):
    fewer = files(make_shapes(tmp_path / "fewer", train=2, val=1, size=48))
    shared = {name for name in fewer if name.endswith((".jpg", ".png", ".xml"))}
    assert len(shared) == 9
    assert all(fewer[name] == files(made)[name] for name in shared)


def test_annotations_agree_with_masks(made):
    for name in ("train", "val"):
        split = open_devkit(made).split(name)
        for i in range(len(split)):
            in_mask = set(np.unique(split.mask(i))) - {0, 255}
            assert in_mask == set(np.flatnonzero(split.labels[i])) - {0}


def test_boxes_enclose_the_objects(made):
    folder = made / "VOC2012"
    names = list(CLASSES)
    for i in range(6):
        *_, visible = render("train", i, seed=0, size=48)
        root = ET.parse(folder / "Annotations" / f"train_{i:06d}.xml").getroot()
        for element, (k, pixels) in zip(root.iterfind("object"), visible, strict=True):
            assert element.findtext("name") == names[k - 1]
            left, top, right, bottom = (
                int(element.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            box = np.zeros_like(pixels)
            box[top - 1 : bottom, left - 1 : right] = True
            assert (pixels <= box).all()
            assert pixels[top - 1].any()
            assert pixels[bottom - 1].any()
            assert pixels[:, left - 1].any()
            assert pixels[:, right - 1].any()


def test_masks_have_vocs_palette_and_a_ring_one_pixel_wide_around_objects(made):
    path = made / "VOC2012" / "SegmentationClass" / "train_000000.png"
    with Image.open(path) as image:
        assert image.mode == "P"
        palette = image.getpalette()
    assert palette[3 * 1 : 3 * 3] == [128, 0, 0, 0, 128, 0]
    assert palette[3 * 255 :] == [224, 224, 192]
    assert palette == voc_palette()[: len(palette)]
    for i in range(20):
        _, mask, visible = render("val", i, seed=0, size=96)
        objects = np.any([pixels for _, pixels in visible], axis=0)
        ring = mask == 255
        assert (ring <= objects).all()
        assert ((mask == 0) == ~objects).all()
        inner = (mask > 0) & ~ring
        touching = np.zeros_like(inner)
        for axis in (0, 1):
            for step in (1, -1):
                neighbour = np.roll(mask == 0, step, axis)
                np.moveaxis(neighbour, axis, 0)[0 if step == 1 else -1] = False
                touching |= neighbour
        assert not (inner & touching).any()


def test_statistics_of_the_images():
    images = [render("train", i, seed=3, size=96) for i in range(300)]
    counts = np.bincount([len(visible) for *_, visible in images], minlength=4)[1:] / 300
    assert counts == pytest.approx(shapes.NUM_OBJECTS_PROBABILITIES, abs=0.1)
    for _, mask, visible in images:
        present = {k for k, _ in visible}
        for k in present:
            assert np.count_nonzero(mask == k) >= 60
        for _, pixels in visible:
            rows, columns = np.nonzero(pixels)
            assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 96 * 0.72
    labelled = np.bincount([k for *_, visible in images for k in {k for k, _ in visible}], minlength=9)[1:]
    assert labelled.min() >= 300 / 8


def test_every_object_shows_enough_pixels(monkeypatch):
    monkeypatch.setattr(shapes, "MIN_VISIBLE_PIXELS", 500)
    for i in range(60):
        _, mask, visible = render("train", i, seed=0, size=48)
        for _, pixels in visible:
            assert np.count_nonzero(pixels & (mask != 255)) >= 500 / 4


def test_classes_are_mostly_seen_in_their_own_context(monkeypatch):
    drawn = []
    choose_context = shapes._choose_context

    def spy(rng, preferred):
        drawn.append(choose_context(rng, preferred) == preferred)
        return preferred

    monkeypatch.setattr(shapes, "_choose_context", spy)
    for i in range(300):
        render("train", i, seed=5, size=32)
    assert np.mean(drawn) == pytest.approx(shapes.CONTEXT_PROBABILITY, abs=0.1)


def test_a_part_covers_a_small_share_of_its_object(monkeypatch):
    shares = []
    for i in range(60):
        image, _, visible = render("train", i, seed=0, size=96)
        if len(visible) > 1:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "PART_AREA_RANGE", (0.0, 0.0))
            without, *_ = render("train", i, seed=0, size=96)
        part = np.any(image != without, axis=-1)
        assert (part <= visible[0][1]).mean() > 0.99
        shares.append(part.sum() / visible[0][1].sum())
    assert min(shares) > 0.03
    assert max(shares) < 0.18
    assert np.mean(shares) == pytest.approx(0.11, abs=0.03)


def test_no_colour_tells_the_class_and_all_are_shared_with_the_backgrounds():
    colours = range(len(shapes.PALETTE))
    assert {c for context in shapes.CONTEXTS.values() for c in context.colours} == set(colours)
    for colour in colours:
        assert sum(colour in object_class.fills for object_class in shapes.CLASSES.values()) == 2
    assert len({object_class.fills for object_class in shapes.CLASSES.values()}) == len(shapes.CLASSES)


def test_an_existing_set_is_kept_and_never_overwritten(made, tmp_path):
    stamp = (made / "shapes.json").stat().st_mtime_ns
    assert make_shapes(made, train=6, val=4, size=48) == made
    assert (made / "shapes.json").stat().st_mtime_ns == stamp
    refused(lambda: make_shapes(made, train=7, val=4, size=48), made, "other parameters", "'train': 7")
    (tmp_path / "thesis.tex").write_text("precious")
    refused(lambda: make_shapes(tmp_path, train=1, val=1, size=48), tmp_path, "no shapes data set")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("bad", [{"train": 0}, {"val": 0}, {"size": 16}, {"seed": -1}])
def test_bad_parameters(tmp_path, bad):
    name, value = next(iter(bad.items()))
    refused(lambda: make_shapes(tmp_path / "x", **{"train": 1, "val": 1, **bad}), name, value)
    assert not (tmp_path / "x").exists()


def test_an_interrupted_set_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", train=3, val=1, size=32, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def _make_cached(barrier, cache) -> None:
    os.environ["SEMFORMER_CACHE"] = str(cache)
    barrier.wait(timeout=60)
    assert len(open_devkit(cached_shapes(20, 2, size=32)).split("train")) == 20


def test_two_processes_may_make_the_same_cached_set_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_make_cached, args=(barrier, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "shapes.json").read_text())["train"] == 20
    assert check_devkit(folder).problems == []


# --- the real thing ---


@needs_voc_sample
def test_voc_sample_has_all_classes_and_labels_that_agree_with_its_masks():
    devkit = open_devkit(VOC_SAMPLE)
    train, val = devkit.split("train"), devkit.split("val")
    assert (len(train), len(val)) == (38, 42)
    assert devkit.ids("trainaug") == train.ids
    present = np.maximum(train.labels.max(axis=0), val.labels.max(axis=0))
    assert present.shape == (21,)
    assert present.all()
    for split in (train, val):
        for i in range(len(split)):
            with Image.open(split.mask_path(i)) as mask:
                in_mask = set(np.unique(np.array(mask))) - {0, 255}
            assert in_mask == set(np.flatnonzero(split.labels[i])) - {0}
        assert split.pixels(0).shape[2] == 3


@needs_voc_sample
def test_check_compares_the_counts_with_vocs():
    found = check_devkit(VOC_SAMPLE)
    assert any("38 images (VOC 2012 has 1,464)" in line for line in found.lines)
    assert any("10,582; the paper prints 10,528" in line for line in found.lines)
    assert "val has 42 images, VOC 2012 has 1,449" in found.problems
