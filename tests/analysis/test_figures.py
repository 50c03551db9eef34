"""`semformer-tables figures`: what is drawn is what was measured."""

import itertools
import json
import statistics

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.colors import to_hex
from mlflow.entities import Metric
from PIL import Image

from analysis.cli import main
from analysis.details import LOSS
from analysis.figures import draw_all
from analysis.plots.common import OURS, PAPER
from semformer.errors import UserError
from sweeps.tracking import rows as row_tags
from tests.analysis.scene import Sweep

TWO = """\
name: two
title: Costs $5, not $6
metrics: [{name: miou, header: mIoU (%)}]
rows:
  - {id: a, label: "a $x^$ of", set: {segmentor.sigma: 0.1}}
  - {id: b, label: b, set: {segmentor.sigma: 0.2, cams.flip: false}}
"""
OWN = """\
name: own
title: No values of the paper, in no order
metrics: [{name: miou, header: mIoU (%)}]
rows:
  - {id: many, label: many, set: {caae.class_dim: 64}}
  - {id: few, label: few, set: {caae.class_dim: 4}}
  - {id: usual, label: usual}
"""
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
CLASSES = ("background", "disc", "star")
TRIED = [0.1, 0.2, 0.25, 0.3]
EVERY = {"evaluate.thresholds": "0.1,0.3,0.1"}


def draw(sweep, *tables, **options):
    """The figures by name, and what was told of others."""
    compiled = [one.compiled(**options) for one in tables or (sweep,)]
    told = []
    return {drawn.name: drawn for drawn in draw_all(compiled, sweep.uri, told.append)}, "\n".join(told)


def keep(sweep, run, name, columns, folder=None):
    path = sweep.folder / name
    pq.write_table(pa.table(columns), path)
    sweep.client.log_artifact(run, str(path), folder)


def keep_curve(sweep, run, miou):
    keep(sweep, run, "threshold_curve.parquet", {"threshold": TRIED, "miou": miou, "fp": miou, "fn": miou})


def keep_classes(sweep, run, iou, folder=None, classes=CLASSES):
    keep(sweep, run, "class_iou.parquet", {"class": classes, "iou": iou}, folder)


def keep_loss(sweep, run, values):
    sweep.client.log_batch(run, [Metric(LOSS, value, 0, epoch) for epoch, value in enumerate(values, start=1)])


def stages(**digests):
    return {"stage_keys": json.dumps({name: digest * 8 for name, digest in digests.items()})}


def own_sweep(database, text):
    path = database / "own.yaml"
    path.write_text(text)
    return Sweep(database, path)


def lines(axes):
    """Label -> its x and y."""
    return {line.get_label(): [list(data) for data in line.get_data()] for line in axes.get_lines()}


def error_bars(axes):
    """x, y and half the length of each."""
    (container,) = axes.containers
    x, y = container.lines[0].get_data()
    (bars,) = container.lines[2]
    return [list(x), list(y), [(bar[1, 1] - bar[0, 1]) / 2 if len(bar) else np.nan for bar in bars.get_segments()]]


@pytest.fixture
def last_blocks(database):
    """Table 13 in two seeds; its last four rows are one run."""
    sweep = Sweep(database, "table13")
    for seed in (0, 1):
        for u in (1, 2, 3):
            sweep.trial(f"U-{u}", 50.0 + u + 4 * seed, seed=seed, fp=20.0 - u, fn=30.0 - u)
        sweep.trial("U-4", 60.0 + seed, rows="U-4,U-5,U-6,U-7", seed=seed, fp=10.0 + 2 * seed, fn=20.0)
    return sweep


