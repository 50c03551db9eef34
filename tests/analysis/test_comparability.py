"""What is compared and averaged is comparable; the rest is told."""

import json
import re
import shlex
import statistics

import pytest
import yaml

from analysis.render import to_markdown
from analysis.tables import compile_from_mlflow
from semformer.config import parse_overrides
from semformer.errors import UserError
from sweeps.plan.table import load_table
from tests.analysis.scene import OURS, SCALES, TINY, Sweep, cells, footnote, grid, note


def test_several_seeds_give_mean_and_deviation(sweep):
    for seed, shift in ((0, 0.0), (1, 1.0), (2, 5.0)):
        sweep.full([v + shift for v in OURS], seed=seed)
    compiled = sweep.compiled()
    cell = cells(compiled)["CF"]
    assert cell.n == 3
    assert cell.mean == pytest.approx(OURS[0] + 2)
    assert cell.spread == pytest.approx(statistics.stdev([0, 1, 5]))
    text = to_markdown(compiled)
    assert grid(text)["mIoU (%) ours"][1] == "36.8 ± 2.6 (3)"
    assert grid(text)["mIoU (%) ours"][8] == "**73.6 ± 2.6 (3)**"
    assert "seeds 0, 1, 2" in note(text, "Ours")
    assert "over n seeds" in note(text, "Seeds")
    assert grid(to_markdown(sweep.compiled(seed=1)))["mIoU (%) ours"][1] == "35.8"


def test_seeds_without_a_value_are_named(sweep):
    sweep.full()
    sweep.trial("CF", 36.8, seed=1)
    sweep.trial("CF-AS-AC", seed=1, tags={"status": "failed", "reason": "out of memory"})
    text = to_markdown(sweep.compiled())
    ours = grid(text)["mIoU (%) ours"]
    assert ours[1:3] == ["35.8 ± 1.4 (2)", "44.0 (1) [1]"]
    assert ours[7] == "66.0 (1) [2]"
    assert footnote(text, "[1]") == "seed 1: not run"
    assert footnote(text, "[2]") == "seed 1: failed: out of memory"
    assert "do not all have the same seeds" in note(text, "Seeds")


@pytest.mark.parametrize(
    ("overrides", "protocol", "says"),
    [
        ({"evaluate.erosion": 7}, {}, "erosion = 7 (otherwise 0)"),
        ({"evaluate.rule": "fixed"}, {}, "rule = fixed (otherwise oracle)"),
        ({"cams.scales": "1.0"}, {}, f"scales = 1.0 (otherwise {SCALES})"),
        ({"data.eval_split": "train"}, {}, "eval_split = train (otherwise val)"),
        ({"segmentor.epochs": 50}, {}, f"segmentor.epochs = 50 (otherwise {TINY.segmentor.epochs})"),
        ({"caae.reconstruction": False}, {}, "caae.reconstruction = no (otherwise yes)"),
    ],
)
def test_a_deviating_cell_is_marked_and_never_the_best(sweep, overrides, protocol, says):
    sweep.full(OURS[:7])
    sweep.trial("CF-CB-AS-AC", 99.9, overrides=overrides, protocol=protocol)
    text = to_markdown(sweep.compiled())
    ours = grid(text)["mIoU (%) ours"]
    assert ours[8] == "99.9†"
    assert ours[7] == "**66.0**"
    assert footnote(text, "†") == f"not comparable: {says}"
    assert text.count("not comparable") == 1


MAPS = ("caae", "segmentor", "cams", "evaluate")
WITH_MASKS = (*MAPS, "train_cams", "affinity_labels", "affinity", "walk", "pseudo_masks", "evaluate_masks")
THEIRS = ("pseudo_masks", "evaluate_masks", "deeplab", "segmentation", "evaluate_seg")
WITH_SEGMENTATION = (*WITH_MASKS, *THEIRS[2:])


