"""What a plan costs before it runs: GPU-hours and wall time, with and without sharing; and whether it fits.

A trial holds its GPU through all of its stages, so their seconds are GPU-seconds, whatever they compute on.
"""

import heapq
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from semformer import pipeline
from semformer.config import Config
from semformer.errors import UserError
from semformer.flops import Images, stage_passes, stage_work
from semformer.keys import StageKey
from semformer.store import Artifact, Store
from sweeps.plan.trials import Plan, Trial

TFLOPS = 40.0
"""Effective throughput of one GPU in training, in 10^12 operations a second: an eighth of what an A100 can do in
bfloat16, a third of what a V100 or A10G can. Networks of this size, run op by op, reach a tenth to a third. A number at
the low end makes a price that is rather too high. It counts on enough workers to load the images meanwhile."""
SECONDS_A_PASS = 0.02
"""What a GPU takes at least for a training step or a view: thousands of kernels are started one by one, however small
they are."""
PIXELS_PER_SECOND = 1e7
"""Of `evaluate`, on one CPU core: 19 ms for a VOC image with its files, of which scoring with erosion is 7."""
SAMPLE = 10
"""Published artifacts of a stage whose times are compared at most: counting their work takes time."""
SIMULATED = 300
"""Trials up to which the wall time is simulated; of more, the bound is as good and takes no time."""
CUDA_CONTEXT = 512 * 2**20
"""Bytes of a GPU that CUDA takes in every process, beside what torch reserves."""

Basis = Literal["measured", "similar", "counted"]


@dataclass(frozen=True)
class Estimate:
    """How long a stage takes. "measured": it is in the store, and took so long; "similar": like the published
    artifacts of this stage on these images, in proportion to the work; "counted": from the work alone."""

    seconds: float
    basis: Basis


class Cost(NamedTuple):
    gpu_hours: float
    wall_hours: float


@dataclass(frozen=True)
class Price:
    """Of a plan on `gpus` GPUs with one trial on each."""

    gpus: int
    missing: Cost
    """What is not in the store."""
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


def estimate(plan: Plan, store: Store, *, tflops: float = TFLOPS) -> dict[str, Estimate]:
    """How long every distinct stage of the plan takes on one GPU, by digest. `tflops`: see TFLOPS."""
    work = _Work(plan, store)
    rates: dict[str, float | None] = {}

    def estimated(key: StageKey) -> Estimate:
        if artifact := work.published.get(key.digest):
            return Estimate(artifact.info["seconds"], "measured")
        if key.stage not in rates:
            rates[key.stage] = work.seconds_per_operation(key.stage)
        if (rate := rates[key.stage]) is not None:
            return Estimate(rate * work.operations(key), "similar")
        if key.stage == "evaluate":
            return Estimate(work.operations(key) / PIXELS_PER_SECOND, "counted")
        seconds = max(work.operations(key) / (tflops * 1e12), work.passes(key) * SECONDS_A_PASS)
        return Estimate(seconds, "counted")

    return {digest: estimated(key) for digest, key in work.keys.items()}


def price(plan: Plan, store: Store, *, gpus: int, tflops: float = TFLOPS) -> Price:
    """The price of a plan. Raises UserError for a throughput or a number of GPUs that is not positive."""
    if not tflops > 0 or gpus < 1:
        raise UserError(f"a price needs at least one GPU and a positive throughput, not {gpus} and {tflops:g} TFLOP/s")
    estimates = estimate(plan, store, tflops=tflops)
    missing = [trial for trial in plan.trials if not plan.is_cached(trial)]

    def seconds(key: StageKey) -> float:
        return estimates[key.digest].seconds

    unshared = [sum(map(seconds, trial.keys.values())) for trial in plan.trials for _ in trial.cells]

    def cost(gpu_seconds: float, wall_seconds: float) -> Cost:
        return Cost(gpu_seconds / 3600, wall_seconds / 3600)

    return Price(
        gpus=gpus,
        missing=cost(
            sum(e.seconds for digest, e in estimates.items() if digest not in plan.cached),
            _wall_seconds(missing, seconds, ready=plan.cached, gpus=gpus),
        ),
        empty_store=cost(
            sum(e.seconds for e in estimates.values()),
            _wall_seconds(plan.trials, seconds, ready=frozenset(), gpus=gpus),
        ),
        without_sharing=cost(
            sum(unshared),
            _longest_first(unshared, gpus),
        ),
        basis=_basis(estimates, tflops),
    )


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


