"""What stands under a table: how its values were measured, and what of that differs from the paper."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.choice import Candidate
from analysis.compiled import Line
from analysis.runs import FIELDS, MASKS, plain_text
from semformer.config import flatten
from semformer.data.voc import VOC_COUNTS
from sweeps.plan.protocol import PROTOCOL, of_scores
from sweeps.plan.scores import LINKS
from sweeps.plan.table import Table, resolve

FINAL_MAPS = {
    "activation": "activation map alone",
    "attention": "class-relative attention alone",
    "both": "activation map times class-relative attention",
}
IMPORTED = (
    *("cams.folder", "pseudo_masks.folder"),
    *("caae.checkpoint", "segmentor.checkpoint", "deeplab.checkpoint"),
)
"""The fields that name files with what others have made."""
SPLITS = {"eval_split": "maps", "mask_split": "pseudo masks", "test_split": "the segmentation"}
"""What is measured on them."""
AS_PUBLISHED = {
    "data.train_split": "training split",
    "data.eval_split": "split",
    "cams.scales": "scales",
    "cams.flip": "flip",
    "evaluate.erosion": "erosion",
    "evaluate.rule": "threshold rule",
    "caae.selection": "epoch of the CAAE",
    "segmentor.selection": "epoch",
}
"""What makes a value comparable with the paper's, besides data, networks and schedule."""


class Protocol:
    """The settings in which all measured cells should agree: the value of most of them, and who deviates.

    A setting is None for the trials that are what was asked for, see `Candidate.settings`.
    """

    def __init__(self, measured: Sequence[Candidate]):
        self.measured = measured
        self.counts: dict[str, Counter[str | None]] = {
            name: Counter(candidate.settings.get(name) for candidate in measured if not candidate.lacks(name))
            for name in dict.fromkeys(name for candidate in measured for name in candidate.settings)
        }
        recorded = {name for candidate in measured for name in candidate.record.protocol}
        self.names = [name for name in self.counts if name in recorded and name != MASKS]

    def common(self, name: str) -> str | None:
        """The value that most measured cells have."""
        return self.counts[name].most_common(1)[0][0] if name in self.counts else None

    def shown(self, name: str) -> str:
        value = self.common(name) or "not recorded"
        return value if len(self.counts.get(name, ())) < 2 else f"{value} (not in all cells, see the daggers)"

    def usual(self, field: str) -> str:
        """What most measured cells that use a config field had in it; "" where it is not recorded."""
        values = Counter(self._had(field))
        return values.most_common(1)[0][0] if values else ""

    def parameter(self, field: str) -> str:
        """The value of a config field if all measured cells that use it have the same, else ""."""
        values = {*self._had(field)}
        return values.pop() if len(values) == 1 else ""

    def _had(self, field: str) -> list[str]:
        return [candidate.record.config.get(field, "") for candidate in self.measured if candidate.uses(field)]

    def changed(self) -> list[str]:
        """The config fields in which most cells are not what was asked for."""
        return [name for name in self.counts if name not in (*self.names, MASKS) and self.common(name)]

    def deviations(self, candidate: Candidate) -> tuple[str, ...]:
        """A text as `erosion = 7 (otherwise 0)` for every setting that is not the common one."""
        texts = []
        for name in self.counts:
            value, common = candidate.settings.get(name), self.common(name)
            if value != common and not candidate.lacks(name):
                value = value or candidate.record.config.get(name, "not recorded")
                _, wanted = candidate.differs.get(name, ("", "not recorded"))
                texts.append(f"{name} = {value} (otherwise {common or wanted})")
        return tuple(texts)

    def missed(self, field: str) -> str:
        """What was asked for in a config field where most cells have another value, else ""."""
        wanted = [candidate.differs[field][1] for candidate in self.measured if field in candidate.differs]
        return wanted[0] if 2 * len(wanted) > len(self._had(field)) else ""


