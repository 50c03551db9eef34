"""Stages that were killed, damaged or out of memory go on where they were."""

import os
import shutil
import signal
import threading
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from semformer import pipeline
from semformer.config import load_config
from semformer.data.label_maps import write_label_maps
from semformer.errors import MachineError, UserError
from semformer.stages import pseudo_masks, shards
from semformer.stages import walk as walk_stage
from semformer.stages.context import Context, Progress
from semformer.stages.pack import packed
from semformer.store import Store
from tests.pipelines import CPU, damage, label_maps, run, weights

ALL = [stage.name for stage in pipeline.STAGES]


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
    monkeypatch.setattr(shards, "SHARD", 2)

    def kill(report):
        if report.stage == stage and report.done > 4:
            os.kill(os.getpid(), signal.SIGKILL)

    arguments = (load_config("micro"), shapes, Store(store), kill)
    process = get_context("fork").Process(target=run, args=arguments, kwargs={"until": stage})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in (store / "checkpoints" / stage / chain[1][stage].key).iterdir()}
    assert len([name for name in left if "0000" in name]) == 2
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
    told.append(Progress.of_images("any", 3, len(data), time.monotonic() - 1))
    for report in told:
        assert report.seconds_left * report.images_per_second == pytest.approx(len(data) - report.done)
    assert [name for name in made if not made[name].any()] == list(data.ids[4:8])
    assert calls == ["saved", "check", "check", "saved", "check", "saved", "check"]
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in there.iterdir()}

    def fail(i: int) -> dict[str, np.ndarray]:
        raise UserError("no mask")

    (there / "00000.zip").unlink()
    with pytest.raises(UserError, match="no mask"):
        shards.make_label_maps("any", data, ctx, fail)
    assert names - {"00000.zip"} == {path.name for path in there.iterdir()}


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
