import json
import time
from collections import Counter
from pathlib import Path

import pytest

from semformer.errors import UserError
from semformer.store import Store
from sweeps import cli
from sweeps.plan.table import load_table, resolve, table_names
from sweeps.plan.trials import Cell, distinct_stages, make_plan
from tests.artifacts import publish, why

MINE = """\
name: mine
title: A table of my own
baseline:
  cams.final_map: activation
metrics:
  - {name: miou, header: mIoU}
layout:
  marks:
    - {name: sigma, header: Sigma}
rows:
  - id: a
    label: first
    marks: {sigma: 0.1}
    set:
      segmentor.sigma: 0.1
    paper: {miou: 50}
  - id: b
    label: second
    set: {segmentor.losses: "CF,SS"}
    paper: {miou: null}
paper_only:
  - {id: c, label: theirs, paper: {miou: 40.5}}
"""


@pytest.fixture
def mine(tmp_path):
    """mine(old, new, ...) writes the table with some text replaced and returns its path."""

    def write(*changes: str) -> Path:
        text = MINE
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def plan_of(table, store, *, preset="micro", overrides=None, seeds=(0,)):
    return make_plan([load_table(table)], preset, overrides or {}, seeds, None, store)


# Table files


def test_table03_is_the_papers():
    table = load_table("table03")
    assert table == load_table("table03_losses") == load_table(table.path)
    values = {"TS-CAM": 40.3, "CF": 35.6, "CF-CB": 43.5, "CF-AS": 40.1, "CF-AC": 42.0}
    values |= {"CF-CB-AS": 48.8, "CF-CB-AC": 48.8, "CF-AS-AC": 55.0, "CF-CB-AS-AC": 55.8}
    assert {row.id: row.paper["miou"] for row in (*table.paper_only, *table.rows)} == values
    for row in table.rows:
        config = resolve(table, row, "paper", {}, seed=0)
        assert set(config.segmentor.losses) == {"SS", *row.id.split("-")}
        assert {name for name, on in row.marks.items() if on} == set(row.id.split("-"))
        assert config.cams.final_map == "activation"


@pytest.mark.parametrize("name", table_names())
@pytest.mark.parametrize("preset", ["micro", "paper"])  # tiny's networks are too shallow for some of Tables 7 and 13
def test_every_row_of_every_table_is_a_config_of_its_own(name, preset):
    table = load_table(name)
    configs = [resolve(table, row, preset, {}, seed=3) for row in table.rows]
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    assert {config.seed for config in configs} == {3}


