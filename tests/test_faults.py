"""Whose fault a failure is and what follows from it, through the gate as the runner drives it."""

import shutil

import pytest

from semformer.errors import StoreError
from semformer.store import Store
from sweeps.reports import EpochEnded, Failure, Scope
from sweeps.schedule.faults import LOSSES, Faults, Places
from tests.test_gate import FINISHED, Sweep, publish
from tests.test_queue import STAGES, trial


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", patience=0.0)


# Of stages and of attempts


def test_a_dead_worker_is_tried_again_before_its_dependents(store):
    sweep = Sweep([trial(name, caae="shared") for name in "ab"], store)
    assert sweep.start() == "a"
    sweep.works("1")
    sweep.dies("1")
    assert [sweep.start(), sweep.start()] == ["a", None]
    sweep.finishes("2")
    assert sweep.start() == "b"
    assert sweep.heard == [("a", "Retried", "caae: WorkerDied: it was killed")]


@pytest.mark.parametrize("stage", STAGES)
def test_two_deaths_in_any_stage_are_survived_a_third_is_not(store, stage):
    sweep = Sweep([trial("a")], store)
    before = STAGES[: STAGES.index(stage)]
    for n in ("1", "2", "3"):
        assert sweep.start() == "a"
        sweep.works(n)
        sweep.makes(n, *before)
        sweep.dies(n)
    assert [event for _, event, _ in sweep.heard] == ["Retried", "Retried", "Failed"]


def test_a_worker_that_dies_after_it_got_further_costs_no_try(store):
    sweep = Sweep([trial("a")], store)
    for n, epoch in enumerate([3, 5, 6, 7, 8], start=1):
        assert sweep.start() == "a"
        sweep.works(str(n))
        sweep.gate.hear(str(n), EpochEnded("caae", 1, 1, epoch, 9))
        sweep.dies(str(n))
    for n in (6, 7):
        assert sweep.start() == "a"
        sweep.works(str(n))
        sweep.gate.hear(str(n), EpochEnded("caae", 1, 1, 8, 9))
        sweep.dies(str(n))
    assert [event for _, event, _ in sweep.heard] == ["Retried"] * 6 + ["Failed"]


def test_a_node_that_goes_away_costs_no_try(store):
    sweep = Sweep([trial("a")], store)
    for n in range(1, 8):
        sweep.nodes = [f"spot-{n}"]
        assert sweep.start() == "a"
        sweep.works(str(n), f"spot-{n}")
        sweep.nodes = []
        sweep.dies(str(n))
    assert [event for _, event, _ in sweep.heard] == ["Retried"] * 7


def test_nodes_that_go_away_are_counted_while_a_stage_gets_no_further(store):
    sweep = Sweep([trial("a")], store)
    for n in range(1, 3 * LOSSES):
        sweep.nodes = [f"spot-{n}"]
        assert sweep.start() == "a"
        sweep.works(str(n), f"spot-{n}")
        sweep.gate.hear(str(n), EpochEnded("caae", 1, 1, 1 + n // (LOSSES - 1), 9))
        sweep.nodes = []
        sweep.dies(str(n))
    assert {event for _, event, _ in sweep.heard} == {"Retried"}


def test_tries_are_counted_by_stage(store):
    sweep = Sweep([trial("a")], store)
    for n in ("1", "2"):
        sweep.start()
        sweep.dies(n)
    sweep.start()
    sweep.makes("3", "caae")
    sweep.fails("3", "segmentor", Scope.TRIAL)
    sweep.start()
    sweep.fails("4", "segmentor", Scope.TRIAL)
    sweep.start()
    sweep.fails("5", "segmentor", Scope.TRIAL)
    assert sweep.start() == FINISHED
    assert [event for _, event, _ in sweep.heard] == ["Retried"] * 4 + ["Failed"]


def test_a_stage_that_cannot_be_made_fails_all_who_need_it_at_once_and_nobody_else(store):
    shared = {"caae": "x", "segmentor": "y"}
    sweep = Sweep([trial("a", **shared), trial("b", **shared), trial("c", caae="x")], store)
    assert sweep.start() == "a"
    sweep.makes("1", "caae")
    assert [sweep.start(), sweep.start()] == ["c", None]
    sweep.fails("1", "segmentor", Scope.STAGE)
    reason = "segmentor: Oops: it broke on n1"
    assert sweep.heard == [("a", "Failed", reason), ("b", "Failed", f"{reason} (in the trial of row table/a)")]
    assert sweep.start() is None
    sweep.finishes("2")
    assert sweep.start() == FINISHED


# Of nodes


def test_a_node_that_lacks_something_is_kept_from_all_work_and_fails_no_row(store):
    sweep = Sweep([trial("a", caae="x"), trial("b", caae="x"), trial("c")], store)
    assert [sweep.start(), sweep.start()] == ["a", "c"]
    sweep.fails("1", "", Scope.NODE, "n1")
    assert sweep.gate.avoided_by(trial("c")) == {}  # once may be chance
    sweep.fails("2", "", Scope.NODE, "n1")
    assert [(row, event) for row, event, _ in sweep.heard] == [("a", "Retried"), ("c", "Retried")]
    assert sweep.gate.avoided_by(trial("c")) == {"n1": "node n1: Oops: it broke on n1"}
    assert {sweep.start(), sweep.start()} == {"a", "c"}
    for n in ("3", "4"):
        sweep.works(n, "n2")
        sweep.finishes(n)
    assert sweep.start() == "b"


def test_a_stage_that_does_not_fit_a_node_is_tried_on_another_which_takes_other_work_still(store):
    sweep = Sweep([trial("a"), trial("b")], store)
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.NODE, "n1")
    assert list(sweep.gate.avoided_by(trial("a"))) == ["n1"]
    assert sweep.gate.avoided_by(trial("b")) == {}
    sweep.start()
    sweep.fails("2", "caae", Scope.NODE, "n2")
    row, event, reason = sweep.heard[-1]
    assert (row, event) == ("a", "Failed")
    assert reason == "caae: Oops: node n1: it broke on n1; node n2: it broke on n2"
    assert sweep.start() == "b"


def test_a_node_that_went_away_is_not_avoided_by_anybody(store):
    sweep = Sweep([trial("a")], store)
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.NODE, "n1")
    sweep.nodes = ["n2"]
    assert sweep.start() == "a"


