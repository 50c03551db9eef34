"""The list schedule that a price's wall time is made from."""

import pytest

from semformer.keys import StageKey
from sweeps.plan.price import list_schedule

HOURS = {"caae": 4.0, "segmentor": 2.0, "cams": 0.5, "evaluate": 0.25}


def chain(name: str, **named: str) -> list[StageKey]:
    """The stages of a trial, which have the given names, and elsewhere its own; each reads the one before."""
    keys: list[StageKey] = []
    for stage in HOURS:
        inputs = {keys[-1].stage: keys[-1].digest} if keys else {}
        keys.append(StageKey(stage, {"name": named.get(stage, name), "inputs": inputs}))
    return keys


def hours(key: StageKey) -> float:
    return HOURS[key.stage]


def wall(*chains: list[StageKey], gpus: int = 1) -> float:
    return list_schedule({key for keys in chains for key in keys}, hours, gpus=gpus)


def test_a_chain_takes_the_sum_of_its_stages_and_what_is_there_no_time():
    assert wall(chain("a"), gpus=4) == 6.75
    assert wall(chain("a")[1:]) == 2.75
    assert wall() == 0.0


def test_chains_without_common_stages_run_beside_each_other():
    chains = [chain(name) for name in "abcd"]
    assert [wall(*chains, gpus=n) for n in (1, 2, 4)] == [27.0, 13.5, 6.75]


def test_a_shared_stage_is_made_once_and_what_reads_it_starts_then():
    shared = [chain(name, caae="shared") for name in "ab"]
    assert wall(*shared, gpus=2) == 4 + 2.75
    assert wall(*shared) == 4 + 2 * 2.75


def test_the_longest_chain_goes_first():
    """After 4 hours one GPU goes on with the chain, and the other has made the short stages meanwhile."""
    short = [chain(f"short-{n}")[3:] for n in range(16)]
    assert wall(*short, chain("long"), gpus=2) == 6.75


def test_a_stage_waits_for_all_of_its_inputs():
    left, right = chain("left")[:2], chain("right")[:1]
    both = StageKey("cams", {"inputs": {"segmentor": left[-1].digest, "caae": right[0].digest}})
    assert wall(left, right, [both], gpus=2) == 4 + 2 + 0.5


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_no_schedule_beats_the_bounds(gpus):
    shared = [chain(f"shared-{n}", caae="shared") for n in range(6)]
    own = [chain(f"own-{n}") for n in range(3)]
    inference = [chain(f"inference-{n}", caae="shared", segmentor="shared-0") for n in range(4)]
    work = 4 * 4.0 + 9 * 2.0 + 13 * 0.75
    told = wall(*inference, *own, *shared, gpus=gpus)
    assert told >= max(work / gpus, 6.75)
    assert told <= work / gpus + (1 - 1 / gpus) * 6.75  # Graham's bound for any list schedule