def test_the_curve_over_an_axis_has_means_deviations_seeds_and_the_papers_values(last_blocks):
    figures, _ = draw(last_blocks)
    drawn = figures["table13-axis"]
    panels = drawn.figure.axes
    assert [panel.get_ylabel() for panel in panels] == ["mIoU (%)", "FP (%)", "FN (%)"]
    assert {panel.get_xlabel() for panel in panels} == {"U (cams.last_blocks), ours in brackets"}
    x, means, spreads = error_bars(panels[0])
    assert (x, means) == ([1, 2, 3, 4], [53.0, 54.0, 55.0, 60.5])
    np.testing.assert_allclose(spreads, [8**0.5] * 3 + [0.5**0.5])
    assert error_bars(panels[1])[1:] == [[19.0, 18.0, 17.0, 11.0], [0, 0, 0, pytest.approx(2**0.5)]]
    seen = lines(panels[0])
    assert seen["paper"] == [[*range(1, 8)], [60.0, 61.6, 63.3, 63.7, 63.5, 63.2, 63.0]]
    assert lines(panels[2])["paper"][1] == [16.0, 16.6, 16.6, 17.0, 16.5, 15.7, 16.5]
    assert seen["ours, each seed"] == [[1, 1, 2, 2, 3, 3, 4, 4], [51, 55, 52, 56, 53, 57, 60, 61]]
    assert seen["ours, runs of another row again"] == [[5, 6, 7], [60.5] * 3]
    by_label = {line.get_label(): line for line in panels[0].get_lines()}
    assert (by_label["paper"].get_linestyle(), to_hex(by_label["paper"].get_color()).upper()) == ("--", PAPER)
    assert by_label["ours, runs of another row again"].get_markerfacecolor() == "white"
    assert to_hex(panels[0].containers[0].lines[0].get_color()).upper() == OURS
    assert [label.get_text() for label in panels[0].get_xticklabels()] == [*"1234", "5\n(4)", "6\n(4)", "7\n(4)"]
    assert "n = 2 seeds (0, 1)." in drawn.caption
    assert "error bars the sample standard deviation over seeds" in drawn.caption
    assert "One and the same runs: U = 4, U = 5, U = 6, U = 7." in drawn.caption


def test_one_seed_has_neither_error_bars_nor_dots(database):
    sweep = Sweep(database, "table17")
    sweep.full([40.0, 41.0, 42.0])
    figures, _ = draw(sweep)
    panel = figures["table17-axis"].figure.axes[0]
    x, y, _ = error_bars(panel)
    assert (x, y) == ([0.025, 0.05, 0.075], [40.0, 41.0, 42.0])
    assert "ours, each seed" not in lines(panel)
    assert "n = 1 seed (0)." in figures["table17-axis"].caption
    assert "deviation" not in figures["table17-axis"].caption
    assert f"Not shown, as there is no finished run: {SIGMA} = 0.1." in figures["table17-axis"].caption


def test_seeds_that_a_row_lacks_and_rows_that_are_not_comparable_are_told(database):
    sweep = Sweep(database, "table17")
    sweep.full([40.0, 41.0, 42.0])
    sweep.trial("sigma-0.05", 43.0, seed=1)
    sweep.trial("sigma-0.1", 44.0, protocol={"erosion": 7})
    caption = draw(sweep)[0]["table17-axis"].caption
    assert f"n = 2 seeds (0, 1); n = 1: {SIGMA} = 0.025, {SIGMA} = 0.075, {SIGMA} = 0.1." in caption
    assert f"Not comparable: {SIGMA} = 0.1 (erosion = 7 (otherwise 0))." in caption


def test_rows_stand_where_the_paper_has_them_on_a_logarithmic_axis_if_it_is_wide(database):
    sweep = Sweep(database, "table08")
    sweep.full([40.0, 41.0, 42.0, 43.0])
    panel = draw(sweep)[0]["table08-axis"].figure.axes[0]
    assert error_bars(panel)[0] == lines(panel)["paper"][0] == [32, 128, 256, 512]
    assert panel.get_xscale() == "log"
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    assert ticks == ["32\n(4)", "128\n(16)", "256\n(32)", "512\n(64)"]


def test_a_table_without_values_of_the_paper_stands_at_our_own_in_order(database):
    sweep = own_sweep(database, OWN)
    sweep.full([64.0, 4.0, 32.0])
    panel = draw(sweep)[0]["own-axis"].figure.axes[0]
    assert error_bars(panel)[:2] == [[4, 32, 64], [4.0, 32.0, 64.0]]
    assert "paper" not in lines(panel)
    assert panel.get_xlabel() == "caae.class_dim"


def test_tables_of_other_than_one_number_have_no_axis(database, sweep):
    two, truths = own_sweep(database, TWO), Sweep(database, "table11")
    for one in (sweep, two, truths):
        one.full([40.0, 41.0])
    figures, told = draw(sweep, sweep, two, truths)
    assert figures.keys() == set()
    assert "table03-axis is left out: its rows vary segmentor.losses, which is not a number" in told
    assert "two-axis is left out: its rows vary segmentor.sigma and cams.flip, not one number" in told
    assert "table11-axis is left out: its rows vary caae.reconstruction, which is not a number" in told
    for kind, what in (("thresholds", "threshold_curve.parquet"), ("training", f"the series {LOSS}")):
        assert f"table03-{kind} is left out: no finished run has {what}" in told
    assert "table03-classes is left out: no finished run of its first row (CF) has class_iou.parquet" in told
    assert "cost is left out: no finished run has both" in told


