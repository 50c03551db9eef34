"""What makes MLflow's pages useful at once: chosen columns for the table of runs, and a note on the sweep."""

import json
from collections.abc import Sequence

from semformer.secrets import without_password
from sweeps.plan.scores import is_low
from sweeps.plan.trials import Sweep
from sweeps.tracking.connection import TAG

SHARE_KEY = "semformer"
"""Of the view in the page's address, and in the experiment's tag that holds the view."""


def varied_fields(sweep: Sweep) -> list[str]:
    """The fields in which the rows of a sweep's tables differ."""
    deltas = [row.set for table in sweep.tables for row in table.rows]
    fields = dict.fromkeys(field for delta in deltas for field in delta)
    return [field for field in fields if len({json.dumps(delta.get(field), default=str) for delta in deltas}) > 1]


def columns(metrics: Sequence[str], fields: Sequence[str]) -> list[str]:
    """The columns that tell a sweep's story, as MLflow names them in its views."""
    tags = [f"{TAG}{name}" for name in ("status", "rows", "seed", "stages_found", "host")]
    return [
        *(f"metrics.`{metric}`" for metric in metrics),
        *(f"tags.`{tag}`" for tag in tags),
        *(f"params.`{field}`" for field in fields),
    ]


def experiment_tags(metrics: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """Tags that MLflow's pages read: the kind of the experiment, its main metric, and a shared view of its runs."""
    view = {"selectedColumns": columns(metrics, fields), "orderByKey": "attributes.start_time", "orderByAsc": True}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": metrics[0],
        "mlflow.experiment.primaryMetric.greaterIsBetter": json.dumps(not is_low(metrics[0])),
        f"mlflow.sharedViewState.{SHARE_KEY}": json.dumps(view),
    }


def url(uri: str, experiment_id: str) -> str | None:
    """The page of the runs, grouped under their sweep, with `columns`; None where no server shows it."""
    if not uri.startswith(("http://", "https://")):
        return None
    page = f"{without_password(uri, uri).rstrip('/')}/#/experiments/{experiment_id}/runs"
    return f"{page}?workflowType=machine_learning&viewStateShareKey={SHARE_KEY}"


def note(sweep: Sweep, metrics: Sequence[str]) -> str:
    """Markdown for the sweep's own page: what it is, and where to look."""
    head = [f"**{table.title}** {table.source}".strip() + "  " for table in sweep.tables] or [f"**{sweep.title}**"]
    counts = ", ".join(f"{count.distinct} {name}" for name, count in sweep.stages.items())
    trials = (
        f"{len(sweep.trials)} trials; distinct stages: {counts}." if sweep.trials else "Its trials come as it goes on."
    )
    fields = ", ".join(f"`{field}`" for field in varied_fields(sweep))
    scores = ", ".join(f"`{metric}`" for metric in metrics)
    return "\n".join(
        [
            *head,
            "",
            f"Preset `{sweep.preset}`. {trials}",
            "",
            "- Each run below this one is a trial (`semformer.kind` is `trial`) or a stage that was trained for several"
            " of them (`stage`).",
            "- Columns to pick (the address that the sweep prints has them picked):"
            f" {scores}, `semformer.rows`, `semformer.status`, `semformer.stages_found`"
            + (f", {fields}." if fields else "."),
            "- Of a trial, look at the charts `segmentor/loss/...` and `evaluate/threshold_curve/...` (step: threshold"
            " in percent), and at the artifacts `pictures/` and `class_iou.json`.",
            "- Artifacts of this run: `plan.json`, what the sweep was started from, and its tables when it has ended.",
        ]
    )
