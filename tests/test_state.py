"""What `status` tells, from the reports of trials."""

import io
import json
import math
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from semformer.keys import StageKey
from sweeps.plan.table import load_table
from sweeps.plan.trials import Plan, make_plan
from sweeps.reports import (
    EpochEnded,
    Failed,
    Failure,
    Finished,
    Found,
    Progress,
    Pruned,
    Retried,
    Scope,
    StageDone,
    Started,
)
from sweeps.tracking.display import Display, grid, show_status
from sweeps.tracking.state import Snapshot, SweepState, duration
from tests.test_queue import STAGES
from tests.test_queue import trial as small_trial
from tests.workplace import table_text


@pytest.fixture
def plan(store, tmp_path):
    """Two trials that share their networks, and one that shares nothing."""
    path = tmp_path / "mine.yaml"
    path.write_text(table_text("mine", a="", b="cams.last_blocks: 1", c="caae.merge: max"))
    return make_plan([load_table(path)], "micro", {}, (0,), None, store)


@pytest.fixture
def state(plan) -> SweepState:
    return SweepState(plan)


STARTED = Started("here", 7, "0", "node-1")
VALUES = {"total": 1.2345, "CF": 0.5, "lr": 0.1, "gpu_memory": 7.0}


def epoch(n: int) -> EpochEnded:
    return EpochEnded("segmentor", 4, 4, n, 20, VALUES, images_per_second=120.4, seconds_left=8.0)


def made(trial, stage: str, seconds: float) -> StageDone:
    return StageDone(stage, trial.keys[stage].digest, found=False, seconds=seconds)


def test_a_trial_that_is_found_after_a_failure_has_no_reason_any_more():
    (one,) = trials = (small_trial("a"),)
    state = SweepState(Plan("t", "T", (), "micro", {}, (0,), trials, frozenset()))
    state.tell(one, Retried(Failure(Scope.TRIAL, "caae", "WorkerDied", "killed")))
    state.tell(one, Found(STAGES))
    assert state.trials[one.key].tags()["reason"] == ""


def test_a_trial_from_its_start_to_its_result(plan, state):
    trial = plan.trials[0]
    assert state.trials[trial.key].status == "queued"
    assert state.tell(trial, STARTED) == ""
    assert state.tell(trial, epoch(3)) == ("segmentor epoch 3/20, total 1.234 CF 0.500 120 img/s, 8.0 s left")
    told = state.trials[trial.key]
    assert (told.status, told.stage, told.epoch, told.host) == ("running", "segmentor", "3/20", "here")
    assert state.tell(trial, made(trial, "segmentor", 90)) == "segmentor made in 90 s"
    assert state.tell(trial, Finished({"cam/val/miou": 43.211, "cam/val/fp": 1.0})) == "finished, miou 43.21"
    assert state.counts()["sweep/finished"] == 1
    assert state.counts()["sweep/made_segmentor"] == 1
    assert not state.complete


def test_a_step_gets_no_line_of_its_own_so_soon(plan, state):
    trial = plan.trials[0]
    state.tell(trial, STARTED)
    assert state.tell(trial, Progress("segmentor", 3, 4, 3, 20, VALUES)) == ""
    assert state.trials[trial.key].epoch == "3/20"


def test_why_a_trial_waits(plan, state):
    a, b, c = plan.trials
    state.tell(a, STARTED)
    state.tell(a, epoch(3))
    state.explain({b.key: ("segmentor", a.key), c.key: ("", "")})
    assert state.trials[b.key].told == "waits for segmentor, which a makes, epoch 3/20"
    assert state.trials[c.key].told == "waits for a free place"
    state.explain({b.key: ("caae", a.key), c.key: ("caae", "process 7 on elsewhere")})
    assert state.trials[b.key].told == "waits for caae, which a makes"
    assert state.trials[c.key].told == "waits for caae, which process 7 on elsewhere makes"