def test_curves_over_thresholds_are_means_in_their_span_with_both_rules(sweep):
    best, other = [10.0, 20.0, 35.0, 30.0], [10.0, 44.0, 25.0, 12.0]
    for seed, curve in enumerate((best, other)):
        keep_curve(sweep, sweep.trial("CF", 30.0, seed=seed, overrides=EVERY), curve)
    keep_curve(sweep, sweep.trial("CF-CB", 30.0, overrides=EVERY), [1.0, 2.0, 3.0, 4.0])
    sweep.trial("CF-AS", 30.0, overrides=EVERY)
    figures, _ = draw(sweep, overrides=EVERY)
    drawn = figures["table03-thresholds"]
    (panel,) = drawn.figure.axes
    both, oracle, fixed, alone, *_ = panel.get_lines()
    assert [list(data) for data in both.get_data()] == [TRIED, [10.0, 32.0, 30.0, 21.0]]
    assert [list(data) for data in alone.get_data()] == [TRIED, [1.0, 2.0, 3.0, 4.0]]
    (band,) = panel.collections
    corners = {(round(x, 2), y) for x, y in band.get_paths()[0].vertices}
    assert corners >= {(0.2, 20.0), (0.2, 44.0), (0.25, 25.0), (0.25, 35.0)}
    assert [*oracle.get_xydata()[0]] == [pytest.approx(0.25), 37.0]  # 0.3: 30; 0.2: 44. 0.25 was not tried
    assert [*fixed.get_xydata()[0]] == [0.25, 30.0]
    assert fixed.get_markerfacecolor() == "white"
    assert oracle.get_markerfacecolor() == both.get_color()
    assert "Hollow markers: the fixed threshold, 0.25." in drawn.caption
    assert "n = 2 seeds (0, 1); n = 1: CF + CB." in drawn.caption
    assert "no threshold_curve.parquet of a finished run: CF + AS, " in drawn.caption


def test_rows_that_are_the_same_runs_are_one_curve(last_blocks):
    for trial in last_blocks.compiled().trials:
        keep_curve(last_blocks, trial.run_id, [1.0, 2.0, 3.0, 4.0])
    (legend,) = draw(last_blocks)[0]["table13-thresholds"].figure.legends
    labels = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in legend.get_texts()]
    assert labels == ["U = 1", "U = 2", "U = 3", "U = 4, U = 5, U = 6, U = 7"]


def test_training_is_drawn_of_each_network_once(database):
    sweep = Sweep(database, "table13")
    losses = {("U-1", 0): [3.0, 2.0, 1.0], ("U-2", 0): [3.0, 2.0, 1.0], ("U-2", 1): [5.0, 4.0, 3.0], ("U-3", 0): [9.0]}
    for (row, seed), values in losses.items():
        network = "b" if row == "U-3" else f"a{seed}"
        run = sweep.trial(row, 50.0, seed=seed, tags=stages(segmentor=network, evaluate=f"{row}{seed}"))
        keep_loss(sweep, run, values)
    drawn = draw(sweep)[0]["table13-training"]
    (panel,) = drawn.figure.axes
    shared, other = panel.get_lines()
    assert [list(data) for data in shared.get_data()] == [[1, 2, 3], [4.0, 3.0, 2.0]]
    assert [list(data) for data in other.get_data()] == [[1], [9.0]]
    labels = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in drawn.figure.legends[0].get_texts()]
    assert labels == ["U = 1, U = 2", "U = 3"]
    assert "Rows with one curve share their networks." in drawn.caption


def test_losses_of_other_terms_are_told(sweep):
    keep_loss(sweep, sweep.trial("CF", 40.0), [1.0])
    assert "Rows with other losses sum other terms." in draw(sweep)[0]["table03-training"].caption


