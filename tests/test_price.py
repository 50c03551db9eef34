"""Work in closed form against torch's counter, and the price of plans."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from semformer import flops, pipeline
from semformer.config import load_config
from semformer.crf import Lattice
from semformer.data.loading import Batch
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.inference import Maps, final_map, maps_of_every_kind, multi_scale_maps
from semformer.keys import StageKey
from semformer.models.affinity import STRIDES
from semformer.pipeline import open_data
from semformer.random_walk import neighbours, transition
from semformer.stages import affinity, affinity_labels, caae, deeplab, segmentation, segmentor, walk
from semformer.store import Store
from sweeps.plan.price import SAMPLE, SECONDS_A_PASS, Cost, Price, check_budget, estimate, price
from sweeps.plan.table import load_table
from sweeps.plan.trials import Cell, Trial, make_plan
from tests.artifacts import publish

K, B, PAIRS = 21, 4, 10
META = torch.device("meta")


class Pairs(TorchDispatchMode):
    """On the meta device, where values are unknown, PAIRS labels are not zero."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(PAIRS, 2, dtype=torch.int64, device=META)
        return func(*args, **(kwargs or {}))


def counted(compute) -> int:
    with FlopCounterMode(display=False) as counter, Pairs():
        compute()
    return counter.get_total_flops()


def networks(config):
    with META:
        encoder = caae.build(config.caae, n_classes=K)
        model = segmentor.build(config.segmentor, n_classes=K, class_dim=config.caae.class_dim)
    return encoder, model


def batch(options) -> Batch:
    side = options.image_size
    regions = torch.empty(B, 4, dtype=torch.int64, device=META)
    return Batch(torch.empty(B, 3, side, side, device=META), regions, torch.empty(B, K, device=META))


SCRATCH = {"caae.pretrained": False, "segmentor.pretrained": False}


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", SCRATCH),
        ("micro", {}),
        ("micro", {"caae.reconstruction": False, "segmentor.losses": "CF,SS"}),
        ("tiny", {"caae.decoder_depth": 3, "caae.class_dim": 24, "segmentor.losses": "AC,SS"}),
    ],
)
def test_work_is_that_of_real_training_steps(preset, changes):
    config = load_config(preset, changes)
    encoder, model = networks(config)
    small, large = batch(config.caae), batch(config.segmentor)
    step = counted(lambda: caae.loss_terms(encoder, small.images, small.Y)["total"].backward())
    assert flops.caae_training(config.caae, K) == pytest.approx(step / B, rel=1e-6)

    encoder.requires_grad_(False)

    def train():
        side = config.caae.image_size
        segmentor.loss_terms(model, encoder, config.segmentor, large, caae_size=side)["total"].backward()

    work = flops.segmentor_training(config.segmentor, config.caae, K, PAIRS / B)
    assert work == pytest.approx(counted(train) / B, rel=1e-6)


@pytest.mark.parametrize("last_blocks", [0, 2])
def test_work_is_that_of_real_views(last_blocks):
    model = networks(load_config("tiny"))[1].eval().requires_grad_(False)
    image = torch.empty(1, 3, 64, 96, device=META)
    kind = "both" if last_blocks else "activation"
    work = flops.segmentor_view("vit_shapes_patch8_64", (64, 96), K, last_blocks=last_blocks)
    # the embeddings of the class tokens come on top, which maps do not need
    assert work == pytest.approx(counted(lambda: final_map(model, image, kind, last_blocks)), rel=0.01)