def test_failures_and_further_tries(plan, state):
    a, b, _ = plan.trials
    failure = Failure(Scope.TRIAL, "segmentor", "WorkerDied", "it was killed")
    for trial in (a, b):
        state.tell(trial, STARTED)
    assert state.tell(a, Retried(failure)) == "tried again after segmentor: WorkerDied: it was killed"
    assert state.trials[a.key].status == "queued"
    state.tell(b, Failed(failure))
    assert (state.trials[b.key].status, state.trials[b.key].reason) == ("failed", failure.reason)
    state.tell(a, Pruned())
    assert state.trials[a.key].status == "pruned"


def test_the_time_left_is_that_of_distinct_missing_stages_over_the_workers(plan, state):
    a, b, c = plan.trials
    seconds = {"caae": 10.0, "segmentor": 20.0, "cams": 4.0, "evaluate": 2.0}
    state.tell(a, STARTED)
    state.tell(c, STARTED)
    assert math.isnan(state.left())
    for stage, each in seconds.items():
        state.tell(a, made(a, stage, each))
    assert state.left() == pytest.approx((4 + 2 + 10 + 20 + 4 + 2) / 2)  # b shares the networks of a
    state.tell(a, Finished({}))
    for trial in (b, c):
        state.tell(trial, Found(STAGES))
    assert state.left() == 0
    assert state.complete


def test_what_is_written_is_read_again(plan, state):
    a = plan.trials[0]
    state.tell(a, STARTED)
    state.tell(a, epoch(3))
    snapshot = Snapshot.read(json.loads(json.dumps(state.as_json(), allow_nan=False)))
    assert math.isnan(snapshot.left)
    assert [trial.name for trial in snapshot.trials] == ["a", "b", "c"]
    assert snapshot.trials[0] == state.trials[a.key]
    assert math.isnan(snapshot.trials[1].left)


def test_status_says_whether_anyone_drives_it(plan, state, capsys):
    def shown(driver: str, told) -> str:
        show_status(Console(width=120), "mine", driver, told)
        return capsys.readouterr().out

    assert "ended before it began" in shown("", None)
    assert "process 7 on here is starting it" in shown("process 7 on here", None)
    state.tell(plan.trials[0], STARTED)
    told = state.as_json()
    assert "driven by process 7 on here, which wrote this " in shown("process 7 on here", told)
    left = shown("", told)
    assert "nobody drives it any more; semformer-sweep resume mine" in left
    assert "interrupted; goes on from its last epoch" in left
    for trial in plan.trials:
        state.tell(trial, Finished({}))
    assert "mine: ended\n" in shown("", state.as_json())


def test_in_a_narrow_terminal_nothing_is_lost_but_the_end_of_a_line(plan, state):
    a, b, _ = plan.trials
    state.tell(a, replace(STARTED, host="machine-with-a-name"))
    state.tell(a, epoch(3))
    state.explain({b.key: ("segmentor", a.key)})
    console = Console(width=80, record=True, file=io.StringIO())
    show_status(console, "mine", "process 7 on here", state.as_json())
    shown = console.export_text()
    for told in ("│ a ", "│ b ", "machine-with-a-name", "3/20"):
        assert told in shown
    cells = [line.rpartition("│")[0].rpartition("│")[2].strip() for line in shown.splitlines()]
    assert "waits for segmentor, which a makes, epoch 3/20" in " ".join(cells)
    console.print(grid(list(state.trials.values()), 1.0, 2.0))
    live = console.export_text().splitlines()
    assert len(live) == 3 + len(plan.trials) + 2
    assert "│ a   │ running │ machine-with-a-name │ segmentor, epoch 3/20, " in "\n".join(live)


def test_more_than_thirty_trials_are_cut_to_those_that_matter(plan, state, capsys):
    record = state.as_json()
    queued, finished = record["trials"][0], {**record["trials"][0], "name": "done", "status": "finished"}
    running = {**queued, "name": "busy", "status": "running"}
    record["trials"] = [finished] * 5 + [queued] * 9995 + [running]
    show_status(Console(width=120), "mine", "process 7 on here", record)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert sum("busy" in line for line in lines) == 1
    assert not any("done" in line for line in lines)
    assert "5 of 10001 trials" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(8.44, "8.4 s"), (90, "90 s"), (840, "14 min"), (9000, "2.5 h"), (math.nan, "?")],
)
def test_durations_are_told_in_fitting_units(seconds, told):
    assert duration(seconds) == told


