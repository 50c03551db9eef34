"""The runs of one MLflow experiment: found by their keys or made once, and what is still to be written to them.

A run is found again by a tag (the key of the sweep, trial or stage) and made under a lease in the store, so that two
drivers never make it twice. A point of a series that is there already, by metric and step, is left as it is. What there
is for one run goes there in one go.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.secrets import without_password
from semformer.store import Store
from semformer.store.leases import Lease
from sweeps.tracking.connection import TAG, connecting, open_experiment, search_runs

METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 800, 100, 100  # MLflow takes 1000 items in all
TAG_LENGTH, PARAM_LENGTH = 5000, 6000
ENDED = ("FINISHED", "FAILED", "KILLED")
FEW = 20
"""Runs that are looked for one by one; more are found by listing the experiment."""
AT_ONCE = 4
"""Runs that are written at the same time, where a server takes them."""
SYSTEM = "system/"
"""Begins the series by seconds, which only go on; those by epoch may have gaps that are filled later."""

Point = tuple[str, int, float]
"""Metric, step, value."""


class Gone(UserError):
    """What an event is about is not there any more."""


class Epochs:
    """The steps of a series that are written: all up to one (they count 1, 2, ...), and others."""

    __slots__ = ("others", "upto")

    def __init__(self, steps: Iterable[int] = ()):
        self.upto = 0
        self.others: set[int] = set()
        for step in sorted(steps):
            self.add(step)

    def __contains__(self, step: int) -> bool:
        return 0 < step <= self.upto or step in self.others

    def add(self, step: int) -> None:
        self.others.add(step)
        while self.upto + 1 in self.others:
            self.upto += 1
            self.others.discard(self.upto)


class Seconds:
    """Likewise, of a series that only goes on: all up to the latest count as written."""

    __slots__ = ("latest",)

    def __init__(self, steps: Iterable[int] = ()):
        self.latest = max(steps, default=-1)

    def __contains__(self, step: int) -> bool:
        return step <= self.latest

    def add(self, step: int) -> None:
        self.latest = max(self.latest, step)


def steps_of(name: str, steps: Iterable[int] = ()) -> Epochs | Seconds:
    return Seconds(steps) if name.startswith(SYSTEM) else Epochs(steps)


@dataclass
class KnownRun:
    """What is known of a run of ours. `tags`: those that begin with "semformer.", without that, and the parent's id."""

    id: str
    name: str
    status: str
    started: int
    """Milliseconds since the epoch."""
    tags: dict[str, str]
    has_metrics: bool
    series: dict[str, Epochs | Seconds] | None = None
    """By metric; None: to be read."""

    @classmethod
    def of(cls, run: Run) -> Self:
        tags = {name.removeprefix(TAG): text for name, text in run.data.tags.items() if name.startswith(TAG)}
        if parent := run.data.tags.get(MLFLOW_PARENT_RUN_ID):
            tags[MLFLOW_PARENT_RUN_ID] = parent
        info = run.info
        return cls(info.run_id, info.run_name, info.status, info.start_time, tags, bool(run.data.metrics))


@dataclass
class Pending:
    """What is to be written to one run in one go; `status` is MLflow's."""

    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    status: str | None = None
    ended: int | None = None


