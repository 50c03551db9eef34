"""Maps of many images of many sizes, and their scores by brute force from the maps that are kept."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer

from semformer import draw, pipeline
from semformer.config import load_config
from semformer.data.pixels import normalized
from semformer.data.shapes import make_shapes
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.inference import class_cosines, final_map, maps_of_every_kind, multi_scale_maps, present_classes
from semformer.keys import StageKey
from semformer.metrics import ThresholdCurve, reported, scores
from semformer.models.segmentor import Segmentor
from semformer.models.vit import Backbone
from semformer.stages import cams, evaluate, segmentor, shards
from semformer.stages.context import Context
from semformer.stages.pack import packed
from semformer.store import Artifact, Store
from semformer.store.leases import LeaseLost
from tests.test_metrics import obvious_confusion

CPU = torch.device("cpu")


def small_segmentor(n_classes: int = 4) -> Segmentor:
    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    return Segmentor(Backbone(vit), n_classes=n_classes, class_dim=8).eval()


@pytest.mark.parametrize(
    ("side", "scale", "seen"), [(33, 0.5, 16), (17, 0.5, 8), (47, 0.5, 24), (35, 0.5, 24), (21, 1.5, 32)]
)
def test_scaled_sides_are_rounded_half_to_even_before_they_become_multiples(side, scale, seen, monkeypatch):
    model, sizes, tokens = small_segmentor(), [], Backbone.tokens
    monkeypatch.setattr(
        Backbone, "tokens", lambda self, images: sizes.append(images.shape[-2:]) or tokens(self, images)
    )
    options = load_config("micro", {"cams.scales": (scale,), "cams.last_blocks": 1}).cams
    multi_scale_maps(model, [np.zeros((side, 40, 3), np.uint8)], [[1]], options)
    assert [size[0] for size in sizes] == [seen]


def test_images_made_together_have_the_maps_that_each_has_alone():
    model, rng = small_segmentor(), np.random.default_rng(0)
    images, classes = [rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(3)], [[1, 3], [2], [1, 2, 3]]
    options = load_config("micro", {"cams.scales": "0.5,1.5", "cams.last_blocks": 2}).cams
    for together, image, present in zip(
        multi_scale_maps(model, images, classes, options), images, classes, strict=True
    ):
        (alone,) = multi_scale_maps(model, [image], [present], options)
        assert together.classes.tolist() == present
        torch.testing.assert_close((together.full, together.strided), (alone.full, alone.strided), atol=1e-5, rtol=0)


def test_groups_are_of_one_size_and_have_every_image_once():
    rng = np.random.default_rng(0)
    data = SimpleNamespace(sizes=np.array([(30, 40), (40, 30), (20, 60), (40, 40)])[rng.integers(0, 4, 70)])
    groups = list(shards.of_one_size(data, range(70)))
    assert sorted(i for group in map(list, groups) for i in group) == list(range(70))
    assert max(map(len, groups)) == shards.TOGETHER
    assert all(len({tuple(data.sizes[i]) for i in group}) == 1 for group in groups)


def test_maps_of_many_files_are_read_in_the_split_s_order(shapes, store, tmp_path, monkeypatch):
    data = packed(open_devkit(shapes).split("train"), ["images"], store)
    monkeypatch.setattr(segmentor, "load", lambda *_, **__: small_segmentor(9))
    config = load_config("micro", {"cams.last_blocks": 1})
    made = []
    for images_a_file in (1, 5, 256):
        monkeypatch.setattr(shards, "SHARD", images_a_file)
        out, checkpoints = tmp_path / str(images_a_file), tmp_path / f"checkpoints {images_a_file}"
        out.mkdir()
        checkpoints.mkdir()
        cams.run(config, data, None, Context(CPU, lambda told: None, out, checkpoints))
        artifact = Artifact(StageKey("cams", {}), out, {}, {path.name: {} for path in out.iterdir()})
        made.append(cams.MapFiles(artifact))
        assert list(made[-1]) == list(data.ids)
    for image_id in data.ids:
        for maps in made[1:]:
            torch.testing.assert_close(maps[image_id].full, made[0][image_id].full, atol=2e-3, rtol=0)


@pytest.mark.parametrize("rule", ["oracle", "fixed", "heldout"])
def test_scores_are_those_of_the_maps_that_are_kept(shapes, store, rule):
    """Eroded at each threshold, pixel by pixel; the tables, the classes' IoU and the metrics tell the same."""
    options = {"erosion": 3, "thresholds": "0.2,0.6,0.1", "fixed_threshold": 0.1, "rule": rule, "pictures": 0}
    config = load_config("micro", {f"evaluate.{name}": value for name, value in options.items()})
    data = pipeline.open_data(config, shapes)
    made = {
        run.stage: run.artifact for run in pipeline.run(config, data, store, device=CPU, progress=lambda told: None)
    }
    maps, split = cams.MapFiles(made["cams"]), data["val"]
    images = [(maps[name].full.numpy(), maps[name].classes, split.mask(i)) for i, name in enumerate(split.ids)]
    counts = np.stack([obvious_confusion([image], 9, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 3) for image in images])
    whole, halves = scores(counts.sum(axis=0)), [counts[half::2].sum(axis=0) for half in (0, 1)]
    table = pq.read_table(made["evaluate"].file("threshold_curve.parquet")).to_pydict()
    for name in ("miou", "fp", "fn"):
        assert table[name] == pytest.approx(getattr(whole, name).tolist())

    oracle, *best = (1 + int(scores(confusion).miou[1:].argmax()) for confusion in (sum(halves), *halves))
    rules = {"fixed": (0, 0), "oracle": (oracle, oracle), "heldout": (best[1], best[0])}
    wanted = {name: scores(halves[0][first] + halves[1][second]) for name, (first, second) in rules.items()}
    metrics = json.loads(made["evaluate"].file("metrics.json").read_text())
    for name, of_rule in wanted.items():
        assert metrics[f"cam/val/miou_{name}"] == pytest.approx(of_rule.miou)
    told = {name: metrics[f"cam/val/{name}"] for name in ("miou", "fp", "fn")}
    assert told == pytest.approx({name: float(getattr(wanted[rule], name)) for name in told})
    assert metrics["cam/val/threshold"] == np.mean([table["threshold"][chosen] for chosen in rules[rule]])
    class_iou = pq.read_table(made["evaluate"].file("class_iou.parquet"))["iou"].to_pylist()
    assert class_iou == pytest.approx(wanted[rule].iou.tolist())

    expected = []
    for i, (name, of_image) in enumerate(zip(split.ids, counts, strict=True)):
        confusion = of_image[rules[rule][i % 2]]
        of_class = zip(split.classes, np.diagonal(confusion), confusion.sum(axis=0), confusion.sum(axis=1), strict=True)
        expected += [("cam/val/miou", name, *row) for row in of_class if any(row[1:])]
    counted = pq.read_table(made["evaluate"].file("image_counts.parquet"))
    assert counted.column_names == ["score", "image", "class", "intersection", "predicted", "true"]
    assert [row for row in zip(*counted.to_pydict().values(), strict=True) if any(row[3:])] == expected


