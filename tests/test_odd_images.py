"""Odd images in the chain from maps to a segmentation, and files of others and damage that it must notice."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image

from semformer import draw, pipeline
from semformer.config import load_config
from semformer.data.voc import IGNORE, open_devkit
from semformer.stages.cams import MapFiles
from semformer.stages.shards import of_one_size
from semformer.stages.walk import WalkedFiles
from semformer.store import Store
from tests.devkits import refused
from tests.pipelines import CPU, label_maps, run

CLASSES = ("disc", "square", "triangle")
OBJECT = 2
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6  # to be turned clockwise


def scene(height: int, width: int) -> np.ndarray:
    """(H, W, 3): a bright object in the upper left quarter, with a little noise."""
    image = np.where(quarter(height, width)[..., None], (220, 180, 60), (40, 60, 90))
    return (image + np.random.default_rng(0).integers(-3, 4, image.shape)).astype(np.uint8)


def quarter(height: int, width: int) -> np.ndarray:
    y, x = np.indices((height, width))
    return (2 * y < height) & (2 * x < width)


def dot(height: int, width: int) -> np.ndarray:
    return (np.indices((height, width)) == np.array([17, 30])[:, None, None]).all(axis=0)


SIZES = {
    "one_pixel": (1, 1),
    "high": (500, 3),
    "low": (3, 500),
    "no_object": (48, 48),
    "smaller_than_radius": (5, 7),
    "pixel_object": (48, 48),
    "grey": (48, 48),
    "cmyk": (48, 48),
    "sixteen_bits": (48, 48),
    "palette": (48, 48),
    "transparent": (48, 48),
    "turned": (40, 56),
}
"""Height and width of the odd images, those that are drawn first."""
SQUARES = [name for name, size in SIZES.items() if min(size) >= 40 and name not in ("no_object", "pixel_object")]
"""Those that show an object of some size."""


def save(name: str, path: Path) -> None:
    """The odd image of this name, as an image file of its kind."""
    image = Image.fromarray(scene(*SIZES[name]))
    options: dict = {"format": "jpeg", "quality": 95}
    if name in ("grey", "cmyk"):
        image = image.convert({"grey": "L", "cmyk": "CMYK"}[name])
    elif name in ("sixteen_bits", "palette", "transparent"):
        options = {"format": "png"}
        deep = np.array(image.convert("L")).astype(np.uint16) * 257
        image = {
            "sixteen_bits": Image.fromarray(deep),
            "palette": image.convert("P", palette=Image.Palette.ADAPTIVE),
            "transparent": image.convert("RGBA"),
        }[name]
    elif name == "turned":
        image, options = image.transpose(Image.Transpose.ROTATE_90), options | {"exif": TURNED}
    image.save(path, **options)


def objects(name: str) -> list[int]:
    return [] if name == "no_object" else [1, OBJECT] if name == "high" else [OBJECT]


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """A devkit whose splits train and val are the odd images."""
    folder = tmp_path_factory.mktemp("odd") / "odd" / "VOC2012"
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "val"):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(SIZES))
    for name, size in SIZES.items():
        save(name, folder / "JPEGImages" / f"{name}.jpg")
        named = "".join(f"<object><name>{CLASSES[k - 1]}</name></object>" for k in objects(name))
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{named}</annotation>")
        shown = dot(*size) if name == "pixel_object" else quarter(*size) & bool(objects(name))
        Image.fromarray(OBJECT * shown.astype(np.uint8)).save(folder / "SegmentationClass" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Path:
    """Maps of the odd images as a good network would have them, of the object classes that each image has."""
    folder = tmp_path_factory.mktemp("maps")
    for name, size in SIZES.items():
        shown = dot(*size) if name == "pixel_object" else quarter(*size)
        of_object = np.where(shown, 0.9, 0.02)
        np.save(folder / f"{name}.npy", [of_object if k == OBJECT else 0 * of_object for k in objects(name)])
        if not objects(name):
            np.save(folder / f"{name}.npy", np.zeros((0, *size)))
    return folder


def options(maps: Path, **more):
    return load_config("micro", {"cams.folder": str(maps), "data.eval_split": "train", "evaluate.pictures": 4, **more})


@pytest.fixture(scope="module")
def chain(devkit, maps, tmp_path_factory):
    """A store, and what has come of each stage in it: from the maps, all images together."""
    store = Store(tmp_path_factory.mktemp("store") / "store")
    config = options(maps)
    return store, run(config, devkit, store, until=pipeline.ends(config, "deeplab"))


@pytest.mark.parametrize("name", SIZES)
def test_an_image_has_masks_of_its_size_and_labels(chain, name):
    size = SIZES[name]
    for stage in ("affinity_labels", "pseudo_masks"):
        labels = label_maps(chain[1][stage])[name]
        assert labels.shape == size
        assert set(np.unique(labels)) <= {0, *objects(name), IGNORE}
    assert IGNORE not in label_maps(chain[1]["pseudo_masks"])[name]
    for kind in chain[1]["segmentation"].artifact.info["kinds"]:
        assert label_maps(chain[1]["segmentation"])[f"{kind}/{name}"].shape == size
    classes, full = WalkedFiles(chain[1]["walk"].artifact).full(name, size, CPU)
    assert classes.tolist() == objects(name)
    assert full.shape == (len(classes), *size)


@pytest.mark.parametrize("name", SQUARES)
def test_masks_lie_where_the_object_is_as_people_see_it(chain, name):
    found, expected = label_maps(chain[1]["pseudo_masks"])[name] == OBJECT, quarter(*SIZES[name])
    assert (found & expected).sum() > 0.8 * (found | expected).sum()


def test_without_an_object_all_is_background(chain):
    for stage in ("affinity_labels", "pseudo_masks"):
        assert not label_maps(chain[1][stage])["no_object"].any()


def test_an_object_of_a_pixel_stays_near_it(chain):
    _, full = WalkedFiles(chain[1]["walk"].artifact).full("pixel_object", (48, 48), CPU)
    y, x = np.unravel_index(int(full.argmax()), (48, 48))
    assert abs(y - 17) <= 4
    assert abs(x - 30) <= 4


def test_every_stage_has_scores_and_pictures_that_can_be_looked_at(chain):
    for stage in ("evaluate", "evaluate_masks", "evaluate_seg"):
        artifact = chain[1][stage].artifact
        assert np.isfinite(list(artifact.info["metrics"].values())).all()
        for name in ("one_pixel", "high", "low", "no_object"):
            with Image.open(artifact.file(f"pictures/{name}.png")) as picture:
                assert max(picture.size) < 2000


def test_the_networks_make_maps_of_all_of_them(devkit, tmp_path):
    made = run(load_config("micro", {"data.eval_split": "train"}), devkit, Store(tmp_path / "store"))
    found = MapFiles(made["cams"].artifact)
    assert list(found) == list(SIZES)
    for name, (H, W) in SIZES.items():
        one = found[name]
        assert one.classes.tolist() == objects(name)
        assert one.full.shape == (len(one.classes), H, W)
        assert one.strided.shape == (len(one.classes), -(-H // 4), -(-W // 4))
        assert ((one.full >= 0) & (one.full <= 1)).all()


def test_a_large_picture_is_drawn_of_every_so_many_pixels(monkeypatch):
    image, heat = np.zeros((3000, 4000, 3), np.uint8), np.zeros((3000, 4000))
    heat[:1500] = 1
    seen = []
    monkeypatch.setattr(draw, "colored_mask", lambda mask: seen.append(mask) or image[:3, :4])
    line = draw.Line("a", image, [draw.Map("map", heat, 0.5)], [draw.Labels("mask", heat.astype(np.uint8))])
    assert max(draw.draw([line]).size) < 2000
    assert seen[0].shape == (750, 1000)
    assert seen[0][:375].all()
    assert not seen[0][375:].any()


# What is wrong with files is told


@pytest.fixture
def copy(devkit, tmp_path) -> Path:
    """A devkit of this test's own, with the first images of the other."""
    folder = tmp_path / "copy" / "VOC2012"
    for path in devkit.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(devkit)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(devkit)).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "is damaged or no image"),
        (lambda path: os.truncate(path, 0), "is damaged or no image"),
        (lambda path: Image.new("F", (48, 48)).save(path, "tiff"), "has 32 bits a pixel (mode F)"),
    ],
)
def test_an_image_that_cannot_be_read_stops_the_run(copy, maps, tmp_path, damage, told):
    path = copy / "JPEGImages" / "grey.jpg"
    damage(path)
    refused(lambda: run(options(maps), copy, Store(tmp_path / "store"), until="pseudo_masks"), path, told)


