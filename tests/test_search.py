"""A search: what it asks and tells, and what it leaves behind."""

from collections import Counter
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.trial import TrialState
from PIL import Image
from safetensors.torch import load_file

from semformer import pipeline
from semformer.config import load_config
from semformer.errors import UserError
from semformer.stages import segmentor
from semformer.store import Store
from sweeps.plan.table import load_table, resolve
from sweeps.reports import Found
from sweeps.search.algorithms import Named, Pruning
from sweeps.search.report import write
from tests.searches import finish, run_all, scores, states
from tests.servers import postgres

INFERENCE = ("U", "final_map", "thresholds")


# Asking and telling


def test_the_first_trial_is_the_preset_and_the_search_gets_better(search):
    one = search("sigma", "U", "decoder_depth", trials=30)
    first = one.ask()
    assert first.config == load_config("micro")
    assert first.rows == ("study/trial-0",)
    finish(one, first)
    run_all(one)
    assert states(one.study) == {"COMPLETE": 30}
    best = one.best()[0]
    assert scores(first.config)["cam/val/miou"] == pytest.approx(67.9375)
    assert best.value > 70  # the highest is 72
    assert {"trial_key", "stage_keys", "missing", "stage_seconds", "metrics", "driver"} <= best.user_attrs.keys()


def test_twenty_trials_of_inference_axes_need_one_network_of_each_kind(search):
    one = search(*INFERENCE, trials=20)
    trials = run_all(one)
    assert len({trial.keys["caae"] for trial in trials}) == 1
    assert len({trial.keys["segmentor"] for trial in trials}) == 1
    assert len({trial.key for trial in trials}) == len(trials) > 10
    assert all(trial.config.evaluate.rule == "fixed" for trial in trials)
    assert one.saving()["trials_inference_only"] == 19


def test_what_the_store_has_is_told_without_a_run_and_the_saving_is_exact(search):
    heard = []
    one = search("U=3:4", trials=6, found=lambda trial, report: heard.append((trial.key, report)))
    ran = run_all(one)
    assert [trial.config.cams.last_blocks for trial in ran] == [4, 3]
    assert states(one.study) == {"COMPLETE": 6}
    assert len(heard) == 4
    assert set(heard) == {(trial.key, Found(tuple(trial.keys))) for trial in ran}
    assert one.saving() == {
        "spent_seconds": 100 + 200 + 2 * (10 + 5),
        "unshared_seconds": 6 * (100 + 200 + 10 + 5),
        "trials_inference_only": 5,
    }
    assert one.reached() == {key.digest for trial in ran for key in trial.keys.values()}


def test_a_stage_that_several_trials_lacked_when_they_were_asked_was_spent_once(search):
    one = search("U=3:4", trials=6)
    asked = [one.ask(), one.ask()]
    for trial in asked:
        finish(one, trial)
    assert one.saving()["spent_seconds"] == 100 + 200 + 2 * (10 + 5)


def test_a_suggestion_that_is_being_run_waits_for_that_run(search):
    one = search("U=3:4", trials=6)
    running = [one.ask(), one.ask()]
    while one.ask() is not None:
        pytest.fail("there are only two configs")
    assert states(one.study) == {"RUNNING": 6}
    for trial in running:
        finish(one, trial)
    assert states(one.study) == {"COMPLETE": 6}


def test_failed_and_stopped_trials_count_and_keep_their_reason(search):
    one = search("sigma", trials=3)
    failed, stopped, done = one.ask(), one.ask(), one.ask()
    one.tell(failed, None, "segmentor: TrainingDiverged: the loss diverged")
    one.report(stopped, 1, {"cam/val/miou": 12.5, "cam/val/fp": 30.0})
    one.report(stopped, 2, {"cam/val/fp": 20.0})
    one.tell(stopped, None, "stopped by the scheduler", pruned=True)
    finish(one, done)
    assert one.ask() is None
    first, second, _ = one.study.trials
    assert states(one.study) == {"FAIL": 1, "PRUNED": 1, "COMPLETE": 1}
    assert first.user_attrs["reason"].startswith("segmentor: TrainingDiverged")
    assert second.intermediate_values == {1: 12.5}


