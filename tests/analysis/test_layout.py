"""A table as a reader sees it: the paper's layout, and what stands under it."""

import re
from pathlib import Path

import pytest
import yaml

from analysis.render import to_frame, to_latex, to_markdown
from analysis.tables import compile_from_mlflow
from sweeps.plan.table import load_table
from tests.analysis.scene import CRA, OURS, PAPER, SCALES, Sweep, cells, check_latex, grid, heading_and_lines, note


def test_full_table_has_the_papers_layout(sweep):
    sweep.full()
    lines = grid(to_markdown(sweep.compiled()))
    assert list(lines)[2:] == ["L_CF", "L_CB", "L_AS", "L_AC", "mIoU (%) ours", "mIoU (%) paper"]
    assert lines[""] == ["TS-CAM", "SemFormer (ours)"] + [""] * 7
    assert lines["L_CF"] == ["–"] + ["✓"] * 8  # noqa: RUF001
    assert lines["L_AC"][1:] == ["", "", "", "✓", "", "✓", "✓", "✓"]
    assert lines["mIoU (%) ours"] == ["–", *(f"{v:.1f}" for v in OURS[:-1]), "**71.6**"]  # noqa: RUF001
    assert lines["mIoU (%) paper"] == ["40.3", *(f"{v:.1f}" for v in PAPER[:-1]), "**55.8**"]


def test_best_is_judged_as_printed(sweep):
    sweep.full([50.04, 49.96, 40.0])
    assert [cell.best for cell in cells(sweep.compiled()).values()][1:4] == [True, True, False]


def test_equal_values_have_no_best(sweep):
    sweep.full([50.04, 49.96])
    assert not any(cell.best for cell in cells(sweep.compiled()).values())


def test_notes_tell_what_the_numbers_are(sweep):
    sweep.full()
    text = to_markdown(sweep.compiled())
    assert note(text, "Ours") == "preset tiny; measured on split val; seed 0."
    assert "Table 3" in note(text, "Paper")
    assert "TS-CAM" in note(text, "Paper")
    assert note(text, "Threshold").startswith("oracle")
    assert "0.01 to 0.99 in steps of 0.01" in note(text, "Threshold")
    assert "activation map alone" in note(text, "Final map")
    assert note(text, "Protocol") == f"scales {SCALES}; flip yes; erosion 0."
    assert "stage evaluate alone, for the scores and the oracle threshold" in note(text, "Supervision audit")
    assert sweep.table.notes[0] in note(text, "Note")
    assert "†" not in text
    assert not note(text, "Runs")


def test_paper_values_come_from_the_table_file(sweep):
    sweep.full()
    edited = yaml.safe_load(sweep.table.text)
    edited["rows"][1]["paper"]["miou"] = 12.3
    edited["paper_only"][0]["paper"]["miou"] = 98.7
    path = Path(sweep.uri.removeprefix("sqlite:///")).parent / "edited.yaml"
    path.write_text(yaml.safe_dump(edited))
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=sweep.uri)
    paper = grid(to_markdown(compiled))["mIoU (%) paper"]
    assert (paper[0], paper[2], paper[8]) == ("**98.7**", "12.3", "55.8")
    assert cells(compiled)["CF-CB"].mean == OURS[1]


def test_rows_down_with_two_metrics(cra):
    text = to_markdown(cra.compiled())
    lines = [line.strip("| ") for line in re.search(r"(?m)(^\|.*\n)+", text)[0].splitlines()]
    entries = [re.split(r" *\| *", line) for line in lines]
    assert entries[0] == ["CRA", "U", "mIoU (%) ours", "mIoU (%) paper", "FP (%) ours", "FP (%) paper"]
    assert entries[2] == ["✗", "", "60.0", "55.8", "**20.0**", "20.5"]
    assert entries[3] == ["✓", "4", "**70.0**", "**63.7**", "25.0", "–"]  # noqa: RUF001
    assert note(text, "Final map") == "differs from row to row."


