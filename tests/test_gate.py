"""The gate, driven as Tune drives it; stages are published by hand."""

import shutil
from collections.abc import Sequence

import pytest
from ray.tune.search import Searcher

from semformer.config import load_config
from semformer.keys import StageKey
from semformer.store import Store
from sweeps.plan.trials import Cell, Trial
from sweeps.schedule.gate import Gate

CONFIG = load_config("micro")
STAGES = ("caae", "segmentor", "cams", "evaluate")


def trial(name: str, **named: str) -> Trial:
    """A trial whose stages have the given names, and elsewhere its own."""
    keys = {stage: StageKey(stage, {"name": named.get(stage, name)}) for stage in STAGES}
    return Trial(CONFIG, None, "", keys, (Cell("table", name, 0),))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


class Sweep:
    """What Tune does with a gate, and what is heard of it."""

    def __init__(self, trials: Sequence[Trial], store: Store, **options):
        self.store, self.heard, self.n = store, [], 0
        options = {"tell": self.tell, **options}
        self.gate = Gate(trials, store, lambda t: {"row": t.cells[0].row}, **options)

    def tell(self, trial, report):
        self.heard.append((trial.cells[0].row, report["event"], report.get("reason", "")))

    def suggest(self) -> str | None:
        """The row of the trial that starts, "FINISHED", or None. Tune's ids are "1", "2" ... in this order."""
        suggestion = self.gate.suggest(str(self.n + 1))
        self.n += isinstance(suggestion, dict)
        return suggestion["row"] if isinstance(suggestion, dict) else suggestion

    def makes(self, trial_id: str, *stages: str) -> None:
        for stage in stages:
            key = self.gate.live[trial_id].keys[stage]
            publish(self.store, key)
            self.gate.on_trial_result(trial_id, {"event": "stage", "stage": stage, "key": key.digest, "found": False})

    def finishes(self, trial_id: str) -> None:
        self.makes(trial_id, *STAGES)
        self.gate.on_trial_result(trial_id, {"event": "finished", "metrics/cam/val/miou": 50.0})
        self.gate.on_trial_complete(trial_id, {"done": True})

    def fails(self, trial_id: str, stage: str, *, final: bool) -> None:
        report = {
            "event": "failed",
            "stage": stage,
            "error": "Oops",
            "message": "it broke",
            "traceback": "",
            "final": final,
        }
        self.gate.on_trial_result(trial_id, {**report, "training_iteration": 3})
        self.gate.on_trial_complete(trial_id, error=True)

    def dies(self, trial_id: str) -> None:
        self.gate.on_trial_complete(trial_id, error=True)


def publish(store: Store, key: StageKey) -> None:
    if store.find(key) is None:
        store.publish(key, store.workspace(key), {})


def test_a_shared_stage_is_made_by_one_trial_while_the_others_are_held_back(store):
    sweep = Sweep([trial(name, caae="shared") for name in "abc"], store)
    assert sweep.suggest() == "a"
    assert [sweep.suggest() for _ in range(3)] == [None] * 3
    sweep.makes("1", "caae")
    assert [sweep.suggest(), sweep.suggest(), sweep.suggest()] == ["b", "c", None]
    for trial_id in "123":
        sweep.finishes(trial_id)
    assert sweep.suggest() == Searcher.FINISHED
    assert sweep.heard == []


def test_trials_without_common_stages_start_at_once_past_held_back_ones(store):
    trials = [trial("a", caae="x"), trial("b", caae="x"), trial("c", caae="y"), trial("d", caae="y")]
    sweep = Sweep(trials, store)
    assert [sweep.suggest() for _ in range(3)] == ["a", "c", None]
    sweep.makes("2", "caae")
    assert [sweep.suggest() for _ in range(2)] == ["d", None]


def test_a_stage_that_appears_in_the_store_needs_no_report(store):
    trials = [trial("a", caae="x", segmentor="y"), trial("b", caae="x", segmentor="y")]
    for key in list(trials[0].keys.values())[:2]:
        publish(store, key)
    sweep = Sweep(trials, store)
    assert [sweep.suggest() for _ in range(2)] == ["a", "b"]
    assert set(sweep.gate.claims.values()) == {"1", "2"}