def test_a_row_goes_over_overrides_and_those_over_the_baseline(mine):
    table = load_table(mine())
    a, b = (resolve(table, row, "micro", {}, 0) for row in table.rows)
    assert (a.segmentor.sigma, a.cams.final_map) == (0.1, "activation")
    assert b.segmentor.losses == ("CF", "SS")
    changed = resolve(table, table.rows[0], "micro", {"cams.final_map": "both", "segmentor.epochs": "7"}, 0)
    assert (changed.segmentor.sigma, changed.cams.final_map, changed.segmentor.epochs) == (0.1, "both", 7)
    for name in ("segmentor.sigma", "segmentor"):
        with pytest.raises(UserError, match=f"--set {name}: row 'a' of mine is about this very field"):
            resolve(table, table.rows[1], "micro", {name: 0.5}, 0)
    with pytest.raises(UserError, match="--seeds"):
        resolve(table, table.rows[0], "micro", {"seed": 5}, 0)


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        (
            "segmentor.sigma: 0.1",
            "segmentor.sigmo: 0.1",
            15,
            "row 'a': unknown field 'segmentor.sigmo': did you mean segm",
        ),
        ("cams.final_map", "cams.finalmap", 4, "baseline: unknown field 'cams.finalmap': did you mean cams.final_map"),
        ("segmentor.sigma", "seed", 15, "seeds are given by --seeds"),
        ("{miou: 50}", "{miou: 50, fp: 1}", 16, "row 'a': 'fp' is none of the metrics"),
        ("{miou: 50}", '{miou: "50"}', 16, "row 'a': paper.miou = '50': input should be a valid number"),
        ("{miou: 40.5}", "{miou: .nan}", 22, "row 'c': paper.miou"),
        ("id: b", "id: a", 17, "row 'a': another row has this id, at {path}:11"),
        ("id: c", "id: b", 22, "row 'b': another row has this id, at {path}:17"),
        ("id: b", "id: 2", 17, "row 2: id = 2: input should be a valid string"),
        ("label: second", "labl: second", 18, "row 'b': unknown field 'labl': did you mean 'label'?"),
        ("title:", "titel:", 2, "unknown field 'titel': did you mean 'title'?"),
        ("    label: first", "    id: b\n    label: first", 12, "'id' is there twice, first in line 11"),
        ("marks: {sigma: 0.1}", "marks: {U: 4}", 13, "row 'a': 'U' is none of the marks of the layout (sigma)"),
        (
            "{name: miou, header: mIoU}",
            "{name: miou, header: mIoU, best: most}",
            6,
            "best = 'most': input should be 'max'",
        ),
        ("rows:\n", "rows: []\nothers:\n", 10, "rows = []"),
        ("    set:", "   set:", 14, "this is no YAML"),
        ("label: first", "label: fir\x07st", 12, "this is no YAML: control characters are not allowed"),
    ],
)
def test_mistakes_in_a_table_are_told_with_their_line(mine, old, new, line, told):
    path = mine(old, new)
    with pytest.raises(UserError) as error:
        load_table(path)
    assert f"{path}:{line}: " in str(error.value)
    assert told.format(path=path) in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        (
            "segmentor.sigma: 0.1",
            "segmentor.sigma: much",
            15,
            "row 'a': segmentor.sigma = 'much': input should be a valid n",
        ),
        ('"CF,SS"', '"CF,XX"', 19, "row 'b': segmentor.losses"),
        ("final_map: activation", "final_map: none", 4, "baseline: cams.final_map = 'none'"),
        ("segmentor.sigma: 0.1", "cams.last_blocks: 99", 11, "row 'a': cams.last_blocks = 99 (U), but"),
    ],
)
def test_values_that_do_not_fit_are_told_with_their_line(mine, store, old, new, line, told):
    path = mine(old, new)
    with pytest.raises(UserError) as error:
        plan_of(path, store)
    assert f"{path}:{line}: {told}" in str(error.value)


def test_an_unknown_or_unreadable_table_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no table is named 'tabel03': did you mean table03\?"):
        load_table("tabel03")
    with pytest.raises(UserError, match=r"table03 \(table03_losses\)"):
        load_table("nothing")
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        load_table(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="a table file is a mapping"):
        load_table(tmp_path / "list.yaml")


# Plans


def test_table03_shares_its_caae(store):
    plan = plan_of("table03", store)
    told = plan.as_json()
    assert (told["rows"], told["trials"]) == (8, 8)
    count = {"requested": 8, "distinct": 8, "cached": 0}
    assert told["stages"] == {
        "caae": {**count, "distinct": 1},
        "segmentor": count,
        "cams": count,
        "evaluate": count,
    }
    assert [cell["row"] for trial in told["trial_list"] for cell in trial["cells"]] == [
        r.id for r in plan.tables[0].rows
    ]
    assert len({trial["key"] for trial in told["trial_list"]}) == 8
    assert json.loads(json.dumps(told)) == told


def test_seeds_repeat_every_row(store):
    plan = plan_of("table03", store, seeds=(0, 1, 2))
    assert len(plan.trials) == 24
    assert plan.stages["caae"] == (24, 3, 0)
    assert Counter(trial.config.seed for trial in plan.trials) == {0: 8, 1: 8, 2: 8}
    first = plan_of("table03", store)
    assert [trial.key for trial in plan.trials if trial.config.seed == 0] == [trial.key for trial in first.trials]