def test_a_stage_that_was_made_elsewhere_keeps_nobody_from_the_node_where_it_failed(store):
    sweep = Sweep([trial("a", caae="x"), trial("b", caae="x")], store)
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.NODE, "n1")
    assert list(sweep.gate.avoided_by(trial("b", caae="x"))) == ["n1"]
    assert sweep.start() == "a"
    sweep.works("2", "n2")
    sweep.makes("2", "caae")
    assert sweep.gate.avoided_by(trial("b", caae="x")) == {}


def test_on_a_single_machine_a_stage_that_does_not_fit_fails_at_once(store):
    sweep = Sweep([trial("a", caae="x"), trial("b", caae="x")], store, nodes=["n1"])
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.NODE, "n1")
    assert [event for _, event, _ in sweep.heard] == ["Failed", "Failed"]
    assert sweep.start() == FINISHED


def test_a_node_on_which_several_stages_fail_gets_no_more_work(store):
    """A broken GPU is always free, and would take one trial after the other."""
    sweep = Sweep([trial(name) for name in "abcdefgh"], store)
    assert [sweep.start() for _ in range(3)] == ["a", "b", "c"]
    for n in "123":
        sweep.fails(n, "caae", Scope.NODE, "n1", error="AcceleratorError")
    assert list(sweep.faults.unfit) == ["n1"]
    assert {event for _, event, _ in sweep.heard} == {"Retried"}


def test_a_single_machine_on_which_stages_fail_goes_on_with_the_others(store):
    sweep = Sweep([trial(name) for name in "abcd"], store, nodes=["n1"])
    for n, row in zip("123", "abc", strict=True):
        assert sweep.start() == row
        sweep.works(n, "n1")
        sweep.fails(n, "caae", Scope.NODE, "n1")
    assert sweep.start() == "d"
    sweep.finishes("4")
    assert [(row, event) for row, event, _ in sweep.heard] == [(row, "Failed") for row in "abc"]


def test_a_node_that_makes_stages_between_failures_stays(store):
    sweep = Sweep([trial(name) for name in "abcdefgh"], store, nodes=["n1", "n2", "n3"])
    for n in range(1, 6):
        assert sweep.start()
        sweep.works(str(n), "n1")
        sweep.makes(str(n), "caae")
        sweep.fails(str(n), "segmentor", Scope.NODE, "n1")
    assert sweep.faults.unfit == {}


def test_a_node_that_only_finds_stages_between_failures_gets_no_more_work(store):
    sweep = Sweep([trial(name, caae="shared") for name in "abc"], store, nodes=["n1", "n2", "n3"])
    publish(store, trial("a", caae="shared").keys["caae"])
    assert [sweep.start() for _ in range(3)] == ["a", "b", "c"]
    for n in "123":
        sweep.works(n, "n1")
        sweep.finds(n, "caae")
        sweep.fails(n, "segmentor", Scope.NODE, "n1", error="AcceleratorError")
    assert list(sweep.faults.unfit) == ["n1"]


def test_a_stage_that_no_other_fit_node_can_try_fails_at_once(store):
    sweep = Sweep([trial("a")], store)
    sweep.faults.node_is_unfit("n2", "it has no data")
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.NODE, "n1")
    assert sweep.heard == [("a", "Failed", "caae: Oops: it broke on n1")]