def test_a_sweep_is_finished_only_when_nothing_lives(store):
    sweep = Sweep([trial("a")], store)
    assert sweep.suggest() == "a"
    assert sweep.suggest() is None
    sweep.finishes("1")
    assert sweep.suggest() == Searcher.FINISHED
    assert Sweep([], store).suggest() == Searcher.FINISHED


def test_max_concurrent_is_kept(store):
    sweep = Sweep([trial(name) for name in "abc"], store, max_concurrent=2)
    assert [sweep.suggest() for _ in range(3)] == ["a", "b", None]
    sweep.finishes("1")
    assert [sweep.suggest() for _ in range(2)] == ["c", None]


def test_a_stage_that_another_sweep_makes_is_waited_for_without_starting(store, monkeypatch):
    monkeypatch.setattr("sweeps.schedule.gate.LOOK_AGAIN", 0.0)
    trials = [trial("a", caae="x"), trial("b")]
    sweep = Sweep(trials, store)
    with Store(store.root).lease(trials[0].keys["caae"]):
        assert [sweep.suggest() for _ in range(2)] == ["b", None]
        sweep.finishes("1")
        assert sweep.suggest() is None
    assert sweep.suggest() == "a"


def test_claims_of_a_trial_that_tune_has_lost_do_not_block_for_ever(store):
    sweep = Sweep([trial(name, caae="shared") for name in "ab"], store)
    assert [sweep.suggest(), sweep.suggest()] == ["a", None]
    sweep.gate.live.clear()
    assert sweep.suggest() == "b"


def test_builders_of_the_most_wanted_stages_go_first_then_the_longest(store):
    base = {"caae": "base"}
    trials = [
        trial("short", caae="short"),
        trial("leaf", **base, segmentor="leaf"),
        trial("base", **base, segmentor="base"),
        trial("long", caae="long"),
        trial("inference", **base, segmentor="base"),
    ]
    hours = {trials[3].keys["caae"].digest: 9.0}
    sweep = Sweep(trials, store, seconds=lambda key: hours.get(key.digest, 1.0))
    assert [sweep.suggest() for _ in range(4)] == ["base", "long", "short", None]
    waits = sweep.gate.waiting()
    assert waits == {trials[1].key: ("caae", trials[2].key), trials[4].key: ("caae", trials[2].key)}
    sweep.makes("1", "caae")
    assert [sweep.suggest(), sweep.suggest()] == ["leaf", None]
    assert sweep.gate.waiting() == {trials[4].key: ("segmentor", trials[2].key)}


def test_a_trial_whose_stages_are_all_there_by_now_is_not_started(store):
    sweep = Sweep([trial("a"), trial("b")], store, max_concurrent=1)
    assert sweep.suggest() == "a"
    assert sweep.gate.waiting() == {trial("b").key: ("", "")}
    for stage in STAGES:
        publish(store, trial("b").keys[stage])
    sweep.finishes("1")
    assert sweep.suggest() == Searcher.FINISHED
    assert sweep.heard == [("b", "found", "")]


def test_a_search_is_asked_for_more_only_while_nothing_known_may_start(store):
    asked = []

    def more():
        if len(asked) == 5:
            return None
        name = f"trial-{len(asked)}"
        asked.append(trial(name, caae="shared") if len(asked) < 3 else trial(name))
        return asked[-1]

    sweep = Sweep([], store, more=more, ahead=3)
    assert sweep.suggest() == "trial-0"
    assert sweep.suggest() == "trial-3"  # 1 and 2 are held back for the shared stage
    assert len(asked) == 4
    sweep.makes("1", "caae")
    assert [sweep.suggest() for _ in range(3)] == ["trial-1", "trial-2", "trial-4"]
    assert sweep.suggest() is None
    for n in range(1, 6):
        sweep.finishes(str(n))
    assert sweep.suggest() == Searcher.FINISHED


# Failures


def test_a_dead_worker_is_tried_again_before_its_dependents(store):
    sweep = Sweep(
        [trial(name, caae="shared") for name in "ab"], store, explain=lambda trial_id: f"{trial_id} was killed"
    )
    assert sweep.suggest() == "a"
    sweep.dies("1")
    assert [sweep.suggest(), sweep.suggest()] == ["a", None]
    sweep.finishes("2")
    assert sweep.suggest() == "b"
    assert sweep.heard == [("a", "retry", "caae: WorkerDied: 1 was killed")]