def test_what_a_run_has_not_recorded_is_not_taken_for_equal(sweep):
    """A version that knew less of the protocol: its runs tell their stages as well."""
    sweep.full(OURS[:7], stages=MAPS)
    old = {"eval_split": "val", "scales": TINY.cams.scales, "flip": True, "erosion": 0}
    sweep.trial("CF-CB-AS-AC", 99.9, stages=MAPS, tags={"protocol": json.dumps(old)})
    text = to_markdown(sweep.compiled())
    assert grid(text)["mIoU (%) ours"][7:] == ["**66.0**", "99.9†"]
    assert footnote(text, "†") == "not comparable: rule = not recorded (otherwise oracle)"


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_settings_of_stages_that_other_rows_do_without_are_told_as_of_those_that_have_them(tmp_path, preset):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntitle: t\nmetrics: [{name: seg/miou, header: seg}]\nrows:\n"
        "  - {id: ours, label: ours, paper: {seg/miou: 73.7}}\n"
        "  - {id: theirs, label: theirs, set: {pseudo_masks.folder: a}}\n"
        "  - {id: others, label: others, set: {pseudo_masks.folder: b}}\n"
    )
    sweep, data = Sweep(tmp_path, path, preset=preset), {"data": "VOC 2012 (1464 images, 1)"}
    for row, stages in (("ours", WITH_SEGMENTATION), ("theirs", THEIRS), ("others", THEIRS)):
        sweep.trial(
            row,
            stages=stages,
            overrides={"segmentor.epochs": 1},
            protocol=data,
            tags={"masks_read_by": '["evaluate_seg"]'},
            **{"seg/val/miou": 50.0},
        )
    text = to_markdown(sweep.compiled())
    assert "†" not in text
    assert note(text, "Ours").startswith(f"preset {preset}, segmentor.epochs = 1; ")
    assert note(text, "Final map") == "activation map times class-relative attention."
    asked = note(to_markdown(sweep.compiled(overrides={"segmentor.epochs": "2"})), "Ours")
    assert asked.startswith(f"preset {preset}, segmentor.epochs = 1 (asked for: 2); ")
    assert "not recorded" not in text
    if preset == "paper":
        assert "Measured by the protocol of preset paper: VOC 2012, epoch last." in note(text, "Paper")


def test_supervision_is_audited_cell_by_cell(sweep):
    sweep.full(OURS[:7])
    sweep.trial("CF-CB-AS-AC", 80.0, tags={"masks_read_by": '["segmentor", "evaluate"]'})
    text = to_markdown(sweep.compiled())
    assert footnote(text, "†") == "not comparable: pixel masks read by = segmentor, evaluate (otherwise evaluate)"
    assert "not in all cells" in note(text, "Supervision audit")


def test_supervision_audit_names_all_stages_that_read_masks(sweep):
    sweep.full(tags={"masks_read_by": '["segmentor", "evaluate"]'})
    text = to_markdown(sweep.compiled())
    assert note(text, "Supervision audit") == "pixel masks are read by segmentor, evaluate."
    assert "†" not in text


def test_fixed_threshold_is_told_apart_from_oracle(sweep):
    sweep.full(overrides={"evaluate.rule": "fixed"})
    text = to_markdown(sweep.compiled())
    assert note(text, "Threshold") == "fixed at 0.25, chosen without masks."
    assert note(text, "Supervision audit").endswith("stage evaluate alone, for the scores.")


def test_a_threshold_chosen_on_other_images_is_told(sweep):
    sweep.full(overrides={"evaluate.rule": "heldout"})
    text = to_markdown(sweep.compiled())
    told = "held-out: of each cell, for every second image the best of the others, and the other way round, chosen with"
    assert note(text, "Threshold").startswith(told)
    assert note(text, "Supervision audit").endswith("stage evaluate alone, for the scores and the held-out threshold.")


def test_settings_other_than_the_presets_are_named(sweep):
    sweep.full(overrides={"segmentor.epochs": 1, "segmentor.sigma": 0.05})
    text = to_markdown(sweep.compiled())
    assert "preset tiny, segmentor.epochs = 1, segmentor.sigma = 0.05;" in note(text, "Ours")
    assert "†" not in text


def test_runs_of_other_settings_are_left_out_and_can_be_chosen(sweep):
    sweep.full()
    sweep.full([1.0] * 7 + [2.0], overrides={"segmentor.epochs": 1})
    compiled = sweep.compiled()
    assert [cell.mean for cell in cells(compiled).values()][1:] == OURS
    assert note(to_markdown(compiled), "Runs") == (
        "8 other runs left out: segmentor.epochs = 1, mIoU (%) 1.0 to 2.0 (--set segmentor.epochs=1 shows them)."
    )
    chosen = sweep.compiled(overrides={"segmentor.epochs": "1"})
    assert [cell.mean for cell in cells(chosen).values()][1:] == [1.0] * 7 + [2.0]
    assert "preset tiny, segmentor.epochs = 1;" in note(to_markdown(chosen), "Ours")