@pytest.mark.parametrize("kind", ["activation", "both"])
@pytest.mark.parametrize("flip", [True, False])
def test_work_is_that_of_the_maps_of_all_images_and_of_those_that_are_drawn(kind, flip):
    changes = {"scales": "0.5,1.5", "flip": flip, "final_map": kind, "last_blocks": 2}
    network = {"segmentor.backbone": "deit_tiny_patch16_224", "segmentor.image_size": 224}
    config = load_config("micro", network | {f"cams.{name}": value for name, value in changes.items()})
    model = segmentor.build(config.segmentor, n_classes=K, class_dim=1).eval()
    images = [np.zeros((40, 64, 3), np.uint8)] * 6

    def make_maps():
        for image in images:
            multi_scale_maps(model, [image], [[1, 2]], config.cams)
        for image in images[:4]:
            maps_of_every_kind(model, image, [1, 2], config.cams, precision="float32")

    told = flops.Images(count=6, width=64, height=40, classes_per_image=3, n_classes=K)
    assert flops.stage_work("cams", config, told).flops == pytest.approx(counted(make_maps), rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"frozen": True, "image_size": 64},
        {"backbone": "resnet50", "frozen": True},
        {"variant": "feature", "backbone": "resnet38", "radius": 3},
    ],
)
def test_work_is_that_of_real_training_steps_of_affinitynet(changes):
    options = load_config("micro", {f"affinity.{name}": value for name, value in changes.items()}).affinity
    with META:
        model = affinity.build(options)
    side = options.image_size // STRIDES[options.variant]
    labelled = replace(batch(options), label_maps=torch.empty(B, side, side, dtype=torch.uint8, device=META))
    step = counted(lambda: affinity.gradients(model, labelled, options))
    assert flops.affinity_training(options) == pytest.approx(step / B)


@pytest.mark.parametrize(
    "changes",
    [{}, {"backbone": "resnet38", "head_width": 8, "image_size": 65}, {"backbone": "resnet50", "head_dilation": 2}],
)
def test_work_is_that_of_real_training_steps_of_deeplab(changes):
    options = load_config("micro", {f"deeplab.{name}": value for name, value in changes.items()}).deeplab
    with META:
        model = deeplab.build(options, n_classes=K)
    side = options.image_size
    labelled = replace(batch(options), label_maps=torch.empty(B, side, side, dtype=torch.uint8, device=META))
    step = counted(lambda: deeplab.gradients(model, labelled))
    assert flops.deeplab_training(options, K) == pytest.approx(step / B)


@pytest.mark.parametrize(("H", "W"), [(32, 120), (92, 120)])
def test_work_is_that_of_a_real_walk(H, W):
    """Of AffinityNet, and of so many steps, whose matrix has a few places less at the border."""
    images = flops.Images(count=6, width=W, height=H, classes_per_image=3, n_classes=K)
    few, many = (load_config("micro", {"walk.radius": 3, "walk.log2_steps": n}) for n in (0, 4))
    work = {config.walk.log2_steps: flops.stage_work("walk", config, images).flops for config in (few, many)}
    model = affinity.build(few.affinity).eval()
    network = 6 * counted(lambda: walk.see(model, [np.zeros((H, W, 3), np.uint8)], few))
    size = H // 4, W // 4
    steps = transition(torch.ones(1, len(neighbours(3)), *size), radius=3, beta=1.0)
    step = 6 * 2 * 2 * steps._nnz()
    assert work[4] - work[0] == pytest.approx(15 * step, rel=0.25)
    assert work[0] - (work[4] - work[0]) / 15 == pytest.approx(network)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("backbone", ["resnet18", "vit_wiring_patch8_48"])
def test_work_is_that_of_a_real_segmentation(flip, backbone):
    changes = {"deeplab.backbone": backbone, "segmentation.scales": "0.5,1.3", "segmentation.flip": flip}
    config = load_config("micro", changes | {"segmentation.crf.iterations": 0})
    model = deeplab.build(config.deeplab, n_classes=K).eval()
    image = np.zeros((40, 61, 3), np.uint8)
    segmented = counted(lambda: segmentation.segment(model, image, config.segmentation, "float32"))
    work = flops.stage_work("segmentation", config, flops.Images(6, 61, 40, 3, K))
    assert work.flops == pytest.approx(6 * segmented)
    assert work.passes == 6 * 3 * (1 + flip)
    assert work.labels == 0


