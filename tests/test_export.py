"""`semformer export-test`: what it writes for the test server, of which network, and what it refuses."""

import gzip
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semformer import pipeline, submission
from semformer.cli import main
from semformer.config import load_config
from semformer.data.label_maps import LabelMaps, png, write_label_maps
from semformer.data.voc import IGNORE, open_devkit, voc_palette
from semformer.errors import UserError
from semformer.stages import deeplab, segmentation
from semformer.store import Store
from semformer.store.collection import collect
from semformer.submission import ARCHIVE, RESULTS
from tests.pipelines import CPU, damage, run

SIZES = [(33, 64), (48, 48), (60, 37)]
CONFIG = load_config("micro")


@pytest.fixture(scope="module")
def voc(shapes):
    """The embedded data set with test images as VOC's are: of many sizes, without annotations, without masks."""
    folder = shapes / "VOC2012"
    for n, size in enumerate(SIZES):
        with Image.open(folder / f"JPEGImages/val_{n:06d}.jpg") as image:
            image.resize(size).save(folder / f"JPEGImages/test_{n}.jpg")
    (folder / "ImageSets/Segmentation/test.txt").write_text("test_2\ntest_0\ntest_1\n")
    return shapes


@pytest.fixture(scope="module")
def trained(voc, tmp_path_factory):
    """A store in which the micro pipeline has run to the segmentation of `val`, and what happened to each stage."""
    store = Store(tmp_path_factory.mktemp("trained") / "store")
    return store, run(CONFIG, voc, store, until="segmentation")


@pytest.fixture
def split(voc):
    return open_devkit(voc).split("test", labelled=False)


@pytest.fixture
def export(voc, trained, tmp_path):
    """export(options...) -> its exit status; it writes to `tmp_path / "out"` if not told otherwise."""
    places = ["--data", str(voc), "--store", str(trained[0].root), "--out", str(tmp_path / "out")]
    return lambda *options: main(["export-test", "--preset", "micro", *places, *options])


def segmented(trained, split) -> list[dict[str, np.ndarray]]:
    """The label maps of each image, by kind, of the trained network."""
    model = deeplab.load(CONFIG.deeplab, trained[1]["deeplab"].artifact, device=CPU)
    return [
        segmentation.segment(model, split.pixels(i), CONFIG.segmentation, CONFIG.precision) for i in range(len(split))
    ]


# What is written


