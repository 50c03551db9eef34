"""The order in which trials start, kept up to date as stages are made."""

import random

import pytest

from semformer.config import load_config
from semformer.keys import StageKey
from sweeps.plan.trials import Cell, Trial
from sweeps.schedule.queue import Queue

CONFIG = load_config("micro")
STAGES = ("caae", "segmentor", "cams", "evaluate")


def trial(name: str, **named: str) -> Trial:
    """A trial whose stages have the given names, and elsewhere its own."""
    keys = {stage: StageKey(stage, {"name": named.get(stage, name)}) for stage in STAGES}
    return Trial(CONFIG, None, "", keys, (Cell("table", name, 0),))


def seconds(key: StageKey) -> float:
    return 1.0 + len(key.spec["name"])


def first_by_definition(trials: dict[str, tuple[int, Trial]], ready: set[str], made: set[str]) -> str | None:
    """The rule, read literally: every trial is ranked, whenever one is wanted."""
    ranked = []
    for key, (number, one) in trials.items():
        missing = [k for k in one.keys.values() if k.digest not in ready]
        if not any(k.digest in made for k in missing):
            others = sum(
                sum(any(o.digest == k.digest for o in other.keys.values()) for _, other in trials.values()) - 1
                for k in missing
            )
            ranked.append((-others, -sum(map(seconds, missing)), number, key))
    return min(ranked)[-1] if ranked else None


@pytest.mark.parametrize("seed", range(30))
def test_the_queue_gives_what_the_rule_says_whatever_happens(seed):
    """Trials come, start, end, die and come back in a random order."""
    draw = random.Random(seed)
    pool = [
        trial(f"t{n}", caae=draw.choice("ab"), segmentor=f"s{draw.randrange(4)}", cams=f"c{draw.randrange(9)}")
        for n in range(25)
    ]
    pool = list({one.key: one for one in pool}.values())
    n_first = draw.randrange(len(pool))
    queue = Queue(pool[:n_first], seconds)
    numbers = {one.key: n for n, one in enumerate(pool)}
    waiting = {one.key: (numbers[one.key], one) for one in pool[:n_first]}
    coming, running, ready, made = pool[n_first:], {}, set(), set()
    for _ in range(400):
        action = draw.choice(["start", "start", "make", "die", "add"])
        if action == "start":
            wanted, got = first_by_definition(waiting, ready, made), queue.pop()
            assert (got.key if got else None) == wanted
            if got:
                del waiting[got.key]
                claims = [k.digest for k in got.keys.values() if k.digest not in ready]
                running[got.key] = (got, claims)
                made.update(claims)
                for digest in claims:
                    queue.hold(digest, got.key)
        elif action == "make" and running:
            key = draw.choice(list(running))
            _, claims = running[key]
            if claims:
                digest = claims.pop(0)
                ready.add(digest)
                made.discard(digest)
                queue.ready(digest)
            else:
                del running[key]
        elif action == "die" and running:
            key = draw.choice(list(running))
            one, claims = running.pop(key)
            for digest in claims:
                made.discard(digest)
                queue.release(digest)
            waiting[key] = (numbers[key], one)
            queue.add(one)
        elif action == "add" and coming:
            one = coming.pop(0)
            waiting[one.key] = (numbers[one.key], one)
            queue.add(one)
        assert len(queue) == len(waiting)


def test_who_waits_for_what_is_told():
    builder, other, free = trial("a", caae="x"), trial("b", caae="x"), trial("c")
    queue = Queue([builder, other, free])
    assert queue.pop() == builder
    queue.hold(builder.keys["caae"].digest, builder.key)
    assert queue.waits_for(other) == ("caae", builder.key)
    assert queue.waits_for(free) == ("", "")
    assert queue.needing(builder.keys["caae"].digest) == [other]


def test_a_parked_trial_comes_back_when_what_it_waits_for_is_there():
    one, two = trial("a"), trial("b")
    queue = Queue([one, two])
    queue.park(queue.pop(), "a node")
    assert queue.pop() == two
    assert queue.pop() is None
    assert queue.parked("a node") == one
    assert len(queue) == 1
    queue.release("a node")
    assert queue.parked("a node") is None
    assert queue.pop() == one


def test_choosing_does_not_search_what_is_held_back():
    """Counted in rankings, not in seconds: 5,000 trials wait for one CAAE, and as many starts look at none of them."""
    held = [trial(f"held-{n}", caae="shared") for n in range(5000)]
    free = [trial(f"free-{n}") for n in range(500)]
    ranked = []
    queue = Queue([*held, *free], lambda key: ranked.append(key) or 1.0)
    queue.hold(queue.pop().keys["caae"].digest, "somebody")
    queue.pop()
    ranked.clear()
    for _ in range(400):
        assert queue.pop().cells[0].row.startswith("free")
    assert len(ranked) < 400 * 2 * len(STAGES)
