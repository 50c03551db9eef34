"""A study that several drivers have, one after the other or at once, and that outlives them."""

import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from semformer.data.shapes import make_shapes
from semformer.errors import UserError
from sweeps.search import study as study_file
from tests.searches import finish, open_search, run_all, states

ROOT = Path(__file__).parents[1]


def test_a_study_goes_on_where_it_was_with_other_suggestions(search):
    first = search("sigma", trials=3)
    run_all(first)
    first.close()
    again = search("sigma", trials=3)
    assert again.ask() is None
    again.close()
    more = search("sigma", trials=7)
    assert len(run_all(more)) == 4
    assert len({trial.params["sigma"] for trial in more.study.trials}) == 7


@pytest.mark.parametrize(
    ("axes", "changes", "told"),
    [
        (["sigma", "U"], {}, "axes.U"),
        (["sigma=0.05:0.3"], {}, "axes.sigma segmentor.sigma 0.025:0.225:log -> segmentor.sigma 0.05:0.3"),
        (["sigma"], {"objectives": ["gpu_hours"]}, "objectives"),
        (["sigma"], {"overrides": {"caae.epochs": 3}}, "config.caae.epochs 2 -> 3"),
        (["sigma"], {"preset": "tiny"}, "preset micro -> tiny"),
    ],
)
def test_a_study_that_was_begun_with_something_else_says_what_differs(search, axes, changes, told):
    search("sigma").close()
    with pytest.raises(UserError, match="--study study") as error:
        search(*axes, **changes)
    assert told in str(error.value)


def test_a_study_of_another_data_set_is_refused(search, store, tmp_path):
    search("sigma").close()
    other = make_shapes(tmp_path / "other", train=16, val=6, size=48, seed=1)
    with pytest.raises(UserError, match=r"images\.train"):
        open_search(other, store, tmp_path / "studies.db", "sigma")


@pytest.fixture
def driver(shapes, store, tmp_path):
    """Start a process that runs the given code with `one`, a search over sigma on the study of `search`."""
    head = f"""
from pathlib import Path
from semformer.store import Store
from tests.searches import finish, open_search, run_all
store = Store(Path({str(store.root)!r}), heartbeat=0.05, expiry=20)
one = open_search(Path({str(shapes)!r}), store, Path({str(tmp_path)!r}) / "studies.db", "sigma", trials=6)
"""
    processes = []

    def driver(code: str) -> subprocess.Popen:
        command = [sys.executable, "-c", head + code]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield driver
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_trials_of_a_killed_driver_are_closed_and_run_again(search, driver, tmp_path):
    alive = search("sigma", trials=6)
    ours = alive.ask()
    code = "finish(one, one.ask()); one.ask(); one.ask(); print('ready', flush=True); import time; time.sleep(60)"
    killed = driver(code)
    assert killed.stdout.readline() == "ready\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    resumed = search("sigma", trials=6)
    assert states(resumed.study) == {"RUNNING": 1, "COMPLETE": 1, "FAIL": 2, "WAITING": 2}
    lost = [trial.params for trial in resumed.study.trials if trial.state == TrialState.FAIL]
    ran = run_all(resumed)
    assert [trial.config.segmentor.sigma for trial in ran[:2]] == [params["sigma"] for params in lost]
    finish(alive, ours)
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db")
    assert states(study) == {"COMPLETE": 6, "FAIL": 2}
    assert study.best_value == resumed.best()[0].value


def test_a_stopped_search_puts_its_running_trials_back(search):
    one = search("sigma", trials=3)
    asked = one.ask()
    one.close()
    again = search("sigma", trials=3)
    assert again.ask().config == asked.config
    assert states(again.study) == {"FAIL": 1, "RUNNING": 1}


def test_a_driver_that_dies_while_it_puts_a_trial_back_puts_it_back_once(search, monkeypatch):
    one = search("sigma", trials=2)
    one.ask()
    with monkeypatch.context() as broken:
        broken.setattr(one.study, "tell", raise_away)
        with pytest.raises(ConnectionError):
            one.close()
    again = search("sigma", trials=2)
    assert [trial.user_attrs.get("retry_of") for trial in again.study.trials] == [None, 0]


def raise_away(*arguments, **options):
    raise ConnectionError("the database is away")


def test_drivers_that_share_a_study_run_each_trial_once_and_none_too_many(driver, tmp_path):
    code = "print(*(trial.cells[0].row for trial in run_all(one))); one.close()"
    drivers = [driver(code) for _ in range(2)]
    rows = [row for process in drivers for row in process.communicate(timeout=120)[0].split()]
    assert sorted(rows) == [f"trial-{number}" for number in range(6)]
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db")
    assert states(study) == {"COMPLETE": 6}
    assert len({trial.params["sigma"] for trial in study.trials}) == 6


def test_time_counts_whatever_came_of_it_and_across_drivers(search, monkeypatch):
    monkeypatch.setattr(study_file, "HELD_EVERY", 0.0)
    one = search("sigma", trials=9)
    assert one.spent(0.0) == 0.0
    one.ask()
    assert [one.spent(held) for held in (60.0, 120.0)] == [60.0, 120.0]
    one.close(150.0)
    again = search("sigma", trials=9)
    assert again.spent(0.0) == 150.0
    assert again.spent(30.0) == 180.0