SECOND = {
    "erosion": {"evaluate.erosion": 7},
    "rule": {"evaluate.rule": "fixed"},
    "scales": {"cams.scales": "0.5,1.0"},
    "flip": {"cams.flip": False},
    "split": {"data.eval_split": "train"},
    "selection": {"segmentor.selection": "best_miou"},
    "epochs": {"segmentor.epochs": 1, "segmentor.sigma": 0.05},
}


@pytest.mark.parametrize("overrides", SECOND.values(), ids=SECOND)
def test_seeds_of_other_settings_are_not_averaged(sweep, overrides):
    """And what is printed of how to choose the other one does choose it."""
    sweep.trial("CF", 50.0)
    sweep.trial("CF", 90.0, seed=1, overrides=overrides)
    text = to_markdown(sweep.compiled())
    assert grid(text)["mIoU (%) ours"][1] == "50.0"
    assert "seed 0." in note(text, "Ours")
    told = note(text, "Runs")
    assert told.startswith("1 other run left out: ")
    assert "mIoU (%) 90.0" in told
    options = shlex.split(re.search(r"\((--set .*) shows it\)", told)[1])
    chosen = sweep.compiled(overrides=parse_overrides(options[1::2]))
    assert cells(chosen)["CF"].mean == 90.0
    assert cells(chosen)["CF"].n == 1


@pytest.mark.parametrize("protocol", [{"erosion": 7}, {"data": "shapes B"}])
@pytest.mark.parametrize("tags", [{}, {"masks_read_by": '["segmentor", "evaluate"]'}])
def test_seeds_of_other_protocols_are_not_averaged(sweep, protocol, tags):
    sweep.full([50.0, 51.0], protocol={"data": "shapes A"})
    sweep.trial("CF", 90.0, seed=1, protocol={"data": "shapes A"} | protocol, tags=tags)
    assert cells(sweep.compiled())["CF"].mean == 50.0


def test_seeds_of_which_other_stages_read_masks_are_not_averaged(sweep):
    sweep.full([50.0, 51.0])
    sweep.trial("CF", 90.0, seed=1, tags={"masks_read_by": '["segmentor", "evaluate"]'})
    compiled = sweep.compiled()
    assert cells(compiled)["CF"].mean == 50.0
    told = "1 other run left out: pixel masks read by = segmentor, evaluate, mIoU (%) 90.0."
    assert note(to_markdown(compiled), "Runs") == told


def test_of_settings_that_are_equally_near_those_of_most_cells_are_shown(sweep):
    sweep.full(overrides={"evaluate.erosion": 7})
    sweep.trial("CF", 90.0, seed=1, overrides={"cams.flip": False})
    sweep.trial("CF", 91.0, seed=2, overrides={"cams.flip": False})
    sweep.full(seed=3, overrides={"cams.flip": False}, tags={"status": "failed"})
    sweep.full(seed=4, overrides={"cams.flip": False}, tags={"status": "failed"})
    text = to_markdown(sweep.compiled())
    assert grid(text)["mIoU (%) ours"][1] == "34.8"
    assert "†" not in text
    assert "other runs left out: cams.flip = no, mIoU (%) 90.0 to 91.0" in note(text, "Runs")


def test_a_seed_that_was_measured_otherwise_says_so(sweep):
    sweep.full()
    sweep.full(seed=1)
    sweep.trial("CF", 50.0, seed=2)
    sweep.trial("CF-CB", 90.0, seed=2, overrides={"evaluate.erosion": 7})
    remarks = [cell.remarks for cell in cells(sweep.compiled()).values()][1:4]
    assert remarks == [(), ("seed 2: left out, see Runs",), ("seed 2: not run",)]


def test_a_trial_that_has_not_begun_takes_no_cell_from_one_that_has_finished(sweep):
    """What it will be is not known yet."""
    sweep.full(overrides={"segmentor.epochs": 1})
    queued = {"status": "queued"}
    sweep.trial("CF", tags=queued, begun=False)
    sweep.trial("CF", seed=1, tags=queued, begun=False)
    sweep.trial("CF", seed=2, tags=queued, begun=False, protocol={"erosion": 7})
    compiled = sweep.compiled()
    assert cells(compiled)["CF"].mean == OURS[0]
    assert cells(compiled)["CF"].remarks == ("seed 1: still queued when the table was made",)
    assert "2 other runs left out: not begun, queued." in note(to_markdown(compiled), "Runs")


def test_what_was_asked_for_and_is_not_there_is_told(sweep):
    sweep.full(overrides={"segmentor.epochs": 1})
    text = to_markdown(sweep.compiled(overrides={"segmentor.epochs": "2", "evaluate.erosion": "7"}))
    told = "segmentor.epochs = 1 (asked for: 2), evaluate.erosion = 0 (asked for: 7);"
    assert told in note(text, "Ours")


