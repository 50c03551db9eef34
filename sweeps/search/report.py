"""What is left of a search: its best configs as a table file that can be run, and pictures of the study."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from sweeps.plan.scores import is_low
from sweeps.search.space import own_value

if TYPE_CHECKING:
    from sweeps.search.search import Search

TABLE = "best.yaml"
HEADERS = {
    "miou": "mIoU (%)",
    "fp": "FP (%)",
    "fn": "FN (%)",
    "miou_oracle": "mIoU, oracle threshold (%)",
    "miou_fixed": "mIoU, fixed threshold (%)",
    "miou_heldout": "mIoU, held out threshold (%)",
}
GREY, BLUE, RED = "#9aa0a6", "#1f77b4", "#d62728"


def write(search: "Search", folder: Path) -> list[Path]:
    """Writes `best.yaml`, `history.png`, `importances.png` and, for several objectives, `pareto_front.png`.

    Returns what there was enough for: nothing without a complete trial, no importances where all trials score alike.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's remarks on what we know
        return _write(search, folder)


def _write(search: "Search", folder: Path) -> list[Path]:
    done = [trial for trial in search.study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if not done:
        return []
    pictures = {"history.png": _history(search, done)}
    if any(len(set(values)) > 1 for values in _columns(done)):
        pictures["importances.png"] = _importances(search, done)
    if len(search.objectives) > 1:
        pictures["pareto_front.png"] = _front(search, done)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(best_table(search), encoding="utf-8")
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in (TABLE, *pictures)]


def best_table(search: "Search") -> str:
    """A table file (see `sweeps.plan.table`): the config that the search started from, and its best."""

    def row(name: str, label: str, params: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        marks = {axis: float(f"{value:.3g}") if isinstance(value, float) else value for axis, value in params.items()}
        return {"id": name, "label": label, "marks": marks, "set": fields}

    start = {name: own_value(search.own, axis.field) for name, axis in search.axes.items()}
    rows = [row("start", f"preset {search.preset}", start, {})]
    for trial in search.best():
        if trial.user_attrs["trial_key"] != search.start_key:
            fields = search.fields(trial.params)
            rows.append(row(f"trial-{trial.number}", f"trial {trial.number}", trial.params, fields))
    baseline = {name: value for name, value in search.overrides.items() if name != "seed"}
    options = f"--preset {search.preset}" + (f" --seeds {search.own.seed}" if "seed" in search.overrides else "")
    table = {
        "name": f"{search.name}-best",  # a sweep of its rows is not the search's own
        "title": f"Best of a {search.title}",
        "source": f"Optuna study {search.name}; the rows are meant for {options}",
        "baseline": baseline,
        "metrics": [
            {"name": name, "header": HEADERS.get(name, f"{name} (%)"), "best": "min" if is_low(name) else "max"}
            for name in search.scores
        ],
        "layout": {"marks": [{"name": name, "header": name} for name in search.axes]},
        "rows": rows,
    }
    return yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=120)


def _columns(trials: Sequence[FrozenTrial]) -> list[tuple[float, ...]]:
    """The values of each objective."""
    return list(zip(*(trial.values for trial in trials), strict=True))


def _history(search: "Search", done: Sequence[FrozenTrial]) -> Figure:
    """Scores in the order of the trials, one panel per objective; for a single one with the best so far."""
    figure = Figure(figsize=(7, 1 + 3 * len(search.objectives)), layout="constrained")
    panels = figure.subplots(len(search.objectives), sharex=True, squeeze=False)[:, 0]
    numbers = [trial.number for trial in done]
    for panel, name, values in zip(panels, search.objectives, _columns(done), strict=True):
        panel.plot(numbers, values, "o", color=BLUE, label="trial")
        if len(search.objectives) == 1:
            better = max if search.objectives[name] == "maximize" else min
            best = [better(values[: n + 1]) for n in range(len(values))]
            panel.step(numbers, best, where="post", color=RED, label="best so far")
        _mark_start(panel, search, numbers, values, done)
        panel.set_ylabel(name)
        panel.legend()
    panels[-1].set_xlabel("trial")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{search.name}: {len(done)} complete trials")
    return figure


def _importances(search: "Search", done: Sequence[FrozenTrial]) -> Figure:
    """PED-ANOVA's share of each axis in reaching the top quarter of the trials, one panel per objective."""
    figure = Figure(figsize=(7, 1 + len(search.objectives) * (0.6 + 0.3 * len(search.axes))), layout="constrained")
    panels = figure.subplots(len(search.objectives), sharex=True, squeeze=False)[:, 0]
    for index, (panel, name) in enumerate(zip(panels, search.objectives, strict=True)):
        sign = -1 if search.objectives[name] == "maximize" else 1
        shares = optuna.importance.get_param_importances(
            search.study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25),
            target=functools.partial(_signed, index, sign),
        )
        axes = sorted(shares, key=shares.__getitem__)
        bars = panel.barh(axes, [shares[axis] for axis in axes], color=BLUE)
        panel.bar_label(bars, fmt="%.2f", padding=3)
        panel.set_title(name, loc="left")
        panel.margins(x=0.1)
    panels[-1].set_xlabel("importance")
    figure.suptitle(f"{search.name}: {len(done)} complete trials")
    return figure


def _signed(index: int, sign: int, trial: FrozenTrial) -> float:
    """An objective's value, the lower the better, as the evaluator wants it."""
    return sign * trial.values[index]


def _front(search: "Search", done: Sequence[FrozenTrial]) -> Figure:
    """The first objective over each of the others; the trials of the Pareto front by their numbers."""
    first, *others = search.objectives
    figure = Figure(figsize=(1 + 6 * len(others), 5), layout="constrained")
    panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    y, *columns = _columns(done)
    for index, (panel, name, x) in enumerate(zip(panels, others, columns, strict=True), start=1):
        panel.plot(x, y, "o", color=GREY, label="trial")
        numbers: dict[tuple[float, float], list[str]] = {}
        for trial in search.best():
            numbers.setdefault((trial.values[index], trial.values[0]), []).append(str(trial.number))
        panel.plot(*zip(*numbers, strict=True), "o", color=RED, label="Pareto front")
        for point, told in numbers.items():
            panel.annotate(", ".join(told), point, xytext=(4, 5), textcoords="offset points")
        _mark_start(panel, search, x, y, done)
        panel.margins(0.15)
        panel.set_xlabel(f"{name} ({search.objectives[name]})")
    panels[0].set_ylabel(f"{first} ({search.objectives[first]})")
    panels[0].legend()
    figure.suptitle(f"{search.name}: {len(done)} complete trials")
    return figure


def _mark_start(
    panel: Any, search: "Search", x: Sequence[float], y: Sequence[float], done: Sequence[FrozenTrial]
) -> None:
    for trial, *point in zip(done, x, y, strict=True):
        if trial.user_attrs["trial_key"] == search.start_key:
            panel.plot(*point, "*", color="black", markersize=12, label=f"preset {search.preset}")
            return