def test_the_best_threshold_is_one_of_those_that_are_tried():
    options = load_config("micro", {"evaluate.thresholds": "0.2,0.6,0.2", "evaluate.fixed_threshold": 0.1}).evaluate
    curve = ThresholdCurve(2, options.scored_thresholds())
    curve.add(np.array([[[0.15, 0.15, 0.5, 0.0]]], np.float32), [1], np.array([[1, 1, 1, 0]], np.uint8))
    told, chosen = reported(curve, options, "val")
    assert (told["cam/val/miou_fixed"], told["cam/val/threshold"], chosen) == (100, 0.2, (1, 1))


def test_a_threshold_is_chosen_on_other_images_where_there_are_some():
    options = load_config("micro", {"evaluate.rule": "heldout"}).evaluate
    curve = ThresholdCurve(2, options.scored_thresholds())
    image = np.array([[[0.15, 0.5]]], np.float32), [1], np.array([[1, 0]], np.uint8)
    curve.add(*image)
    with pytest.raises(UserError, match=r"evaluate\.rule=heldout needs known pixels in both halves of split val"):
        reported(curve, options, "val")
    curve.add(*image, half=1)
    assert reported(curve, options, "val")[0].keys() >= {"cam/val/miou_heldout"}


def test_classes_are_seen_where_they_are_more_like_their_semantics_than_not():
    E = torch.tensor([[0.0, 1.0], [0.9, 0.1], [0.3, 0.9], [0.0, 1.0], [1.0, 0.0]])[None]
    S = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    config = load_config("micro")
    seen = present_classes(lambda view: (None, E, []), S, np.zeros((20, 30, 3), np.uint8), config)
    assert seen.tolist() == [1, 4]


