"""What figures have in common: how they look, rows that show the same runs, and the words of captions."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from matplotlib.figure import Figure

from analysis.compiled import CompiledTable, Trial

STYLE: Any = {  # rc_context wants the literal names of all parameters
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a label may have a $
    "pdf.fonttype": 42,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Told apart by the colour-blind (Okabe and Ito); in grey, markers and dashes do it."""
OURS, PAPER = COLOURS[:2]

T = TypeVar("T")
Parts = tuple[str, str, Figure]
"""Title, caption, figure."""


class NoData(Exception):
    """Why a figure is left out."""


@dataclass
class Group(Generic[T]):
    """Rows that show the same runs, with what is drawn of these by seed."""

    labels: list[str]
    values: dict[int, T]

    @property
    def label(self) -> str:
        return ", ".join(self.labels)


def identity(trial: Trial) -> str:
    """Equal for runs that are scored by the same stage of the same key."""
    return trial.measured or trial.run_id


def group_rows(
    compiled: CompiledTable, get: Callable[[Trial], T | None], same: Callable[[Trial], str] = identity
) -> tuple[list[Group[T]], list[str]]:
    """The rows of which finished runs have something to draw, in order, and the labels of the others.

    Rows are one group if their runs are the `same` in each seed that both have.
    """
    groups: list[tuple[Group[T], dict[int, str]]] = []
    absent = []
    for line in (line for line in compiled.lines if line.ours):
        finished = [trial for trial in line.trials if trial.status == "finished"]
        values = {trial.seed: value for trial in finished if (value := get(trial)) is not None}
        names = {trial.seed: same(trial) for trial in finished if trial.seed in values}
        if not values:
            absent.append(line.label)
            continue
        for group, known in groups:
            shared = known.keys() & names.keys()
            if shared and all(known[seed] == names[seed] for seed in shared):
                group.labels.append(line.label)
                group.values |= values
                known |= names
                break
        else:
            groups.append((Group([line.label], values), names))
    return [group for group, _ in groups], absent


def told_seeds(compiled: CompiledTable, seeds: Mapping[str, Collection[int]]) -> str:
    """ "Preset tiny; n = 2 seeds (0, 1); n = 1: CF." of the seeds of each label."""
    every, most = sorted({seed for own in seeds.values() for seed in own}), max(map(len, seeds.values()))
    fewer = [
        f"n = {n}: {', '.join(labels)}"
        for n in range(1, most)
        if (labels := [label for label, own in seeds.items() if len(own) == n])
    ]
    first = f"n = {most} seed{'s' * (most > 1)} ({'of ' * (len(every) > most)}{', '.join(map(str, every))})"
    return "; ".join([f"Preset {compiled.preset}", first, *fewer]) + "."


def are_several(seeds: Mapping[str, Collection[int]]) -> bool:
    return any(len(own) > 1 for own in seeds.values())


def told_absent(labels: Collection[str], why: str) -> str:
    return f"Not shown, as there is {why}: {', '.join(labels)}." if labels else ""


def told_deviations(compiled: CompiledTable) -> str:
    """The rows with daggers, and what these tell."""
    texts = {line.label: {text for cell in line.cells.values() for text in cell.deviations} for line in compiled.lines}
    told = [f"{label} ({'; '.join(sorted(own))})" for label, own in texts.items() if own]
    return f"Not comparable: {'; '.join(told)}." if told else ""


def joined(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)