def test_values_that_make_no_config_together_fail_at_once_with_the_reason(search):
    one = search("caae.decoder_width=24:27", trials=10)
    for trial in run_all(one):
        assert trial.config.caae.decoder_width % 2 == 0
    failed = [trial for trial in one.study.trials if trial.state == TrialState.FAIL]
    assert failed
    assert all("no multiple of the 2 heads" in trial.user_attrs["reason"] for trial in failed)


# A database that is away


def test_results_are_kept_while_the_database_is_away_and_told_when_it_is_back(search):
    with postgres() as server:
        one = search("sigma", trials=4, storage=server.uri)
        first, second, third = one.ask(), one.ask(), one.ask()
        server.stop()
        for key in first.keys.values():
            one.store.publish(key, one.store.workspace(key), {"seconds": 1.0, "metrics": scores(first.config)})
        one.tell(first, scores(first.config))
        one.tell(second, None, "segmentor: TrainingDiverged")
        assert one.untold == 2
        with pytest.raises(optuna.exceptions.StorageInternalError):
            one.ask()
        server.start()
        one.tell(third, None, pruned=True)
        assert one.untold == 0
        assert states(one.study) == {"COMPLETE": 1, "FAIL": 1, "PRUNED": 1}
        assert one.ask() is not None
        one.close()


# Samplers, and what stops poor trials


@pytest.mark.parametrize("sampler", ["random", "tpe:n_startup_trials=2,multivariate=true", "qmc", "nsgaii"])
def test_a_sampler_of_optuna_is_chosen_by_name_with_options(search, sampler):
    one = search("sigma", "U", trials=4, sampler=Named.read("--sampler", sampler))
    assert type(one.study.sampler).__name__.lower().startswith(sampler.partition(":")[0])
    run_all(one)
    assert states(one.study) == {"COMPLETE": 4}


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ("tpi", "did you mean tpe"),
        ("tpe:n_startup=3", "unknown option 'n_startup': there are .*, n_startup_trials, "),
        ("tpe:3", "write NAME:OPTION=VALUE"),
        ("tpe:n_startup_trials=2020-13-45", "the value of n_startup_trials cannot be read: 2020-13-45"),
        ("tpe:gamma=3", "--sampler tpe cannot search this: 'int' object is not callable"),
        ("nsgaii:population_size=1", "--sampler nsgaii: ValueError: `population_size`"),
    ],
)
def test_samplers_that_cannot_search_are_refused_at_once(search, sampler, told):
    with pytest.raises(UserError, match=told):
        search("sigma", trials=4, sampler=Named.read("--sampler", sampler))


def test_a_sampler_for_one_objective_is_refused_for_several(search):
    with pytest.raises(UserError, match="--sampler cma_es"):
        search("sigma", objectives=["cam/val/miou", "gpu_hours"], sampler=Named.read("--sampler", "cma_es"))


def pruning(text: str) -> Pruning:
    return Pruning(Named.read("--scheduler", text))


@pytest.mark.parametrize(("objective", "mode"), [("cam/val/miou", "max"), ("cam/val/fp", "min"), ("cam/val/fn", "min")])
def test_a_scheduler_of_tune_ranks_by_the_objective_in_its_direction(search, objective, mode):
    one = search("sigma", objectives=[objective], pruning=pruning("asha:grace_period=1,reduction_factor=2"))
    asha = one.scheduler()
    kept = {}
    for name, score in {"a": 60.0, "b": 5.0, "c": 61.0, "d": 4.0}.items():
        trial = SimpleNamespace(trial_id=name, status="RUNNING")
        asha.on_trial_add(None, trial)
        kept[name] = asha.on_trial_result(None, trial, {"epoch": 1, objective: score, "training_iteration": 9})
    assert kept["d"] == ("STOP" if mode == "max" else "CONTINUE")
    assert kept["c"] == ("CONTINUE" if mode == "max" else "STOP")