def notes_under(
    table: Table,
    lines: Sequence[Line],
    protocol: Protocol,
    preset: str,
    overrides: Mapping[str, Any],
    seeds: Sequence[int],
) -> Iterable[tuple[str, str]]:
    """(heading, text) pairs."""
    if not protocol.measured:
        yield "Ours", f"preset {preset}; nothing is measured yet."
        return
    settings = "".join(f", {text}" for text in _settings(protocol, overrides))
    data = f" of {protocol.shown('data')}" if "data" in protocol.names else ""
    if "eval_split" not in protocol.names:
        data = data.partition(" (")[0]  # the images that are counted there are those of the maps
    listed = ", ".join(map(str, seeds))
    yield "Ours", f"preset {preset}{settings}; {_splits(protocol)}{data}; seed{'s' * (len(seeds) > 1)} {listed}."
    if table.paper_metrics:
        yield "Paper", _paper_note(table, protocol, preset)
    elif table.source:
        yield "Source", f"{table.source}."
    if any(cell.best or cell.paper_best for line in lines for cell in line.cells.values()):
        where = "line" if table.layout.transposed else "column"
        alike = next((f" at equal {m.header}" for m in table.layout.marks if m.name == table.layout.compared), "")
        daggers = any(cell.deviations for line in lines for cell in line.cells.values())
        yield "Bold", f"the best of its {where}{alike}{'; cells with a dagger are not compared' * daggers}."
    counts = {cell.n for line in lines for cell in line.cells.values() if cell.n}
    if max(counts, default=0) > 1:
        text = "a ± s (n) is the mean and the sample standard deviation over n seeds."
        yield "Seeds", text + (" The cells do not all have the same seeds." if len(counts) > 1 else "")
    if "rule" in protocol.names or FIELDS["rule"] in protocol.measured[0].varied:
        splits = [protocol.shown(name) for name in ("eval_split", "mask_split") if name in protocol.names]
        yield "Threshold", _threshold_note(protocol, " and ".join(dict.fromkeys(splits)) or "of each row")
    final_map = protocol.parameter("cams.final_map")
    if "scales" in protocol.names or FIELDS["scales"] in protocol.measured[0].varied:  # some maps are ours
        yield "Final map", f"{FINAL_MAPS.get(final_map, final_map) or 'differs from row to row'}."
    others = [f"{name} {protocol.shown(name)}" for name in protocol.names if name not in (*SPLITS, "data", "rule")]
    others += _varied(table, protocol)
    if others:
        yield "Protocol", f"{'; '.join(others)}."
    yield "Supervision audit", _supervision_note(protocol)
    yield from (("Note", note) for note in table.notes)


def _splits(protocol: Protocol) -> str:
    splits = {what: protocol.shown(name) for name, what in SPLITS.items() if name in protocol.names}
    if not splits:
        return "measured on a split of each row's own"
    if [*splits] == [SPLITS["eval_split"]]:
        return f"measured on split {splits[SPLITS['eval_split']]}"
    return f"measured are {', '.join(f'{what} on split {split}' for what, split in splits.items())}"


def _varied(table: Table, protocol: Protocol) -> Iterable[str]:
    """What rows set of the protocol and no mark shows, as `erosion 0 (weak), 7 (strong)`."""
    first, marked = protocol.measured[0], {mark.field for mark in table.layout.marks}
    for name, setting in of_scores(first.scores).items():
        if setting.field in first.varied - marked:
            rows: dict[str, dict[str, None]] = {}
            for candidate in protocol.measured:
                rows.setdefault(candidate.record.protocol.get(name, "not recorded"), {})[candidate.row] = None
            told = [f"{value} ({', '.join(own)})" for value, own in rows.items()]
            yield f"{name} {', '.join(told)}"


def _settings(protocol: Protocol, overrides: Mapping[str, Any]) -> Iterable[str]:
    """What was asked for beside the preset, and what else the cells had, as `segmentor.epochs = 1`."""
    for field in dict.fromkeys((*overrides, *protocol.changed())):
        value, asked = protocol.usual(field), protocol.missed(field)
        told = f" (asked for: {asked})" if asked and field in overrides else ""
        yield f"{field} = {value or overrides.get(field)}{told}"


