"""The gate, driven as the runner drives it; stages are published by hand, time is told."""

import shutil
import time
from collections.abc import Sequence

import pytest

from semformer.errors import StoreError
from semformer.keys import StageKey
from semformer.store import Store
from sweeps.plan.trials import Trial
from sweeps.reports import EpochEnded, Failure, Finished, Raised, Scope, StageDone, Started
from sweeps.schedule import gate as gate_module
from sweeps.schedule.faults import LOSSES, Faults, Places
from sweeps.schedule.gate import Gate
from tests.test_queue import STAGES, trial

FINISHED = "finished"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store", patience=0.0)


class Sweep:
    """What the runner does with a gate, and what is heard of it. Nodes are "n1" ... of `nodes`."""

    def __init__(self, trials: Sequence[Trial], store: Store, *, nodes=("n1", "n2"), may_grow=False, **options):
        self.store, self.heard, self.n, self.now = store, [], 0, 0.0
        self.nodes, self.may_grow = list(nodes), may_grow
        self.faults = Faults(
            lambda: Places({node: f"node {node}" for node in self.nodes}, self.may_grow),
            patience=60.0,
            clock=lambda: self.now,
        )
        options = {"tell": self.tell, "clock": lambda: self.now, **options}
        self.gate = Gate(trials, store, faults=self.faults, **options)

    def tell(self, trial, report):
        failure = getattr(report, "failure", None)
        self.heard.append((trial.cells[0].row, type(report).__name__, failure.reason if failure else ""))

    def start(self) -> str | None:
        """The row of the trial that starts, FINISHED, or None. The runner's ids are "1", "2" ... in this order."""
        chosen = self.gate.next(str(self.n + 1))
        if chosen is None:
            return FINISHED if self.gate.finished else None
        self.n += 1
        return chosen.cells[0].row

    def works(self, runner_id: str, node: str = "n1") -> None:
        self.gate.hear(runner_id, Started("host", 1, node=node))

    def makes(self, runner_id: str, *stages: str) -> None:
        for stage in stages:
            key = self.gate.live[runner_id].trial.keys[stage]
            publish(self.store, key)
            self.gate.hear(runner_id, StageDone(stage, key.digest, found=False, seconds=1.0))

    def finishes(self, runner_id: str) -> None:
        self.makes(runner_id, *STAGES)
        self.gate.hear(runner_id, Finished({"cam/val/miou": 50.0}))
        self.gate.ended(runner_id)

    def fails(self, runner_id: str, stage: str, scope: Scope, node: str = "n1", error: str = "Oops") -> None:
        self.gate.hear(runner_id, Raised(Failure(scope, stage, error, f"it broke on {node}", node=node)))
        self.gate.ended(runner_id, lambda: "its exception was raised")

    def dies(self, runner_id: str) -> None:
        self.gate.ended(runner_id, lambda: "it was killed")


def publish(store: Store, key: StageKey) -> None:
    if store.find(key) is None:
        store.publish(key, store.workspace(key), {})


def test_a_shared_stage_is_made_by_one_trial_while_the_others_are_held_back(store):
    sweep = Sweep([trial(name, caae="shared") for name in "abc"], store)
    assert sweep.start() == "a"
    assert [sweep.start() for _ in range(3)] == [None] * 3
    sweep.makes("1", "caae")
    assert [sweep.start(), sweep.start(), sweep.start()] == ["b", "c", None]
    for runner_id in "123":
        sweep.finishes(runner_id)
    assert sweep.start() == FINISHED
    assert sweep.heard == []


def test_trials_without_common_stages_start_at_once_past_held_back_ones(store):
    trials = [trial("a", caae="x"), trial("b", caae="x"), trial("c", caae="y"), trial("d", caae="y")]
    sweep = Sweep(trials, store)
    assert [sweep.start() for _ in range(3)] == ["a", "c", None]
    sweep.makes("2", "caae")
    assert [sweep.start() for _ in range(2)] == ["d", None]


def test_a_stage_that_appears_in_the_store_needs_no_report(store):
    trials = [trial("a", caae="x", segmentor="y"), trial("b", caae="x", segmentor="y")]
    for key in list(trials[0].keys.values())[:2]:
        publish(store, key)
    sweep = Sweep(trials, store)
    assert [sweep.start() for _ in range(2)] == ["a", "b"]
    assert {len(live.claims) for live in sweep.gate.live.values()} == {2}


def test_a_sweep_is_finished_only_when_nothing_lives(store):
    sweep = Sweep([trial("a")], store)
    assert sweep.start() == "a"
    assert sweep.start() is None
    sweep.finishes("1")
    assert sweep.start() == FINISHED
    assert Sweep([], store).start() == FINISHED


