"""The rows that a trial fills, as tags of its run: "table03/CF,table04/without".

MLflow's tags are of limited length: rows that are too many for one go on in "semformer.rows.2", "semformer.rows.3" ...
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

TAG = "semformer."
LENGTH = 4000


def tags(names: Sequence[str]) -> dict[str, str]:
    """The tags of a trial that fills the rows "table/row"."""
    parts = list(_parts(names)) or [""]
    rows = {f"{TAG}{_name(n)}": part for n, part in enumerate(parts, start=1)}
    return {**rows, f"{TAG}table": ",".join(dict.fromkeys(name.partition("/")[0] for name in names))[:LENGTH]}


def read(found: Mapping[str, str]) -> list[str]:
    """The rows in a run's tags; `found` by names without "semformer."."""
    texts: list[str] = []
    while text := found.get(_name(len(texts) + 1)):
        texts.append(text)
    return [row for text in texts for row in text.split(",")]


def merged(found: Mapping[str, str], names: Sequence[str], tables: Iterable[str]) -> dict[str, str]:
    """The tags of a run that has some, when a sweep of `tables` says that its trial fills `names`.

    Rows of other tables stay.
    """
    swept = set(tables)
    others = [row for row in read(found) if row not in names and row.partition("/")[0] not in swept]
    now = tags([*others, *names])
    emptied = {f"{TAG}{name}": "" for name in found if name.startswith("rows.") and f"{TAG}{name}" not in now}
    return now | emptied


def _name(n: int) -> str:
    return "rows" if n == 1 else f"rows.{n}"


def _parts(names: Iterable[str]) -> Iterator[str]:
    """The names with commas between them, in texts of at most LENGTH characters."""
    part = ""
    for name in names:
        if part and len(part) + 1 + len(name) > LENGTH:
            yield part
            part = ""
        part = f"{part},{name}" if part else name
    if part:
        yield part