def _paper_note(table: Table, protocol: Protocol, preset: str) -> str:
    text = f"{table.source}." if table.source else "see the table file."
    if preset != "paper":
        text += f" Other data, networks and schedule than preset {preset}: compare the order, not the values."
    else:
        text += f" {_as_published(table, protocol)}"
    if table.paper_only:
        first, *others = (row.label for row in table.paper_only)
        whom = f"the {1 + len(others)} others, {first} to {others[-1]}" if others else first
        text += f" Nothing of ours is measured for {whom}."
    return text


def _as_published(table: Table, protocol: Protocol) -> str:
    """What of the protocol is not that of preset paper (and of the table file, which has the paper's values)."""
    paper = flatten(resolve(table, table.rows[0], "paper", {}, 0))
    scores, varied = protocol.measured[0].scores, protocol.measured[0].varied
    titles = {setting.field: name for name, setting in PROTOCOL.items() if setting.field}
    names = AS_PUBLISHED | {field: name for field, name in titles.items() if field not in AS_PUBLISHED}
    beside = {setting.field for setting in PROTOCOL.values()} - {s.field for s in of_scores(scores).values()}
    fields = [field for field in names if field not in varied and field not in beside]
    fields = [field for field in fields if any(candidate.uses(field) for candidate in protocol.measured)]
    had = {field: protocol.usual(field) or "not recorded" for field in fields}
    differs = [
        f"{names[field]} {value} (there {wanted})"
        for field, value in had.items()
        if value != (wanted := plain_text(paper[field]))
    ]
    data = protocol.common("data") or "not recorded"
    if not data.startswith(f"VOC 2012 ({VOC_COUNTS.get(protocol.usual('data.eval_split'))} images"):
        differs.append(f"data {data} (there VOC 2012)")
    if differs:
        return f"Measured otherwise than by preset paper: {', '.join(differs)}."
    told = [
        f"{AS_PUBLISHED[field]} {had[field]}" for field in ("evaluate.erosion", "segmentor.selection") if field in had
    ]
    return f"Measured by the protocol of preset paper: {', '.join(['VOC 2012', *told])}."


SEARCHED = {
    "oracle": ("oracle", "of each cell the best"),
    "heldout": ("held-out", "of each cell, for every second image the best of the others, and the other way round"),
}
"""Rules that choose thresholds with the pixel masks."""


def _threshold_note(protocol: Protocol, split: str) -> str:
    rule = protocol.common("rule")
    if FIELDS["rule"] in protocol.measured[0].varied:
        return "its rule differs from row to row."
    if rule in SEARCHED:
        searched = protocol.parameter("evaluate.thresholds").split(", ")
        text = f"{': '.join(SEARCHED[rule])}, chosen with the pixel masks of split {split}"
        text += f", from {searched[0]} to {searched[1]} in steps of {searched[2]}" if len(searched) == 3 else ""
    elif rule == "fixed":
        text = f"fixed at {protocol.parameter('evaluate.fixed_threshold') or 'different values'}, chosen without masks"
    else:
        text = f"rule {rule or 'not recorded'}"
    return f"{text}." if len(protocol.counts.get("rule", ())) < 2 else f"{text}; another rule where a dagger says so."


def _supervision_note(protocol: Protocol) -> str:
    readers = protocol.shown(MASKS).split(", ")
    imported = any(candidate.record.config.get(field) for candidate in protocol.measured for field in IMPORTED)
    unknown = "of what comes from files, it is not known what it has seen; " * imported
    if {*readers} <= {link.stage for link in LINKS.values()}:
        rule = protocol.common("rule")
        what = (
            f"the scores and the {rule.replace('heldout', 'held-out')} threshold" if rule in SEARCHED else "the scores"
        )
        *others, last = readers
        stages = f"stages {', '.join(others)} and {last}" if others else f"stage {last}"
        return f"{unknown}training sees image-level labels only; pixel masks are read by {stages} alone, for {what}."
    supervised = "the segmentation learns from pixel masks; " * ("deeplab" in readers)
    return f"{unknown}{supervised}pixel masks are read by {', '.join(readers)}."
