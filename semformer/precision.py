"""How exactly a device computes: in which precision, and whether twice the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from semformer.errors import UserError


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision as the config names it; raises UserError for a GPU that has no bfloat16."""
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: run with --set precision=float32")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def determinism(device: torch.device) -> Iterator[None]:
    """Makes torch choose what gives the same digits again, on a GPU where there is such a choice (it warns otherwise).

    Nothing of it is left behind: a stage gives the same whether another was made before it in the process or not.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
