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
PLACES = (
    r"\.to\((?:None|[\w.]*device|\"cpu\")?(?:, )?(?:non_blocking=\w+)?\)",
    r"(?<=\.to\()(?:None|\"cpu\"), ",
    r",? ?device=[\w.]+",
    r"non_blocking=\w+(?:, )?",
    r",? ?fused=\w+",
    r".*(?:cuda|gpu_memory).*",
)
"""Where tensors lie, whether a copy is waited for, and what is done on a GPU alone: on a CPU, that changes nothing."""


def main() -> int:
    unnoticed: list[str] = []
    print("| file | mutants | noticed | of places alone | of words alone | |\n|---|---:|---:|---:|---:|---|")
    failed = False
    for meta in sorted(Path("mutants").rglob("*.meta")):
        path = meta.relative_to("mutants").with_suffix("")
        data = SourceFileMutationData(path=path)
        data.load()
        statuses = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        tried = {name: status for name, status in statuses.items() if status not in ("not checked", "skipped")}
        missed = {name: get_diff_for_mutant(name, path=path) for name, status in tried.items() if status in UNNOTICED}
        of_places = [name for name, diff in missed.items() if is_of_places(diff)]
        of_words = [name for name, diff in missed.items() if is_of_words(diff)]
        judged = len(tried) - len(of_places) - len(of_words)
        if not judged:
            continue
        unnoticed += [f"{name}\n{changed(diff)}" for name, diff in missed.items() if name not in of_places + of_words]
        noticed = 100 * (len(tried) - len(missed)) / judged
        failed |= noticed < WANTED
        mark = "" if noticed >= WANTED else "**too few**"
        print(f"| {path} | {judged} | {noticed:.0f} % | {len(of_places)} | {len(of_words)} | {mark} |")
    if "--list" in sys.argv:
        print("", *unnoticed, sep="\n")
    return int(failed)


def changed(diff: str) -> str:
    return "\n".join(line for line in diff.splitlines() if re.match(r"[-+](?![-+]{2})", line))


def is_of_places(diff: str) -> bool:
    """Whether nothing else is changed."""
    sides = {"-": "", "+": ""}
    for line in changed(diff).splitlines():
        code = line[1:]
        for place in PLACES:
            code = re.sub(place, "", code)
        sides[line[0]] += re.sub(r", ?\)", ")", code)
    return sides["-"] == sides["+"]


def is_of_words(diff: str) -> bool:
    """Whether nothing but the wording of sentences is changed: tests look for what a message names, not how."""
    before, after = ([line for line in changed(diff).splitlines() if line.startswith(sign)] for sign in ("-", "+"))
    if len(before) != len(after):
        return False
    texts = [re.split(r'"((?:[^"\\]|\\.)*)"', line[1:]) for line in before]
    others = [re.split(r'"((?:[^"\\]|\\.)*)"', line[1:]) for line in after]
    pairs = [pair for text, other in zip(texts, others, strict=True) for pair in zip(text, other, strict=False)]
    return [len(text) for text in texts] == [len(text) for text in others] and all(
        text == other or (" " in text and text.lower() == other.replace("XX", "").lower()) for text, other in pairs
    )


if __name__ == "__main__":
    sys.exit(main())
