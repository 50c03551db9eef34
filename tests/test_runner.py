"""Trials on a real Ray of this machine: their reports, what a slow driver costs them, a trainable of one's own."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from semformer.errors import MachineError, StoreError, UserError
from semformer.store import Store
from semformer.store.storage import StorageUnreachable
from sweeps.cluster.connect import connect
from sweeps.cluster.runner import run_trials
from sweeps.cluster.trial import reporting, scope_of
from sweeps.plan.trials import Trial
from sweeps.reports import Failed, Finished, Progress, Report, Retried, Scope, StageDone
from tests.test_queue import trial
from tests.workplace import ROOT

SHARE = {"cpu": 0.2, "gpu": 0}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def connected() -> Iterator[None]:
    """One Ray for the tests of this file."""
    with connect(None):
        yield


@pytest.fixture
def heard(connected) -> tuple[list[tuple[str, Report]], Callable[[Trial, Report], None]]:
    """What run_trials tells: tell(trial, report) appends to `reports`."""
    reports: list[tuple[str, Report]] = []

    def tell(one: Trial, report: Report) -> None:
        reports.append((one.cells[0].row, report))

    return reports, tell


def chatty(config: dict[str, Any]) -> None:
    """Shows two thousand steps, which are only to be seen, and tells how long that took."""
    with reporting(config) as reporter:
        started = time.monotonic()
        for step in range(2000):
            reporter.tell(Progress("caae", step + 1, 2000))
            time.sleep(0.001)
        took = time.monotonic() - started
        for stage, digest in config["keys"].items():
            reporter.tell(StageDone(stage, digest, found=False))
        reporter.tell(Finished({"took": took}))


def test_showing_progress_costs_a_trial_no_waiting_for_a_slow_driver(store, heard):
    reports, tell = heard

    def slow(gate) -> bool:
        time.sleep(2.0)
        return False

    run_trials([trial("a")], store, tell, share=SHARE, trainable=chatty, every_second=slow)
    (finished,) = (report for _, report in reports if isinstance(report, Finished))
    assert finished.metrics["took"] < 8.0  # two thousand waits would take minutes
    assert sum(type(report) is Progress for _, report in reports) < 20


def talking(config: dict[str, Any]) -> None:
    """Says something twice a second, for fifteen seconds."""
    with reporting(config) as reporter:
        for step in range(30):
            reporter.tell(Progress("caae", step + 1, 30))
            time.sleep(0.5)
        for stage, digest in config["keys"].items():
            reporter.tell(StageDone(stage, digest, found=False))
        reporter.tell(Finished({}))


def mute(config: dict[str, Any]) -> None:
    with reporting(config):
        time.sleep(60)


def test_a_driver_that_stalls_kills_no_trial_that_talks_meanwhile(store, heard):
    reports, tell = heard
    stalled = []

    def stall(gate) -> bool:
        if sum(bool(live.node) for live in gate.live.values()) == 3 and not stalled:
            stalled.append(len(reports))
            time.sleep(11.0)
        return False

    trials = [trial(name) for name in "abc"]
    run_trials(trials, store, tell, share=SHARE, trainable=talking, every_second=stall, silence=8.0)
    (before,) = stalled
    ends = [type(report) for _, report in reports[before:] if isinstance(report, Finished | Retried | Failed)]
    assert ends == [Finished] * 3


def test_a_trial_that_says_nothing_is_killed_and_tried_again(store, heard):
    reports, tell = heard
    run_trials([trial("a")], store, tell, share=SHARE, trainable=mute, silence=2.0)
    ends = [report for _, report in reports if isinstance(report, Retried | Failed)]
    assert [type(report) for report in ends] == [Retried, Retried, Failed]
    assert "said nothing for 2 s (--silence), and was killed" in ends[-1].failure.reason


HOLD = """
from tests.test_queue import trial
(first, *_) = trial("a").keys.values()
with Store(root).lease(first, wait=lambda holder: None):
    print("leased", flush=True)
    while not (root / "go").exists():
        time.sleep(0.1)
"""


def test_while_nothing_runs_the_driver_still_looks_about(store, start, heard):
    """All trials wait for a stage that another process has leased; Tune has nothing to do then."""
    reports, tell = heard
    assert start(store.root, HOLD).stdout.readline() == "leased\n"
    looked = []

    def look(gate) -> bool:
        looked.append(len(gate.live))
        if len(looked) == 3:
            (store.root / "go").touch()
        return False

    run_trials([trial("a")], store, tell, share=SHARE, trainable=talking, every_second=look)
    assert looked[:3] == [0, 0, 0]
    assert isinstance(reports[-1][1], Finished)


def test_a_sweep_can_be_stopped_while_nothing_runs(store, start, heard):
    reports, tell = heard
    assert start(store.root, HOLD).stdout.readline() == "leased\n"
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_trials([trial("a")], store, tell, share=SHARE, trainable=talking, every_second=lambda gate: True)
    assert time.monotonic() - began < 40
    assert reports == []


def poor_or_bad(config: dict[str, Any]) -> None:
    with reporting(config) as reporter:
        reporter.stage = "caae"
        raise UserError("the loss diverged")


def test_an_exception_reaches_the_gate_with_its_scope_and_node(store, heard):
    reports, tell = heard
    trials = [trial("a", caae="shared"), trial("b", caae="shared")]
    run_trials(trials, store, tell, share=SHARE, trainable=poor_or_bad)
    failures = {row: report.failure for row, report in reports if isinstance(report, Failed)}
    assert failures["a"].scope == Scope.STAGE
    assert failures["a"].reason == "caae: UserError: the loss diverged"
    assert failures["a"].node
    assert "Traceback" in failures["a"].traceback
    assert failures["b"].reason.endswith("(in the trial of row table/a)")


@pytest.mark.parametrize(
    ("error", "stage", "scope"),
    [
        (UserError("diverged"), "segmentor", Scope.STAGE),
        (UserError("no such folder"), "", Scope.NODE),
        (MachineError("out of memory"), "segmentor", Scope.NODE),
        (OSError(5, "Input/output error"), "cams", Scope.NODE),
        (ModuleNotFoundError("No module named 'timm'"), "", Scope.NODE),
        (MemoryError(), "caae", Scope.NODE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "caae", Scope.NODE),
        (StoreError("the disk is full"), "caae", Scope.STORE),
        (StorageUnreachable("away"), "", Scope.STORE),
        (RuntimeError("shapes do not fit"), "caae", Scope.TRIAL),
        (KeyError("x"), "", Scope.TRIAL),
    ],
)
def test_whose_fault_an_exception_is(error, stage, scope):
    assert scope_of(error, stage) == scope


def test_the_example_of_a_trainable_of_ones_own_shares_its_stages(tmp_path):
    command = [sys.executable, str(ROOT / "docs" / "own_trainable.py"), str(tmp_path / "store")]
    for made in (2, 0):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("made features") == made
        assert done.stdout.count("made evaluate") == 3 * made
        assert done.stdout.count("Finished(" if made else "Found(") == 6
