"""How far the measured rows of tables are ordered as the paper's are: pair by pair, and pooled over tables.

A pair is two rows of a table whose values of its first metric differ in the paper. A pair of runs counts once, however
many tables show it, and not at all in a seed in which both rows are one run, or are equal as printed.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from analysis.compiled import CompiledTable, Line, Trial
from analysis.render import markdown, markdown_grid
from analysis.stats import over_seeds

NOISE = 2.1
"""Points between sum and mean in Table 5, which are the same maps but for a factor: what chance does to the paper's
values."""
HEADING = "Pairs of rows that are ordered as in the paper"


@dataclass(frozen=True)
class Pair:
    """The second row's value less the first one's, in points: the paper's, and ours by seed.

    `untold` are the seeds in which both are one run, or equal as printed.
    """

    table: str
    rows: tuple[str, str]
    paper: float
    ours: Mapping[int, float]
    untold: tuple[int, ...] = ()

    def is_ordered(self, seed: int) -> bool:
        return (self.ours[seed] > 0) == (self.paper > 0)


def find_pairs(compiled: Iterable[CompiledTable]) -> list[Pair]:
    """Of all tables, in order. Rows that are not comparable (daggers) are left out."""
    pairs: list[Pair] = []
    seen: set[tuple[str, int, frozenset[str]]] = set()
    for table in compiled:
        metric = table.table.measured[0].name
        measured = [(line, _by_seed(line, metric)) for line in table.lines if line.cells[metric].paper is not None]
        for (first, a), (second, b) in itertools.combinations(measured, 2):
            paper = _rounded(_rounded(second.cells[metric].paper) - _rounded(first.cells[metric].paper))
            if not paper:
                continue
            ours: dict[int, float] = {}
            untold = []
            for seed in sorted(a.keys() & b.keys()):
                runs = (metric, seed, frozenset(one.measured or one.record.trial_key for one in (a[seed], b[seed])))
                if runs in seen and len(runs[2]) > 1:
                    continue
                seen.add(runs)
                if _rounded(b[seed].values[metric]) == _rounded(a[seed].values[metric]):
                    untold.append(seed)
                else:
                    ours[seed] = b[seed].values[metric] - a[seed].values[metric]
            if ours or untold:
                pairs.append(Pair(table.table.name, (first.label, second.label), paper, ours, tuple(untold)))
    return pairs


def _by_seed(line: Line, metric: str) -> dict[int, Trial]:
    return {trial.seed: trial for trial in line.trials if metric in trial.values and not trial.deviations}


def _rounded(value: float | None) -> float:
    return round(value or 0.0, 1)


def tau(pairs: Sequence[Pair], seed: int) -> float | None:
    """Kendall's, of the pairs measured in a seed: 1 if all are ordered as in the paper, -1 if none is."""
    ordered = [pair.is_ordered(seed) for pair in pairs if seed in pair.ours]
    return 2 * statistics.fmean(ordered) - 1 if ordered else None


@dataclass(frozen=True)
class Agreement:
    """Tables of text, each with its heading first: `counts` by table, of all, and of those that the paper tells apart
    by more than its noise; and `every` pair that is told. Sentences on them."""

    counts: list[list[str]]
    every: list[list[str]]
    how_counted: str
    taus: str
    gains: str

    @property
    def n_tables(self) -> int:
        """Lines of `counts` that are of one table."""
        return len(self.counts) - 3


def agreement_of(compiled: Sequence[CompiledTable]) -> Agreement | None:
    """None where there is no pair."""
    pairs = find_pairs(compiled)
    if not pairs:
        return None
    seeds = sorted({seed for pair in pairs for seed in (*pair.ours, *pair.untold)})
    by_table = {name: list(own) for name, own in itertools.groupby(pairs, key=lambda pair: pair.table)}
    counts = [["table", "pairs", *(f"as in the paper, seed {seed}" for seed in seeds)]]
    counts += [[name, str(len(own)), *(_count(own, seed) for seed in seeds)] for name, own in by_table.items()]
    far = [pair for pair in pairs if abs(pair.paper) > NOISE]
    for name, some in (("all", pairs), (f"all that differ by more than {NOISE} in the paper", far)):
        counts.append([name, str(len(some)), *(_count(some, seed) for seed in seeds)])
    every = [["table", "rows", "paper", "ours", "seeds as in the paper"]]
    for pair in (pair for pair in pairs if pair.ours):
        ordered = sum(map(pair.is_ordered, pair.ours))
        rows, ours = f"{pair.rows[0]} → {pair.rows[1]}", _told(list(pair.ours.values()), "+z.1f")
        every.append([pair.table, rows, f"{pair.paper:+.1f}", ours, f"{ordered} of {len(pair.ours)}"])
    how_counted = (
        "Of each table its first metric; a pair of runs that several pairs of rows show counts in the first. "
        f"{NOISE} points: by so much the paper's sum and mean differ in Table 5, which are the same maps but for a "
        f"factor. Not counted, as both rows are one run or equal as printed: {_untold(pairs, seeds)}."
    )
    taus = (
        f"Kendall's tau (1: all, -1: none): {_tau(pairs, seeds)}; of those that differ by more than {NOISE} points "
        f"in the paper: {_tau(far, seeds)}"
    )
    over = " (interval of 95 % over seeds)" * (len(seeds) > 1)
    return Agreement(counts, every, how_counted, taus, gains=f"What a row has more than another, in points{over}:")


def to_markdown(compiled: Sequence[CompiledTable]) -> str:
    """Counts by table, tau of all pairs and of those that the paper tells apart by more than its noise, all pairs."""
    agreement = agreement_of(compiled)
    heading = f"### {HEADING}"
    if agreement is None:
        return f"{heading}\n\nNo two rows have measured values and different values of the paper.\n"
    names = [f"**{line[0]}**" if i > agreement.n_tables else line[0] for i, line in enumerate(agreement.counts)]
    counts = [[name, *line[1:]] for name, line in zip(names, agreement.counts, strict=True)]
    told = [heading, markdown_grid(counts), agreement.how_counted, f"{agreement.taus}."]
    if len(agreement.every) > 1:
        every = [[line[0], markdown(line[1]), *line[2:]] for line in agreement.every]
        told += [agreement.gains, markdown_grid(every)]
    return "\n\n".join(told) + "\n"


def _untold(pairs: Sequence[Pair], seeds: Sequence[int]) -> str:
    return ", ".join(f"{sum(seed in pair.untold for pair in pairs)} pairs of seed {seed}" for seed in seeds)


def _count(pairs: Sequence[Pair], seed: int) -> str:
    own = [pair for pair in pairs if seed in pair.ours]
    return f"{sum(pair.is_ordered(seed) for pair in own)} of {len(own)}"


def _tau(pairs: Sequence[Pair], seeds: Sequence[int]) -> str:
    return _told([value for seed in seeds if (value := tau(pairs, seed)) is not None], "z.2f")


def _told(values: Sequence[float], form: str) -> str:
    if not values:
        return "not measured"
    between = over_seeds(values)
    told = f" ({between[0]:{form}} to {between[1]:{form}})" if between else ""
    return f"{statistics.fmean(values):{form}}{told}"
