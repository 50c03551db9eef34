"""The embedded data set (shapes.py)."""

import hashlib
import json
import multiprocessing
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semformer.cli import main
from semformer.config import Difficulty, ShapesConfig
from semformer.data import drawing, other_shapes, shapes
from semformer.data.check import check_devkit
from semformer.data.shapes import CLASSES, cached_shapes, make_shapes, render
from semformer.data.voc import open_devkit, voc_palette
from semformer.store.processes import machine
from tests.devkits import refused


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("made") / "shapes", train=6, val=4, size=48)


IMAGES = "6639a8ae925660cba13ada7ca25bea8bb6d97f5da4d6034ab780b22334bd0449"
"""sha256 of the first 50, with their masks."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_parameters_give_the_same_bytes(made, tmp_path):
    again = make_shapes(tmp_path / "again", train=6, val=4, size=48)
    assert files(again) == files(made)
    other = make_shapes(tmp_path / "other", train=6, val=4, size=48, seed=1)
    images = {name for name in files(made) if name.endswith(".jpg")}
    assert all(files(other)[name] != files(made)[name] for name in images)


def test_the_images_of_this_version_are_drawn_as_they_were():
    drawn = b"".join(part.tobytes() for i in range(50) for part in render("train", i, seed=0, size=64)[:2])
    assert hashlib.sha256(drawn).hexdigest() == IMAGES, "raise VERSION: caches hold the images as they were"
    assert shapes.VERSION == 5


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


@pytest.mark.parametrize("context", [0.9, 0.3])
def test_classes_are_seen_in_their_own_context_as_often_as_is_said(monkeypatch, context):
    drawn = []
    choose_context = shapes._choose_context

    def spy(rng, preferred, probability):
        drawn.append(choose_context(rng, preferred, probability) == preferred)
        return preferred

    monkeypatch.setattr(shapes, "_choose_context", spy)
    for i in range(300):
        render("train", i, seed=5, size=32, difficulty=Difficulty(context=context))
    assert np.mean(drawn) == pytest.approx(context, abs=0.1)


@pytest.mark.parametrize("probability", [0.6, 0.2])
def test_a_part_covers_a_small_share_of_its_object_where_it_is_seen(monkeypatch, probability):
    difficulty = Difficulty(part=probability)
    shares = []
    for i in range(120):
        image, _, visible = render("train", i, seed=0, size=96, difficulty=difficulty)
        if len(visible) > 1:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(drawing, "PART_AREA_RANGE", (0.0, 0.0))
            without, *_ = render("train", i, seed=0, size=96, difficulty=difficulty)
        part = np.any(image != without, axis=-1)
        assert (part <= visible[0][1]).mean() > 0.99
        shares.append(part.sum() / visible[0][1].sum())
    seen = [share for share in shares if share]
    assert len(seen) / len(shares) == pytest.approx(probability, abs=0.15)
    assert min(seen) > 0.03
    assert max(seen) < 0.18
    assert np.mean(seen) == pytest.approx(0.11, abs=0.03)


@pytest.mark.parametrize("outlines", [shapes.OUTLINES, other_shapes.OUTLINES])
def test_every_outline_lies_within_reach(outlines):
    y, x = np.mgrid[-1:1:401j, -1:1:401j]
    for name, outline in outlines.items():
        assert np.hypot(x, y)[outline(x, y) < 0].max() <= drawing.REACH, name


def test_contrasts_are_the_swings_of_the_textures():
    def drawn(**contrasts):
        difficulty = Difficulty(part=0, **{"body_contrast": 0, "background_contrast": 0} | contrasts)
        image, mask, _ = render("train", 3, seed=0, size=96, difficulty=difficulty)
        return image.astype(float), mask

    flat, mask = drawn()
    body, _ = drawn(body_contrast=0.2)
    background, _ = drawn(background_contrast=0.4)
    objects, rest = (mask > 0) & (mask < 255), mask == 0
    assert np.mean(np.abs(body - flat)[rest] > 1) < 0.03  # an edge is blended
    assert np.ptp((body - flat)[objects]) == pytest.approx(0.2 * 255, abs=4)
    assert np.mean(np.abs(background - flat)[objects] > 1) < 0.03
    assert np.ptp((background - flat)[rest]) == pytest.approx(0.4 * 255, abs=8)


def test_no_colour_tells_the_class_and_all_are_shared_with_the_backgrounds():
    colours = range(len(shapes.PALETTE))
    assert {c for context in shapes.CONTEXTS.values() for c in context.colours} == set(colours)
    for colour in colours:
        assert sum(colour in object_class.fills for object_class in shapes.CLASSES.values()) == 2
    assert len({object_class.fills for object_class in shapes.CLASSES.values()}) == len(shapes.CLASSES)


@pytest.fixture(scope="module")
def others() -> list:
    return [other_shapes.render("train", i, seed=0, size=96) for i in range(600)]


def test_images_to_pretrain_on_show_one_object_of_one_of_64_classes_each(others, tmp_path):
    shown = np.bincount([k for *_, ((k, _),) in others], minlength=65)
    assert shown[0] == 0
    assert shown[1:].min() > 0
    assert all((np.unique(mask) == [0, k]).all() for _, mask, ((k, _),) in others)
    split = open_devkit(make_shapes(tmp_path / "set", train=3, val=2, size=96, kind="pretraining")).split("train")
    assert split.classes == ("background", *other_shapes.CLASSES)
    assert [np.flatnonzero(row).tolist() for row in split.labels] == [[0, k] for *_, ((k, _),) in others[:3]]


def test_what_is_pretrained_on_tells_nothing_of_the_classes_to_be_learnt(others):
    y, x = np.mgrid[:144, :144] - 72.0
    known = [texture(x, y, 8.0) for texture in shapes.TEXTURES.values()]
    for name, texture in other_shapes.TEXTURES.items():
        assert max(likeness(texture(x, y, 8.0)[40:104, 40:104], one) for one in known) < 0.75, name
    assert likeness(known[0][42:106, 40:104], known[0]) > 0.99
    grid = np.mgrid[-0.6:0.6:48j, -0.6:0.6:48j]
    ours = [outline(grid[1], grid[0]) < 0 for outline in shapes.OUTLINES.values()]
    for outline in other_shapes.OUTLINES.values():
        body = outline(grid[1], grid[0]) < 0
        assert max((body & one).sum() / (body | one).sum() for one in ours) < 0.9
    colours = [np.median(image[mask > 0], axis=0) for image, mask, _ in others]
    assert np.std(colours, axis=0).min() > 20  # of any class


def likeness(part: np.ndarray, whole: np.ndarray) -> float:
    """The highest correlation of a part with any place of a whole, or with its negative."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)[::2, ::2].reshape(-1, part.size)
    windows = windows - windows.mean(axis=1, keepdims=True)
    flat = part.ravel() - part.mean()
    return float(np.abs(windows @ flat / np.linalg.norm(windows, axis=1) / np.linalg.norm(flat)).max())