def test_work_of_crfs_is_what_their_lattices_filter(monkeypatch):
    filtered, real = [], Lattice.filter
    monkeypatch.setattr(Lattice, "filter", lambda lattice, Q: filtered.append(Q.numel()) or real(lattice, Q))
    config = load_config("micro", {"affinity_labels.crf.iterations": 3, "pseudo_masks.crf.iterations": 2})
    image, classes = np.zeros((20, 30, 3), np.uint8), np.array([1, 2])
    maps = Maps(classes, torch.rand(2, 5, 8), torch.rand(2, 20, 30))
    network = deeplab.build(config.deeplab, n_classes=K).eval()
    labels = torch.zeros(20, 30, dtype=torch.int64)
    real_work = {
        "affinity_labels": lambda: affinity_labels.confident(maps, image, config.affinity_labels, labels.device),
        "pseudo_masks": lambda: affinity_labels.refiner(image, classes, config.pseudo_masks.crf, labels.device)(labels),
        "segmentation": lambda: segmentation.segment(network, image, config.segmentation, "float32"),
    }
    for stage, compute in real_work.items():
        filtered.clear()
        compute()
        work = flops.stage_work(stage, config, flops.Images(6, 30, 20, 3, K))
        assert work.labels == 6 * (sum(filtered) / 2 + flops.LATTICE * 20 * 30), stage


def test_a_network_is_counted_once_whatever_it_is_trained_with():
    images = flops.Images(16, 48, 48, 2, 9)
    rates = (1e-3, 2e-3, 3e-3)
    for stage in ("affinity", "deeplab"):
        configs = [load_config("micro", {f"{stage}.optimizer.lr": lr, f"{stage}.epochs": 3}) for lr in rates]
        first = flops.stage_work(stage, configs[0], images)
        counts = flops._counted.cache_info().misses
        assert {flops.stage_work(stage, config, images) for config in configs} == {first}
        assert flops._counted.cache_info().misses == counts


def test_maps_and_masks_from_a_folder_are_read_alone(tmp_path):
    images = flops.Images(16, 48, 48, 2, 9)
    for stage in ("cams", "pseudo_masks"):
        config = load_config("micro", {f"{stage}.folder": str(tmp_path)})
        assert flops.stage_work(stage, config, images) == flops.Work(pixels=16 * 48 * 48)


def test_work_is_counted_with_the_mean_size_and_the_mean_number_of_classes(tmp_path):
    """Of images that are spread over the split: half of these are wide, with two objects, half are tall, with one."""
    folder, ids = tmp_path / "VOC2012", [f"i{n:02d}" for n in range(2 * flops.LOOKED_AT)]
    for part in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for n, name in enumerate(ids):
        size, objects = ((60, 20), ["cat", "dog"]) if n < flops.LOOKED_AT else ((40, 50), ["cat"])
        Image.new("RGB", size).save(folder / f"JPEGImages/{name}.jpg")
        text = "".join(f"<object><name>{name}</name></object>" for name in objects)
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
    (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids))
    told = flops.Images.of(open_devkit(tmp_path), "train")
    assert told == flops.Images(count=len(ids), width=50, height=35, classes_per_image=2.5, n_classes=21)


def test_work_of_the_paper_s_stages():
    """DeiT-B at 224 takes 17.5 GMACs (Touvron et al.), and training three times the forward pass."""
    images = flops.Images(count=10_582, width=500, height=375, classes_per_image=2.5, n_classes=21)
    config = load_config("paper", {"caae.reconstruction": False, "caae.class_dim": 1})
    epochs = 200 * 10_560  # whole batches of 64
    assert flops.stage_work("caae", config, images).flops == pytest.approx(3 * 2 * 17.5e9 * epochs, rel=0.02)
    assert flops.stage_work("evaluate", config, images).pixels == 10_582 * 500 * 375
    one, two = (flops.stage_work("cams", load_config("paper", {"cams.scales": s}), images).flops for s in ("1", "1,1"))
    assert two == pytest.approx(2 * one)


