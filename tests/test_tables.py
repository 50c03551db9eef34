"""The paper's tables as programs: what they set, in each preset, and what all of them need together."""

import pytest

from semformer.config import flatten, load_config
from semformer.errors import UserError
from sweeps.plan.table import load_all_tables, load_table, load_tables, resolve
from sweeps.plan.trials import make_plan

ROWS = {1: 1, 2: 1, 3: 8, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4, 10: 4, 11: 2, 12: 2, 13: 7, 14: 2, 15: 3, 16: 3, 17: 4}
BEST = 63.7
"""Percent mIoU of the full method, which all ablations but Table 3 end with."""

MINE = """\
name: mine
title: A table of my own
metrics: [{name: miou, header: mIoU}]
layout:
  marks:
    - {name: D, header: D, field: caae.class_dim}
rows:
  - id: small
    label: small
    marks: {D: 32}
    set: {caae.class_dim: 32, caae.merge: max}
    presets:
      tiny: {caae.class_dim: 4}
    paper: {miou: null}
  - {id: own, label: own, paper: {miou: null}}
"""


def configs(preset):
    return {
        (table.name, row.id): resolve(table, row, preset, {}, 0) for table in load_all_tables() for row in table.rows
    }


@pytest.fixture
def mine(tmp_path):
    """mine(old, new) writes the table with some text replaced and returns its path."""

    def write(old: str = "", new: str = "", name: str = "mine.yaml"):
        assert old in MINE
        path = tmp_path / name
        path.write_text(MINE.replace(old, new, 1))
        return path

    return write


def test_a_metric_that_there_is_not_is_told_before_anything_is_trained(mine):
    with pytest.raises(UserError, match=r"mine.yaml:3: metrics: 'mious' is none of miou, fp, fn, "):
        load_table(mine("name: miou", "name: mious"))


def test_a_mark_is_the_value_that_its_field_is_set_to(mine):
    told = r"mine.yaml:10: row 'small': mark 'D' says 16, but caae.class_dim is set to 32"
    with pytest.raises(UserError, match=told):
        load_table(mine("marks: {D: 32}", "marks: {D: 16}"))
    assert load_table(mine("marks: {D: 32}", "marks: {D: few}")), "words say what they like"


@pytest.mark.parametrize(("name", "found"), [("table3", "table03"), ("3", "table03"), ("table013", "table13")])
def test_a_table_is_found_by_its_number(name, found):
    assert load_table(name).name == found


@pytest.mark.parametrize("name", ["table99", "9", "table"])
def test_a_number_without_a_table_is_told(name):
    with pytest.raises(UserError, match=f"no table is named '{name}'"):
        load_table(name)


def test_what_runs_do_not_measure_is_no_score_of_theirs(mine):
    elsewhere = "[{name: miou, header: mIoU}, {name: test, header: test, elsewhere: by a server}]"
    table = load_table(mine("[{name: miou, header: mIoU}]", elsewhere))
    assert ([metric.name for metric in table.measured], table.goal) == (["miou"], "cams")


# ---- the paper's tables ----


def test_every_table_has_the_papers_rows_and_name():
    tables = load_all_tables("deeplab")
    assert {table.name: len(table.rows) for table in tables} == {f"table{n:02}": rows for n, rows in ROWS.items()}
    for table in tables:
        assert table.path.stem.startswith(f"{table.name}_")
        assert table.source.startswith(f"Table {int(table.name[5:])} (")


@pytest.mark.parametrize(("until", "first"), [("cams", "table03"), ("pseudo_masks", "table01"), ("deeplab", "table01")])
def test_all_tables_are_those_that_runs_fill_which_go_so_far(until, first):
    names = [table.name for table in load_all_tables(until)]
    assert names[0] == first
    assert ("table02" in names) == (until == "deeplab")
    assert names[-14:] == [f"table{n:02}" for n in sorted(ROWS)[2:]]


def test_the_methods_own_rows_beside_others_are_the_presets_own():
    for name, values in (("table01", [63.7, 73.2]), ("table02", [74.3, 74.0])):
        (row,) = load_table(name).rows
        assert resolve(load_table(name), row, "paper", {}, 0) == load_config("paper")
        assert [*row.paper.values()] == values


