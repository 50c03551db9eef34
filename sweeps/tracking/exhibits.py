"""What MLflow can show of a trial beside its numbers: threshold curve, IoU of every class, data sets."""

import json
from typing import Any

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from semformer import pipeline
from semformer.stages.evaluate import CLASS_IOU, CURVE
from semformer.store import Artifact
from sweeps.plan.trials import Trial

CLASS_TABLE = "class_iou.json"
CURVE_PICTURE = "threshold_curve.png"
SCORES = ("miou", "fp", "fn")
DIGEST_LENGTH = 12
"""Of the characters of a digest, of which MLflow keeps at most 36."""


def class_table(evaluate: Artifact) -> dict[str, Any]:
    """IoU (percent) per class, in the form of MLflow's logged tables."""
    table = pq.read_table(evaluate.file(CLASS_IOU)).to_pydict()
    return {"columns": list(table), "data": [list(row) for row in zip(*table.values(), strict=True)]}


def curve_points(evaluate: Artifact) -> list[tuple[str, int, float]]:
    """The threshold curve as series whose step is the threshold in percent."""
    curve = pq.read_table(evaluate.file(CURVE)).to_pydict()
    steps = [round(100 * threshold) for threshold in curve["threshold"]]
    return [
        (f"evaluate/threshold_curve/{score}", step, value)
        for score in SCORES
        for step, value in zip(steps, curve[score], strict=True)
    ]


def curve_figure(evaluate: Artifact) -> Figure:
    """mIoU, FP and FN (percent) by threshold."""
    curve = pq.read_table(evaluate.file(CURVE)).to_pydict()
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for score, label in zip(SCORES, ("mIoU", "FP", "FN"), strict=True):
        axes.plot(curve["threshold"], curve[score], label=label)
    best = max(range(len(curve["miou"])), key=curve["miou"].__getitem__)
    axes.axvline(curve["threshold"][best], color="0.7", linewidth=1)
    axes.set(xlabel="threshold", ylabel="%", ylim=(0, None), title=f"best mIoU {curve['miou'][best]:.1f} %")
    axes.legend()
    return figure


USES = {
    "segmentor": "training",
    "affinity": "training",
    "deeplab": "training",
    "evaluate": "evaluation",
    "evaluate_masks": "evaluation",
    "evaluate_seg": "evaluation",
}
"""What stages use images for."""


def datasets(trial: Trial) -> list[DatasetInput]:
    """The images that a trial trains on, and others that it is measured on, each with the digest of their bytes."""
    inputs = []
    for split, (context, images) in _images(trial).items():
        made = {"semformer.data.shapes": trial.config.data.model_dump(mode="json")["shapes"]}
        dataset = Dataset(
            name=f"{trial.data_name.partition(' (')[0]} {split}",
            digest=images[:DIGEST_LENGTH],
            source_type="local" if trial.data else "code",
            source=json.dumps({"uri": str(trial.data)} if trial.data else {"tags": made}),
            profile=json.dumps({"split": split, "sha256": images}),
        )
        inputs.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
    return inputs


def _images(trial: Trial) -> dict[str, tuple[str, str]]:
    """Split -> first use, and digest. Of an imported network it is not known what it was trained on."""
    found: dict[str, tuple[str, str]] = {}
    for stage in pipeline.STAGES:
        if stage.name in USES and (key := trial.keys.get(stage.name)) and "images" in key.spec["data"]:
            split = getattr(trial.config.data, stage.split)
            found.setdefault(split, (USES[stage.name], key.spec["data"]["images"]))
    return found
