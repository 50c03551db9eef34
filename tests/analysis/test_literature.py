"""Tables 1 and 2: one row of ours beside those of the literature."""

import pandas as pd
import pytest

from analysis.agreement import find_pairs
from analysis.cli import main
from analysis.render import to_frame, to_latex, to_markdown
from semformer.pipeline import STAGES
from tests.analysis.scene import Sweep, cells, check_latex, footnote, heading_and_lines, note

TO_SEGMENTATION = tuple(stage.name for stage in STAGES)
TO_MASKS = tuple(name for name in TO_SEGMENTATION if name not in ("deeplab", "segmentation", "evaluate_seg"))


@pytest.fixture
def methods(database):
    sweep = Sweep(database, "table01")
    sweep.trial("SemFormer", stages=TO_MASKS, **{"cam/train/miou": 40.0, "pseudo/train/miou": 50.0})
    return sweep


@pytest.fixture
def segmentation(database):
    sweep = Sweep(database, "table02")
    sweep.trial("SemFormer", stages=TO_SEGMENTATION, **{"seg/val/miou_crf": 60.0, "seg/val/miou": 55.0})
    return sweep


def test_the_literature_stands_above_ours_with_no_value_of_ours(methods):
    heading, lines = heading_and_lines(to_markdown(methods.compiled()))
    assert heading == ["", "Venue", "Reference", "CAM ours", "CAM paper", "Mask ours", "Mask paper"]
    assert lines[0] == ["CAM", "CVPR 2016", "Zhou et al. [47]", "–", "47.4", "–", "–"]  # noqa: RUF001
    assert lines[12] == ["AMN", "CVPR 2022", "Lee et al. [24]", "–", "62.1", "–", "72.2"]  # noqa: RUF001
    assert [line[0] for line in lines[14:]] == ["", "SemFormer"]
    assert lines[14] == [""] * 7, "what sets ours apart"
    assert lines[15][3:] == ["40.0", "**63.7**", "50.0", "**73.2**"]


def test_a_rule_sets_ours_apart_in_latex(segmentation):
    source = to_latex(segmentation.compiled())
    check_latex(source)
    body = source.partition(r"\toprule")[2].splitlines()
    assert [i for i, line in enumerate(body) if line == r"\midrule"] == [2, 16]
    assert body[15].startswith("MCTFormer & CVPR 2022 & Xu et al. [42] & I & ")
    assert body[17].startswith("SemFormer &  &  & I & 60.0 & ")


def test_what_no_run_measures_says_who_does(segmentation):
    compiled = segmentation.compiled()
    text = to_markdown(compiled)
    assert heading_and_lines(text)[1][-1][4:] == ["60.0", "**74.3**", "— [1]", "**74.0**"]
    assert footnote(text, "[1]") == "test is measured by VOC's server alone, see semformer export-test"
    assert compiled.lines[-1].is_filled
    assert "| test " not in text.partition("Where the measured values come from")[2]
    frame = to_frame(compiled).set_index(["row", "metric"])
    assert frame.loc[("SemFormer", "test"), "paper"] == 74.0
    assert pd.isna(frame.loc[("SemFormer", "test"), "value"])


def test_a_failed_run_is_not_why_what_is_measured_elsewhere_is_missing(database):
    sweep = Sweep(database, "table02")
    sweep.trial("SemFormer", stages=TO_SEGMENTATION, tags={"status": "failed", "reason": "disk full"})
    compiled = sweep.compiled()
    assert heading_and_lines(to_markdown(compiled))[1][-1][4:] == ["failed [1]", "**74.3**", "— [2]", "**74.0**"]
    assert not compiled.lines[-1].is_filled