def test_no_more_run_than_there_is_room_for_at_the_time(store):
    room = [2]
    sweep = Sweep([trial(name) for name in "abcd"], store, room=lambda: room[0])
    assert [sweep.start() for _ in range(3)] == ["a", "b", None]
    room[0] = 3
    assert [sweep.start() for _ in range(2)] == ["c", None]
    sweep.finishes("1")
    assert [sweep.start() for _ in range(2)] == ["d", None]


def test_a_stage_that_another_sweep_makes_is_waited_for_without_starting(store):
    trials = [trial("a", caae="x"), trial("b")]
    sweep = Sweep(trials, store)
    other = Store(store.root)
    with other.lease(trials[0].keys["caae"]):
        assert [sweep.start() for _ in range(2)] == ["b", None]
        stage, holder = sweep.gate.waiting()[trials[0].key]
        assert (stage, holder[:8]) == ("caae", "process ")
        sweep.finishes("1")
        sweep.now += 10
        assert sweep.start() is None
    assert sweep.start() is None  # looked up again only after a while
    sweep.now += 10
    assert sweep.start() == "a"


def test_all_stages_that_others_make_are_looked_up_again_however_slow_the_store_is(store):
    """One look takes longer than the pause after which it is repeated."""
    trials = [trial(name) for name in "abcdefghijklmnop"]
    sweep = Sweep(trials, store)
    other = Store(store.root)
    leases = [other.lease(one.keys["caae"]) for one in trials]
    assert sweep.start() is None
    assert {stage for stage, _ in sweep.gate.waiting().values()} == {"caae"}
    for lease in leases:
        lease.release()
    quick = sweep.gate.store.holder

    def look(key):
        sweep.now += 2 * gate_module.LOOK_AGAIN
        time.sleep(0.05)
        return quick(key)

    sweep.gate.store.holder = look
    sweep.now += 10
    started = set()
    for _ in range(200):
        if row := sweep.start():
            started.add(row)
    assert started == set("abcdefghijklmnop")


def test_a_trial_whose_stages_are_all_there_by_now_is_not_started(store):
    sweep = Sweep([trial("a"), trial("b")], store, room=lambda: 1)
    assert sweep.start() == "a"
    assert sweep.gate.waiting() == {trial("b").key: ("", "")}
    for stage in STAGES:
        publish(store, trial("b").keys[stage])
    sweep.finishes("1")
    assert sweep.start() == FINISHED
    assert sweep.heard == [("b", "Found", "")]


def test_a_trial_that_a_scheduler_stopped_is_pruned(store):
    sweep = Sweep([trial("a")], store)
    assert sweep.start() == "a"
    sweep.makes("1", "caae")
    sweep.gate.ended("1")
    assert sweep.heard == [("a", "Pruned", "")]


# Searches


def test_a_search_is_asked_for_more_only_while_nothing_known_may_start(store):
    asked = []

    def more():
        if len(asked) == 5:
            return None
        name = f"trial-{len(asked)}"
        asked.append(trial(name, caae="shared") if len(asked) < 3 else trial(name))
        return asked[-1]

    sweep = Sweep([], store, more=more, ahead=lambda: 3)
    assert sweep.start() == "trial-0"
    assert sweep.start() == "trial-3"  # 1 and 2 are held back for the shared stage
    assert len(asked) == 4
    sweep.makes("1", "caae")
    assert [sweep.start() for _ in range(3)] == ["trial-1", "trial-2", "trial-4"]
    assert sweep.start() is None
    for n in range(1, 6):
        sweep.finishes(str(n))
    assert sweep.start() == FINISHED


def test_how_many_are_held_back_follows_what_the_cluster_has(store):
    shared = (trial(f"t{n}", caae="shared") for n in range(100))
    ahead = [1]
    sweep = Sweep([], store, more=lambda: next(shared), ahead=lambda: ahead[0])
    assert [sweep.start() for _ in range(3)] == ["t0", None, None]
    assert len(sweep.gate.queue) == 1
    ahead[0] = 8
    assert sweep.start() is None
    assert len(sweep.gate.queue) == 8


def test_a_suggestion_with_a_broken_stage_is_not_tried_at_all(store):
    suggestions = [trial("a", caae="bad"), trial("b", caae="bad"), trial("c")]
    sweep = Sweep([], store, more=lambda: suggestions.pop(0) if suggestions else None)
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.STAGE)
    assert sweep.start() == "c"
    assert [(row, event) for row, event, _ in sweep.heard] == [("a", "Failed"), ("b", "Failed")]
    assert sweep.heard[1][2] == "caae: Oops: it broke on n1 (in the trial of row table/a)"


