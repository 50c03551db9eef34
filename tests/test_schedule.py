"""The order of trials, and the simulated sweep that a price is made from."""

import pytest

from semformer.config import load_config
from semformer.keys import StageKey
from sweeps.plan.trials import Cell, Trial
from sweeps.schedule.queue import simulate

CONFIG = load_config("micro")
HOURS = {"caae": 4.0, "segmentor": 2.0, "cams": 0.5, "evaluate": 0.25}


def trial(name: str, **named: str) -> Trial:
    """A trial whose stages have the given names, and elsewhere its own."""
    keys = {stage: StageKey(stage, {"name": named.get(stage, name)}) for stage in HOURS}
    return Trial(CONFIG, None, "", keys, (Cell("table", name, 0),))


def hours(key: StageKey) -> float:
    return HOURS[key.stage]


def test_one_trial_takes_the_sum_of_its_missing_stages():
    one = trial("a")
    assert simulate([one], hours, gpus=4) == 6.75
    assert simulate([one], hours, ready={one.keys["caae"].digest}) == 2.75
    assert simulate([], hours) == 0.0


def test_trials_without_common_stages_run_beside_each_other():
    trials = [trial(name) for name in "abcd"]
    assert [simulate(trials, hours, gpus=n) for n in (1, 2, 3, 4)] == [27.0, 13.5, 13.5, 6.75]


def test_dependents_start_when_the_shared_stage_is_made_not_when_its_trial_ends():
    trials = [trial(name, caae="shared") for name in "ab"]
    assert simulate(trials, hours, gpus=2) == 4 + 2.75
    assert simulate(trials, hours, gpus=1) == 4 + 2 * 2.75


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_no_schedule_beats_the_bounds(gpus):
    shared = [trial(f"shared-{n}", caae="shared") for n in range(6)]
    own = [trial(f"own-{n}") for n in range(3)]
    inference = [trial(f"inference-{n}", caae="shared", segmentor="shared-0") for n in range(4)]
    work = 4 * 4.0 + 9 * 2.0 + 13 * 0.75
    wall = simulate([*inference, *own, *shared], hours, gpus=gpus)
    assert wall >= max(work / gpus, 6.75)
    assert wall <= work / gpus + 6.75  # Graham's bound for any list schedule
    if gpus == 1:
        assert wall == work
