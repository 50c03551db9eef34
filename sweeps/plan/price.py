"""What trials cost before they run: GPU-hours and wall time, with and without sharing.

A trial holds its GPU through all of its stages, so their seconds are GPU-seconds, whatever they compute on.
"""

import functools
import heapq
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import ValidationError

from semformer import pipeline
from semformer.config import Config
from semformer.errors import UserError
from semformer.flops import Images, Work, stage_work
from semformer.keys import StageKey
from semformer.store import Artifact, Store
from sweeps.plan.trials import Trial, distinct_stages, missing_stages

TFLOPS = 40.0
"""Effective throughput of one GPU in training, in 10^12 operations a second: an eighth of what an A100 can do in
bfloat16, a third of what a V100 or A10G can. Networks of this size, run op by op, reach a tenth to a third. A number at
the low end makes a price that is rather too high."""
SECONDS_A_PASS = 0.02
"""What a GPU takes at least for a training step or a view: thousands of kernels are started one by one, however small
they are."""
PIXELS_PER_SECOND = 1e7
"""Of `evaluate`, on one CPU core: 19 ms for a VOC image with its files, of which scoring with erosion is 7."""
LABELS_PER_SECOND = 1e9
"""Of CRFs (`Work.labels`) on one GPU. Not measured: each takes some 300 bytes of sparse matrices and values to and from
memory, and an A100 moves six times as many. A CPU core does 1e7 to 5e7."""
SAMPLE = 100
"""Published artifacts of a stage that are read at most."""
GROUPS = {stage.name: stage.group for stage in pipeline.STAGES}
"""The group of options that each stage has."""

T = TypeVar("T")
Basis = Literal["measured", "similar", "counted"]


@dataclass(frozen=True)
class Estimate:
    """How long a stage takes. "measured": it is in the store, and took so long; "similar": like a sample of the
    published artifacts of this stage, in proportion to the work; "counted": from the work alone."""

    seconds: float
    basis: Basis


class Cost(NamedTuple):
    gpu_hours: float
    wall_hours: float


@dataclass(frozen=True)
class Price:
    """Of trials on `gpus` GPUs, one on each."""

    gpus: int
    missing: Cost
    """What must be made."""
    empty_store: Cost
    """Every distinct stage once."""
    without_sharing: Cost
    """Every row trains all of its stages."""
    basis: str

    @property
    def saving(self) -> float:
        """The share of the GPU-hours that sharing saves, from an empty store."""
        whole = self.without_sharing.gpu_hours
        return 1 - self.empty_store.gpu_hours / whole if whole else 0.0

    def as_json(self) -> dict[str, Any]:
        costs = {name: getattr(self, name)._asdict() for name in ("missing", "empty_store", "without_sharing")}
        return {"gpus": self.gpus, **costs, "saving": self.saving, "basis": self.basis}

    def lines(self) -> list[str]:
        """For people."""

        def told(cost: Cost) -> str:
            return f"{_duration(cost.gpu_hours)} of GPU time, {_duration(cost.wall_hours)} on {_gpus(self.gpus)}"

        return [
            f"price: {told(self.missing)} ({self.basis})",
            f"from an empty store: {told(self.empty_store)}; "
            f"without sharing: {told(self.without_sharing)}; sharing saves {self.saving:.0%}",
        ]


def estimate(
    trials: Sequence[Trial], cached: Collection[str], store: Store, *, tflops: float = TFLOPS
) -> dict[str, Estimate]:
    """How long every distinct stage of the trials takes on one GPU, by digest.

    `cached` holds the digests of those in the store, of which a sample is read. `tflops`: see TFLOPS.
    """
    work, estimates = _Work(trials), {}
    stages: dict[str, list[StageKey]] = defaultdict(list)
    for key in distinct_stages(trials):
        stages[key.stage].append(key)
    for stage, wanted in stages.items():
        sample = _sample(stage, [key.digest for key in wanted if key.digest in cached], store, work)
        taken = {artifact.key.digest: artifact.info["seconds"] for artifact in sample}
        slowness = work.slowness(sample, tflops)
        for key in wanted:
            if key.digest in taken:
                estimates[key.digest] = Estimate(taken[key.digest], "measured")
                continue
            todo = work.of(key)
            if (known := slowness.get(_has_network(todo))) is not None:
                estimates[key.digest] = Estimate(known * _at_full_speed(todo, tflops), "similar")
            else:
                estimates[key.digest] = Estimate(_counted_seconds(todo, tflops), "counted")
    return estimates


