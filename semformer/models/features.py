"""Feature maps of a backbone, as AffinityNet and DeepLab take them: ResNet38, a plain ViT, or any CNN of timm.

Legend: B images, H W pixels, C channels of a feature map.
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import timm
import torch
from torch import Tensor, nn

from semformer.errors import UserError, first_line
from semformer.models.resnet38 import CHANNELS, ResNet38
from semformer.models.vit import Backbone, backbone_shape, build_backbone, check_known, is_plain_vit, timm_model
from semformer.weights import batch_counters, load_state, read_weights

RESNET38 = "resnet38"
Frozen = Literal["nothing", "statistics", "all"]


class Features(nn.Module):
    """A backbone of whose maps all are read, finest first. `channels`: C of each; `strides`: pixels to one of theirs;
    `multiple`: of what sizes of images must be multiples; `frozen`: what training leaves as it is."""

    def __init__(
        self,
        backbone: nn.Module,
        read: Callable[[Any, Tensor], list[Tensor]],
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        multiple: int = 1,
    ):
        """read(backbone, images): the maps."""
        super().__init__()
        self.backbone, self.channels, self.strides, self.multiple = backbone, channels, strides, multiple
        self.frozen: Frozen = "nothing"
        self._read = read

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C, H / stride, W / stride) for each C and stride."""
        return self._read(self.backbone, images)

    def freeze(self, what: Frozen) -> Self:
        """Nothing, BatchNorms (their statistics and parameters), or all parameters."""
        self.frozen = what
        frozen: Iterable[nn.Module] = self.modules() if what == "all" else self._norms()
        for module in frozen:
            module.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for norm in self._norms():
            norm.eval()
        return self

    def _norms(self) -> list[nn.BatchNorm2d]:
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        return [] if self.frozen == "nothing" else norms


def _of_vit(vit: Backbone, images: Tensor) -> list[Tensor]:
    grid = tuple(side // vit.patch_size for side in images.shape[2:])
    return [vit(images).transpose(1, 2).unflatten(2, grid)]


def _of_timm(model: Any, images: Tensor) -> list[Tensor]:
    return model.forward_intermediates(images, intermediates_only=True)


def build_features(
    name: str, *, output_stride: int, dilated: bool = True, pretrained: bool, weights: str, image_size: int, field: str
) -> Features:
    """The features of a backbone whose coarsest have so many pixels to one of theirs.

    For that, timm's CNNs dilate their last convolutions, or not. Raises UserError as `check_features`, MachineError
    where weights cannot be downloaded.
    """
    channels, strides = check_features(name, output_stride, pretrained=pretrained, weights=weights, field=field)
    if name == RESNET38:
        resnet = ResNet38()
        if weights:
            _load(resnet, weights, weights)
        return Features(resnet, ResNet38.forward, channels, strides)
    if is_plain_vit(name):
        vit = build_backbone(name, pretrained=pretrained, weights=weights, image_size=image_size)
        return Features(vit, _of_vit, channels, strides, multiple=vit.patch_size)
    advice = f"in {field}.weights, or set {field}.pretrained=false"
    model = timm_model(name, pretrained and not weights, advice, num_classes=0, output_stride=output_stride)
    if weights:
        _load(model, weights, f"{weights}, read as {name},")
    if not dilated:
        _undilate(model)
    return Features(model, _of_timm, channels, strides)


@cache
def check_features(
    name: str, output_stride: int, *, pretrained: bool, weights: str, field: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channels and the strides of a backbone's features, without allocating its weights.

    Raises UserError, that names `field`, for a backbone that cannot be had with this output stride, and where weights
    are wanted that nobody has.
    """
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    if name == RESNET38:
        if pretrained and not weights:
            raise UserError(
                f"{field}: timm has no weights of {RESNET38}. Give a file with its ImageNet weights in {field}.weights "
                "(PyTorch's, conv1a.weight and so on; of an MXNet .params file, save its arrays under these names "
                f"first), or set {field}.pretrained=false"
            )
        channels, strides = CHANNELS, (8, 8, 8)
    elif is_plain_vit(name):
        shape = backbone_shape(name)
        channels, strides = (shape["dim"],), (shape["patch_size"],)
    else:
        channels, strides = _timm_features(name, output_stride, field)
    if strides[-1] != output_stride:
        raise UserError(
            f"{field}.backbone {name} has features of stride {strides[-1]}, not {output_stride}: take another"
        )
    return channels, strides


def _timm_features(name: str, output_stride: int, field: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    check_known(name)
    side = 4 * 32
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, output_stride=output_stride).eval()
            maps = _of_timm(model, torch.empty(1, 3, side, side))
    except Exception as error:  # each model in its own way
        raise UserError(
            f"{field}.backbone {name} is no CNN of timm that can have an output stride of {output_stride} "
            f"({first_line(error)}): take one that can, such as resnet50"
        ) from error
    return tuple(one.shape[1] for one in maps), tuple(side // one.shape[2] for one in maps)


def _load(model: nn.Module, path: str, origin: str) -> None:
    """Weights of a classifier, its head left out: of ConvNeXt's, the norm before the classes is the model's."""
    heads, own = ("fc", "fc8", "head", "classifier"), model.state_dict()
    of_file = read_weights(Path(path)).items()
    state = {name: value for name, value in of_file if name in own or name.split(".")[0] not in heads}
    load_state(model, batch_counters(model) | state, origin)


def _undilate(features: nn.Module) -> None:
    for module in features.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = (1, 1)
            module.padding = (module.kernel_size[0] // 2, module.kernel_size[1] // 2)