def test_an_unfit_node_is_told_once():
    told = []
    faults = Faults(lambda: Places({"n1": "node n1"}), patience=60.0, unfit=told.append)
    for why in ("it has no data", "it has other code"):
        faults.node_is_unfit("n1", why)
    assert told == ["it has no data"]


def test_where_no_node_is_fit_the_sweep_ends_and_names_them(store):
    sweep = Sweep([trial("a"), trial("b")], store)
    for n, node in (("1", "n1"), ("2", "n2"), ("3", "n1"), ("4", "n2")):
        assert sweep.start()
        sweep.fails(n, "", Scope.NODE, node)
    assert sweep.start() == FINISHED
    failed = [reason for _, event, reason in sweep.heard if event == "Failed"]
    assert len(failed) == 2
    assert all("no node can run this sweep: node n1: Oops" in told and "node n2: Oops" in told for told in failed)


def test_a_cluster_that_grows_is_asked_for_another_node_and_given_up_after_a_while(store):
    sweep = Sweep([trial("a"), trial("b")], store, nodes=["n1"], may_grow=True)
    for n in "12":
        assert sweep.start() == "a"
        sweep.fails(n, "", Scope.NODE, "n1")
    assert sweep.start() == "a"  # it avoids n1, and so asks for another
    assert sweep.start() is None
    sweep.nodes.append("n2")
    assert sweep.start() == "b"
    for n in "34":
        sweep.works(n, "n2")
        sweep.finishes(n)
    assert sweep.start() == FINISHED

    sweep = Sweep([trial("c"), trial("d")], store, nodes=["n1"], may_grow=True)
    sweep.now = 1000.0
    for n in "12":
        assert sweep.start() == "c"
        sweep.fails(n, "", Scope.NODE, "n1")
    assert sweep.start() == "c"
    sweep.now += 30
    assert sweep.start() is None
    assert sweep.gate.over is None
    sweep.now += 31
    assert sweep.start() == FINISHED
    assert [(row, event) for row, event, _ in sweep.heard[2:]] == [("d", "Failed"), ("c", "Failed")]


def test_a_cluster_that_had_fit_nodes_meanwhile_is_not_given_up(store):
    sweep = Sweep([trial("a"), trial("b")], store, nodes=["n1", "n2"], may_grow=True, room=lambda: 1)
    for n in "12":
        assert sweep.start() == "a"
        sweep.fails(n, "", Scope.NODE, "n1")
    for _ in range(5):
        sweep.now += 40
        sweep.start()
    sweep.nodes = []  # spot machines went
    sweep.now += 40
    sweep.start()
    assert [event for _, event, _ in sweep.heard] == ["Retried", "Retried"]


def test_a_node_that_has_a_hiccup_before_a_first_stage_stays(store):
    sweep = Sweep([trial("a"), trial("b"), trial("c")], store, nodes=["n1"])
    for n in range(3):
        assert sweep.start()
        sweep.fails(f"{2 * n + 1}", "", Scope.NODE, "n1", error="OSError")
        assert sweep.start()
        sweep.works(f"{2 * n + 2}", "n1")
        sweep.finishes(f"{2 * n + 2}")
    assert sweep.start() == FINISHED
    assert {event for _, event, _ in sweep.heard} == {"Retried"}


def test_processes_that_die_before_they_tell_where_they_are_count_as_lost_nodes(store):
    sweep = Sweep([trial("a")], store)
    for n in range(1, LOSSES):
        assert sweep.start() == "a"
        sweep.dies(str(n))
    assert {event for _, event, _ in sweep.heard} == {"Retried"}
    assert sweep.start() == "a"
    sweep.dies(str(LOSSES))
    assert sweep.heard[-1] == ("a", "Failed", "caae: WorkerDied: it was killed")


def test_a_lost_place_is_waited_for_while_others_run(store):
    """The only node that may take `a` has gone; it is not started where it is known to fail."""
    sweep = Sweep([trial("a"), trial("b")], store, may_grow=True)
    assert [sweep.start(), sweep.start()] == ["a", "b"]
    sweep.works("2", "n1")
    sweep.fails("1", "caae", Scope.NODE, "n1")
    sweep.nodes = ["n1"]
    assert sweep.start() is None
    sweep.nodes = ["n1", "n3"]
    assert sweep.start() == "a"


# Of the store


