"""Searches in a small study, with trials that are told instead of run."""

from collections import Counter
from pathlib import Path

import optuna

from semformer import pipeline
from semformer.config import load_config
from semformer.store import Store
from semformer.store.leases import LeaseHeld
from sweeps.search.search import Search
from sweeps.search.space import DEFAULT_AXES

SECONDS = {"caae": 100.0, "segmentor": 200.0, "cams": 10.0, "evaluate": 5.0}


def open_search(shapes: Path, store: Store, database: Path, *axes: str, trials=8, objectives=(), **options) -> Search:
    config = {"name": "study", "preset": "micro", "overrides": {}, "storage": f"sqlite:///{database}"} | options
    name, preset, overrides = (config.pop(part) for part in ("name", "preset", "overrides"))
    data = pipeline.open_data(load_config(preset, overrides), shapes)
    axes = axes or DEFAULT_AXES
    return Search(name, preset, overrides, data, store, axes=axes, objectives=objectives, most=trials, **config)


def scores(config) -> dict[str, float]:
    """A made-up landscape: best at sigma 0.1, with many last blocks and a deep decoder, which takes longer."""
    miou = 60 - 100 * (config.segmentor.sigma - 0.1) ** 2 + config.cams.last_blocks + config.caae.decoder_depth
    return {f"cam/val/{name}": value for name, value in (("miou", miou), ("fp", 50 - miou / 2), ("fn", 20.0))}


def finish(one: Search, trial) -> None:
    """What a run of the trial would leave in the store and tell the study."""
    for stage, key in trial.keys.items():
        if one.store.find(key) is None:
            seconds = SECONDS[stage] * (trial.config.caae.decoder_depth / 4 if stage == "caae" else 1)
            metrics = {"metrics": scores(trial.config)} if stage == "evaluate" else {}
            one.store.publish(key, one.store.workspace(key), {"seconds": seconds, **metrics})
    one.tell(trial, scores(trial.config))


def run_all(one: Search) -> list:
    """Runs every trial that has to be run, one after the other, and asks again while another driver asks."""
    ran = []
    while True:
        try:
            trial = one.ask()
        except LeaseHeld:
            continue
        if trial is None:
            return ran
        finish(one, trial)
        ran.append(trial)


def states(study: optuna.Study) -> Counter:
    return Counter(trial.state.name for trial in study.trials)