def test_rows_are_labelled_where_marks_do_not_tell_them(cra, tmp_path):
    path = tmp_path / "labelled.yaml"
    path.write_text(CRA + "paper_only: [{id: TS-CAM, label: TS-CAM, paper: {miou: 40.3, fp: null}}]\n")
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=cra.uri)
    lines = grid(to_markdown(compiled))
    assert lines["TS-CAM"] == ["–", "–", "–", "40.3", "–", "–"]  # noqa: RUF001
    assert lines[r"[with] \| both"][:3] == ["✓", "4", "**70.0**"]


def test_a_scaled_axis_shows_our_values_beside_the_papers(database):
    sweep = Sweep(database, "table08")
    sweep.full([40.0, 45.0, 50.0])  # of the last row nothing is measured: it shows what it would have
    compiled = sweep.compiled()
    heading, lines = heading_and_lines(to_markdown(compiled))
    assert heading == ["D ours", "D paper", "mIoU (%) ours", "mIoU (%) paper"]
    assert [line[:2] for line in lines] == [["4", "32"], ["16", "128"], ["32", "256"], ["64", "512"]]
    assert [line[2] for line in lines] == ["40.0", "45.0", "**50.0**", "— [1]"]
    source = to_latex(compiled)
    check_latex(source)
    assert r"\shortstack{$D$\\ours} & \shortstack{$D$\\paper} & \shortstack{mIoU (\%)\\ours}" in source
    assert "D = 32, 4, 0, finished, 40.00" in source
    frame = to_frame(compiled)
    assert frame["settings"].tolist() == ["D = 4", "D = 16", "D = 32", "D = 64"]


def test_a_scaled_axis_of_a_transposed_table(database):
    sweep = Sweep(database, "table13")
    sweep.full([50.0, 51.0, 52.0, 53.0, 53.0, 53.0, 53.0], fp=20.0, fn=30.0)
    lines = grid(to_markdown(sweep.compiled()))
    assert lines["U ours"] == ["1", "2", "3", "4", "4", "4", "4"]
    assert lines["U paper"] == ["1", "2", "3", "4", "5", "6", "7"]
    assert lines["FN (%) ours"] == ["30.0"] * 7
    assert lines["FN (%) paper"][5:] == ["**15.7**", "16.5"]
    check_latex(to_latex(sweep.compiled()))


def test_the_papers_own_values_are_shown_once(database):
    sweep = Sweep(database, "table06", preset="paper")
    sweep.full([59.0, 61.0, 63.0])
    heading, lines = heading_and_lines(to_markdown(sweep.compiled()))
    assert heading == ["Backbone", "mIoU (%) ours", "mIoU (%) paper"]
    assert [line[0] for line in lines] == ["DeiT-S", "DeiT-B", "DeiT-B↑"]


def test_a_scaled_axis_shows_what_the_run_had_not_what_the_file_says_now(database, tmp_path):
    sweep = Sweep(database, "table08")
    sweep.full([40.0, 45.0, 50.0, 48.0])
    path = tmp_path / "edited.yaml"
    path.write_text(sweep.table.text.replace("{caae.class_dim: 64}", "{caae.class_dim: 128}"))
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=sweep.uri)
    _, lines = heading_and_lines(to_markdown(compiled))
    assert lines[3][:3] == ["64", "512", "48.0†"]
    assert compiled.lines[3].cells["miou"].deviations == ("caae.class_dim = 64 (otherwise 128)",)


def test_bold_says_whether_of_line_or_column(sweep, cra):
    sweep.full()
    assert note(to_markdown(sweep.compiled()), "Bold").startswith("the best of its line.")
    assert note(to_markdown(cra.compiled()), "Bold").startswith("the best of its column.")


OWN = """
name: own
title: Widths of my own
source: Optuna study x
metrics: [{name: miou, header: mIoU (%)}, {name: fp, header: FP (%), best: min}]
layout: {transposed: false, marks: [{name: D, header: D, field: caae.class_dim}]}
rows:
  - {id: small, label: small, marks: {D: 32}, set: {caae.class_dim: 32}, presets: {tiny: {caae.class_dim: 4}}}
  - {id: large, label: large, marks: {D: 64}, set: {caae.class_dim: 64}}
"""