def test_runs_of_another_version_of_a_stage_are_left_out(sweep):
    sweep.trial("CF", 34.8, tags={"trial_key": "old"})
    sweep.trial("CF", 36.0, tags={"trial_key": "new"})
    sweep.trial("CF", tags={"trial_key": "newest", "status": "failed"})
    compiled = sweep.compiled()
    assert cells(compiled)["CF"].mean == 36.0
    assert note(to_markdown(compiled), "Runs") == ("2 other runs left out: another version of a stage, mIoU (%) 34.8.")


def test_of_two_versions_the_one_that_runs_is_shown_before_one_that_waits(sweep):
    sweep.trial("CF", tags={"trial_key": "old", "status": "running"})
    sweep.trial("CF", tags={"trial_key": "new", "status": "queued"}, begun=True)
    assert cells(sweep.compiled())["CF"].remarks == ("still running when the table was made",)


def test_a_finished_trial_without_a_value_sends_nobody_to_a_dagger(sweep):
    sweep.full(OURS[:4])
    sweep.trial("CF-CB-AS", protocol={"erosion": 7})
    text = to_markdown(sweep.compiled())
    assert "†" not in text
    assert "dagger" not in text


def test_all_cells_are_of_one_data_set_that_of_most(sweep):
    sweep.full(OURS[:3], protocol={"data": "shapes A (200 images, 0123)"})
    sweep.full([90.0], protocol={"data": "shapes B (200 images, 4567)"})
    sweep.trial("CF-AC", 95.0, protocol={"data": "shapes B (200 images, 4567)"})
    sweep.trial("CF-CB-AS", 90.0, protocol={"data": "shapes C (200 images, 4567)"})
    sweep.trial("CF-CB-AS", 90.0)
    compiled = sweep.compiled()
    text = to_markdown(compiled)
    assert grid(text)["mIoU (%) ours"][1:7] == ["34.8", "**44.0**", "41.2", "— [1]", "— [1]", "— [2]"]
    assert footnote(text, "[1]") == "left out, see Runs"
    assert footnote(text, "[2]") == "not run"
    told = "2 other runs left out: on shapes B (200 images, 4567), mIoU (%) 90.0 to 95.0"
    assert f"{told} (--data 'shapes B (200 images, 4567)' shows them)." in note(text, "Runs")
    assert "1 other run left out: data not recorded, mIoU (%) 90.0." in note(text, "Runs")
    for name in ("shapes B", "shapes B (200 images, 4567)"):
        chosen = cells(sweep.compiled(data=name))
        assert [cell.mean for cell in chosen.values()][1:5] == [90.0, None, None, 95.0]
    with pytest.raises(UserError, match=r"has data VOC: there are not recorded; shapes A \(200"):
        sweep.compiled(data="VOC")


def test_data_that_were_asked_for_win_over_those_of_most_cells(sweep):
    sweep.full(protocol={"data": "shapes A"})
    few = {"data.shapes.train": 16}
    sweep.full([1.0, 2.0], overrides=few, protocol={"data": "shapes B"})
    assert cells(sweep.compiled())["CF"].mean == OURS[0]
    assert cells(sweep.compiled(overrides=few))["CF"].mean == 1.0


def test_a_table_about_its_protocol_compares_all_its_rows(database):
    path = database / "own.yaml"
    path.write_text(
        "{name: own, title: Splits, metrics: [{name: miou, header: mIoU}], rows: [{id: a, label: a}, {id: b, label: b, "
        "set: {data.eval_split: train, evaluate.rule: fixed, cams.flip: false}}]}"
    )
    sweep = Sweep(database, path)
    sweep.trial("a", 50.0, protocol={"data": "shapes (2 images, 01)"})
    sweep.trial("b", 60.0, protocol={"data": "shapes (9 images, 23)"})
    sweep.trial("b", 80.0, protocol={"data": "shapes (9 images, 45)", "erosion": 7})
    text = to_markdown(sweep.compiled())
    assert grid(text)["b"] == ["**60.0**"]
    assert "†" not in text
    assert note(text, "Threshold") == "its rule differs from row to row."


def test_rows_that_share_a_trial_show_the_same_run(sweep):
    run = sweep.trial("CF", 34.8, rows="CF,CF-CB")
    compiled = sweep.compiled()
    assert [line.trials[0].run_id for line in compiled.lines[1:3]] == [run, run]
    assert "†" not in to_markdown(compiled)