@pytest.mark.parametrize("kind", ["", "single", "multi", "single_crf"])
def test_a_submission_has_the_network_s_label_map_of_each_image_as_the_server_takes_it(
    export, trained, split, tmp_path, capsys, kind
):
    assert export("--json", *(["--kind", kind] if kind else [])) == 0
    told = json.loads(capsys.readouterr().out)
    kind = kind or "multi_crf"
    out = tmp_path / "out"
    assert {name: told[name] for name in ("split", "kind", "images")} == {"split": "test", "kind": kind, "images": 3}
    assert Path(told["folder"]) == out / "results/VOC2012/Segmentation/comp6_test_cls"
    assert Path(told["archive"]) == out / "results.tar.gz"
    names = [f"results/VOC2012/Segmentation/comp6_test_cls/test_{n}.png" for n in range(3)]
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == ["results.tar.gz", *names]
    with tarfile.open(out / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == names
        for name in names:
            assert archive.extractfile(name).read() == (out / name).read_bytes()
    expected = segmented(trained, split)
    assert any((maps[kind] != maps[other]).any() for maps in expected for other in maps if other != kind)
    for image_id, maps in zip(split.ids, expected, strict=True):
        with Image.open(out / RESULTS / f"{image_id}.png") as image:
            assert (image.format, image.mode, image.getpalette()) == ("PNG", "P", voc_palette())
            assert image.size == SIZES[int(image_id[-1])]
            np.testing.assert_array_equal(np.array(image), maps[kind])
    assert list(tmp_path.iterdir()) == [out]


def test_without_a_crf_the_label_maps_are_of_several_scales(export, trained, split, tmp_path):
    assert export("--set", "segmentation.crf.iterations=0") == 0
    for image_id, maps in zip(split.ids, segmented(trained, split), strict=True):
        with Image.open(tmp_path / "out" / RESULTS / f"{image_id}.png") as image:
            np.testing.assert_array_equal(np.array(image), maps["multi"])


def test_what_a_run_has_segmented_is_found_and_needs_no_network(export, trained, tmp_path, capsys):
    store = Store(shutil.copytree(trained[0].root, tmp_path / "store"))
    shutil.rmtree(store.root / "deeplab")
    assert export("--split", "val", "--store", str(store.root), "--json") == 0
    segmented = json.loads(capsys.readouterr().out)["stages"][-1]
    assert segmented == {"stage": "segmentation", "key": trained[1]["segmentation"].key, "found": True, "seconds": 0.0}


def test_it_tells_how_far_it_is_and_its_label_maps_are_kept(export, voc, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("semformer.cli._Display.EVERY", 0.0)
    store = Store(shutil.copytree(trained[0].root, tmp_path / "store"))
    shutil.rmtree(store.root / "segmentation")
    assert export("--store", str(store.root)) == 0
    told = capsys.readouterr().err
    for stage in ("segmentation", "submission"):
        assert re.findall(rf"{stage}: (\d)/3", told) == ["1", "2", "3"]
    store.roots.keep("another", [])
    collect(store, apply=True, grace=0)
    assert len(store.published(["segmentation"])) == len(store.published(["deeplab"])) == 1


def test_an_empty_folder_is_filled_and_another_is_left_as_it_is(export, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert export() == 0
    (tmp_path / "out" / ARCHIVE).write_text("mine")
    assert export() == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "out" / ARCHIVE).read_text() == "mine"
    (tmp_path / "file").touch()
    assert export("--out", str(tmp_path / "file")) == 2
    assert "cannot be a folder" in capsys.readouterr().err


def test_what_the_check_refuses_is_not_written(split, tmp_path):
    write_label_maps(tmp_path / "maps.zip", ((f"multi/{name}", np.zeros((48, 48), np.uint8)) for name in split.ids))
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"test_2\.png is 48x48 pixels, its image 60x37"):
        submission.write(LabelMaps([tmp_path / "maps.zip"]), "multi", split, out, lambda told: None)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "maps.zip", out]
    assert not list(out.iterdir())
    (tmp_path / f".out.{os.getpid()}").touch()
    with pytest.raises(UserError, match=rf"--out {out} cannot be written: "):
        submission.write(LabelMaps([tmp_path / "maps.zip"]), "multi", split, out, lambda told: None)


# Which network, and which images


def test_without_the_network_nothing_is_trained_and_the_command_that_does_is_told(export, trained, tmp_path, capsys):
    store = Store(shutil.copytree(trained[0].root, tmp_path / "store"))
    shutil.rmtree(store.root / "segmentation")
    for options in (["--set", "deeplab.epochs=2"], ["--store", str(tmp_path / "empty")]):
        assert export("--store", str(store.root), *options) == 2
        assert "train it with `semformer run --until deeplab`" in " ".join(capsys.readouterr().err.split())
    damage(store, trained[1]["deeplab"], deeplab.WEIGHTS)
    assert export("--store", str(store.root)) == 2
    assert "train it with `semformer run --until deeplab`" in " ".join(capsys.readouterr().err.split())
    assert not store.published(["deeplab"])
    assert not (tmp_path / "out").exists()