def test_a_split_without_any_object_is_refused(copy):
    for path in (copy / "Annotations").iterdir():
        path.write_text("<annotation/>")
    refused(lambda: open_devkit(copy).split("train"), copy / "Annotations", "'train'", "names an object")


def savez(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, np.zeros((1, 48, 48)))


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (savez, "holds several arrays"),
        (lambda path: np.save(path, np.zeros((1, 56, 40))), "has the shape (1, 56, 40)"),
        (lambda path: np.save(path, np.zeros((48, 48))), "has the shape (48, 48)"),
        (lambda path: np.save(path, np.zeros((2, 48, 48))), "C = 1 (its classes), 3 (all objects) or 4 (and "),
        (lambda path: np.save(path, np.full((1, 48, 48), 255, np.uint8)), "not within 0..1: divide its maps"),
        (lambda path: np.save(path, np.full((1, 48, 48), -1e-3)), "not within 0..1"),
        (lambda path: np.save(path, np.full((1, 48, 48), np.nan, np.float16)), "not within 0..1"),
        (lambda path: np.save(path, np.zeros((1, 48, 48), np.complex64)), "holds complex64, no real numbers"),
        (lambda path: np.save(path, np.full((1, 48, 48), "cat")), "holds <U3, no real numbers"),
        (lambda path: np.save(path, np.array({"cam": 1}, dtype=object)), "holds no array of numbers"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "holds no array of numbers"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"{", b"(")), "holds no array of numbers"),
        (lambda path: (path.unlink(), path.mkdir()), "holds no array of numbers"),
        (lambda path: path.unlink(), "has no grey.npy, the maps of an image of split 'train'"),
    ],
)
def test_maps_of_others_that_do_not_fit_are_told(devkit, maps, tmp_path, write, told):
    folder = tmp_path / "maps"
    folder.mkdir()
    for name in SIZES:
        (folder / f"{name}.npy").write_bytes((maps / f"{name}.npy").read_bytes())
    write(folder / "grey.npy")
    refused(lambda: run(options(folder), devkit, Store(tmp_path / "store"), until="train_cams"), "grey.npy", told)


