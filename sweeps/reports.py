"""What is told of a trial: by its own process while it runs, and by the gate about what becomes of it.

Progress, Sampled and Waiting are only to be seen: of each trial the latest one counts, and some may be lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Scope(StrEnum):
    """Whose fault a failure is."""

    NODE = "node"
    """This machine cannot do it, another may: no data there, other code, a full disk, too little memory."""
    STAGE = "stage"
    """The stage cannot be made as it is configured; trying again ends the same."""
    STORE = "store"
    """The store is away or full, for everybody."""
    TRIAL = "trial"
    """This attempt: its process died, or raised what nobody foresaw."""


@dataclass(frozen=True)
class Failure:
    """Why a trial failed: an exception of class `error` in `stage` ("": before the first) on a node (Ray's id)."""

    scope: Scope
    stage: str
    error: str
    message: str
    traceback: str = ""
    node: str = ""

    @property
    def reason(self) -> str:
        return f"{self.stage}: {self.error}: {self.message}" if self.stage else f"{self.error}: {self.message}"


# By the trial's process


@dataclass(frozen=True)
class Started:
    """The process is at work. `gpu`: the ids of its share; `node`: Ray's id."""

    host: str
    pid: int
    gpu: str = ""
    node: str = ""


@dataclass(frozen=True)
class Progress:
    """About once a second. `values`: what the step measured."""

    stage: str
    step: int
    steps: int
    epoch: int = 0
    epochs: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    seconds_left: float = float("nan")
    note: str = ""


@dataclass(frozen=True)
class EpochEnded(Progress):
    """`values`: the means of the epoch. `probe`: the scores of its maps, by the names of the final ones."""

    probe: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """What the machine does, by MLflow's names; every ten seconds."""

    values: Mapping[str, float]


@dataclass(frozen=True)
class Waiting:
    """Another sweep on this store is making the stage."""

    stage: str
    holder: str


@dataclass(frozen=True)
class StageDone:
    """A stage, by its digest, is in the store: found there, or made in so many seconds."""

    stage: str
    key: str
    found: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Finished:
    """With the final metrics, "cam/val/miou" ..."""

    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Raised:
    """The exception is raised afterwards; the gate decides what follows."""

    failure: Failure


# By the gate


@dataclass(frozen=True)
class Found:
    """There was nothing to run. `stages`: those that are in the store; one that nothing missing reads may be gone."""

    stages: tuple[str, ...]


@dataclass(frozen=True)
class Retried:
    failure: Failure


@dataclass(frozen=True)
class Failed:
    """It will not be tried again."""

    failure: Failure


@dataclass(frozen=True)
class Pruned:
    """Stopped by a scheduler."""


Report = Started | Progress | Sampled | Waiting | StageDone | Finished | Raised | Found | Retried | Failed | Pruned
