"""Whole sweeps: real Ray, real MLflow, real training, in preset micro."""

import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from analysis.cli import main as analysis_main
from semformer import pipeline
from semformer.config import load_config
from semformer.store import Store
from sweeps.cluster import runner
from sweeps.cluster.connect import connect
from sweeps.plan.table import load_table
from sweeps.plan.trials import make_plan
from sweeps.reports import EpochEnded, Finished, Retried, Started
from sweeps.tracking.state import SweepState
from sweeps.tracking.tracker import Tracker
from tests.workplace import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def table03(place) -> str:
    """The output of the first sweep of table03 in `place`."""
    status, out = place.sweep("table03")
    assert status == 0, out
    return out


def test_every_stage_of_table03_is_made_exactly_once(place, table03):
    made = Counter(artifact.key.stage for artifact in place.artifacts())
    assert made == {"caae": 1, "segmentor": 8, "cams": 8, "evaluate": 8}
    assert list((place.store.root / "damaged").iterdir()) == []
    assert list((place.store.root / "tmp").iterdir()) == []
    assert [path for path in (place.store.root / "checkpoints").rglob("*") if path.is_file()] == []
    announced = re.findall(r"(\w+) made in", table03)
    assert Counter(announced) == made  # a second training of a stage would leave no second artifact


def test_table03_is_recorded_in_mlflow(place, table03):
    (parent,) = place.runs("table03 micro", "sweep")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["sweep/finished"] == 8
    plan = make_plan([load_table("table03")], "micro", {}, (0,), None, place.store)
    runs = {run.data.tags["semformer.trial_key"]: run for run in place.runs("table03 micro", "trial")}
    assert set(runs) == {trial.key for trial in plan.trials}
    for trial in plan.trials:
        run = runs[trial.key]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["semformer.rows"] == ",".join(trial.rows)
        assert 0 <= run.data.metrics["cam/val/miou"] <= 100
        losses = {name for name in run.data.metrics if name.startswith("segmentor/loss/")}
        assert losses == {f"segmentor/loss/{name}" for name in ("total", *trial.config.segmentor.losses)}
        for metric in (*losses, "segmentor/lr", "caae/loss/recon", "caae/lr", "caae/images_per_second"):
            assert place.steps(run, metric) == [1, 2]
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        assert len(list(folder.glob("pictures/*.png"))) == 2
        assert (folder / "class_iou.parquet").exists()
    found = Counter(run.data.tags["semformer.stages_found"] for run in runs.values())
    assert sorted(found.values()) == [1, 7]  # one trial made the caae, the others found it
    stages = place.runs("table03 micro", "stage")
    assert Counter(run.data.tags["semformer.stage"] for run in stages) == {"caae": 1, "segmentor": 8}


def test_the_output_tells_what_happened(table03):
    assert "8 trials; to make: 1 caae, 8 segmentor, 8 cams, 8 evaluate" in table03
    assert len(re.findall(r"segmentor epoch [12]/2, total", table03)) == 16
    assert "8 trials: 8 finished" in table03
    assert "made: 1 caae, 8 segmentor, 8 cams, 8 evaluate" in table03
    assert "semformer-sweep ui --tracking-uri sqlite:///" in table03
    assert re.search(r"\| mIoU \(%\) ours +\|", table03)
    assert "tables: " in table03


def test_the_table_is_compiled_from_mlflow_and_kept_with_the_sweep(place, table03, capsys):
    arguments = ["table03", "--preset", "micro", "--tracking-uri", place.uri, "--log"]
    assert analysis_main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| L_CF " in printed
    assert f"split val of {shapes_name()}" in printed
    (parent,) = place.runs("table03 micro", "sweep")
    folder = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert (folder / "table03.md").read_text() == printed
    assert (folder / "table03.tex").exists()


def shapes_name() -> str:
    return pipeline.open_data(load_config("micro"), None).describe("val")


def test_a_second_sweep_does_nothing_but_say_so(place, table03):
    def snapshot():
        files = {path: path.stat().st_mtime_ns for path in place.store.root.glob("*/*/manifest.json")}
        runs = [run for kind in ("sweep", "trial", "stage") for run in place.runs("table03 micro", kind)]
        return files, {run.info.run_id: (run.info.end_time, run.data.metrics, run.data.tags) for run in runs}

    before, started = snapshot(), time.monotonic()
    status, out = place.sweep("table03")
    assert time.monotonic() - started < 15
    assert status == 0
    assert "nothing to do: all 8 trials are finished and recorded" in out
    assert snapshot() == before


def test_another_experiment_is_filled_from_the_store(place, table03):
    status, out = place.sweep("table03", "--experiment", "again")
    assert status == 0
    assert "8 found" in out
    assert "made: nothing" in out
    for run in place.runs("again", "trial"):
        assert run.info.status == "FINISHED"
        assert place.steps(run, "segmentor/loss/CF") == [1, 2]
        assert 0 <= run.data.metrics["cam/val/miou"] <= 100
    assert len(place.artifacts()) == 25


def test_a_trial_in_a_reused_process_gives_the_weights_of_a_run_of_its_own(place, table03, tmp_path):
    plan = make_plan([load_table("table03")], "micro", {}, (0,), None, place.store)
    trial = plan.trials[-1]
    data = pipeline.open_data(trial.config, trial.data)
    alone = pipeline.run(
        trial.config, data, Store(tmp_path), device=torch.device("cpu"), progress=lambda told: None, until="segmentor"
    )
    for run in alone:
        assert run.artifact.files == place.store.find(trial.keys[run.stage]).files


