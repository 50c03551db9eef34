"""`make gpu`: does everything work on this machine's GPU, and how fast? Minutes; nothing is downloaded.

python -m tests.gpu [--device cpu] [--preset micro] [--out FILE]

The checks run preset micro; the rates are those of --preset, on random weights and generated photographs. What needs
more than `semformer/` (the sweep, the price) is skipped where Ray or PyYAML are not installed.
"""

import argparse
import platform
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path

import torch

from semformer.config import PRESETS
from tests.gpu import checks, rates


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="paper", choices=tuple(PRESETS), help="whose rates are measured")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each rate")
    parser.add_argument("--photographs", type=int, default=384, help="of which batches are made")
    parser.add_argument("--compile", action="store_true", help="also the rates of training with torch.compile")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.md"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that PyTorch can use: --device cpu runs the same on the CPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [
        "# What a GPU makes of it\n",
        f"`python -m tests.gpu --device {options.device} --preset {options.preset}`, {date.today()}, on {name}; "
        f"torch {torch.__version__}, Python {platform.python_version()}.\n",
        "| check | passed | |\n|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    failures = []

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="semformer-gpu-") as scratch:
        for number, (what, check) in enumerate(checks.CHECKS.items()):
            folder = Path(scratch) / f"check-{number}"
            folder.mkdir()
            try:
                passed, remark = "yes", check(device, folder)
            except checks.Skipped as why:
                passed, remark = "skipped", str(why)
            except Exception as error:
                failures.append(f"{what}:\n{traceback.format_exc()}")
                passed, remark = "**no**", f"{type(error).__name__}: {error}".splitlines()[0]
            tell(f"| {what} | {passed} | {remark} |")
        started = time.monotonic()
        for line in rates.report(
            options.preset,
            device,
            Path(scratch),
            options.seconds,
            options.photographs,
            compiled_too=options.compile,
        ):
            tell(line)
        tell(f"\nMeasured in {time.monotonic() - started:.0f} s.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
