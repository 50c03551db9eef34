"""Records on their way to MLflow when the server, the driver or the disk is not there."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from semformer.errors import UserError
from semformer.store import Store
from semformer.store.storage import StorageUnreachable
from sweeps.reports import Sampled
from sweeps.tracking import delivery as delivery_file
from sweeps.tracking import journal as journal_file
from sweeps.tracking.delivery import deliver
from sweeps.tracking.journal import Journal, has_backlog
from sweeps.tracking.tracker import Tracker
from tests.artifacts import eventually
from tests.conftest import ROOT
from tests.records import (
    FINISHED,
    STARTED,
    check_complete,
    done,
    epoch,
    plan_of,
    run_through,
)
from tests.servers import mlflow_server, postgres


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def sweep(recorded, server):
    """Its own experiment on the server and its own folder of events."""
    if not server.process:
        server.start()
    recorded.uri = server.uri
    return recorded


def test_a_server_that_is_away_for_a_while_loses_nothing_and_delays_nothing(sweep, server):
    tracker = sweep.tracker()
    a, b = tracker.sweep.trials
    tracker.begin()
    tracker.hear(a, STARTED)
    tracker.hear(a, epoch(a, tracker.store, "caae", 1))
    eventually(lambda: tracker.undelivered == 0)
    server.stop()
    told = time.time()
    slowest = 0.0
    for _ in range(20):
        before = time.perf_counter()
        tracker.hear(a, Sampled({"system/cpu_utilization_percentage": 50.0}))
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
    eventually(lambda: tracker.undelivered == 0)
    server.stop()
    for trial in tracker.sweep.trials:
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


class Shaky:
    """A client of MLflow whose `nth` writing call fails, though MLflow has done it if `done`."""

    def __init__(self, client: MlflowClient, nth: int, done: bool):
        self.client, self.left, self.done = client, nth, done

    def __getattr__(self, name: str):
        method = getattr(self.client, name)
        return method if name.startswith(("get_", "search_")) else lambda *args, **named: self.call(method, args, named)

    def call(self, method, args, named):
        self.left -= 1
        if self.left:
            return method(*args, **named)
        if self.done:
            method(*args, **named)
        raise ConnectionError("the connection was lost")


@pytest.mark.parametrize(("nth", "done"), [(1, True), (9, False), (14, True), (21, False), (27, True), (40, False)])
def test_a_call_that_fails_in_the_middle_loses_and_doubles_nothing(recorded, nth, done):
    tracker = recorded.tracker()
    shaky = tracker._recorder.runs.client = Shaky(tracker._recorder.runs.client, nth, done)
    tracker.begin()
    for trial in tracker.sweep.trials:
        run_through(tracker, trial)
    tracker.end("FINISHED")
    assert shaky.left < 0, "it came to no failure"
    assert tracker.errors == []
    check_complete(recorded)
    for run in recorded.runs("stage").values():
        assert run.info.status == "FINISHED"
        assert run.data.params
        assert [step for step, _ in recorded.series(run, "seconds")] == [0]


def test_an_end_that_comes_late_does_not_stop_the_sweep_that_goes_on(sweep, server):
    first = sweep.tracker()
    first.begin()
    eventually(lambda: first.undelivered == 0)
    server.stop()
    first.end("KILLED", patience=1)
    server.start()
    second = sweep.tracker()
    second.begin()
    eventually(lambda: second.undelivered == 0)
    states = [(run.info.status, run.data.tags["semformer.reason"]) for run in sweep.runs("trial").values()]
    assert states == [("SCHEDULED", "")] * 2
    second.end("KILLED")


DRIVER = """
import sys, time
from pathlib import Path
from tests.records import *
tracker = Recorded(Path(sys.argv[1]), sys.argv[2]).tracker()
tracker.begin()
a, b = tracker.sweep.trials
run_through(tracker, a)
tracker.hear(b, STARTED)
tracker.hear(b, done(b, "caae"))
tracker.hear(b, epoch(b, tracker.store, "segmentor", 1))
print("told", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_a_driver_that_is_killed_leaves_its_events_to_the_next_one(recorded, seconds):
    command = [sys.executable, "-c", DRIVER, str(recorded.folder), recorded.name]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert driver.stdout.readline() == b"told\n"
        time.sleep(seconds)  # to be killed at different points of the delivery
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    tracker = recorded.tracker()
    assert not tracker.is_complete()
    tracker.begin()
    b = tracker.sweep.trials[1]
    tracker.hear(b, STARTED)
    for n in (2, 3):
        tracker.hear(b, epoch(b, tracker.store, "segmentor", n))
    for stage in ("segmentor", "cams", "evaluate"):
        tracker.hear(b, done(b, stage))
    tracker.hear(b, FINISHED)
    tracker.end("FINISHED")
    assert (tracker.errors, tracker.undelivered) == ([], 0)
    check_complete(recorded)


def test_two_drivers_with_the_same_table_make_every_run_once(sweep):
    first, second = sweep.tracker(), sweep.tracker(driver="-2")
    for tracker in (first, second):
        tracker.begin()
    for tracker in (first, second):
        for trial in tracker.sweep.trials:
            run_through(tracker, trial)
    for tracker in (first, second):
        tracker.end("FINISHED")
        assert tracker.errors == []
    check_complete(sweep)


def test_postgres_records_the_same(recorded, monkeypatch):
    monkeypatch.chdir(recorded.folder)  # where MLflow puts artifacts
    with postgres() as server:
        recorded.uri = server.uri
        tracker = recorded.tracker()
        tracker.begin()
        for trial in tracker.sweep.trials:
            run_through(tracker, trial)
        tracker.end("FINISHED")
        assert tracker.errors == []
        check_complete(recorded)


# What goes wrong on the driver's own side


def test_a_store_that_is_away_for_longer_than_the_patience_loses_nothing(sweep, monkeypatch):
    monkeypatch.setattr(delivery_file, "PATIENCE", 0.3)
    tracker = sweep.tracker()
    tracker.begin()
    eventually(lambda: tracker.undelivered == 0)

    def away(*arguments, **options):
        raise StorageUnreachable("the store is away")

    with monkeypatch.context() as outage:
        store = Store(sweep.store.root)
        outage.setattr(store, "find", away)
        outage.setattr(tracker._recorder, "store", store)
        for trial in tracker.sweep.trials:
            run_through(tracker, trial)
        time.sleep(3)
        assert tracker.undelivered > 20
    tracker.end("FINISHED")
    assert tracker.errors == []
    check_complete(sweep)


def test_an_event_that_mlflow_refuses_is_told_and_holds_up_no_other(sweep):
    tracker = sweep.tracker()
    a, b = tracker.sweep.trials
    tracker.begin()
    tracker.hear(a, STARTED)
    tracker.hear(a, Sampled({"a name that MLflow does not allow: ?*": 1.0}))
    run_through(tracker, a)
    run_through(tracker, b)
    tracker.end("FINISHED")
    assert len(tracker.errors) == 1
    assert "Invalid value" in tracker.errors[0] or "Invalid metric name" in tracker.errors[0]
    assert tracker.undelivered == 0
    check_complete(sweep)


def test_a_folder_that_cannot_be_written_to_is_told(recorded, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "sweep"
    tracker = Tracker(recorded.uri, plan_of(recorded.folder), recorded.store, recorded.name, folder=folder)
    with pytest.raises(UserError, match=r"file/sweep: a sweep keeps its events there, but: Not a directory"):
        tracker.begin()


# The journal alone


def numbers(journal: Journal) -> list[int]:
    return [event["n"] for _, event in journal.read(100)]


def test_a_journal_goes_on_where_delivery_stopped(tmp_path):
    journal = Journal(tmp_path)
    for n in range(4):
        journal.append({"n": n}, describes="even" if n % 2 == 0 else None)
    first, second = journal.read(2)
    journal.advance(second[0], 2)
    assert (numbers(journal), journal.undelivered) == ([2, 3], 2)
    journal.close()
    assert has_backlog(tmp_path)
    again = Journal(tmp_path)
    assert (first[1], numbers(again), again.undelivered) == ({"n": 0}, [2, 3], 2)
    assert again.described("even") == {"n": 2}
    assert again.described("odd") is None


def test_a_journal_belongs_to_one_process_at_a_time(tmp_path, start):
    held = Journal(tmp_path)
    code = """
from sweeps.tracking.journal import Journal
try:
    Journal(root)
except UserError as error:
    print(error)
"""
    told = start(tmp_path, code).stdout.read()
    assert f"{tmp_path}: a sweep keeps its events there, but: another process has them open" in told
    held.append({"n": 0})
    assert numbers(held) == [0]


def test_a_file_that_is_no_journal_is_told(tmp_path):
    (tmp_path / "journal.db").write_text("this is text, not a database" * 100)
    with pytest.raises(UserError, match=r"a sweep keeps its events there, but: file is not a database"):
        Journal(tmp_path)


@pytest.mark.parametrize("kilobytes_left", [0, 6])
def test_events_of_a_full_disk_are_kept_in_memory_and_in_order(small_disk, kilobytes_left, caplog):
    journal = Journal(small_disk)
    journal.append({"n": 0})
    (number, _) = journal.read(1)[0]
    stuff = small_disk / "stuff"
    fill(stuff, kilobytes_left)
    for n in range(1, 60):
        append(journal, n)
    assert "is the disk full?" in journal.trouble
    assert journal.undelivered == 60
    journal.advance(number, 1)  # delivered, though it cannot be deleted
    assert journal.undelivered == 59
    with pytest.raises(OSError, match=r"is the disk full\?"):  # rather than the first one again
        numbers(journal)
    assert caplog.text.count("Events are kept in memory") == 1  # not a line for each
    stuff.unlink()
    journal.append({"n": 60})
    assert journal.trouble == ""
    assert numbers(journal) == list(range(1, 61))
    assert journal.described("59")["n"] == 59
    journal.close()
    assert numbers(Journal(small_disk))[-60:] == list(range(1, 61))


def test_of_too_many_events_that_a_full_disk_leaves_in_memory_the_first_are_lost_and_it_is_told(
    small_disk, monkeypatch
):
    monkeypatch.setattr(journal_file, "MOST", 10)
    journal = Journal(small_disk)
    fill(small_disk / "stuff", 0)
    for n in range(10):
        append(journal, n)
    for n in range(10, 25):
        with pytest.raises(OSError, match=r"an event is lost: .*journal.db cannot be written .*is the disk full\?"):
            append(journal, n)
    (small_disk / "stuff").unlink()
    journal.append({"n": 25})
    assert numbers(journal) == list(range(15, 26))


@pytest.mark.parametrize("there_is_room_again", [True, False])
def test_a_sweep_whose_disk_is_full_is_recorded_once_there_is_room(sweep, small_disk, monkeypatch, there_is_room_again):
    monkeypatch.setattr(delivery_file, "LONGEST_WAIT", 0.1)
    tracker = Tracker(sweep.uri, plan_of(sweep.folder), sweep.store, sweep.name, folder=small_disk)
    tracker.begin()
    eventually(lambda: tracker.undelivered == 0)
    fill(small_disk / "stuff", 0)
    for n in range(200):
        tracker.tell(tracker.sweep.trials[0], Sampled({f"gpu/{n}": n}), {})
    time.sleep(1)  # the courier delivers what there was room for, and then finds nothing
    left = tracker.undelivered
    assert 0 < left <= 200
    if there_is_room_again:
        (small_disk / "stuff").unlink()
        eventually(lambda: tracker.undelivered == 0)  # though nothing more is told
        tracker.end("FINISHED")
        assert tracker.errors == []
        assert {f"gpu/{n}" for n in range(200)} <= sweep.runs("trial")["a"].data.metrics.keys()
    else:
        tracker.end("FINISHED", patience=0.5)
        (error,) = tracker.errors
        assert f"{left + 1} events are still in" in error
        assert "is the disk full?" in error


def append(journal: Journal, n: int) -> None:
    journal.append({"n": n, "text": "x" * 500}, describes=str(n))


def fill(path: Path, kilobytes_left: int) -> None:
    """Take the rest of the disk, but for so much."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 1024)
    os.truncate(path, path.stat().st_size - 1024 * kilobytes_left)


def test_a_delivered_journal_stays_small(tmp_path):
    journal = Journal(tmp_path)
    for n in range(20_000):
        journal.append({"n": n, "text": "x" * 200})
        if n % 1000 == 999:
            journal.advance(journal.read(1000)[-1][0], 1000)
    assert journal.undelivered == 0
    journal.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2e6