def test_a_sampler_that_has_suggested_everything_ends_the_search(search):
    one = search("U=1:4", trials=10, sampler=Named.read("--sampler", "brute_force"))
    asked = []
    while trial := one.ask():
        asked.append(trial.config.cams.last_blocks)
        finish(one, trial)
    assert sorted(asked) == [1, 2, 3, 4]
    assert [trial.state.name for trial in one.study.trials] == ["COMPLETE"] * len(one.study.trials)


@pytest.mark.parametrize(
    ("objectives", "told"),
    [(["gpu_hours"], "gpu_hours is not known before a trial has ended"), (["cam/val/miou", "gpu_hours"], "several")],
)
@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_a_scheduler_is_refused_where_no_probe_measures_the_objective(search, objectives, told, name):
    with pytest.raises(UserError, match=f"--scheduler: .*{told}"):
        search("sigma", objectives=objectives, pruning=pruning(name))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ashe", "did you mean asha"),
        ("pbt", "there are asha, hyperband"),
        ("asha:grace=3", "unknown option 'grace': there are .*, grace_period, "),
        ("asha:metric=foo", "unknown option 'metric': there are "),
        ("asha:mode=min", "unknown option 'mode'"),
        ("asha:grace_period=[1", "the value of grace_period cannot be read"),
        ("median_stopping", "there are asha, hyperband"),
        ("percentile:percentile=400", "--scheduler percentile: ValueError"),
    ],
)
def test_unknown_schedulers_are_refused_at_once(search, name, told):
    with pytest.raises(UserError, match=told):
        search("sigma", pruning=pruning(name))


@pytest.mark.parametrize(("objective", "poor"), [("cam/val/miou", 1.0), ("cam/val/fp", 99.0)])
def test_a_pruner_of_optuna_stops_what_it_would(search, objective, poor):
    one = search("sigma", trials=6, objectives=[objective], pruning=pruning("median:n_startup_trials=2"))
    for _ in range(2):
        good = one.ask()
        one.report(good, 1, {objective: 50.0})
        finish(one, good)
    bad = one.ask()
    assert one.should_stop(bad.key, poor, 1)
    assert not one.should_stop(one.ask().key, 50.0, 1)
    assert one.study.trials[2].intermediate_values == {1: poor}


# As a sweep


def test_what_a_search_may_need_is_told_by_its_start_and_the_ends_of_its_axes(search):
    one = search("sigma=0.05:0.4", "caae.class_dim=4:16", "merge")
    configs = [trial.config for trial in one.samples]
    assert configs[0] == one.own
    assert {config.caae.class_dim for config in configs} == {4, 8, 16}
    assert {config.segmentor.sigma for config in configs} == {0.05, 0.075, 0.4}
    assert {config.caae.merge for config in configs} == {"sum", "mean", "max"}


# What is left behind


def test_the_best_config_is_a_table_that_resolves_to_its_trial(search, tmp_path):
    one = search("losses", "sigma", "caae_lr", "thresholds", trials=8, overrides={"caae.epochs": "3"})
    run_all(one)
    table = load_table(write(one, tmp_path / "report")[0])
    best = one.best()[0]
    assert [row.id for row in table.rows] == ["start", f"trial-{best.number}"]
    keys = [pipeline.stage_keys(resolve(table, row, "micro", {}, 0), one.data)["evaluate"].digest for row in table.rows]
    assert keys == [one.start_key, best.user_attrs["trial_key"]]


def test_several_objectives_end_with_the_pareto_front(search, tmp_path):
    one = search("U=3:4", "decoder_depth=3:4", trials=12, objectives=["cam/val/miou", "gpu_hours"])
    run_all(one)
    assert isinstance(one.study.sampler, optuna.samplers.NSGAIISampler)
    front = {(trial.params["U"], trial.params["decoder_depth"]): trial.values for trial in one.best()}
    assert front[4, 4] == [pytest.approx(scores(one.own)["cam/val/miou"]), pytest.approx(315 / 3600)]
    assert front.keys() <= {(4, 4), (4, 3)}
    files = write(one, tmp_path / "report")
    assert [file.name for file in files] == ["best.yaml", "history.png", "importances.png", "pareto_front.png"]
    for file in files[1:]:
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 10


