"""Records of a sweep that several drivers have had, one after the other or at once."""

from mlflow import MlflowClient

from sweeps.reports import Pruned
from tests.artifacts import eventually
from tests.records import FINISHED, FOUND, STARTED, check_complete, done, epoch, run_through


def test_a_sweep_that_was_cut_short_is_continued_without_gaps_or_doubles(recorded):
    first = recorded.tracker()
    trial = first.sweep.trials[0]
    first.begin()
    first.hear(trial, STARTED)
    first.hear(trial, epoch(trial, first.store, "caae", 1))  # the report of epoch 2 is lost, and the end of the stage
    first.hear(trial, epoch(trial, first.store, "segmentor", 1))
    first.end("KILLED")
    (parent,) = recorded.runs("sweep").values()
    assert parent.info.status == "KILLED"
    runs = recorded.runs("trial")
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert {run.data.tags["semformer.status"] for run in runs.values()} == {"queued"}
    assert not recorded.tracker().is_complete()

    second = recorded.tracker()
    second.begin()
    eventually(lambda: second.undelivered == 0)
    waiting = recorded.runs("trial")["b"]
    assert (waiting.info.status, waiting.data.tags["semformer.reason"]) == ("SCHEDULED", "")
    second.hear(trial, STARTED)
    second.hear(trial, done(trial, "caae", found=True))
    for n in (2, 3):
        second.hear(trial, epoch(trial, second.store, "segmentor", n))
    for stage in ("segmentor", "cams", "evaluate"):
        second.hear(trial, done(trial, stage))
    second.hear(trial, FINISHED)
    second.hear(second.sweep.trials[1], FOUND)
    second.end("FINISHED")
    assert second.errors == []
    continued = recorded.runs("trial")
    assert {run.info.run_id for run in continued.values()} == {run.info.run_id for run in runs.values()}
    assert [step for step, _ in recorded.series(continued["a"], "caae/loss/SS")] == [1, 2]
    assert [step for step, _ in recorded.series(continued["a"], "segmentor/loss/SS")] == [1, 2, 3]
    assert continued["a"].data.tags["semformer.status"] == "finished"
    assert continued["a"].data.tags["semformer.reason"] == ""
    assert recorded.tracker().is_complete()


def test_a_pruned_trial_stays_pruned_when_its_sweep_goes_on(recorded):
    first = recorded.tracker()
    first.begin()
    first.hear(first.sweep.trials[0], STARTED)
    first.hear(first.sweep.trials[0], Pruned())
    first.end("FINISHED")
    second = recorded.tracker()
    second.begin()
    second.end("FINISHED")
    run = recorded.runs("trial")["a"]
    assert (run.info.status, run.data.tags["semformer.status"]) == ("KILLED", "pruned")


def test_the_end_of_a_driver_sets_back_its_own_trials_and_not_those_that_another_runs(recorded):
    ours, other = recorded.tracker(), recorded.tracker(driver="-2")
    ours.begin()
    (trial, _) = ours.sweep.trials
    ours.hear(trial, STARTED)
    eventually(lambda: ours.undelivered == 0)
    with recorded.store.lease(trial.keys["segmentor"]):
        other.begin()
        other.end("KILLED")
        assert recorded.runs("trial")["a"].info.status == "RUNNING"
        ours.end("KILLED")  # its processes may keep their leases for a moment
    run = recorded.runs("trial")["a"]
    assert (run.info.status, run.data.tags["semformer.status"]) == ("KILLED", "queued")


def test_of_two_runs_of_a_trial_the_finished_one_counts(recorded):
    tracker = recorded.tracker()
    tracker.begin()
    run_through(tracker, tracker.sweep.trials[0])
    tracker.end("FINISHED")
    client, run = MlflowClient(recorded.uri), recorded.runs("trial")["a"]
    tags = {name: text for name, text in run.data.tags.items() if name.startswith("semformer.")}
    for started in (1, run.info.start_time + 1000):
        client.create_run(run.info.experiment_id, start_time=started, tags=tags)
    assert recorded.tracker().is_recorded(tracker.sweep.trials[0])


def test_what_another_driver_recorded_meanwhile_is_not_recorded_again(recorded):
    one, two = recorded.tracker(), recorded.tracker(driver="-2")
    one.begin()
    eventually(lambda: one.undelivered == 0)  # it has made the runs, and knows that they are empty
    two.begin()
    for trial in two.sweep.trials:
        run_through(two, trial)
    two.end("FINISHED")
    check_complete(recorded)
    a, b = one.sweep.trials
    one.hear(a, FOUND)
    one.hear(b, STARTED)
    for stage in b.keys:
        one.hear(b, done(b, stage, found=True))
    one.hear(b, FINISHED)
    one.end("FINISHED")
    assert one.errors == []
    check_complete(recorded)
    for run in recorded.runs("trial").values():
        assert [step for step, _ in recorded.series(run, "cam/val/miou")] == [0]


def test_a_stage_that_two_drivers_made_in_turns_has_one_series(recorded):
    one, two = recorded.tracker(), recorded.tracker(driver="-2")
    a, b = one.sweep.trials
    one.begin()
    run_through(one, a)
    one.hear(b, STARTED)
    one.hear(b, done(b, "caae", found=True))
    one.hear(b, epoch(b, one.store, "segmentor", 1))
    eventually(lambda: one.undelivered == 0)
    two.begin()
    two.hear(b, STARTED)
    two.hear(b, epoch(b, two.store, "segmentor", 2))
    two.end("KILLED")
    one.hear(b, STARTED)
    one.hear(b, epoch(b, one.store, "segmentor", 3))
    for stage in ("segmentor", "cams", "evaluate"):
        one.hear(b, done(b, stage))
    one.hear(b, FINISHED)
    one.end("FINISHED")
    check_complete(recorded)


def test_epochs_that_arrive_late_are_not_doubled(recorded):
    one, two = recorded.tracker(), recorded.tracker(driver="-2")
    a, b = one.sweep.trials
    one.begin()
    one.hear(a, STARTED)
    one.hear(a, done(a, "caae"))
    for n in (1, 2):
        one.hear(a, epoch(a, one.store, "segmentor", n))
    eventually(lambda: one.undelivered == 0)
    two.begin()
    two.hear(a, FOUND)
    two.hear(b, FOUND)
    two.end("FINISHED")
    one.hear(a, epoch(a, one.store, "segmentor", 3))
    for stage in ("segmentor", "cams", "evaluate"):
        one.hear(a, done(a, stage))
    one.hear(a, FINISHED)
    one.hear(b, FOUND)
    one.end("FINISHED")
    check_complete(recorded)