class Runs:
    """Everything raises whatever MLflow raises; `forget` what is known then, and begin again.

    Raises UserError when MLflow cannot be reached at `uri`.
    """

    def __init__(self, uri: str, store: Store):
        self.uri, self.store = uri, store
        self.experiment = self.experiment_id = ""
        self.written = 0
        """How often a run was written to, and files were: what shows that something is still going on."""
        self.forget()
        with connecting(uri), self._alone():  # the first client of a new database makes its tables
            self.client = MlflowClient(tracking_uri=uri)

    def open(self, experiment: str) -> dict[tuple[str, str], KnownRun]:
        """Work in this experiment, made where there is none. Raises UserError.

        Returns its runs by kind ("sweep", "trial" or "stage") and key; of several, a finished one, else the oldest.
        """
        with connecting(self.uri), self._alone():
            self.experiment, self.experiment_id = experiment, open_experiment(self.client, experiment)
            self._list()
        return dict(self._known)

    def forget(self) -> None:
        """Believe nothing about what MLflow holds; it is read again."""
        self._known: dict[tuple[str, str], KnownRun] = {}  # by kind and key
        self._pending: dict[str, Pending] = {}  # by run id
        self._fresh: defaultdict[str, set[str]] = defaultdict(set)  # run id -> series that were read under the lease

    def answers(self) -> bool:
        """Whether MLflow can be reached."""
        try:
            self.client.search_experiments(max_results=1)
            return True
        except Exception:
            return False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written inside is there at the end."""
        with ExitStack() as self._leases:
            self._has_lease = False
            self._fresh.clear()
            yield
            self.flush()

    def hold(self) -> None:
        """Make runs, and complete series, alone among the drivers on this store; until the end of `writing`."""
        if not self._has_lease:
            self._leases.enter_context(self._alone())
            self._has_lease = True

    # Which there are

    def find(self, kind: str, key: str) -> KnownRun:
        """Raises Gone."""
        run = self._known.get((kind, key)) or self._reread(kind, key)
        if run is None:
            raise Gone(f"the run of {kind} {key} has gone from the MLflow experiment {self.experiment!r}")
        return run

    def find_or_create(
        self, kind: str, key: str, name: str, tags: Mapping[str, str], time: int, status: str | None = None
    ) -> KnownRun:
        if run := self._known.get((kind, key)):
            return run
        self.hold()
        if run := self._reread(kind, key):
            return run
        tags = {**tags, f"{TAG}kind": kind, f"{TAG}{kind}_key": key}
        made = self._keep(self.client.create_run(self.experiment_id, start_time=time, tags=tags, run_name=name))
        made.series = {}
        self.pending(made).status = status
        return made

    def look_for(self, kind: str, keys: Sequence[str]) -> None:
        """Know these, where one listing tells more at once than many questions."""
        if len(keys) > FEW and sum((kind, key) not in self._known for key in keys) > FEW:
            self.hold()
            self._list()

    def unfinished(self) -> Iterator[Run]:
        """As MLflow has them now."""
        for status in ("SCHEDULED", "RUNNING"):
            yield from search_runs(self.client, self.experiment_id, f"attributes.status = '{status}'")

    def _list(self) -> None:
        for run in search_runs(self.client, self.experiment_id):
            self._keep(run)

    def _reread(self, kind: str, key: str) -> KnownRun | None:
        for run in search_runs(self.client, self.experiment_id, f"tags.`{TAG}{kind}_key` = '{key}'"):
            self._keep(run)
        return self._known.get((kind, key))

    def _keep(self, run: Run) -> KnownRun:
        """Of several runs of a key, the finished one, else the first."""
        kind = run.data.tags.get(f"{TAG}kind", "")
        name = kind, run.data.tags.get(f"{TAG}{kind}_key", "")
        known = self._known.get(name)
        if known is None or (run.info.status == "FINISHED" != known.status and run.info.run_id != known.id):
            known = self._known[name] = KnownRun.of(run)
        return known

    def _alone(self) -> Lease:
        """Among the drivers on this store that write to this MLflow."""
        key = StageKey("mlflow", {"uri": without_password(self.uri)})
        return self.store.lease(key, wait=lambda holder: None)

    # What is written to them

    def pending(self, run: KnownRun) -> Pending:
        return self._pending.setdefault(run.id, Pending())

    def measure(self, run: KnownRun, points: Iterable[Point], time: int) -> None:
        """Write the points that the run does not have yet."""
        known = self._series(run)
        for name, step, value in points:
            steps = known.setdefault(name, steps_of(name))
            if step not in steps:
                steps.add(step)
                self.pending(run).metrics.append(Metric(name, value, time, step))

    def refresh(self, run: KnownRun, points: Iterable[Point]) -> None:
        """Read again, once while `hold` lasts, what the run has of these series: another driver may have gone on."""
        names = {name for name, _, _ in points} - self._fresh[run.id]
        if not names:
            return
        self.flush()
        for name in names & self.client.get_run(run.id).data.metrics.keys():
            self._series(run)[name] = self._steps(run, name)
        self._fresh[run.id] |= names

    def upload(self, run: KnownRun, file: Path, name: str) -> None:
        """A file, as `name` among the run's artifacts."""
        folder = str(PurePosixPath(name).parent)
        self.client.log_artifact(run.id, str(file), None if folder == "." else folder)
        self.written += 1

    def flush(self) -> None:
        """Write what is pending."""
        pending, self._pending = self._pending, {}
        if self.uri.startswith("http") and len(pending) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self._write, pending, pending.values()))
        else:
            for run_id, one in pending.items():
                self._write(run_id, one)

    def _write(self, run_id: str, pending: Pending) -> None:
        params = [Param(name, _cut(text, PARAM_LENGTH)) for name, text in pending.params.items()]
        tags = [RunTag(name, _cut(text, TAG_LENGTH)) for name, text in pending.tags.items()]
        for call in _calls(pending.metrics, params, tags):
            self.client.log_batch(run_id, **call)
        self.written += 1
        if pending.status in ENDED:
            self.client.set_terminated(run_id, pending.status, pending.ended)
        if pending.name or (pending.status and pending.status not in ENDED):
            status = None if pending.status in ENDED else pending.status
            self.client.update_run(run_id, status=status, name=pending.name)

    def _series(self, run: KnownRun) -> dict[str, Epochs | Seconds]:
        if run.series is None:
            self.flush()
            names = self.client.get_run(run.id).data.metrics
            run.series = {name: self._steps(run, name) for name in names}
        return run.series

    def _steps(self, run: KnownRun, name: str) -> Epochs | Seconds:
        return steps_of(name, (point.step for point in self.client.get_metric_history(run.id, name)))


def _calls(metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]) -> Iterator[dict[str, Any]]:
    """The arguments of as few log_batch calls as MLflow's limits allow."""
    kinds: dict[str, tuple[Sequence[Any], int]] = {
        "metrics": (metrics, METRICS_A_CALL),
        "params": (params, PARAMS_A_CALL),
        "tags": (tags, TAGS_A_CALL),
    }
    for i in range(max(math.ceil(len(items) / limit) for items, limit in kinds.values())):
        yield {kind: items[i * limit : (i + 1) * limit] for kind, (items, limit) in kinds.items()}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."
