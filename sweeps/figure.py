"""The paper's Figure 3: the maps of a table's rows side by side, from the store."""

from collections.abc import Sequence

from PIL import Image
from safetensors.torch import load_file

from semformer import pipeline
from semformer.draw import Line, Map, draw, truth_of
from semformer.errors import UserError
from semformer.stages.cams import FOREIGN, PICTURES
from semformer.store import Store
from sweeps.plan.table import Table
from sweeps.plan.trials import Trial


def figure3(table: Table, trials: Sequence[Trial], store: Store, n_images: int) -> Image.Image:
    """A column for each row of the table, with its mIoU; a line for each class of the first `n_images` of the split.

    A map is the row's final one, its contour at the threshold that the row was scored at. Raises UserError for a row
    without maps in the store, and where rows are measured on different images.
    """
    by_row = {cell.row: trial for trial in trials for cell in trial.cells if cell.table == table.name}
    splits, columns = {}, []
    for row in table.rows:
        trial = by_row[row.id]
        if "cams" not in trial.keys:
            raise UserError(f"{table.name}/{row.id} has no maps that are scored")
        cams, scored = (store.find(trial.keys[stage]) for stage in ("cams", "evaluate"))
        if cams is None or scored is None:
            raise UserError(
                f"{table.name}/{row.id}, seed {trial.config.seed}, has no maps of these settings in {store.location}: "
                "run the same tables first, by `semformer-sweep run` with the same options but --images and --out"
            )
        config = trial.config
        split = pipeline.open_data(config, trial.data)[config.data.eval_split]
        splits[split.digest] = split
        metrics = {name.rpartition("/")[2]: value for name, value in scored.info["metrics"].items()}
        heading = f"{row.label}\nmIoU {metrics['miou']:.1f} %"
        kind = FOREIGN if config.cams.folder else config.cams.final_map
        columns.append((heading, load_file(cams.file(PICTURES)), kind, metrics["threshold"]))
    if len(splits) > 1:
        raise UserError(f"the rows of {table.name} are measured on different images: they cannot be drawn side by side")
    (split,) = splits.values()
    lines = []
    for i in range(min(n_images, len(split))):
        image, truth = split.pixels(i), split.mask(i)
        for channel, k in enumerate(split.objects(i)):
            maps = [
                Map(heading, tensors[f"{i}/{kind}"][channel].float().numpy(), threshold)
                for heading, tensors, kind, threshold in columns
            ]
            lines.append(Line(split.classes[k], image, maps, truth_of(truth)))
    if not lines:
        raise UserError(f"the first {n_images} images of {split.name} show no object")
    return draw(lines)
