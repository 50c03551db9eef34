"""DeepLabV1 (Chen et al., ICLR 2015) on a backbone of output stride 8, as on ResNet38 usually.

Legend: B images, K classes (0 is background), H W pixels; h = H / 8, w = W / 8.
"""

from torch import Tensor, nn

from semformer.models.features import Features

OUTPUT_STRIDE = 8


class DeepLab(nn.Module):
    def __init__(self, features: Features, *, n_classes: int, width: int, dilation: int):
        super().__init__()
        self.features = features
        self.fc8_seg_conv1 = nn.Conv2d(features.channels[-1], width, 3, padding=dilation, dilation=dilation)
        self.fc8_seg_conv2 = nn.Conv2d(width, n_classes, 3, padding=dilation, dilation=dilation)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, h, w) of images (B, 3, H, W)."""
        return self.fc8_seg_conv2(self.fc8_seg_conv1(self.features(images)[-1]).relu())