def test_one_record_gives_mlflow_its_tags(plan, state):
    a, b, _ = plan.trials
    record = state.trials[a.key]
    assert record.tags() == {"status": "queued", "reason": ""}
    state.tell(a, STARTED)
    state.tell(a, made(a, "caae", 1.0))
    state.tell(a, StageDone("segmentor", a.keys["segmentor"].digest, found=True))
    assert record.tags() == {
        "status": "running",
        "reason": "",
        "host": "here",
        "gpu": "0",
        "stages_found": '{"caae": false, "segmentor": true}',
    }
    state.tell(a, Retried(Failure(Scope.TRIAL, "cams", "WorkerDied", "it was killed")))
    assert record.tags()["status"] == "queued"
    assert record.tags()["reason"] == "tried again after cams: WorkerDied: it was killed"
    state.tell(a, STARTED)
    state.tell(a, Finished({}))
    assert (record.tags()["status"], record.tags()["reason"]) == ("finished", "")
    state.tell(b, Found(STAGES))
    assert state.trials[b.key].tags()["status"] == "finished"


def test_a_trial_that_runs_again_has_no_reason_any_more(state, plan):
    (trial, *_) = plan.trials
    state.tell(trial, STARTED)
    state.tell(trial, Retried(Failure(Scope.TRIAL, "caae", "WorkerDied", "killed")))
    assert state.trials[trial.key].tags()["reason"] == "tried again after caae: WorkerDied: killed"
    state.tell(trial, STARTED)
    assert state.trials[trial.key].tags()["reason"] == ""


def test_stages_that_were_there_at_the_start_are_not_in_work(plan):
    (trial, *_) = plan.trials
    state = SweepState(replace(plan, cached=frozenset([trial.keys["caae"].digest])))
    state.tell(trial, STARTED)
    assert state.in_work() == {key.digest for name, key in trial.keys.items() if name != "caae"}


def test_what_trials_held_counts_whatever_came_of_it(plan):
    now = [0.0]
    state = SweepState(plan, clock=lambda: now[0])
    a, b, _ = plan.trials
    state.tell(a, STARTED)
    now[0] = 5.0
    state.tell(a, Progress("caae", 1, 2))
    now[0] = 10.0
    state.tell(a, Retried(Failure(Scope.TRIAL, "caae", "WorkerDied", "killed")))
    now[0] = 20.0
    state.tell(a, STARTED)
    state.tell(b, STARTED)
    now[0] = 50.0
    state.tell(b, Pruned())
    assert state.held() == 10 + 30 + 30
    assert state.in_work() == {key.digest for key in a.keys.values()}
    state.tell(a, made(a, "caae", 5.0))
    assert a.keys["caae"].digest not in state.in_work()


def test_a_trial_of_many_rows_is_called_by_one(store, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(table_text("mine", **{f"r{n}": "" for n in range(15)}))
    plan = make_plan([load_table(path)], "micro", {}, (0,), None, store)
    (record,) = SweepState(plan).trials.values()
    assert record.name == "r0 + 14 rows"


def test_many_failures_for_one_reason_are_told_once(plan, state, capsys):
    for trial in plan.trials:
        state.tell(trial, Failed(Failure(Scope.STAGE, "caae", "TrainingDiverged", "too fast")))
    Display(state, Console(width=120)).summary()
    out = capsys.readouterr().out
    assert out.count("too fast") == 1
    assert "failed a and 2 more: caae: TrainingDiverged: too fast" in out


def test_the_live_table_is_drawn_by_the_thread_that_changes_the_state(plan, state):
    """Another thread would meet the records while they change."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    before = threading.active_count()
    with Display(state, console) as display:
        assert threading.active_count() == before
        for n in range(2000):
            trial = replace(plan.trials[0], keys={"evaluate": StageKey("evaluate", {"n": n})})
            display.tell(trial, state.tell(trial, STARTED))
            if n % 200 == 0:
                display.refresh()
        display.refresh()
    assert "0 of 2003 trials" in console.file.getvalue()