def test_the_choice_of_the_epoch_takes_every_image_whatever_the_batches(shapes):
    split, model = open_devkit(shapes).split("train"), small_segmentor(9)
    whole = segmentor.patch_miou(model, split, 48, "float32")
    assert segmentor.patch_miou(model, split, 48, "float32", batch_size=5) == pytest.approx(whole, abs=1e-3)
    assert segmentor.patch_miou(model, split, 48, "float32", batch_size=1) == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize(("option", "value"), [("flip", False), ("last_blocks", 1), ("scales", "1.5")])
def test_maps_are_made_as_the_options_say(shapes, store, tmp_path, monkeypatch, option, value):
    data = packed(open_devkit(shapes).split("val"), ["images"], store)
    model = small_segmentor(9)
    monkeypatch.setattr(segmentor, "load", lambda *_, **__: model)
    config = load_config("micro", {"cams.last_blocks": 2, f"cams.{option}": value})
    (checkpoints := tmp_path / "checkpoints").mkdir()
    cams.run(config, data, None, Context(CPU, lambda told: None, tmp_path, checkpoints))
    artifact = Artifact(StageKey("cams", {}), tmp_path, {}, {path.name: {} for path in tmp_path.glob("maps*")})
    kept = cams.MapFiles(artifact)
    for i, image_id in enumerate(data.ids):
        (wanted,) = multi_scale_maps(model, [data.pixels(i)], [data.objects(i)], config.cams)
        torch.testing.assert_close(kept[image_id].full, wanted.full, atol=2e-3, rtol=0)


def test_the_maximum_of_a_map_is_that_within_the_image():
    """The frame of the maps at full size is larger than an image of 33 x 35 pixels."""
    model, rng = small_segmentor(), np.random.default_rng(0)
    options = load_config("micro", {"cams.scales": "1", "cams.last_blocks": 1, "cams.final_map": "attention"}).cams
    images = [rng.integers(0, 256, (33, 35, 3), np.uint8) for _ in range(8)]
    for maps in multi_scale_maps(model, images, [[1, 2, 3]] * 8, options):
        for kept in (maps.full, maps.strided):
            assert kept.amax(dim=(1, 2)) == pytest.approx(1, abs=1e-3)


def test_activation_maps_are_interpolated_in_full_precision():
    logits, valid = torch.randn(2, 4, 7, 7).bfloat16(), torch.ones(2, 1, 32, 32)
    maps = segmentor.activation_maps(logits, valid)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, segmentor.activation_maps(logits.float(), valid))


def test_maps_are_not_measured_on_the_mask_of_another_image(finished, shapes, tmp_path):
    (store, runs), config = finished, load_config("micro", {"evaluate.pictures": 0})
    split, cams_made = open_devkit(shapes).split("val"), runs["cams"].artifact
    ctx = Context(CPU, lambda told: None, tmp_path, tmp_path)
    backwards = replace(split, ids=split.ids[::-1], labels=split.labels[::-1])
    told = evaluate.run(config, packed(backwards, ["images", "masks"], store), cams_made, ctx)
    assert told["metrics"] == runs["evaluate"].artifact.info["metrics"]
    other = packed(open_devkit(shapes).split("train"), ["images", "masks"], store)
    with pytest.raises(UserError, match="holds no maps of train_000000"):
        evaluate.run(config, other, cams_made, ctx)


def test_cosines_are_those_of_each_pair_of_classes_at_the_images_own_scale():
    model, options = small_segmentor(), load_config("micro", {"cams.last_blocks": 1}).cams
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    view = normalized(torch.from_numpy(image).permute(2, 0, 1)[None])
    told = class_cosines(model, image, [1, 2, 3], options, precision="float32")
    for kind in ("activation", "attention"):
        maps = final_map(model, view, kind, 1)[0].detach().double().flatten(1).numpy()
        pairs = [
            maps[a] @ maps[b] / np.linalg.norm(maps[a]) / np.linalg.norm(maps[b]) for a, b in ((1, 2), (1, 3), (2, 3))
        ]
        assert told[kind] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert told["attention"] > 0.99 > told["activation"]  # all class tokens start as copies of one


def test_the_maps_that_are_compared_are_spread_over_the_split(shapes, store, monkeypatch):
    model, config = small_segmentor(9), load_config("micro", {"cams.last_blocks": 1})
    split = packed(open_devkit(shapes).split("train"), ["images"], store)
    several = [i for i in range(len(split)) if len(split.objects(i)) > 1]
    assert len(several) > 4
    monkeypatch.setattr(cams, "COMPARED", 3)
    step = math.ceil(len(several) / 3)
    compared = [split.pixels(i) for i in several[::step]], [split.objects(i) for i in several[::step]]
    each = [class_cosines(model, *one, config.cams, precision="float32") for one in zip(*compared, strict=True)]
    for kind, told in cams._mean_cosines(model, split, config).items():
        assert told == pytest.approx(np.mean([one[kind] for one in each]))


