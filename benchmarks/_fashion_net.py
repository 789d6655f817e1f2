"""A residual network of 0.7 M parameters for Fashion-MNIST, as a user would write it: the model of train_pipeline.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from deploycc.runtime.transform import Transform

TRANSFORM = Transform(resize=(28, 28), color="L", mean=(0.286,), std=(0.353,))
WIDTHS = (64, 128)
BLOCKS = 2


class Block(nn.Module):
    """Two convolutions and a shortcut (K. He et al., 2016)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        plain = stride == 1 and width == out
        self.shortcut = nn.Identity() if plain else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Net(nn.Module):
    """Grey pictures of 28×28 pixels to ten classes."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        width = widths[0]
        for stage, out in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(width, out, 2 if stage and not block else 1))
                width = out
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.layers(x).mean((2, 3)))


def net() -> nn.Module:
    """With new weights; deploycc seeds them."""
    return Net()