@pytest.fixture
def masks(devkit, tmp_path) -> Path:
    """Masks of others: those of the devkit."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in SIZES:
        (folder / f"{name}.png").write_bytes((devkit / "SegmentationClass" / f"{name}.png").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: Image.new("L", (40, 56)).save(path), "is 40x56 pixels, its image turned.jpg is 56x40"),
        (lambda path: Image.new("RGB", (56, 40)).save(path), "has colour mode RGB; it must hold class indices"),
        (lambda path: Image.new("I;16", (56, 40)).save(path), "has colour mode I;16; it must hold class indices"),
        (lambda path: Image.new("1", (56, 40)).save(path), "has colour mode 1; it must hold class indices"),
        (lambda path: Image.new("L", (56, 40), 4).save(path), "holds the value 4; allowed are the class indices 0 to"),
        (lambda path: os.truncate(path, path.stat().st_size - 30), "is damaged or no image"),
        (lambda path: path.unlink(), "the mask of an image of split 'train'"),
    ],
)
def test_masks_of_others_that_do_not_fit_are_told(devkit, masks, tmp_path, write, told):
    write(masks / "turned.png")
    config = load_config("micro", {"pseudo_masks.folder": str(masks)})
    refused(lambda: run(config, devkit, Store(tmp_path / "store"), until="pseudo_masks"), "turned.png", told)


def test_classes_of_others_that_the_labels_lack_stay_and_are_told(devkit, masks, tmp_path):
    Image.new("L", (48, 48), 3).save(masks / "no_object.png")
    config, told = load_config("micro", {"pseudo_masks.folder": str(masks)}), []
    made = run(config, devkit, Store(tmp_path / "store"), told.append, until="pseudo_masks")["pseudo_masks"]
    assert (label_maps(made)["no_object"] == 3).all()
    assert told[-1].note == "masks have classes that labels lack, such as triangle in no_object"


@pytest.mark.parametrize("supervised", [False, True])
def test_nothing_is_learnt_from_masks_without_a_label(copy, masks, tmp_path, supervised):
    for name, (H, W) in SIZES.items():
        for folder in (masks, copy / "SegmentationClass"):
            Image.new("L", (W, H), IGNORE).save(folder / f"{name}.png")
    chosen = {"deeplab.supervised": True} if supervised else {"pseudo_masks.folder": str(masks)}
    told = "deeplab: every pixel of the masks of split 'train' is ignored (255)"
    refused(lambda: run(load_config("micro", chosen), copy, Store(tmp_path / "store"), until="deeplab"), told)


TOO_SMALL = {"pseudo_masks.crf.bilateral_sxy": 1e-6, "pseudo_masks.crf.bilateral_srgb": 1e-6}
"""Standard deviations with which no mask can be made of an image of several colours."""


def test_images_that_fail_are_skipped_only_when_asked(chain, devkit, maps, tmp_path):
    refused(
        lambda: run(options(maps, **TOO_SMALL), devkit, chain[0], until="pseudo_masks"),
        *("no pseudo mask can be made of high", "standard deviations are too small", "pseudo_masks.skip_failing=true"),
    )
    config = options(maps, **TOO_SMALL, **{"pseudo_masks.skip_failing": True})
    made = run(config, devkit, chain[0], until=["deeplab", "evaluate_masks"])
    assert made["walk"].found
    assert made["pseudo_masks"].artifact.info["failed"] == [n for n in SIZES if n not in ("one_pixel", "no_object")]
    assert np.isfinite(made["deeplab"].artifact.info["history"]["total"]).all()


def test_a_split_of_which_all_images_fail_is_refused(copy, maps, tmp_path):
    for split in ("train", "val"):
        (copy / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("grey\nturned\n")
    config = options(maps, **TOO_SMALL, **{"pseudo_masks.skip_failing": True})
    told = ("no mask can be made of any image of split 'train'", "pseudo_masks.skip_failing=false")
    refused(lambda: run(config, copy, Store(tmp_path / "store"), until="pseudo_masks"), *told)


def test_what_was_cut_short_is_made_again(chain, devkit, maps, tmp_path):
    """Of every stage: zips, safetensors files, scores."""
    store, config = Store(shutil.copytree(chain[0].root, tmp_path / "store")), options(maps)
    for stage_run in chain[1].values():
        for name in stage_run.artifact.files:
            path = store.root / stage_run.stage / stage_run.key / name
            os.truncate(path, path.stat().st_size // 2)
    for name, stage_run in run(config, devkit, store, until=pipeline.ends(config, "deeplab")).items():
        assert not stage_run.found
        assert stage_run.artifact.files == chain[1][name].artifact.files


def test_fewer_large_images_go_together():
    data = SimpleNamespace(sizes=np.array([(3000, 4000)] * 2 + [(1024, 800)] * 5 + [(500, 375)] * 9))
    assert list(of_one_size(data, range(16))) == [[0], [1], [2, 3, 4, 5], [*range(7, 15)], [6], [15]]
