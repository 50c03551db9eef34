"""What `status` tells, from the reports of trials."""

import io
import json
import math

import pytest
from rich.console import Console

from sweeps.plan.table import load_table
from sweeps.plan.trials import make_plan
from sweeps.tracking.display import grid, show_status
from sweeps.tracking.state import Snapshot, SweepState, duration
from tests.workplace import table_text

EPOCH = {"event": "epoch", "epochs": 20, "step": 4, "steps": 4, "images_per_second": 120.4, "note": ""}


@pytest.fixture
def plan(store, tmp_path):
    """Two trials that share their networks, and one that shares nothing."""
    path = tmp_path / "mine.yaml"
    path.write_text(table_text("mine", a="", b="cams.last_blocks: 1", c="caae.merge: max"))
    return make_plan([load_table(path)], "micro", {}, (0,), None, store)


@pytest.fixture
def state(plan) -> SweepState:
    return SweepState(plan)


def epoch(n: int, stage: str = "segmentor", left: float = 8.0) -> dict:
    values = {"total": 1.2345, "CF": 0.5, "lr": 0.1, "gpu_memory": 7.0}
    return {**EPOCH, "stage": stage, "epoch": n, "seconds_left": left, "values": values}


def made(trial, stage: str, seconds: float) -> dict:
    return {"event": "stage", "stage": stage, "key": trial.keys[stage].digest, "found": False, "seconds": seconds}


def test_a_trial_from_its_start_to_its_result(plan, state):
    trial = plan.trials[0]
    assert state.trials[trial.key].status == "queued"
    assert state.tell(trial, {"event": "start", "host": "here"}) == ""
    assert state.tell(trial, epoch(3)) == ("segmentor epoch 3/20, total 1.234 CF 0.500 120 img/s, 8.0 s left")
    told = state.trials[trial.key]
    assert (told.status, told.stage, told.epoch, told.host) == ("running", "segmentor", "3/20", "here")
    assert state.tell(trial, made(trial, "segmentor", 90)) == "segmentor made in 90 s"
    result = {"event": "finished", "metrics": {"cam/val/miou": 43.211, "cam/val/fp": 1.0}}
    assert state.tell(trial, result) == "finished, miou 43.21"
    assert state.counts()["sweep/finished"] == 1
    assert state.counts()["sweep/made_segmentor"] == 1
    assert not state.complete


def test_a_step_gets_no_line_of_its_own_so_soon(plan, state):
    trial = plan.trials[0]
    state.tell(trial, {"event": "start"})
    assert state.tell(trial, {**epoch(3), "event": "progress"}) == ""
    assert state.trials[trial.key].epoch == "3/20"


def test_why_a_trial_waits(plan, state):
    a, b, c = plan.trials
    state.tell(a, {"event": "start"})
    state.tell(a, epoch(3))
    state.explain({b.key: ("segmentor", a.key), c.key: ("", "")})
    assert state.trials[b.key].told == "waits for segmentor, which a makes, epoch 3/20"
    assert state.trials[c.key].told == "waits for a free place"
    state.explain({b.key: ("caae", a.key), c.key: ("caae", "process 7 on elsewhere")})
    assert state.trials[b.key].told == "waits for caae, which a makes"
    assert state.trials[c.key].told == "waits for caae, which process 7 on elsewhere makes"


def test_failures_and_further_tries(plan, state):
    a, b, _ = plan.trials
    failure = {"stage": "segmentor", "error": "WorkerDied", "reason": "segmentor: WorkerDied: it was killed"}
    for trial in (a, b):
        state.tell(trial, {"event": "start", "host": "here"})
    assert state.tell(a, {"event": "retry", **failure}) == "tried again after segmentor: WorkerDied: it was killed"
    assert state.trials[a.key].status == "queued"
    state.tell(b, {"event": "failed", **failure})
    assert (state.trials[b.key].status, state.trials[b.key].reason) == ("failed", failure["reason"])
    state.tell(a, {"event": "pruned"})
    assert state.trials[a.key].status == "pruned"


def test_the_time_left_is_that_of_distinct_missing_stages_over_the_workers(plan, state):
    a, b, c = plan.trials
    seconds = {"caae": 10.0, "segmentor": 20.0, "cams": 4.0, "evaluate": 2.0}
    state.tell(a, {"event": "start"})
    state.tell(c, {"event": "start"})
    assert math.isnan(state.left())
    for stage, each in seconds.items():
        state.tell(a, made(a, stage, each))
    assert state.left() == pytest.approx((4 + 2 + 10 + 20 + 4 + 2) / 2)  # b shares the networks of a
    state.tell(a, {"event": "finished", "metrics": {}})
    for trial in (b, c):
        state.tell(trial, {"event": "found"})
    assert state.left() == 0
    assert state.complete


def test_what_is_written_is_read_again(plan, state):
    a = plan.trials[0]
    state.tell(a, {"event": "start", "host": "here"})
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
    state.tell(plan.trials[0], {"event": "start"})
    told = state.as_json()
    assert "driven by process 7 on here, which wrote this " in shown("process 7 on here", told)
    left = shown("", told)
    assert "nobody drives it any more; semformer-sweep resume mine" in left
    assert "interrupted; goes on from its last epoch" in left
    for trial in plan.trials:
        state.tell(trial, {"event": "finished", "metrics": {}})
    assert "mine: ended\n" in shown("", state.as_json())


def test_in_a_narrow_terminal_nothing_is_lost_but_the_end_of_a_line(plan, state):
    a, b, _ = plan.trials
    state.tell(a, {"event": "start", "host": "machine-with-a-name"})
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
