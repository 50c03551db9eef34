"""The gate, driven as the runner drives it; stages are published by hand, time is told."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from semformer.errors import StoreError
from semformer.keys import StageKey
from semformer.store import Store
from semformer.store.storage import StorageUnreachable
from sweeps.plan.trials import Trial
from sweeps.reports import Failure, Finished, Found, Raised, Scope, StageDone, Started
from sweeps.schedule import gate as gate_module
from sweeps.schedule.faults import Faults, Places
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

    def finds(self, runner_id: str, stage: str) -> None:
        key = self.gate.live[runner_id].trial.keys[stage]
        self.gate.hear(runner_id, StageDone(stage, key.digest, found=True))

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


def chain(name: str, caae: str) -> Trial:
    """A trial whose keys tell their inputs, on a shared CAAE."""
    keys: dict[str, StageKey] = {}
    for stage in STAGES:
        inputs = {before: key.digest for before, key in list(keys.items())[-1:]}
        keys[stage] = StageKey(stage, {"name": name if keys else caae, "inputs": inputs})
    return replace(trial(name), keys=keys)


def test_what_is_in_the_store_needs_nothing_before_it(store):
    """b's segmentation network is there, its CAAE is not: it waits for nobody who makes that."""
    a, b = chain("a", "shared"), chain("b", "shared")
    publish(store, b.keys["segmentor"])
    sweep = Sweep([a, b], store, published={b.keys["segmentor"].digest})
    assert [sweep.start() for _ in range(2)] == ["a", "b"]
    assert sweep.gate.live["2"].claims == {b.keys["cams"].digest, b.keys["evaluate"].digest}


def test_a_trial_whose_last_stage_is_there_is_found_with_what_is_there(store):
    a = chain("a", "gone")
    for stage in ("segmentor", "evaluate"):
        publish(store, a.keys[stage])
    told = []
    sweep = Sweep([a], store, tell=lambda trial, report: told.append(report))
    assert sweep.start() == FINISHED
    assert told == [Found(("segmentor", "evaluate"))]


def test_a_broken_stage_fails_only_those_for_which_it_must_be_made(store):
    a, b = chain("a", "bad"), chain("b", "bad")
    publish(store, b.keys["segmentor"])
    sweep = Sweep([a, b], store, published={b.keys["segmentor"].digest}, room=lambda: 1)
    assert sweep.start() == "a"
    sweep.fails("1", "caae", Scope.STAGE)
    assert [(row, event) for row, event, _ in sweep.heard] == [("a", "Failed")]
    assert sweep.start() == "b"


def test_nodes_that_failed_on_a_stage_are_avoided_only_where_that_must_be_made(store):
    a, b = chain("a", "shared"), chain("b", "shared")
    publish(store, a.keys["segmentor"])
    sweep = Sweep([b, a], store, published={a.keys["segmentor"].digest}, room=lambda: 1)
    for n, node in enumerate(sweep.nodes, 1):
        assert sweep.start() == "b"
        sweep.works(str(n), node)
        sweep.fails(str(n), "caae", Scope.NODE, node=node)
    assert sweep.start() == "a"
    assert ("a", "Failed") not in [(row, event) for row, event, _ in sweep.heard]


def test_a_stage_that_cannot_be_read_and_that_nothing_needs_disturbs_nothing(store, monkeypatch):
    a, told = chain("a", "shared"), []
    for key in a.keys.values():
        publish(store, key)
    real = store.find

    def forbidden(key, **options):
        if key.stage == "caae":
            raise StoreError("Permission denied")
        return real(key, **options)

    monkeypatch.setattr(store, "find", forbidden)
    sweep = Sweep([a], store, tell=lambda trial, report: told.append(report))
    assert sweep.start() == FINISHED
    assert told == [Found(("segmentor", "cams", "evaluate"))]


def test_what_was_published_and_has_gone_is_made(store):
    a, b = chain("a", "shared"), chain("b", "shared")
    sweep = Sweep([a, b], store, published={key.digest for key in [*a.keys.values(), *b.keys.values()]})
    assert [sweep.start() for _ in range(2)] == ["a", None]
    assert len(sweep.gate.live["1"].claims) == len(STAGES)
    sweep.finishes("1")
    assert sweep.start() == "b"


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


def test_a_stage_that_another_sweep_makes_is_looked_up_again_after_an_error(store, monkeypatch):
    sweep = Sweep([trial("a")], store)
    with Store(store.root).lease(trial("a").keys["caae"]):
        assert sweep.start() is None
        sweep.now += 10
        with monkeypatch.context() as away:
            away.setattr(store, "holder", raise_away)
            assert sweep.start() is None
        assert "the store is away" in sweep.gate.trouble
    sweep.now += 10
    assert sweep.start() == "a"


def raise_away(*arguments, **options):
    raise StorageUnreachable("the store is away")


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


def test_outages_of_a_database_are_not_added_up(store):
    away, suggestions = [True], [trial("b"), trial("a")]

    def more():
        if away:
            raise ConnectionError("away")
        return suggestions.pop() if suggestions else None

    sweep = Sweep([], store, more=more)
    assert sweep.start() is None
    away.clear()
    assert sweep.start() == "a"
    sweep.finishes("1")
    away.append(True)
    sweep.now += 61
    assert sweep.start() is None
    away.clear()
    assert sweep.start() == "b"


def test_a_search_is_not_given_up_while_a_trial_works(store):
    suggestions = [trial("a")]

    def more():
        if not suggestions:
            raise ConnectionError("the database is away")
        return suggestions.pop()

    sweep = Sweep([], store, more=more)
    assert sweep.start() == "a"
    sweep.works("1")
    assert sweep.start() is None
    sweep.now += 1000
    assert sweep.start() is None
    assert sweep.gate.over is None
    sweep.finishes("1")
    assert sweep.start() == FINISHED


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
