"""What must be the same on every machine that a sweep runs on: Python, packages, and this project's own code."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from semformer import keys

PACKAGES = ("ray", "semformer-sweeps", "torch", "torchvision", "timm", "numpy", "pillow")


@cache
def versions() -> dict[str, str]:
    """Of Python, of `PACKAGES`, and the start of the sha256 over this project's code and weights, as found here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    digest = hashlib.sha256()
    for package in (Path(keys.__file__).parent, Path(__file__).parents[1]):
        for path in sorted([*package.rglob("*.py"), *package.rglob("*.safetensors")]):
            digest.update(f"{package.name}/{path.relative_to(package)}\n".encode() + path.read_bytes())
    return found | {"code": digest.hexdigest()[:12]}


def difference(driver: Mapping[str, str]) -> str:
    """What this machine has other than the driver of a sweep, for people; "" where it is all the same."""
    here = versions()
    told = [f"{name} {here.get(name)} (driver: {value})" for name, value in driver.items() if here.get(name) != value]
    return f"has {', '.join(told)}: install the same everywhere (constraints.txt)" if told else ""