def check_packing(plan: Plan, store: Store, *, gpus_per_trial: float, gpu_bytes: int) -> str:
    """Whether as many trials as share a GPU fit into its memory, as far as it was measured; says on what grounds.

    The largest peak of any published artifact of the plan's stages counts, whatever its config. Raises UserError that
    names the stage, its peak and the share that fits.
    """
    if not 0 < gpus_per_trial < 1:
        return "no GPU is shared"
    trials = math.floor(1 / gpus_per_trial + 1e-9)
    peaks = {
        artifact.info["memory"]["peak_bytes"] + CUDA_CONTEXT: artifact.key.stage
        for artifact in store.artifacts()
        if artifact.key.stage in plan.stages and artifact.info.get("memory", {}).get("device") == "cuda"
    }
    if not peaks:
        return f"whether {trials} trials fit into a GPU's memory is unknown: no stage was measured on one yet"
    largest = max(peaks)
    told = f"{peaks[largest]} takes up to {largest / 2**30:.1f} GiB"
    if largest * trials > gpu_bytes:
        fitting = gpu_bytes // largest
        # rounded up: 0.34 lets two trials onto a GPU, 0.33 three
        hint = f"--gpus-per-trial {math.ceil(100 / fitting) / 100:g} fits" if fitting else "not even one fits"
        raise UserError(
            f"--gpus-per-trial {gpus_per_trial:g}: {trials} trials do not fit into a GPU of "
            f"{gpu_bytes / 2**30:.1f} GiB: {told}; {hint}"
        )
    return f"{trials} trials fit into a GPU of {gpu_bytes / 2**30:.1f} GiB: {told}"


class _Work:
    """How much there is to compute in a plan's stages, and in the published ones that can be compared with them."""

    def __init__(self, plan: Plan, store: Store):
        self.keys = {key.digest: key for trial in plan.trials for key in trial.keys.values()}
        self.published: dict[str, Artifact] = {artifact.key.digest: artifact for artifact in store.artifacts()}
        self._specs = {digest: artifact.key.spec for digest, artifact in self.published.items()}
        self._specs |= {digest: key.spec for digest, key in self.keys.items()}
        self._images = _images(plan)

    def operations(self, key: StageKey) -> float:
        """Raises KeyError where an input, or the images, are unknown."""
        return 0.0 if _is_import(key) else stage_work(key.stage, *self._config_and_images(key))

    def passes(self, key: StageKey) -> int:
        """Raises KeyError as `operations` does."""
        return 0 if _is_import(key) else stage_passes(key.stage, *self._config_and_images(key))

    def seconds_per_operation(self, stage: str) -> float | None:
        """The median over published artifacts of the stage on the plan's images; None where there is none."""
        rates: list[float] = []
        for artifact in self.published.values():
            if artifact.key.stage == stage and len(rates) < SAMPLE:
                try:
                    work = self.operations(artifact.key)
                except KeyError:
                    continue
                rates += [artifact.info["seconds"] / work] if work else []
        return statistics.median(rates) if rates else None

    def _config_and_images(self, key: StageKey) -> tuple[Config, Images]:
        params: dict[str, Any] = {}
        self._collect(key.spec, params)
        return Config.model_validate(params), self._images[key.spec["data"]["images"]]

    def _collect(self, spec: Mapping[str, Any], params: dict[str, Any]) -> None:
        """The parameters of a stage and of all that leads to it, by stage."""
        params[spec["stage"]] = spec["params"]
        for digest in spec.get("inputs", {}).values():
            self._collect(self._specs[digest], params)


def _wall_seconds(
    trials: Sequence[Trial], seconds: Callable[[StageKey], float], *, ready: frozenset[str], gpus: int
) -> float:
    """Of trials that share stages, of which those in `ready` are there. Of many trials it is what no list schedule
    exceeds: work / m + (1 - 1 / m) * longest chain, for m GPUs (Graham, 1969)."""
    if len(trials) <= SIMULATED:
        from sweeps.schedule.queue import simulate

        return simulate(trials, seconds, ready=ready, gpus=gpus)
    missing = [[key for key in trial.keys.values() if key.digest not in ready] for trial in trials]
    work = sum(map(seconds, {key for keys in missing for key in keys}))
    longest = max(sum(map(seconds, keys)) for keys in missing)
    return work / gpus + (1 - 1 / gpus) * longest


def _longest_first(seconds: Iterable[float], gpus: int) -> float:
    """Seconds until jobs that need nothing from each other are done, the longest started first."""
    busy_until = [0.0] * gpus
    for job in sorted(seconds, reverse=True):
        heapq.heapreplace(busy_until, busy_until[0] + job)
    return max(busy_until)


def _is_import(key: StageKey) -> bool:
    return "images" not in key.spec["data"]


def _images(plan: Plan) -> dict[str, Images]:
    """What the plan's splits are like, by the digest of their images."""
    splits = {stage.name: stage.split for stage in pipeline.STAGES}
    found: dict[str, Images] = {}
    for trial in plan.trials:
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