def test_a_search_whose_suggestions_fail_for_long_ends_with_the_reason(store):
    def more():
        raise ConnectionError("the database is away")

    sweep = Sweep([], store, more=more)
    assert sweep.start() is None
    assert sweep.gate.trouble == "ConnectionError: the database is away"
    sweep.now += 59
    assert sweep.start() is None
    sweep.now += 2
    assert sweep.start() == FINISHED
    assert sweep.gate.trouble.startswith("ConnectionError: the database is away")


def test_a_search_goes_on_when_its_database_is_back_in_time(store):
    away, suggestions = [True], [trial("a")]

    def more():
        if away:
            raise ConnectionError("away")
        return suggestions.pop() if suggestions else None

    sweep = Sweep([], store, more=more)
    assert sweep.start() is None
    sweep.now += 30
    away.clear()
    assert sweep.start() == "a"
    assert sweep.gate.trouble == ""
    sweep.finishes("1")
    assert sweep.start() == FINISHED


# Faults of stages and of attempts


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


# Faults of nodes


def test_a_node_that_lacks_something_is_kept_from_all_work_and_fails_no_row(store):
    sweep = Sweep([trial("a", caae="x"), trial("b", caae="x"), trial("c")], store)
    assert [sweep.start(), sweep.start()] == ["a", "c"]
    sweep.fails("1", "", Scope.NODE, "n1")
    assert sweep.faults.avoided_by(trial("c")) == {}  # once may be chance
    sweep.fails("2", "", Scope.NODE, "n1")
    assert [(row, event) for row, event, _ in sweep.heard] == [("a", "Retried"), ("c", "Retried")]
    assert sweep.faults.avoided_by(trial("c")) == {"n1": "node n1: Oops: it broke on n1"}
    assert {sweep.start(), sweep.start()} == {"a", "c"}
    for n in ("3", "4"):
        sweep.works(n, "n2")
        sweep.finishes(n)
    assert sweep.start() == "b"


def test_a_stage_that_does_not_fit_a_node_is_tried_on_another_which_takes_other_work_still(store):
    sweep = Sweep([trial("a"), trial("b")], store)
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.NODE, "n1")
    assert list(sweep.faults.avoided_by(trial("a"))) == ["n1"]
    assert sweep.faults.avoided_by(trial("b")) == {}
    sweep.start()
    sweep.fails("2", "caae", Scope.NODE, "n2")
    row, event, reason = sweep.heard[-1]
    assert (row, event) == ("a", "Failed")
    assert reason == "caae: Oops: node n1: it broke on n1; node n2: it broke on n2"
    assert sweep.start() == "b"


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


def test_a_node_that_makes_stages_between_failures_stays(store):
    sweep = Sweep([trial(name) for name in "abcdefgh"], store, nodes=["n1", "n2", "n3"])
    for n in range(1, 6):
        assert sweep.start()
        sweep.works(str(n), "n1")
        sweep.makes(str(n), "caae")
        sweep.fails(str(n), "segmentor", Scope.NODE, "n1")
    assert sweep.faults.unfit == {}


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
    for n in "12":
        assert sweep.start() == "c"
        sweep.fails(n, "", Scope.NODE, "n1")
    assert sweep.start() == "c"
    sweep.now += 61
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


# Faults of the store


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
    from semformer.storage import StorageUnreachable

    sweep = Sweep([trial("a"), trial("b")], store)
    with monkeypatch.context() as away:

        def find(key, verify=True):
            raise StorageUnreachable("away")

        away.setattr(sweep.gate.store, "find", find)
        assert sweep.start() is None
    sweep.now += 6
    assert [sweep.start(), sweep.start()] == ["a", "b"]
    assert issubclass(StorageUnreachable, StoreError)


# Nothing may raise


def test_a_listener_that_raises_disturbs_nothing(store):
    def tell(trial, report):
        raise RuntimeError("listener")

    sweep = Sweep([trial("a", caae="x"), trial("b", caae="x"), trial("c")], store, tell=tell)
    sweep.start()
    sweep.fails("1", "caae", Scope.STAGE)
    assert [sweep.start(), sweep.start()] == ["c", None]


def test_reports_of_unknown_trials_are_ignored(store):
    sweep = Sweep([trial("a")], store)
    sweep.gate.hear("stranger", Finished({}))
    sweep.dies("stranger")
    assert sweep.start() == "a"


def test_a_stopped_gate_starts_nothing_more(store):
    sweep = Sweep([trial("a"), trial("b")], store)
    sweep.start()
    sweep.gate.stop()
    assert sweep.start() is None
    sweep.finishes("1")
    assert sweep.start() == FINISHED


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
