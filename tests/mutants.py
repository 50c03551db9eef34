"""The table of `make mutants`: of each file of the science, which share of its mutants the fast tests notice."""

import sys
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.stats import status_by_exit_code

WANTED = 90
"""Percent, of each file."""
UNNOTICED = ("survived", "no tests")


def main() -> int:
    print("| file | mutants | noticed | |\n|---|---:|---:|---|")
    failed = False
    for meta in sorted(Path("mutants").rglob("*.meta")):
        path = meta.relative_to("mutants").with_suffix("")
        data = SourceFileMutationData(path=path)
        data.load()
        statuses = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        tried = [status for status in statuses.values() if status not in ("not checked", "skipped")]
        if not tried:
            continue
        noticed = 100 * sum(status not in UNNOTICED for status in tried) / len(tried)
        failed |= noticed < WANTED
        print(f"| {path} | {len(tried)} | {noticed:.0f} % | {'' if noticed >= WANTED else '**too few**'} |")
    print("\n`mutmut show NAME` prints a mutant, `mutmut results` the names of those that nothing noticed.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