def test_a_diverging_trial_fails_alone_at_once_and_with_its_reason(place, table03):
    fields = "segmentor.losses: [CF, SS], cams.final_map: activation"
    table = place.table("diverging", bad="segmentor.optimizer.lr: 1.0e+9", good=fields, worse="cams.last_blocks: 1")
    status, out = place.sweep(table, "--set", "segmentor.epochs=1")
    assert status == 1
    assert "3 trials: 1 failed, 2 finished" in out
    assert "tried again" not in out
    assert out.count("failed bad: segmentor: TrainingDiverged") == 1
    runs = {
        run.data.tags["semformer.rows"].removeprefix("diverging/"): run
        for run in place.runs("diverging micro", "trial")
    }
    assert {row: run.info.status for row, run in runs.items()} == {
        "bad": "FAILED",
        "good": "FINISHED",
        "worse": "FINISHED",
    }
    assert "TrainingDiverged" in runs["bad"].data.tags["semformer.reason"]
    assert "segmentor.optimizer.lr" in runs["bad"].data.tags["semformer.reason"]
    folder = Path(runs["bad"].info.artifact_uri.removeprefix("file://"))
    assert "Traceback" in (folder / "failure.txt").read_text()
    (parent,) = place.runs("diverging micro", "sweep")
    assert parent.info.status == "FAILED"
    assert parent.data.metrics["sweep/failed"] == 1


def test_tables_of_which_every_trial_fails_end_with_reasons_and_the_json_object(place, table03):
    tables = [place.table(f"bad-{n}", bad=f"segmentor.optimizer.lr: {n}.0e+9") for n in (1, 2)]
    answer = place.call("run", *tables, "--json", "--set", "segmentor.epochs=1")
    assert answer.status == 1
    told = json.loads(answer.out)
    assert (told["trials"], told["sweep/failed"], told["experiment"]) == (2, 2, "tables micro")
    assert "Traceback" not in answer.err
    assert re.search(
        r"failed bad-1/bad( and 1 more)?: segmentor: TrainingDiverged: .*segmentor.optimizer.lr", answer.err
    )
    assert re.search(r"no tables: .*no trial .*has finished", answer.err)


def test_a_killed_worker_is_replaced_and_goes_on_from_its_last_epoch(place, table03):
    table = load_table(place.table("killed", only="segmentor.epochs: 12"))
    plan = make_plan([table], "micro", {}, (0,), None, place.store)
    (trial,) = plan.trials
    tracker, state = Tracker(place.uri, plan, place.store, folder=place.folder / "killed"), SweepState(plan)
    tracker.begin()
    heard, pids = [], []

    def tell(trial, report):
        state.tell(trial, report)
        tracker.tell(trial, report, state.trials[trial.key].tags())
        heard.append(report)
        if isinstance(report, Started):
            pids.append(report.pid)
        if isinstance(report, EpochEnded) and report.epoch == 5 and len(pids) == 1:
            os.kill(pids[0], signal.SIGKILL)

    with connect(None):
        runner.run_trials([trial], place.store, tell, share={"cpu": 1, "gpu": 0})
    tracker.end("FINISHED")
    assert tracker.errors == []
    kinds = Counter(map(type, heard))
    assert (kinds[Started], kinds[Retried], kinds[Finished]) == (2, 1, 1)
    (retried,) = (report for report in heard if isinstance(report, Retried))
    assert retried.failure.reason.startswith("segmentor: WorkerDied: ")
    assert [report.epoch for report in heard if isinstance(report, EpochEnded)] == list(range(1, 13))
    assert len(place.store.find(trial.keys["segmentor"]).info["history"]["total"]) == 12
    (run,) = place.runs("killed micro", "trial")
    assert run.info.status == "FINISHED"
    assert run.data.tags["semformer.reason"] == ""
    assert sorted(place.steps(run, "segmentor/loss/total")) == list(range(1, 13))


def test_a_sweep_stopped_by_ctrl_c_goes_on_later(place, table03):
    table = place.table("stopped", only="segmentor.epochs: 20")
    lines = []
    with place.start("run", table) as sweep:
        for line in sweep.stdout:
            lines.append(line)
            if "epoch 4/20" in line:
                sweep.send_signal(signal.SIGINT)
    assert sweep.returncode == 130
    assert "stopped; the same command, or resume, goes on" in lines[-1]
    assert [run.info.status for run in place.runs("stopped micro", "sweep")] == ["KILLED"]
    assert [run.info.status for run in place.runs("stopped micro", "trial")] == ["KILLED"]

    status, out = place.sweep(table)
    assert status == 0
    epochs = [int(n) for n in re.findall(r"epoch (\d+)/20", "".join(lines) + out)]
    assert epochs == sorted(set(epochs))
    assert epochs[:4] == [1, 2, 3, 4]
    assert epochs[-1] == 20
    assert [run.info.status for run in place.runs("stopped micro", "sweep")] == ["FINISHED"]
    (run,) = place.runs("stopped micro", "trial")
    assert sorted(place.steps(run, "segmentor/loss/total")) == list(range(1, 21))
