"""Weights from files: reading them, fitting them to a network, and translating the published names into ours."""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from semformer.errors import UserError, first_line


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or a PyTorch file (weights only, nothing is unpickled into code)."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no weights file {path}") from error
    except Exception as error:
        # PyTorch's text for an UnpicklingError advises to run the file's code
        told = "" if isinstance(error, UnpicklingError) else f" ({type(error).__name__}: {first_line(error)})"
        raise UserError(
            f"cannot read weights from {path}: it is no .safetensors and no PyTorch file of tensors{told}"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not (
        isinstance(state, dict)
        and state
        and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in state.items())
    ):
        raise UserError(f"{path} holds no dictionary of tensors by name")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_state(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a complete state; raises UserError that names the first parameter that does not fit."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{origin} is of another architecture: it lacks {name} {tuple(value.shape)}")
        if state[name].shape != value.shape:
            raise UserError(
                f"{origin} is of another architecture: {name} has shape {tuple(state[name].shape)}, "
                f"the config asks for {tuple(value.shape)}"
            )
        if not state[name].isfinite().all():
            raise UserError(f"{origin} is damaged: {name} has values that are no finite numbers")
    extra = sorted(set(state) - set(own))
    if extra:
        raise UserError(f"{origin} is of another architecture: it has {extra[0]}, which the config has no place for")
    module.load_state_dict(state)


_VIT = (
    (r"grid_posembed", r"pos_embed"),
    (r"model\.patch_embed\.proj\.(.*)", r"patch_embed.\1"),
    (r"model\.(blocks\..*)", r"\1"),
    (r"model\.(norm\..*)", r"\1"),
    (r"model\.(cls_token|dist_token|pos_embed|head.*)", None),
)
# Pattern -> our name; None is a weight that the method does not use.
RULES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "caae": (
        *((rf"encoder\.vit_backbone\.{old}", new and f"encoder.{new}") for old, new in _VIT),
        (r"convert\.0\.weight", "primary.weight"),
        (r"crs\.0\.weight", "semantics_weight"),
        (r"re_convert\.0\.weight", "decoder.recover.weight"),
        (r"re_convert\.1\.(.*)", r"decoder.recover_norm.\1"),
        (r"mlp\.(.*)", r"decoder.embed.\1"),
        (r"decoder\.mlp\.(.*)", r"decoder.project.\1"),
        (r"decoder\.((blocks|norm)\..*)", r"decoder.\1"),
    ),
    "segmentor": (
        *((rf"segmentor\.backbone\.{old}", new and f"backbone.{new}") for old, new in _VIT),
        (r"segmentor\.cls_token", "class_tokens"),
        (r"segmentor\.cls_posembed", "class_positions"),
        (r"segmentor\.cls_head\.(weight|bias)", r"class_head_\1"),
        (r"segmentor\.seg_head\.1\.(weight|bias)", r"patch_head.\1"),
    ),
    "deeplab": (
        (r"(fc8_seg_conv[12]\.(weight|bias))", r"\1"),
        (r"((conv1a|b\d(_\d)?|bn7)\..*)", r"features.backbone.\1"),
    ),
}


def published_to_ours(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of our network from one under the published names.

    kind: "caae", "segmentor" or "deeplab". Raises UserError that names a weight which the method does not know.
    """
    ours = {}
    for name, value in state.items():
        for old, new in RULES[kind]:
            match = re.fullmatch(old, name)
            if match:
                if new:
                    ours[match.expand(new)] = value
                break
        else:
            raise UserError(f"{name} is no weight of a published {kind}: is this file of another kind?")
    return ours


def load_published(model: nn.Module, kind: str, path: str | Path) -> None:
    """Load a file saved under the published names into our network of the same architecture."""
    state = published_to_ours(kind, read_weights(Path(path)))
    load_state(model, batch_counters(model) | state, str(path))


def batch_counters(model: nn.Module) -> dict[str, Tensor]:
    """What BatchNorms count, for files that were converted, which have none of it."""
    return {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