def price(
    trials: Sequence[Trial], cached: Collection[str], store: Store, *, gpus: int, tflops: float = TFLOPS
) -> Price:
    """The price of trials, see `estimate`. Raises UserError unless throughput and number of GPUs are positive."""
    if not tflops > 0 or gpus < 1:
        raise UserError(f"a price needs at least one GPU and a positive throughput, not {gpus} and {tflops:g} TFLOP/s")
    estimates = estimate(trials, cached, store, tflops=tflops)

    def seconds(key: StageKey) -> float:
        return estimates[key.digest].seconds

    def cost(keys: Collection[StageKey]) -> Cost:
        return Cost(sum(map(seconds, keys)) / 3600, list_schedule(keys, seconds, gpus=gpus) / 3600)

    keys = distinct_stages(trials)
    unshared = [sum(map(seconds, trial.keys.values())) for trial in trials for _ in trial.cells]
    return Price(
        gpus=gpus,
        missing=cost(list(dict.fromkeys(key for trial in trials for key in missing_stages(trial, cached)))),
        empty_store=cost(keys),
        without_sharing=Cost(sum(unshared) / 3600, _longest_first(unshared, gpus) / 3600),
        basis=_basis(estimates, tflops),
    )


def list_schedule(keys: Iterable[StageKey], seconds: Callable[[StageKey], float], *, gpus: int) -> float:
    """Seconds until distinct stages are made on `gpus` GPUs, each as soon as its inputs are made and a GPU is free.

    The one before the longest chain goes first. Inputs that are not among `keys` are there already.
    """
    stages = {key.digest: key for key in keys}
    readers: dict[str, list[str]] = defaultdict(list)
    lacking = {}
    for digest, key in stages.items():
        inputs = [source for source in key.inputs.values() if source in stages]
        lacking[digest] = len(inputs)
        for source in inputs:
            readers[source].append(digest)

    @functools.cache
    def chain(digest: str) -> float:
        return seconds(stages[digest]) + max(map(chain, readers[digest]), default=0.0)

    ready = [(-chain(digest), digest) for digest, n in lacking.items() if not n]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < gpus:
            _, digest = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds(stages[digest]), digest))
        now, made = heapq.heappop(running)
        for digest in readers[made]:
            lacking[digest] -= 1
            if not lacking[digest]:
                heapq.heappush(ready, (-chain(digest), digest))
    return now


def budget_hours(budget: str) -> float:
    """GPU-hours of "40h", "1.5h" or "30m". Raises UserError for any other form."""
    if not (parts := re.fullmatch(r"(\d+(?:\.\d+)?)([hm])", budget.strip())):
        raise UserError(f"--budget {budget}: write GPU-hours or minutes, such as 40h, 1.5h or 30m")
    return float(parts[1]) / (60 if parts[2] == "m" else 1)


def check_budget(price: Price, budget: str) -> None:
    """Raises UserError where the missing work costs more than `budget` of GPU time, and as `budget_hours`."""
    if price.missing.gpu_hours > budget_hours(budget):
        raise UserError(
            f"--budget {budget}: the plan costs {_duration(price.missing.gpu_hours)} of GPU time ({price.basis}). "
            "Raise the budget, or run fewer rows or seeds."
        )


def spread(items: Sequence[T]) -> Sequence[T]:
    """At most SAMPLE of them, at even distances."""
    return items[:: math.ceil(len(items) / SAMPLE) or 1]