def test_changes_of_classes_are_of_the_seeds_that_both_rows_have(sweep):
    ious = {
        ("CF", 0): [90.0, 10.0, 20.0],
        ("CF", 1): [80.0, 20.0, 50.0],
        ("CF-CB", 1): [81.0, 26.0, 35.0],
        ("CF-AS", 0): [91.0, 10.0, 20.0],
        ("CF-AS", 1): [84.0, 20.0, 50.0],
        ("CF-AC", 2): [1.0, 2.0, 3.0],
    }
    for (row, seed), iou in ious.items():
        run = sweep.trial(row, statistics.fmean(iou), seed=seed)
        order = slice(None, None, -1 if row == "CF-AS" else 1)
        keep_classes(sweep, run, iou[order], classes=CLASSES[order])
    drawn = draw(sweep)[0]["table03-classes"]
    above, below = drawn.figure.axes
    np.testing.assert_allclose(above.images[0].get_array(), [[85.0, 15.0, 35.0, 45.0]])
    changes = [[1.0, 6.0, -15.0, -8 / 3], [2.5, 0.0, 0.0, 2.5 / 3]]
    np.testing.assert_allclose(below.images[0].get_array(), changes)
    assert [text.get_text() for text in below.texts[:4]] == ["+1.0", "+6.0", "-15.0", "-2.7"]
    assert [label.get_text() for label in below.get_xticklabels()] == [*CLASSES, "mean"]
    assert [label.get_text() for label in below.get_yticklabels()] == ["CF + CB", "CF + AS"]
    low, high = below.images[0].get_clim()
    assert (low, high) == (-15.0, 15.0)
    assert "n = 2 seeds (0, 1); n = 1: CF + CB." in drawn.caption
    assert "in a seed of the first row: CF + CB + AS, " in drawn.caption
    assert drawn.caption.endswith("all four, CF + AC.")


def test_classes_of_pseudo_masks_are_those_of_a_table_about_them(database):
    text = OWN.replace("name: miou", "name: pseudo/miou")
    sweep = own_sweep(database, text)
    for row, iou in (("many", [1.0, 2.0, 3.0]), ("few", [2.0, 4.0, 6.0])):
        run = sweep.trial(row, **{"pseudo/train/miou": 50.0})
        keep_classes(sweep, run, iou, "evaluate_masks")
        keep_classes(sweep, run, [0.0, 0.0, 0.0])
    drawn = draw(sweep)[0]["own-classes"]
    np.testing.assert_allclose(drawn.figure.axes[1].images[0].get_array(), [[1.0, 2.0, 3.0, 2.0]])
    assert drawn.caption.startswith("IoU of pseudo masks.")


def test_scores_without_classes_are_told(database):
    sweep = own_sweep(database, OWN.replace("name: miou", "name: walk/miou"))
    sweep.trial("many", **{"walk/train/miou": 50.0})
    assert "own-classes is left out: of walk/miou, no run records the IoU of each class" in draw(sweep)[1]


def test_cost_is_the_sum_of_the_stages_of_each_run_once(database, sweep):
    other = Sweep(database, "table11")
    both = row_tags.tags(["table03/CF", "table11/with"])
    sweep.trial("CF", 30.0, tags=both, **{"caae/seconds": 100.0, "segmentor/seconds": 80.0})
    sweep.trial("CF-CB", 29.0, **{"caae/seconds": 240.0})
    sweep.trial("CF-AS", 50.0, **{"caae/seconds": 300.0, "cams/seconds": 60.0, "caae/lr": 9.0})
    sweep.trial("CF-AC", 60.0)
    sweep.trial("CF-CB-AS", 70.0, tags={"status": "failed", "reason": "disk full"}, **{"caae/seconds": 1.0})
    other.trial("without", 40.0, **{"caae/seconds": 420.0})
    drawn = draw(sweep, sweep, other)[0]["cost"]
    (panel,) = drawn.figure.axes
    seen = lines(panel)
    assert seen["run that no cheaper one equals"] == [[3.0, 6.0], [30.0, 50.0]]
    assert seen["run"] == [[4.0, 7.0], [29.0, 40.0]]
    assert panel.get_xlabel() == "time of all stages (minutes)"
    assert {text.get_text() for text in panel.texts} == {
        "table03 CF = table11 with",
        "table03 CF + CB",
        "table03 CF + AS",
        "table11 without",
    }