def test_imported_networks_are_no_work(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    config = load_config("micro", {"caae.checkpoint": str(tmp_path / "weights.pth")})
    assert flops.stage_work("caae", config, flops.Images(16, 48, 48, 2, 9)) == flops.Work()


# Plans


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan([load_table("table03")], "micro", {}, (0,), None, Store(tmp_path_factory.mktemp("none")))


def keys(plan, stage):
    return list({trial.keys[stage].digest: trial.keys[stage] for trial in plan.trials}.values())


def test_estimates_are_measured_then_similar_then_counted(plan, store):
    (caae_key,), segmentors = keys(plan, "caae"), keys(plan, "segmentor")
    assert {e.basis for e in estimate(plan.trials, store.published(), store).values()} == {"counted"}
    publish(store, caae_key, seconds=100.0)
    publish(store, segmentors[0], seconds=50.0)
    publish(store, segmentors[1], seconds=80.0)
    estimates = estimate(plan.trials, store.published(), store)
    assert estimates[caae_key.digest].seconds == 100.0
    assert [estimates[key.digest].basis for key in segmentors[:3]] == ["measured", "measured", "similar"]
    assert {estimates[key.digest].basis for key in keys(plan, "cams")} == {"counted"}


def until_deeplab(seed: int = 0) -> Trial:
    """A trial of the whole pipeline."""
    config = load_config("micro", {"seed": seed})
    keys = pipeline.stage_keys(config, open_data(config, None), pipeline.ends(config, "deeplab"))
    return Trial(config, None, "shapes", keys, (Cell("mine", "whole", seed),))


def test_every_stage_of_the_pipeline_has_a_price(store):
    trial = until_deeplab()
    assert trial.keys.keys() == {stage.name for stage in pipeline.STAGES}
    counted = estimate([trial], (), store)
    for stage, key in trial.keys.items():
        assert counted[key.digest].basis == "counted"
        assert counted[key.digest].seconds > 0, stage
        publish(store, key, seconds=7.0)
    other = until_deeplab(seed=1)
    similar = estimate([other], store.published(), store)
    for stage, key in other.keys.items():
        assert similar[key.digest].basis == "similar", stage
        assert similar[key.digest].seconds == pytest.approx(7.0)


@pytest.mark.parametrize("field", ["pseudo_masks.crf.iterations", "deeplab.epochs"])
def test_twice_the_iterations_or_epochs_take_about_twice_as_long(field, store):
    stage, times = field.partition(".")[0], []
    for n in (200, 400):
        config = load_config("micro", {field: n})
        keys = pipeline.stage_keys(config, open_data(config, None), stage)
        trial = Trial(config, None, "shapes", keys, (Cell("mine", field, 0),))
        times.append(estimate([trial], (), store)[keys[stage].digest].seconds)
    assert times[1] / times[0] == pytest.approx(2, rel=0.2)


def test_similar_stages_take_time_in_proportion_to_their_work(plan, store):
    """Twice the epochs take twice as long, and one guided loss more takes longer."""
    first = plan.trials[0]
    publish(store, first.keys["segmentor"], seconds=60.0)
    spec = first.keys["segmentor"].spec
    longer = StageKey("segmentor", {**spec, "params": {**spec["params"], "epochs": 4}})
    changed = replace(first, keys={**first.keys, "segmentor": longer})
    estimates = estimate((*plan.trials, changed), store.published(), store)
    assert estimates[longer.digest].basis == "similar"
    assert estimates[longer.digest].seconds == pytest.approx(120.0)
    by_row = {trial.rows[0]: estimates[trial.keys["segmentor"].digest].seconds for trial in plan.trials}
    assert by_row["table03/CF-CB"] > by_row["table03/CF"] == pytest.approx(60.0)


def test_maps_from_a_folder_are_not_priced_like_those_of_a_network(store, tmp_path):
    """Small networks are far from full speed, the reading of files is not."""
    (tmp_path / "a.npy").write_bytes(b"maps")
    own = until_deeplab()
    publish(store, own.keys["train_cams"], seconds=1000.0)
    config = load_config("micro", {"cams.folder": str(tmp_path)})
    keys = pipeline.stage_keys(config, open_data(config, None), "train_cams")
    theirs = Trial(config, None, "shapes", keys, (Cell("mine", "theirs", 0),))
    key = keys["train_cams"]
    assert estimate([own, theirs], store.published(), store)[key.digest].basis == "counted"
    other = replace(theirs, keys={"train_cams": StageKey("train_cams", {**key.spec, "seed": 7})})
    publish(store, other.keys["train_cams"], seconds=3.0)
    found = estimate([own, theirs, other], store.published(), store)[key.digest]
    assert (found.basis, found.seconds) == ("similar", pytest.approx(3.0))


def test_artifacts_of_other_images_are_not_compared(plan, store):
    spec = keys(plan, "caae")[0].spec
    publish(store, StageKey("caae", {**spec, "data": {"images": "of another data set"}}), seconds=1e6)
    assert estimate(plan.trials, store.published(), store)[keys(plan, "caae")[0].digest].basis == "counted"


def test_artifacts_of_a_version_with_other_fields_are_not_compared(plan, store):
    spec = keys(plan, "caae")[0].spec
    publish(store, StageKey("caae", {**spec, "params": {**spec["params"], "of_old": 1}}), seconds=1e6)
    assert estimate(plan.trials, store.published(), store)[keys(plan, "caae")[0].digest].basis == "counted"


def test_price_counts_shared_stages_once_and_only_what_is_missing(plan, store):
    """Every stage takes an hour, but for evaluations: 8 trials, one CAAE."""
    for name, seconds in (("caae", 3600), ("segmentor", 3600), ("cams", 3600), ("evaluate", 0)):
        for key in keys(plan, name):
            publish(store, key, seconds=seconds)
    everything = frozenset(key.digest for trial in plan.trials for key in trial.keys.values())
    n = len(plan.trials)
    cells = sum(len(trial.cells) for trial in plan.trials)
    done = price(plan.trials, everything, store, gpus=4)
    assert done.missing == Cost(0, 0)
    assert done.empty_store == Cost(pytest.approx(1 + 2 * n), pytest.approx(1 + 2 * (n / 4)))
    assert done.without_sharing == Cost(pytest.approx(3 * cells), pytest.approx(3 * cells / 4))
    assert done.saving == pytest.approx(1 - (1 + 2 * n) / (3 * cells))
    assert done.basis == f"stages: {1 + 3 * n} measured"
    first = plan.trials[0].keys
    unread = price(plan.trials, everything - {first["caae"].digest, first["segmentor"].digest}, store, gpus=4)
    assert unread.missing == Cost(0, 0)
    gone = {first[stage].digest for stage in ("segmentor", "cams", "evaluate")}
    rest = price(plan.trials, everything - gone, store, gpus=4)
    assert rest.missing == Cost(pytest.approx(2, rel=0.3), rest.missing.gpu_hours)
    assert json.loads(json.dumps(done.as_json()))["empty_store"]["gpu_hours"] == pytest.approx(1 + 2 * n)
    assert "sharing saves" in done.lines()[1]


def test_without_sharing_every_row_trains_all_of_its_stages(plan, store):
    (trial, *_) = plan.trials
    twice = replace(trial, cells=(*trial.cells, Cell("mine", "same", 0)))
    prices = [price([one], store.published(), store, gpus=1) for one in (trial, twice)]
    assert prices[1].empty_store == prices[0].empty_store
    assert prices[1].without_sharing.gpu_hours == pytest.approx(2 * prices[0].without_sharing.gpu_hours)


def test_without_sharing_the_longest_rows_start_first(plan, store):
    trials = plan.trials[:3]
    for trial, hours in zip(trials, (1, 1, 2), strict=True):
        publish(store, trial.keys["segmentor"], seconds=3600 * hours)
        for name in ("caae", "cams", "evaluate"):
            if store.find(trial.keys[name]) is None:
                publish(store, trial.keys[name], seconds=0)
    assert price(trials, store.published(), store, gpus=2).without_sharing == Cost(pytest.approx(4), pytest.approx(2))


def test_basis_says_how_the_price_came_about(plan, store):
    publish(store, keys(plan, "caae")[0], seconds=10.0)
    for key in keys(plan, "segmentor")[:2]:
        publish(store, key, seconds=5.0)
    others = len(keys(plan, "segmentor")) - 2
    counted = len(keys(plan, "cams")) + len(keys(plan, "evaluate"))
    told = f"stages: 3 measured, {others} like measured ones, {counted} counted at 100 TFLOP/s"
    assert price(plan.trials, store.published(), store, gpus=1, tflops=100).basis == told


def test_counted_seconds_follow_the_throughput(plan, store):
    slow, fast, least = (estimate(plan.trials, store.published(), store, tflops=tflops) for tflops in (1e-4, 4e-4, 1e9))
    (key,) = keys(plan, "caae")
    images = flops.Images.of(open_data(plan.trials[0].config, None).devkit, "train")
    work = flops.stage_work("caae", plan.trials[0].config, images).flops
    assert slow[key.digest].seconds == pytest.approx(work / 1e8)
    assert fast[key.digest].seconds == pytest.approx(work / 4e8)
    config = plan.trials[0].config.caae
    assert least[key.digest].seconds == pytest.approx(SECONDS_A_PASS * config.epochs * (16 // config.batch_size))


def variants(plan, n, on_each=1):
    """Trials with `n` segmentation networks, and so many evaluations of each, on the plan's CAAE."""
    first, trials = plan.trials[0], []
    for i in range(n):
        spec = first.keys["segmentor"].spec
        made = {"segmentor": StageKey("segmentor", {**spec, "params": {**spec["params"], "sigma": i / n}})}
        made["cams"] = StageKey("cams", {**first.keys["cams"].spec, "inputs": {"segmentor": made["segmentor"].digest}})
        for j in range(on_each):
            spec = {**first.keys["evaluate"].spec, "inputs": {"cams": made["cams"].digest}}
            spec["params"] = {**spec["params"], "fixed_threshold": j / on_each}
            keys = {**first.keys, **made, "evaluate": StageKey("evaluate", spec)}
            trials.append(replace(first, keys=keys, cells=(Cell("table03", f"row{i}-{j}", 0),)))
    return trials


def test_ten_thousand_trials_are_priced(plan, store):
    priced = price(variants(plan, 1000, 10), (), store, gpus=4)
    assert priced.basis.startswith("stages: 12001 counted")
    evenly, told = priced.missing.gpu_hours / 4, priced.missing.wall_hours
    assert evenly < told < 1.01 * evenly


def test_a_price_reads_a_sample_of_what_is_there_and_nothing_else(plan, store, monkeypatch):
    trials, read, real = variants(plan, SAMPLE + 50), Counter(), store.read
    for trial in trials:
        publish(store, trial.keys["segmentor"], seconds=60.0)
    publish(store, StageKey("deeplab", {"of": "another plan"}), seconds=1.0)
    monkeypatch.setattr(store, "read", lambda stage, digest: read.update([stage]) or real(stage, digest))
    priced = price(trials, store.published(), store, gpus=4)
    assert read.keys() == {"segmentor"}
    assert read["segmentor"] <= SAMPLE
    assert priced.basis.startswith(f"stages: {read['segmentor']} measured, ")
    assert priced.empty_store.gpu_hours * 60 == pytest.approx(SAMPLE + 50, rel=0.05)


def test_where_none_of_its_own_is_there_the_newest_others_on_the_same_images_count(plan, store):
    other = make_plan([load_table("table03")], "micro", {"caae.merge": "max"}, (0,), None, store)
    for stage in ("caae", "segmentor"):
        for key in keys(other, stage)[:2]:
            publish(store, key, seconds=7.0)
    estimates = estimate(plan.trials, plan.cached, store)
    assert estimates[keys(plan, "caae")[0].digest].seconds == pytest.approx(7.0)
    assert {estimates[key.digest].basis for key in keys(plan, "segmentor")} == {"similar"}
    assert {estimates[key.digest].basis for key in keys(plan, "cams")} == {"counted"}


@pytest.mark.parametrize(("gpus", "tflops"), [(0, 40), (1, 0), (1, -1)])
def test_impossible_machines_are_refused(plan, store, gpus, tflops):
    with pytest.raises(UserError, match="at least one GPU and a positive throughput"):
        price(plan.trials, store.published(), store, gpus=gpus, tflops=tflops)


# Budget


def of(gpu_hours: float) -> Price:
    cost = Cost(gpu_hours, gpu_hours / 4)
    return Price(gpus=4, missing=cost, empty_store=cost, without_sharing=cost, basis="stages: 3 counted at 40 TFLOP/s")


@pytest.mark.parametrize("budget", ["40h", "40.0h", "2400m", "41h"])
def test_what_the_budget_covers_may_start(budget):
    check_budget(of(40.0), budget)


@pytest.mark.parametrize(("budget", "hours"), [("40h", 40.1), ("1.5h", 1.6), ("30m", 0.6)])
def test_what_costs_more_than_the_budget_is_refused(budget, hours):
    with pytest.raises(UserError, match=rf"--budget {budget}: the plan costs .* counted at 40 TFLOP/s"):
        check_budget(of(hours), budget)


@pytest.mark.parametrize("budget", ["40", "", "h", "-3h", "1e3h", "40 hours", "40d", "inf"])
def test_other_forms_of_a_budget_are_refused(budget):
    with pytest.raises(UserError, match="write GPU-hours or minutes"):
        check_budget(of(0), budget)