def test_no_upper_bound_can_pass_for_learning_from_labels():
    table = load_table("table02")
    with pytest.raises(UserError, match=r"--set deeplab.supervised: row 'SemFormer' of table02 is about this very"):
        resolve(table, table.rows[0], "tiny", {"deeplab.supervised": True}, 0)


def test_tables_give_equal_configs_the_papers_equal_scores():
    """Rows of different tables that are one trial have one value in the paper, and the full method is the best."""
    scores: dict[str, set] = {}
    for (name, row), config in configs("paper").items():
        table = load_table(name)
        paper = table.rows[table.positions[row]].paper["miou"]
        scores.setdefault(config.model_dump_json(), set()).add(paper)
    assert all(len(values) == 1 for values in scores.values())
    assert scores[load_config("paper").model_dump_json()] == {BEST}
    assert max(value for values in scores.values() for value in values) == BEST


@pytest.mark.parametrize(
    ("name", "row", "values"),
    [
        ("table12", "without", (55.8, 20.5, 23.7)),
        ("table12", "with", (63.7, 19.3, 17.0)),
        ("table13", "U-1", (60.0, 24.0, 16.0)),
        ("table13", "U-6", (63.2, 21.0, 15.7)),
    ],
)
def test_tables_with_several_metrics_have_the_papers_values(name, row, values):
    table = load_table(name)
    assert tuple(table.rows[table.positions[row]].paper[metric] for metric in ("miou", "fp", "fn")) == values


def test_axis_values_are_the_papers_in_preset_paper():
    for table in load_all_tables():
        for mark in (mark for mark in table.layout.marks if mark.field and mark.name != "backbone"):
            for row in table.rows:
                assert flatten(resolve(table, row, "paper", {}, 0))[mark.field] == row.marks[mark.name]
    backbones = [config.caae.backbone for (name, _), config in configs("paper").items() if name == "table06"]
    names = ["deit_small_patch16_224", "deit_base_patch16_224", "deit_base_distilled_patch16_224"]
    assert backbones == names


@pytest.mark.parametrize(
    ("table", "field", "tiny"),
    [
        ("table07", "caae.decoder_depth", [1, 1, 2, 3]),
        ("table08", "caae.class_dim", [4, 16, 32, 64]),
        ("table10", "caae.decoder_width", [32, 48, 64, 96]),
        ("table13", "cams.last_blocks", [1, 2, 3, 4, 4, 4, 4]),
    ],
)
def test_axis_values_are_scaled_in_preset_tiny(table, field, tiny):
    assert [flatten(config)[field] for (name, _), config in configs("tiny").items() if name == table] == tiny


def test_the_whole_plan_of_the_paper(devkit, store):
    plan = make_plan(load_all_tables(), "paper", {}, (0,), devkit, store)
    assert plan.summary()["rows"] == 51
    assert plan.summary()["trials"] == 34
    count = {"requested": 51, "cached": 0}
    distinct = {"caae": 15, "segmentor": 26, "cams": 34, "evaluate": 34}
    assert plan.summary()["stages"] == {stage: {**count, "distinct": n} for stage, n in distinct.items()}
    shared = {trial.rows: trial for trial in plan.trials}
    (full,) = [trial for trial in plan.trials if "table08/D-256" in trial.rows]
    assert len({cell.table for cell in full.cells}) == 13, "every table but Table 3"
    assert ("table11/without", "table14/without") in shared
    maps = ("table03/CF-CB-AS-AC", "table04/without", "table12/without", "table15/SS", "table16/activation")
    assert maps in shared


def test_preset_micro_keeps_all_trials_apart(store):
    plan = make_plan(load_all_tables(), "micro", {}, (0,), None, store)
    assert {name: count.distinct for name, count in plan.stages.items()} == {
        "caae": 15,
        "segmentor": 26,
        "cams": 34,
        "evaluate": 34,
    }


# ---- files ----