def test_a_report_holds_what_there_is_enough_for(search, tmp_path):
    one = search("sigma", trials=1)
    assert write(one, tmp_path / "report") == []
    run_all(one)
    assert [file.name for file in write(one, tmp_path / "report")] == ["best.yaml", "history.png"]
    assert [row.id for row in load_table(tmp_path / "report" / "best.yaml").rows] == ["start"]


def test_the_best_of_another_seed_can_be_run(search, tmp_path):
    one = search("sigma", trials=3, overrides={"seed": "3"})
    run_all(one)
    write(one, tmp_path)
    table = load_table(tmp_path / "best.yaml")
    assert table.source.endswith("--preset micro --seeds 3")
    keys = pipeline.stage_keys(resolve(table, table.rows[0], "micro", {}, 3), one.data)
    assert keys["evaluate"].digest == one.start_key


# Bad input


@pytest.mark.parametrize(
    ("storage", "told"),
    [
        ("nonsense", "nonsense: no study can be kept there"),
        ("oracle9://x/y", "no study can be kept there"),
        ("sqlite:////proc/studies.db", "no study can be kept there"),
        ("postgresql+psycopg2://me:hidden@127.0.0.1:1/db", r"me:\*\*\*@127"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(search, store, storage, told):
    with pytest.raises(UserError, match=told) as error:
        search("sigma", storage=storage)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trials": 0}, "--trials 0"),
        ({"name": "my study"}, "--study 'my study'"),
        ({"overrides": {"cams.last_blocks": 99}}, "last_blocks = 99"),
    ],
)
def test_options_that_make_no_sense_are_refused(search, changes, told):
    with pytest.raises(UserError, match=told):
        search("sigma", **changes)


def test_a_study_of_somebody_else_is_left_alone(search, tmp_path):
    optuna.create_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db", direction="maximize")
    with pytest.raises(UserError, match="none of this program's"):
        search("sigma")


# With real networks


def test_a_search_over_inference_trains_one_network_of_each_kind(search):
    one = search(*INFERENCE, trials=5)
    made = Counter()
    while (trial := one.ask()) is not None:
        for run in pipeline.run(trial.config, one.data, one.store, device=torch.device("cpu"), progress=lambda _: None):
            made[run.stage] += not run.found
        one.tell(trial, run.artifact.info["metrics"])
    assert states(one.study) == {"COMPLETE": 5}
    assert made["caae"] == made["segmentor"] == 1
    saving = one.saving()
    assert saving["trials_inference_only"] == 4
    assert saving["spent_seconds"] < saving["unshared_seconds"]


def test_the_probe_scores_every_epoch_and_leaves_the_network_as_it_is(shapes, tmp_path):
    config = load_config("micro")
    data = pipeline.open_data(config, shapes)
    runs, told = [], []
    for name, probe in (("plain", None), ("probed", segmentor.map_probe(data["val"], config, n_images=4))):
        options = {"device": torch.device("cpu"), "until": "segmentor", "probe": probe}
        runs.append(list(pipeline.run(config, data, Store(tmp_path / name), progress=told.append, **options))[-1])
    plain, probed = (load_file(run.artifact.file("segmentor.safetensors")) for run in runs)
    assert runs[0].key == runs[1].key
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    assert runs[0].artifact.info["history"].keys() == runs[1].artifact.info["history"].keys()
    scored = [(report.stage, report.epoch, set(report.probe)) for report in told if report.probe]
    names = {
        f"cam/val/{name}" for name in ("miou", "fp", "fn", "threshold", "miou_oracle", "miou_fixed", "miou_heldout")
    }
    assert scored == [("segmentor", 1, names), ("segmentor", 2, names)]
