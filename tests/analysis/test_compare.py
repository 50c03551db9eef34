"""`semformer-tables compare`."""

import json

import pytest
from mlflow import MlflowClient

from analysis.cli import main
from tests.analysis.scene import Sweep
from tests.records import MINE, record
from tests.workplace import Workplace


def compared(uri, a, b, capsys):
    assert main(["compare", a, b, "--tracking-uri", uri, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three sweeps of a table of one's own in one experiment; the third has all of its trials from the first."""
    place = Workplace(tmp_path_factory.mktemp("compare"))
    more = "header: mIoU}, {name: test, header: test, elsewhere: by others}]"
    (place.folder / "mine.yaml").write_text(MINE.replace("header: mIoU}]", more))
    for overrides in ({}, {"evaluate.erosion": 3}, {"segmentor.token_dropout": 0.5}):
        record(place, place.folder / "mine.yaml", **overrides)
    return place


@pytest.fixture
def names(place):
    """As `semformer-sweep status` tells them, in order."""
    parents = sorted(place.runs("mine micro", "sweep"), key=lambda run: run.info.start_time)
    names = [run.data.tags["semformer.sweep"] for run in parents]
    assert sorted(names) == sorted(path.name for path in (place.folder / "sweeps").iterdir())
    return names


def test_real_sweeps_and_what_differs_once(place, names, capsys):
    told = compared(place.uri, *names[:2], capsys)
    assert [cell["row"] for cell in told["cells"]] == ["a", "b"]
    values = {
        (run.data.tags["semformer.rows"], run.data.params["evaluate.erosion"]): run.data.metrics["cam/val/miou"]
        for run in place.runs("mine micro", "trial")
    }
    for cell in told["cells"]:
        a, b = (values[f"mine/{cell['row']}", erosion] for erosion in ("0", "3"))
        assert (cell["a"], cell["b"], cell["difference"]) == (a, b, b - a)
    assert told["differs"] == [{"name": "erosion", "a": "0", "b": "3", "pairs": 2}]
    assert (told["pairs"], told["same"], told["missing"]) == (2, 0, [])


def test_trials_that_another_sweep_has_made_are_of_both(place, names, capsys):
    told = compared(place.uri, names[0], names[2], capsys)
    assert [cell["difference"] for cell in told["cells"]] == [0, 0]
    assert (told["same"], told["differs"]) == (2, [])


def test_a_name_that_several_sweeps_have_is_not_enough(place, names, capsys):
    assert main(["compare", "mine micro", names[0], "--tracking-uri", place.uri]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 3 sweeps are meant by 'mine micro'")
    assert all(name in error for name in names)


def swept(folder, experiment, table="table03", preset="tiny"):
    """A sweep with a parent run, whose trials `trial` records below it."""
    sweep = Sweep(folder, table, preset, experiment=experiment)
    tags = {"semformer.kind": "sweep", "semformer.table": sweep.table.name}
    parent = sweep.client.create_run(sweep.id, tags=tags, run_name=f"{sweep.table.name} {preset}").info.run_id

    def trial(*arguments, tags=None, **options):
        return sweep.trial(*arguments, tags={"mlflow.parentRunId": parent} | (tags or {}), **options)

    return sweep, parent, trial


def test_differences_are_of_equal_seeds(database, capsys):
    sweep, parent, first = swept(database, "one")
    _, _, second = swept(database, "two")
    for seed, miou in ((0, 40.0), (1, 44.0), (2, 45.0)):
        first("CF", miou, seed=seed)
    for seed, miou in ((1, 47.0), (2, 50.0), (3, 90.0)):
        second("CF", miou, seed=seed)
    first("CF-CB", 50.0)
    second("CF-CB", tags={"status": "failed", "reason": "disk full"})
    told = compared(sweep.uri, parent[:12], "two", capsys)
    (cell,) = told["cells"]
    assert cell["seeds"] == [1, 2]
    assert (cell["a"], cell["b"], cell["difference"]) == (44.5, 48.5, 4.0)
    assert cell["deviation"] == pytest.approx(2**0.5)
    missing = {(one["row"], *one["seeds"]): (one["a"], one["b"]) for one in told["missing"]}
    assert missing == {
        ("CF", 0): ("40.00", "not run"),
        ("CF", 3): ("not run", "90.00"),
        ("CF-CB", 0): ("50.00", "failed: disk full"),
    }


def test_what_differs_in_some_pairs_is_counted(database, capsys):
    sweep, _, first = swept(database, "one")
    _, _, second = swept(database, "two")
    first("CF", 40.0, tags={"semformer.version.torch": "2.14"})
    first("CF-CB", 41.0)
    second("CF", 40.0, tags={"commit": "feed", "semformer.version.torch": "2.15"})
    second("CF-CB", 41.0, overrides={"segmentor.epochs": 9})
    assert main(["compare", "one", "two", "--tracking-uri", sweep.uri]) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in ("commit: 0123abcd -> feed", "version of torch: 2.14 -> 2.15", "segmentor.epochs: 4 -> 9"):
        assert f"  {line} (1 of 2)" in printed


def test_the_newest_finished_run_of_a_cell_counts(database, capsys):
    sweep, _, first = swept(database, "one")
    _, _, second = swept(database, "two")
    first("CF", 40.0)
    for miou, status in ((41.0, "finished"), (42.0, "finished"), (None, "failed")):
        second("CF", miou, tags={"status": status})
    (cell,) = compared(sweep.uri, "one", "two", capsys)["cells"]
    assert cell["b"] == 42.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["one", "three"], "MLflow has no sweep 'three': there are 'table03 tiny' (experiment 'one', run "),
        (["one", "table03 tiny"], "one sweep"),
        (["one", "eight"], "no table in common: "),
    ],
)
def test_bad_input_is_told_in_words(database, capsys, arguments, says):
    sweep, _, trial = swept(database, "one")
    trial("CF", 40.0)
    swept(database, "eight", "table08")
    assert main(["compare", *arguments, "--tracking-uri", sweep.uri]) == 2
    assert says in capsys.readouterr().err


def test_without_any_sweep(database, capsys):
    uri = f"sqlite:///{database}/mlflow.db"
    MlflowClient(uri)
    assert main(["compare", "a", "b", "--tracking-uri", uri]) == 2
    assert "MLflow has no sweep at all: run one first" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"trial_list": [{}]}', "[]"])
def test_a_damaged_plan_is_told(database, tmp_path, capsys, text):
    sweep = Sweep(database)
    (tmp_path / "plan.json").write_text(text)
    for name in ("one", "two"):
        tags = {"semformer.kind": "sweep", "semformer.table": "table03", "semformer.sweep": name}
        run = sweep.client.create_run(sweep.id, tags=tags).info.run_id
    sweep.client.log_artifact(run, str(tmp_path / "plan.json"))
    assert main(["compare", "one", "two", "--tracking-uri", sweep.uri]) == 2
    assert "the plan.json of sweep 'two'" in capsys.readouterr().err