def test_a_network_from_a_file_needs_no_training(voc, tmp_path):
    (tmp_path / "net.pth").touch()
    config = load_config("micro", {"deeplab.checkpoint": str(tmp_path / "net.pth")})
    keys = pipeline.stage_keys(config, pipeline.open_data(config, voc), "segmentation")
    submission.check_trained(config, keys, Store(tmp_path / "store"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kind", "multi_crf", "--set", "segmentation.crf.iterations=0"], "= 0 there are the kinds single, multi"),
        (["--kind", "best"], "--kind best: with segmentation.crf.iterations = 5 there are the kinds single, single_"),
        (["--split", "none"], "There is no split 'none'"),
        (["--set", "deeplab.epoch=2"], "did you mean deeplab.epochs"),
    ],
)
def test_what_is_not_there_is_told(export, tmp_path, capsys, options, told):
    assert export(*options) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_only_test_images_may_lack_annotations(voc, split):
    devkit = open_devkit(voc)
    np.testing.assert_array_equal(split.labels, np.eye(1, len(devkit.classes)).repeat(3, axis=0))
    assert split.labels.dtype == np.float32
    with pytest.raises(UserError, match=r"annotation .*test_2\.xml is missing"):
        devkit.split("test")
    assert devkit.split("val", labelled=False).digest == devkit.split("val").digest
    data = pipeline.open_data(CONFIG, voc, unlabelled=["test"])
    assert data["test"].digest == split.digest
    with pytest.raises(UserError, match=r"test_2\.xml is missing"):
        pipeline.open_data(CONFIG, voc)["test"]


# The check


def label_map(size: tuple[int, int], value: int = 0, palette: list[int] | None = None, format: str = "png") -> bytes:
    image, buffer = Image.new("P", size, value), io.BytesIO()
    image.putpalette(palette or voc_palette())
    image.save(buffer, format)
    return buffer.getvalue()


def write_archive(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


NAMES = [f"{RESULTS}/test_{n}.png" for n in range(3)]
WHOLE = [(name, label_map(size, value=8)) for name, size in zip(NAMES, SIZES, strict=True)]
GREY = io.BytesIO()
Image.new("L", SIZES[2]).save(GREY, format="png")


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ([], r"has no .*/test_2\.png"),
        ([("results/VOC2012/notes.txt", b""), WHOLE[2]], r"has .*notes\.txt: of no image of test, or twice"),
        ([(f"{RESULTS}/val_000000.png", WHOLE[2][1])], r"has .*val_000000\.png: of no image of test, or twice"),
        ([WHOLE[2], WHOLE[2]], r"has .*test_2\.png: of no image of test, or twice"),
        ([("test_2.png", WHOLE[2][1])], r"has test_2\.png: of no image"),
        ([(NAMES[2], WHOLE[2][1][:-40])], r"The label map .*test_2\.png is damaged"),
        ([(NAMES[2], b"no image")], r"The label map .*test_2\.png is damaged"),
        ([(NAMES[2], label_map((37, 60)))], r"test_2\.png is 37x60 pixels, its image 60x37"),
        ([(NAMES[2], GREY.getvalue())], r"test_2\.png is no PNG in VOC's palette, but PNG of mode L"),
        ([(NAMES[2], label_map(SIZES[2], format="tiff"))], r"test_2\.png is no PNG in VOC's palette, but TIFF"),
        ([(NAMES[2], label_map(SIZES[2], palette=voc_palette()[::-1]))], r"test_2\.png is no PNG in VOC's palette"),
        ([(NAMES[2], label_map(SIZES[2], 9))], r"test_2\.png has the value 9; allowed are the class indices 0 to 8"),
        ([(NAMES[2], png(np.full((37, 60), IGNORE, np.uint8)))], r"test_2\.png has the value 255"),
    ],
)
def test_the_check_names_what_the_server_would_not_take(split, tmp_path, last, told):
    submission.check(write_archive(tmp_path / "whole.tar.gz", WHOLE[::-1]), split)
    with pytest.raises(UserError, match=told):
        submission.check(write_archive(tmp_path / ARCHIVE, WHOLE[:2] + last), split)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[:-200],
        lambda content: b"x" + content[1:],
        lambda content: content[:-8] + b"checksum",
        lambda content: content[:100] + bytes(100) + content[200:],
        lambda content: gzip.compress(b"no tar" * 1000),
    ],
    ids=["cut", "no gzip", "checksum", "middle", "no tar"],
)
def test_an_archive_that_is_cut_short_or_altered_is_damaged(split, tmp_path, damaged):
    content = write_archive(tmp_path / ARCHIVE, WHOLE).read_bytes()
    (tmp_path / ARCHIVE).write_bytes(damaged(content))
    with pytest.raises(UserError, match=r"results\.tar\.gz is damaged"):
        submission.check(tmp_path / ARCHIVE, split)
