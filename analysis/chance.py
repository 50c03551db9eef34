"""How far chance goes in a table's first metric: intervals of its rows, and of what a row has more than another."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.artifacts import fetch
from analysis.compiled import Chance, CompiledTable, Gap, Line, Trial
from analysis.stats import mean_iou, over_images, over_seeds, resampled
from semformer.errors import UserError
from sweeps.plan.scores import LINKS, OF_MAPS, link_of
from sweeps.plan.table import Metric

IMAGE_COUNTS, CLASS_IOU = "image_counts.parquet", "class_iou.parquet"
"""Names of the files that scoring stages make, see `stages/evaluate.py`."""
PIXELS = ["intersection", "predicted", "true"]
DIGITS = 6
"""To which the pixels of a run must give the value that it has recorded."""

SOURCES = {
    "images": "a bootstrap: other images of the kind, the same networks and thresholds",
    "seeds": "Student's t: trained again, the same images",
}


@dataclass(frozen=True)
class _Images:
    """Of a run: which images it was measured on, and its mean IoU on resamples of them."""

    ids: tuple[str, ...]
    resamples: np.ndarray


def with_chance(compiled: Sequence[CompiledTable], tracking_uri: str) -> list[CompiledTable]:
    """The tables, with what is known of the chance in them; files that cannot be had are told below."""
    wanted = {
        (trial.run_id, _folder(table.table.measured[0].name) + name)
        for table in compiled
        for trial in table.trials
        if table.table.measured[0].name in trial.values
        for name in (IMAGE_COUNTS, CLASS_IOU)
    }
    with TemporaryDirectory() as folder:
        lost: dict[str, str] = {}
        try:
            files = fetch(tracking_uri, wanted, Path(folder))
        except UserError as error:
            files, lost = {}, dict.fromkeys((run_id for run_id, _ in wanted), str(error))

        @cache
        def images(run_id: str, metric: str, value: float) -> _Images | None:
            try:
                return _images(run_id, metric, value, files)
            except UserError as error:
                lost[run_id] = str(error)
                return None

        return [_with_lost(_of_table(table, images), lost) for table in compiled]


def _with_lost(compiled: CompiledTable, lost: Mapping[str, str]) -> CompiledTable:
    """With a note on each run of which no pixels could be read."""
    told = dict.fromkeys(lost[trial.run_id] for trial in compiled.trials if trial.run_id in lost)
    notes = [("Chance", f"no interval over images: {text}.") for text in told]
    return replace(compiled, notes=(*compiled.notes, *notes))


def _folder(metric: str) -> str:
    """That the files of the stage which measures it are in."""
    word = link_of(metric)
    return "" if word == OF_MAPS else f"{LINKS[word].stage}/"


def _of_table(compiled: CompiledTable, images_of: Callable[[str, str, float], _Images | None]) -> CompiledTable:
    metric = compiled.table.measured[0]
    lines = [line for line in compiled.lines if line.cells[metric.name].mean is not None]
    comparable = [line for line in lines if not line.cells[metric.name].deviations]
    images = {
        trial.run_id: images_of(trial.run_id, metric.name, trial.values[metric.name])
        for line in lines
        for trial in _by_seed(metric, line).values()
    }
    best = max(comparable, key=lambda line: _goodness(metric, line), default=None)
    compared = compiled.table.layout.compared
    rivals = [line for line in comparable if best and line.marks.get(compared) == best.marks.get(compared)]
    chances = {}
    for line in lines:
        measured = _by_seed(metric, line)
        own = [found.resamples for trial in measured.values() if (found := images[trial.run_id])]
        values = [trial.values[metric.name] for trial in measured.values()]
        chances[line.id] = Chance(
            images=over_images(np.mean(own, axis=0)) if len(own) == len(measured) else None,
            seeds=over_seeds(values),
            from_first=_gap(metric, comparable[0], line, images) if line in comparable[1:] else None,
            from_best=_gap(metric, best, line, images) if best and line in rivals and line != best else None,
        )
    shown = replace(compiled, chances=chances, best=best.id if best else "")
    return replace(shown, notes=(*compiled.notes, *_notes(metric, shown)))


def _notes(metric: Metric, compiled: CompiledTable) -> Iterable[tuple[str, str]]:
    """What the intervals are, and what italics mean."""
    chances = compiled.chances.values()
    known = [name for name in ("images", "seeds") if any(getattr(chance, name) for chance in chances)]
    if known:
        told = " and ".join(f"over {name} ({SOURCES[name]})" for name in known)
        yield "Chance", f"intervals of 95 % for {metric.header}, {told}."
    if any(compiled.is_tied(line) for line in compiled.lines):
        yield (
            "Italic",
            f"cannot be told apart from the best in {metric.header}: such an interval of the difference has 0, or it "
            "is better on the seeds that both have.",
        )


def _goodness(metric: Metric, line: Line) -> float:
    mean = line.cells[metric.name].mean or 0.0
    return mean if metric.best == "max" else -mean


def _by_seed(metric: Metric, line: Line) -> dict[int, Trial]:
    return {trial.seed: trial for trial in line.trials if metric.name in trial.values}


def _gap(metric: Metric, first: Line, second: Line, images: Mapping[str, _Images | None]) -> Gap | None:
    """What the second has more, on the seeds that both have."""
    a, b = _by_seed(metric, first), _by_seed(metric, second)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    gains = [b[seed].values[metric.name] - a[seed].values[metric.name] for seed in seeds]
    resamples = []
    for seed in seeds:
        had, has = images[a[seed].run_id], images[b[seed].run_id]
        if had and has and had.ids == has.ids:
            resamples.append(has.resamples - had.resamples)
    paired = over_images(np.mean(resamples, axis=0)) if len(resamples) == len(seeds) else None
    return Gap(fmean(gains), paired, over_seeds(gains), len(seeds))


def _images(run_id: str, metric: str, value: float, files: Mapping[tuple[str, str], Path]) -> _Images | None:
    """None where its pixels are not known: it has no such file, or its metric is no mean IoU."""
    counts, classes = (files.get((run_id, _folder(metric) + name)) for name in (IMAGE_COUNTS, CLASS_IOU))
    if counts is None or classes is None:
        return None
    try:
        ids, pixels = read_pixels(counts, classes, f"{LINKS[link_of(metric)].of}/", metric.rpartition("/")[2])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"run {run_id}: its {counts.name} or {classes.name} cannot be read: {error}") from error
    if not ids or round(float(mean_iou(pixels.sum(axis=0))) - value, DIGITS):
        return None
    return _Images(ids, resampled(pixels))


def read_pixels(counts: Path, classes: Path, of: str, score: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The images' ids, in alphabetical order, and their pixels (N, K, 3) of intersection, prediction and truth.

    Of the score "<of><split>/<score>"; no image where it is not among those that were counted.
    """
    names = pq.ParquetFile(classes).read(["class"]).to_pandas()["class"]
    table = pq.ParquetFile(counts).read().to_pandas()
    table = table[table["score"].str.startswith(of) & table["score"].str.endswith(f"/{score}")]
    if table[["image", *PIXELS]].isna().any(axis=None):
        raise ValueError("it has empty places")
    rows, ids = pd.factorize(table["image"], sort=True)
    pixels = np.zeros((len(ids), len(names), len(PIXELS)), np.int64)
    columns = pd.Index(names).get_indexer(table["class"])
    if (columns < 0).any():
        raise ValueError(f"it counts a class that is not one of {', '.join(names)}")
    pixels[rows, columns] = table[PIXELS]
    return tuple(ids), pixels