def test_the_best_is_that_of_equal_supervision(segmentation):
    lines = heading_and_lines(to_markdown(segmentation.compiled()))[1]
    bold = {line[0]: [value for value in line[4:] if value.startswith("**")] for line in lines}
    assert {name: values for name, values in bold.items() if values} == {
        "DeepLabV2": ["**77.7**", "**79.7**"],
        "BBAM": ["**73.7**"],  # nothing of its kind has a value on test
        "EPS": ["**71.0**", "**71.8**"],
        "SemFormer": ["**74.3**", "**74.0**"],
    }
    told = note(to_markdown(segmentation.compiled()), "Bold")
    assert told == "the best of its column at equal Supervision."


OWN = """
name: own
title: Two of ours
metrics: [{name: miou, header: mIoU (%)}]
layout: {compared: Sup, marks: [{name: Sup, header: Sup}]}
rows:
  - {id: a, label: a, marks: {Sup: I}, set: {segmentor.sigma: 0.1}}
  - {id: b, label: b, marks: {Sup: I}, set: {segmentor.sigma: 0.2}}
  - {id: c, label: c, marks: {Sup: F}, set: {segmentor.sigma: 0.3}}
  - {id: d, label: d, marks: {Sup: F}, set: {segmentor.sigma: 0.4}}
paper_only: [{id: theirs, label: theirs, marks: {Sup: I}, paper: {miou: 90.0}}]
"""


def test_the_literature_takes_no_part_in_the_best_of_ours(database):
    path = database / "own.yaml"
    path.write_text(OWN)
    sweep = Sweep(database, path)
    sweep.full([50.0, 60.0, 80.0, 70.0])
    found = cells(sweep.compiled())
    assert [name for name, cell in found.items() if cell.best] == ["b", "c"]
    assert not any(cell.paper_best for cell in found.values()), "one alone is not the best"


def test_what_is_measured_elsewhere_may_come_first(database):
    path, first = database / "own.yaml", "{name: test, header: test, elsewhere: by a server}, "
    text = OWN.replace("metrics: [", f"metrics: [{first}")
    for sigma, value in (("0.1", 40.0), ("0.2", 45.0)):
        text = text.replace(f"sigma: {sigma}}}", f"sigma: {sigma}}}, paper: {{miou: {value}}}")
    path.write_text(text)
    sweep = Sweep(database, path)
    sweep.full([50.0, 60.0])
    sweep.trial("b", 55.0, overrides={"segmentor.epochs": 9})
    compiled = sweep.compiled()
    assert "mIoU (%) 55.0 (--set segmentor.epochs=9 shows it)" in note(to_markdown(compiled), "Runs")
    assert [(pair.rows, pair.ours) for pair in find_pairs([compiled])] == [(("a", "b"), {0: 10.0})]


def test_supervision_split_and_protocol_of_ours_are_told(methods, database):
    text = to_markdown(methods.compiled())
    assert note(text, "Ours") == "preset tiny; measured are pseudo masks on split train; seed 0."
    assert "Nothing of ours is measured for the 14 others, CAM to MCTFormer." in note(text, "Paper")
    assert "CRF iterations of the masks 5" in note(text, "Protocol")
    audit = "training sees image-level labels only; pixel masks are read by stage evaluate_masks alone, for the scores"
    assert note(text, "Supervision audit") == f"{audit} and the oracle threshold."
    sweep = Sweep(database, "table02")
    sweep.trial("SemFormer", stages=TO_SEGMENTATION, **{"seg/val/miou_crf": 60.0})
    text = to_markdown(sweep.compiled())
    assert note(text, "Ours") == "preset tiny; measured are the segmentation on split val; seed 0."
    assert "CRF iterations of the segmentation 5; supervised no" in note(text, "Protocol")
    assert note(text, "Supervision audit") == audit.replace("evaluate_masks", "evaluate_seg") + "."


def test_the_literature_makes_no_pairs(methods, segmentation):
    assert find_pairs([methods.compiled(), segmentation.compiled()]) == []


def test_all_tables_that_there_are_runs_of_have_them(methods, segmentation, capsys):
    assert main(["--all", "--tracking-uri", methods.uri]) == 0
    assert "2 of 53 cells filled; no trial of table03, " in capsys.readouterr().out
