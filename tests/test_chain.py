"""From maps to a segmentation, in preset micro: what each stage makes of what, and how files take a stage's place."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semformer import draw, pipeline
from semformer.cli import _keep, main
from semformer.config import load_config
from semformer.crf import DenseCrf
from semformer.data.augment import segmentor_crops
from semformer.data.label_maps import write_label_maps
from semformer.data.loading import Batch, Loader
from semformer.data.pixels import as_batch, normalized, resize
from semformer.data.voc import IGNORE, open_devkit, voc_palette
from semformer.errors import MachineError, UserError
from semformer.inference import Maps
from semformer.keys import StageKey
from semformer.metrics import ThresholdCurve, confusion, label_map_metrics, scores
from semformer.random_walk import along_edges, line, neighbours
from semformer.stages import affinity, deeplab, evaluate_masks, pseudo_masks, segmentation, shards
from semformer.stages import walk as walk_stage
from semformer.stages.affinity_labels import confident
from semformer.stages.cams import MapFiles, foreign_maps
from semformer.stages.context import Context
from semformer.stages.evaluate import CLASS_IOU
from semformer.stages.pack import packed
from semformer.stages.walk import WalkedFiles, see, walk
from semformer.store import Artifact, Store
from tests.pipelines import CPU, damage, label_maps, run, weights

ALL = [stage.name for stage in pipeline.STAGES]
CHAIN = ALL[4:]


@pytest.fixture(scope="module")
def chain(shapes, tmp_path_factory):
    """A store in which the whole micro pipeline has run once, and what happened to each stage."""
    store = Store(tmp_path_factory.mktemp("chain") / "store")
    return store, run(load_config("micro"), shapes, store, until=ALL)


@pytest.fixture(scope="module")
def split(shapes):
    return pipeline.open_data(load_config("micro"), shapes)["train"]


def test_every_stage_is_made_once_then_found(chain, shapes):
    store, first = chain
    assert list(first) == ALL
    assert not any(stage_run.found for stage_run in first.values())
    again = run(load_config("micro"), shapes, store, until=ALL)
    assert all(stage_run.found for stage_run in again.values())
    assert {name: stage_run.key for name, stage_run in again.items()} == {n: r.key for n, r in first.items()}


def test_the_same_stages_have_the_same_digits_in_another_store(chain, shapes, tmp_path):
    again = run(load_config("micro"), shapes, Store(tmp_path / "store"), until=ALL)
    for name in CHAIN:
        ours, theirs = (runs[name].artifact.files for runs in (chain[1], again))
        assert {file: told["sha256"] for file, told in ours.items()} == {
            f: told["sha256"] for f, told in theirs.items()
        }


@pytest.mark.parametrize(
    ("goal", "last"),
    [("cams", ["evaluate"]), ("pseudo_masks", ["evaluate", "evaluate_masks"]), ("deeplab", ALL[-1:])],
)
def test_a_goal_ends_with_its_scores(goal, last):
    config = load_config("micro")
    stages = [stage.name for stage in pipeline.needed_stages(config, pipeline.ends(config, goal))]
    assert set(stages) >= set(last)
    assert stages[-1] == last[-1]
    assert [stage for stage in stages if stage in ("affinity", "deeplab")] == (
        {"cams": [], "pseudo_masks": ["affinity"], "deeplab": ["affinity", "deeplab"]}[goal]
    )


def test_the_command_tells_the_scores_of_each_link(chain, shapes, capsys):
    store, made = chain
    command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(store.root), "--json"]
    assert main([*command, "--until", "deeplab"]) == 0
    told = capsys.readouterr()
    metrics = json.loads(told.out)["metrics"]
    for name in ("cam/val", "cam/train", "walk/train", "pseudo/train", "seg/val"):
        assert 0 <= metrics[f"{name}/miou"] <= 100
    for name in ("evaluate", "evaluate_masks", "evaluate_seg"):
        assert made[name].artifact.info["metrics"].items() <= metrics.items()
    links = [metrics[f"{name}/miou"] for name in ("cam/train", "walk/train", "pseudo/train", "seg/val")]
    parts = zip(("maps", "random walk", "pseudo masks", "segmentation"), links, strict=True)
    assert "mIoU: " + " -> ".join(f"{part} {value:.1f}" for part, value in parts) in told.err
    assert main(command) == 0
    assert not [name for name in json.loads(capsys.readouterr().out)["metrics"] if not name.startswith("cam/val/")]


def test_labels_of_affinities_are_those_of_the_maps_and_the_crf(chain, split):
    maps, found = MapFiles(chain[1]["train_cams"].artifact), label_maps(chain[1]["affinity_labels"])
    assert list(found) == list(split.ids)
    options = load_config("micro").affinity_labels
    for i, image_id in enumerate(split.ids):
        of_image, image = maps[image_id], torch.from_numpy(split.pixels(i)).permute(2, 0, 1)
        refined = []
        for threshold in (options.foreground_threshold, options.background_threshold):
            labels = np.concatenate([np.full((1, *of_image.full.shape[1:]), threshold), of_image.full]).argmax(axis=0)
            field = DenseCrf(image, options.crf)
            refined.append(field.refine_labels(torch.from_numpy(labels), 1 + len(of_image.classes)).numpy())
        index = np.array([0, *of_image.classes])
        expected = index[refined[0]]
        expected[(refined[0] == 0) & (refined[1] > 0)] = IGNORE
        np.testing.assert_array_equal(found[image_id], expected)

    shown = np.concatenate([found[image_id].ravel() for image_id in split.ids])
    shares = {
        "object": (shown % IGNORE > 0).mean(),
        "background": (shown == 0).mean(),
        "ignored": (shown == IGNORE).mean(),
    }
    assert chain[1]["affinity_labels"].artifact.info["shares"] == pytest.approx(shares)
    assert all(shares.values())


def test_where_the_thresholds_disagree_a_pixel_is_ignored(split):
    options = load_config(
        "micro",
        {
            "affinity_labels.foreground_threshold": 0.6,
            "affinity_labels.background_threshold": 0.2,
            "affinity_labels.crf.iterations": 0,
        },
    ).affinity_labels
    image = split.pixels(0)
    full = torch.zeros(2, *image.shape[:2])
    full[0, :10], full[1, 20:30], full[0, 40:] = 0.9, 0.7, 0.4
    found = confident(Maps(np.array([3, 5]), full, full), image, options, CPU)
    assert (found[:10] == 3).all()
    assert (found[10:20] == 0).all()
    assert (found[20:30] == 5).all()
    assert (found[40:] == IGNORE).all()


def test_a_walk_starts_from_the_maps_and_ends_with_one_maximum(chain, split):
    config = load_config("micro")
    walked, maps = WalkedFiles(chain[1]["walk"].artifact), MapFiles(chain[1]["train_cams"].artifact)
    for i, image_id in enumerate(split.ids):
        size = split.pixels(i).shape[:2]
        classes, full = walked.full(image_id, size, CPU)
        np.testing.assert_array_equal(classes, split.objects(i))
        assert full.shape == (len(classes), *size)
        assert full.max().item() == pytest.approx(1)
        assert full.min() >= 0
    still = config.model_copy(update={"walk": config.walk.model_copy(update={"log2_steps": 0, "beta": 1e6})})
    model = affinity.load(config.affinity, chain[1]["affinity"].artifact, device=CPU)
    image, of_image = split.pixels(0), maps[split.ids[0]]
    (found,) = walk(model, [image], [of_image], still)
    torch.testing.assert_close(found, of_image.strided * (1 - see(model, [image], still)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("variant", "stride", "padded"), [("edge", 4, (48, 64)), ("feature", 8, (48, 56))])
def test_edges_and_features_are_the_mean_of_an_image_and_its_mirror_padded_with_zeros(variant, stride, padded):
    """Of an image that is lower than the network's crops, and wider; zeros are those of normalised images."""
    options = {"affinity.variant": variant, "affinity.backbone": "resnet18"}
    config = load_config("micro", options)
    torch.manual_seed(0)
    model = affinity.build(config.affinity).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8)
    found = []
    for view in (pixels, pixels[:, ::-1]):
        image = torch.zeros(1, 3, *padded)
        normal = (view / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        image[0, :, :41, :53] = torch.from_numpy(normal.transpose(2, 0, 1))
        with torch.inference_mode():
            found.append(model(image)[0, ..., : -(-41 // stride), : -(-53 // stride)])
    mean = (found[0] + found[1].flip(-1)) / 2
    expected = 1 / (1 + (-mean).exp()) if variant == "edge" else mean
    together = see(model, [pixels, 255 - pixels], config)
    torch.testing.assert_close(together[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:], see(model, [255 - pixels], config), atol=1e-5, rtol=1e-4)


def test_a_walk_has_the_radius_the_power_and_the_steps_of_its_options(chain, split):
    options = {"walk.radius": 3, "walk.beta": 2.5, "walk.log2_steps": 3}
    config = load_config("micro", options)
    model = affinity.load(config.affinity, chain[1]["affinity"].artifact, device=CPU)
    image, maps = split.pixels(0), MapFiles(chain[1]["train_cams"].artifact)[split.ids[0]]
    (found,) = walk(model, [image], [maps], config)
    expected = along_edges(maps.strided[None], see(model, [image], config), radius=3, beta=2.5, steps=8)
    torch.testing.assert_close(found, expected[0])


def enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., h, w) -> (..., H, W), bilinearly: each pixel has its centre in its middle, edges go on outwards."""
    for axis, n in zip((-2, -1), size, strict=True):
        length = maps.shape[axis]
        places = (np.arange(n) + 0.5) * length / n - 0.5
        maps = np.apply_along_axis(partial(np.interp, places, range(length)), axis, maps)
    return maps


def test_walked_maps_are_enlarged_cut_and_divided_by_one_maximum(tmp_path):
    """The maximum of all classes, of what has been cut."""
    walked = 0.02 * np.random.default_rng(0).random((2, 3, 5)).astype(np.float32)
    walked[1] /= 2
    walked[1, :, 4] = 1
    shards.write_tensors(
        tmp_path / "0", {"a/classes": torch.tensor([3, 7]), "a/walked": torch.from_numpy(walked)}, ["a"]
    )
    artifact = Artifact(StageKey("walk", {}), tmp_path, {"stride": 4}, {"0": {}})
    classes, found = WalkedFiles(artifact).full("a", (10, 15), CPU)
    assert classes.tolist() == [3, 7]
    expected = enlarged(walked, (12, 20))[:, :10, :15]
    np.testing.assert_allclose(found.numpy(), expected / expected.max(), rtol=2e-6)
    assert found[0].max() < 0.5


def test_features_walk_at_their_own_stride(chain, shapes, split):
    options = {"affinity.variant": "feature", "affinity.backbone": "resnet18", "affinity.radius": 3}
    config = load_config("micro", options)
    walked = WalkedFiles(run(config, shapes, chain[0], until="walk")["walk"].artifact)
    _, full = walked.full(split.ids[0], (48, 48), CPU)
    assert full.shape[1:] == (48, 48)
    assert full.max().item() == pytest.approx(1)


def test_pseudo_masks_are_pngs_in_vocs_palette(chain, split, tmp_path):
    (name,) = chain[1]["pseudo_masks"].artifact.files
    with zipfile.ZipFile(chain[1]["pseudo_masks"].artifact.file(name)) as file:
        file.extractall(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(split.ids)
    for i, image_id in enumerate(split.ids):
        with Image.open(tmp_path / f"{image_id}.png") as image:
            assert image.mode == "P"
            assert image.getpalette() == voc_palette()
            labels = np.array(image)
        assert labels.shape == split.pixels(i).shape[:2]
        assert set(np.unique(labels)) <= {0, *split.objects(i)}


def test_pseudo_masks_are_those_of_the_walked_maps_and_the_crf(chain, shapes, split):
    """With a threshold and a CRF of their own; so are the scores of what they were before it."""
    options = {"threshold": 0.4, "crf.iterations": 2, "crf.bilateral_sxy": 4.0, "crf.gaussian_compat": 1.0}
    config = load_config("micro", {f"pseudo_masks.{name}": value for name, value in options.items()})
    runs = run(config, shapes, chain[0], until="evaluate_masks")
    walked, found = WalkedFiles(runs["walk"].artifact), label_maps(runs["pseudo_masks"])
    K = len(split.classes)
    counts = {"before": np.zeros((K, K), dtype=np.int64), "after": np.zeros((K, K), dtype=np.int64)}
    for i, image_id in enumerate(split.ids):
        image = torch.from_numpy(split.pixels(i)).permute(2, 0, 1)
        classes, full = walked.full(image_id, image.shape[1:], CPU)
        hard = torch.where(full.amax(dim=0) > 0.4, 1 + full.argmax(dim=0), 0)
        index = np.array([0, *classes], dtype=np.uint8)
        expected = index[DenseCrf(image, config.pseudo_masks.crf).refine_labels(hard, len(index)).numpy()]
        np.testing.assert_array_equal(found[image_id], expected)
        counts["before"] += confusion(split.mask(i), index[hard.numpy()], K)
        counts["after"] += confusion(split.mask(i), expected, K)
    told = runs["evaluate_masks"].artifact.info["metrics"]
    before, after = (label_map_metrics(one)["miou"] for one in counts.values())
    assert before != after
    assert (told["pseudo/train/miou_before_crf"], told["pseudo/train/miou"]) == (before, after)


def test_maps_have_the_same_scores_where_they_are_evaluated_as_links(chain, shapes, split):
    """The maps of a split by themselves, and beside its pseudo masks; the walk's by the same rules."""
    options = {"erosion": 3, "thresholds": "0.1,0.9,0.1", "rule": "fixed", "fixed_threshold": 0.35}
    overrides = {f"evaluate.{name}": value for name, value in options.items()}
    config = load_config("micro", {"data.eval_split": "train", **overrides})
    runs = run(config, shapes, chain[0], until=["evaluate", "evaluate_masks"])
    of_maps, of_links = (runs[name].artifact.info["metrics"] for name in ("evaluate", "evaluate_masks"))
    shared = {name: value for name, value in of_maps.items() if "cosine" not in name}
    assert shared == {name: value for name, value in of_links.items() if name.startswith("cam/")}
    curve = ThresholdCurve(len(split.classes), [0.35], erosion=3)
    walked = WalkedFiles(runs["walk"].artifact)
    for i, image_id in enumerate(split.ids):
        classes, full = walked.full(image_id, split.mask(i).shape, CPU)
        curve.add(full.numpy(), classes, split.mask(i))
    assert of_links["walk/train/miou"] == curve.scores().miou[0] != of_links["cam/train/miou"]


def class_iou(stage_run) -> list[float]:
    return pq.read_table(stage_run.artifact.file(CLASS_IOU))["iou"].to_pylist()


def picture(stage_run, image_id: str) -> np.ndarray:
    with Image.open(stage_run.artifact.file(f"pictures/{image_id}.png")) as image:
        return np.array(image)


def test_pictures_show_each_link_of_each_class(chain, split, shapes):
    config = load_config("micro", {"evaluate.pictures": 3})
    made = run(config, shapes, chain[0], until=["evaluate_masks", "evaluate_seg"])
    for name in ("evaluate_masks", "evaluate_seg"):
        assert len([one for one in made[name].artifact.files if one.startswith("pictures/")]) == 3
    i = next(i for i in range(3) if len(split.objects(i)) > 1)
    image, image_id = split.pixels(i), split.ids[i]
    links = {"Map": MapFiles(made["train_cams"].artifact)[image_id].full}
    links["Random walk"] = WalkedFiles(made["walk"].artifact).full(image_id, image.shape[:2], CPU)[1]
    masks = {"Pseudo mask": label_maps(made["pseudo_masks"])[image_id], "Ground Truth": split.mask(i)}
    labels = [draw.Labels(*one) for one in masks.items()]
    lines = [
        draw.Line(
            split.classes[k], image, [draw.Map(of, maps[row].numpy(), 0.25) for of, maps in links.items()], labels
        )
        for row, k in enumerate(split.objects(i))
    ]
    np.testing.assert_array_equal(picture(made["evaluate_masks"], image_id), np.array(draw.draw(lines)))

    val = pipeline.open_data(load_config("micro"), shapes)["val"]
    found = label_maps(made["segmentation"])[f"multi_crf/{val.ids[0]}"]
    labels = [draw.Labels("Segmentation", found), draw.Labels("Ground Truth", val.mask(0))]
    expected = draw.draw([draw.Line("", val.pixels(0), [], labels)])
    np.testing.assert_array_equal(picture(made["evaluate_seg"], val.ids[0]), np.array(expected))


def test_scores_are_those_of_the_label_maps(chain, split, shapes):
    K = len(split.classes)
    masks, counts = label_maps(chain[1]["pseudo_masks"]), np.zeros((K, K), dtype=np.int64)
    for i, image_id in enumerate(split.ids):
        counts += confusion(split.mask(i), masks[image_id], K)
    told = chain[1]["evaluate_masks"].artifact.info["metrics"]
    assert {f"pseudo/train/{name}": value for name, value in label_map_metrics(counts).items()}.items() <= told.items()
    assert class_iou(chain[1]["evaluate_masks"]) == pytest.approx(scores(counts).iou.tolist())

    val = pipeline.open_data(load_config("micro"), shapes)["val"]
    found, told = label_maps(chain[1]["segmentation"]), chain[1]["evaluate_seg"].artifact.info["metrics"]
    for kind, ending in (("single", "_single"), ("single_crf", "_single_crf"), ("multi", ""), ("multi_crf", "_crf")):
        counts = sum(confusion(val.mask(i), found[f"{kind}/{val.ids[i]}"], K) for i in range(len(val)))
        assert {f"seg/val/{n}{ending}": v for n, v in label_map_metrics(counts).items()}.items() <= told.items()
    assert class_iou(chain[1]["evaluate_seg"]) == pytest.approx(scores(counts).iou.tolist()), "of what has all"


@pytest.mark.parametrize(("stage", "n_scores"), [("evaluate", 1), ("evaluate_masks", 4), ("evaluate_seg", 4)])
def test_pixels_of_images_add_up_to_the_scores(chain, split, stage, n_scores):
    told = chain[1][stage].artifact
    counts = pd.read_parquet(told.file("image_counts.parquet")).groupby(["score", "class"]).sum(numeric_only=True)
    assert counts.index.unique("score").size == n_scores
    for score, of_score in counts.groupby("score"):
        iou = 100 * of_score["intersection"] / of_score.eval("predicted + true - intersection")
        assert iou.sum() / len(split.classes) == pytest.approx(told.info["metrics"][score])


def test_an_image_without_an_object_is_drawn(chain, split, tmp_path):
    store, made = chain
    data = packed(split, ["images", "masks"], store)
    empty = replace(data, labels=np.eye(1, len(data.classes)).repeat(len(data), axis=0).astype(np.float32))
    ctx = Context(CPU, lambda told: None, tmp_path, tmp_path)
    inputs = [made[name].artifact for name in ("train_cams", "walk", "pseudo_masks")]
    assert evaluate_masks.run(load_config("micro"), empty, *inputs, ctx) == {
        "metrics": made["evaluate_masks"].artifact.info["metrics"]
    }
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_runs_that_end_with_the_same_stage_keep_all_that_each_has_made(chain, shapes, tmp_path):
    store = Store(tmp_path / "store")
    data = pipeline.open_data(load_config("micro"), shapes)
    wanted = set()
    for split in ("val", "train"):
        keys = list(pipeline.stage_keys(load_config("micro", {"data.eval_split": split}), data, ALL).values())
        _keep(store, "run", keys, {})
        wanted |= {key.digest for key in keys}
    ((_, root),) = store.roots.all().items()
    assert root.digests == wanted


def test_a_segmentation_takes_the_highest_softmax_of_all_views(chain, split):
    config = load_config("micro", {"segmentation.scales": "0.5,1,1.5", "segmentation.flip": "true"})
    model = deeplab.load(config.deeplab, chain[1]["deeplab"].artifact, device=CPU)
    pixels = torch.from_numpy(split.pixels(0))

    def alone(scale: float, image=pixels) -> torch.Tensor:
        view = config.segmentation.model_copy(update={"scales": (scale,), "flip": False})
        return segmentation.probabilities(model, image, view, "float32")

    both = [alone(s) for s in (0.5, 1, 1.5)] + [alone(s, pixels.flip(1)).flip(-1) for s in (0.5, 1, 1.5)]
    found = segmentation.probabilities(model, pixels, config.segmentation, "float32")
    torch.testing.assert_close(found, torch.stack(both).amax(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone(1).sum(dim=0), torch.ones(pixels.shape[:2]))


def test_a_view_is_resized_and_its_logits_are_enlarged_before_the_softmax(chain, split):
    config = load_config("micro", {"segmentation.scales": "0.5"})
    model = deeplab.load(config.deeplab, chain[1]["deeplab"].artifact, device=CPU)
    pixels = torch.from_numpy(split.pixels(0)[:44, :37])
    small = normalized(resize(as_batch(pixels), (24, 24), "bilinear"))
    with torch.inference_mode():
        likely = np.exp(enlarged(model(small)[0].double().numpy(), (44, 37)))
    found = segmentation.probabilities(model, pixels, config.segmentation, "float32")
    np.testing.assert_allclose(found.numpy(), likely / likely.sum(axis=0), rtol=1e-4)


def test_label_maps_are_the_likeliest_classes_before_and_after_the_crf(chain, split):
    options = {"flip": True, "crf.iterations": 3, "crf.bilateral_sxy": 4.0, "crf.bilateral_srgb": 30.0}
    config = load_config("micro", {f"segmentation.{name}": value for name, value in options.items()})
    model = deeplab.load(config.deeplab, chain[1]["deeplab"].artifact, device=CPU)
    pixels = torch.from_numpy(split.pixels(2))
    found = segmentation.segment(model, split.pixels(2), config.segmentation, "float32")
    field = DenseCrf(pixels.permute(2, 0, 1), config.segmentation.crf)
    expected = {}
    for kind, scales in (("single", (1.0,)), ("multi", (0.5, 1.0))):
        views = config.segmentation.model_copy(update={"scales": scales})
        likely = segmentation.probabilities(model, pixels, views, "float32")
        expected |= {kind: likely.argmax(dim=0), f"{kind}_crf": field.refine(likely).argmax(dim=0)}
    assert found.keys() == expected.keys()
    for kind, labels in expected.items():
        np.testing.assert_array_equal(found[kind], labels.numpy())
    assert len({labels.tobytes() for labels in found.values()}) == 4


def test_networks_are_loaded_as_they_are_used_and_compute_as_exactly_as_the_config_says(chain, split):
    config = load_config("micro")
    options, pixels = config.segmentation, split.pixels(0)
    edges, segments = (
        module.load(getattr(config, stage), chain[1][stage].artifact, device=CPU)
        for stage, module in (("affinity", affinity), ("deeplab", deeplab))
    )
    for model in (edges, segments):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    rough, exact = (
        (
            see(edges, [pixels], config.model_copy(update={"precision": precision})),
            segmentation.probabilities(segments, torch.from_numpy(pixels), options, precision),
        )
        for precision in ("bfloat16", "float32")
    )
    for one, other in zip(rough, exact, strict=True):
        assert 0 < (one - other).abs().max() < 0.1


def test_without_a_crf_there_are_no_scores_with_it(chain, shapes):
    runs = run(load_config("micro", {"segmentation.crf.iterations": 0}), shapes, chain[0], until="evaluate_seg")
    assert runs["deeplab"].found
    assert not [name for name in runs["evaluate_seg"].artifact.info["metrics"] if "crf" in name]


@pytest.mark.parametrize("stage", ["affinity", "deeplab"])
def test_a_network_learns(shapes, tmp_path, stage):
    config = load_config("micro", {f"{stage}.epochs": 12, "data.shapes.train": 16})
    history = run(config, shapes, Store(tmp_path / "store"), until=stage)[stage].artifact.info["history"]["total"]
    assert history[-1] < history[0] - {"affinity": 0.03, "deeplab": 0.3}[stage], history


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("stage", ["affinity", "deeplab"])
def test_a_training_is_given_the_seed_the_label_maps_and_what_is_pretrained(
    chain, split, tmp_path, monkeypatch, stage, pretrained
):
    module, before, side = {
        "affinity": (affinity, "affinity_labels", 12),
        "deeplab": (deeplab, "pseudo_masks", 48),
    }[stage]
    config = load_config("micro", {"seed": 3, "precision": "bfloat16", f"{stage}.backbone": "test_resnet"})
    more = {} if stage == "affinity" else {"n_classes": 9}
    if pretrained:
        features = module.build(getattr(config, stage), **more).features
        torch.save(features.backbone.state_dict(), tmp_path / "weights.pth")
        with_weights = getattr(config, stage).model_copy(update={"weights": str(tmp_path / "weights.pth")})
        config = config.model_copy(update={stage: with_weights})
    labels, given, read = label_maps(chain[1][before]), {}, []

    def train(model, **options):
        assert read == [getattr(config, stage)]
        given.update(options, model=model)
        return {}

    monkeypatch.setattr(module, "train", train)
    ctx = Context(CPU, lambda told: None, tmp_path, tmp_path, have_read=read.append)
    module.run(config, packed(split, ["images"], chain[0]), chain[1][before].artifact, ctx)
    assert {name: given[name] for name in ("stage", "config", "seed", "precision")} == {
        "stage": stage,
        "config": getattr(config, stage),
        "seed": 3,
        "precision": "bfloat16",
    }
    assert given["pretrained"] is (given["model"].features if pretrained else None)
    assert (given["loader"].seed, given["loader"].label_side) == (3, side)
    for i, image_id in enumerate(split.ids):
        np.testing.assert_array_equal(given["loader"].label_map(i), labels[image_id])
    torch.manual_seed(3)
    fresh = module.build(getattr(config, stage), **more).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in given["model"].state_dict().items())


def batch_of(labels: np.ndarray) -> Batch:
    """A batch of which the label maps (B, h, w) are all that matters."""
    B = len(labels)
    return Batch(torch.zeros(B, 3, 1, 1), torch.zeros(B, 4), torch.zeros(B, 9), torch.from_numpy(labels))


def test_the_loss_of_affinities_is_that_of_brute_force():
    rng, options = np.random.default_rng(0), load_config("micro", {"affinity.radius": 3}).affinity
    logits = torch.from_numpy(rng.normal(size=(2, 6, 8))).requires_grad_()
    labels = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (2, 6, 8), p=(0.5, 0.2, 0.1, 0.2))
    found = affinity.gradients(lambda images: logits, batch_of(labels), options)["total"]
    edges = 1 / (1 + np.exp(-logits.detach().numpy()))
    terms: dict[str, list[float]] = {"background": [], "objects": [], "different": []}
    for b, y, x in itertools.product(range(2), range(4), range(2, 6)):
        for dy, dx in neighbours(3):
            a, c = labels[b, y, x], labels[b, y + dy, x + dx]
            like = 1 - max(edges[b, y + i, x + j] for i, j in line(dy, dx))
            if IGNORE not in (a, c):
                kind = "different" if a != c else "objects" if a else "background"
                terms[kind].append(-np.log(1.00001 - like) if a != c else -np.log(like + 0.00001))
    background, objects, different = (sum(kind) / (len(kind) + 0.00001) for kind in terms.values())
    assert found.item() == pytest.approx(((background + objects) / 2 + different) / 2, rel=1e-5)
    assert logits.grad is not None


def test_the_loss_of_a_segmentation_is_the_mean_over_labelled_pixels():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 4, 3, 5))).requires_grad_()
    labels = rng.choice(np.array([0, 1, 2, 3, IGNORE], np.uint8), (2, 12, 17))
    found = deeplab.gradients(lambda images: logits, batch_of(labels))["total"]
    likely = np.exp(enlarged(logits.detach().numpy(), (12, 17)))
    likely = (likely / likely.sum(axis=1, keepdims=True)).transpose(0, 2, 3, 1)
    of_labels = [of[k] for of, k in zip(likely.reshape(-1, 4), labels.ravel(), strict=True) if k != IGNORE]
    assert found.item() == pytest.approx(-np.log(of_labels).mean(), rel=1e-5)
    assert logits.grad is not None