class _Work:
    """How much there is to compute in the trials' stages, and in published ones that can be compared with them."""

    def __init__(self, trials: Sequence[Trial]):
        self.specs = {key.digest: key.spec for key in distinct_stages(trials)}
        self._images = _images(trials)

    def of(self, key: StageKey) -> Work:
        """Raises KeyError where an input, or the images, are unknown."""
        return Work() if _is_import(key) else stage_work(key.stage, *self._config_and_images(key))

    def slowness(self, artifacts: Iterable[Artifact], tflops: float) -> dict[bool, float]:
        """By how much artifacts of a stage, on the trials' images, took longer than at full speed, in the median: of
        those with a network, and of those without."""
        taken: dict[bool, list[float]] = defaultdict(list)
        for artifact in artifacts:
            with suppress(KeyError, ValidationError, UserError):  # on other images, or by a version that knew others
                work = self.of(artifact.key)
                if seconds := _at_full_speed(work, tflops):
                    taken[_has_network(work)].append(artifact.info["seconds"] / seconds)
        return {with_network: statistics.median(ratios) for with_network, ratios in taken.items()}

    def _config_and_images(self, key: StageKey) -> tuple[Config, Images]:
        images, params = self._images[key.spec["data"]["images"]], dict[str, Any]()
        self._collect(key.spec, params)
        return Config.model_validate(params), images

    def _collect(self, spec: Mapping[str, Any], params: dict[str, Any]) -> None:
        """The parameters of a stage and of all that leads to it, by their groups."""
        params[GROUPS[spec["stage"]]] = spec["params"]
        for digest in spec.get("inputs", {}).values():
            self._collect(self.specs[digest], params)


def _sample(stage: str, own: Sequence[str], store: Store, work: _Work) -> list[Artifact]:
    """Published artifacts of a stage: of those with the digests `own`, else the newest, which `work` learns about."""
    digests = spread(own) or store.newest_first(stage)[:SAMPLE]
    read = store.read_with_inputs(((stage, digest) for digest in digests), but=work.specs)
    found = [one for one in read.values() if isinstance(one, Artifact)]
    work.specs |= {artifact.key.digest: artifact.key.spec for artifact in found}
    return [artifact for artifact in found if artifact.key.stage == stage]


def _has_network(work: Work) -> bool:
    """Maps from a folder go through none."""
    return work.flops > 0


def _counted_seconds(work: Work, tflops: float) -> float:
    """From the work alone."""
    return max(_at_full_speed(work, tflops), _at_full_speed(work, math.inf) + work.passes * SECONDS_A_PASS)


def _at_full_speed(work: Work, tflops: float) -> float:
    """Seconds of work that no pass holds up."""
    return work.flops / (tflops * 1e12) + work.labels / LABELS_PER_SECOND + work.pixels / PIXELS_PER_SECOND


def _longest_first(seconds: Iterable[float], gpus: int) -> float:
    """Seconds until jobs that need nothing from each other are done, the longest started first."""
    busy_until = [0.0] * gpus
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(busy_until, busy_until[0] + job)
    return max(busy_until)


def _is_import(key: StageKey) -> bool:
    return "images" not in key.spec["data"]


def _images(trials: Iterable[Trial]) -> dict[str, Images]:
    """What the trials' splits are like, by the digest of their images."""
    splits = {stage.name: stage.split for stage in pipeline.STAGES}
    found: dict[str, Images] = {}
    for trial in trials:
        for name, key in trial.keys.items():
            digest = key.spec["data"].get("images")
            if digest and digest not in found:
                devkit = pipeline.open_data(trial.config, trial.data).devkit
                found[digest] = Images.of(devkit, getattr(trial.config.data, splits[name]))
    return found


def _basis(estimates: Mapping[str, Estimate], tflops: float) -> str:
    """ "stages: 12 measured, 30 counted at 40 TFLOP/s"."""
    counts = Counter(e.basis for e in estimates.values())
    how = {"measured": "measured", "similar": "like measured ones", "counted": f"counted at {tflops:g} TFLOP/s"}
    return "stages: " + ", ".join(f"{counts[basis]} {how[basis]}" for basis in get_args(Basis) if counts[basis])


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _gpus(n: int) -> str:
    return f"{n} GPU{'s' * (n != 1)}"
