"""Mixed precision."""

import torch

from semformer.errors import UserError


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision as the config names it; raises UserError for a GPU that has no bfloat16."""
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: run with --set precision=float32")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