@pytest.mark.parametrize("stage", ["affinity", "deeplab"])
def test_pieces_of_a_batch_have_its_gradients(chain, shapes, split, stage):
    config = load_config("micro")
    module, options = {"affinity": (affinity, config.affinity), "deeplab": (deeplab, config.deeplab)}[stage]
    model = module.load(options, chain[1][stage].artifact, device=CPU).requires_grad_(True).eval()
    labels = label_maps(chain[1]["pseudo_masks"])
    side = options.image_size // (4 if stage == "affinity" else 1)
    data = packed(split, ["images"], chain[0])
    loader = Loader(
        data, segmentor_crops, options, seed=0, device=CPU, label_map=lambda i: labels[data.ids[i]], label_side=side
    )
    batch = next(iter(loader.epoch(0)))
    found = []
    for pieces in (1, 2, 8):
        model.zero_grad()
        arguments = (batch, options, pieces) if stage == "affinity" else (batch, pieces)
        total = module.gradients(model, *arguments)["total"]
        found.append([total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_a_frozen_backbone_stays_as_it_is(chain, shapes, tmp_path):
    config = load_config("micro", {"affinity.frozen": "true"})
    trained = weights(run(config, shapes, chain[0], until="affinity")["affinity"])
    torch.manual_seed(config.seed)
    fresh = affinity.build(config.affinity).state_dict()
    for name, value in trained.items():
        assert torch.equal(value, fresh[name]) is name.startswith("features."), name


def test_statistics_of_a_backbone_are_frozen_or_learnt(shapes, chain):
    changed = {}
    for frozen in (True, False):
        options = {"deeplab.backbone": "test_resnet", "deeplab.frozen_statistics": frozen}
        config = load_config("micro", options)
        trained = weights(run(config, shapes, chain[0], until="deeplab")["deeplab"])
        torch.manual_seed(config.seed)
        fresh = deeplab.build(config.deeplab, n_classes=9).state_dict()
        assert not torch.equal(
            trained["features.backbone.layer1.0.conv1.weight"], fresh["features.backbone.layer1.0.conv1.weight"]
        )
        changed[frozen] = not torch.equal(
            trained["features.backbone.layer1.0.bn1.running_mean"], fresh["features.backbone.layer1.0.bn1.running_mean"]
        )
    assert changed == {True: False, False: True}


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


def test_a_folder_that_is_none_is_told(shapes):
    config = load_config("micro", {"pseudo_masks.folder": "nowhere"})
    with pytest.raises(UserError, match="cannot read nowhere: No such file"):
        pipeline.stage_keys(config, pipeline.open_data(config, shapes), ["pseudo_masks"])


# Faults


@pytest.mark.parametrize("stage", ["affinity_labels", "walk", "pseudo_masks", "segmentation", "deeplab"])
def test_a_damaged_input_is_made_again(chain, shapes, tmp_path, stage):
    store = Store(shutil.copytree(chain[0].root, tmp_path / "store"))
    (name, *_) = chain[1][stage].artifact.files
    damage(store, chain[1][stage], name)
    after = ALL[ALL.index(stage) + 1 :]
    for later in after:
        shutil.rmtree(store.root / later, ignore_errors=True)
    again = run(load_config("micro"), shapes, store, until=ALL)
    assert not again[stage].found
    assert again["evaluate_seg"].artifact.info["metrics"] == chain[1]["evaluate_seg"].artifact.info["metrics"]


def test_thresholds_that_leave_no_object_are_told(chain, shapes):
    options = {"affinity_labels.foreground_threshold": 1.0, "affinity_labels.crf.iterations": 0}
    with pytest.raises(UserError, match=r"no pixel is confident object .*lower foreground_threshold"):
        run(load_config("micro", options), shapes, chain[0], until="affinity_labels")


def test_thresholds_that_leave_no_background_are_told(chain, split, shapes, tmp_path):
    for i, image_id in enumerate(split.ids):
        np.save(tmp_path / f"{image_id}.npy", np.full((len(split.objects(i)), 48, 48), 0.9))
    options = {"cams.folder": str(tmp_path), "affinity_labels.crf.iterations": 0}
    with pytest.raises(UserError, match=r"no pixel is confident background .*raise background_threshold"):
        run(load_config("micro", options), shapes, chain[0], until="affinity_labels")


def test_a_mask_that_does_not_fit_into_memory_is_not_skipped(chain, shapes, monkeypatch):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pseudo_masks, "refiner", exhausted)
    config = load_config("micro", {"pseudo_masks.skip_failing": True})
    with pytest.raises(MachineError, match="pseudo_masks: out of memory"):
        run(config, shapes, chain[0], until="pseudo_masks")


@pytest.mark.parametrize("stage", ["train_cams", "affinity_labels", "walk", "pseudo_masks", "segmentation"])
def test_a_killed_stage_goes_on_at_the_next_file(chain, shapes, tmp_path, monkeypatch, stage):
    """Killed -9 in the third file of two images; what there is then is not made again."""
    store = shutil.copytree(chain[0].root, tmp_path / "store")
    for later in ALL[ALL.index(stage) :]:
        shutil.rmtree(store / later, ignore_errors=True)
    code = f"""
import os, signal, sys
from semformer import pipeline
from semformer.config import load_config
from semformer.stages import shards
from semformer.store import Store
from tests.pipelines import run
shards.SHARD = 2

def kill(report):
    if report.stage == {stage!r} and report.done > 4:
        os.kill(os.getpid(), signal.SIGKILL)

run(load_config("micro"), {str(shapes)!r}, Store({str(store)!r}), kill, until={stage!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (store / "checkpoints" / stage / chain[1][stage].key).iterdir()}
    assert len([name for name in left if "0000" in name]) == 2
    monkeypatch.setattr("semformer.stages.shards.SHARD", 2)
    told = []
    made = run(load_config("micro"), shapes, Store(store), told.append, until=stage)[stage]
    assert min(report.done for report in told if report.stage == stage) > 4
    assert len([name for name in made.artifact.files if "0000" in name]) >= 3
    if stage not in ("train_cams", "walk"):
        ours, theirs = label_maps(made), label_maps(chain[1][stage])
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    else:
        whole, parts = weights(chain[1][stage]), weights(made)
        assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_files_that_are_there_count_whichever_they_are(chain, split, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4)
    data, told = packed(split, ["images"], chain[0]), []
    out, there = (tmp_path / name for name in ("out", "checkpoints"))
    out.mkdir()
    there.mkdir()
    write_label_maps(there / "00001.zip", ((name, np.zeros((2, 2), np.uint8)) for name in data.ids[4:8]))
    calls = []
    ctx = Context(CPU, told.append, out, there, lambda: calls.append("check"), lambda: calls.append("saved"))
    made = shards.make_label_maps("any", data, ctx, lambda i: {data.ids[i]: np.ones((2, 2), np.uint8)})
    assert [report.done for report in told] == [1, 2, 3, 4, *range(9, len(data) + 1)]
    assert [name for name in made if not made[name].any()] == list(data.ids[4:8])
    assert calls == ["saved", "check", "check", "saved", "check", "saved", "check"]
    assert {path.name for path in there.iterdir()} == {path.name for path in out.iterdir()}


def test_of_images_at_once_each_has_one_thread(chain, split, tmp_path):
    torch.set_num_threads(2)
    try:
        data, at_work = packed(split, ["images"], chain[0]), set()

        def make(i: int) -> dict[str, np.ndarray]:
            at_work.add((threading.get_ident(), torch.get_num_threads()))
            time.sleep(0.01)
            return {data.ids[i]: np.ones((2, 2), np.uint8)}

        (tmp_path / "out").mkdir()
        shards.make_label_maps("any", data, Context(CPU, lambda told: None, tmp_path / "out", tmp_path), make)
        assert [n for _, n in at_work] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_images_that_do_not_fit_into_memory_together_walk_in_parts(chain, shapes, tmp_path, monkeypatch):
    store = Store(shutil.copytree(chain[0].root, tmp_path / "store"))
    shutil.rmtree(store.root / "walk")
    real, groups = walk_stage.walk, []

    def few_at_once(model, images, maps, config):
        groups.append(len(images))
        if len(images) > 3:
            raise MemoryError
        return real(model, images, maps, config)

    monkeypatch.setattr(walk_stage, "walk", few_at_once)
    made = run(load_config("micro"), shapes, store, until="walk")["walk"]
    assert groups[:4] == [8, 4, 2, 2]
    whole, parts = weights(chain[1]["walk"]), weights(made)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-3)  # as float16 keeps them


def test_a_file_that_is_damaged_in_any_way_is_made_again(chain, shapes, tmp_path):
    store = Store(shutil.copytree(chain[0].root, tmp_path / "store"))
    key, name = chain[1]["pseudo_masks"].key, "00000.zip"
    whole = (store.root / "pseudo_masks" / key / name).read_bytes()
    entry = whole.index(b"PK\x01\x02") + 10
    other_method = whole[:entry] + bytes([99]) + whole[entry + 1 :]
    encrypted = whole[: entry - 2] + bytes([1]) + whole[entry - 1 :]
    for damaged in (other_method, encrypted, whole[: len(whole) // 2]):
        shutil.rmtree(store.root / "pseudo_masks")
        left = store.root / "checkpoints" / "pseudo_masks" / key / name
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(damaged)
        made = run(load_config("micro"), shapes, store, until="pseudo_masks")["pseudo_masks"]
        assert made.artifact.file(name).read_bytes() == whole


@pytest.mark.parametrize(("H", "W"), [(40, 61), (8, 8), (17, 3)])
def test_a_feature_s_map_is_the_mean_of_its_pixels(monkeypatch, H, W):
    config = load_config("micro", {"affinity.variant": "feature"})
    h, w = -(-H // 8), -(-W // 8)
    monkeypatch.setattr(walk_stage, "see", lambda model, images, config: torch.zeros(1, 448, h, w))
    monkeypatch.setattr(walk_stage, "along_features", lambda values, features, **options: values)
    full = torch.rand(2, H, W)
    maps = Maps(np.array([1, 2]), torch.empty(0), full)
    (found,) = walk(torch.nn.Linear(1, 1), [np.zeros((H, W, 3), np.uint8)], [maps], config)
    for y in range(h):
        for x in range(w):
            mean = full[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean(dim=(1, 2))
            torch.testing.assert_close(found[:, y, x], mean)


def test_scores_belong_to_the_name_of_their_split(chain, shapes, tmp_path):
    """The same images under another name: maps and masks are found, scores are told under that name."""
    folder = shutil.copytree(shapes, tmp_path / "devkit")
    lists = open_devkit(folder).folder / "ImageSets" / "Segmentation"
    shutil.copy(lists / "train.txt", lists / "all.txt")
    config = load_config("micro", {"data.mask_split": "all"})
    store = Store(shutil.copytree(chain[0].root, tmp_path / "store"))
    runs = run(config, folder, store, until=pipeline.ends(config, "pseudo_masks"))
    assert [name for name, one in runs.items() if not one.found] == ["evaluate_masks"]
    metrics, before = (one["evaluate_masks"].artifact.info["metrics"] for one in (runs, chain[1]))
    assert metrics == {name.replace("/train/", "/all/"): value for name, value in before.items()}


def test_what_a_crf_of_no_iterations_would_be_is_in_no_key(shapes):
    def key(stage: str, **fields):
        config = load_config("micro", {name.replace("__", "."): value for name, value in fields.items()})
        return pipeline.stage_keys(config, pipeline.open_data(config, shapes), stage)[stage]

    off = {"pseudo_masks__crf__iterations": 0}
    assert key("pseudo_masks", **off) == key("pseudo_masks", **off, pseudo_masks__crf__bilateral_sxy=7)
    assert key("pseudo_masks") != key("pseudo_masks", pseudo_masks__crf__bilateral_sxy=7)
    assert key("pseudo_masks") != key("pseudo_masks", **off)


def test_files_of_others_are_imported_once_for_all_seeds(shapes, tmp_path):
    (tmp_path / "a.npy").write_bytes(b"maps")
    keys = []
    for seed in (0, 1):
        config = load_config("micro", {"cams.folder": str(tmp_path), "seed": seed})
        keys.append(pipeline.stage_keys(config, pipeline.open_data(config, shapes), "affinity"))
    assert keys[0]["train_cams"] == keys[1]["train_cams"]
    assert keys[0]["affinity"] != keys[1]["affinity"]