def test_a_store_that_fails_is_tried_by_one_trial_at_a_time(store):
    sweep = Sweep([trial(name) for name in "abc"], store)
    assert [sweep.start(), sweep.start()] == ["a", "b"]
    sweep.fails("1", "caae", Scope.STORE, error="StoreError")
    assert sweep.start() is None
    assert sweep.gate.waiting()[trial("a").key] == ("", "waits for the store: it broke on n1")
    sweep.now += 6
    assert [sweep.start(), sweep.start()] == ["a", None]
    sweep.works("3")
    sweep.makes("3", "caae")
    assert sweep.start() == "c"
    assert [event for _, event, _ in sweep.heard] == ["Retried"]


def test_a_store_that_stays_away_ends_the_sweep_with_its_reason(store):
    sweep = Sweep([trial("a"), trial("b")], store, room=lambda: 1)
    n = 0
    for _ in range(20):
        if (row := sweep.start()) == FINISHED:
            break
        if row:
            n += 1
            sweep.fails(str(n), "caae", Scope.STORE, error="StoreError")
        sweep.now += 10
    else:
        pytest.fail("the gate never gave up")
    assert 1 < n < 6
    assert [event for _, event, _ in sweep.heard] == ["Retried"] * n + ["Failed"] * 2
    assert sweep.heard[-1][2] == "caae: StoreError: it broke on n1"


@pytest.mark.parametrize("end", ["finishes", "dies"])
def test_what_runs_when_a_sweep_is_given_up_goes_on_to_its_end_and_is_not_tried_again(store, end):
    sweep = Sweep([trial("a"), trial("b"), trial("c")], store, room=lambda: 2)
    assert sweep.start() == "a"
    sweep.works("1")
    n = 1
    while sweep.gate.over is None:
        if sweep.start():
            n += 1
            sweep.fails(str(n), "caae", Scope.STORE, error="StoreError")
        sweep.now += 10
        assert sweep.now < 300
    assert list(sweep.gate.live) == ["1"]
    assert sweep.start() is None
    getattr(sweep, end)("1")
    assert sweep.start() == FINISHED
    ended = {row: event for row, event, _ in sweep.heard}
    assert ended == {"b": "Failed", "c": "Failed"} | ({} if end == "finishes" else {"a": "Failed"})


def test_an_unusable_store_is_survived_and_given_up_after_a_while(store):
    sweep = Sweep([trial("a"), trial("b")], store)
    saved = store.root.rename(store.root.with_name("saved"))
    store.root.write_text("a file where the store should be")
    assert sweep.start() is None
    assert "NotADirectoryError" in sweep.gate.trouble or str(store.root) in sweep.gate.trouble
    store.root.unlink()
    saved.rename(store.root)
    sweep.now += 6
    assert sweep.start() == "a"

    sweep.finishes("1")
    shutil.rmtree(store.root)
    store.root.write_text("")
    for _ in range(100):
        sweep.now += 10
        if sweep.start() == FINISHED:
            break
    else:
        pytest.fail("the gate never gave up")
    ((row, event, reason),) = sweep.heard
    assert (row, event) == ("b", "Failed")
    assert str(store.root) in reason


def test_a_store_that_can_be_read_again_needs_no_trial_to_try_it(store, monkeypatch):
    from semformer.store.storage import StorageUnreachable

    sweep = Sweep([trial("a"), trial("b")], store)
    with monkeypatch.context() as away:

        def find(key, verify=True):
            raise StorageUnreachable("away")

        away.setattr(sweep.gate.store, "find", find)
        assert sweep.start() is None
    sweep.now += 6
    assert [sweep.start(), sweep.start()] == ["a", "b"]
    assert issubclass(StorageUnreachable, StoreError)


def test_an_outage_lasts_until_its_latest_failure():
    """One failure long ago is no outage while a trial works on; one that goes on for the patience is given up."""
    now = 0.0
    faults = Faults(lambda: Places({"n": "a node"}), patience=60.0, clock=lambda: now)
    full = Failure(Scope.STORE, "caae", "StoreError", "full")
    faults.store_failed(full)
    now = 500.0
    assert faults.hopeless() is None
    faults.store_failed(full)
    assert faults.hopeless() == full


def test_a_ray_that_has_lost_all_its_nodes_is_given_up_after_a_while():
    now, living = 0.0, {"n": "this machine"}
    faults = Faults(lambda: Places(living), patience=60.0, clock=lambda: now)
    assert faults.hopeless() is None
    living, now = {}, 50.0
    assert faults.hopeless() is None  # a raylet may come back
    living, now = {"n": "this machine"}, 55.0
    assert faults.hopeless() is None
    living, now = {}, 110.0
    assert faults.hopeless() is None
    now = 116.0
    assert "Ray has lost all its nodes" in faults.hopeless().message


def test_a_growing_cluster_may_have_no_node_for_long():
    now = 0.0
    faults = Faults(lambda: Places({}, may_grow=True), patience=60.0, clock=lambda: now)
    now = 1000.0
    assert faults.hopeless() is None
