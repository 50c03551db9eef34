"""The table of `make mutants`: of each file of the science, which share of its mutants the fast tests notice.

`--list` prints those that nothing noticed, with what they change.
"""

import re
import sys
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

WANTED = 90
"""Percent, of each file."""
UNNOTICED = ("survived", "no tests")
PLACES = (r"\.to\((?:None|[\w.]*device|\"cpu\")?(?:, )?(?:non_blocking=\w+)?\)", r",? ?device=[\w.]+")
"""Where tensors lie, and whether a copy is waited for: on a CPU, that changes nothing."""


def main() -> int:
    unnoticed: list[str] = []
    print("| file | mutants | noticed | of places alone | |\n|---|---:|---:|---:|---|")
    failed = False
    for meta in sorted(Path("mutants").rglob("*.meta")):
        path = meta.relative_to("mutants").with_suffix("")
        data = SourceFileMutationData(path=path)
        data.load()
        statuses = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        tried = {name: status for name, status in statuses.items() if status not in ("not checked", "skipped")}
        missed = {name: get_diff_for_mutant(name, path=path) for name, status in tried.items() if status in UNNOTICED}
        of_places = [name for name, diff in missed.items() if is_of_places(diff)]
        judged = len(tried) - len(of_places)
        if not judged:
            continue
        unnoticed += [f"{name}\n{changed(diff)}" for name, diff in missed.items() if name not in of_places]
        noticed = 100 * (len(tried) - len(missed)) / judged
        failed |= noticed < WANTED
        mark = "" if noticed >= WANTED else "**too few**"
        print(f"| {path} | {judged} | {noticed:.0f} % | {len(of_places)} | {mark} |")
    if "--list" in sys.argv:
        print("", *unnoticed, sep="\n")
    return int(failed)


def changed(diff: str) -> str:
    return "\n".join(line for line in diff.splitlines() if re.match(r"[-+](?![-+]{2})", line))


def is_of_places(diff: str) -> bool:
    """Whether nothing else is changed."""
    sides = {"-": "", "+": ""}
    for line in changed(diff).splitlines():
        for place in PLACES:
            line = re.sub(place, "", line)
        sides[line[0]] += re.sub(r", ?\)", ")", line[1:])
    return sides["-"] == sides["+"]


if __name__ == "__main__":
    sys.exit(main())