def test_a_preset_replaces_what_the_row_sets(mine):
    table = load_table(mine())
    small, own = table.rows
    tiny, paper = (resolve(table, small, preset, {}, 0).caae for preset in ("tiny", "paper"))
    assert (tiny.class_dim, tiny.merge) == (4, "max")
    assert (paper.class_dim, paper.merge) == (32, "max")
    assert resolve(table, own, "tiny", {}, 0).caae == load_config("tiny").caae


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        ("tiny:", "tiin:", 13, "row 'small': no preset is named 'tiin': there are paper, tiny, micro"),
        ("{caae.class_dim: 4}", "{caae.decoder_depth: 4}", 13, "'caae.decoder_depth' of preset tiny replaces nothing"),
        ("{caae.class_dim: 4}", "4", 13, "row 'small': presets.tiny = 4: input should be a valid dictionary"),
        ("field: caae.class_dim", "field: caae.class_dum", 6, "mark 'D': unknown field 'caae.class_dum': did you mean"),
        (
            "own, paper: {miou: null}}",
            "own}\npaper_only: [{id: x, label: x, paper: {miou: null}}]",
            16,
            "needs a value",
        ),
        ("field: caae.class_dim", "field: caae", 6, "mark 'D': unknown field 'caae'"),
        ("mIoU}]", "mIoU, elsewhere: by a server}]", 3, "'miou' is measured by runs, not elsewhere"),
        ("name: miou, header: mIoU}]", "name: test, header: test, elsewhere: by a server}]", 3, "name one that runs"),
        ("layout:", "layout:\n  compared: E", 5, "compared = 'E' is none of the marks (D)"),
        ("name: mine", "name: tables", 1, "'tables' is the name of sweeps of several tables"),
    ],
)
def test_mistakes_are_told_with_their_line(mine, old, new, line, told):
    path = mine(old, new)
    with pytest.raises(UserError) as error:
        load_table(path)
    assert f"{path}:{line}: " in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize("value", ["2020-13-45", "0x_", "!!bool maybe", "!!timestamp soon"])
def test_a_value_that_is_none_of_its_type_is_told(mine, value):
    path = mine("A table of my own", value)
    with pytest.raises(UserError, match=rf"{path}: a value is none of its type: .*quote it"):
        load_table(path)


def test_a_mistake_in_the_only_metric_is_told_once(mine):
    with pytest.raises(UserError) as error:
        load_table(mine(", header: mIoU}", "}"))
    assert str(error.value).endswith("mine.yaml:3: metrics.0.header is missing")
    with pytest.raises(UserError, match=r"metrics = .*at least 1 item"):
        load_table(mine("[{name: miou, header: mIoU}]", "[]"))


def test_the_papers_values_may_be_left_out(mine):
    assert load_table(mine()).paper_metrics == frozenset()
    assert load_table(mine("    paper: {miou: null}\n")).paper_metrics == frozenset()
    assert load_table(mine("own, paper: {miou: null}}", "own, paper: {miou: 63.7}}")).paper_metrics == {"miou"}


def test_a_presets_value_that_does_not_fit_is_told_with_its_line(mine):
    path = mine("{caae.class_dim: 4}", "{caae.class_dim: four}")
    table = load_table(path)
    assert resolve(table, table.rows[0], "micro", {}, 0).caae.class_dim == 32
    with pytest.raises(UserError, match=r"mine\.yaml:13: row 'small': caae\.class_dim = 'four'"):
        resolve(table, table.rows[0], "tiny", {}, 0)


def test_a_table_or_a_name_that_is_there_twice_is_told(mine):
    first, second = mine(), mine(name="other.yaml")
    assert [table.name for table in load_tables(["table08", first, "table03"])] == ["table08", "mine", "table03"]
    with pytest.raises(UserError, match="the table table03 is given twice"):
        load_tables(["table03", "table08", "table03_losses"])
    with pytest.raises(UserError, match=r"mine\.yaml and .*other\.yaml are both named 'mine'"):
        load_tables([first, second])


def test_a_table_of_many_rows_is_read_and_resolved_whole(tmp_path):
    rows = [
        f"  - {{id: r{i}, label: row {i}, set: {{segmentor.sigma: {i / 1000}}}, paper: {{miou: null}}}}\n"
        for i in range(1000)
    ]
    path = tmp_path / "many.yaml"
    path.write_text("name: many\ntitle: many\nmetrics: [{name: miou, header: mIoU}]\nrows:\n" + "".join(rows))
    table = load_table(path)
    sigmas = [resolve(table, row, "tiny", {"caae.epochs": 3}, 0).segmentor.sigma for row in table.rows]
    assert sigmas == [i / 1000 for i in range(1000)]
    assert table.where("rows", 999) == f"{path}:1004"
