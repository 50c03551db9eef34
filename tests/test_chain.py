"""From maps to a segmentation, in preset micro: what each stage makes of what."""

import json
import re
import shutil
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from semformer import draw, pipeline
from semformer.cli import _keep, main
from semformer.config import load_config
from semformer.crf import DenseCrf
from semformer.data.pixels import as_batch, normalized, resize
from semformer.data.voc import IGNORE, open_devkit, voc_palette
from semformer.inference import Maps
from semformer.keys import StageKey
from semformer.metrics import ThresholdCurve, confusion, label_map_metrics, scores
from semformer.random_walk import along_edges
from semformer.stages import affinity, deeplab, evaluate_masks, segmentation, shards
from semformer.stages import walk as walk_stage
from semformer.stages.affinity_labels import confident
from semformer.stages.cams import MapFiles
from semformer.stages.context import Context
from semformer.stages.evaluate import CLASS_IOU
from semformer.stages.pack import packed
from semformer.stages.walk import WalkedFiles, see, walk
from semformer.store import Artifact, Store
from tests.pipelines import CPU, label_maps, run

ALL = [stage.name for stage in pipeline.STAGES]
CHAIN = ALL[4:]


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


def test_of_two_scores_of_one_name_the_first_counts(chain):
    first, second = (
        replace(chain[1]["evaluate"].artifact, info={"metrics": metrics})
        for metrics in ({"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 4.0})
    )
    assert pipeline.scores([first, chain[1]["cams"].artifact, second]) == {"a": 1.0, "b": 2.0, "c": 4.0}


def test_the_command_tells_which_options_have_no_use(chain, shapes, capsys):
    command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(chain[0].root)]
    idle = ["--set", "walk.beta=4", "--set", "deeplab.supervised=true"]
    assert main([*command, *idle, "--set", "evaluate.pictures=2"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "changes nothing" in line]
    assert told == [
        f"--set {name} changes nothing of a run --until cams with these settings"
        for name in ("walk.beta", "deeplab.supervised")
    ]


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


def test_the_command_tells_the_loss_of_each_epoch(chain, shapes, tmp_path, capsys):
    store = shutil.copytree(chain[0].root, tmp_path / "store")
    for stage in ALL[ALL.index("affinity") :]:
        shutil.rmtree(store / stage)
    assert main(["run", "--preset", "micro", "--data", str(shapes), "--store", str(store), "--until", "deeplab"]) == 0
    told = capsys.readouterr().err
    for stage in ("affinity", "deeplab"):
        assert re.search(rf"{stage}: epoch 1/1 total \d+\.\d+ [\d.]+ img/s", told)


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
    """Of one that is lower than the network's crops, and wider; zeros are those of normalised images."""
    options = {"affinity.variant": variant, "affinity.backbone": "resnet18"}
    config = load_config("micro", options)
    torch.manual_seed(0)
    model = affinity.build(config.affinity).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (29, 53, 3), dtype=np.uint8)
    found = []
    for view in (pixels, pixels[:, ::-1]):
        image = torch.zeros(1, 3, *padded)
        normal = (view / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        image[0, :, :29, :53] = torch.from_numpy(normal.transpose(2, 0, 1))
        with torch.inference_mode():
            found.append(model(image)[0, ..., : -(-29 // stride), : -(-53 // stride)])
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
