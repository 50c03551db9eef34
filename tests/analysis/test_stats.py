"""Intervals against independent computations: scipy, brute force, the stages' own scores."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, ttest_1samp

from analysis.chance import CLASS_IOU, IMAGE_COUNTS, read_pixels, with_chance
from analysis.cli import main
from analysis.render import to_latex, to_markdown
from analysis.stats import RESAMPLES, mean_iou, over_images, over_seeds, resampled
from semformer.metrics import scores
from semformer.stages import evaluate
from tests.analysis.scene import Sweep, check_latex, note

CLASSES = ["background", "a", "b"]


def made(rng, n_images, K=3, quality=0.7):
    """Pixels (n_images, K, 3) of intersection, prediction and truth."""
    true = rng.integers(20, 200, (n_images, K))
    hit = rng.binomial(true, quality)
    return np.stack([hit, hit + rng.integers(0, 60, (n_images, K)), true], axis=-1)


def test_interval_over_seeds_is_students():
    values = [57.5, 59.2, 59.3, 55.2]
    assert over_seeds(values) == pytest.approx(tuple(ttest_1samp(values, 0).confidence_interval()))
    assert over_seeds([1.0]) is None


def test_mean_iou_is_that_of_a_confusion_matrix():
    confusion = np.random.default_rng(0).integers(0, 50, (4, 4))
    confusion[3], confusion[:, 3] = 0, 0  # a class that is nowhere counts as 0
    pixels = np.stack([np.diagonal(confusion), confusion.sum(axis=0), confusion.sum(axis=1)], axis=-1)
    assert mean_iou(pixels) == pytest.approx(float(scores(confusion).miou))


def test_resamples_of_few_images_are_spread_as_all_that_there_are():
    pixels = made(np.random.default_rng(1), 4)
    every = [mean_iou(pixels[list(drawn)].sum(axis=0)) for drawn in itertools.product(range(4), repeat=4)]
    ours = resampled(pixels)
    assert ours.shape == (RESAMPLES,)
    assert ours.mean() == pytest.approx(np.mean(every), abs=4 * np.std(every) / RESAMPLES**0.5)
    assert np.isin(ours.round(9), np.round(every, 9)).all()
    for q in (0.1, 0.5, 0.9):
        share = np.mean(np.array(every) <= np.quantile(ours, q) + 1e-9)
        assert share == pytest.approx(q, abs=0.04)


def test_a_class_of_one_image_does_not_pull_the_interval_below_the_value():
    """Each of 20 classes is in one image: a resample without it does not count it as 0."""
    pixels = np.zeros((20, 20, 3), int)
    pixels[range(20), range(20)] = np.column_stack([np.full(20, 70) + np.arange(20), np.full((20, 2), 100)])
    low, high = over_images(resampled(pixels))
    assert low < mean_iou(pixels.sum(axis=0)) < high


def test_intervals_are_scipys_paired_ones():
    rng = np.random.default_rng(2)
    first, second = made(rng, 50), made(rng, 50, quality=0.75)
    ours = over_images(resampled(second) - resampled(first))

    def gain(drawn, axis=-1):
        drawn = drawn.astype(int)
        return mean_iou(second[drawn].sum(axis=-3)) - mean_iou(first[drawn].sum(axis=-3))

    theirs = bootstrap((np.arange(50),), gain, method="percentile", n_resamples=4000, rng=3).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.25)
    apart = over_images(resampled(second)).high - over_images(resampled(first)).low
    assert ours.high < apart, "paired, images that are hard for both say nothing of the difference"


def test_the_pixels_that_stages_keep_give_their_scores(chain):
    assert (CLASS_IOU, IMAGE_COUNTS) == (evaluate.CLASS_IOU, evaluate.IMAGE_COUNTS)
    n_scores = 0
    for stage in ("evaluate", "evaluate_masks", "evaluate_seg"):
        artifact = chain[1][stage].artifact
        files = [artifact.file(name) for name in (IMAGE_COUNTS, CLASS_IOU)]
        for name in pd.read_parquet(files[0])["score"].unique():
            of, _, score = name.split("/")
            ids, pixels = read_pixels(*files, f"{of}/", score)
            assert len(ids) == len(pixels) > 1
            assert mean_iou(pixels.sum(axis=0)) == pytest.approx(artifact.info["metrics"][name], abs=1e-9)
            n_scores += 1
    assert n_scores == 1 + 4 + 4


def keep(sweep, run, pixels, folder, classes=CLASSES, score="cam/val/miou", ids=None, **changes):
    """Files of a run as `evaluate` makes them."""
    ids = ids or [f"image{i:02}" for i in range(len(pixels))]
    rows = [
        (score, image, name, *map(int, of_class))
        for image, of_image in zip(ids, pixels, strict=True)
        for name, of_class in zip(classes, of_image, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["score", "image", "class", "intersection", "predicted", "true"])
    frame.assign(**changes).to_parquet(folder / IMAGE_COUNTS)
    pd.DataFrame({"class": CLASSES, "iou": 0.0}).to_parquet(folder / CLASS_IOU)
    for name in (IMAGE_COUNTS, CLASS_IOU):
        sweep.client.log_artifact(run, str(folder / name))


@pytest.fixture
def measured(sweep, tmp_path):
    """CF, and CF + CB which is better, and CF + AS which is as good as that."""
    rng = np.random.default_rng(4)
    of_rows = {row: made(rng, 40, quality=q) for row, q in (("CF", 0.4), ("CF-CB", 0.7), ("CF-AS", 0.69))}
    for row, pixels in of_rows.items():
        keep(sweep, sweep.trial(row, float(mean_iou(pixels.sum(axis=0)))), pixels, tmp_path)
    return sweep, of_rows


def chances(sweep):
    (compiled,) = with_chance([sweep.compiled()], sweep.uri)
    return compiled, compiled.chances


def test_one_seed_has_intervals_over_images(measured):
    sweep, of_rows = measured
    compiled, found = chances(sweep)
    assert compiled.best == "CF-CB"
    resamples = {row: resampled(pixels) for row, pixels in of_rows.items()}
    for row, chance in found.items():
        assert chance.images == over_images(resamples[row])
        assert chance.seeds is None
    assert (found["CF"].from_first, found["CF-CB"].from_best) == (None, None)
    assert found["CF-AS"].from_first.images == over_images(resamples["CF-AS"] - resamples["CF"])
    assert found["CF"].from_best.images == over_images(resamples["CF"] - resamples["CF-CB"])
    assert [line.id for line in compiled.lines if compiled.is_tied(line)] == ["CF-AS"]
    markdown, latex = to_markdown(compiled), to_latex(compiled)
    mean = {row: f"{mean_iou(pixels.sum(axis=0)):.1f}" for row, pixels in of_rows.items()}
    assert f"**{mean['CF-CB']}**" in markdown
    assert f"*{mean['CF-AS']}* " in markdown.replace(f"**{mean['CF-CB']}**", "")
    assert rf"\textit{{{mean['CF-AS']}}}" in latex
    check_latex(latex)
    assert "cannot be told apart from the best in mIoU" in note(markdown, "Italic")
    assert "over images (a bootstrap" in note(markdown, "Chance")
    assert "over seeds" not in note(markdown, "Chance")
    low, high = found["CF-AS"].from_first.images
    assert f"(images {low:.1f} to {high:.1f})" in markdown.partition("How far chance goes")[2]


def test_seeds_have_intervals_of_their_own(measured, tmp_path):
    sweep, of_rows = measured
    rng = np.random.default_rng(5)
    again = {row: made(rng, 40, quality=q) for row, q in (("CF", 0.42), ("CF-CB", 0.6))}
    for row, pixels in again.items():
        keep(sweep, sweep.trial(row, float(mean_iou(pixels.sum(axis=0))), seed=1), pixels, tmp_path)
    _, found = chances(sweep)
    of_both = {row: [of_rows[row], again[row]] for row in again}
    values = {row: [float(mean_iou(p.sum(axis=0))) for p in both] for row, both in of_both.items()}
    means = {row: np.mean([resampled(p) for p in both], axis=0) for row, both in of_both.items()}
    gap = found["CF-CB"].from_first
    assert gap.n == 2
    gains = np.subtract(values["CF-CB"], values["CF"])
    assert gap.mean == pytest.approx(gains.mean())
    assert gap.seeds == pytest.approx(tuple(ttest_1samp(gains, 0).confidence_interval()))
    assert gap.images == pytest.approx(over_images(means["CF-CB"] - means["CF"]))
    assert found["CF"].seeds == pytest.approx(tuple(ttest_1samp(values["CF"], 0).confidence_interval()))
    assert found["CF"].images == pytest.approx(over_images(means["CF"]))
    only_one = found["CF-AS"].from_first
    assert (only_one.n, only_one.seeds) == (1, None)
    assert only_one.images == over_images(resampled(of_rows["CF-AS"]) - resampled(of_rows["CF"]))


def test_what_is_clear_over_images_may_be_chance_over_seeds(sweep):
    """Differences of 10 and of 0.5 points: which of the two is the rule, two seeds cannot tell."""
    for seed, (first, second) in enumerate([(40.0, 50.0), (40.0, 40.5)]):
        sweep.trial("CF", first, seed=seed)
        sweep.trial("CF-CB", second, seed=seed)
    compiled, found = chances(sweep)
    assert found["CF"].from_best.images is None
    assert found["CF"].from_best.seeds.has_zero
    assert [line.id for line in compiled.lines if compiled.is_tied(line)] == ["CF"]


def test_runs_without_their_pixels_have_no_interval_and_no_mark(sweep):
    sweep.trial("CF", 40.0)
    sweep.trial("CF-CB", 40.1)
    compiled, found = chances(sweep)
    assert all(chance.images is None and chance.seeds is None for chance in found.values())
    assert not any(compiled.is_tied(line) for line in compiled.lines)
    markdown = to_markdown(compiled)
    assert "How far chance goes" not in markdown
    assert not note(markdown, "Chance") + note(markdown, "Italic")


def test_other_images_are_not_paired(measured, tmp_path):
    sweep, of_rows = measured
    value = float(mean_iou(of_rows["CF"].sum(axis=0)))
    keep(sweep, sweep.trial("CF-AC", value), of_rows["CF"], tmp_path, ids=[f"other{i:02}" for i in range(40)])
    _, found = chances(sweep)
    assert found["CF-AC"].images == found["CF"].images
    assert found["CF-AC"].from_first.images is None
    assert found["CF-AC"].from_first.mean == pytest.approx(0.0)


def test_pixels_that_do_not_give_the_recorded_value_are_not_its(measured, tmp_path):
    sweep, of_rows = measured
    keep(sweep, sweep.trial("CF-AC", 51.0), of_rows["CF"], tmp_path)
    keep(sweep, sweep.trial("CF-CB-AS", 52.0), of_rows["CF"], tmp_path, score="cam/val/miou_other")
    _, found = chances(sweep)
    assert found["CF-AC"].images is found["CF-CB-AS"].images is None


def test_rows_that_are_not_comparable_are_not_compared(measured, tmp_path):
    sweep, _ = measured
    pixels = made(np.random.default_rng(6), 40, quality=0.95)
    run = sweep.trial("CF-AC", float(mean_iou(pixels.sum(axis=0))), protocol={"erosion": 7})
    keep(sweep, run, pixels, tmp_path)
    compiled, found = chances(sweep)
    assert compiled.best == "CF-CB"
    assert found["CF-AC"].images == over_images(resampled(pixels))
    assert found["CF-AC"].from_first is found["CF-AC"].from_best is None


def test_a_metric_that_is_good_when_low_has_its_best_there(cra, tmp_path):
    low = cra.folder / "low.yaml"
    low.write_text(re.sub(r"  - \{name: miou, .*\n|miou: [\d.]+, ", "", cra.table.text))
    (compiled,) = with_chance([cra.compiled(low)], cra.uri)
    assert compiled.best == "without"
    assert compiled.chances["with"].from_best.mean == pytest.approx(5.0)


def test_the_best_row_is_compared_with_those_that_the_table_compares(cra, tmp_path):
    for row in ("without", "with"):
        for seed, gain in enumerate((0.0, 1.0)):
            cra.trial(row, 60.0 + gain, seed=seed + 1, fp=20.0)
    grouped = cra.folder / "grouped.yaml"
    grouped.write_text(cra.table.text.replace("layout: {", "layout: {compared: CRA, "))
    for path, tied in ((cra.table.path, ["without"]), (grouped, [])):
        (compiled,) = with_chance([cra.compiled(path)], cra.uri)
        assert compiled.best == "with"
        assert [line.id for line in compiled.lines if compiled.is_tied(line)] == tied


def test_a_row_that_is_better_on_the_seeds_of_both_is_no_worse_than_the_best(measured, tmp_path):
    sweep, _ = measured
    pixels = made(np.random.default_rng(7), 40, quality=0.99)
    keep(sweep, sweep.trial("CF", float(mean_iou(pixels.sum(axis=0))), seed=1), pixels, tmp_path)
    compiled, found = chances(sweep)
    assert compiled.best == "CF"
    assert found["CF-CB"].from_best.images.low > 0
    assert [line.id for line in compiled.lines if compiled.is_tied(line)] == ["CF-CB", "CF-AS"]
    assert "better on the seeds that both have" in note(to_markdown(compiled), "Italic")


def test_one_run_whose_files_cannot_be_read_is_named(measured, tmp_path):
    sweep, of_rows = measured
    run = sweep.trial("CF-AC", 50.0)
    keep(sweep, run, of_rows["CF"], tmp_path, classes=["background", "a", "unheard-of"])
    compiled, found = chances(sweep)
    assert [row for row, chance in found.items() if chance.images is None] == ["CF-AC"]
    told = note(to_markdown(compiled), "Chance")
    assert re.search(f"no interval over images: run {run}: its {IMAGE_COUNTS} .* a class that is not one of", told)
    (tmp_path / IMAGE_COUNTS).write_bytes(b"PAR1 but no more")
    sweep.client.log_artifact(run, str(tmp_path / IMAGE_COUNTS))
    assert f"run {run}: its {IMAGE_COUNTS} or {CLASS_IOU} cannot be read" in note(
        to_markdown(chances(sweep)[0]), "Chance"
    )


def test_values_and_seeds_are_told_though_files_cannot_be_had(database, capsys):
    sweep = Sweep(database)
    sweep.id = sweep.client.create_experiment("away", artifact_location="nowhere://bucket")
    for seed, miou in enumerate((41.5, 43.5)):
        sweep.trial("CF", miou, seed=seed)
    assert main(["table03", "--tracking-uri", sweep.uri]) == 0
    told = capsys.readouterr().out
    assert "| 42.5 " in told
    assert "(seeds 29.8 to 55.2)" in told
    assert re.search("no interval over images: .*nowhere", note(told, "Chance"))


@pytest.mark.parametrize(
    ("column", "value"),
    [("score", 3), ("image", None), ("class", 3), ("intersection", None), ("intersection", np.nan), ("true", "x")],
)
def test_pixels_of_another_kind_are_told(measured, tmp_path, column, value):
    sweep, of_rows = measured
    run = sweep.trial("CF-AC", 50.0)
    keep(sweep, run, of_rows["CF"], tmp_path, **{column: value})
    compiled, found = chances(sweep)
    assert found["CF-AC"].images is None
    assert f"run {run}: its {IMAGE_COUNTS} or {CLASS_IOU} cannot be read" in note(to_markdown(compiled), "Chance")


def test_the_command_prints_intervals(measured, capsys):
    sweep, _ = measured
    assert main(["table03", "--tracking-uri", sweep.uri]) == 0
    told = capsys.readouterr()
    assert "How far chance goes:" in told.out
    assert "Downloading" not in told.err


def test_chance_needs_a_measured_row(database):
    sweep = Sweep(database)
    sweep.trial("CF", tags={"status": "failed", "reason": "diverged"})
    (compiled,) = with_chance([sweep.compiled()], sweep.uri)
    assert (compiled.chances, compiled.best) == ({}, "")
