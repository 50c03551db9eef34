"""What runs keep in MLflow beside their scores: series of losses, and tables among their files."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient

from analysis.artifacts import AT_ONCE, fetch
from semformer.errors import UserError, first_line
from semformer.stages.evaluate import CLASS_IOU, CURVE
from sweeps.plan.scores import LINKS, OF_MAPS, OF_MASKS, OF_SEGMENTATION
from sweeps.tracking.connection import connecting

LOSS = "segmentor/loss/total"
CLASS_FILES = {
    word: CLASS_IOU if word == OF_MAPS else f"{LINKS[word].stage}/{CLASS_IOU}"
    for word in (OF_MAPS, OF_MASKS, OF_SEGMENTATION)
}
"""Where runs keep the IoU of each class, by what it is of (words of `scores.LINKS`)."""
TOLD_EVERY = 100


@dataclass(frozen=True)
class Details:
    """Of a run; what it does not have is empty.

    `loss` is the segmentation network's by epoch, `curve` the mIoU (%) of its maps by threshold, `class_iou` the IoU
    (%) by class, by words of CLASS_FILES.
    """

    loss: Mapping[int, float]
    curve: Mapping[float, float]
    class_iou: Mapping[str, Mapping[str, float]]


def read_details(
    tracking_uri: str, links: Mapping[str, Iterable[str]], tell: Callable[[str], None]
) -> dict[str, Details]:
    """Of the runs in `links` (run id -> the words of CLASS_FILES that are wanted of it).

    Raises UserError if MLflow or its artifacts cannot be read, or a file is damaged.
    """
    wanted = [(run_id, name) for run_id in links for name in (CURVE, *(CLASS_FILES[word] for word in links[run_id]))]
    losses = _read_losses(tracking_uri, [*links], tell)
    with TemporaryDirectory() as folder:
        tell(f"fetching {len(wanted)} files")
        tables = {one: _read_table(path, *one) for one, path in fetch(tracking_uri, wanted, Path(folder)).items()}
    details = {}
    for run_id, loss in losses.items():
        files = {word: (run_id, name) for word, name in CLASS_FILES.items()}
        class_iou = {word: tables[one] for word, one in files.items() if one in tables}
        details[run_id] = Details(loss, tables.get((run_id, CURVE), {}), class_iou)
    return details


def _read_losses(tracking_uri: str, run_ids: list[str], tell: Callable[[str], None]) -> dict[str, dict[int, float]]:
    """LOSS by epoch, of each run."""
    client, losses = MlflowClient(tracking_uri), {}
    tell(f"reading the series of {len(run_ids)} runs")
    with connecting(tracking_uri), ThreadPoolExecutor(AT_ONCE) as threads:
        series = threads.map(lambda run_id: client.get_metric_history(run_id, LOSS), run_ids)
        for run_id, points in zip(run_ids, series, strict=True):
            losses[run_id] = dict(sorted((point.step, point.value) for point in points))
            if len(losses) % TOLD_EVERY == 0:
                tell(f"{len(losses)} of {len(run_ids)} read")
    return losses


def _read_table(path: Path, run_id: str, name: str) -> dict:
    """The second of two columns by the first. Raises UserError if the file is damaged."""
    by, what = ("threshold", "miou") if name == CURVE else ("class", "iou")
    try:
        columns = pq.read_table(path).select([by, what]).to_pydict()
        return dict(zip(columns[by], map(float, columns[what]), strict=True))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} of run {run_id} cannot be read ({first_line(error)}): run its trial again") from error
