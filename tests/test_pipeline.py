"""The pipeline in preset micro: found or made, resumed, deterministic, and clear about bad input."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from semformer import pipeline
from semformer.config import load_config
from semformer.data.pixels import MEAN, STD
from semformer.data.shapes import make_shapes
from semformer.errors import UserError
from semformer.stages import caae, segmentor
from semformer.stages.training import TrainingDiverged
from semformer.store import Store
from semformer.store.leases import LeaseLost
from tests.pipelines import CPU, damage, run, weights
from tests.test_predict import to_published

NAMES = [stage.name for stage in pipeline.needed_stages(load_config("micro"))]


def test_every_stage_is_made_once_then_found(finished, shapes):
    store, first = finished
    assert list(first) == NAMES
    assert not any(stage_run.found for stage_run in first.values())
    again = run(load_config("micro"), shapes, store)
    assert all(stage_run.found for stage_run in again.values())
    assert {name: r.key for name, r in again.items()} == {name: r.key for name, r in first.items()}


@pytest.mark.parametrize(
    ("gone", "made"),
    [
        (["caae"], []),
        (["caae", "segmentor", "cams"], []),
        (["caae", "evaluate"], ["evaluate"]),
        (["caae", "cams", "evaluate"], ["cams", "evaluate"]),
        (["segmentor", "cams", "evaluate"], ["segmentor", "cams", "evaluate"]),
    ],
)
def test_what_is_found_needs_nothing_before_it(finished, shapes, tmp_path, gone, made):
    store = Store(shutil.copytree(finished[0].root, tmp_path / "store"))
    for stage in gone:
        shutil.rmtree(store.root / stage)
    again = run(load_config("micro"), shapes, store)
    assert [name for name, stage_run in again.items() if not stage_run.found] == made
    assert list(again) == [name for name in NAMES if name not in gone or name in made]
    first = finished[1]["evaluate"].artifact.info["metrics"]
    assert again["evaluate"].artifact.info["metrics"] == first


def test_an_input_that_turns_out_to_be_damaged_is_made_again_with_what_it_needs(finished, shapes, tmp_path):
    store = Store(shutil.copytree(finished[0].root, tmp_path / "store"))
    damage(store, finished[1]["segmentor"], "segmentor.safetensors")
    for stage in ("caae", "cams", "evaluate"):
        shutil.rmtree(store.root / stage)
    again = run(load_config("micro"), shapes, store)
    assert [name for name, stage_run in again.items() if not stage_run.found] == NAMES


def test_artifacts_hold_what_the_stages_promise(finished):
    _, runs = finished
    evaluated = runs["evaluate"].artifact
    metrics = json.loads(evaluated.file("metrics.json").read_text())
    assert metrics == evaluated.info["metrics"]
    assert 0 <= metrics["cam/val/miou"] <= 100
    assert metrics["cam/val/miou"] == metrics["cam/val/miou_oracle"] >= metrics["cam/val/miou_fixed"]
    assert len([name for name in evaluated.files if name.startswith("pictures/")]) == 2
    history = runs["segmentor"].artifact.info["history"]
    assert {"total", "CF", "CB", "AS", "AC", "SS", "lr"} <= set(history)
    assert all(len(series) == 2 for series in history.values())


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({"evaluate.rule": "fixed"}, ["evaluate"]),
        ({"cams.last_blocks": 1}, ["cams", "evaluate"]),
        ({"segmentor.sigma": 0.1}, ["segmentor", "cams", "evaluate"]),
        ({"caae.merge": "max"}, NAMES),
        ({"seed": 1}, NAMES),
    ],
)
def test_a_change_remakes_only_what_depends_on_it(finished, shapes, change, made):
    store, _ = finished
    runs = run(load_config("micro", change), shapes, store)
    assert [name for name, stage_run in runs.items() if not stage_run.found] == made


def test_same_seed_gives_the_same_numbers(finished, shapes, tmp_path):
    _, first = finished
    second = run(load_config("micro"), shapes, Store(tmp_path / "store"))
    for name in ("caae", "segmentor"):
        assert all(
            torch.equal(a, b) for a, b in zip(*(weights(r[name]).values() for r in (first, second)), strict=True)
        )
    assert first["evaluate"].artifact.info["metrics"] == second["evaluate"].artifact.info["metrics"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["caae", "segmentor"])
def test_an_interrupted_training_resumes_after_the_last_epoch_and_ends_the_same(finished, shapes, tmp_path, stage):
    _, whole = finished
    store, epochs = Store(tmp_path / "store"), []

    def stop_in_second_epoch(report):
        if report.stage == stage:
            epochs.append(report.epoch)
            if report.epoch == 2:
                raise Stop

    with pytest.raises(Stop):
        run(load_config("micro"), shapes, store, stop_in_second_epoch)
    assert set(epochs) == {1, 2}
    epochs.clear()
    resumed = run(load_config("micro"), shapes, store, lambda r: r.stage == stage and epochs.append(r.epoch))
    assert set(epochs) == {2}, "no finished epoch is done again"
    ours, theirs = weights(resumed[stage]), weights(whole[stage])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((store.root / "checkpoints" / stage).iterdir()), "published, so nothing is left to resume"


def test_a_training_whose_best_weights_are_damaged_starts_again_and_ends_the_same(finished, shapes, tmp_path, caplog):
    store, config = Store(tmp_path / "store"), load_config("micro", {"segmentor.selection": "best_miou"})
    shutil.copytree(finished[0].root / "caae", store.root / "caae")

    def stop_in_second_epoch(report):
        if report.stage == "segmentor" and report.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        run(config, shapes, store, stop_in_second_epoch)
    (best,) = store.root.glob("checkpoints/segmentor/*/best.safetensors")
    best.write_bytes(best.read_bytes()[:100])
    epochs = []
    again = run(config, shapes, store, lambda r: r.stage == "segmentor" and epochs.append(r.epoch))
    assert set(epochs) == {1, 2}
    assert "starting again" in caplog.text
    whole = run(config, shapes, Store(tmp_path / "whole"))
    ours, theirs = weights(again["segmentor"]), weights(whole["segmentor"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stage_that_another_process_has_taken_over_and_made_says_so(shapes, tmp_path):
    """As after a long pause: the lease has expired, the other has published, and the checkpoints are gone."""
    store = Store(tmp_path / "store")
    other = Store(store.root)

    def be_overtaken(report):
        for lease in (store.root / "leases").glob("*/1"):
            os.rename(lease, lease.with_name("2.released"))
            shutil.rmtree(store.root / "checkpoints" / "caae")

    with pytest.raises(LeaseLost, match=r"another has taken over caae .* run again"):
        run(load_config("micro"), shapes, store, be_overtaken)
    assert not list((store.root / "tmp").iterdir())
    assert run(load_config("micro"), shapes, other)["evaluate"].artifact.info["metrics"]


def test_corrupt_image_is_named_and_nothing_is_made_of_it(tmp_path):
    folder = make_shapes(tmp_path / "shapes", train=16, val=6, size=48)
    victim = folder / "VOC2012" / "JPEGImages" / "train_000003.jpg"
    intact, store = victim.read_bytes(), Store(tmp_path / "store")
    config = load_config("micro")
    data = pipeline.open_data(config, folder)
    pipeline.stage_keys(config, data)  # the digests of the intact files
    for content, told in ((intact[: len(intact) // 2], r"train_000003\.jpg"), (intact + b"0", "have changed")):
        victim.write_bytes(content)
        with pytest.raises(UserError, match=told):
            list(pipeline.run(config, data, store, device=CPU, progress=lambda report: None))
        assert not (store.root / "caae").exists()
        assert not (store.root / "pack").exists()
    victim.write_bytes(intact)
    runs = run(config, folder, store)
    victim.unlink()
    assert list(pipeline.run(config, data, store, device=CPU, progress=lambda report: None))[-1].found
    assert set(runs) == set(NAMES)


def test_a_network_with_values_that_are_no_numbers_is_refused(finished, shapes, tmp_path):
    _, trained = finished
    state = to_published("segmentor", weights(trained["segmentor"]))
    name = next(name for name in state if name.endswith("segmentor.cls_token"))
    torch.save(state | {name: torch.full_like(state[name], torch.nan)}, file := tmp_path / "network.pth")
    config = load_config("micro", {"segmentor.checkpoint": str(file)})
    with pytest.raises(UserError, match=r"network.pth is damaged: .* no finite numbers"):
        run(config, shapes, Store(tmp_path / "store"))


def test_maps_that_overflow_are_named(finished, shapes, tmp_path):
    _, trained = finished
    state = weights(trained["segmentor"])
    state["patch_head.weight"] = torch.full_like(state["patch_head.weight"], 3e38)
    torch.save(to_published("segmentor", state), file := tmp_path / "network.pth")
    with pytest.raises(UserError, match=r"val_\d+: the activation maps contain NaN"):
        run(load_config("micro", {"segmentor.checkpoint": str(file)}), shapes, Store(tmp_path / "store"))


def test_diverging_loss_stops_the_stage_and_says_what_to_do(shapes, tmp_path):
    config = load_config("micro", {"caae.optimizer.lr": 1e12, "caae.optimizer.warmup_steps": 0})
    with pytest.raises(TrainingDiverged, match=r"caae: the loss diverged in epoch 1.*caae.optimizer.lr"):
        run(config, shapes, Store(tmp_path / "store"))


def test_weights_that_diverged_in_the_last_step_are_not_published(shapes, tmp_path):
    changes = {"caae.optimizer.lr": 1e11, "caae.epochs": 1, "caae.batch_size": 16, "caae.optimizer.name": "sgd"}
    with pytest.raises(TrainingDiverged, match=r"caae: the weights diverged in epoch 1 .*caae.optimizer.lr"):
        run(load_config("micro", changes), shapes, Store(tmp_path / "store"))
    assert not (tmp_path / "store" / "caae").exists()


def test_damaged_artifact_is_set_aside_and_made_again(finished, shapes, tmp_path, caplog):
    store = Store(shutil.copytree(finished[0].root, tmp_path / "store"))
    damage(store, finished[1]["evaluate"], "metrics.json")
    again = run(load_config("micro"), shapes, store)
    assert [name for name, r in again.items() if not r.found] == ["evaluate"]
    assert "damaged" in caplog.text
    assert list((store.root / "damaged").iterdir())


def test_published_choice_of_the_epoch_reads_masks_and_says_so(shapes, tmp_path):
    config = load_config("micro", {"segmentor.selection": "best_miou", "segmentor.optimizer.new_multiplier": 10})
    by_name = {stage.name: stage for stage in pipeline.STAGES}
    assert by_name["segmentor"].reads_masks(config)
    assert not by_name["segmentor"].reads_masks(load_config("micro"))
    data = pipeline.open_data(config, shapes)
    assert "masks" in pipeline.stage_keys(config, data)["segmentor"].spec["data"]
    runs = run(config, shapes, Store(tmp_path / "store"))
    history, rate = runs["segmentor"].artifact.info["history"], config.segmentor.optimizer.lr
    assert len(history["train_miou"]) == 2
    assert len(set(history["train_miou"])) == 2
    # the configured rate, whatever multiplies it, at the last of an epoch's two steps
    assert history["lr"] == pytest.approx([rate * (1 - step / 4) ** 0.9 for step in (1, 3)])


def test_the_epoch_of_the_caae_is_chosen_without_masks(shapes):
    by_name = {stage.name: stage for stage in pipeline.STAGES}
    data = pipeline.open_data(load_config("micro"), shapes)
    for split, told in (("train", {"images"}), ("val", {"images", "selection_images"})):
        config = load_config("micro", {"caae.selection": "best_ap", "data.selection_split": split})
        key = pipeline.stage_keys(config, data)["caae"]
        assert not by_name["caae"].reads_masks(config)
        assert set(key.spec["data"]) == told
        assert key != pipeline.stage_keys(load_config("micro"), data)["caae"]
        assert ("val", "images") in pipeline.packs(config)


@pytest.mark.parametrize(
    ("stage", "option", "measure"),
    [("caae", "best_ap", "stages.caae.label_ap"), ("segmentor", "best_miou", "stages.segmentor.patch_miou")],
)
@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_weights_of_the_best_epoch_are_kept(finished, shapes, tmp_path, monkeypatch, best, stage, option, measure):
    seen = []

    def score(model, data, size, precision):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return [10.0, 20.0, 15.0][len(seen) - 1 - best]

    monkeypatch.setattr(f"semformer.{measure}", score)
    store = Store(tmp_path / "store")
    if stage != "caae":
        shutil.copytree(finished[0].root / "caae", store.root / "caae")
    config = load_config("micro", {f"{stage}.selection": option, f"{stage}.epochs": 3})
    kept = weights(run(config, shapes, store, until=stage)[stage])
    scores = [[10.0, 20.0, 15.0][n - best] for n in range(3)]
    wanted = seen[scores.index(max(scores))]
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
    others = [epoch for epoch in seen if epoch is not wanted]
    assert not any(all(torch.equal(kept[name], other[name]) for name in kept) for other in others)


def test_the_published_choice_of_the_caae_ranks_the_labels_of_whole_images(shapes):
    config = load_config("micro")
    split = pipeline.open_data(config, shapes)["train"]
    torch.manual_seed(0)
    model = caae.build(config.caae, n_classes=9).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    sims = []
    for i in range(len(split)):
        image = Image.fromarray(split.pixels(i)).resize((32, 32), Image.Resampling.BILINEAR)
        image = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        E = torch.nn.functional.normalize(model.embed(image[None])[0], dim=1)
        S = torch.nn.functional.normalize(model.semantics, dim=1)
        sims.append((E * S).sum(dim=1).detach().numpy())
    best = max(
        np.mean([average_precision_score(y, s > t / 100) for y, s in zip(split.labels, sims, strict=True)])
        for t in range(1, 100)
    )
    found = [caae.label_ap(model, split, 32, "float32", batch_size=size) for size in (5, 64)]
    assert found == pytest.approx([100 * best] * 2, abs=1e-3)


def test_the_published_choice_compares_patches_of_the_top_left_corner(shapes):
    """Brute force: an arg-max over [t, maps] at each threshold, image by image, class by class."""
    config = load_config("micro")
    split = pipeline.open_data(config, shapes)["train"]
    torch.manual_seed(0)
    model = segmentor.build(config.segmentor, n_classes=9, class_dim=8).eval()
    side, P, best = 40, 8, 0.0  # of images of 48 pixels; then of a frame that is larger than they
    for side in (40, 64):
        maps, truths = [], []
        for i in range(len(split)):
            frame = torch.zeros(1, 3, side, side)
            part = torch.from_numpy(split.pixels(i)[:side, :side]).permute(2, 0, 1)[None] / 255
            mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
            frame[:, :, : part.shape[2], : part.shape[3]] = (part - mean) / std
            logits = model(frame)[0][0].relu()
            logits = (logits - 1e-5).relu() / (logits.amax(dim=(1, 2), keepdim=True) + 1e-5)
            logits[[c for c in range(9) if c not in split.objects(i)]] = 0
            mask = torch.full((side, side), 255)
            mask[:48, :48] = torch.from_numpy(split.mask(i))[:side, :side].long()
            maps.append(logits)
            truths.append(mask[::P, ::P])
        truth, best = torch.stack(truths), 0.0
        for t in range(1, 100):
            stacked = torch.stack(maps).clone()
            stacked[:, 0] = t / 100
            predicted = stacked.argmax(dim=1)
            predicted[truth == 255] = 255
            ious = [
                ((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum().clamp(min=1)
                for c in range(9)
            ]
            best = max(best, 100 * torch.stack(ious).mean().item())
        assert segmentor.patch_miou(model, split, side, "float32") == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cams.last_blocks": 8}, r"cams.last_blocks = 8 \(U\), but vit_wiring_patch8_48 has 7 blocks"),
        ({"caae.image_size": 30}, r"caae.image_size = 30 is no multiple of the patch size 8"),
        ({"caae.decoder_width": 25}, r"caae.decoder_width = 25 is no multiple of the 2 heads"),
        ({"caae.backbone": "vit_smal"}, r"has no model 'vit_smal'"),
        ({"data.eval_split": "test"}, r"test"),
    ],
)
def test_configs_that_cannot_work_are_refused_before_anything_runs(shapes, change, told):
    config = load_config("micro", change)
    with pytest.raises(UserError, match=told):
        pipeline.stage_keys(config, pipeline.open_data(config, shapes))


def test_the_width_of_a_decoder_that_is_not_there_does_not_matter(shapes):
    config = load_config("micro", {"caae.decoder_width": 25, "caae.reconstruction": False})
    assert pipeline.stage_keys(config, pipeline.open_data(config, shapes))


def test_an_epoch_is_chosen_on_the_split_that_is_named(shapes, store):
    changes = {"caae.selection": "best_ap", "segmentor.selection": "best_miou", "data.selection_split": "val"}
    runs = run(load_config("micro", changes), shapes, store, until="segmentor")
    assert {"val_ap"} == {name for name in runs["caae"].artifact.info["history"] if name.endswith("_ap")}
    assert {"val_miou"} == {name for name in runs["segmentor"].artifact.info["history"] if name.endswith("_miou")}


def test_a_split_is_told_by_its_data_set_its_images_and_their_digest(shapes):
    data = pipeline.open_data(load_config("micro"), shapes)
    assert data.describe("val") == f"{shapes.name} (6 images, {data['val'].digest[:8]})"


def test_paper_preset_without_data_asks_for_it():
    with pytest.raises(UserError, match="--data DIR"):
        pipeline.open_data(load_config("paper"), None)


def test_bfloat16_rounds_the_matrix_products_and_little_else(finished, shapes, tmp_path, monkeypatch):
    seen = set()
    linear = torch.nn.functional.linear

    def noted(*arguments):
        result = linear(*arguments)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    runs = run(load_config("micro", {"precision": "bfloat16"}), shapes, Store(tmp_path / "store"))
    assert seen == {torch.bfloat16}
    for stage in ("caae", "segmentor"):
        rough, exact = (r[stage].artifact.info["history"]["total"][0] for r in (runs, finished[1]))
        assert rough != exact
        assert rough == pytest.approx(exact, rel=0.02)
        assert {value.dtype for value in weights(runs[stage]).values()} == {torch.float32}


def test_the_science_needs_neither_ray_nor_mlflow_nor_optuna():
    block = "import sys\nfor name in ('ray', 'mlflow', 'optuna'): sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", block + "import semformer.pipeline, semformer.cli"], check=True)


def test_stage_versions_are_part_of_the_key(shapes, monkeypatch):
    config = load_config("micro")
    data = pipeline.open_data(config, shapes)
    before = pipeline.stage_keys(config, data)
    newer = tuple(replace(stage, version=stage.version + (stage.name == "cams")) for stage in pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", newer)
    after = pipeline.stage_keys(config, data)
    assert [name for name in NAMES if before[name] != after[name]] == ["cams", "evaluate"]
