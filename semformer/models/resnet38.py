"""ResNet38 (Wu, Shen and van den Hengel, "Wider or Deeper", model A1) with output stride 8, under the names that its
weights usually have.

Legend: B images, H W pixels, C channels; h = ceil(H / 8), w = ceil(W / 8).
"""

from torch import Tensor, nn
from torch.nn.functional import relu

CHANNELS = (512, 1024, 4096)
"""Of the features after the fourth, fifth and last group of blocks."""


class Block(nn.Module):
    """Each convolution follows a BatchNorm and a ReLU; a 1x1 convolution where stride or width change.

    Two `widths` are two 3x3 convolutions, three are 1x1, 3x3 and 1x1.
    """

    def __init__(self, width: int, *widths: int, stride: int = 1, dilations: tuple[int, ...] = (1, 1)):
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        self.names = ("2a", "2b1", "2b2")[: len(widths)]
        changes = stride > 1 or width != widths[-1]
        self.conv_branch1 = nn.Conv2d(width, widths[-1], 1, stride, bias=False) if changes else None
        for name, out, kernel, dilation in zip(self.names, widths, kernels, dilations, strict=True):
            padding = dilation * (kernel // 2)
            self.add_module(f"bn_branch{name}", nn.BatchNorm2d(width))
            self.add_module(
                f"conv_branch{name}", nn.Conv2d(width, out, kernel, stride, padding, dilation=dilation, bias=False)
            )
            width, stride = out, 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the input after the first BatchNorm and ReLU."""
        branch, first = x, None
        for name in self.names:
            branch = relu(self.get_submodule(f"bn_branch{name}")(branch))
            first = branch if first is None else first
            branch = self.get_submodule(f"conv_branch{name}")(branch)
        assert first is not None  # a block has two convolutions or three
        return branch + (x if self.conv_branch1 is None else self.conv_branch1(first)), first


class ResNet38(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.b2 = Block(64, 128, 128, stride=2)
        self.b2_1, self.b2_2 = (Block(128, 128, 128) for _ in range(2))
        self.b3 = Block(128, 256, 256, stride=2)
        self.b3_1, self.b3_2 = (Block(256, 256, 256) for _ in range(2))
        self.b4 = Block(256, 512, 512, stride=2)
        self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5 = (Block(512, 512, 512) for _ in range(5))
        self.b5 = Block(512, 512, 1024, dilations=(1, 2))
        self.b5_1, self.b5_2 = (Block(1024, 512, 1024, dilations=(2, 2)) for _ in range(2))
        self.b6 = Block(1024, 512, 1024, 2048, dilations=(1, 4, 1))
        self.b7 = Block(2048, 1024, 2048, 4096, dilations=(1, 4, 1))
        self.bn7 = nn.BatchNorm2d(4096)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the features of `CHANNELS`, (B, C, h, w), after BatchNorm and ReLU."""
        x, features = self.conv1a(images), []
        for name, block in self.named_children():
            if isinstance(block, Block):
                x, before = block(x)
                if name in ("b5", "b6"):
                    features.append(before)
        return [*features, relu(self.bn7(x))]
