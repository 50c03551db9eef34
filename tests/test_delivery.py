"""Records on their way to MLflow when the server, the driver or the disk is not there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from semformer.errors import UserError
from semformer.store import Store
from sweeps.tracking.journal import Journal, has_backlog
from sweeps.tracking.tracker import Tracker, deliver
from tests.artifacts import eventually
from tests.conftest import ROOT
from tests.servers import mlflow_server, postgres
from tests.test_tracking import Recorded, epoch, folder, made, plan_of, run_through  # noqa: F401 (folder is a fixture)

EPOCHS = 3
SERIES = {"caae/loss/total": 2, "segmentor/loss/total": EPOCHS, "segmentor/lr": EPOCHS}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def sweep(folder, server, request):  # noqa: F811
    """Its own experiment on the server and its own folder of events."""
    if not server.process:
        server.start()
    recorded = Recorded(folder, request.node.name)
    recorded.uri = server.uri
    return recorded


def check_complete(recorded: Recorded) -> None:
    """Both trials and the three stages once, finished, their series without gaps or doubles."""
    (parent,) = recorded.runs("sweep").values()
    trials = recorded.runs("trial")
    assert sorted(trials) == ["a", "b"]
    assert len(recorded.runs("stage")) == 3
    for run in trials.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        for name, length in SERIES.items():
            assert [step for step, _ in recorded.series(run, name)] == list(range(1, length + 1)), name
        curve = [step for step, _ in recorded.series(run, "evaluate/threshold_curve/miou")]
        assert curve == sorted(set(curve))
        assert len(curve) == 99
        names = {f.path for f in MlflowClient(recorded.uri).list_artifacts(run.info.run_id)}
        assert {"config.json", "class_iou.json", "threshold_curve.png", "pictures"} < names


def test_a_server_that_is_away_for_a_while_loses_nothing_and_delays_nothing(sweep, server):
    tracker = sweep.tracker()
    a, b = tracker.plan.trials
    tracker.begin()
    tracker.tell(a, {"event": "start", "host": "node-1", "pid": 1, "gpu": "0"})
    tracker.tell(a, epoch(a, tracker.store, "caae", 1))
    eventually(lambda: tracker.undelivered == 0, 30)
    server.stop()
    told = time.time()
    slowest = 0.0
    for _ in range(20):
        before = time.perf_counter()
        tracker.tell(a, {"event": "system", "values": {"system/cpu_utilization_percentage": 50.0}})
        slowest = max(slowest, time.perf_counter() - before)
    run_through(tracker, a)
    run_through(tracker, b)
    assert slowest < 0.05
    time.sleep(3)  # attempts fail meanwhile
    assert tracker.undelivered > 20
    server.start()
    tracker.end("FINISHED", patience=30)
    assert (tracker.errors, tracker.undelivered) == ([], 0)
    check_complete(sweep)
    run = sweep.runs("trial")["a"]
    assert run.data.tags["semformer.host"] == "node-1"
    (point, *_) = MlflowClient(sweep.uri).get_metric_history(run.info.run_id, "segmentor/loss/total")
    assert abs(point.timestamp / 1000 - told) < 2  # when it was told, not when it was delivered
    assert abs(run.info.end_time / 1000 - told) < 2


def test_what_a_server_that_stays_away_did_not_get_is_delivered_later(sweep, server):
    tracker = sweep.tracker()
    tracker.begin()
    eventually(lambda: tracker.undelivered == 0, 30)
    server.stop()
    for trial in tracker.plan.trials:
        run_through(tracker, trial)
    tracker.log_file("| a table |", "tables/mine.md")
    started = time.monotonic()
    tracker.end("FINISHED", patience=1)
    assert time.monotonic() - started < 5
    left = tracker.undelivered
    assert left > 0
    assert f"{left} events are still in {tracker.folder}" in tracker.errors[0]
    with pytest.raises(UserError, match=r"MLflow does not answer; \d+ events of .* are still to be"):
        deliver(tracker.folder, sweep.store, sweep.uri, patience=1)

    server.start()
    assert deliver(tracker.folder, sweep.store, sweep.uri) == left
    check_complete(sweep)
    (parent,) = sweep.runs("sweep").values()
    assert parent.info.status == "FINISHED"
    assert [f.path for f in MlflowClient(sweep.uri).list_artifacts(parent.info.run_id, "tables")] == ["tables/mine.md"]
    assert not has_backlog(tracker.folder)
    assert deliver(tracker.folder, sweep.store, sweep.uri) == 0
    assert sweep.tracker().is_complete()


DRIVER = """
import sys, time
from pathlib import Path
from tests.test_delivery import *
tracker = Recorded(Path(sys.argv[1]), sys.argv[2]).tracker()
tracker.begin()
a, b = tracker.plan.trials
run_through(tracker, a)
tracker.tell(b, {"event": "start"})
tracker.tell(b, made(b, "caae"))
tracker.tell(b, epoch(b, tracker.store, "segmentor", 1))
print("told", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_a_driver_that_is_killed_leaves_its_events_to_the_next_one(folder, request, seconds):  # noqa: F811
    sweep = Recorded(folder, request.node.name)
    command = [sys.executable, "-c", DRIVER, str(folder), sweep.name]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert driver.stdout.readline() == b"told\n"
        time.sleep(seconds)  # to be killed at different points of the delivery
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    tracker = sweep.tracker()
    assert not tracker.is_complete()
    tracker.begin()
    b = tracker.plan.trials[1]
    tracker.tell(b, {"event": "start"})
    for n in (2, 3):
        tracker.tell(b, epoch(b, tracker.store, "segmentor", n))
    for stage in ("segmentor", "cams", "evaluate"):
        tracker.tell(b, made(b, stage))
    tracker.tell(b, {"event": "finished"})
    tracker.end("FINISHED")
    assert (tracker.errors, tracker.undelivered) == ([], 0)
    check_complete(sweep)


def test_two_drivers_with_the_same_table_make_every_run_once(sweep):
    first, second = sweep.tracker(), sweep.tracker()
    for tracker in (first, second):
        tracker.begin()
    for tracker in (first, second):
        for trial in tracker.plan.trials:
            run_through(tracker, trial)
    for tracker in (first, second):
        tracker.end("FINISHED")
        assert tracker.errors == []
    check_complete(sweep)
    assert sorted(p.name for p in first.folder.glob("*.jsonl")) == ["events-1.jsonl", "events-2.jsonl"]


def test_postgres_records_the_same(folder, tmp_path, request):  # noqa: F811
    recorded = Recorded(folder, request.node.name)
    with postgres() as server:
        recorded.uri = server.uri
        tracker = recorded.tracker()
        tracker.begin()
        for trial in tracker.plan.trials:
            run_through(tracker, trial)
        tracker.end("FINISHED")
        assert tracker.errors == []
        check_complete(recorded)


# What goes wrong on the driver's own side


def test_an_event_that_mlflow_refuses_is_told_and_holds_up_no_other(sweep):
    tracker = sweep.tracker()
    a, b = tracker.plan.trials
    tracker.begin()
    tracker.tell(a, {"event": "start"})
    tracker.tell(a, {"event": "system", "values": {"a name that MLflow does not allow: ?*": 1.0}})
    run_through(tracker, a)
    run_through(tracker, b)
    tracker.end("FINISHED")
    assert len(tracker.errors) == 1
    assert "Invalid value" in tracker.errors[0] or "Invalid metric name" in tracker.errors[0]
    assert tracker.undelivered == 0
    check_complete(sweep)


def test_a_folder_that_cannot_be_written_to_is_told(folder, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    recorded = Recorded(folder, "unwritable")
    tracker = Tracker(
        recorded.uri, plan_of(folder), Store(folder / "store"), "unwritable", folder=tmp_path / "file" / "sweep"
    )
    with pytest.raises(UserError, match=r"file/sweep: a sweep keeps its events there, but: Not a directory"):
        tracker.begin()


# The journal alone


def events_of(journal: Journal) -> list:
    return [event and event["n"] for event, _ in journal.read(100)]


def test_a_journal_goes_on_where_delivery_stopped(tmp_path):
    journal = Journal.open(tmp_path)
    for n in range(4):
        journal.append({"n": n})
    entries = journal.read(2)
    assert [event["n"] for event, _ in entries] == [0, 1]
    journal.advance(entries[-1][1], len(entries))
    assert (events_of(journal), journal.undelivered) == ([2, 3], 2)
    journal.close()
    again = Journal.open(tmp_path)
    assert (events_of(again), again.undelivered) == ([2, 3], 2)
    assert [event["n"] for event in again.history()] == [0, 1]


def test_a_delivered_journal_starts_anew(tmp_path):
    journal = Journal.open(tmp_path)
    journal.append({"n": 0})
    journal.advance(journal.read(1)[-1][1], 1)
    assert not has_backlog(tmp_path)
    journal.close()
    again = Journal.open(tmp_path)
    assert (list(again.history()), again.path.stat().st_size) == ([], 0)
    again.append({"n": 1})
    assert events_of(again) == [1]


def test_a_half_written_line_is_skipped(tmp_path, caplog):
    journal = Journal.open(tmp_path)
    journal.append({"n": 0})
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"n": 1, "val')
    again = Journal.open(tmp_path)
    again.append({"n": 2})
    assert events_of(again) == [0, None, 2]
    assert "damaged line" in caplog.text


def test_a_held_journal_is_left_alone(tmp_path):
    first = Journal.open(tmp_path)
    second = Journal.open(tmp_path)
    assert (first.path.name, second.path.name) == ("events-1.jsonl", "events-2.jsonl")
    second.append({"n": 7})
    second.close()
    assert [events_of(journal) for journal in Journal.left_in(tmp_path)] == [[7]]
    assert json.loads(second.path.read_text()) == {"n": 7}