def test_a_stage_that_must_stop_makes_no_more_maps(shapes, store, tmp_path, monkeypatch):
    data = packed(open_devkit(shapes).split("train"), ["images"], store)
    monkeypatch.setattr(segmentor, "load", lambda *_, **__: small_segmentor(9))
    monkeypatch.setattr(shards, "SHARD", 4)
    (checkpoints := tmp_path / "checkpoints").mkdir()
    told = []

    def stop():
        raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        cams.run(
            load_config("micro", {"cams.last_blocks": 1}),
            data,
            None,
            Context(CPU, told.append, tmp_path, checkpoints, stop),
        )
    assert max(one.done for one in told) == 4


def test_a_probe_measures_images_spread_over_the_split_and_leaves_the_mode(shapes):
    split, model, config = open_devkit(shapes).split("train"), small_segmentor(9), load_config("micro")
    spread = replace(split, ids=split.ids[::4], labels=split.labels[::4])
    expected = segmentor.map_probe(spread, config)(model)
    for training in (True, False):
        assert segmentor.map_probe(split, config, n_images=4)(model.train(training)) == pytest.approx(expected)
        assert model.training is training


def test_pictures_show_each_image_with_its_maps_at_the_reported_threshold(finished, shapes):
    (_, runs), config, split = finished, load_config("micro"), open_devkit(shapes).split("val")
    model = segmentor.load(config.segmentor, runs["segmentor"].artifact, device=CPU)
    evaluated = runs["evaluate"].artifact
    threshold = evaluated.info["metrics"]["cam/val/threshold"]
    assert threshold != config.evaluate.fixed_threshold
    for i in range(config.evaluate.pictures):
        image, objects = split.pixels(i), split.objects(i)
        maps = maps_of_every_kind(model, image, objects, config.cams, precision="float32")
        kept = {kind: one.half().float().numpy() for kind, one in maps.items()}
        drawn = draw.figure4(image, kept, objects, split.classes, truth=split.mask(i), threshold=threshold)
        with Image.open(evaluated.file(f"pictures/{split.ids[i]}.png")) as picture:
            assert np.array_equal(picture, drawn)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_maps_of_every_kind_are_those_that_would_be_final(precision):
    model, image = small_segmentor(), np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    options = load_config("micro").cams
    found = maps_of_every_kind(model, image, [1, 3], options, precision=precision)
    assert list(found) == ["activation", "attention", "both"]
    for kind, maps in found.items():
        final = options.model_copy(update={"final_map": kind})
        (alone,) = multi_scale_maps(model, [image], [[1, 3]], final, precision=precision)
        assert torch.equal(maps, alone.full)
        assert all(other == kind or not torch.equal(found[other], maps) for other in found)
    (other,) = multi_scale_maps(model, [image], [[1, 3]], options.model_copy(update={"final_map": "activation"}))
    assert torch.equal(found["activation"], other.full) is (precision == "float32")


def test_a_split_smaller_than_the_number_of_pictures_is_drawn_whole(tmp_path):
    config = load_config("micro", {"evaluate.pictures": 4})
    data = pipeline.open_data(config, make_shapes(tmp_path / "shapes", train=8, val=1, size=48))
    runs = pipeline.run(config, data, Store(tmp_path / "store"), device=CPU, progress=lambda told: None)
    *_, last = runs
    assert [name for name in last.artifact.files if name.startswith("pictures/")] == ["pictures/val_000000.png"]


def test_a_run_tells_how_alike_the_maps_of_an_images_classes_are(finished, shapes):
    (store, runs), config = finished, load_config("micro")
    model = segmentor.load(config.segmentor, runs["segmentor"].artifact, device=CPU)
    split = packed(open_devkit(shapes).split("val"), ["images"], store)
    several = [i for i in range(len(split)) if len(split.objects(i)) > 1]
    assert 0 < len(several) < len(split)
    for kind in ("activation", "attention"):
        each = [
            class_cosines(model, split.pixels(i), split.objects(i), config.cams, precision="float32")[kind]
            for i in several
        ]
        assert runs["evaluate"].artifact.info["metrics"][f"cam/val/cosine_{kind}"] == pytest.approx(np.mean(each))