def test_an_existing_set_is_kept_and_never_overwritten(made, tmp_path):
    stamp = (made / "shapes.json").stat().st_mtime_ns
    assert make_shapes(made, train=6, val=4, size=48) == made
    assert (made / "shapes.json").stat().st_mtime_ns == stamp
    refused(lambda: make_shapes(made, train=7, val=4, size=48), made, "other parameters", "'train': 7")
    harder = Difficulty(part=0.2)
    refused(lambda: make_shapes(made, train=6, val=4, size=48, difficulty=harder), made, "other parameters")
    (tmp_path / "thesis.tex").write_text("precious")
    refused(lambda: make_shapes(tmp_path, train=1, val=1, size=48), tmp_path, "no shapes data set")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_writes_the_set_that_it_is_asked_for(tmp_path):
    options = {"train": 2, "val": 1, "size": 32, "seed": 3}
    command = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["data", "make-shapes", str(tmp_path / "told"), *command]) == 0
    assert files(tmp_path / "told") == files(make_shapes(tmp_path / "made", **options))


def test_an_interrupted_set_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", train=3, val=1, size=32, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes(tmp_path):
    dead, alive = (tmp_path / f".set.{machine()}-{pid}-1" for pid in (2**22 + 1, os.getpid()))
    for folder in (dead, alive):
        (folder / "VOC2012").mkdir(parents=True)
    make_shapes(tmp_path / "set", train=1, val=1, size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "set"]


def test_a_cached_set_is_that_of_its_options_and_each_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    folders = set()
    for number, changes in enumerate([{}, {"seed": 1}, {"difficulty": Difficulty(body_contrast=0.9)}]):
        config = ShapesConfig(train=2, val=1, size=32, **changes)
        folders.add(folder := cached_shapes(config))
        assert cached_shapes(config) == folder
        assert files(folder) == files(make_shapes(tmp_path / str(number), train=2, val=1, size=32, **changes))
    assert len(folders) == 3


def _make_cached(barrier, cache) -> None:
    os.environ["SEMFORMER_CACHE"] = str(cache)
    barrier.wait(timeout=60)
    assert len(open_devkit(cached_shapes(ShapesConfig(train=20, val=2, size=32))).split("train")) == 20


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