def test_costs_that_are_far_apart_are_on_a_logarithmic_axis(sweep):
    for row, hours in (("CF", 0.5), ("CF-CB", 30.0)):
        sweep.trial(row, 40.0, **{"caae/seconds": 3600 * hours})
    figure = draw(sweep)[0]["cost"].figure
    figure.draw_without_rendering()
    (panel,) = figure.axes
    assert (panel.get_xscale(), panel.get_xlabel()) == ("log", "time of all stages (hours)")
    assert {"0.5", "1", "2", "5", "10", "20"} <= {label.get_text() for label in panel.get_xticklabels()}


def test_many_rows_are_told_apart_and_have_room_in_the_legend(database):
    rows = [f"  - {{id: r{i}, label: row {i}, set: {{segmentor.sigma: {i + 1}e-2}}}}" for i in range(24)]
    sweep = own_sweep(database, OWN.partition("rows:")[0] + "rows:\n" + "\n".join(rows))
    for row in sweep.rows:
        keep_loss(sweep, sweep.trial(row, 40.0), [2.0, 1.0])
    figures, _ = draw(sweep)
    figure = figures["own-training"].figure
    drawn = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 24
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 24
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [(one.get_marker(), one.get_color()) for one in legend.get_lines()] == [
        (line.get_marker(), line.get_color()) for line in drawn
    ]
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.y1
    axis = figures["own-axis"].figure
    axis.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axis.axes[0].get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_labels_are_left_out_where_it_is_crowded(sweep):
    for i, row in enumerate(sweep.rows):
        sweep.trial(row, 40.0 - 0.001 * i, **{"caae/seconds": 100.0 + 0.001 * i})
    sweep.trial("CF", 80.0, seed=1, **{"caae/seconds": 900.0})
    panel = draw(sweep)[0]["cost"].figure.axes[0]
    assert [len(x) for x, _ in lines(panel).values()] == [7, 2]
    assert panel.texts[0].get_text() == "table03 CF"
    assert len(panel.texts) < 6
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_command_writes_pictures_that_open_and_tells_the_rest(last_blocks, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main(["figures", "table13", "--tracking-uri", last_blocks.uri, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sorted(path.name for path in out.iterdir()) == ["figures.md", "table13-axis.pdf", "table13-axis.png"]
    with Image.open(out / "table13-axis.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == pytest.approx(150 * 10.1, abs=1)
        assert picture.text["Title"] == "table13: mIoU, FP, FN by U (cams.last_blocks)"
    pdf = (out / "table13-axis.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    text = (out / "figures.md").read_text()
    assert "![](table13-axis.png)\n\nPreset tiny; n = 2 seeds (0, 1)." in text
    assert "table13-thresholds is left out: no finished run has threshold_curve.parquet" in printed.err
    assert f"wrote {out / 'figures.md'}" in printed.err


def test_labels_are_no_mathematics(database, tmp_path):
    sweep = own_sweep(database, TWO)
    keep_loss(sweep, sweep.trial("a", 40.0, **{"caae/seconds": 1.0}), [1.0, 2.0])
    assert main(["figures", str(sweep.table.path), "--tracking-uri", sweep.uri, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"two-training.png", "cost.png"}


def test_nothing_to_draw_is_told(sweep, tmp_path, capsys):
    sweep.trial("CF", tags={"status": "failed", "reason": "disk full"})
    assert main(["figures", "table03", "--tracking-uri", sweep.uri, "--out", str(tmp_path / "out")]) == 2
    assert "error: no run has anything to draw" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_and_a_folder_that_cannot_be_written_are_told(last_blocks, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["figures", "table13", "--tracking-uri", last_blocks.uri, "--out", str(tmp_path / "file" / "x")]
    assert main(command) == 2
    assert "error: cannot write " in capsys.readouterr().err
    run = last_blocks.compiled().trials[0].run_id
    last_blocks.client.log_text(run, "no parquet", "threshold_curve.parquet")
    with pytest.raises(UserError, match=f"threshold_curve.parquet of run {run} cannot be read"):
        draw(last_blocks)
    for values in ([None, None], ["high", "low"]):
        pd.DataFrame({"threshold": [0.3, 0.4], "miou": values}).to_parquet(tmp_path / "threshold_curve.parquet")
        last_blocks.client.log_artifact(run, str(tmp_path / "threshold_curve.parquet"))
        with pytest.raises(UserError, match=f"threshold_curve.parquet of run {run} cannot be read"):
            draw(last_blocks)