def test_a_row_whose_definition_changed_since_the_run_deviates(sweep, tmp_path):
    sweep.full()
    edited = yaml.safe_load(sweep.table.text)
    edited["rows"][0]["set"]["segmentor.losses"] = "CF"
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(edited))
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=sweep.uri)
    assert cells(compiled)["CF"].deviations == ("segmentor.losses = CF, SS (otherwise CF)",)


def test_masks_by_preset_paper_are_told_by_their_own_protocol(tmp_path):
    table = tmp_path / "masks.yaml"
    table.write_text(
        "name: masks\ntitle: t\nsource: Table 1\nmetrics: [{name: pseudo/miou, header: masks}]\n"
        "rows: [{id: ours, label: ours, paper: {pseudo/miou: 73.2}}]\n"
    )
    sweep = Sweep(tmp_path, table, preset="paper")
    told = {"mask_split": "train", "images of mask_split": "0a1b2c3d", "beta": 8.0, "data": "VOC 2012 (1464 images, 1)"}
    run = sweep.trial("ours", overrides={"walk.beta": 8.0}, protocol=told)
    sweep.client.log_metric(run, "pseudo/train/miou", 72.5)
    compiled = sweep.compiled()
    assert cells(compiled, "pseudo/miou")["ours"].mean == 72.5
    notes = dict(compiled.notes)
    assert "beta 8.0 (there 10.0)" in notes["Paper"]
    assert "threshold rule" not in notes["Paper"]
    assert "images of mask_split 0a1b2c3d" in notes["Protocol"]


@pytest.fixture
def grown(tmp_path):
    """A sweep of two seeds to their maps, whose table has got a score of masks since."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntitle: t\nmetrics: [{name: miou, header: maps}, {name: pseudo/miou, header: masks}]\n"
        "rows: [{id: a, label: a}]\n"
    )
    sweep = Sweep(tmp_path, path)
    for seed in (0, 1):
        sweep.trial("a", 60.0 + seed, seed=seed, stages=MAPS)
    return sweep


def test_runs_of_other_seeds_that_have_fewer_scores_are_told(grown):
    further = {name: f"{name} of seed 0" for name in WITH_MASKS}
    grown.trial("a", 62.0, stages=WITH_MASKS, tags={"stage_keys": json.dumps(further)}, **{"pseudo/train/miou": 70.0})
    compiled = grown.compiled()
    assert cells(compiled)["a"].mean == 62.0
    assert cells(compiled, "pseudo/miou")["a"].mean == 70.0
    told = "2 other runs left out: without some of the scores, maps 60.0 to 61.0."
    assert note(to_markdown(compiled), "Runs") == told


@pytest.mark.parametrize("status", ["failed", "queued"])
def test_runs_that_are_to_have_more_scores_take_no_cell_from_finished_ones(grown, status):
    grown.trial("a", stages=WITH_MASKS, tags={"status": status}, begun=status != "queued")
    compiled = grown.compiled()
    assert cells(compiled)["a"].mean == 60.5
    assert cells(compiled, "pseudo/miou")["a"].mean is None
    what = {"failed": "with all of the scores", "queued": "not begun"}[status]
    assert note(to_markdown(compiled), "Runs") == f"1 other run left out: {what}, {status}."
    grown.table.path.write_text(grown.table.text.replace("{name: miou, header: maps}, ", ""))
    (trial,) = grown.compiled().trials
    assert trial.status == status


def test_what_rows_vary_of_the_protocol_and_no_mark_shows_is_told(tmp_path):
    table = tmp_path / "own.yaml"
    table.write_text(
        "name: own\ntitle: t\nmetrics: [{name: miou, header: maps}]\n"
        "layout: {marks: [{name: flip, header: flip, field: cams.flip}]}\n"
        "rows:\n"
        "  - {id: a, label: A, set: {cams.flip: false}, marks: {flip: false}}\n"
        "  - {id: b, label: B, set: {evaluate.erosion: 7}, marks: {flip: true}}\n"
        "  - {id: c, label: C, set: {data.eval_split: train}, marks: {flip: true}}\n"
    )
    sweep = Sweep(tmp_path, table)
    sweep.full((50.0, 60.0, 70.0))
    told = note(to_markdown(sweep.compiled()), "Protocol")
    assert told == f"scales {SCALES}; eval_split val (a, b), train (c); erosion 0 (a, c), 7 (b)."
