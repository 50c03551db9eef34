"""`semformer run` as a user meets it: what it tells, what it keeps, and errors in one message."""

import argparse
import re
import shutil
import time
from dataclasses import replace

import pytest
import torch

from semformer import pipeline
from semformer.cli import _Display, add_config_arguments, main, read_config
from semformer.config import load_config
from semformer.keys import StageKey
from semformer.stages import caae
from semformer.stages.context import Progress
from semformer.store import Store
from semformer.store.collection import collect

NAMES = [stage.name for stage in pipeline.needed_stages(load_config("micro"))]


@pytest.mark.parametrize("every", [0.0, 100.0])
def test_where_there_is_no_terminal_a_long_stage_tells_now_and_then_how_far_it_is(
    finished, shapes, tmp_path, capsys, monkeypatch, every
):
    monkeypatch.setattr("semformer.cli._Display.EVERY", every)
    store = shutil.copytree(finished[0].root, tmp_path / "store")
    for stage in ("cams", "evaluate"):
        shutil.rmtree(store / stage)
    assert main(["run", "--preset", "micro", "--data", str(shapes), "--store", str(store)]) == 0
    told = re.findall(r"cams: (\d+)/(\d+) [\d.]+ img/s, \d+ s left", capsys.readouterr().err)
    assert bool(told) == (every == 0)


def test_what_a_run_has_made_is_kept_until_it_is_dropped(shapes, tmp_path):
    store = Store(tmp_path / "store")
    command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(store.root)]
    assert main(command) == 0
    collect(store, apply=True, grace=0)
    assert {artifact.key.stage for artifact in store.artifacts()} >= set(NAMES)
    (name,) = store.roots.all()
    assert name.startswith("run-")
    store.roots.drop(name)
    store.roots.keep("another", [])
    assert {one.stage for one in collect(store, grace=0)} >= set(NAMES)
    assert main(command) == 0
    assert sorted(store.roots.all()) == ["another", name], "who asks for what is there wants it, too"
    assert not {one.stage for one in collect(store, grace=0)} & set(NAMES)


def test_what_an_interrupted_run_has_made_is_kept(shapes, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    store = Store(tmp_path / "store")
    monkeypatch.setattr(
        pipeline, "STAGES", tuple(replace(s, run=interrupted) if s.name == "cams" else s for s in pipeline.STAGES)
    )
    assert main(["run", "--preset", "micro", "--data", str(shapes), "--store", str(store.root)]) == 130
    assert len(store.roots.all()) == 1
    collect(store, apply=True, grace=0)
    assert {artifact.key.stage for artifact in store.artifacts()} >= {"caae", "segmentor"}


def test_runs_of_several_settings_are_kept_apart(shapes, tmp_path):
    store = Store(tmp_path / "store")
    for seed in (0, 1):
        command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(store.root)]
        assert main([*command, "--set", f"seed={seed}"]) == 0
    collect(store, apply=True, grace=0)
    made = [artifact.key.stage for artifact in store.artifacts()]
    assert [made.count(name) for name in NAMES] == [2] * len(NAMES)


def test_names_of_files_are_no_markup(shapes, tmp_path, capsys):
    folder = tmp_path / "[red]x[" / "b]"
    assert main(["run", "--preset", "micro", "--data", str(shapes), "--store", str(folder)]) == 0
    assert f"picture {folder}/evaluate/" in capsys.readouterr().err
    assert main(["data", "make-shapes", str(folder / "[set]"), "--train", "3", "--val", "1", "--size", "32"]) == 0
    assert f"use it with --data {folder / '[set]'}" in capsys.readouterr().err


@pytest.mark.parametrize("every", [0.0, 100.0])
def test_who_waits_without_a_terminal_is_told_at_once_and_now_and_then(capsys, monkeypatch, every):
    monkeypatch.setattr(_Display, "EVERY", every)
    with _Display() as display:
        for _ in range(3):
            display.waiting(StageKey("pack", {"stage": "pack", "inputs": {}}), "process 7 on host")
        for done in range(4):
            display.data(done, 3)
    told = capsys.readouterr().err
    assert told.count("waiting: process 7 on host makes it") == (3 if every == 0 else 1)
    assert told.count("data: ") == (4 if every == 0 else 1)


def test_each_network_starts_from_the_file_that_is_given_for_it():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    files = ["--weights", "a.pth", "--caae-weights", "b.pth"]
    config = read_config(parser.parse_args(files))
    assert (config.segmentor.weights, config.caae.weights) == ("a.pth", "b.pth")
    config = read_config(parser.parse_args([*files, "--set", "caae.weights=c.pth"]))
    assert (config.segmentor.weights, config.caae.weights) == ("a.pth", "c.pth")


def test_who_stops_a_run_is_told_that_it_can_go_on(shapes, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(caae, "train", stop)
    assert main(["run", "--preset", "micro", "--data", str(shapes), "--store", str(tmp_path / "store")]) == 130
    assert "the same command goes on from there" in " ".join(capsys.readouterr().err.split())


def test_the_time_left_is_that_of_the_images_that_are_left():
    told = Progress.of_images("cams", 3, 12, time.monotonic() - 6)
    assert (told.images_per_second, told.seconds_left) == pytest.approx((0.5, 18), rel=0.01)


def test_a_run_takes_as_many_threads_as_it_is_given(finished, shapes):
    before = torch.get_num_threads()
    command = ["run", "--preset", "micro", "--data", str(shapes), "--store", str(finished[0].root)]
    try:
        for n in (2, 1):
            assert main([*command, "--threads", str(n)]) == 0
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--preset", "micro", "--data", "no/such/folder"], "no/such/folder"),
        (["run", "--preset", "micro", "--set", "segmentor.sigm=1"], "did you mean segmentor.sigma"),
        (["run", "--preset", "micro", "--set", "caae.class_dim=0"], "greater than 0"),
        (["run", "--preset", "micro", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_command_line_errors_are_one_message_without_traceback(arguments, told, tmp_path, capsys):
    assert main([*arguments, "--store", str(tmp_path / "store")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert told in error
    assert "Traceback" not in error
