"""`make faults`: a sweep on a real cluster of three nodes survives what clusters do; prints what each fault cost.

python -m tests.faults [WORD...]      only the cases whose names contain one of the words
"""

import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults.cases import CASES
from tests.faults.scene import three_nodes


def main(words: list[str]) -> int:
    chosen = {name: case for name, case in CASES.items() if not words or any(word in name for word in words)}
    print("| fault | epochs redone | stages | MLflow | remark | time |\n|---|---:|---|---|---|---:|", flush=True)
    failures = []
    with tempfile.TemporaryDirectory(prefix="semformer-faults-") as folder, three_nodes() as site:
        for n, (name, case) in enumerate(chosen.items()):
            started = time.monotonic()
            try:
                result = case(Path(folder) / str(n), site)
                cells = (result.redone, result.stages, result.mlflow, result.remark)
            except Exception:
                failures.append(f"{name}:\n{traceback.format_exc()}")
                cells = ("?", "?", "?", "**not survived**")
            told = " | ".join(map(str, cells))
            print(f"| {name} | {told} | {time.monotonic() - started:.0f} s |", flush=True)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