@pytest.fixture
def own(database):
    path = database / "own.yaml"
    path.write_text(OWN)
    sweep = Sweep(database, path)
    sweep.trial("small", 50.0, fp=20.0)
    sweep.trial("large", 60.0, fp=25.0)
    return sweep


def test_a_table_of_ones_own_has_no_word_on_the_paper(own):
    compiled = own.compiled()
    text = to_markdown(compiled)
    heading, lines = heading_and_lines(text)
    assert heading == ["D", "mIoU (%)", "FP (%)"]
    assert lines == [["4", "50.0", "**20.0**"], ["64", "**60.0**", "25.0"]]
    assert "paper" not in text.lower()
    assert note(text, "Source") == "Optuna study x."
    check_latex(to_latex(compiled))
    assert to_frame(compiled)["paper"].isna().all()


def test_a_transposed_table_of_ones_own_has_no_line_of_the_paper(own):
    own.table.path.write_text(OWN.replace("transposed: false", "transposed: true"))
    compiled = own.compiled()
    lines = grid(to_markdown(compiled))
    assert [*lines][2:] == ["mIoU (%)", "FP (%)"]
    assert list(lines.values())[0::2] == [["4", "64"], ["50.0", "**60.0**"]]
    assert lines["FP (%)"] == ["**20.0**", "25.0"]
    check_latex(to_latex(compiled))


def test_only_metrics_that_the_paper_has_are_shown_beside_it(own):
    own.table.path.write_text(OWN.replace("class_dim: 64}}", "class_dim: 64}, paper: {miou: 63.7}}"))
    heading, lines = heading_and_lines(to_markdown(own.compiled()))
    assert heading == ["D ours", "D paper", "mIoU (%) ours", "mIoU (%) paper", "FP (%)"]
    assert lines[0] == ["4", "32", "50.0", "–", "**20.0**"]  # noqa: RUF001


# ---- preset paper ----

VOC = "VOC 2012 (1464 images, 01234567)"


@pytest.fixture
def published(database):
    return Sweep(database, "table06", preset="paper")


def test_the_papers_own_protocol_is_told(published):
    published.full([59.0, 61.0, 63.0], protocol={"data": VOC})
    told = "Measured by the protocol of preset paper: VOC 2012, erosion 7, epoch last."
    assert note(to_markdown(published.compiled()), "Paper").endswith(told)


@pytest.mark.parametrize(
    ("overrides", "data", "says"),
    [
        ({"data.eval_split": "val"}, "VOC 2012 (1449 images, 01234567)", "split val (there train)"),
        ({"data.train_split": "train"}, VOC, "training split train (there trainaug)"),
        ({"evaluate.erosion": 0}, VOC, "erosion 0 (there 7)"),
        ({"cams.scales": "1.0", "cams.flip": False}, VOC, "scales 1.0 (there 0.5, 1.0, 1.5, 2.0), flip no (there yes)"),
        ({"segmentor.selection": "best_miou"}, VOC, "epoch best_miou (there last)"),
        ({"evaluate.rule": "fixed"}, VOC, "threshold rule fixed (there oracle)"),
        ({}, "shapes (1464 images, 01234567)", "data shapes (1464 images, 01234567) (there VOC 2012)"),
        ({}, "VOC 2012 (6 images, 01234567)", "data VOC 2012 (6 images, 01234567) (there VOC 2012)"),
    ],
)
def test_what_differs_from_the_papers_protocol_is_told(published, overrides, data, says):
    published.full([59.0, 61.0, 63.0], overrides=overrides, protocol={"data": data})
    text = note(to_markdown(published.compiled(overrides=overrides)), "Paper")
    assert text.endswith(f"Measured otherwise than by preset paper: {says}.")


def test_what_the_table_file_says_is_the_papers(published, tmp_path):
    path = tmp_path / "table06.yaml"
    path.write_text(published.table.text.replace("rows:", "baseline: {evaluate.erosion: 0}\n\nrows:", 1))
    sweep = Sweep(published.folder, path, preset="paper")
    sweep.full([59.0, 61.0, 63.0], protocol={"data": VOC})
    assert "VOC 2012, erosion 0" in note(to_markdown(sweep.compiled()), "Paper")