def test_rows_that_ask_for_the_same_share_a_trial(mine, store):
    without_as = "{segmentor.losses: 'CF,SS', segmentor.sigma: 0.5}"  # sigma scales AS, which is off
    path = mine("set:\n      segmentor.sigma: 0.1", f"set: {without_as}")
    plan = plan_of(path, store)
    (trial,) = plan.trials
    assert trial.cells == (Cell("mine", "a", 0), Cell("mine", "b", 0))
    assert trial.rows == ("mine/a", "mine/b")
    assert plan.stages["segmentor"] == (2, 1, 0)
    assert plan.summary()["rows"] == 2


def test_what_is_in_the_store_is_counted_and_what_is_not_is_explained(store):
    plan = plan_of("table03", store)
    keys = plan.trials[0].keys
    for name in ("caae", "segmentor"):
        store.publish(keys[name], store.workspace(keys[name]), {})
    again = plan_of("table03", store)
    assert [count.cached for count in again.stages.values()] == [1, 1, 0, 0]
    missing = again.missing()
    assert keys["caae"] not in missing
    assert Counter(key.stage for key in missing) == {"segmentor": 7, "cams": 8, "evaluate": 8}
    other = plan_of("table03", store, overrides={"caae.class_dim": 4})
    assert [count.cached for count in other.stages.values()] == [0, 0, 0, 0]
    key, trials = next(iter(other.missing().items()))
    assert why(store, key) == "caae.class_dim 8 -> 4"
    assert trials == list(other.trials)


def test_what_only_stages_in_the_store_read_is_not_to_be_made(store):
    """One trial has its maps: its networks may be gone. The others need their own, and the CAAE."""
    keys = plan_of("table03", store).trials[0].keys
    publish(store, keys["cams"])
    missing = plan_of("table03", store).missing()
    assert Counter(key.stage for key in missing) == {"caae": 1, "segmentor": 7, "cams": 7, "evaluate": 8}
    assert keys["segmentor"] not in missing
    assert [len(trials) for trials in missing.values()] == [7] + 7 * [1] + 7 * [1] + 8 * [1]


def test_planning_reads_no_artifact(store, monkeypatch):
    keys = distinct_stages(plan_of("table03", store).trials)
    for key in keys[:3]:
        publish(store, key)
    monkeypatch.setattr("semformer.store.store.read_manifest", lambda *manifest: pytest.fail("a manifest was read"))
    assert plan_of("table03", store).cached == {key.digest for key in keys[:3]}


def test_rows_may_differ_in_their_data(mine, store):
    plan = plan_of(mine("set:\n      segmentor.sigma: 0.1", "set: {data.shapes.train: 12}"), store)
    assert plan.trials[0].data_name != plan.trials[1].data_name
    assert plan.stages["caae"] == (2, 2, 0)


def test_planning_is_quick(store):
    plan_of("table03", store)
    started = time.monotonic()
    plan = plan_of("table03", store, seeds=range(100))
    assert len(plan.trials) == 800
    assert time.monotonic() - started < 5


# Command line


def test_plan_on_the_command_line(tmp_path, capsys):
    arguments = ["plan", "table03", "--preset", "micro", "--store", str(tmp_path / "store")]
    assert cli.main([*arguments, "--seeds", "0,1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["trials"], told["seeds"]) == (8, 16, [0, 1])
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "CF-CB-AS-AC" in out
    assert "segmentor │         8 │        8 │      0 │       8" in out
    assert "caae of CF, CF-CB, CF-AS, CF-AC" in out
    assert "nothing published for this stage yet" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["table99"], "no table is named 'table99'"),
        (["table03", "--set", "segmentor.sigm=1"], "did you mean segmentor.sigma"),
        (["table03", "--set", "segmentor.epochs"], "write FIELD=VALUE"),
        (["table03", "--preset", "paper"], "--data DIR"),
        (["table03", "--data", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_bad_input_ends_with_a_sentence(tmp_path, capsys, arguments, told):
    assert cli.main(["plan", "--preset", "micro", *arguments, "--store", str(tmp_path / "store")]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["1,1", "-1", "x", ""])
def test_seeds_are_different_numbers(capsys, seeds):
    with pytest.raises(SystemExit):
        cli.main(["plan", "table03", f"--seeds={seeds}"])
    assert "--seeds" in capsys.readouterr().err