def test_a_worker_that_dies_after_it_got_further_costs_no_try(store):
    sweep = Sweep([trial("a")], store)
    for n, epoch in enumerate([3, 5, 6], start=1):
        assert sweep.suggest() == "a"
        sweep.gate.on_trial_result(str(n), {"event": "epoch", "stage": "caae", "epoch": epoch})
        sweep.dies(str(n))
    for n in (4, 5):
        assert sweep.suggest() == "a"
        sweep.gate.on_trial_result(str(n), {"event": "epoch", "stage": "caae", "epoch": 6})
        sweep.dies(str(n))
    assert [event for _, event, _ in sweep.heard] == ["retry"] * 4 + ["failed"]


def test_retries_are_counted_by_stage(store):
    sweep = Sweep([trial("a")], store)
    sweep.suggest()
    sweep.dies("1")
    sweep.suggest()
    sweep.makes("2", "caae")
    sweep.fails("2", "segmentor", final=False)
    sweep.suggest()
    sweep.fails("3", "segmentor", final=False)
    assert sweep.suggest() == Searcher.FINISHED
    assert [event for _, event, _ in sweep.heard] == ["retry", "retry", "failed"]


def test_a_stage_that_keeps_failing_fails_all_who_need_it_and_nobody_else(store):
    sweep = Sweep([trial("a", caae="shared"), trial("b", caae="shared"), trial("c")], store)
    assert [sweep.suggest(), sweep.suggest()] == ["a", "c"]
    sweep.fails("1", "caae", final=False)
    assert sweep.suggest() == "a"
    sweep.fails("3", "caae", final=False)
    reason = "caae: Oops: it broke"
    assert sweep.heard == [
        ("a", "retry", reason),
        ("a", "failed", reason),
        ("b", "failed", f"{reason} (in the trial of row table/a)"),
    ]
    assert sweep.suggest() is None
    sweep.finishes("2")
    assert sweep.suggest() == Searcher.FINISHED


def test_a_final_failure_is_not_tried_again_and_fails_its_dependents_at_once(store):
    shared = {"caae": "x", "segmentor": "y"}
    sweep = Sweep([trial("a", **shared), trial("b", **shared), trial("c", caae="x")], store)
    assert sweep.suggest() == "a"
    sweep.makes("1", "caae")
    assert [sweep.suggest(), sweep.suggest()] == ["c", None]
    sweep.fails("1", "segmentor", final=True)
    assert [(row, event) for row, event, _ in sweep.heard] == [("a", "failed"), ("b", "failed")]
    assert sweep.suggest() is None
    sweep.finishes("2")
    assert sweep.suggest() == Searcher.FINISHED


# Nothing may raise


def test_an_unusable_store_is_survived_and_given_up_after_a_while(store):
    sweep = Sweep([trial("a"), trial("b")], store, patience=0.2)
    saved = store.root.rename(store.root.with_name("saved"))
    store.root.write_text("a file where the store should be")
    assert sweep.suggest() is None
    store.root.unlink()
    saved.rename(store.root)
    assert sweep.suggest() == "a"

    sweep.finishes("1")
    shutil.rmtree(store.root)
    store.root.write_text("")
    for _ in range(1000):
        if sweep.suggest() == Searcher.FINISHED:
            break
    else:
        pytest.fail("the gate never gave up")
    ((row, event, reason),) = sweep.heard
    assert (row, event) == ("b", "failed")
    assert str(store.root) in reason


def test_a_listener_that_raises_disturbs_nothing(store):
    def tell(trial, report):
        raise RuntimeError("listener")

    sweep = Sweep([trial("a", caae="x"), trial("b", caae="x"), trial("c")], store, tell=tell)
    sweep.suggest()
    sweep.fails("1", "caae", final=True)
    assert [sweep.suggest(), sweep.suggest()] == ["c", None]


def test_reports_of_unknown_trials_are_ignored(store):
    sweep = Sweep([trial("a")], store)
    sweep.gate.on_trial_result("stranger", {"training_iteration": 1})
    sweep.gate.on_trial_complete("stranger", error=True)
    assert sweep.suggest() == "a"


def test_a_stopped_gate_starts_nothing_more(store):
    sweep = Sweep([trial("a"), trial("b")], store)
    sweep.suggest()
    sweep.gate.stop()
    assert sweep.suggest() is None
    sweep.finishes("1")
    assert sweep.suggest() == Searcher.FINISHED
