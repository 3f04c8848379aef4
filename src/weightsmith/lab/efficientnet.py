"""EfficientNet-Lite0 alive, and photographs for it: crops of the three that scikit-learn and matplotlib ship."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.lab.models import efficientnet

BLOCKS = (
    # (blocks, kernel, stride of the first, expansion, outputs)
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


def conv(inside: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias or padding."""
    return nn.Conv2d(inside, out, kernel, stride, groups=groups, bias=False)


def norm(width: int) -> nn.BatchNorm2d:
    """A batch norm as TensorFlow has it."""
    return nn.BatchNorm2d(width, eps=1e-3)


def padded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Zeros around the image as TensorFlow puts them: the odd one below and to the right."""
    (kernel, _), (stride, _) = layer.kernel_size, layer.stride
    edges = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
    return functional.pad(x, [part for edge in edges for part in (edge // 2, edge - edge // 2)])


class Block(nn.Module):
    """A pointwise convolution to more channels, one over each channel, a pointwise one back."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inside * expansion
        self.wider, self.residual = expansion > 1, stride == 1 and inside == out
        if self.wider:
            self._expand_conv, self._bn0 = conv(inside, width), norm(width)
        self._depthwise_conv, self._bn1 = conv(width, width, kernel, stride, groups=width), norm(width)
        self._project_conv, self._bn2 = conv(width, out), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Channels at the stride's resolution."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.wider else x
        y = functional.relu6(self._bn1(self._depthwise_conv(padded(y, self._depthwise_conv))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Standardised images to logits of ImageNet's thousand classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = conv(3, 32, 3, 2), norm(32)
        blocks, inside = [], 32
        for count, kernel, stride, expansion, out in BLOCKS:
            for k in range(count):
                blocks.append(Block(inside, out, kernel, stride if k == 0 else 1, expansion))
                inside = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = conv(inside, 1280), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = functional.relu6(self._bn0(self._conv_stem(padded(x, self._conv_stem))))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))


def trained() -> EfficientNetLite0:
    """With the weights of its package, in evaluation."""
    weights, model = efficientnet(), EfficientNetLite0()
    model.load_state_dict({name: weights.read(name) for name in weights})
    return model.eval()


@cache
def photographs() -> dict[str, Tensor]:
    """Three photographs, (3, height, width), as the network takes them: from minus one to one."""
    import numpy as np
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = dict(zip(("temple", "flower"), load_sample_images().images, strict=True))
    found["portrait"] = np.array(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    return {name: (torch.tensor(image).permute(2, 0, 1).float() - 127) / 128 for name, image in found.items()}


def crops(count: int, side: int, seed: int = 0, names: tuple[str, ...] = ("temple", "flower", "portrait")) -> Tensor:
    """Square cut-outs of photographs, from a half to all of the shorter side, at random places, half of them mirrored.

    Args:
        count: how many, the photographs in turn.
        side: pixels that each is scaled to.
        seed: of the places.
        names: of the photographs.
    """
    rng, made = torch.Generator().manual_seed(seed), []
    for k in range(count):
        image = photographs()[names[k % len(names)]]
        height, width = image.shape[1:]
        size = int(min(height, width) * (0.5 + 0.5 * float(torch.rand((), generator=rng))))
        top, left = (int(torch.randint(n - size + 1, (), generator=rng)) for n in (height, width))
        part = image[None, :, top : top + size, left : left + size]
        part = functional.interpolate(part, (side, side), mode="bilinear", antialias=True)
        made.append(part.flip(3) if k % 2 else part)
    return torch.cat(made)
